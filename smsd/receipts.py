"""Receipts: what comes in by webhook is committed in groups, and only then answered.

One writer takes all receipts that have gathered while it wrote the last ones, and writes them in one transaction. A
group that Postgres will not take is halved until the receipt that it refuses stands alone, and that one is kept raw.
What is kept raw can be read again later (`replay`); whose message does not become known is kept raw after a day
(`sweep`).
"""

import asyncio
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import asyncpg
import structlog

from smsd import database, faults, mitto, queue, telemetry
from smsd.database import Connection, Pool, Record
from smsd.model import MessageState
from smsd.queue import RawReceipt, ReceiptRow

log = structlog.get_logger()

GROUP = 5_000
WAITING_MOST = 100_000
SWEPT_MOST = 5_000
REPLAYED_AT_ONCE = 1_000
WRITERS = 2
"""Groups written at once: while one waits for its commit, the next is on its way."""
SHARE_LEAST = 32
"""Fewer are not divided among the writers: a commit takes about as long as so many receipts do."""
GATHERED = 500
"""So many are worth a commit: no more are waited for."""

NO_MESSAGE = "no message has this id"
_CANNOT_BE_STORED = "cannot be stored"
_WORDS: dict[int, str] = {
    MessageState.DELIVERED: "Delivered",
    MessageState.DELIVERY_FAILED: "Failure",
    MessageState.ENROUTE: "Sent",
}
# What Postgres, or asyncpg on its behalf (a ValueError), says of values that it will not take.
_REFUSED = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, ValueError)


class Full(Exception):  # noqa: N818 - a fact: more receipts wait than memory should hold
    """More receipts are waiting for Postgres than memory should hold."""


@dataclass(slots=True)
class _Put:
    receipts: Sequence[ReceiptRow]
    raw: Sequence[RawReceipt]
    future: asyncio.Future[int]
    put_at: float  # the loop's time

    def __len__(self) -> int:
        return len(self.receipts) + len(self.raw)


