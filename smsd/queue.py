"""The queue: what is claimed, leased, limited, posted and settled, and who is alive to do it.

Batches are claimed, not messages. A claim picks the fair lane, finds a time slot under every limit and leases, in
one round trip; an intent makes it durable that a POST is about to leave; settle writes what came of it. The rules
stand in `sql/migrations` as functions, the words for them here.

Times that carry `_us` are microseconds of the database's clock.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, Self

import orjson

from smsd import arrival, database, metrics
from smsd.database import Connection, Executor, Pool
from smsd.mitto import ItemResult
from smsd.model import MessageState

SQL = database.queries("queue")

GUARD_US = 30_000
"""J: how much later than its slot a request may arrive and still be inside the limiter's window; `guard_us()` in SQL."""
GATE_US = GUARD_US // 3
"""How much later than its slot a request may leave; the rest of the guard is for its way, and for being read."""
LATE_US = 2 * GATE_US
"""How much later than its slot a request may have left and still count at it, until its answer tells more."""
HORIZON_US = 100_000
"""How far ahead of now slots are given; also what a newcomer waits for on a saturated account."""


class Grant(NamedTuple):
    """A lease on one batch, with the slot at which it may leave. `cost`: what it took of the limits in messages (or
    segments)."""

    batch_id: int
    epoch: int
    campaign_id: int
    tenant_id: int
    n: int
    slot_us: int
    cost: int = 0

    @property
    def is_single(self) -> bool:
        """One message of the priority class, and not a campaign's batch."""
        return self.campaign_id == 0


class Claim(NamedTuple):
    """What a claim brought: grants, or what it waits for and when to come back (None: at the next wake)."""

    grants: tuple[Grant, ...]
    now_us: int
    back_us: int | None
    waits_for: str | None


class Intent(NamedTuple):
    """verdict: post | lost | cancelled | paused | empty; the rest is only there for post. `early_mark`: as of
    `Written`; None: not known."""

    verdict: str
    attempt: int
    sender: str
    ids: list[int]
    phones: list[int]
    texts: list[str]
    early_mark: int | None = None


@dataclass(frozen=True, slots=True)
class AccountRow:
    """A traffic account as senders see it."""

    id: int
    provider_id: str
    api_key: str | None
    server_error_means: str
    requests_per_second: int
    max_in_flight: int | None
    paused_reason: str | None
    capabilities: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------ replicas


@dataclass(slots=True)
class Standing:
    """This process among the replicas: the id that owns its leases, and until when they surely hold.

    `beat_at` is the clock (`mitto.clock`) when the last heartbeat that was acknowledged was sent; nobody who
    watched the heartbeat can have seen it rest for a lease before `beat_at` + lease.
    """

    name: str
    lease_seconds: float
    replica_id: int = 0
    beat_at: float = 0.0

    @property
    def id(self) -> int | None:
        """The registration, None while there is none."""
        return self.replica_id or None

    def holds(self, now: float) -> bool:
        """Whether a lease surely holds for another tenth of its length."""
        return self.replica_id != 0 and now < self.beat_at + 0.9 * self.lease_seconds


class Beat(NamedTuple):
    """A heartbeat that was written, and where: `kept` unless this is another database than the one whose history is
    known (`identity`), which was noticed at `found_at`."""

    beat: int
    kept: bool
    identity: str
    found_at: datetime | None


async def register(db: Executor, name: str, version: str) -> int:
    """A new registration of this process; returns its id, which owns its leases."""
    return int(await db.fetchval(SQL["register_replica"], name, version))


async def beat(db: Executor, replica_id: int, known: int = 0) -> Beat | None:
    """Moves the heartbeat; `known`: the last one that was acknowledged. None: this replica was declared dead."""
    row = await db.fetchrow(SQL["beat"], replica_id, known)
    assert row is not None
    return None if row["beat"] is None else Beat(**row)


async def leave(db: Executor, replica_id: int, reason: str) -> None:
    """Says goodbye, so that nobody waits a lease for us."""
    await db.execute(SQL["leave"], replica_id, reason)


async def beats(db: Executor) -> dict[int, int]:
    """Heartbeats of all that are not gone: id → beat."""
    return {row["id"]: row["beat"] for row in await db.fetch(SQL["beats"])}


