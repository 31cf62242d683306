"""Expansions: a campaign's audience on its way to messages and batches, chunk by chunk.

A chunk is one transaction: the cursor moves, messages are copied in, batches are cut, the hold becomes exact. It
commits only while its expansion still runs, is still owned by who read it, and stands where it was read.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

import asyncpg

from smsd import database
from smsd.database import Connection, Executor, Pool, Share
from smsd.model import MessageState, Reason

SQL = database.queries("expansions")

_ROWS_BETWEEN_YIELDS = 500


@dataclass(frozen=True, slots=True)
class Expansion:
    """The snapshot taken at enqueue, and how far its chunks have come."""

    campaign_id: int
    tenant_id: int
    lane_id: int
    source: str
    sender: str
    template: str
    as_of: date
    batch_size: int
    highest_id: int
    cursor: int
    rereads: int
    read: int
    of: int
    list_ids: list[int]
    exclude_list_ids: list[int]
    filter_gender: str | None
    filter_age_group: str | None
    link_url: str | None
    account_id: int
    well_ahead: bool

    @property
    def place(self) -> tuple[int, int, int]:
        """Whose, where its next chunk begins, and how often what was read had to be forgotten."""
        return self.campaign_id, self.cursor, self.rereads


class Rendered(NamedTuple):
    """A recipient ready to be sent to."""

    phone: int
    text: str
    segments: int


class Skipped(NamedTuple):
    """A recipient that will not be sent to, and why. phone is None where the number could not be read."""

    phone: int | None
    reason: Reason
    detail: str | None


@dataclass(slots=True)
class Chunk:
    """What one reading of the audience came to. cursor: the highest recipient id read."""

    cursor: int
    read: int
    last: bool
    rendered: list[Rendered]
    skipped: list[Skipped]


class OutOfCredits(Exception):  # noqa: N818 - a fact, not a fault
    """The exact figure of a chunk needs more credits than the `available` ones that the tenant has."""

    def __init__(self, messages: int, needed: int, available: int) -> None:
        super().__init__(f"a chunk of {messages} messages needs {needed} credits")
        self.available = available


async def claim(db: Executor, replica_id: int) -> Expansion | None:
    """The expansion whose tenant was served least recently, owned by this replica; None where nothing runs."""
    row = await db.fetchrow(SQL["claim_expansion"], replica_id)
    return None if row is None else Expansion(**row)


async def let_go(db: Executor, expansion: Expansion, replica_id: int) -> None:
    """Gives an expansion up without having written a chunk."""
    await db.execute(SQL["let_go"], expansion.campaign_id, replica_id)


async def pause_for_credits(db: Executor, expansion: Expansion, short: OutOfCredits) -> None:
    """Pauses the campaign until a top-up, unless one has come meanwhile."""
    await db.execute(SQL["pause_for_credits"], expansion.campaign_id, short.available, str(short))


async def pause_as_failed(db: Executor, expansion: Expansion, detail: str) -> None:
    """Pauses the campaign until a person has seen to it; a resume tries again."""
    await db.execute(SQL["pause_as_failed"], expansion.campaign_id, detail)


async def commit(
    pool: Pool | Share, expansion: Expansion, chunk: Chunk, replica_id: int
) -> int | None:
    """Writes a chunk; returns the first message id of its batches (0 where all were skipped), or None when the
    expansion moved on without us and nothing was written. Raises OutOfCredits, with nothing written."""
    async with pool.acquire() as connection, connection.transaction():
        moved = await connection.fetchval(
            SQL["advance_expansion"], expansion.campaign_id, replica_id, expansion.cursor, chunk.cursor,
            chunk.read, chunk.last,
        )  # fmt: skip
        if moved is None:
            return None
        rendered, skipped = chunk.rendered, chunk.skipped
        try:  # nearly always all are new; the unique index tells where not
            async with connection.transaction():
                first_id = await _add_messages(connection, expansion, rendered, skipped)
        except asyncpg.UniqueViolationError:
            rendered, skipped = await _without_present(connection, expansion, chunk)
            first_id = await _add_messages(connection, expansion, rendered, skipped)
        await _add_batches(connection, expansion, rendered, first_id)
        exact = sum(one.segments for one in rendered)
        hold = await connection.fetchrow(
            SQL["settle_hold"], expansion.campaign_id, chunk.read, exact, chunk.last
        )
        assert hold is not None
        if not hold["held"]:
            raise OutOfCredits(len(rendered), exact, hold["available"])
        return first_id if rendered else 0


async def _without_present(
    connection: Connection, expansion: Expansion, chunk: Chunk
) -> tuple[list[Rendered], list[Skipped]]:
    """A number that the campaign has already is the same recipient under another row: left out."""
    phones = [one.phone for one in chunk.rendered]
    phones += [one.phone for one in chunk.skipped if one.phone is not None]
    seen: set[int] = set()
    if phones:
        rows = await connection.fetch(SQL["already_there"], expansion.campaign_id, phones)
        seen = {row["phone"] for row in rows}

    def is_new(phone: int | None) -> bool:
        if phone is None:
            return True
        new = phone not in seen
        seen.add(phone)
        return new

    rendered = [one for one in chunk.rendered if is_new(one.phone)]
    return rendered, [one for one in chunk.skipped if is_new(one.phone)]


async def _add_messages(
    connection: Connection,
    expansion: Expansion,
    rendered: Sequence[Rendered],
    skipped: Sequence[Skipped],
) -> int:
    """Writes the rows, those to be sent first, so that batches are ranges without gaps."""
    if not rendered and not skipped:
        return 0
    first_id = int(await connection.fetchval(SQL["take_message_ids"], len(rendered) + len(skipped)))
    if rendered:
        campaign_id = expansion.campaign_id
        rows = [(campaign_id, i, *one) for i, one in enumerate(rendered, first_id)]
        # One COPY: Postgres sets up room for a thousand rows in each. asyncpg encodes what it gets in one go, unless
        # what gives it the rows lets others run.
        await connection.copy_records_to_table(
            "message",
            records=_with_pauses(rows),
            columns=["campaign_id", "id", "phone", "text", "segments"],
        )
    for start in range(0, len(skipped), _ROWS_BETWEEN_YIELDS):
        some = skipped[start : start + _ROWS_BETWEEN_YIELDS]
        await connection.execute(
            SQL["add_skipped"],
            expansion.campaign_id, first_id + len(rendered) + start, int(MessageState.SKIPPED),
            [one.phone for one in some], [one.reason for one in some], [one.detail for one in some],
        )  # fmt: skip
    return first_id


async def _with_pauses(rows: Sequence[tuple[Any, ...]]) -> AsyncIterator[tuple[Any, ...]]:
    for start in range(0, len(rows), _ROWS_BETWEEN_YIELDS):
        for row in rows[start : start + _ROWS_BETWEEN_YIELDS]:
            yield row
        await asyncio.sleep(0)


async def _add_batches(
    connection: Connection, expansion: Expansion, rendered: Sequence[Rendered], first_id: int
) -> None:
    if not rendered:
        return
    size = expansion.batch_size
    starts = range(0, len(rendered), size)
    await connection.execute(
        SQL["add_batches"],
        expansion.campaign_id, expansion.lane_id, expansion.tenant_id, expansion.account_id, expansion.sender,
        [first_id + start for start in starts],
        [first_id + min(start + size, len(rendered)) - 1 for start in starts],
        [sum(one.segments for one in rendered[start : start + size]) for start in starts],
    )  # fmt: skip
