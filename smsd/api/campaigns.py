"""Campaigns: drafts, their preview, the moment of sending, and what can be done while and after they are sent.

A handler that changes a campaign locks it first, so that its checks still hold when it acts. Reading the audience
is left to the expander: enqueue counts it, reads a sample for the quote, holds the credits and answers.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field

from smsd import campaigns, contacts, csvfile, recipients, tenants, text
from smsd import credits as money
from smsd.api import messages, quotes, refresh
from smsd.api.endpoint import Endpoint, Listing, Model, Page, Request
from smsd.api.errors import ApiError, invalid, not_found, shown
from smsd.api.messages import bad_text, campaign_of, insufficient, read_phone
from smsd.api.models import Id, Name, SenderId
from smsd.campaigns import Campaign, Progress
from smsd.database import Connection
from smsd.model import CampaignStatus

SAMPLES = 10
ERRORS_MOST = 100
UPLOAD_BYTES = 50_000_000
PIECE_BYTES = 1 << 16
REFRESH_MOST = 100
UNCHANGED: Any = None
"""The default of a field that a PUT leaves as it is."""


def _url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or any(c <= " " for c in value):
        raise ValueError("takes a link, http:// or https://")
    return value


Link = Annotated[str, Field(max_length=2000), AfterValidator(_url)]
Lists = Annotated[list[Id], Field(max_length=100)]
Gender = Literal["male", "female", "other", "prefer_not_to_say"]
AgeGroup = Literal["18_24", "25_39", "40_plus"]


# ------------------------------------------------------------------------------------------ shapes


class _Content(Model):
    """What a person sets of a campaign."""

    message_text: str | None = Field(
        None,
        max_length=text.SOURCE_LIMIT,
        description="With merge tags: {{firstName}}, {{attribute}}, {{name|default}}, {{link}}, {{unsubscribeUrl}}",
    )
    sender: SenderId | None = Field(None, description="null: the tenant's")
    message_type: Literal["marketing", "service"] = Field(
        "marketing", description="A marketing text gets the unsubscribe link appended"
    )
    link_url: Link | None = Field(None, description="What {{link}} stands for")
    list_ids: Lists = Field([], description="Contacts of these lists; empty: all subscribed")
    exclude_list_ids: Lists = Field([], description="But not of these")
    filter_gender: Gender | None = None
    filter_age_group: AgeGroup | None = None
    template_id: Id | None = Field(None, description="Not part of this version yet")
    scheduled_at: str | None = Field(None, description="Not part of this version yet")
    scheduled_date: str | None = Field(None, description="Not part of this version yet")
    scheduled_time: str | None = Field(None, description="Not part of this version yet")


class NewCampaign(_Content):
    """A draft. Without lists and filters it is for all subscribed contacts."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "Spring sale", "messageText": "Hi {{firstName|there}}, 20% off!"}]
        }
    )
    name: Name


