"""Housekeeping: the heartbeat of this replica, the watch over the others, and what has to be looked at regularly.

A replica is dead when somebody who was connected all the while has watched its heartbeat rest for a whole lease.
Timestamps are never compared, so neither a clock nor an outage of Postgres kills anybody.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from smsd import __version__, campaigns, database, imports, mitto, queue, tenants
from smsd.database import Pool

log = structlog.get_logger()

ROUND_SECONDS = 0.5
SLOW_ROUNDS = 10


class Housekeeping:
    """Two loops of the daemon: `beat` and `keep`."""

    def __init__(self, pool: Pool, standing: queue.Standing) -> None:
        self._pool, self._standing = pool, standing
        self._news = asyncio.Event()
        # replica → its beat, and since when we see it
        self._watched: dict[int, tuple[int, float]] = {}
        self._looked_at = 0.0

    def wake(self) -> None:
        """News: a batch was settled, so that a campaign may be finished."""
        self._news.set()

    # ------------------------------------------------------------------------------------ heartbeat

    async def register(self) -> None:
        """Takes a new id; what an earlier life of this process leased is not ours."""
        sent_at = mitto.clock()
        replica_id = await queue.register(self._pool, self._standing.name, __version__)
        self._standing.beat_at, self._standing.replica_id = sent_at, replica_id
        log.info("replica.registered", replica=replica_id)

    async def beat(self) -> None:
        """Moves the heartbeat until cancelled; registers anew when this replica was declared dead."""
        pause = min(2.0, self._standing.lease_seconds / 8)
        while True:
            sent_at = mitto.clock()
            try:
                if not self._standing.replica_id:
                    await self.register()
                elif await queue.beat(self._pool, self._standing.replica_id):
                    self._standing.beat_at = sent_at
                else:
                    log.warning("replica.declared_dead", replica=self._standing.replica_id)
                    self._standing.replica_id = 0
                    continue
            except database.AWAY as error:
                log.warning("heartbeat.failed", error=repr(error))
            await asyncio.sleep(pause)

    # ----------------------------------------------------------------------------------------- keep

    async def keep(self) -> None:
        """Rounds until cancelled: finish campaigns, match early receipts, watch, reap, wake what was forgotten."""
        rounds = 0
        while True:
            self._news.clear()
            slow = rounds % SLOW_ROUNDS == 0
            try:
                await self._round(slow=slow)
            except database.AWAY as error:
                # Not connected throughout: what was watched until now proves nothing.
                self._watched.clear()
                log.warning("housekeeping.failed", error=repr(error))
            rounds += 1
            pause = min(ROUND_SECONDS, self._standing.lease_seconds / 10)
            await asyncio.sleep(pause / 5)  # what is settled meanwhile is one round
            try:
                async with asyncio.timeout(pause):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _round(self, *, slow: bool) -> None:
        for campaign_id in await campaigns.finish(self._pool):
            log.info("campaign.finished", campaign=campaign_id)
        if joined := await queue.rejoin_receipts(self._pool, None):
            log.info("receipts.rejoined", n=joined)
        await self._bury_the_dead()
        released, unknown = await queue.reap(self._pool)
        if released or unknown:
            log.warning("batches.reaped", released=released, unknown=unknown)
        if slow:
            for look in _SLOW:
                await look(self._pool)

    async def _bury_the_dead(self) -> None:
        beats = await queue.beats(self._pool)
        now = mitto.clock()
        if now - self._looked_at > self._standing.lease_seconds / 2:
            self._watched.clear()  # we were not watching all the while
        self._looked_at = now
        for replica_id, beat in beats.items():
            seen, since = self._watched.get(replica_id, (None, now))
            if seen != beat:
                self._watched[replica_id] = (beat, now)
            elif (
                replica_id != self._standing.replica_id
                and now - since > self._standing.lease_seconds
                and await queue.bury(self._pool, replica_id, beat)
            ):
                log.warning("replica.buried", replica=replica_id)
        for replica_id in self._watched.keys() - beats.keys():
            del self._watched[replica_id]


async def _wake_stranded(pool: Pool) -> None:
    if stranded := await queue.wake_stranded(pool):
        log.warning("lanes.woken", n=stranded)


_SLOW: tuple[Callable[[Pool], Awaitable[object]], ...] = (
    _wake_stranded,
    imports.drop_stale_uploads,
    tenants.forget_answers,
)