async def bury(db: Executor, replica_id: int, beat: int) -> bool:
    """Declares a replica dead, unless its heartbeat moved from `beat`."""
    return await db.fetchval(SQL["bury"], replica_id, beat) is not None


async def bury_all(db: Executor) -> None:
    """Declares every earlier replica dead: for who holds the only lock on this database's folder."""
    await db.execute(SQL["bury_all"])


async def reap(db: Executor) -> tuple[int, int]:
    """Takes from the dead; returns batches given back, and batches that became unknown."""
    row = await db.fetchrow(SQL["reap"])
    return (row["released"], row["unknown"]) if row else (0, 0)


class DatabaseClock:
    """The database's clock as seen from this process: an interval, since a reading takes a round trip.

    Each reading bounds the offset (database minus `mitto.clock`) from both sides; readings are intersected, and
    the interval widens with time, as clocks drift apart (Marzullo's way of keeping an offset honest). A Postgres so
    far away that its interval would leave no room within the guard is believed to be as far there as back, as NTP
    does: its middle counts, and no more than an eighth of the guard on either side. That is so of a way that is long,
    not of an answer that was waited for: so the clock is known by a narrow interval, or by many readings.
    """

    _DRIFT = 100e-6
    _DOUBT_MOST = GUARD_US / 8e6
    _READINGS = 8

    def __init__(self) -> None:
        self._low = self._high = 0.0
        self._read_at: float | None = None
        self._readings = 0

    def is_known(self) -> bool:
        """Whether anything may be timed by it."""
        narrow = self._read_at is not None and self._high - self._low <= 2 * self._DOUBT_MOST
        return narrow or self._readings >= self._READINGS

    async def learn(self, pool: Pool) -> float:
        """Reads until it is known; returns what `observe` does."""
        if self.is_known():
            return 0.0
        ahead = 0.0
        async with pool.acquire() as db:  # once: giving it back takes a round trip too
            while not self.is_known():
                before = arrival.clock()
                now_us = await db.fetchval(SQL["read_clock"])
                ahead = max(ahead, self.observe(before, arrival.clock(), now_us))
        return ahead

    def observe(self, before: float, after: float, now_us: int) -> float:
        """A reading: the database said `now_us` at some time between `before` and `after`. Returns by how many seconds
        at least it had stepped ahead of what earlier readings allow; 0 if it had not."""
        # It tells no more than the microsecond, one way or the other.
        low, high = (now_us - 1) / 1e6 - after, (now_us + 1) / 1e6 - before
        ahead = 0.0
        if self._read_at is not None:
            slack = (after - self._read_at) * self._DRIFT
            if slack > self._DOUBT_MOST:  # what was read so long ago says too little
                self._readings = 0
            ahead = max(0.0, low - self._high - slack)
            if ahead == 0 and high >= self._low - slack:
                low, high = max(low, self._low - slack), min(high, self._high + slack)
            else:
                self._readings = 0
        self._readings += 1
        self._low, self._high, self._read_at = low, high, after
        return ahead

    def surely_at(self, slot_us: int) -> float:
        """The local time from which on the database's clock has surely reached the slot."""
        return slot_us / 1e6 - max(self._low, self._middle - self._DOUBT_MOST)

    def maybe_at(self, slot_us: int) -> float:
        """The local time from which on the database's clock may have reached the slot."""
        return slot_us / 1e6 - min(self._high, self._middle + self._DOUBT_MOST)

    def us_at(self, at: float) -> int:
        """What the database's clock shows at the local time `at`, at the most."""
        return int((at + min(self._high, self._middle + self._DOUBT_MOST)) * 1e6)

    @property
    def _middle(self) -> float:
        return (self._low + self._high) / 2


# --------------------------------------------------------------------------------------------- claim


async def accounts(db: Executor) -> list[AccountRow]:
    """Every traffic account that has a lane."""
    return [AccountRow(**row) for row in await db.fetch(SQL["accounts"])]


