"""Campaigns: drafts, the moment of sending, what may be done while and after it, and how far it has come.

What moves between states is decided in the database: `begin` puts a snapshot where the expander finds it, the
functions in `sql/migrations` pause, cancel, retry and finish. Money for a begin is held by the caller, in the same
transaction. Whoever changes a campaign locks it first (`lock`), so decisions about one follow each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date, datetime
from typing import Any, NamedTuple

from smsd import database
from smsd.database import Connection, Executor, Record
from smsd.model import CampaignStatus

SQL = database.queries("campaigns")

PAUSED_BY_USER = "PAUSED_BY_USER"
SMALLEST_BATCH = 100
_BATCHES_WANTED = 20  # a small campaign is cut into so many, to be sent by several workers

_UNSENT = (CampaignStatus.DRAFT, CampaignStatus.SCHEDULED)


class WrongStatus(Exception):  # noqa: N818 - a fact, not a fault
    """The campaign's status does not allow this."""

    def __init__(self, status: CampaignStatus) -> None:
        super().__init__(f"the campaign is {status}")
        self.status = status


class MessagesRemoved(Exception):  # noqa: N818 - likewise
    """Retention has removed the campaign's messages, or is about to."""

    def __init__(self, removed_at: datetime) -> None:
        super().__init__(f"its messages were removed at {removed_at:%Y-%m-%d %H:%M:%S}Z")
        self.removed_at = removed_at


@dataclass(frozen=True, slots=True)
class Campaign:
    """One campaign as its row stands. Without lists and filters it is for all subscribed contacts. `removed_at`: since
    when its messages are gone."""

    id: int
    tenant_id: int
    name: str
    text: str | None
    sender: str | None
    message_type: str
    link_url: str | None
    list_ids: list[int]
    exclude_list_ids: list[int]
    filter_gender: str | None
    filter_age_group: str | None
    status: CampaignStatus
    paused_reason: str | None
    paused_detail: str | None
    created_at: datetime
    updated_at: datetime
    scheduled_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    removed_at: datetime | None

    @property
    def unsent(self) -> bool:
        """Whether it may still be changed, deleted, sent."""
        return self.status in _UNSENT


class Stats(NamedTuple):
    """What a list shows of a campaign: messages by what became of them."""

    sent: int
    delivered: int
    failed: int
    pending_delivery: int


@dataclass(frozen=True, slots=True)
class Totals:
    """The parts of a campaign at one moment. `pending`: accepted by Mitto, no final receipt yet."""

    queued: int
    processing: int
    pending: int
    delivered: int
    delivery_failed: int
    refused: int
    unknown: int
    cancelled: int
    skipped: int
    spent: int

    @property
    def accepted(self) -> int:
        """Mitto took it."""
        return self.pending + self.delivered + self.delivery_failed

    @property
    def success(self) -> int:
        """Accepted, and not known to have failed."""
        return self.pending + self.delivered

    @property
    def failed(self) -> int:
        """Refused by Mitto, or accepted and not delivered."""
        return self.refused + self.delivery_failed

    @property
    def processed(self) -> int:
        """All whose fate at the sending end is known."""
        return self.success + self.failed + self.unknown + self.cancelled + self.skipped

    @property
    def total(self) -> int:
        """All messages there are."""
        return self.queued + self.processing + self.processed


@dataclass(frozen=True, slots=True)
class Progress:
    """A campaign with its parts in one snapshot, taken at `now`. `of`: recipients counted when it was enqueued."""

    campaign: Campaign
    totals: Totals
    expanded: bool
    read: int
    of: int
    now: datetime

    @property
    def shown_total(self) -> int:
        """The end of the bar: never less than what it was while recipients were being read."""
        return self.totals.total if self.expanded else max(self.totals.total, self.of)

    @property
    def rate_per_second(self) -> float | None:
        """Messages processed a second since the start, while sending; None where there is nothing to tell from."""
        campaign, processed = self.campaign, self.totals.processed
        if (
            campaign.status != CampaignStatus.SENDING
            or campaign.started_at is None
            or not processed
        ):
            return None
        return processed / max((self.now - campaign.started_at).total_seconds(), 0.001)


class Snapshot(NamedTuple):
    """What a campaign will be sent by, whatever is changed later."""

    source: str
    sender: str
    template: str
    as_of: date
    batch_size: int
    highest_id: int
    of: int
    held: int


