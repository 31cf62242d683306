"""What one replica knows of a traffic account while it sends: what is in flight and for how long, where each request
stands in the limiter's window, and whether Mitto is there and lets us.

Nothing here decides a limit: that is `queue.claim`. This is how many to ask for, and what to tell of those that left.
"""

import asyncio
import contextlib
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple

import structlog

from smsd import database, mitto, queue
from smsd.config import Settings
from smsd.database import Pool
from smsd.model import Outcome

log = structlog.get_logger()

PRIORITY_PLACES = 2
"""Places of an account kept for single messages."""
REPLICA_IN_FLIGHT = 256
"""Requests in flight of the whole process; no account takes more than half, so that one that hangs stops no other."""
MESSAGES_IN_FLIGHT = 20_000
"""Messages in memory per account; bounds what a very high limit would claim ahead."""
GRANTS_MOST = 8
"""Of one claim."""
MESSAGES_IN_INTENTS = 2_000
"""Messages whose intents are written at once: they share a few connections, and what is claimed beyond these misses its
slot while it waits for its turn."""
SLOW_ANSWER_SECONDS = 1.0
"""What an answer may take, until there are ten: a process that has just started uses the limit before it knows better."""
BREAKER_AFTER = 3
BREAKER_SECONDS_MOST = 30.0
THROTTLE_SECONDS, THROTTLE_SECONDS_MOST = 0.25, 60.0
SLOW_LOOK_SECONDS = 1.0
MISSED_LOOK_SECONDS = 0.1
"""How often to look for what was granted and missed its slot, while there is nothing to be had."""


class Recent:
    """The last measurements of something, and their percentiles. `first` is believed as well until there are ten."""

    def __init__(self, first: float, size: int = 200) -> None:
        self._values, self._size = deque([first]), size
        self._ordered = [first]  # the same: asked for several times as often as one is added
        self._added = 0

    def add(self, value: float) -> None:
        self._values.append(value)
        insort(self._ordered, value)
        self._added += 1
        if self._added == 10 or len(self._values) > self._size:
            oldest = self._values.popleft()
            del self._ordered[bisect_left(self._ordered, oldest)]

    def percentile(self, share: float) -> float:
        """The value below which `share` (0 to 1) of the recent ones lie."""
        last = len(self._ordered) - 1
        return self._ordered[min(last, int(share * (last + 1)))]


class Place:
    """Where a request stands in the limiter's window: at its slot, or later where it left late or as long as nobody
    knows that it arrived."""

    def __init__(
        self, pool: Pool, clock: queue.DatabaseClock, account_id: int, claimed: queue.Grant
    ) -> None:
        self._pool, self._clock, self._account_id = pool, clock, account_id
        self.claimed = self.grant = claimed
        self._moved: asyncio.Task[queue.Grant] | None = None

    def late_from(self) -> float:
        """The `mitto.clock` from which on it leaves too late to be counted at its slot."""
        return self._clock.maybe_at(self.grant.slot_us + queue.LATE_US)

    def keep(self) -> None:
        """It may still be under way: counted as if it left now."""
        if self._moved is None or self._moved.done():
            self._moved = asyncio.create_task(self._move(self._now()))

    async def _move(self, counted: queue.Grant) -> queue.Grant:
        try:
            until_us = await queue.arrived_late(self._pool, self._account_id, counted)
        except Exception as error:  # whatever it is, the answer is worth more
            if not isinstance(error, database.AWAY):
                log.exception("late.not_counted", account=self._account_id)
            return counted
        return counted._replace(slot_us=until_us)

    def _now(self) -> queue.Grant:
        return self._moved.result() if self._moved is not None else self.grant

    async def counted(self) -> queue.Grant:
        """The grant with the time at which it is counted."""
        # Who is cancelled while waiting takes it not along.
        return await asyncio.shield(self._moved) if self._moved is not None else self.grant

    async def count_late(self, arrived_by: float | None) -> bool:
        """Where it may have arrived (`mitto.clock`; None: it never left) later than its slot allows, it is counted from
        then on; whether it is. What left late and arrived in time all the same is counted at its slot again."""
        counted, slot_us = await self.counted(), self.grant.slot_us
        if arrived_by is None:
            return False
        late = arrived_by > self._clock.maybe_at(slot_us + queue.GUARD_US)
        if not late and not slot_us < counted.slot_us <= slot_us + queue.GUARD_US:
            return False
        until_us = self._clock.us_at(arrived_by) if late else slot_us
        try:
            await database.until_written(
                lambda: queue.arrived_late(self._pool, self._account_id, counted, until_us)
            )
        except Exception:
            log.exception("late.not_counted", account=self._account_id)
        return late