async def claim(
    db: Executor,
    account_id: int,
    replica_id: int,
    want: int,
    *,
    lead_us: int,
    single_lead_us: int | None = None,
    all_limit: int | None = None,
    priority_only: bool = False,
) -> Claim:
    """Leases up to `want` batches of an account. `lead_us`: no slot earlier than this from now, the time that an
    intent takes; `single_lead_us`: that of a single message, where it differs. `all_limit`: requests per second over
    all accounts."""
    rows = await db.fetch(
        SQL["claim"],
        account_id, replica_id, want, lead_us, HORIZON_US, all_limit, priority_only, single_lead_us,
    )  # fmt: skip
    first = rows[0]
    if first["batch_id"] is None:
        return Claim((), first["now_us"], first["slot"], first["waits_for"])
    grants = tuple(
        Grant(
            r["batch_id"],
            r["epoch"],
            r["campaign_id"],
            r["tenant_id"],
            r["n"],
            r["slot"],
            r["cost"],
        )
        for r in rows
    )
    return Claim(grants, first["now_us"], None, None)


async def intent(db: Executor, grant: Grant, replica_id: int) -> Intent:
    """Writes the intent of a leased batch and returns what to post."""
    row = await db.fetchrow(SQL["intent"], grant.batch_id, replica_id, grant.epoch)
    assert row is not None
    return Intent(*row.values())


async def withdraw(db: Executor, grant: Grant, why: str) -> bool:
    """Gives an unsent batch back with its grant, whether or not its intent was written."""
    return bool(await db.fetchval(SQL["withdraw"], grant.batch_id, grant.epoch, why))


async def retake_slot(
    db: Executor, grant: Grant, *, lead_us: int, all_limit: int | None = None
) -> Grant | None:
    """Another slot for a batch whose intent is written and whose slot was missed. None: not now; it has none then."""
    slot = await db.fetchval(
        SQL["retake_slot"], grant.batch_id, grant.epoch, lead_us, HORIZON_US, all_limit
    )
    return None if slot is None else grant._replace(slot_us=slot)


async def take_back_missed(db: Executor, account_id: int) -> int:
    """Gives back what was leased, by whomever, and had no intent yet 0.1 s after its slot: its replica was killed, or is
    so late that the slot is lost. How many batches."""
    return int(await db.fetchval(SQL["take_back_missed"], account_id) or 0)


async def arrived_late(
    db: Executor, account_id: int, grant: Grant, until_us: int | None = None
) -> int:
    """Counts a request in the limiter's window as if it had left at `until_us` (None: now) instead of its slot; when
    that is."""
    return int(
        await db.fetchval(
            SQL["arrived_late"], account_id, grant.tenant_id, grant.slot_us, grant.cost, until_us
        )
    )


async def grant_request(
    db: Executor, account_id: int, all_limit: int | None
) -> tuple[int | None, int, int | None]:
    """A slot for one request that is not a batch: (slot or None, now, when to come back or None)."""
    row = await db.fetchrow(SQL["grant_request"], account_id, HORIZON_US, all_limit)
    assert row is not None
    return row["slot"], row["now_us"], row["back_us"]


async def give_back_request(db: Executor, account_id: int, slot_us: int) -> None:
    """A slot of `grant_request` that was missed is the account's again."""
    await db.execute(SQL["give_back_request"], account_id, slot_us)


async def wake_stranded(db: Executor) -> int:
    """Wakes idle lanes that have something to do; how many there were (0, unless a wake was lost in a crash)."""
    return len(await db.fetch(SQL["wake_stranded"]))


async def wake_lane(db: Executor, lane_id: int, first_id: int) -> None:
    """Says that a lane has batches from message `first_id` on."""
    await db.execute(SQL["wake_lane"], lane_id, first_id)


async def add_message(
    db: Connection,
    tenant_id: int,
    account_id: int,
    phone: int,
    text: str,
    sender: str,
    segments: int,
    *,
    reference: str | None = None,
    on_unknown: str = "hold",
) -> int | None:
    """Queues one message of the priority class, in one statement; its id, or None when the credits do not reach.
    `reference`: the caller's own word for it. `on_unknown`: hold | resend, what becomes of it where its outcome is
    unknown."""
    row = await db.fetchrow(
        SQL["add_message"],
        tenant_id,
        account_id,
        phone,
        text,
        sender,
        segments,
        reference,
        on_unknown,
    )
    return int(row["id"]) if row else None


# -------------------------------------------------------------------------------------------- settle