# ------------------------------------------------------------------------------------------ drafts


async def create(db: Executor, tenant_id: int, name: str, content: Mapping[str, Any]) -> Campaign:
    """A new draft. `content`: fields of Campaign that a person sets, by name."""
    values = {"message_type": "marketing", "list_ids": [], "exclude_list_ids": [], **content}
    row = await db.fetchrow(
        SQL["create"], tenant_id, name, *(values.get(field) for field in _CONTENT)
    )
    assert row is not None
    return _campaign(row)


async def get(db: Executor, tenant_id: int, campaign_id: int) -> Campaign | None:
    """The tenant's campaign of that id."""
    row = await db.fetchrow(SQL["get"], campaign_id, tenant_id)
    return _campaign(row) if row else None


async def keep_tenant(db: Connection, tenant_id: int) -> None:
    """Nobody changes the tenant before this transaction ends. To be called before `lock`: who changes a tenant
    touches its campaigns afterwards."""
    await db.execute(SQL["keep_tenant"], tenant_id)


async def lock(db: Connection, tenant_id: int, campaign_id: int) -> Campaign | None:
    """Like `get`, and nobody else decides about the campaign before this transaction ends."""
    row = await db.fetchrow(SQL["lock"], campaign_id, tenant_id)
    return _campaign(row) if row else None


async def list_page(
    db: Executor, tenant_id: int, q: str | None, status: str | None, limit: int, offset: int
) -> tuple[list[tuple[Campaign, Stats]], int]:
    """The newest first; `q` is a part of the name. Also how many there are in all."""
    rows = await db.fetch(SQL["list_page"], tenant_id, q, status, limit, offset)
    total = await db.fetchval(SQL["list_total"], tenant_id, q, status)
    return [(_campaign(row), _stats(row)) for row in rows], total


async def stats(db: Executor, campaign_id: int) -> Stats:
    """What `list_page` shows of one campaign."""
    row = await db.fetchrow(SQL["stats"], campaign_id)
    assert row is not None
    return _stats(row)


async def update(db: Connection, campaign: Campaign, changes: Mapping[str, Any]) -> Campaign:
    """Changes fields of a locked campaign that was not sent yet. Raises WrongStatus."""
    if not campaign.unsent:
        raise WrongStatus(campaign.status)
    changed = replace(campaign, **changes)
    row = await db.fetchrow(
        SQL["update"], campaign.id, changed.name, *(getattr(changed, field) for field in _CONTENT)
    )
    assert row is not None
    return _campaign(row)


async def unknown_lists(db: Connection, tenant_id: int, list_ids: Sequence[int]) -> list[int]:
    """Those of the lists that the tenant does not have; the others cannot be deleted before this transaction ends."""
    if not list_ids:
        return []
    kept = {row["id"] for row in await db.fetch(SQL["keep_lists"], tenant_id, list_ids)}
    return [one for one in list_ids if one not in kept]


async def delete(db: Connection, campaign: Campaign) -> None:
    """Removes a locked campaign that was not sent yet, with its recipients. Raises WrongStatus: the account of what
    was sent must stay."""
    if not campaign.unsent:
        raise WrongStatus(campaign.status)
    await db.execute(SQL["delete"], campaign.id)


# ------------------------------------------------------------------------------------------ sending


