"""Housekeeping: the heartbeat of this replica, the watch over the others, and what has to be looked at regularly.

A replica is dead when somebody who was connected all the while has watched its heartbeat rest for a whole lease.
Timestamps are never compared, so neither a clock nor an outage of Postgres kills anybody.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable

import structlog

from smsd import (
    __version__,
    campaigns,
    database,
    imports,
    mitto,
    queue,
    recovery,
    telemetry,
    tenants,
)
from smsd.database import Pool
from smsd.loops import first_of
from smsd.recovery import Memory

log = structlog.get_logger()

ROUND_SECONDS = 0.5
SLOW_ROUNDS = 10


class Housekeeping:
    """Two loops of the daemon: `beat` and `keep`."""

    def __init__(self, pool: Pool, standing: queue.Standing, memory: Memory | None = None) -> None:
        self._pool, self._standing = pool, standing
        self._memory = memory or Memory()
        self._asserting: asyncio.Task[None] | None = None
        self._kept = True
        self._news = asyncio.Event()
        # replica → its beat, and since when we see it
        self._watched: dict[int, tuple[int, float]] = {}
        self._looked_at = 0.0
        self._bereaved = False

    def wake(self) -> None:
        """News: a batch was settled, so that a campaign may be finished."""
        self._news.set()

    # ------------------------------------------------------------------------------------ heartbeat

    async def register(self) -> None:
        """Takes a new id; what an earlier life of this process leased is not ours."""
        sent_at = mitto.clock()
        replica_id = await queue.register(self._pool, self._standing.name, __version__)
        self._memory.beaten(replica_id, 0, sent_at)
        self._standing.beat_at, self._standing.replica_id = sent_at, replica_id
        log.info("replica.registered", replica=replica_id)

    async def beat(self) -> None:
        """Moves the heartbeat until cancelled; registers anew when this replica was declared dead, and says again what
        it had posted when the database is another."""
        pause = min(2.0, self._standing.lease_seconds / 8)
        try:
            while True:
                if await self._beat_once():
                    await asyncio.sleep(pause)
        finally:
            if self._asserting is not None:
                self._asserting.cancel()

    async def _beat_once(self) -> bool:
        """False: to be called again at once."""
        sent_at, replica_id = mitto.clock(), self._standing.replica_id
        try:
            if not replica_id:
                await self.register()
                return True
            beat = await queue.beat(self._pool, replica_id, self._memory.known_beat)
        except database.AWAY as error:
            log.warning("heartbeat.failed", error=repr(error))
            return True
        if beat is None:
            log.warning("replica.declared_dead", replica=replica_id)
            self._standing.replica_id = 0
            return False
        self._standing.beat_at = sent_at
        self._look_where_we_are(beat)
        self._memory.beaten(replica_id, beat.beat, sent_at)
        return True

    def _look_where_we_are(self, beat: queue.Beat) -> None:
        if beat.kept != self._kept:
            self._kept = beat.kept
            if beat.kept:
                log.warning("database.kept", identity=beat.identity)
            else:
                log.error(
                    "database.changed", kept=beat.identity,
                    detail="nothing is sent until all replicas have said what they had posted; if one cannot come back,"
                    " run `smsd recover`",
                )  # fmt: skip
        if self._memory.must_assert(beat) and (self._asserting is None or self._asserting.done()):
            self._asserting = asyncio.create_task(self._reassert(beat), name="re-assertion")
        elif beat.kept:
            self._memory.kept = beat.identity

    async def _reassert(self, beat: queue.Beat) -> None:
        try:
            await recovery.reassert(self._pool, self._memory, beat)
        except database.AWAY as error:
            log.warning("postings.not_asserted", error=repr(error))
        except Exception as error:
            log.error(
                "postings.not_asserted", error=type(error).__name__, stack=telemetry.stack_of(error)
            )

    # ----------------------------------------------------------------------------------------- keep

    async def keep(self) -> None:
        """Rounds until cancelled: finish campaigns, and when it is time match early receipts, watch, reap, wake what was
        forgotten."""
        rounds, pause = 0, min(ROUND_SECONDS, self._standing.lease_seconds / 10)
        round_at = -math.inf
        while True:
            self._news.clear()
            try:
                await self._look(_finish_campaigns)
                # Not with all news: beside a long snapshot some of it walks through all that ever was in flight.
                if mitto.clock() - round_at >= pause:
                    round_at = mitto.clock()
                    rounds += 1
                    await self._round(slow=rounds % SLOW_ROUNDS == 1)
            except database.AWAY as error:
                # Not connected throughout: what was watched until now proves nothing.
                self._watched.clear()
                log.warning("housekeeping.failed", error=repr(error))
            await asyncio.sleep(pause / 5)  # what is settled meanwhile is one round
            await first_of(pause, self._news)

    async def _round(self, *, slow: bool) -> None:
        await self._look(_rejoin_receipts)
        await self._look(self._bury_the_dead)
        if slow or self._bereaved:
            await self._look(_reap)
            self._bereaved = False
        if slow:
            for slow_look in _SLOW:
                await self._look(slow_look)

    async def _look(self, look: Callable[[Pool], Awaitable[object]]) -> None:
        """What one look stumbles over must not keep the others from theirs."""
        try:
            await look(self._pool)
        except database.AWAY:
            raise
        except Exception as error:
            log.error(
                "housekeeping.broken", look=look.__name__.strip("_"), error=type(error).__name__,
                stack=telemetry.stack_of(error),
            )  # fmt: skip

    async def _bury_the_dead(self, pool: Pool) -> None:
        beats = await queue.beats(pool)
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
                and await queue.bury(pool, replica_id, beat)
            ):
                log.warning("replica.buried", replica=replica_id)
                self._bereaved = True
        for replica_id in self._watched.keys() - beats.keys():
            del self._watched[replica_id]
            self._bereaved = True


async def _finish_campaigns(pool: Pool) -> None:
    for campaign_id in await campaigns.finish(pool):
        log.info("campaign.finished", campaign=campaign_id)


async def _rejoin_receipts(pool: Pool) -> None:
    if joined := await queue.rejoin_receipts(pool, None):
        log.info("receipts.rejoined", n=joined)


async def _reap(pool: Pool) -> None:
    released, unknown = await queue.reap(pool)
    if released or unknown:
        log.warning("batches.reaped", released=released, unknown=unknown)


async def _wake_stranded(pool: Pool) -> None:
    if stranded := await queue.wake_stranded(pool):
        log.warning("lanes.woken", n=stranded)


_SLOW: tuple[Callable[[Pool], Awaitable[object]], ...] = (
    _wake_stranded,
    imports.drop_stale_uploads,
    tenants.forget_answers,
)