class Inbox:
    """The group committer of receipts."""

    def __init__(self, pool: Pool, answer_seconds: float = 10.0) -> None:
        self._pool, self._answer_seconds = pool, answer_seconds
        self._waiting: deque[_Put] = deque()
        self._writing: list[Sequence[_Put]] = []
        self._count = 0
        self._news = asyncio.Event()

    async def put(self, receipts: Sequence[ReceiptRow], raw: Sequence[RawReceipt] = ()) -> int:
        """Returns once these receipts, and what could not be read, are durable: how many messages their group moved,
        at most their own number. Raises Full, or what the write raised (mostly one of database.AWAY): then nothing of
        them is promised, and they may be put again."""
        if not receipts and not raw:
            return 0
        if self._count > WAITING_MOST:
            raise Full(f"{self._count} receipts wait for Postgres")
        loop = asyncio.get_running_loop()
        one = _Put(receipts, raw, loop.create_future(), loop.time())
        self._waiting.append(one)
        self._count += len(one)
        self._news.set()
        return await one.future

    async def run(self) -> None:
        """Writes groups until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(WRITERS):
                group.create_task(self._write_groups())
            group.create_task(self._refuse_overdue())

    async def _write_groups(self) -> None:
        while True:
            await self._news.wait()
            await self._gather()
            if not self._waiting:
                self._news.clear()
                continue
            group = self._take()
            self._writing.append(group)
            try:
                await self._write(group)
            finally:
                self._writing.remove(group)

    async def _refuse_overdue(self) -> None:
        """Whoever has waited too long hears so. One look at all of them: a timer for each would cost more than its
        receipt does."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._answer_seconds / 20)
            since = loop.time() - self._answer_seconds
            for group in (*self._writing, self._waiting):
                for one in group:
                    if one.put_at > since:
                        break  # those behind it came later
                    _refuse([one], TimeoutError())

    async def _gather(self) -> None:
        """Waits until a round of the loop brings nobody, or enough are here: else those who come one after the other
        would be committed one by one."""
        before = 0
        while before < self._count < GATHERED:
            before = self._count
            await asyncio.sleep(0)

    def _in_writing(self) -> int:
        return sum(len(one) for group in self._writing for one in group)

    def _take(self) -> list[_Put]:
        """A writer's even share: where one takes nearly all, nobody reads and answers while it is written."""
        group, size = list[_Put](), 0
        share = math.ceil((self._count + self._in_writing()) / WRITERS)
        share = min(max(share, SHARE_LEAST), GROUP)
        while self._waiting and size < share:
            group.append(self._waiting.popleft())
            size += len(group[-1])
        self._count -= size
        return group

    async def _write(self, group: Sequence[_Put]) -> None:
        faults.point("receipts.writing")
        try:
            updated = await self._apply(group)
        except database.AWAY as error:
            log.warning("receipts.not_written", n=sum(map(len, group)), error=repr(error))
            _refuse(group, error)
        except Exception as error:
            if len(group) > 1:  # whoever's fault it is, it is not to be everybody's
                for one in group:
                    await self._write([one])
                return
            stack = telemetry.stack_of(error)
            log.error("receipts.failed", n=len(group[0]), error=type(error).__name__, stack=stack)
            _refuse(group, error)
        else:
            faults.point("receipts.written")
            for one in group:
                if not one.future.done():
                    one.future.set_result(min(updated, len(one.receipts)))

    async def _apply(self, group: Sequence[_Put]) -> int:
        rows = [row for one in group for row in one.receipts]
        raw = [row for one in group for row in one.raw]
        try:
            updated, kept = await self._apply_and_keep(rows, raw)
        except _REFUSED:
            async with self._pool.acquire() as connection, connection.transaction():
                rows, updated = await _sift(connection, rows)
                await queue.keep_raw_receipts(connection, raw)
            kept = len(rows)
        if kept:
            # Settle may have missed these as we missed its ids: look once more in a new snapshot.
            updated += await queue.rejoin_receipts(self._pool, [row.provider_id for row in rows])
        return updated

    async def _apply_and_keep(
        self, rows: Sequence[ReceiptRow], raw: Sequence[RawReceipt]
    ) -> tuple[int, int]:
        if not raw:  # as nearly always: one round trip
            return await queue.apply_receipts(self._pool, rows)
        async with self._pool.acquire() as connection, connection.transaction():
            result = await queue.apply_receipts(connection, rows)
            await queue.keep_raw_receipts(connection, raw)
            return result


def _refuse(group: Sequence[_Put], error: BaseException) -> None:
    for one in group:
        if not one.future.done():
            one.future.set_exception(error)


async def _sift(connection: Connection, rows: Sequence[ReceiptRow]) -> tuple[list[ReceiptRow], int]:
    """Applies what Postgres takes and keeps the rest raw, in the transaction of the caller: (what it took, messages
    that moved)."""
    try:
        async with connection.transaction():
            updated, _ = await queue.apply_receipts(connection, rows)
            return list(rows), updated
    except _REFUSED:
        if len(rows) > 1:
            middle = len(rows) // 2
            first, moved = await _sift(connection, rows[:middle])
            second, more = await _sift(connection, rows[middle:])
            return first + second, moved + more
        raw = RawReceipt(rows[0].account_id, _spelled(rows[0]), _CANNOT_BE_STORED)
        await queue.keep_raw_receipts(connection, [raw])
        return [], 0


def _spelled(row: ReceiptRow) -> str:
    """A receipt as Mitto writes them, in ASCII, which Postgres takes whatever it stands for."""
    return json.dumps(
        {
            "messageId": row.provider_id,
            "deliveryStatus": _WORDS.get(row.state, str(row.state)),
            "updatedAt": row.at and row.at.isoformat(),
            "description": row.description,
        }
    )


