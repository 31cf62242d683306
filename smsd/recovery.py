"""Recovery: what a failover or a restore made the database forget, and who may say so.

A replica remembers what it posted until its result has been durable for minutes. On another database than the one that
was kept (its timeline or system changed, or a heartbeat went back) nobody claims until every replica that was at work
has said again what it had posted, and remembered all of it: then work goes on by itself. Else a person decides, with
`smsd recover`. The rules stand in `sql/migrations/0006_recovery.sql`.
"""

import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain

import orjson
import structlog

from smsd import database, mitto, queue, telemetry, text
from smsd.database import Connection, Executor, Pool

log = structlog.get_logger()

SQL = database.queries("recovery")

REMEMBERED_SECONDS = 300.0
REMEMBERED_MESSAGES = 100_000
_COMPARED_AT_ONCE = 5_000

Write = Callable[[], Awaitable[object]]


@dataclass(slots=True, eq=False)
class Posting:
    """A lease on its way. `attempt`: of the intent that was posted, or is about to be; 0 where nothing was. `write`: how
    what came of it is written, once that is known; may be called again. `sent`: whether Mitto may have taken any."""

    account_id: int
    replica_id: int
    grant: queue.Grant
    attempt: int = 0
    write: Write | None = None
    sent: bool = True
    ended_at: float = math.inf
    _intent: queue.Intent | bytes | None = None

    @property
    def intent(self) -> queue.Intent | None:
        """What was posted, or is about to be."""
        return (
            queue.Intent(*orjson.loads(self._intent))
            if isinstance(self._intent, bytes)
            else self._intent
        )

    def posts(self, intent: queue.Intent | None) -> None:
        """From now on this may have left; None: nothing did."""
        self._intent, self.attempt = intent, intent.attempt if intent else 0

    def pack(self) -> None:
        """It is over: remembered in one piece, a third of what its ids, phones and texts take."""
        if isinstance(self._intent, queue.Intent):
            # Copied: what orjson returns keeps the room that it was written in, up to twice its length.
            self._intent = bytes(memoryview(orjson.dumps(tuple(self._intent))))


def _lease(grant: queue.Grant) -> tuple[int, int]:
    return grant.batch_id, grant.epoch


class Memory:
    """What this process posted, and how far back it remembers all of it. Times are `mitto.clock`."""

    def __init__(
        self, *, seconds: float = REMEMBERED_SECONDS, messages: int = REMEMBERED_MESSAGES
    ) -> None:
        self._seconds, self._most = seconds, messages
        # By lease: a grant takes another slot where it missed its own.
        self._running: dict[tuple[int, int], Posting] = {}
        self._ended: deque[Posting] = deque()
        self._messages = 0
        self._beats: deque[tuple[int, int, float]] = deque(maxlen=4096)
        self.replica_ids: list[int] = []
        self.complete_since = -math.inf
        """All whose result was acknowledged later than this is remembered."""
        self.kept: str | None = None
        """The database on which this process worked last, once it has said there what it had posted."""
        self.asserted_at: datetime | None = None
        """Which change of the database it has answered."""

    def begin(self, account_id: int, replica_id: int, grant: queue.Grant) -> None:
        """A lease is on its way."""
        self._running[_lease(grant)] = Posting(account_id, replica_id, grant)

    def posted(self, grant: queue.Grant, intent: queue.Intent) -> None:
        """Its intent is acknowledged: from now on it may have left."""
        self._running[_lease(grant)].posts(intent)

    def settling(self, grant: queue.Grant, write: Write, *, sent: bool) -> None:
        """What came of it is known: whether Mitto may have taken any of it, and how that is written."""
        posting = self._running[_lease(grant)]
        posting.write, posting.sent = write, sent

    def withdrew(self, grant: queue.Grant, write: Write) -> None:
        """Nothing left, whatever intent was written."""
        posting = self._running[_lease(grant)]
        posting.posts(None)
        posting.write = write

    def end(self, grant: queue.Grant) -> None:
        """What came of it is written and acknowledged."""
        posting = self._running.pop(_lease(grant))
        posting.ended_at = mitto.clock()
        if not posting.attempt and posting.write is None:
            return
        posting.pack()
        self._ended.append(posting)
        self._messages += posting.grant.n
        while self._ended and (
            self._messages > self._most
            or self._ended[0].ended_at < posting.ended_at - self._seconds
        ):
            forgotten = self._ended.popleft()
            self._messages -= forgotten.grant.n
            self.complete_since = forgotten.ended_at

    def running(self) -> list[Posting]:
        """What has not ended yet."""
        return list(self._running.values())

    def __iter__(self) -> Iterator[Posting]:
        """All that is remembered, in the order in which it ended, then what has not."""
        return iter([*self._ended, *self._running.values()])

    def beaten(self, replica_id: int, beat: int, sent_at: float) -> None:
        """A heartbeat was acknowledged, or a registration (0)."""
        if replica_id not in self.replica_ids:
            self.replica_ids.append(replica_id)
        self._beats.append((replica_id, beat, sent_at))

    @property
    def known_beat(self) -> int:
        """The heartbeat that was acknowledged last, of the registration that holds now."""
        replica_id, beat, _ = self._beats[-1] if self._beats else (0, 0, 0.0)
        return beat if self.replica_ids and replica_id == self.replica_ids[-1] else 0

    def durable_until(self, beats: dict[int, int]) -> float:
        """What was acknowledged before this time is in a database where our heartbeats stand like this."""
        for replica_id, beat, sent_at in reversed(self._beats):
            if beats.get(replica_id, -1) >= beat:
                return sent_at
        return -math.inf

    def must_assert(self, beat: queue.Beat) -> bool:
        """Whether this database waits for us to say what we had posted."""
        if beat.kept:
            return self.kept is not None and self.kept != beat.identity
        return beat.found_at != self.asserted_at


