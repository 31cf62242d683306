"""Campaigns from the moment they are sent: preview, enqueue, progress, and what can be done meanwhile and after.

A handler that changes a campaign locks it first, so that its checks still hold when it acts. Reading the audience
is left to the expander: enqueue counts it, reads a sample for the quote, holds the credits and answers.
"""

from datetime import datetime, timedelta
from typing import Literal

from pydantic import ConfigDict, Field

from smsd import campaigns, messages, tenants, text
from smsd import credits as money
from smsd.api import quotes, refresh
from smsd.api.checks import (
    Phone,
    campaign_of,
    inactive,
    insufficient,
    kept,
    locked,
    no_sender,
    read_phone,
    refused,
    with_messages,
)
from smsd.api.endpoint import Endpoint, Model, Request
from smsd.api.errors import ApiError, invalid, not_found, shown
from smsd.api.messages import Queued, send_one
from smsd.campaigns import Campaign, Progress
from smsd.expander import SEGMENTS_MOST
from smsd.model import CampaignStatus

SAMPLES = 10
REFRESH_MOST = 100


# ------------------------------------------------------------------------------ before and at once


class Sample(Model):
    """What one recipient would get."""

    to: str
    text: str
    segments: int


class Cost(Model):
    """Credits: as the sample has them on average, and what there is."""

    required: int
    available: int


class Preview(Model):
    """What sending would come to. `problems` are sentences, the gravest first."""

    count: int
    sample: list[Sample]
    credits: Cost
    encoding: Literal["GSM-7", "UCS-2"]
    problems: list[str]


