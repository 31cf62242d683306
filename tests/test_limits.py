"""Limits to the letter: what a ceiling learns, limits in messages and segments, who is kept room, what is given back;
most of it on a clock that is moved by hand, the rest as the provider sees it."""

import asyncio
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest
from conftest import Api
from shop import ACCEPTED, Shop, check_the_account
from support import (
    GUARD_US,
    SECOND_US,
    Clock,
    Sending,
    assert_sound,
    largest_window,
    new_account,
    open_shop,
    sending,
    take_the_clock,
)

from smsd import arrival, config, database, faults, mitto, queue
from smsd.model import Outcome
from smsd.pace import Pace, Place, Questions
from smsd.queue import Grant
from smsd.simulator import Simulator, Switches

WINDOW_US = SECOND_US + GUARD_US


@pytest.fixture
async def account(pool: database.Pool) -> int:
    return await new_account(pool)


@pytest.fixture
async def shop(pool: database.Pool, account: int) -> AsyncIterator[Shop]:
    """A shop; whatever the test did with it, the audit finds nothing afterwards."""
    yield await open_shop(pool, account, await queue.register(pool, "test", "0"))
    await assert_sound(pool)


@pytest.fixture
async def clock(pool: database.Pool, shop: Shop) -> Clock:
    return await take_the_clock(pool)


@pytest.fixture
async def provider() -> AsyncIterator[Simulator]:
    async with Simulator(Switches(dlr=False)) as simulator:
        yield simulator
        assert simulator.ledger.duplicates("destination") == []


async def change_account(pool: database.Pool, account_id: int, **fields: int | str | None) -> None:
    for name, value in fields.items():
        await pool.execute(
            f"update traffic_account set {name} = $2 where id = $1", account_id, value
        )


async def change_tenant(pool: database.Pool, tenant_id: int, **fields: int | None) -> None:
    for name, value in fields.items():
        await pool.execute(f"update tenant set {name} = $2 where id = $1", tenant_id, value)


async def ask(shop: Shop, want: int = 1, *, priority_only: bool = False) -> queue.Claim:
    return await queue.claim(
        shop.pool, shop.account_id, shop.replica_id, want, lead_us=0, priority_only=priority_only
    )


async def run(shop: Shop, clock: Clock, us: int) -> list[Grant]:
    """All that is granted in so many microseconds to somebody who comes back when he is told to."""
    grants: list[Grant] = []
    until = clock.now_us + us
    while clock.now_us < until:
        claim = await ask(shop, 8)
        grants += claim.grants
        if not claim.grants:
            back = claim.back_us or clock.now_us + 20_000
            await clock.move(min(back, until) - clock.now_us)
    return grants


def costs(grants: list[Grant]) -> list[tuple[int, int]]:
    return [(grant.slot_us, grant.cost) for grant in grants]


def requests(grants: list[Grant]) -> list[tuple[int, int]]:
    return [(grant.slot_us, 1) for grant in grants]


def use(slots: list[tuple[int, int]], limit: int) -> float:
    """The share of a limit that was used, from a second after the first slot to the last."""
    first, last = slots[0][0] + SECOND_US, slots[-1][0]
    return (
        sum(cost for at, cost in slots if first <= at < last) * SECOND_US / (last - first) / limit
    )


async def one_message(shop: Shop, phone: int) -> None:
    async with shop.pool.acquire() as connection, connection.transaction():
        assert await queue.add_message(
            connection, shop.id, shop.account_id, phone, "Code", "Shop", 1
        )


# ----------------------------------------------------------------------------------------- the window


async def test_the_guard_is_the_same_in_sql_and_python(pool: database.Pool) -> None:
    assert await pool.fetchval("select guard_us()") == queue.GUARD_US


