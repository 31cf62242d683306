"""Why work waits: of a campaign for its tenant, of the whole queue for the operator; and who is there to do it."""

from dataclasses import asdict
from datetime import datetime
from typing import Annotated

from pydantic import Field

from smsd import causes, explain
from smsd.api.endpoint import Endpoint, Listing, Model, Page, Request
from smsd.api.errors import not_found
from smsd.api.models import Id


class Cause(Model):
    """One reason why work waits, and who can lift it, in plain words."""

    code: causes.Code
    message: str
    reason: str | None = Field(description="What a campaign or an account is paused for")
    since: datetime | None = Field(
        description="Since when; for a limit since when the oldest batch that it holds waits"
    )
    until: datetime | None
    can_be_lifted_by: causes.Lift
    how: str


class Explanation(Model):
    """A campaign's open messages, and the causes why they wait, strongest first; there is always one."""

    campaign_id: int
    status: str
    queued: int
    processing: int
    unknown: int
    pending_delivery: int
    causes: list[Cause]


def _causes(found: list[causes.Cause]) -> list[Cause]:
    return [Cause(**cause._asdict()) for cause in found]


async def explain_campaign(req: Request) -> Explanation:
    found = await explain.campaign(req.ctx.pool, req.ctx.settings, req.me.id, req.id)
    if found is None:
        raise not_found(f"campaign {req.id}")
    campaign = found.campaign
    return Explanation(
        campaign_id=campaign.id,
        status=campaign.status,
        queued=campaign.queued,
        processing=campaign.processing,
        unknown=campaign.unknown,
        pending_delivery=campaign.pending,
        causes=_causes(found.causes),
    )


# --------------------------------------------------------------------------------------- the queue


class Amount(Model):
    """So many batches, with so many messages."""

    batches: int = 0
    messages: int = 0


class Depths(Model):
    """What is open. ready: may leave; waiting: refused for now, to be tried again; leased: about to leave;
    sending: at Mitto; unknown: may have been accepted."""

    ready: Amount
    waiting: Amount
    leased: Amount
    sending: Amount
    unknown: Amount


class Used(Model):
    """One limit and what was granted of it in the last second; null where that is not known."""

    used: int | None
    limit: int


class Limiter(Model):
    """A limiter at this moment. `ceiling`: what Mitto taught us below the limit that is set."""

    requests: Used
    messages: Used | None = Field(description="Or segments, where the account counts those")
    ceiling: int | None = None
    blocked_until: datetime | None = None
    next_slot_at: datetime | None = None


class QueueAccount(Model):
    """A traffic account with all that is open in it."""

    id: int
    name: str
    open: Depths
    oldest_seconds: float | None
    limiter: Limiter
    in_flight_limit: int | None = Field(description="maxInFlight")
    open_breakers: int = Field(description="Replicas that cannot reach Mitto for it")
    causes: list[Cause]


class QueueLane(Model):
    """The batches of one campaign, or of a tenant's single messages, with what they wait for. `position`: 1 is
    claimed next; null while it is not in line."""

    id: int
    account_id: int
    tenant_id: int
    campaign_id: int | None
    priority: bool
    paused: bool
    open: Depths
    oldest_seconds: float | None
    limiter: Limiter = Field(description="The tenant's")
    position: int | None
    causes: list[Cause]


class QueueAnswer(Listing[QueueLane]):
    """The lanes that have something open, and every account."""

    accounts: list[QueueAccount]


class QueuePage(Page):
    """Lanes, of all accounts or of one."""

    account_id: Id | None = None


async def show_queue(req: Request) -> QueueAnswer:
    page: QueuePage = req.query
    found = await explain.queue(
        req.ctx.pool, req.ctx.settings, page.account_id, page.page_size, page.offset
    )
    if page.account_id is not None and not found.accounts:
        raise not_found(f"traffic account {page.account_id}")
    return QueueAnswer(
        items=[_lane(found.now, lane, why) for lane, why in found.lanes],
        accounts=[_account(found.now, *one) for one in found.accounts],
        total=found.total,
        page=page.page,
        page_size=page.page_size,
    )