class CampaignChange(_Content):
    """What is to be different; the rest stays."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "Summer sale"}]})
    name: Name = UNCHANGED
    message_type: Literal["marketing", "service"] = UNCHANGED
    list_ids: Lists = UNCHANGED
    exclude_list_ids: Lists = UNCHANGED


class Stats(Model):
    """Messages by what became of them. `sent`: accepted by Mitto and not known to have failed."""

    sent: int
    delivered: int
    failed: int
    pending_delivery: int


class CampaignAnswer(Model):
    """A campaign."""

    id: int
    name: str
    message_text: str | None
    sender: str | None
    message_type: Literal["marketing", "service"]
    link_url: str | None
    list_ids: list[int]
    exclude_list_ids: list[int]
    filter_gender: Gender | None
    filter_age_group: AgeGroup | None
    status: CampaignStatus
    paused_reason: str | None
    paused_detail: str | None
    created_at: datetime
    updated_at: datetime
    scheduled_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    stats: Stats


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


def _shape(campaign: Campaign, stats: campaigns.Stats) -> CampaignAnswer:
    values = asdict(campaign)
    del values["tenant_id"]
    return CampaignAnswer(message_text=values.pop("text"), stats=Stats(**stats._asdict()), **values)


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
_LATER = ("template_id", "scheduled_at", "scheduled_date", "scheduled_time")


# ------------------------------------------------------------------------------------------ drafts


async def create(req: Request) -> CampaignAnswer:
    content = await _content(req, req.body.model_dump())
    campaign = await campaigns.create(req.db, req.me.id, content.pop("name"), content)
    return _shape(campaign, await campaigns.stats(req.db, campaign.id))


async def list_campaigns(req: Request) -> Listing[CampaignAnswer]:
    query: CampaignsQuery = req.query
    found, total = await campaigns.list_page(
        req.db, req.me.id, query.q or None, query.status, query.page_size, query.offset
    )
    items = [_shape(campaign, stats) for campaign, stats in found]
    return Listing[CampaignAnswer](
        items=items, total=total, page=query.page, page_size=query.page_size
    )


async def get(req: Request) -> CampaignAnswer:
    campaign = await campaign_of(req)
    return _shape(campaign, await campaigns.stats(req.db, campaign.id))


async def change(req: Request) -> CampaignAnswer:
    campaign = await _locked(req)
    with _refused("changed"):
        if not campaign.unsent:
            raise campaigns.WrongStatus(campaign.status)
    changes = await _content(req, req.body.model_dump(exclude_unset=True))
    campaign = await campaigns.update(req.connection, campaign, changes)
    return _shape(campaign, await campaigns.stats(req.db, campaign.id))


async def delete(req: Request) -> None:
    campaign = await _locked(req)
    with _refused("deleted"):
        await campaigns.delete(req.connection, campaign)


class CampaignsQuery(Page):
    """Which campaigns: `q` is a part of the name."""

    q: str | None = Field(None, max_length=200)
    status: Literal[
        "draft", "scheduled", "sending", "paused", "completed", "failed", "cancelled"
    ] | None = None  # fmt: skip


async def _content(req: Request, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a body by their names in the room, checked as far as a draft must be right."""
    for field in _LATER:
        if values.pop(field, None) is not None:
            name = type(req.body).model_fields[field].alias
            raise ApiError(
                501, "NOT_IMPLEMENTED", f"{name} is not part of this version yet", {"field": name}
            )
    for field in ("list_ids", "exclude_list_ids"):
        if unknown := await campaigns.unknown_lists(
            req.connection, req.me.id, values.get(field, [])
        ):
            name = type(req.body).model_fields[field].alias
            raise invalid(str(name), unknown[0], "ids of lists; there is none with this")
    if "message_text" in values:
        values["text"] = values.pop("message_text")
        if values["text"] is not None:
            _check_template(values["text"])
    return values


def _check_template(source: str) -> None:
    """400 for a text that cannot be stored or sent, with the link that may be appended."""
    try:
        text.Template(text.with_unsubscribe(source))
    except text.TextError as error:
        raise bad_text("messageText", source, error) from None


async def _locked(req: Request) -> Campaign:
    campaign = await campaigns.lock(req.connection, req.me.id, req.id)
    if campaign is None:
        raise not_found(f"campaign {req.id}")
    return campaign


@contextmanager
def _refused(done: str) -> Iterator[None]:
    """Turns WrongStatus into 409 INVALID_STATUS."""
    try:
        yield
    except campaigns.WrongStatus as error:
        raise ApiError(
            409, "INVALID_STATUS", f"{error}: it cannot be {done} now", currentStatus=error.status
        ) from None


# ------------------------------------------------------------------------------------------ recipients


class BadRecipient(Model):
    """A line that could not be read."""

    line: int
    value: str
    message: str


class Added(Model):
    """What an upload of recipients came to; `errors` has the first 100."""

    added: int
    duplicates: int
    invalid: int
    errors: list[BadRecipient]


async def add_recipients(req: Request) -> Added:
    _check_draft(await campaign_of(req))
    content_type, charset = _format(req)
    # Whole, before the transaction: one must not wait for a slow upload.
    body = await _upload(req)
    added = Added(added=0, duplicates=0, invalid=0, errors=[])
    async with req.ctx.pool.acquire() as db, db.transaction():
        campaign = await campaigns.lock(db, req.me.id, req.id)
        if campaign is None:
            raise not_found(f"campaign {req.id}")
        _check_draft(campaign)
        blocks = recipients.parse(_pieces(body), content_type, charset, req.me.default_country)
        try:
            async for block in blocks:
                await _add_block(db, campaign, block, added)
        except csvfile.HeaderError as error:
            details = [{"field": "body", "value": error.value, "takes": str(error)}]
            raise ApiError(400, "VALIDATION_ERROR", str(error), details) from None
    return added