class Enqueued(Model):
    """On its way. Numbers are estimates until the expansion is done."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "ok": True, "campaignId": 7, "status": "sending", "created": 12000, "queued": 12000,
                    "enqueuedJobs": 24,
                }
            ]
        }
    )  # fmt: skip
    ok: Literal[True] = True
    campaign_id: int
    status: Literal["sending"] = "sending"
    created: int
    queued: int
    enqueued_jobs: int = Field(description="Batches: requests to Mitto")


async def preview(req: Request) -> Preview:
    campaign = await campaign_of(req)
    template = quotes.template_of(campaign)
    people = await quotes.recipients_of(req, campaign)
    quote = quotes.quote(template, quotes.renderer_of(req, campaign, template), people)
    problems = list(quote.problems)
    if not (campaign.sender or req.me.sender):
        problems.insert(0, "there is no sender: give the campaign one, or set the tenant's")
    if not (campaign.text or "").strip():
        problems.insert(0, "there is no messageText")
    return Preview(
        count=quote.count,
        sample=[
            Sample(to=text.plus(one.phone), text=one.text, segments=one.segments)
            for one in quote.rendered[:SAMPLES]
        ],
        credits=Cost(
            required=quote.required,
            available=(await money.balance(req.db, req.me.id)).available,
        ),
        encoding=quote.encoding,
        problems=problems,
    )


async def enqueue(req: Request) -> Enqueued:
    tenant, campaign = await _locked_with_tenant(req)
    _check_unsent(campaign)
    if not tenant.active:
        raise inactive()
    _check_text(campaign)
    sender = campaign.sender or tenant.sender
    if sender is None:
        raise no_sender()
    template = _sendable(campaign)
    people = await quotes.recipients_of(req, campaign)
    if not people.count:
        raise ApiError(
            400,
            "NO_RECIPIENTS",
            "nobody is in the audience: check lists and filters, or add recipients",
        )
    quote = quotes.quote(template, quotes.renderer_of(req, campaign, template), people)
    account = await tenants.get_account(req.db, tenant.account_id)
    assert account is not None
    size = campaigns.batch_size(
        quote.count,
        req.ctx.settings.batch_size,
        tenant.batch_size,
        (account.messages_per_second, tenant.messages_per_second),
    )
    snapshot = campaigns.Snapshot(
        source=people.source,
        sender=sender,
        template=template.source,
        as_of=people.as_of,
        batch_size=size,
        highest_id=people.highest_id,
        of=quote.count,
        held=quote.required,
    )
    await campaigns.begin(req.connection, campaign, tenant.account_id, snapshot)
    if not await money.hold(req.db, tenant.id, quote.required, campaign.id, "enqueue"):
        raise await insufficient(req, quote.required)
    req.after_commit.append(lambda: req.ctx.nudge("expander"))
    return Enqueued(
        campaign_id=campaign.id,
        created=quote.count,
        queued=quote.count,
        enqueued_jobs=-(-quote.count // size),
    )


async def _locked_with_tenant(req: Request) -> tuple[tenants.Tenant, Campaign]:
    """The campaign locked, and its tenant as it stands and stays until the transaction ends."""
    await campaigns.keep_tenant(req.connection, req.me.id)
    tenant = await tenants.get_tenant(req.db, req.me.id)
    assert tenant is not None
    return tenant, await locked(req)


def _check_unsent(campaign: Campaign) -> None:
    if campaign.unsent:
        return
    code = "INVALID_STATUS"
    if campaign.status in (CampaignStatus.SENDING, CampaignStatus.PAUSED):
        code = "ALREADY_SENDING"
    raise ApiError(
        409,
        code,
        f"the campaign is {campaign.status}: it can be sent once; make a new one to send again",
        currentStatus=campaign.status,
    )


def _check_text(campaign: Campaign) -> None:
    if not (campaign.text or "").strip():
        raise ApiError(400, "NO_MESSAGE_TEXT", "the campaign has no messageText; give it one")


def _sendable(campaign: Campaign) -> text.Template:
    """The text as it will be sent; 400 where what looks like a tag is none."""
    template = quotes.template_of(campaign)
    if template.problems:
        details = [
            {"field": "messageText", "value": shown(campaign.text), "takes": problem}
            for problem in template.problems
        ]
        raise ApiError(400, "VALIDATION_ERROR", f"messageText: {template.problems[0]}", details)
    return template


# ---------------------------------------------------------------------------------------- status


class StatusCampaign(Model):
    """The campaign and its bar: `processed` of `total`."""

    id: int
    name: str
    status: CampaignStatus
    paused_reason: str | None
    paused_detail: str | None
    total: int
    sent: int
    failed: int
    processed: int
    created_at: datetime
    updated_at: datetime
    scheduled_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None


class Metrics(Model):
    """accepted = delivered + deliveryFailed + pendingDelivery; success = accepted - deliveryFailed;
    total = queued + processing + success + failed + unknown + cancelled + skipped."""

    total: int
    queued: int
    processing: int
    success: int
    failed: int
    accepted: int
    delivered: int
    delivery_failed: int
    pending_delivery: int
    unknown: int
    cancelled: int
    skipped: int
    processed: int


class ExpansionAnswer(Model):
    """How much of the audience has become messages."""

    done: bool
    read: int
    of: int


class CanonicalTotals(Model):
    """Sums as one of the frontends names them."""

    recipients: int
    accepted: int
    sent: int
    delivered: int
    failed: int


class CanonicalDelivery(Model):
    """What receipts say."""

    pending_delivery: int
    delivered: int
    failed_delivery: int


class Canonical(Model):
    """The same account as one of the frontends reads it."""

    status: CampaignStatus
    queued: int
    totals: CanonicalTotals
    delivery: CanonicalDelivery


class Eta(Model):
    """When it will be sent at the speed so far, and what holds it back."""

    finish_at: datetime | None
    rate_per_second: float | None
    limited_by: str | None = Field(
        description="expansion | account_limit | tenant_limit | account_throttled | account_paused"
    )


class Status(Model):
    """The account of a campaign, in one snapshot."""

    campaign: StatusCampaign
    metrics: Metrics
    expansion: ExpansionAnswer
    canonical: Canonical
    eta: Eta


async def _status(req: Request) -> Status:
    progress = await campaigns.totals(req.db, req.me.id, req.id)
    if progress is None:
        raise not_found(f"campaign {req.id}")
    return _account(progress, await campaigns.limited_by(req.db, progress))


def _account(progress: Progress, limited_by: str | None) -> Status:
    campaign, sums = progress.campaign, progress.totals
    total, rate = progress.shown_total, progress.rate_per_second
    finish_at = None
    if rate is not None:
        finish_at = progress.now + timedelta(seconds=(total - sums.processed) / rate)
    return Status(
        campaign=StatusCampaign(
            total=total, sent=sums.success, failed=sums.failed, processed=sums.processed,
            **{name: getattr(campaign, name) for name in _CAMPAIGN_FIELDS},
        ),
        metrics=Metrics(
            total=sums.total, queued=sums.queued, processing=sums.processing, success=sums.success,
            failed=sums.failed, accepted=sums.accepted, delivered=sums.delivered,
            delivery_failed=sums.delivery_failed, pending_delivery=sums.pending, unknown=sums.unknown,
            cancelled=sums.cancelled, skipped=sums.skipped, processed=sums.processed,
        ),
        expansion=ExpansionAnswer(done=progress.expanded, read=progress.read, of=progress.of),
        canonical=Canonical(
            status=campaign.status,
            queued=sums.queued,
            totals=CanonicalTotals(
                recipients=total, accepted=sums.accepted, sent=sums.success, delivered=sums.delivered,
                failed=sums.failed,
            ),
            delivery=CanonicalDelivery(
                pending_delivery=sums.pending, delivered=sums.delivered,
                failed_delivery=sums.delivery_failed,
            ),
        ),
        eta=Eta(
            finish_at=finish_at,
            rate_per_second=None if rate is None else round(rate, 2),
            limited_by=limited_by,
        ),
    )  # fmt: skip


_CAMPAIGN_FIELDS = (
    "id", "name", "status", "paused_reason", "paused_detail", "created_at", "updated_at",
    "scheduled_at", "started_at", "finished_at",
)  # fmt: skip


# ------------------------------------------------------------------------------- while it is sent


class Retried(Model):
    """How many messages wait again."""

    retried: int


class Refreshed(Model):
    """`refreshed`: messages that Mitto told of; `updated`: those that moved; `pending`: those still without a final
    receipt."""

    refreshed: int
    updated: int
    pending: int


class TestMessage(Model):
    """Where the test goes."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"phone": "+306944123456"}]})
    phone: Phone