class Answer(NamedTuple):
    """An answer that decided item by item, as it is written and remembered: some forty bytes a message. `message_ids`:
    None where they follow `first_id` without a gap; `states`: None where all were accepted."""

    first_id: int
    n: int
    message_ids: "array[int] | None"
    states: "array[int] | None"
    provider_ids: str
    details: list[str | None] | None
    bulk_id: str | None
    status: int | None

    @classmethod
    def of(cls, items: Sequence[ItemResult], bulk_id: str | None, status: int | None) -> Self:
        """From what the answer says of each item."""
        ids, states, provider_ids, details = zip(*items, strict=True)
        first_id, n = ids[0], len(ids)
        # Nearly always: asyncpg looks at each number of an array twice, which takes as long as all else of an answer.
        in_row = ids == tuple(range(first_id, first_id + n))
        all_accepted = states.count(MessageState.ACCEPTED) == n
        return cls(
            first_id,
            n,
            None if in_row else array("q", ids),
            None if all_accepted else array("h", states),
            _joined([one or "" for one in provider_ids]),
            list(details) if any(details) else None,
            bulk_id,
            status,
        )

    def whole(self) -> bool:
        """Whether all was accepted and in a row: one word for the batch, where it is written so."""
        return self.message_ids is None and self.states is None and self.details is None

    def given_ids(self) -> list[str]:
        """The ids that Mitto gave."""
        return [one for one in self.provider_ids.split("\n") if one]


class Written(NamedTuple):
    """`written`: False where a newer attempt exists, and the answer was recorded only. `early_mark`: how many early
    receipts there have ever been by then, those of others included that are not committed yet: if it is what the
    intent said, none of that attempt has come."""

    written: bool
    early_mark: int


async def settle(
    db: Executor, batch_id: int, attempt: int, answer: Answer, *, mapped: bool = True
) -> Written:
    """Writes an answer that decided item by item: one transaction. `mapped`: off where nobody knows which id is whose;
    with an id for each, all are accepted then, else all unknown, and the ids are kept to be asked about."""
    if mapped and answer.whole():
        row = await db.fetchrow(
            SQL["settle_accepted"], batch_id, attempt, answer.first_id, answer.n,
            answer.provider_ids, answer.bulk_id, answer.status,
        )  # fmt: skip
    else:
        statement = SQL["settle_items" if mapped else "settle_unmapped"]
        row = await db.fetchrow(statement, batch_id, attempt, *answer)
    assert row is not None
    return Written(bool(row["written"]), row["early_mark"])


async def settle_items(
    db: Executor, batch_id: int, attempt: int, answer: Answer, *, mapped: bool = True
) -> bool:
    """As `settle`, without the mark."""
    return (await settle(db, batch_id, attempt, answer, mapped=mapped)).written


def _joined(provider_ids: Sequence[str]) -> str:
    """Ids as one text, a line each (`mitto` takes none with a line break): asyncpg writes an array of 500 texts in the
    time of five."""
    return "\n".join(provider_ids)


async def settle_batch(
    db: Executor,
    batch_id: int,
    attempt: int,
    action: str,
    outcome: str,
    *,
    status: int | None = None,
    detail: str | None = None,
    delay_seconds: float = 0.0,
    most: int = 1,
    refusal: str | None = None,
) -> str:
    """Writes one outcome for the whole batch. action: again | back | refused | unknown (see the function in SQL);
    returns ready | waiting | failed | unknown | split | lane_paused | cancelled | late | settled."""
    return str(
        await db.fetchval(
            SQL["settle_batch"],
            batch_id, attempt, action, outcome, status, detail, delay_seconds, most, refusal,
        )
    )  # fmt: skip


async def block_account(db: Executor, account_id: int, seconds: float) -> None:
    """No replica sends for this account for so long."""
    await db.execute(SQL["block_account"], account_id, seconds)


async def throttle_account(db: Executor, account_id: int, seconds: float, slot_us: int) -> bool:
    """As `block_account`, and the ceiling goes down: once for all that were granted before it was blocked. `slot_us`:
    of the request that was refused. False: it was one of those, and the ceiling is down already."""
    return bool(await db.fetchval(SQL["throttle_account"], account_id, seconds, slot_us))


async def pause_account(
    db: Executor, account_id: int, reason: str, detail: str, api_key: str
) -> bool:
    """Stops an account until a person lifts it; False if it was stopped already, or has another key by now than
    the one that was refused."""
    paused = await db.fetchval(SQL["pause_account"], account_id, reason, detail, api_key)
    return paused is not None