def batch_size(
    count: int, largest: int, tenants_most: int | None, messages_per_second: Iterable[int | None]
) -> int:
    """Messages a batch: about a twentieth of the campaign, 100 to `largest`, at most `tenants_most`.

    Under a limit of L messages a second it is cut so that whole batches fill the limit: 400 under 500 becomes 250.
    """
    size = min(max(-(-count // _BATCHES_WANTED), SMALLEST_BATCH), largest)
    if tenants_most is not None:
        size = min(size, tenants_most)
    for limit in messages_per_second:
        if limit is not None:
            size = limit // -(-limit // size)
    return size


async def highest_recipient(db: Executor, campaign_id: int) -> int:
    """The id of the last recipient uploaded for a campaign, readable or not; 0 where there is none."""
    return await db.fetchval(SQL["highest_recipient"], campaign_id) or 0


async def begin(db: Connection, campaign: Campaign, account_id: int, snapshot: Snapshot) -> None:
    """Starts sending a locked campaign: status, lane, expansion, and word to the expanders at commit. Raises
    WrongStatus. The caller holds `snapshot.held` credits in the same transaction."""
    if not campaign.unsent:
        raise WrongStatus(campaign.status)
    begun = await db.fetchrow(SQL["begin"], campaign.id, account_id, *snapshot)
    assert begun is not None


async def pause(db: Connection, campaign: Campaign) -> None:
    """Stops a locked campaign for a person; one that was paused by something else is from now on paused by them,
    and nothing but a person resumes it. Raises WrongStatus."""
    if campaign.status == CampaignStatus.SENDING:
        await db.execute(SQL["pause"], campaign.id, PAUSED_BY_USER)
    elif campaign.status == CampaignStatus.PAUSED:
        await db.execute(SQL["keep_paused"], campaign.id, PAUSED_BY_USER)
    else:
        raise WrongStatus(campaign.status)


async def resume(db: Connection, campaign: Campaign) -> None:
    """Lets a locked, paused campaign go on, whatever paused it; one that is sending just goes on. Raises
    WrongStatus."""
    if campaign.status == CampaignStatus.PAUSED:
        await db.execute(SQL["resume"], campaign.id)
    elif campaign.status != CampaignStatus.SENDING:
        raise WrongStatus(campaign.status)


async def cancel(db: Connection, campaign: Campaign) -> None:
    """Ends a locked campaign: what has not left will not leave, its holds come back. Nothing on a cancelled one.
    Raises WrongStatus."""
    if campaign.status == CampaignStatus.CANCELLED:
        return
    if not await db.fetchval(SQL["cancel"], campaign.id):
        raise WrongStatus(campaign.status)


class Retry(NamedTuple):
    """`retried` messages wait again, for `required` credits; not `held`: there are not so many, roll back."""

    retried: int
    required: int
    held: bool


async def retry_failed(db: Connection, campaign: Campaign) -> Retry:
    """Queues again what was certainly refused, of a locked campaign. Raises WrongStatus, MessagesRemoved."""
    if campaign.unsent or campaign.status == CampaignStatus.CANCELLED:
        raise WrongStatus(campaign.status)
    if campaign.removed_at is not None:
        raise MessagesRemoved(campaign.removed_at)
    row = await db.fetchrow(SQL["retry_failed"], campaign.id)
    assert row is not None
    return Retry(**row)


async def finish(db: Executor) -> list[int]:
    """Ends every sending campaign that has nothing left to do; returns their ids."""
    return [row[0] for row in await db.fetch(SQL["finish"])]


# ------------------------------------------------------------------------------------------ progress


async def totals(db: Executor, tenant_id: int, campaign_id: int) -> Progress | None:
    """The campaign, its parts and its expansion, in one snapshot."""
    row = await db.fetchrow(SQL["progress"], campaign_id, tenant_id)
    if row is None:
        return None
    return Progress(
        campaign=_campaign(row),
        totals=Totals(**{field.name: row[field.name] for field in fields(Totals)}),
        expanded=row["expansion_state"] in ("done", "stopped"),
        read=row["read"],
        of=row["of"],
        now=row["now"],
    )


async def limited_by(db: Executor, progress: Progress) -> str | None:
    """What a sending campaign waits for: expansion | account_paused | account_throttled | account_limit |
    tenant_limit; None where it is none of them."""
    if progress.campaign.status != CampaignStatus.SENDING:
        return None
    if not progress.totals.queued:
        return None if progress.expanded or progress.totals.processing else "expansion"
    word = await db.fetchval(SQL["limited_by"], progress.campaign.id)
    return None if word is None else str(word)


# ------------------------------------------------------------------------------------------ from rows

_CONTENT = (
    "text", "sender", "message_type", "link_url", "list_ids", "exclude_list_ids", "filter_gender",
    "filter_age_group",
)  # fmt: skip


def _campaign(row: Record) -> Campaign:
    values = {field.name: row[field.name] for field in fields(Campaign)}
    return Campaign(**values | {"status": CampaignStatus(row["status"])})


def _stats(row: Record) -> Stats:
    pending, delivered = row["pending"], row["delivered"]
    return Stats(pending + delivered, delivered, row["failed"], pending)