async def greet(connection: Connection) -> None:
    """For every new connection, before it is used: on another database than the one kept, its ids jump first."""
    try:
        await connection.execute(SQL["look_at_instance"])
    except database.UNDEFINED_FUNCTION:
        return  # there is no schema yet


async def reassert(pool: Pool, memory: Memory, beat: queue.Beat) -> None:
    """Says again all that this process had posted, as far as it remembers. Raises one of database.AWAY: then it is to
    be called again."""
    postings, running = list(memory), memory.running()
    rows = await pool.fetch(SQL["registered_beats"], memory.replica_ids)
    durable_until = memory.durable_until({row["id"]: row["beat"] for row in rows})
    complete = memory.complete_since <= durable_until
    await pool.execute(
        SQL["raise_epochs"],
        [posting.grant.batch_id for posting in running],
        [posting.grant.epoch for posting in running],
    )
    restored = 0
    for posting in await _forgotten(pool, postings):
        match await _restore(pool, posting):
            case "restored":
                restored += 1
            case "failed":  # it may be sent again: let a person look
                complete = False
    await pool.fetchval(
        SQL["assert_instance"],
        memory.replica_ids,
        memory.kept or "",
        complete,
        [posting.grant.batch_id for posting in chain(postings, memory)],
    )
    memory.asserted_at = beat.found_at
    if beat.kept:
        memory.kept = beat.identity
    log.warning("postings.asserted", known=len(postings), restored=restored, complete=complete)


async def _forgotten(pool: Pool, postings: list[Posting]) -> list[Posting]:
    """Of these the ones whose attempt or result the database does not have, in order; not those that Mitto took nothing
    of, where the whole attempt is forgotten: they are as good as never made."""
    done: set[tuple[int, int]] = set()
    made = {(p.grant.batch_id, p.attempt): p for p in postings if p.attempt}
    for start in range(0, len(made), _COMPARED_AT_ONCE):
        ids, attempts = zip(*list(made)[start : start + _COMPARED_AT_ONCE], strict=True)
        for batch_id, attempt, found in await pool.fetch(SQL["compare"], ids, attempts):
            one = made[batch_id, attempt]
            if found == "known" or (found == "behind" and not one.sent):
                done.add((batch_id, attempt))
    return [p for p in postings if (p.grant.batch_id, p.attempt) not in done]


async def _restore(pool: Pool, posting: Posting) -> str:
    """Brings back an attempt if it was forgotten, then writes what came of it: known | restored | lost | failed."""
    found, where = "known", {"batch": posting.grant.batch_id, "campaign": posting.grant.campaign_id}
    try:
        if (intent := posting.intent) is not None:
            found = await _reassert(pool, posting, intent)
        if found in ("known", "restored"):
            if posting.write is not None:
                await posting.write()
            return found
        detail = "messages were posted that this database knows nothing of"
        log.error("posting.not_restored", **where, n=posting.grant.n, why=found, detail=detail)
    except database.AWAY:
        raise
    except Exception as error:  # one that cannot be written must not keep the others from it
        fault, stack = repr(error), telemetry.stack_of(error)
        log.error("posting.not_restored", **where, why=fault, stack=stack)
    return "lost" if found == "lost" else "failed"


