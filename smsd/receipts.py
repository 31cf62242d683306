"""Receipts: what comes in by webhook is committed in groups, and only then answered.

One writer takes all receipts that have gathered while it wrote the last ones, and writes them in one transaction. A
group that Postgres will not take is halved until the receipt that it refuses stands alone, and that one is kept raw.
"""

import asyncio
import json
from collections import deque
from collections.abc import Sequence

import asyncpg
import structlog

from smsd import database, faults, queue
from smsd.database import Pool
from smsd.queue import ReceiptRow

log = structlog.get_logger()

GROUP = 5_000
WAITING_MOST = 100_000


class Full(Exception):  # noqa: N818 - a fact: more receipts wait than memory should hold
    """More receipts are waiting for Postgres than memory should hold."""


class Inbox:
    """The group committer of receipts."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting: deque[tuple[Sequence[ReceiptRow], asyncio.Future[int]]] = deque()
        self._count = 0
        self._news = asyncio.Event()

    async def put(self, receipts: Sequence[ReceiptRow]) -> int:
        """Returns once these receipts are durable: how many messages their group moved, at most their own number.
        Raises Full, or what Postgres raised (one of database.AWAY): then nothing of them is promised."""
        if not receipts:
            return 0
        if self._count > WAITING_MOST:
            raise Full(f"{self._count} receipts wait for Postgres")
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((receipts, future))
        self._count += len(receipts)
        self._news.set()
        return await future

    async def run(self) -> None:
        """Writes groups until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                await self._write(self._take())

    def _take(self) -> list[tuple[Sequence[ReceiptRow], asyncio.Future[int]]]:
        group, size = [], 0
        while self._waiting and size < GROUP:
            group.append(self._waiting.popleft())
            size += len(group[-1][0])
        self._count -= size
        return group

    async def _write(
        self, group: Sequence[tuple[Sequence[ReceiptRow], asyncio.Future[int]]]
    ) -> None:
        rows = [row for receipts, _ in group for row in receipts]
        faults.point("receipts.writing")
        try:
            updated = await self._apply(rows)
        except database.AWAY as error:
            log.warning("receipts.not_written", n=len(rows), error=repr(error))
            for _, future in group:
                if not future.done():
                    future.set_exception(error)
            return
        faults.point("receipts.written")
        for receipts, future in group:
            if not future.done():
                future.set_result(min(updated, len(receipts)))

    async def _apply(self, rows: Sequence[ReceiptRow]) -> int:
        try:
            updated, kept = await queue.apply_receipts(self._pool, rows)
        except asyncpg.DataError:
            if len(rows) > 1:
                middle = len(rows) // 2
                return await self._apply(rows[:middle]) + await self._apply(rows[middle:])
            # Spelled in ASCII, which Postgres takes whatever it stands for.
            body = json.dumps(rows[0]._asdict(), default=str)
            await queue.keep_raw_receipts(
                self._pool, rows[0].account_id, [body], ["cannot be stored"]
            )
            return 0
        if kept:
            # Settle may have missed these as we missed its ids: look once more in a new snapshot.
            updated += await queue.rejoin_receipts(self._pool, [row.provider_id for row in rows])
        return updated
