"""Messages and batches as people see them: what each is doing, why, and what was tried with it.

A message that has no state of its own yet is spoken for by its batch: the view `message_shown` says what is shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import itemgetter
from typing import NamedTuple

from smsd import database, text
from smsd.database import Executor, Record
from smsd.model import BatchState, MessageState, Reason

SQL = database.queries("messages")

LARGEST_BATCH = 500
"""More messages than this are in no batch: what SMSD_BATCH_SIZE takes at most."""


class Attempt(NamedTuple):
    """One POST that a message was in; `outcome` is None while it is under way."""

    n: int
    at: datetime
    outcome: str | None
    status: int | None
    detail: str | None


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it is shown. `phone` is None where the recipient's number could not be read, and where the person
    was erased."""

    id: int
    campaign_id: int
    phone: int | None
    text: str | None
    segments: int
    status: str
    reason: str | None
    detail: str | None
    provider_id: str | None
    bulk_id: str | None
    reference: str | None
    attempts: tuple[Attempt, ...]
    created_at: datetime
    accepted_at: datetime | None
    finished_at: datetime | None
    erased: bool


class Line(NamedTuple):
    """One recipient of a campaign in few words: its message as it is shown, without text and story."""

    id: int
    phone: int | None
    status: str | None
    own_state: int | None
    reason: str | None
    detail: str | None
    segments: int
    provider_id: str | None
    accepted_at: datetime | None
    finished_at: datetime | None
    erased: bool = False

    @property
    def credits(self) -> int:
        """What it cost: its segments, once Mitto has accepted it."""
        return self.segments if _accepted(self.own_state) else 0


@dataclass(frozen=True, slots=True)
class Batch:
    """One POST's worth. `size`: its messages; `open`: those that it still speaks for."""

    id: int
    status: str
    size: int
    open: int
    first_id: int
    last_id: int
    bulk_id: str | None
    attempts: int
    not_before: datetime | None
    created_at: datetime
    done_at: datetime | None


ERASED = "erased"
"""What stands for the number of a person who was erased."""


def addressee(one: Message | Line) -> str | None:
    """Whom a message is shown to be to."""
    if one.erased:
        return ERASED
    return None if one.phone is None else text.plus(one.phone)


# -------------------------------------------------------------------------------------------- pages

# What a status means for a message with a state of its own, and for one that its batch speaks for.
STATUSES: dict[str, tuple[tuple[MessageState, ...], tuple[BatchState, ...]]] = {
    "queued": ((), (BatchState.READY, BatchState.WAITING)),
    "processing": ((), (BatchState.LEASED, BatchState.SENDING)),
    "accepted": ((MessageState.ACCEPTED, MessageState.ENROUTE), (BatchState.ACCEPTED,)),
    "delivered": ((MessageState.DELIVERED,), ()),
    "failed": ((MessageState.DELIVERY_FAILED, MessageState.REFUSED), ()),
    "unknown": ((MessageState.UNKNOWN,), (BatchState.UNKNOWN,)),
    "cancelled": ((), (BatchState.CANCELLED,)),
    "skipped": ((MessageState.SKIPPED,), ()),
}


async def page(
    db: Executor, campaign_id: int, status: str | None, phone: int | None, after: int, limit: int
) -> list[Message]:
    """Messages of a campaign with ids above `after`, by id; `status` is a key of STATUSES."""
    if phone is not None:
        rows = await db.fetch(SQL["page_by_phone"], campaign_id, phone, status, after)
    elif status is not None:
        rows = await _by_status(db, campaign_id, status, after, limit)
    else:
        rows = await db.fetch(SQL["page"], campaign_id, after, limit)
    return await _with_attempts(db, campaign_id, rows)


async def _by_status(
    db: Executor, campaign_id: int, status: str, after: int, limit: int
) -> list[Record]:
    own, spoken_for = STATUSES[status]
    rows = []
    # States are not indexed, so what the counters do not know is not looked for.
    if own and await db.fetchval(SQL["counted"], campaign_id, own):
        rows += await db.fetch(SQL["page_by_own_state"], campaign_id, after, own, limit)
    elif BatchState.ACCEPTED in spoken_for:  # counted with those
        return []
    if spoken_for:
        rows += await db.fetch(SQL["page_by_batch_state"], campaign_id, after, spoken_for, limit)
    return sorted(rows, key=itemgetter("id"))[:limit]


async def lines(db: Executor, campaign_id: int, after: int, limit: int) -> list[Line]:
    """Like `page` without a filter, at a fraction of the cost."""
    rows = await db.fetch(SQL["lines"], campaign_id, after, limit)
    # One message of each batch that is unknown: what was tried with it was tried with the others.
    asked = {
        row["batch_id"]: row["id"]
        for row in rows
        if row["own_state"] is None and row["batch_state"] == BatchState.UNKNOWN
    }
    stories = await _stories(db, campaign_id, [*asked.values()])
    return [_line(row, stories.get(asked.get(row["batch_id"]), ())) for row in rows]


async def get(db: Executor, tenant_id: int, message_id: int) -> Message | None:
    """A tenant's message by its id alone."""
    rows = await db.fetch(SQL["get"], tenant_id, message_id)
    if not rows:
        return None
    return (await _with_attempts(db, rows[0]["campaign_id"], rows))[0]