async def _add_block(
    db: Connection, campaign: Campaign, block: recipients.Block, added: Added
) -> None:
    part = await contacts.add_recipients(db, campaign.id, block.recipients)
    kept = sum(one.phone is None for one in block.recipients)
    added.added += part.added
    added.duplicates += part.duplicates
    added.invalid += part.invalid + len(block.errors) - kept
    room = ERRORS_MOST - len(added.errors)
    added.errors += [BadRecipient(**one._asdict()) for one in block.errors[:room]]


def _check_draft(campaign: Campaign) -> None:
    with _refused("given more recipients"):
        if not campaign.unsent:
            raise campaigns.WrongStatus(campaign.status)


def _format(req: Request) -> tuple[str, str]:
    """The content type and charset of an upload; 415 where they are not taken."""
    content_type, charset = req.raw.content_type, req.raw.charset or "utf-8"
    if content_type not in recipients.FORMATS:
        taken = ", ".join(recipients.FORMATS)
        raise ApiError(
            415, "UNSUPPORTED_MEDIA_TYPE", f"Content-Type: got {content_type}; taken are {taken}"
        )
    if not csvfile.CHARSETS.fullmatch(charset):
        raise ApiError(
            415,
            "UNSUPPORTED_MEDIA_TYPE",
            f"charset: got {charset}; taken are utf-8, iso-8859-7 and the like",
        )
    return content_type, charset


async def _upload(req: Request) -> bytes:
    body = bytearray()
    async for chunk in req.chunks():
        body += chunk
        if len(body) > UPLOAD_BYTES:
            raise ApiError(
                413,
                "PAYLOAD_TOO_LARGE",
                f"the body is larger than {UPLOAD_BYTES} bytes; send it in parts",
            )
    return bytes(body)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]


# ------------------------------------------------------------------------------------------ sending


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
        raise messages.inactive()
    template = _sendable(campaign)
    sender = campaign.sender or tenant.sender
    if sender is None:
        raise messages.no_sender()
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
    return tenant, await _locked(req)


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


def _sendable(campaign: Campaign) -> text.Template:
    """The text as it will be sent; 400 where there is none, or what looks like a tag is none."""
    if not (campaign.text or "").strip():
        raise ApiError(400, "NO_MESSAGE_TEXT", "the campaign has no messageText; give it one")
    template = quotes.template_of(campaign)
    if template.problems:
        details = [
            {"field": "messageText", "value": shown(campaign.text), "takes": problem}
            for problem in template.problems
        ]
        raise ApiError(400, "VALIDATION_ERROR", f"messageText: {template.problems[0]}", details)
    return template


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
    phone: messages.Phone


async def status(req: Request) -> Status:
    return await _status(req)


async def pause(req: Request) -> Status:
    with _refused("paused"):
        await campaigns.pause(req.connection, await _locked(req))
    return await _status(req)


async def resume(req: Request) -> Status:
    tenant, campaign = await _locked_with_tenant(req)
    if campaign.status == CampaignStatus.PAUSED and not tenant.active:
        raise messages.inactive()
    with _refused("resumed"):
        await campaigns.resume(req.connection, campaign)
    req.after_commit.append(lambda: req.ctx.nudge("expander"))
    return await _status(req)


async def cancel(req: Request) -> Status:
    with _refused("cancelled"):
        await campaigns.cancel(req.connection, await _locked(req))
    return await _status(req)


async def retry_failed(req: Request) -> Retried:
    tenant, campaign = await _locked_with_tenant(req)
    with _refused("retried"):
        retry = await campaigns.retry_failed(req.connection, campaign)
    if retry.retried and not tenant.active:
        raise messages.inactive()
    if not retry.held:
        raise await insufficient(req, retry.required)
    return Retried(retried=retry.retried)