async def lower_largest_request(db: Executor, account_id: int, refused_n: int) -> None:
    """Remembers that a request of `refused_n` messages was too large."""
    await db.execute(SQL["lower_largest_request"], account_id, refused_n)


async def pause_campaign_of(
    db: Executor, batch_id: int, reason: str, detail: str
) -> tuple[bool, bool]:
    """Pauses the campaign of a batch; (whether it did, whether another tenant of the account stands likewise)."""
    row = await db.fetchrow(SQL["pause_batch_campaign"], batch_id, reason, detail)
    return (bool(row["paused"]), bool(row["others"])) if row else (False, False)


# ------------------------------------------------------------------------------------------ receipts


class ReceiptRow(NamedTuple):
    """One receipt ready to be applied; account_id where the webhook's secret named the account."""

    account_id: int | None
    provider_id: str
    state: int
    at: datetime | None
    description: str | None


class RawReceipt(NamedTuple):
    """What came in as a receipt and could not be read, and why not."""

    account_id: int | None
    body: str
    why: str


class Sweep(NamedTuple):
    """last_id: of the early receipts that were looked at, None where there were none."""

    last_id: int | None
    joined: int
    given_up: int


async def apply_receipts(db: Executor, receipts: Sequence[ReceiptRow]) -> tuple[int, int]:
    """Applies receipts: (messages that moved, receipts kept for ids not known yet)."""
    if not receipts:
        return 0, 0
    accounts, ids, states, ats, descriptions = _columns(receipts, 5)
    row = await db.fetchrow(
        SQL["apply_receipts"],
        ",".join(["" if one is None else str(one) for one in accounts]),
        _joined(ids),
        ",".join(map(str, states)),
        _joined_times(ats),
        descriptions if any(descriptions) else None,
    )
    assert row is not None
    updated, kept = row["updated"], row["kept"]
    metrics.receipts(received=len(receipts), applied=updated, early=kept)
    return updated, kept


async def keep_raw_receipts(db: Executor, raw: Sequence[RawReceipt]) -> None:
    """Keeps what could not be read, as it came."""
    if raw:
        await db.execute(SQL["keep_raw_receipts"], *_columns(raw, 3))
        metrics.receipts(raw=len(raw))


def _joined_times(ats: Sequence[datetime | None]) -> str:
    """Times as one text with commas, nothing for None: JSON without its marks, which is made faster than
    `isoformat` makes each."""
    return orjson.dumps(ats)[1:-1].replace(b'"', b"").replace(b"null", b"").decode()


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(width)]


async def rejoin_receipts(db: Executor, provider_ids: Sequence[str] | None) -> int:
    """Matches early receipts (None: those of the last minute) with messages known by now; how many messages moved."""
    ids = None if provider_ids is None else _joined(provider_ids)
    joined = int(await db.fetchval(SQL["rejoin_receipts"], ids))
    metrics.receipts(applied=joined)
    return joined


async def sweep_early_receipts(db: Executor, after_id: int, most: int) -> Sweep:
    """Looks at the next early receipts by id, matches those known by now, and gives up those older than a day."""
    row = await db.fetchrow(SQL["sweep_early_receipts"], after_id, most)
    assert row is not None
    return Sweep(**row)


async def next_raw_receipts(
    db: Connection, after_id: int, until_id: int, most: int
) -> list[database.Record]:
    """The next raw receipts by id, locked; those that somebody else has locked are left out."""
    return await db.fetch(SQL["next_raw_receipts"], after_id, until_id, most)


async def newest_raw_receipt(db: Executor) -> int:
    """The highest id in the raw inbox, 0 where it is empty."""
    return int(await db.fetchval(SQL["newest_raw_receipt"]))


async def known_receipts(db: Executor, receipts: Sequence[ReceiptRow]) -> list[bool]:
    """Of each receipt whether its message is known."""
    accounts, ids, *_ = _columns(receipts, 5)
    return [row["known"] for row in await db.fetch(SQL["known_receipts"], accounts, ids)]


async def end_raw_receipts(
    db: Connection, read_ids: Sequence[int], unread_ids: Sequence[int], whys: Sequence[str]
) -> None:
    """Removes raw receipts that were read, and says of others why they cannot be."""
    await db.execute(SQL["end_raw_receipts"], read_ids, unread_ids, whys)