async def test_a_limit_is_used_to_what_the_guard_leaves_and_slots_that_were_missed_are_made_up(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await change_account(pool, account, requests_per_second=50)
    await shop.sending(600, batch_size=1)
    grants = await run(shop, clock, 2 * SECOND_US)
    for _ in range(4):
        await clock.move(queue.HORIZON_US + 40_000)  # nobody asks: two slots are gone
        grants += await run(shop, clock, SECOND_US)
    assert largest_window(requests(grants), WINDOW_US) == 50
    assert largest_window(requests(grants), 5 * WINDOW_US) >= 0.99 * 5 * 50


@pytest.mark.parametrize(
    ("limits", "spread_us"),
    [
        ({"requests_per_second": 50}, WINDOW_US // 50),
        ({"requests_per_second": 10}, WINDOW_US // 10),
        ({"requests_per_second": 1_000, "messages_per_second": 40}, WINDOW_US // 20),
    ],
)
async def test_slots_are_spread_over_the_window_from_the_first_on(
    pool: database.Pool, account: int, shop: Shop, clock: Clock,
    limits: dict[str, int], spread_us: int,
) -> None:  # fmt: skip
    """Given in haste they leave a hole, in which a single message finds no room, in every window after it."""
    await change_account(pool, account, **limits)
    await shop.sending(400, batch_size=2)
    slots = [grant.slot_us for grant in await run(shop, clock, 6 * SECOND_US)]
    assert slots[-1] - slots[0] > 4 * SECOND_US
    gaps = [after - before for before, after in pairwise(slots)]
    assert max(gaps) <= 1.1 * spread_us
    assert len(slots) >= 0.99 * (slots[-1] - slots[0]) / spread_us


@pytest.mark.parametrize(
    ("limits", "spread_us"),
    [
        ({"requests_per_second": 25}, WINDOW_US // 25),
        ({"requests_per_second": 4}, WINDOW_US // 4),
        ({"messages_per_second": 40}, WINDOW_US // 20),
    ],
)
async def test_a_tenant_that_sends_single_messages_uses_its_limit_evenly_and_all_of_it(
    pool: database.Pool, account: int, shop: Shop, clock: Clock,
    limits: dict[str, int], spread_us: int,
) -> None:  # fmt: skip
    """Used up in haste it would leave a hole, in which a single message finds no room, in every window."""
    await change_account(pool, account, requests_per_second=200)
    await change_tenant(pool, shop.id, **limits)
    await one_message(shop, 306911110001)
    await shop.sending(400, batch_size=2)
    slots = [grant.slot_us for grant in await run(shop, clock, 6 * SECOND_US)]
    assert slots[-1] - slots[0] > 4 * SECOND_US
    gaps = [after - before for before, after in pairwise(slots)]
    assert max(gaps) <= spread_us + WINDOW_US // 10
    assert len(slots) >= 0.95 * (slots[-1] - slots[0]) / spread_us


async def test_a_tenant_whose_turn_comes_between_its_even_times_uses_its_limit_all_the_same(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    """The account's slots are 34 ms apart, the tenant's even times 51 ms, and somebody else takes what it leaves."""
    await change_account(pool, account, requests_per_second=30)
    await change_tenant(pool, shop.id, requests_per_second=20, weight=3)
    other = await open_shop(pool, account, shop.replica_id)
    await one_message(shop, 306911110001)
    await shop.sending(300, batch_size=1)
    await other.sending(300, batch_size=1)
    grants = await run(shop, clock, 6 * SECOND_US)
    own = [grant for grant in grants if grant.tenant_id == shop.id]
    assert use(requests(own), 20) >= 0.95
    assert use(requests(grants), 30) >= 0.95
    assert largest_window(requests(own), WINDOW_US) <= 20


async def test_a_batch_that_missed_its_slot_takes_another_one_and_counts_once(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await change_tenant(pool, shop.id, requests_per_second=1)
    await shop.sending(20, batch_size=1)
    (grant,) = (await ask(shop)).grants
    assert (await queue.intent(pool, grant, shop.replica_id)).verdict == "post"
    await clock.move(60_000)
    moved = await queue.retake_slot(pool, grant, lead_us=5_000)
    assert moved is not None
    assert clock.now_us + 5_000 <= moved.slot_us <= clock.now_us + 2 * queue.HORIZON_US
    assert await pool.fetchval("select to_us(slot_at) from attempt") == moved.slot_us
    (other,) = await run(shop, clock, 1_400_000)
    assert other.slot_us == moved.slot_us + WINDOW_US
    assert await queue.retake_slot(pool, moved, lead_us=5_000) is None, "no room soon"


async def test_who_missed_a_slot_walks_past_no_batch_that_was_sent_before(
    pool: database.Pool, shop: Shop
) -> None:
    """While a snapshot is held, every batch that was in flight since is still in the index of those that are."""
    reads = "select sum(pg_stat_get_xact_tuples_returned(indexrelid))::int from pg_index where indrelid = 'batch'::regclass"
    async with pool.acquire() as holder, holder.transaction(isolation="repeatable_read"):
        await holder.fetchval("select count(*) from batch")
        await shop.sending(150, batch_size=1)
        await shop.send_all(ACCEPTED)
        await pool.execute("analyze batch")  # the planner knows that hardly any is in flight
        await shop.sending(1)
        ((grant, _),) = await shop.post()
        async with pool.acquire() as db, db.transaction():
            before = await db.fetchval(reads)
            assert await queue.retake_slot(db, grant, lead_us=0) is not None
            assert await db.fetchval(reads) - before < 15


@pytest.mark.parametrize(
    "why", ["paused_reason = 'X'", "blocked_until = from_us(clock_us() + 1000000)"]
)
async def test_no_slot_is_retaken_on_an_account_that_stopped(
    pool: database.Pool, shop: Shop, clock: Clock, why: str
) -> None:
    await shop.sending(10)
    (grant, _), _ = await shop.post(2)
    await pool.execute(f"update traffic_account set {why}")
    assert await queue.retake_slot(pool, grant, lead_us=0) is None
    assert await queue.withdraw(pool, grant, "test")
    counted = "select cum[array_length(cum, 1)] - base from rate where scope = 1"
    assert await pool.fetchval(counted) == 1, "what is given back was given back before"


async def test_what_arrived_late_is_counted_from_when_it_had_arrived(
    pool: database.Pool, shop: Shop, clock: Clock
) -> None:
    await change_tenant(pool, shop.id, requests_per_second=1)
    await shop.sending(20, batch_size=1)
    (late,) = (await ask(shop)).grants
    await clock.move(900_000)
    arrived_us = late.slot_us + 200_000
    assert await queue.arrived_late(pool, shop.account_id, late, arrived_us) == arrived_us
    (later, *_) = await run(shop, clock, SECOND_US)
    assert later.slot_us == arrived_us + WINDOW_US


async def test_what_nobody_knows_to_have_arrived_is_counted_as_if_it_left_now(
    pool: database.Pool, shop: Shop, clock: Clock
) -> None:
    await change_tenant(pool, shop.id, requests_per_second=1)
    await shop.sending(20, batch_size=1)
    (grant,) = (await ask(shop)).grants
    place = Place(pool, queue.DatabaseClock(), shop.account_id, grant)
    for _ in range(3):
        await clock.move(400_000)
        place.keep()
        counted = await place.counted()
        assert counted.slot_us == clock.now_us
    (later, *_) = await run(shop, clock, 2 * SECOND_US)
    assert later.slot_us == counted.slot_us + WINDOW_US


async def test_a_request_that_was_answered_later_than_all_others_stays_counted(
    pool: database.Pool, account: int, shop: Shop, provider: Simulator
) -> None:
    await change_account(pool, account, requests_per_second=20)
    await shop.sending(45, batch_size=1)
    async with sending(pool, shop.replica_id, provider.url) as at_work:
        await provider.requests_reached(30)
        before = at_work.sender.counts["late"]
        provider.switches.latency_seconds = 0.3
        await provider.requests_reached(32)
        provider.switches.latency_seconds = 0.0
        await at_work.until_done()
        assert at_work.sender.counts["late"] > before
    assert provider.ledger.worst_second("main") <= 20


@pytest.mark.alone
async def test_a_request_that_left_late_is_counted_from_then_before_its_answer_comes(
    pool: database.Pool, account: int, shop: Shop, provider: Simulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The process stands still between gate and write, and the answer comes when its slot's second is over."""
    await change_account(pool, account, requests_per_second=20)
    provider.switches.latency_seconds = 0.95
    await shop.sending(60, batch_size=1)
    passed, stood_still = 0, asyncio.Event()
    slot_us = 0

    def stand_still(name: str) -> None:
        nonlocal passed, slot_us
        passed += name == "gate.passed"
        if name == "gate.passed" and passed == 30:
            slot_us = time.time_ns() // 1000
            time.sleep(0.15)  # the whole process
            stood_still.set()

    monkeypatch.setattr(faults, "point", stand_still)
    async with sending(pool, shop.replica_id, provider.url) as at_work:
        async with asyncio.timeout(10):
            await stood_still.wait()
        await leaves_its_slot(pool, slot_us)
        await at_work.until_done()
    assert provider.ledger.worst_second("main") <= 20


@pytest.mark.parametrize(
    ("arrived_us", "counted_us"),
    [(queue.GUARD_US - 2_000, 0), (queue.GUARD_US + 70_000, queue.GUARD_US + 70_000)],
    ids=["in time", "late"],
)
async def test_what_left_late_is_counted_by_when_it_arrived(
    pool: database.Pool, shop: Shop, clock: Clock, arrived_us: int, counted_us: int
) -> None:
    """At its slot again where it arrived in time: a process that is a little late each time would use less and less."""
    await change_tenant(pool, shop.id, requests_per_second=1)
    await shop.sending(20, batch_size=1)
    (grant,) = (await ask(shop)).grants
    ours, at = queue.DatabaseClock(), 1000.0
    ours.observe(at, at, grant.slot_us)
    place = Place(pool, ours, shop.account_id, grant)
    await clock.move(grant.slot_us + queue.LATE_US + 1_000 - clock.now_us)
    place.keep()
    assert (await place.counted()).slot_us == clock.now_us
    assert await place.count_late(at + arrived_us / SECOND_US) == bool(counted_us)
    (later, *_) = await run(shop, clock, 2 * SECOND_US)
    assert abs(later.slot_us - (grant.slot_us + counted_us + WINDOW_US)) <= 1  # rounded


async def leaves_its_slot(pool: database.Pool, slot_us: int) -> None:
    """Returns once no request of the account counts at that time; TimeoutError where an answer would tell it too late."""
    newest = "select ts, cum, base from rate where scope = 1 order by version desc limit 1"
    async with asyncio.timeout(0.6):
        while True:
            log = await pool.fetchrow(newest)
            assert log is not None
            before = [log["base"], *log["cum"]]
            counted = [
                at for at, less, n in zip(log["ts"], before, log["cum"], strict=False) if n > less
            ]
            if all(abs(at - slot_us) >= 20_000 for at in counted):
                return
            await asyncio.sleep(0.01)


@pytest.mark.alone
async def test_a_look_up_that_left_late_is_counted_from_then_before_its_answer_comes(
    pool: database.Pool, account: int, provider: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider.switches.latency_seconds = 0.95
    stood_still, slot_us = asyncio.Event(), 0

    def stand_still(question: mitto._Question) -> None:
        nonlocal slot_us
        pass_gate(question)
        slot_us = time.time_ns() // 1000
        time.sleep(0.15)  # the whole process
        stood_still.set()

    pass_gate = mitto._Question.pass_gate
    monkeypatch.setattr(mitto._Question, "pass_gate", stand_still)
    async with mitto.Client(provider.url, 5) as client:
        credentials = mitto.Account(account, "main", "key", "refused")
        asked = asyncio.create_task(
            Questions(pool, client, None).ask(credentials, "01", mitto.clock() + 5)
        )
        async with asyncio.timeout(5):
            await stood_still.wait()
        await leaves_its_slot(pool, slot_us)
        assert not asked.done()
        assert (await asked).status == 404


# ------------------------------------------------------------------------------- messages and segments


@pytest.mark.parametrize("sizes", [[400], [300], [334], [500, 137, 400, 289, 100]])
async def test_batches_of_any_size_use_a_limit_in_messages(
    pool: database.Pool, account: int, shop: Shop, clock: Clock, sizes: list[int]
) -> None:
    await change_account(pool, account, messages_per_second=1_000)
    for _ in range(9_000 // sum(sizes)):
        for size in sizes:
            await shop.sending(size, batch_size=size)
    grants = await run(shop, clock, 8 * SECOND_US)
    assert largest_window(costs(grants), WINDOW_US) <= 1_000
    assert use(costs(grants), 1_000) >= 0.935, "0.97 is what the guard leaves"
    assert len(grants) <= 15 * 8, "not in crumbs"


async def test_a_limit_in_messages_that_was_lowered_cuts_what_is_queued(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await change_account(pool, account, messages_per_second=1_000)
    await shop.sending(3_000, batch_size=100)
    await run(shop, clock, SECOND_US)
    await change_account(pool, account, messages_per_second=30)
    changed_at = clock.now_us + queue.HORIZON_US
    later = [one for one in costs(await run(shop, clock, 4 * SECOND_US)) if one[0] > changed_at]
    assert largest_window(later, WINDOW_US) <= 30
    assert sum(cost for _, cost in later) >= 60


async def segments_of(pool: database.Pool, grants: list[Grant]) -> list[int]:
    """What the messages of each batch are worth, counted message by message."""
    rows = await pool.fetch(
        "select b.id, sum(m.segments) as worth from batch b join message m on m.campaign_id = b.campaign_id"
        " and m.id between b.first_id and b.last_id group by b.id"
    )
    worth = {row["id"]: row["worth"] for row in rows}
    return [worth[grant.batch_id] for grant in grants]


@pytest.mark.parametrize("table", ["traffic_account", "tenant"])
async def test_a_limit_in_segments_counts_segments(
    pool: database.Pool, shop: Shop, clock: Clock, table: str
) -> None:
    await pool.execute(f"update {table} set messages_per_second = 100")
    await change_account(pool, shop.account_id, limit_unit="segments")
    for segments in (1, 10, 3, 7):
        await shop.begin(60, batch_size=50, held=600)
        await shop.expand(60, segments=segments)
    grants = await run(shop, clock, 8 * SECOND_US)
    assert [grant.cost for grant in grants] == await segments_of(pool, grants)
    assert largest_window(costs(grants), WINDOW_US) <= 100
    assert use(costs(grants), 100) >= 0.9, "a text of ten does not fit into the last nine"


async def test_exactly_what_was_taken_is_given_back_although_numbers_opted_out_meanwhile(
    pool: database.Pool, shop: Shop, clock: Clock
) -> None:
    await change_account(pool, shop.account_id, limit_unit="segments", messages_per_second=100)
    await shop.begin(10, held=100)
    await shop.expand(10, segments=10)
    first, second = await run(shop, clock, 1_800_000)  # a new limiter is closed at first
    assert (first.cost, second.cost) == (50, 50)
    counted = "select cum[array_length(cum, 1)] - base from rate where scope = 2"
    assert await pool.fetchval(counted) == 100
    phone = await pool.fetchval("select min(phone) from message")
    await pool.execute(
        "insert into opt_out (tenant_id, phone, source) values ($1, $2, 'stop')", shop.id, phone
    )
    assert len((await queue.intent(pool, first, shop.replica_id)).ids) == 4
    assert await queue.withdraw(pool, first, "test")
    assert await pool.fetchval(counted) == 50


async def test_a_limit_in_segments_below_the_longest_text_is_refused(api: Api) -> None:
    account = {"name": "Main", "trafficAccountId": "x", "limitUnit": "segments"}
    accounts, tenants = "/api/admin/traffic-accounts", "/api/admin/tenants"
    refused = await api.admin.post(accounts, account | {"messagesPerSecond": 9})
    assert (refused.status, refused.body["code"]) == (400, "VALIDATION_ERROR")
    assert [one["field"] for one in refused.body["details"]] == ["messagesPerSecond"]
    made = await api.admin.post(accounts, account | {"messagesPerSecond": 10})
    assert (made.status, made.body["limitUnit"]) == (201, "segments")
    where = f"{accounts}/{made.body['id']}"
    assert (await api.admin.patch(where, {"messagesPerSecond": 9})).status == 400
    tenant = {"name": "Shop", "accountId": made.body["id"]}
    assert (await api.admin.post(tenants, tenant | {"messagesPerSecond": 9})).status == 400
    assert (await api.admin.patch(where, {"limitUnit": "messages"})).status == 200
    small = await api.admin.post(tenants, tenant | {"messagesPerSecond": 9})
    assert small.status == 201
    refused = await api.admin.patch(where, {"limitUnit": "segments"})
    assert refused.status == 400, "its tenant would never send"
    changed = await api.admin.patch(f"{tenants}/{small.body['id']}", {"messagesPerSecond": 10})
    assert changed.status == 200
    assert (await api.admin.patch(where, {"limitUnit": "segments"})).status == 200
    assert (
        await api.admin.patch(f"{tenants}/{small.body['id']}", {"messagesPerSecond": 9})
    ).status == 400


# ------------------------------------------------------------------------------------ learned ceiling


async def ceiling(pool: database.Pool) -> int | None:
    value = await pool.fetchval("select ceiling_now(a) from traffic_account a")
    return None if value is None else int(value)


async def test_refusals_of_requests_that_were_on_their_way_together_lower_the_ceiling_once(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    """Slots reach as far as a horizon beyond the first answer; whose answer comes first does not matter."""
    await change_account(pool, account, requests_per_second=100)
    now = clock.now_us
    told = [
        await queue.throttle_account(pool, account, 0.25, now + late)
        for late in (-20_000, -900_000, 0, 60_000, queue.HORIZON_US)
    ]
    assert told == [True, False, False, False, False]
    assert await ceiling(pool) == 80
    await clock.move(300_000)
    assert await queue.throttle_account(pool, account, 0.25, clock.now_us - 20_000)
    assert await ceiling(pool) == 64, "of 80 and what it had climbed"


async def test_a_ceiling_binds_and_climbs_back_until_it_is_gone(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await change_account(pool, account, requests_per_second=100)
    await shop.sending(1_500, batch_size=1)
    before = await run(shop, clock, 2 * SECOND_US)
    await queue.throttle_account(pool, account, 0.5, before[-1].slot_us)
    throttled_at = clock.now_us
    assert await ceiling(pool) == 80
    after = await run(shop, clock, 2 * SECOND_US)
    assert after[0].slot_us >= throttled_at + 500_000
    assert 75 <= largest_window(requests(after), SECOND_US) <= 86
    await clock.move(2 * SECOND_US)
    assert await ceiling(pool) == 92
    await clock.move(4 * SECOND_US)
    assert await ceiling(pool) is None
    again = await run(shop, clock, 2 * SECOND_US)
    assert largest_window(requests(again), WINDOW_US) == 100


async def test_a_ceiling_never_falls_below_one_request_a_second(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await change_account(pool, account, requests_per_second=2)
    for _ in range(5):
        await clock.move(300_000)
        await queue.throttle_account(pool, account, 0.25, clock.now_us)
    assert await ceiling(pool) == 1


@pytest.mark.parametrize("step_us", [3600 * SECOND_US, -3600 * SECOND_US])
async def test_a_clock_that_stepped_keeps_nobody_blocked_or_throttled(
    pool: database.Pool, account: int, shop: Shop, clock: Clock, step_us: int
) -> None:
    await change_account(pool, account, requests_per_second=100)
    await shop.sending(100, batch_size=1)
    await run(shop, clock, 100_000)
    await queue.throttle_account(pool, account, 5, clock.now_us)
    await clock.move(step_us)
    assert await ceiling(pool) is None
    assert len(await run(shop, clock, 4 * SECOND_US)) >= 50


async def test_resuming_an_account_forgets_its_ceiling(api: Api) -> None:
    account_id = await api.new_account()
    await queue.throttle_account(api.ctx.pool, account_id, 60, 2**60)
    where = f"/api/admin/traffic-accounts/{account_id}"
    shown = (await api.admin.get(where)).body
    assert shown["ceiling"] == 80
    assert shown["blockedUntil"] is not None
    resumed = (await api.admin.patch(where, {"paused": False})).body
    assert (resumed["ceiling"], resumed["blockedUntil"]) == (None, None)


async def test_a_ceiling_that_mitto_moves_is_found_with_few_refusals_and_nothing_is_lost(
    pool: database.Pool, account: int, shop: Shop, provider: Simulator, dsn: str
) -> None:
    """Two replicas; Mitto takes 40 a second, then any number."""
    await change_account(pool, account, requests_per_second=100)
    provider.switches.max_requests_per_second = 40
    campaign_id = await shop.sending(500, batch_size=1)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await replica(stack, dsn, provider)
        await provider.accepted_reached(200)
        refused = provider.ledger.answers().get("429", 0)
        assert await ceiling(pool) is not None
        provider.switches.max_requests_per_second = None
        await provider.accepted_reached(400)
        refused_later = provider.ledger.answers().get("429", 0) - refused
    assert 1 <= refused <= 0.15 * 200
    assert refused_later <= 8, "those that were on their way"
    totals = (await check_the_account(shop, campaign_id)).totals
    assert (totals.pending, totals.queued) == (
        provider.ledger.accepted_count,
        500 - provider.ledger.accepted_count,
    )
    assert await pool.fetchval("select max(tries) from batch") == 0


# ------------------------------------------------------------------------------------------ priority


async def test_of_ten_grants_one_is_a_campaign_s_however_many_single_messages_wait(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await change_account(pool, account, requests_per_second=50)
    await shop.sending(100, batch_size=1)
    for i in range(150):
        await one_message(shop, 306911110000 + i)
    grants = await run(shop, clock, 2 * SECOND_US)
    campaigns = [i for i, grant in enumerate(grants) if grant.campaign_id]
    assert len(grants) >= 90
    gaps = [after - before for before, after in pairwise(campaigns)]
    assert campaigns[0] <= 9
    assert max(gaps) <= 10
    singles = len(grants) - len(campaigns)
    assert singles >= 0.5 * len(grants), (
        "beyond a second of its share a tenant's singles wait in line"
    )


async def test_a_campaign_s_batch_makes_way_for_a_single_message(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await change_account(pool, account, requests_per_second=100)
    await shop.sending(200, batch_size=1)
    await run(shop, clock, SECOND_US // 10)
    given = await leased(pool, clock.now_us)
    assert len(given) >= 9, "the whole horizon is given"
    paid = await pool.fetchrow("select t.v, s.v as of_tenant from lane_turn t, share s")
    await one_message(shop, 306911110001)
    (single,) = (await ask(shop, priority_only=True)).grants
    assert (single.campaign_id, single.slot_us) == (0, given[0])
    assert await leased(pool, clock.now_us) == given
    # Whoever has it learns so before anything leaves, and its lane is not to pay twice.
    lost = await pool.fetchrow(
        "select id, epoch from batch where campaign_id > 0 and state = 0 and epoch > 0"
    )
    assert lost is not None
    grant = Grant(lost["id"], lost["epoch"], 1, shop.id, 5, given[0])
    assert (await queue.intent(pool, grant, shop.replica_id)).verdict == "lost"
    after = await pool.fetchrow(
        "select t.v, s.v as of_tenant from lane l join lane_turn t on t.lane_id = l.id, share s where l.class = 1"
    )
    assert paid is not None
    assert after is not None
    assert after["v"] == pytest.approx(paid["v"] - 0.01)
    assert after["of_tenant"] == pytest.approx(paid["of_tenant"]), "the single message paid instead"


@pytest.mark.parametrize("limit", ["requests_per_second", "messages_per_second"])
async def test_what_was_leased_and_missed_its_slot_is_taken_back_with_all_it_took(
    pool: database.Pool, account: int, shop: Shop, clock: Clock, limit: str
) -> None:
    """A killed replica's slots are used by the others while they are in the window."""
    campaign_id = await shop.sending(40, batch_size=1)
    await change_account(pool, account, **{limit: 20})
    logs = 1
    if limit == "messages_per_second":
        logs = 2
        assert (await ask(shop)).grants == (), "a limiter that has no state yet is closed"
    await clock.move(2 * SECOND_US)
    killed, late = (await ask(shop, 2)).grants
    of_campaign = "select t.v, s.v as of_tenant from lane l join lane_turn t on t.lane_id = l.id, share s where l.class = 1"
    paid = await pool.fetchrow(of_campaign)
    assert paid is not None
    assert (await queue.intent(pool, late, shop.replica_id)).verdict == "post"
    await clock.move(killed.slot_us + 99_000 - clock.now_us)
    assert await queue.take_back_missed(pool, account) == 0, "it may still write its intent"
    assert await used(pool) == [2] * logs
    await clock.move(1_001)
    assert await queue.take_back_missed(pool, account) == 1
    assert await used(pool) == [1] * logs
    assert (await queue.intent(pool, killed, shop.replica_id)).verdict == "lost"
    after = await pool.fetchrow(of_campaign)
    assert after is not None
    assert [after["v"], after["of_tenant"]] == pytest.approx([paid["v"] - 0.05] * 2), "paid once"
    assert [row["state"] for row in await pool.fetch(
        "select state from batch where id = any ($1) order by id", [killed.batch_id, late.batch_id]
    )] == [0, 3]  # fmt: skip
    (again,) = (await ask(shop)).grants
    assert again.batch_id == killed.batch_id, "it is the next in its place"
    await clock.move(again.slot_us + SECOND_US - clock.now_us)
    assert await queue.take_back_missed(pool, account) == 1, "what may be on its way stays"
    await check_the_account(shop, campaign_id)


async def test_what_is_being_written_or_cancelled_is_not_taken_back(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await shop.sending(1)
    (writing,) = (await ask(shop)).grants
    campaign_id = await shop.sending(1)
    assert len((await ask(shop)).grants) == 1
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("select cancel_campaign($1)", campaign_id)
    await clock.move(200_000)
    async with pool.acquire() as connection, connection.transaction():
        assert (await queue.intent(connection, writing, shop.replica_id)).verdict == "post"
        assert await queue.take_back_missed(pool, account) == 0


async def used(pool: database.Pool) -> list[int]:
    """What stands in the logs of the accounts: of requests, then of messages."""
    rows = await pool.fetch(
        "select distinct on (scope) scope, cum[array_length(cum, 1)] - base as n from rate"
        " where scope in (1, 2) order by scope, version desc"
    )
    return [row["n"] for row in rows]


async def leased(pool: database.Pool, from_us: int = 0) -> list[int]:
    """Slots of what is leased, in order."""
    rows = await pool.fetch(
        "select slot from batch where state = 2 and slot >= $1 order by slot", from_us
    )
    return [row["slot"] for row in rows]


async def test_a_campaign_s_batch_makes_way_for_a_single_message_that_missed_its_slot(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await change_account(pool, account, requests_per_second=100)
    await one_message(shop, 306911110001)
    (single,) = (await ask(shop)).grants
    assert (await queue.intent(pool, single, shop.replica_id)).verdict == "post"
    await shop.sending(200, batch_size=1)
    await run(shop, clock, WINDOW_US + SECOND_US // 10)
    given = await leased(pool, clock.now_us + 20_000)
    moved = await queue.retake_slot(pool, single, lead_us=20_000)
    assert moved is not None
    assert moved.slot_us == given[0]
    assert await leased(pool, clock.now_us + 20_000) == given[1:]


async def test_what_missed_its_slot_leaves_as_soon_as_it_can_and_not_behind_all_that_was_given(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    """Else every stall would leave a hole in the second, and so in each that follows."""
    await change_account(pool, account, requests_per_second=50)
    await shop.sending(200, batch_size=1)
    await run(shop, clock, WINDOW_US + SECOND_US // 10)
    given = await leased(pool, clock.now_us)
    assert len(given) >= 5, "the whole horizon is given"
    row = await pool.fetchrow(
        "select id, epoch, slot from batch where state = 2 and slot >= $1 order by slot", given[0]
    )
    assert row is not None
    grant = Grant(row["id"], row["epoch"], 1, shop.id, 1, row["slot"])
    assert (await queue.intent(pool, grant, shop.replica_id)).verdict == "post"
    await clock.move(grant.slot_us + 40_000 - clock.now_us)
    moved = await queue.retake_slot(pool, grant, lead_us=5_000)
    assert moved is not None
    assert moved.slot_us == clock.now_us + 5_000
    slots = await pool.fetch("select slot from batch where slot > $1", clock.now_us - SECOND_US)
    assert largest_window([(one["slot"], 1) for one in slots], WINDOW_US) == 50


async def fits(pool: database.Pool, slot_us: int, cost: int, limit: int) -> bool:
    """Whether so much more does at this slot; then it stands in the log."""
    look = "select rate_fits_at(rate_hold(1, 7), $1, $2, $3)"
    if not await pool.fetchval(look, slot_us, cost, limit):
        return False
    await pool.execute("select rate_keep(rate_take(rate_hold(1, 7), $1, $2))", slot_us, cost)
    return True


@pytest.mark.parametrize("seed", range(10))
async def test_what_fits_at_a_slot_is_what_every_window_that_it_is_in_has_room_for(
    pool: database.Pool, seed: int
) -> None:
    dice = random.Random(seed)
    limit = dice.choice([3, 10, 40])
    given: list[tuple[int, int]] = []
    await pool.execute("insert into rate (scope, id, closed_until) values (1, 7, 0)")
    for _ in range(60):
        one = 10_000 * dice.randint(1_000, 1_200), 1  # those of 8 ms share an entry
        if one in given:
            continue
        has_room = largest_window([*given, one], WINDOW_US) <= limit
        assert await fits(pool, *one, limit) == has_room
        given += [one] if has_room else []


async def test_what_is_said_to_fit_fits_wherever_the_others_are(pool: database.Pool) -> None:
    """Also where several share an entry of the log."""
    for seed in range(40):
        dice = random.Random(seed)
        limit, given = dice.choice([5, 30, 120]), list[tuple[int, int]]()
        await pool.execute("delete from rate")
        await pool.execute("insert into rate (scope, id, closed_until) values (1, 7, 0)")
        spread = dice.choice([40_000, 1_200_000])
        for _ in range(40):
            base = dice.choice([10 * SECOND_US, 10 * SECOND_US + WINDOW_US - spread // 2])
            one = base + dice.randint(0, spread), dice.randint(1, 3)
            if await fits(pool, *one, limit):
                given.append(one)
                assert largest_window(given, WINDOW_US) <= limit, seed


@pytest.mark.parametrize(
    "why", ["its intent is written", "cancelled", "blocked", "its tenant's limit"]
)
async def test_no_batch_makes_way_where_that_would_let_through_more(
    pool: database.Pool, account: int, shop: Shop, clock: Clock, why: str
) -> None:
    await change_account(pool, account, requests_per_second=20)
    campaign_id = await shop.sending(50)
    grants = await run(shop, clock, SECOND_US // 10)
    other = await open_shop(pool, account, shop.replica_id)
    match why:
        case "its intent is written":
            for grant in grants:
                await queue.intent(pool, grant, shop.replica_id)
        case "cancelled":
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute("select cancel_campaign($1)", campaign_id)
        case "blocked":
            await pool.execute(
                "update traffic_account set blocked_until = from_us(clock_us() + 95000)"
            )
        case _:
            await change_tenant(pool, other.id, requests_per_second=1)
            await clock.move(300_000)
            await one_message(other, 306911110002)
            assert len((await ask(other, priority_only=True)).grants) == 1
            await run(shop, clock, SECOND_US // 10)
    before = await leased(pool)
    await one_message(other, 306911110001)
    claimed = (await ask(other, priority_only=True)).grants
    assert set(before) <= set(await leased(pool))
    assert all(grant.slot_us > max(before) for grant in claimed)


async def test_single_messages_without_end_leave_campaigns_their_tenth(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await change_account(pool, account, requests_per_second=50)
    await shop.sending(300, batch_size=1)
    left: Counter[bool] = Counter()
    waiting: list[Grant] = []
    for tick in range(150):
        for i in range(2):
            await one_message(shop, 306911130000 + 2 * tick + i)
        waiting += (await ask(shop, 8)).grants
        await clock.move(20_000)
        for grant in [one for one in waiting if one.slot_us <= clock.now_us]:
            intent = await queue.intent(pool, grant, shop.replica_id)
            if intent.verdict == "post":
                await shop.answer(grant, intent, ACCEPTED)
                left[grant.campaign_id > 0] += 1
            waiting.remove(grant)
    assert left.total() >= 0.9 * 50 * 3
    assert left[True] >= 0.09 * left.total()
    assert left[False] >= 0.5 * left.total()


@pytest.mark.parametrize("seed", range(6))
async def test_no_window_holds_more_than_the_limits_whoever_makes_way(
    pool: database.Pool, account: int, shop: Shop, clock: Clock, seed: int
) -> None:
    dice = random.Random(seed)
    rate, messages, own = dice.choice([(20, None, 9), (40, 100, 25), (40, None, 40)])
    other = await open_shop(pool, account, shop.replica_id)
    await change_account(pool, account, requests_per_second=rate, messages_per_second=messages)
    await change_tenant(pool, other.id, requests_per_second=own)
    await shop.sending(1_500, batch_size=dice.choice([1, 4]))
    await other.sending(300, batch_size=2)
    slots: dict[tuple[int, int], Grant] = {}
    intents: dict[tuple[int, int], queue.Intent] = {}
    gone: set[Grant] = set()
    made_way = 0
    for number in range(200):
        if dice.random() < 0.2:
            await one_message(dice.choice([shop, other]), 306911120000 + number)
        claim = await ask(shop, dice.randint(1, 4), priority_only=dice.random() < 0.3)
        slots |= {(grant.batch_id, grant.epoch): grant for grant in claim.grants}
        rows = await pool.fetch("select id, epoch from batch where state in (2, 3)")
        kept = {(row["id"], row["epoch"]) for row in rows}
        kept |= {(grant.batch_id, grant.epoch) for grant in gone}
        made_way += len(slots) - len(slots.keys() & kept)
        slots = {key: grant for key, grant in slots.items() if key in kept}
        assert largest_window(requests(list(slots.values())), WINDOW_US) <= rate
        if messages:
            assert largest_window(costs(list(slots.values())), WINDOW_US) <= messages
        theirs = [grant for grant in slots.values() if grant.tenant_id == other.id]
        assert largest_window(requests(theirs), WINDOW_US) <= own
        await clock.move(dice.choice([0, 5_000, 30_000, 50_000]))
        for key, grant in list(slots.items()):
            if grant.slot_us > clock.now_us or grant in gone:
                continue
            intent = await queue.intent(pool, grant, shop.replica_id)
            if intent.verdict == "lost":  # written before its slot was missed
                intent = intents[key]
            intents[key] = intent
            if dice.random() < (0.9 if grant.campaign_id else 0.8):
                await shop.answer(grant, intent, ACCEPTED)
                gone.add(grant)
            elif moved := await queue.retake_slot(pool, grant, lead_us=0):
                slots[key] = moved
            else:
                assert await queue.withdraw(pool, grant, "no slot is near")
                del slots[key]
    assert made_way > 2, made_way


async def test_one_of_several_places_is_kept_for_single_messages_whatever_the_number_of_replicas(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await change_account(pool, account, max_in_flight=3)
    await shop.sending(50)
    other = Shop(pool, shop.id, account, await queue.register(pool, "other", "0"))
    assert len((await ask(shop, 8)).grants) == 2
    claim = await ask(other, 8)
    assert (claim.grants, claim.waits_for) == ((), "in_flight")
    assert claim.back_us is not None
    assert claim.back_us <= clock.now_us + 100_000, "another replica's place is free unheard of"
    await one_message(shop, 306911110001)
    await one_message(shop, 306911110002)
    (single,) = (await ask(other, 8)).grants
    assert single.campaign_id == 0
    assert (await ask(shop, 8)).grants == ()


async def test_a_sender_keeps_one_of_several_places() -> None:
    row = queue.AccountRow(1, "main", "key", "refused", 1_000, 3, None, {})
    account = Pace(row, config.load({}))
    grants = [Grant(i, 1, 1, 1, 5, 0) for i in range(3)]
    assert account.room() == (2, False)
    for grant in grants[:2]:
        account.start(grant, asyncio.sleep(0))
    assert account.room() == (1, True)
    account.start(grants[2], asyncio.sleep(0))
    assert account.room() == (0, True)
    await asyncio.gather(*account.sending)


async def test_look_ups_take_a_fifth_of_the_limit_beside_batches_and_all_of_it_alone(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await change_account(pool, account, requests_per_second=20)
    await shop.sending(70, batch_size=1)
    looks: dict[str, list[int]] = {"beside": [], "alone": []}
    slots: list[int] = []
    until = clock.now_us + 10 * SECOND_US
    while clock.now_us < until:
        claim = await ask(shop)
        slots += [grant.slot_us for grant in claim.grants]
        if claim.waits_for == "work":
            break
        slot, *_ = await queue.grant_request(pool, account, None)
        if slot is not None:
            looks["beside"].append(slot)
        await clock.move(10_000)
    between = [slot for slot in looks["beside"] if slots[0] <= slot <= slots[-1]]
    assert 3.5 <= len(between) / ((slots[-1] - slots[0]) / SECOND_US) <= 4.1
    began = clock.now_us
    while clock.now_us < began + 4 * SECOND_US:
        slot, *_ = await queue.grant_request(pool, account, None)
        if slot is not None:
            looks["alone"].append(slot)
        await clock.move(10_000)
    assert len(looks["alone"]) >= 0.95 * 4 * 20
    everything = [(slot, 1) for slot in slots + looks["beside"] + looks["alone"]]
    assert largest_window(everything, WINDOW_US) <= 20


# ---------------------------------------------------------------------------- arrival


def answered(took: float, arrived: float | None = None) -> mitto.Result:
    """A request that left at second 1000, arrived and was answered so many seconds later."""
    by = None if arrived is None else 1000 + arrived
    return mitto.Result(Outcome.ACCEPTED, left_at=1000.0, arrived_by=by, answered_at=1000 + took)


def seen_by(*took: float) -> Pace:
    account = Pace(
        queue.AccountRow(1, "main", "key", "refused", 100, None, None, {}), config.load({})
    )
    for seconds in took:
        account.arrived_by(answered(seconds))
    return account


def test_where_answers_take_the_same_a_late_one_tells_of_a_late_arrival() -> None:
    steady = seen_by(*[0.2, 0.201, 0.205] * 20)
    assert steady.arrived_by(answered(0.3, arrived=0.001)) == pytest.approx(1000.1)
    assert steady.arrived_by(answered(0.204, arrived=0.001)) == pytest.approx(1000.004)
    assert steady.arrived_by(answered(0.2, arrived=0.05)) == pytest.approx(1000.05)


def test_where_answers_vary_only_the_kernel_tells() -> None:
    varied = seen_by(*[0.2, 0.5, 0.8] * 20)
    assert varied.arrived_by(answered(0.8, arrived=0.001)) == pytest.approx(1000.001)
    assert varied.arrived_by(answered(0.8)) == pytest.approx(1000.6), "nobody tells: the answer"


async def test_a_request_has_arrived_when_it_left_however_long_the_answer_takes(
    provider: Simulator,
) -> None:
    provider.switches = Switches(dlr=False, latency_seconds=0.15)
    item = mitto.Item(1, 306900000001, "Hi", "Shop")
    async with mitto.Client(provider.url, 5) as client:
        result = await client.send(mitto.Account(1, "main", "key", "refused"), [item], lambda: None)
    assert result.left_at is not None
    assert result.answered_at is not None
    assert result.arrived_by is not None, "Linux tells"
    assert result.left_at <= result.arrived_by < result.left_at + 0.1 < result.answered_at


async def test_a_request_that_nobody_takes_off_the_wire_has_not_arrived_until_somebody_does() -> (
    None
):
    """A listener whose process sleeps, with a buffer smaller than the request."""
    unseen = asyncio.Event()
    listening, body = socket.create_server(("127.0.0.1", 0)), b"x" * 20_000_000
    listening.setblocking(False)
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection(*listening.getsockname())
    watch = arrival.Watch(unseen.set)
    started = arrival.clock()
    watch.begin(writer.transport)  # type: ignore[arg-type]
    writer.write(body)
    watch.written()
    async with asyncio.timeout(5):
        for _ in range(2):  # it is told again and again
            await unseen.wait()
            unseen.clear()
    taken, _ = await loop.sock_accept(listening)
    left = len(body)
    while left:
        left -= len(await loop.sock_recv(taken, 1 << 20))
    await loop.sock_sendall(taken, b"ok")
    assert await reader.read(2) == b"ok"
    by = watch.end(arrival.clock())
    assert by is not None
    assert by >= started + sum(arrival.LOOK_SECONDS)
    for each in (taken, listening):
        each.close()
    writer.close()
    await writer.wait_closed()


# -------------------------------------------------------------------------- as the provider sees it


async def replica(stack: AsyncExitStack, dsn: str, provider: Simulator) -> Sending:
    own = await database.open_pool(dsn, 4)  # sixteen of them have 64 connections
    stack.push_async_callback(own.close)
    replica_id = await queue.register(own, "test", "0")
    return await stack.enter_async_context(sending(own, replica_id, provider.url))


def arrivals(provider: Simulator) -> list[tuple[int, int]]:
    return [(int(one.arrived_monotonic * SECOND_US), 1) for one in provider.ledger.requests]


def best_use(provider: Simulator, limit: int, seconds: int) -> float:
    """The share of the limit that was used in the best stretch: others may be at work on this machine."""
    return largest_window(arrivals(provider), seconds * SECOND_US) / seconds / limit


@pytest.mark.alone
@pytest.mark.parametrize(
    ("replicas", "limit", "latency", "jitter"),
    [(2, 100, 0.0, 0.0), (2, 100, 0.2, 0.0), (2, 50, 0.2, 0.6), (16, 50, 0.001, 0.0), (16, 50, 0.8, 0.0)],
)  # fmt: skip
async def test_replicas_use_a_limit_however_many_and_however_long_answers_take(
    pool: database.Pool, account: int, shop: Shop, provider: Simulator, dsn: str,
    replicas: int, limit: int, latency: float, jitter: float,
) -> None:  # fmt: skip
    provider.switches = Switches(dlr=False, latency_seconds=latency, latency_jitter_seconds=jitter)
    await change_account(pool, account, requests_per_second=limit)
    await shop.sending(45 * limit, batch_size=1)
    async with AsyncExitStack() as stack:
        for _ in range(replicas):
            await replica(stack, dsn, provider)
        async with asyncio.timeout(50):
            await provider.requests_reached(3 * limit)
            await provider.until(lambda: best_use(provider, limit, 3) >= 0.95)
    assert provider.ledger.worst_second("main") <= limit


@pytest.mark.alone
async def test_limiter_state_that_is_lost_in_mid_run_closes_the_account_and_then_it_goes_on(
    pool: database.Pool, account: int, shop: Shop, provider: Simulator
) -> None:
    await change_account(pool, account, requests_per_second=40)
    await shop.sending(200, batch_size=1)
    async with sending(pool, shop.replica_id, provider.url):
        await provider.requests_reached(30)
        await pool.execute("truncate rate")
        lost_at = time.monotonic()
        await provider.requests_reached(90)
    after = [one.arrived_monotonic - lost_at for one in provider.ledger.requests]
    assert [seconds for seconds in after if 0.25 < seconds < 1.2] == []
    assert max(after) > 1.2
    assert provider.ledger.worst_second("main") <= 40


@pytest.mark.parametrize("hours", [1, -1])
async def test_the_clock_of_postgres_steps_by_an_hour_in_mid_run_and_the_limit_holds(
    pool: database.Pool, account: int, shop: Shop, provider: Simulator, hours: int
) -> None:
    await change_account(pool, account, requests_per_second=40)
    campaign_id = await shop.sending(150, batch_size=1)
    async with sending(pool, shop.replica_id, provider.url) as at_work:
        await provider.requests_reached(35)
        await pool.execute(
            "create or replace function clock_us() returns bigint language sql volatile as $$"
            f" select (extract(epoch from clock_timestamp() + interval '{hours} hours') * 1000000)::bigint $$"
        )
        await at_work.until_done()
    assert provider.ledger.worst_second("main") <= 40
    assert (await check_the_account(shop, campaign_id)).totals.pending == 150


async def test_a_limit_that_is_lowered_binds_within_a_second_on_every_replica(
    pool: database.Pool, api: Api, account: int, shop: Shop, provider: Simulator, dsn: str
) -> None:
    await change_account(pool, account, requests_per_second=100)
    await shop.sending(400, batch_size=1)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await replica(stack, dsn, provider)
        await provider.requests_reached(150)
        where = f"/api/admin/traffic-accounts/{account}"
        assert (await api.admin.patch(where, {"requestsPerSecond": 20})).status == 200
        changed_at = time.monotonic()
        await provider.until(
            lambda: provider.ledger.requests[-1].arrived_monotonic > changed_at + 3.5
        )
    later = [one for one in arrivals(provider) if one[0] > (changed_at + 1) * SECOND_US]
    assert 10 <= largest_window(later, SECOND_US) <= 20