class TooLate(Exception):  # noqa: N818 - a fact: there is no slot in time
    """No slot comes before the deadline; `seconds`: how long to wait for one at least."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no slot for {seconds:.0f} s")
        self.seconds = seconds


class Turn(NamedTuple):
    """A slot that has come, or is about to; `gate` and `starts_at` are for `mitto.Client`: past the slot the gate raises
    Withdrawn."""

    place: Place
    gate: Callable[[], None]
    starts_at: float


class Questions:
    """Requests that are no batches: look-ups at Mitto, each under a grant of its account's limit."""

    def __init__(self, pool: Pool, client: mitto.Client, all_limit: int | None) -> None:
        self._pool, self._client, self._all_limit = pool, client, all_limit
        self._clock = queue.DatabaseClock()

    async def ask(self, account: mitto.Account, provider_id: str, deadline: float) -> mitto.Fetched:
        """One GET. Raises TooLate when no slot comes before the deadline (`mitto.clock`)."""
        while True:
            turn = await self.turn(account.id, deadline)
            try:
                fetched = await self._client.fetch(
                    account, provider_id, turn.gate, turn.place.keep, turn.place.late_from()
                )
            except mitto.Withdrawn:
                await self.give_back(account.id, turn)
                continue
            await turn.place.count_late(fetched.arrived_by)
            return fetched

    async def turn(self, account_id: int, deadline: float, lead_seconds: float = 0.0) -> Turn:
        """Waits for a grant and its slot, up to `lead_seconds` before it. Raises TooLate when it would come after the
        deadline."""
        while mitto.clock() < deadline:
            await self._clock.learn(self._pool)
            before = mitto.clock()
            slot, now_us, back = await queue.grant_request(self._pool, account_id, self._all_limit)
            self._clock.observe(before, mitto.clock(), now_us)
            if not self._clock.is_known():
                continue  # it stepped, and a slot counts for nothing any more
            at = self._clock.surely_at(back if slot is None and back is not None else slot or 0)
            if slot is None and at > deadline:
                raise TooLate(at - mitto.clock())
            lead = lead_seconds if slot else 0.0
            await asyncio.sleep(max(0.0 if slot else 0.001, at - lead - mitto.clock()))
            if slot is not None:
                grant = queue.Grant(0, 0, 0, tenant_id=0, n=0, slot_us=slot)
                place = Place(self._pool, self._clock, account_id, grant)
                return Turn(place, self._gate(slot), at)
        raise TooLate(0.0)

    def _gate(self, slot_us: int) -> Callable[[], None]:
        latest = self._clock.maybe_at(slot_us + queue.GATE_US)

        def gate() -> None:
            if mitto.clock() > latest:
                raise mitto.Withdrawn("past its slot")

        return gate

    async def give_back(self, account_id: int, turn: Turn) -> None:
        """A turn that was not used: its gate was shut."""
        await queue.give_back_request(self._pool, account_id, turn.place.grant.slot_us)