def _account(
    now: datetime,
    account: causes.Account,
    depths: list[causes.Depth],
    why: list[causes.Cause],
) -> QueueAccount:
    amounts = {one.kind: Amount(batches=one.batches, messages=one.messages) for one in depths}
    kinds = {kind: amounts.get(kind, Amount()) for kind in Depths.model_fields}
    oldest = min((one.oldest_at for one in depths if one.kind != "unknown"), default=None)
    return QueueAccount(
        id=account.id,
        name=account.name,
        open=Depths(**kinds),
        oldest_seconds=_seconds(now, oldest),
        limiter=_limiter(account).model_copy(
            update={
                "ceiling": account.limit_now if account.learned else None,
                "blocked_until": account.blocked_until,
                "next_slot_at": account.slot_at,
            }
        ),
        in_flight_limit=account.max_in_flight,
        open_breakers=account.breakers,
        causes=_causes(why),
    )


def _lane(now: datetime, lane: causes.Lane, why: list[causes.Cause]) -> QueueLane:
    return QueueLane(
        id=lane.id,
        account_id=lane.account_id,
        tenant_id=lane.tenant_id,
        campaign_id=lane.campaign_id or None,
        priority=lane.priority,
        paused=lane.paused,
        open=Depths(
            ready=Amount(batches=lane.ready, messages=lane.ready_messages),
            waiting=Amount(batches=lane.waiting, messages=lane.waiting_messages),
            leased=Amount(batches=lane.leased, messages=lane.leased_messages),
            sending=Amount(batches=lane.sending, messages=lane.sending_messages),
            unknown=Amount(batches=lane.unknown, messages=lane.unknown_messages),
        ),
        oldest_seconds=_seconds(now, lane.oldest_at),
        limiter=_limiter(lane).model_copy(update={"next_slot_at": lane.stepped_over_until}),
        position=lane.position,
        causes=_causes(why),
    )


def _limiter(of: causes.Account | causes.Lane) -> Limiter:
    messages = None
    if of.messages_per_second is not None:
        messages = Used(used=of.messages_used, limit=of.messages_per_second)
    return Limiter(
        requests=Used(used=of.requests_used, limit=of.requests_per_second), messages=messages
    )


def _seconds(now: datetime, at: datetime | None) -> float | None:
    return None if at is None else max(0.0, round((now - at).total_seconds(), 3))


# ------------------------------------------------------------------------------------------ replicas


class Replica(Model):
    """A registration of a process. alive: it has not said goodbye, and its heartbeat moved within a lease."""

    id: int
    name: str
    version: str
    alive: bool
    started_at: datetime
    beat_at: datetime
    gone_at: datetime | None
    gone_reason: str | None
    leased: int = Field(description="Batches that it holds and that have not left")
    sending: int = Field(description="Batches that it has posted, without a result yet")


class ReplicaPage(Page):
    """Registrations, newest first."""

    alive: Annotated[bool | None, Field(description="true: those alive; false: the others")] = None


async def list_replicas(req: Request) -> Listing[Replica]:
    page: ReplicaPage = req.query
    found, total = await explain.replicas(
        req.ctx.pool, req.ctx.settings, page.alive, page.page_size, page.offset
    )
    items = [Replica(**asdict(one)) for one in found]
    return Listing[Replica](items=items, total=total, page=page.page, page_size=page.page_size)


ENDPOINTS = (
    Endpoint("GET", "/api/campaigns/{id}/explain", explain_campaign, "tenant", "Why its messages wait", Explanation),
    Endpoint("GET", "/api/admin/queue", show_queue, "admin", "What is open, and why it waits", QueueAnswer,
             query=QueuePage, errors=((404, "NOT_FOUND"),)),
    Endpoint("GET", "/api/admin/replicas", list_replicas, "admin", "The processes", Listing[Replica],
             query=ReplicaPage),
)  # fmt: skip