async def batches(
    db: Executor, campaign_id: int, limit: int, offset: int
) -> tuple[list[Batch], int]:
    """A page of batches in the order of their messages, and how many there are in all."""
    rows = await db.fetch(SQL["batches"], campaign_id, limit, offset)
    return [_batch(row) for row in rows], await db.fetchval(SQL["batches_total"], campaign_id)


async def refresh_page(db: Executor, campaign_id: int, limit: int) -> list[tuple[int, str]]:
    """The next messages that wait for a final receipt, as (id, provider's id), going round from call to call."""
    rows = await db.fetch(SQL["refresh_page"], campaign_id, limit)
    return [(row["id"], row["provider_id"]) for row in rows]


async def by_account(db: Executor, provider_ids: Sequence[str]) -> dict[int, list[str]]:
    """Messages by the traffic account that they were accepted on: account id → the provider's ids."""
    rows = await db.fetch(SQL["by_account"], provider_ids)
    return {row["account_id"]: row["provider_ids"] for row in rows}


# ------------------------------------------------------------------------------------------ from rows

_BATCH_STATUSES = {
    state: status for status, (_, states) in STATUSES.items() for state in states
} | {BatchState.DONE: "done", BatchState.ACCEPTED: "done"}


def _batch(row: Record) -> Batch:
    state = BatchState(row["state"])
    waiting = state is BatchState.WAITING
    return Batch(
        id=row["id"],
        status="waiting" if waiting else _BATCH_STATUSES[state],
        size=row["size"],
        open=row["n"],
        first_id=row["first_id"],
        last_id=row["last_id"],
        bulk_id=row["bulk_id"],
        attempts=row["attempt"],
        not_before=row["not_before"] if waiting else None,
        created_at=row["created_at"],
        done_at=row["done_at"],
    )


async def _with_attempts(db: Executor, campaign_id: int, rows: Sequence[Record]) -> list[Message]:
    if not rows:
        return []
    stories = await _stories(db, campaign_id, [row["id"] for row in rows])
    return [_message(row, _story(row, stories[row["id"]])) for row in rows]


async def _stories(
    db: Executor, campaign_id: int, ids: Sequence[int]
) -> dict[int | None, list[Record]]:
    """The attempts in whose range each message was, in order."""
    stories: dict[int | None, list[Record]] = {one: [] for one in ids}
    if ids:
        for tried in await db.fetch(SQL["attempts"], campaign_id, ids, LARGEST_BATCH):
            stories[tried["message_id"]].append(tried)
    return stories


def _story(row: Record, tried: Sequence[Record]) -> tuple[Attempt, ...]:
    """What was tried with a message. A batch that was opened again for others is no attempt of one that had its
    outcome by then."""
    until = row["settled_at"]
    if row["own_state"] == MessageState.SKIPPED:
        until = row["finished_at"]
    own = (one for one in tried if until is None or one["intent_at"] <= until)
    return tuple(
        Attempt(n, one["intent_at"], one["outcome"], one["status"], one["detail"])
        for n, one in enumerate(own, 1)
    )


def _message(row: Record, attempts: tuple[Attempt, ...]) -> Message:
    return Message(
        id=row["id"],
        campaign_id=row["campaign_id"],
        phone=_phone(row),
        text=row["text"],
        segments=row["segments"],
        status=row["status"],
        reason=row["reason"] or _batchs_reason(row, attempts),
        detail=row["detail"],
        provider_id=row["provider_id"],
        bulk_id=row["bulk_id"],
        reference=row["reference"],
        attempts=attempts,
        created_at=row["created_at"],
        accepted_at=_accepted_at(row),
        finished_at=_finished_at(row),
        erased=_erased(row),
    )


def _line(row: Record, tried: Sequence[Record]) -> Line:
    reason = row["reason"]
    if reason is None and row["own_state"] is None:
        reason = _batchs_reason(row, _story(row, tried))
    return Line(
        row["id"], _phone(row), row["status"], row["own_state"], reason, row["detail"],
        row["segments"], row["provider_id"], _accepted_at(row), _finished_at(row), _erased(row),
    )  # fmt: skip


def _erased(row: Record) -> bool:
    """Whose person was erased stands under a number below zero, which says nothing."""
    return row["phone"] is not None and row["phone"] < 0


def _phone(row: Record) -> int | None:
    phone: int | None = row["phone"]
    return None if _erased(row) else phone


def _accepted(own_state: int | None) -> bool:
    return own_state is not None and MessageState.ACCEPTED <= own_state <= MessageState.DELIVERED


def _accepted_at(row: Record) -> datetime | None:
    at: datetime | None = row["settled_at"] if _accepted(row["own_state"]) else None
    return at


def _finished_at(row: Record) -> datetime | None:
    cancelled = row["own_state"] is None and row["batch_state"] == BatchState.CANCELLED
    at: datetime | None = row["batch_done_at"] if cancelled else row["finished_at"]
    return at


def _batchs_reason(row: Record, attempts: tuple[Attempt, ...]) -> Reason | None:
    """Why, where the batch speaks for the message."""
    if row["own_state"] is not None:
        return None
    if row["batch_state"] == BatchState.CANCELLED:
        return Reason.CAMPAIGN_CANCELLED
    if row["batch_state"] != BatchState.UNKNOWN or not attempts:
        return None
    last = attempts[-1]
    if last.detail == Reason.REPLICA_DIED:
        return Reason.REPLICA_DIED
    return Reason.NO_ANSWER if last.status is None else Reason.UNREADABLE_ANSWER