async def _reassert(pool: Pool, posting: Posting, intent: queue.Intent) -> str:
    grant, found = posting.grant, "unpaid"
    segments = [text.segments(one).count for one in intent.texts]
    for worth in (segments, [0] * len(segments)):
        if found == "unpaid":  # it was sent all the same: what cannot be paid counts as nothing
            found = await pool.fetchval(
                SQL["reassert"], grant.batch_id, grant.epoch, intent.attempt, grant.campaign_id, grant.tenant_id,
                posting.account_id, posting.replica_id, grant.slot_us, intent.sender, intent.ids, intent.phones,
                intent.texts, worth,
            )  # fmt: skip
    return found


# ----------------------------------------------------------------------------------------- a person


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why nobody claims. `awaited`: replicas that have not said yet what they had posted; `gone`: those that will not
    any more; `asserted`: those that did. doubted: the same database, and heartbeats that it had are not there."""

    kept: str
    found: str
    since: datetime
    doubted: bool
    awaited: list[int]
    gone: list[int]
    asserted: list[int]


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A campaign that has not ended. Counts are messages; `unread`: recipients that are no messages yet."""

    id: int
    name: str
    status: str
    queued: int
    processing: int
    unknown: int
    unread: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a person has to know. `waiting`: None while work goes on. `unknown`: messages that a decision made unknown;
    `paused`: campaigns that it paused; both None where nothing was decided."""

    waiting: Waiting | None
    campaigns: list[UnderWay]
    unknown: int | None = None
    paused: int | None = None


class AtWork(Exception):  # noqa: N818 - a fact, not a fault
    """Replicas work in this database, and nothing was forgotten: what is queued is not unknown."""


async def waiting(db: Executor) -> Waiting | None:
    """What the queue waits for, or None while it works."""
    row = await db.fetchrow(SQL["waiting"])
    return None if row is None else Waiting(**row)


async def under_way(db: Executor) -> list[UnderWay]:
    """The campaigns that a decision is about."""
    return [UnderWay(**row) for row in await db.fetch(SQL["under_way"])]


async def recover(connection: Connection, *, decide: bool, as_unknown: bool) -> Report:
    """How things stand; decide: work goes on with what is here, and as_unknown: what is queued is unknown first.
    A copy of the files of an earlier day looks like no other database: as_unknown is then taken as well, as long as no
    replica works there; else raises AtWork."""
    await greet(connection)
    waits = await waiting(connection)
    if not decide or (waits is None and not as_unknown):
        return Report(waits, await under_way(connection))
    if waits is None and (n := await connection.fetchval(SQL["living"])):
        raise AtWork(
            f"{n} replicas work in this database, which is the one they know: stop them first if it was restored"
        )
    row = await connection.fetchrow(SQL["accept_instance"], as_unknown)
    assert row is not None
    return Report(None, await under_way(connection), row["unknown"], row["paused"])


def describe(report: Report) -> list[str]:
    """The report in lines for a person."""
    lines = []
    if (waits := report.waiting) is not None:
        lines += [
            "The queue waits: heartbeats that this database had are gone, and what was committed with them."
            if waits.doubted
            else "The queue waits: this is not the database whose history smsd knows.",
            f"  known     {waits.kept}",
            f"  this one  {waits.found}, since {waits.since:%Y-%m-%d %H:%M:%S} UTC",
            f"  replicas that said what they had posted: {_names(waits.asserted)}",
            f"  replicas that have not yet: {_names(waits.awaited)}",
            f"  replicas that are gone without: {_names(waits.gone)}",
        ]
    elif report.unknown is not None:
        lines += [
            f"The queue goes on. {report.unknown:,} messages became unknown, {report.paused:,} campaigns were paused."
        ]
    else:
        lines += ["The queue works: this is the database whose history smsd knows."]
    lines += [
        f"  campaign {one.id} ({one.status}, {one.name[:40]}): queued {one.queued:,}, processing {one.processing:,},"
        f" unknown {one.unknown:,}, recipients not read yet {one.unread:,}"
        for one in report.campaigns
    ]
    return lines + _CHOICES if waits is not None else lines


def _names(ids: list[int]) -> str:
    return ", ".join(map(str, ids)) or "none"


_CHOICES = [
    "",
    "Replicas that were at work and reach this database say by themselves what they had posted, and the queue goes on",
    "when all have. If one is gone, or this was restored from a backup, decide:",
    "  smsd recover --continue    what is queued here is sent. Right when nothing was sent that this database does not",
    "                             know of: the replica that is gone had posted nothing that was lost.",
    "  smsd recover --as-unknown  what is queued here is not sent: it becomes unknown, as it may have been sent after",
    "                             this copy was made. Receipts, or your verdict, tell what became of each. Campaigns",
    "                             whose audience was still being read pause, and wait to be resumed or cancelled.",
]