class Pace:
    """What one replica knows of a traffic account: what is in flight, how long answers take, whether it is there."""

    def __init__(self, row: queue.AccountRow, settings: Settings) -> None:
        self.row = row
        self.news = asyncio.Event()
        """A lane became non-empty, or what was granted was not used."""
        self.freed = asyncio.Event()
        """There may be room for more at once: for whoever does not wait for a slot."""
        self.sending: set[asyncio.Task[None]] = set()
        self._least = settings.worker_concurrency
        self._window = float(settings.worker_concurrency)
        # When each was claimed. By grant, not by batch: one that was given back may be here again already.
        self._places: dict[queue.Grant, float] = {}
        self._messages = self._in_intents = 0
        self._batch_size = MESSAGES_IN_INTENTS // 4
        self._seconds = Recent(SLOW_ANSWER_SECONDS)
        self._took = Recent(math.inf)
        self._missed = 0
        self.told = (0, 0.0)
        self._open_until = 0.0
        self._halved_at = -math.inf
        self._throttled = 0
        self._looked_at = -math.inf

    def looks_for_missed(self) -> bool:
        """Whether it is time to."""
        now = mitto.clock()
        if now - self._looked_at < MISSED_LOOK_SECONDS:
            return False
        self._looked_at = now
        return True

    def room(self) -> tuple[int, bool]:
        """(how many batches to claim, whether only of the priority class)."""
        if self.is_closed():
            return 0, False
        if self._missed >= BREAKER_AFTER:
            return (0, False) if self._places else (1, False)  # one batch probes
        needed = math.ceil(self.row.requests_per_second * self._seconds.percentile(0.95)) + 1
        places = min(max(self._least, needed), REPLICA_IN_FLIGHT // 2, int(self._window))
        with_priority = places + PRIORITY_PLACES
        if (most := self.row.max_in_flight) is not None:  # one of several is kept
            with_priority = min(with_priority, most)
            places = min(places, most - (most > 1))
        # Written slower than sent: wait for Postgres rather than pile up answers.
        if len(self.sending) >= 3 * places:
            return 0, False
        free = places - len(self._places)
        turns = (MESSAGES_IN_INTENTS - self._in_intents) // self._batch_size
        # Claimed one by one as intents are written, each would cost as much as several at once.
        in_turn = self._in_intents <= MESSAGES_IN_INTENTS // 4
        if free > 0 and in_turn and self._messages < MESSAGES_IN_FLIGHT:
            return min(free, GRANTS_MOST, max(1, turns)), False
        return max(0, with_priority - len(self._places)), True

    def is_closed(self) -> bool:
        """Whether nothing may leave: Mitto asked to wait, or is not there."""
        return mitto.clock() < self._open_until

    def closed_seconds(self) -> float:
        """How long to wait for a place, at most."""
        closed = self._open_until - mitto.clock()
        return min(closed, SLOW_LOOK_SECONDS) if closed > 0 else SLOW_LOOK_SECONDS

    def made_slot(self) -> None:
        """This process keeps pace: more at once, whether or not Mitto has answered yet."""
        self._grow()
        self.freed.set()

    def _grow(self) -> None:
        self._window = min(self._window + 1.0, REPLICA_IN_FLIGHT / 2)

    def missed_slot(self, grant: queue.Grant) -> None:
        """This process was too slow for a slot: fewer at once from now on (as TCP does when a packet is lost, and like
        it once for all that were on their way together)."""
        if self._places[grant] > self._halved_at:
            self._halved_at = mitto.clock()
            self._window = max(float(self._least), self._window / 2)

    def start(self, grant: queue.Grant, send: Coroutine[Any, Any, None]) -> None:
        self._places[grant] = mitto.clock()
        self._messages += grant.n
        self._batch_size = max(1, grant.n)
        task = asyncio.create_task(send, name=f"batch {grant.batch_id}")
        self.sending.add(task)
        task.add_done_callback(self._ended)

    @contextlib.contextmanager
    def intending(self, grant: queue.Grant) -> Iterator[None]:
        """While its intent is written, from when on it waits for a connection."""
        self._in_intents += grant.n
        try:
            yield
        finally:
            self._in_intents -= grant.n
            self.freed.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.sending.discard(task)
        self.freed.set()

    def answered(self, grant: queue.Grant, result: mitto.Result) -> None:
        """The request is over: its place is free, and the breaker hears of it."""
        claimed_at = self._places.pop(grant)
        self.freed.set()
        # Then it was on its way by that time and tells nothing new: a wait grows by what comes after it.
        closed_already = self.is_closed()
        if result.outcome is Outcome.NEVER_LEFT:
            # A kept connection that the other side closed says nothing.
            if not closed_already and "gone stale" not in result.detail:
                self._missed_provider(result)
            return
        self._missed = 0
        if result.outcome is Outcome.THROTTLED:
            self._throttled += not closed_already or not self._throttled
            # Here at once; on other replicas as soon as it is written.
            until = mitto.clock() + self.throttle_seconds(result)
            self._open_until = max(self._open_until, until)
        else:
            self._throttled = 0
        self._seconds.add(mitto.clock() - claimed_at)
        self._grow()

    def _missed_provider(self, result: mitto.Result) -> None:
        self._missed += 1
        if self._missed >= BREAKER_AFTER:
            wait = _breaker_seconds(self._missed)
            self._open_until = mitto.clock() + wait
            log.warning("breaker.opened", account=self.row.id, seconds=wait, detail=result.detail)

    def breaker(self) -> tuple[int, float]:
        """(answers missed in a row, for how many seconds nothing leaves after the last); zeros while it is closed."""
        if self._missed < BREAKER_AFTER:
            return 0, 0.0
        return self._missed, _breaker_seconds(self._missed)

    def throttle_seconds(self, result: mitto.Result) -> float:
        """How long to wait: as Mitto says, or a second, doubled while it goes on."""
        if result.retry_after_seconds:
            return result.retry_after_seconds
        return _doubled(THROTTLE_SECONDS, max(0, self._throttled - 1), THROTTLE_SECONDS_MOST)

    def arrived_by(self, result: mitto.Result) -> float | None:
        """The `mitto.clock` by which a request had arrived, at the latest; None: nothing left. Where answers come at
        once, or take always the same, one that came later may have been read later than it had arrived in the kernel;
        a provider that thinks, now longer and now shorter, tells nothing by that."""
        if result.left_at is None:
            return None
        if result.answered_at is None:
            return result.arrived_by or mitto.clock()
        self._took.add(result.answered_at - result.left_at)
        fastest = self._took.percentile(0)
        by_answer = result.answered_at - fastest
        if result.arrived_by is None:
            return by_answer
        thinks = fastest > queue.GUARD_US / 1e6
        steady = self._took.percentile(0.5) - fastest <= queue.GUARD_US / 2e6
        return max(result.arrived_by, by_answer) if steady or not thinks else result.arrived_by

    def release(self, grant: queue.Grant) -> None:
        """The batch is settled or given back."""
        unused = self._places.pop(grant, None) is not None
        self._messages -= grant.n
        (self.news if unused else self.freed).set()


def _breaker_seconds(missed: int) -> float:
    return _doubled(1.0, missed - BREAKER_AFTER, BREAKER_SECONDS_MOST)


def _doubled(seconds: float, times: int, most: float) -> float:
    return min(
        most, seconds * 2.0 ** min(times, 10)
    )  # a float ends at 2 ** 1024, an outage does not