async def status(req: Request) -> Status:
    return await _status(req)


async def pause(req: Request) -> Status:
    with refused("paused"):
        await campaigns.pause(req.connection, await locked(req))
    return await _status(req)


async def resume(req: Request) -> Status:
    tenant, campaign = await _locked_with_tenant(req)
    if campaign.status == CampaignStatus.PAUSED and not tenant.active:
        raise inactive()
    with refused("resumed"):
        await campaigns.resume(req.connection, campaign)
    req.after_commit.append(lambda: req.ctx.nudge("expander"))
    return await _status(req)


async def cancel(req: Request) -> Status:
    with refused("cancelled"):
        await campaigns.cancel(req.connection, await locked(req))
    return await _status(req)


async def retry_failed(req: Request) -> Retried:
    tenant, campaign = await _locked_with_tenant(req)
    with refused("retried"), kept():
        retry = await campaigns.retry_failed(req.connection, campaign)
    if retry.retried and not tenant.active:
        raise inactive()
    if not retry.held:
        raise await insufficient(req, retry.required)
    return Retried(retried=retry.retried)


async def send_test(req: Request) -> Queued:
    phone = read_phone(req, req.body.phone)
    campaign = await campaign_of(req)
    _check_text(campaign)
    template = _sendable(campaign)
    renderer = quotes.renderer_of(req, campaign, template)
    people = await quotes.recipients_of(req, campaign)
    content = quotes.sample_text(template, renderer, people, phone)
    if text.segments(content).count > SEGMENTS_MOST:
        raise invalid("messageText", content, f"a text of at most {SEGMENTS_MOST} segments")
    message_id = await send_one(req, phone, content, campaign.sender)
    return Queued(id=message_id, status="queued")


async def refresh_status(req: Request) -> Refreshed:
    campaign = with_messages(await campaign_of(req))
    waiting = await messages.refresh_page(req.db, campaign.id, REFRESH_MOST)
    result = await refresh.ask(req.ctx, [provider_id for _, provider_id in waiting])
    return Refreshed(
        refreshed=result.refreshed,
        updated=result.updated,
        pending=(await campaigns.stats(req.db, campaign.id)).pending_delivery,
    )


_ONE = "/api/campaigns/{id}"
_STATUS = ((409, "INVALID_STATUS"),)
_SENDING = (
    *_STATUS, (409, "ALREADY_SENDING"), (403, "INACTIVE_SUBSCRIPTION"), (400, "NO_MESSAGE_TEXT"),
    (400, "NO_SENDER"), (400, "NO_RECIPIENTS"), (402, "INSUFFICIENT_CREDITS"),
)  # fmt: skip

ENDPOINTS = (
    Endpoint("GET", _ONE + "/preview", preview, "tenant", "Size, samples, cost and flaws before sending", Preview),
    Endpoint("POST", _ONE + "/enqueue", enqueue, "tenant", "Send", Enqueued, 202, transaction=True, idempotent=True, errors=_SENDING),
    Endpoint("GET", _ONE + "/status", status, "tenant", "The account of a campaign", Status),
    Endpoint("POST", _ONE + "/pause", pause, "tenant", "Stop sending until resumed", Status,
             transaction=True, errors=_STATUS),
    Endpoint("POST", _ONE + "/resume", resume, "tenant", "Go on sending", Status,
             transaction=True, errors=(*_STATUS, (403, "INACTIVE_SUBSCRIPTION"))),
    Endpoint("POST", _ONE + "/cancel", cancel, "tenant", "End: what has not left will not leave", Status,
             transaction=True, errors=_STATUS),
    Endpoint("POST", _ONE + "/retry-failed", retry_failed, "tenant", "Send again what was certainly refused", Retried,
             transaction=True, idempotent=True,
             errors=(*_STATUS, (402, "INSUFFICIENT_CREDITS"), (403, "INACTIVE_SUBSCRIPTION"), (410, "MESSAGES_REMOVED"))),
    Endpoint("POST", _ONE + "/test", send_test, "tenant", "Send the text to one number, with a sample's values",
             Queued, 202, body=TestMessage, transaction=True, idempotent=True,
             errors=((400, "NO_MESSAGE_TEXT"), (400, "NO_SENDER"), (402, "INSUFFICIENT_CREDITS"),
                     (403, "INACTIVE_SUBSCRIPTION"))),
    Endpoint("POST", _ONE + "/refresh-status", refresh_status, "tenant",
             "Ask Mitto about up to 100 messages without a final receipt", Refreshed,
             errors=((410, "MESSAGES_REMOVED"),)),
)  # fmt: skip