# ---------------------------------------------------------------------------------- what nobody knows


async def sweep(pool: Pool, pause_seconds: float = 5.0) -> None:
    """Walks through all early receipts, some at a time, until cancelled: `rejoin_receipts` looks at the latest only,
    and what stays without a message for a day goes to the raw inbox."""
    after_id = 0
    while True:
        try:
            swept = await queue.sweep_early_receipts(pool, after_id, SWEPT_MOST)
        except database.AWAY as error:
            log.warning("receipts.not_swept", error=repr(error))
        except Exception as error:
            stack = telemetry.stack_of(error)
            log.error("receipts.not_swept", error=type(error).__name__, stack=stack)
        else:
            after_id = swept.last_id or 0
            if swept.joined or swept.given_up:
                log.info("receipts.swept", joined=swept.joined, given_up=swept.given_up)
        await asyncio.sleep(pause_seconds)


@dataclass(slots=True)
class Replay:
    """What reading the raw inbox again came to: rows that could be read and are gone from it, messages that moved by
    them, rows that stay, and these by reason."""

    replayed: int = 0
    updated: int = 0
    unreadable: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


async def replay(pool: Pool) -> Replay:
    """Reads all raw receipts again, and applies those that are understood by now. What is read leaves the inbox in
    the transaction that applies it, so any number may do this at once and again."""
    result, after_id = Replay(), 0
    until_id = await queue.newest_raw_receipt(pool)
    while True:
        async with pool.acquire() as connection, connection.transaction():
            found = await queue.next_raw_receipts(connection, after_id, until_id, REPLAYED_AT_ONCE)
            if not found:
                return result
            after_id = found[-1]["id"]
            taken = await _replay_some(connection, found, result)
        # As after every write: settle may have missed these.
        result.updated += await queue.rejoin_receipts(pool, [row.provider_id for row in taken])


async def _replay_some(
    connection: Connection, found: Sequence[Record], result: Replay
) -> list[ReceiptRow]:
    read_again = [_reread(record) for record in found]
    # What has waited for its message already is read only if that is known now.
    waited = [
        row
        for record, rows in zip(found, read_again, strict=True)
        if record["why"] == NO_MESSAGE and not isinstance(rows, str)
        for row in rows
    ]
    known = await queue.known_receipts(connection, waited)
    nobodys = {row for row, is_known in zip(waited, known, strict=True) if not is_known}
    read_ids, applied, unread = list[int](), list[ReceiptRow](), list[tuple[int, str]]()
    for record, rows in zip(found, read_again, strict=True):
        if isinstance(rows, str):
            unread.append((record["id"], rows))
        elif record["why"] == NO_MESSAGE and not nobodys.isdisjoint(rows):
            unread.append((record["id"], NO_MESSAGE))
        else:
            read_ids.append(record["id"])
            applied += rows
    await queue.end_raw_receipts(
        connection, read_ids, [one for one, _ in unread], [why for _, why in unread]
    )
    taken, updated = await _sift(connection, applied)
    result.replayed += len(read_ids)
    result.updated += updated
    result.unreadable += len(unread)
    for _, why in unread:
        result.reasons[why] = result.reasons.get(why, 0) + 1
    return taken


def _reread(record: Record) -> list[ReceiptRow] | str:
    """The receipts of a raw one, or why they cannot be read."""
    try:
        read = mitto.parse_dlr(record["body"].encode())
    except mitto.BadDlr as bad:
        return str(bad)
    if read.rejected:
        return read.rejected[0][1]
    rows = []
    for one in read.receipts:
        if one.state is None:
            return unknown_word(one)
        rows.append(
            ReceiptRow(
                record["account_id"], one.provider_id, int(one.state), one.at, one.description
            )
        )
    return rows


def unknown_word(receipt: mitto.Receipt) -> str:
    """Why a receipt is kept raw whose word nobody knows yet."""
    return f"unknown state {receipt.word!r}"