async def send_test(req: Request) -> messages.Queued:
    phone = read_phone(req, req.body.phone)
    campaign = await campaign_of(req)
    template = _sendable(campaign)
    renderer = quotes.renderer_of(req, campaign, template)
    people = await quotes.recipients_of(req, campaign)
    content = quotes.sample_text(template, renderer, people, phone)
    message_id = await messages.send_one(req, phone, content, campaign.sender)
    return messages.Queued(id=message_id, status="queued")


async def refresh_status(req: Request) -> Refreshed:
    campaign = await campaign_of(req)
    waiting = await campaigns.refresh_page(req.db, campaign.id, REFRESH_MOST)
    result = await refresh.ask(req.ctx, [provider_id for _, provider_id in waiting])
    return Refreshed(
        refreshed=result.refreshed,
        updated=result.updated,
        pending=(await campaigns.stats(req.db, campaign.id)).pending_delivery,
    )


_ONE = "/api/campaigns/{id}"
_STATUS = ((409, "INVALID_STATUS"),)
_LATER_ERRORS = ((501, "NOT_IMPLEMENTED"),)
_SENDING = (
    *_STATUS, (409, "ALREADY_SENDING"), (403, "INACTIVE_SUBSCRIPTION"), (400, "NO_MESSAGE_TEXT"),
    (400, "NO_SENDER"), (400, "NO_RECIPIENTS"), (402, "INSUFFICIENT_CREDITS"),
)  # fmt: skip

ENDPOINTS = (
    Endpoint("POST", "/api/campaigns", create, "tenant", "New campaign, a draft", CampaignAnswer, 201,
             body=NewCampaign, idempotent=True, errors=_LATER_ERRORS),
    Endpoint("GET", "/api/campaigns", list_campaigns, "tenant", "Campaigns, newest first",
             Listing[CampaignAnswer], query=CampaignsQuery),
    Endpoint("GET", _ONE, get, "tenant", "One campaign", CampaignAnswer),
    Endpoint("PUT", _ONE, change, "tenant", "Change a campaign that was not sent yet", CampaignAnswer,
             body=CampaignChange, transaction=True, errors=(*_STATUS, *_LATER_ERRORS)),
    Endpoint("DELETE", _ONE, delete, "tenant", "Delete a campaign that was not sent yet", None, 204,
             transaction=True, errors=_STATUS),
    Endpoint("POST", _ONE + "/recipients", add_recipients, "tenant",
             "Recipients of this campaign alone, as NDJSON or CSV, instead of stored contacts", Added,
             raw_body=True, errors=(*_STATUS, (413, "PAYLOAD_TOO_LARGE"), (415, "UNSUPPORTED_MEDIA_TYPE"))),
    Endpoint("GET", _ONE + "/preview", preview, "tenant", "Size, samples, cost and flaws before sending", Preview),
    Endpoint("POST", _ONE + "/enqueue", enqueue, "tenant", "Send", Enqueued, 202, idempotent=True, errors=_SENDING),
    Endpoint("GET", _ONE + "/status", status, "tenant", "The account of a campaign", Status),
    Endpoint("POST", _ONE + "/pause", pause, "tenant", "Stop sending until resumed", Status,
             transaction=True, errors=_STATUS),
    Endpoint("POST", _ONE + "/resume", resume, "tenant", "Go on sending", Status,
             transaction=True, errors=(*_STATUS, (403, "INACTIVE_SUBSCRIPTION"))),
    Endpoint("POST", _ONE + "/cancel", cancel, "tenant", "End: what has not left will not leave", Status,
             transaction=True, errors=_STATUS),
    Endpoint("POST", _ONE + "/retry-failed", retry_failed, "tenant", "Send again what was certainly refused", Retried,
             idempotent=True,
             errors=(*_STATUS, (402, "INSUFFICIENT_CREDITS"), (403, "INACTIVE_SUBSCRIPTION"))),
    Endpoint("POST", _ONE + "/test", send_test, "tenant", "Send the text to one number, with a sample's values",
             messages.Queued, 202, body=TestMessage, idempotent=True,
             errors=((400, "NO_MESSAGE_TEXT"), (400, "NO_SENDER"), (402, "INSUFFICIENT_CREDITS"),
                     (403, "INACTIVE_SUBSCRIPTION"))),
    Endpoint("POST", _ONE + "/refresh-status", refresh_status, "tenant",
             "Ask Mitto about up to 100 messages without a final receipt", Refreshed),
)  # fmt: skip
