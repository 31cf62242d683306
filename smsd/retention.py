"""Retention: what is over is kept for some days and then removed, a piece at a time; totals and certificates stay.

A campaign goes through stages that are kept in the database, so whoever goes on after a crash goes on where it was:
its messages are closed, so that nothing moves any more; its certificate is made and kept; then messages, batches,
attempts and the ledger's detail go. Every piece is one transaction after which the audit holds, and one replica
at a time does one. See docs/retention.md.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import astuple

import structlog

from smsd import certificates, database, faults, mitto, telemetry
from smsd.database import Pool

log = structlog.get_logger()
SQL = database.queries("retention")

DAY_SECONDS = 86_400.0
PIECE = 5_000
"""Messages, or rows of what else goes, in one transaction."""
REST = 3.0
"""Times as long as a piece took there is a pause after it: sending goes first."""
LONGEST_PAUSE_SECONDS = 60.0

_ROWS = ("remove_early_receipts", "remove_raw_receipts", "remove_imports", "remove_unmapped_ids")


class Retention:
    """A loop of the daemon: removes what has been over for so many days; never, where they are 0."""

    def __init__(self, pool: Pool, days: float, piece: int = PIECE) -> None:
        self._pool, self._piece = pool, piece
        self._seconds = days * DAY_SECONDS

    async def run(self) -> None:
        """Looks again and again until cancelled."""
        if not self._seconds:
            return
        while True:
            try:
                await self.sweep()
            except database.AWAY as error:
                log.warning("retention.failed", error=repr(error))
            except Exception as error:
                stack = telemetry.stack_of(error)
                log.error("retention.broken", error=type(error).__name__, stack=stack)
            await asyncio.sleep(min(max(self._seconds / 10, 1.0), LONGEST_PAUSE_SECONDS))

    async def sweep(self) -> None:
        """Removes all that is due now."""
        await self._go_on()
        while await self._pool.fetchval(SQL["begin_removal"], self._seconds) is not None:
            await self._go_on()
        await self._remove_singles()
        for name in _ROWS:
            await self._remove_rows(name)

    async def _go_on(self) -> None:
        """One campaign after the other that is not done; what one stumbles over keeps no other from going."""
        after_id = 0
        while row := await self._pool.fetchrow(SQL["unfinished"], after_id):
            after_id = row["campaign_id"]
            try:
                await self._remove_campaign(after_id, row["tenant_id"])
            except database.AWAY:
                raise
            except Exception as error:
                log.error(
                    "campaign.not_removed", campaign=after_id, error=type(error).__name__,
                    stack=telemetry.stack_of(error),
                )  # fmt: skip

    async def _remove_campaign(self, campaign_id: int, tenant_id: int) -> None:
        await self._in_pieces("close_piece", campaign_id)
        if await self._pool.fetchval(SQL["stage"], campaign_id, tenant_id) == "closed":
            await self._keep_certificate(campaign_id, tenant_id)
        await self._in_pieces("remove_piece", campaign_id)
        if await self._pool.fetchval(SQL["stage"], campaign_id, tenant_id) == "done":
            log.info("campaign.messages_removed", campaign=campaign_id)

    async def _in_pieces(self, name: str, campaign_id: int) -> None:
        async def piece() -> bool:
            return bool(await self._pool.fetchval(SQL[name], campaign_id, self._piece))

        await _rested(piece)

    async def _keep_certificate(self, campaign_id: int, tenant_id: int) -> None:
        async with self._pool.acquire() as db, certificates.snapshot(db):
            made = await certificates.issue(db, tenant_id, campaign_id)
        assert made is not None
        faults.point("retention.certified")
        kept = await self._pool.fetchval(
            SQL["keep_certificate"], campaign_id, list(astuple(made.totals)), certificates.kept(made)
        )  # fmt: skip
        if not kept:
            log.warning("certificate.not_kept", campaign=campaign_id, detail="it moved; once more")

    async def _remove_singles(self) -> None:
        after_id: int | None = 0
        removed = 0

        async def piece() -> bool:
            nonlocal after_id, removed
            row = await self._pool.fetchrow(
                SQL["remove_singles"], self._seconds, after_id, self._piece
            )
            assert row is not None
            after_id, removed = row["until_id"], removed + row["removed"]
            return after_id is not None

        await _rested(piece)
        if removed:
            log.info("messages.removed", n=removed)

    async def _remove_rows(self, name: str) -> None:
        async def piece() -> bool:
            done = await self._pool.execute(SQL[name], self._seconds, self._piece)
            return int(done.split()[-1]) == self._piece

        await _rested(piece)


async def _rested(piece: Callable[[], Awaitable[bool]]) -> None:
    """Piece after piece until there is none, with pauses for those who send."""
    while True:
        started = mitto.clock()
        if not await piece():
            return
        faults.point("retention.piece")
        await asyncio.sleep((mitto.clock() - started) * REST)
