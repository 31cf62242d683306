"""The queue room: who gets what, how fast, and what may become of it; each promise with an attempt to break it."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shop import ACCEPTED, REFUSED, UNKNOWN, Shop, check_the_account, until_somebody_waits
from support import (
    GUARD_US,
    SECOND_US,
    Clock,
    assert_sound,
    broken,
    largest_window,
    new_account,
    open_shop,
    take_the_clock,
)

from smsd import campaigns, credits, database, queue
from smsd.mitto import ItemResult
from smsd.model import BatchState, MessageState
from smsd.queue import HORIZON_US, Claim, Grant

WINDOW_US = SECOND_US + GUARD_US


@pytest.fixture
async def account(pool: database.Pool) -> int:
    return await new_account(pool)


@pytest.fixture
async def shop(pool: database.Pool, account: int) -> AsyncIterator[Shop]:
    """A shop; whatever the test did with it, the audit finds nothing afterwards."""
    yield await open_shop(pool, account, await queue.register(pool, "test", "0"))
    await assert_sound(pool)


async def ask(shop: Shop, want: int = 1, lead_us: int = 0, **options: bool | int) -> Claim:
    all_limit = options.get("all_limit")
    return await queue.claim(
        shop.pool, shop.account_id, shop.replica_id, want, lead_us=lead_us,
        all_limit=None if all_limit is None else int(all_limit),
        priority_only=bool(options.get("priority_only", False)),
    )  # fmt: skip


async def limit(pool: database.Pool, table: str, one: int, **limits: int | None) -> None:
    for column, value in limits.items():
        await pool.execute(f"update {table} set {column} = $2 where id = $1", one, value)


async def batches(pool: database.Pool) -> dict[BatchState, int]:
    rows = await pool.fetch("select state, count(*) as n from batch group by state")
    return {BatchState(row["state"]): row["n"] for row in rows}


async def lane_of(pool: database.Pool, campaign_id: int) -> int:
    return int(
        await pool.fetchval("select lane_id from expansion where campaign_id = $1", campaign_id)
    )


# --------------------------------------------------------------------------------- whose turn it is


async def test_sixteen_who_claim_at_once_get_every_batch_exactly_once(
    shop: Shop, dsn: str
) -> None:
    await shop.sending(400, batch_size=1)
    grants: list[Grant] = []

    async def work(number: int) -> None:
        connection = await database.connect(dsn)
        replica_id = await queue.register(connection, f"replica {number}", "0")
        while True:
            claim = await queue.claim(
                connection, shop.account_id, replica_id, 1 + number % 3, lead_us=0
            )
            grants.extend(claim.grants)
            if not claim.grants and claim.back_us is None:
                break
        await connection.close()

    await asyncio.gather(*(work(number) for number in range(16)))
    assert len(grants) == 400
    assert len({grant.batch_id for grant in grants}) == 400
    assert {grant.epoch for grant in grants} == {1}
    assert await batches(shop.pool) == {BatchState.LEASED: 400}


async def test_a_batch_that_somebody_holds_is_stepped_over_without_waiting(shop: Shop) -> None:
    await shop.sending(10, batch_size=5)
    async with shop.pool.acquire() as other, other.transaction():
        held = await other.fetchval("select id from batch order by id limit 1 for update")
        async with asyncio.timeout(2):
            (grant,) = await shop.claim()
        assert grant.batch_id != held
    await queue.wake_lane(shop.pool, await lane_of(shop.pool, grant.campaign_id), 0)
    assert [one.batch_id for one in await shop.claim(2)] == [held]


@pytest.mark.parametrize("weights", [(1, 1), (1, 2, 4)])
async def test_tenants_share_an_account_by_weight(
    pool: database.Pool, account: int, shop: Shop, weights: tuple[int, ...]
) -> None:
    await limit(pool, "tenant", shop.id, weight=weights[0])
    others = [
        await open_shop(pool, account, shop.replica_id, weight=float(weight))
        for weight in weights[1:]
    ]
    for one in (shop, *others):
        await one.sending(400, batch_size=1)
    turns = Counter([grant.tenant_id for _ in range(35) for grant in await shop.claim(10)])
    share = 350 / sum(weights)
    for one, weight in zip((shop, *others), weights, strict=True):
        assert abs(turns[one.id] - weight * share) <= 1


async def test_campaigns_of_a_tenant_take_turns_however_many_it_has(
    pool: database.Pool, account: int, shop: Shop
) -> None:
    other = await open_shop(pool, account, shop.replica_id)
    many = [await shop.sending(100, batch_size=1) for _ in range(3)]
    one = await other.sending(200, batch_size=1)
    turns = Counter([grant.campaign_id for _ in range(20) for grant in await shop.claim(6)])
    assert abs(turns[one] - 60) <= 1
    assert all(abs(turns[campaign_id] - 20) <= 1 for campaign_id in many)


async def test_a_tenant_that_was_idle_does_not_make_up_for_it(
    pool: database.Pool, account: int, shop: Shop
) -> None:
    other = await open_shop(pool, account, shop.replica_id)
    await shop.sending(300, batch_size=1)
    for _ in range(20):
        await shop.claim(10)
    await other.sending(100, batch_size=1)
    turns = Counter([grant.tenant_id for _ in range(8) for grant in await shop.claim(10)])
    assert abs(turns[shop.id] - turns[other.id]) <= 2


async def test_large_batches_are_paid_for_where_messages_are_limited(
    pool: database.Pool, account: int, shop: Shop
) -> None:
    """Requests alone would give both the same number of batches, and one of them ten times the messages."""
    await limit(pool, "traffic_account", account, messages_per_second=100_000)
    await limit(pool, "traffic_account", account, requests_per_second=1_000_000)
    other = await open_shop(pool, account, shop.replica_id)
    await shop.sending(1_000, batch_size=10)
    await other.sending(1_000, batch_size=1)
    messages: Counter[int] = Counter()
    for _ in range(22):
        for grant in await claim_when_open(shop):
            messages[grant.tenant_id] += grant.n
    assert abs(messages[shop.id] - messages[other.id]) <= 10


async def claim_when_open(shop: Shop, want: int = 5) -> list[Grant]:
    """Claims, waiting as long as the limiter says."""
    while True:
        claim = await ask(shop, want)
        if claim.grants:
            return list(claim.grants)
        assert claim.back_us is not None, claim
        await asyncio.sleep((claim.back_us - claim.now_us) / SECOND_US)


async def single(shop: Shop) -> int:
    """One message of the priority class; its id."""
    async with shop.pool.acquire() as connection, connection.transaction():
        message_id = await queue.add_message(
            connection, shop.id, shop.account_id, shop.phones, "Hi", "Shop", 1
        )
    assert message_id is not None
    return message_id


async def test_a_single_message_goes_before_campaigns(
    pool: database.Pool, account: int, shop: Shop
) -> None:
    other = await open_shop(pool, account, shop.replica_id)
    await other.sending(100, batch_size=1)
    await shop.sending(100, batch_size=1)
    await shop.claim(20)
    await single(shop)
    assert [grant.campaign_id for grant in await shop.claim()] == [0]


async def test_single_messages_are_paid_for_and_lose_their_rank_a_second_ahead_of_the_others(
    pool: database.Pool, account: int, shop: Shop
) -> None:
    await limit(pool, "traffic_account", account, requests_per_second=20_000)
    other = await open_shop(pool, account, shop.replica_id)
    await other.sending(10, batch_size=1)
    await shop.claim()  # the account's V is known, and both are at it
    for _ in range(3):
        await single(shop)
    assert [grant.campaign_id for grant in await shop.claim(2)] == [0, 0]
    await pool.execute("update share set v = v + 1 where tenant_id = $1", shop.id)
    assert [grant.tenant_id for grant in await shop.claim(1)] == [other.id]


async def test_places_kept_for_single_messages_take_no_campaign(shop: Shop) -> None:
    await shop.sending(5)
    claim = await ask(shop, priority_only=True)
    assert (claim.grants, claim.waits_for, claim.back_us) == ((), "work", None)
    await single(shop)
    assert [one.campaign_id for one in (await ask(shop, 2, priority_only=True)).grants] == [0]


async def test_a_message_beyond_the_credits_is_not_queued(pool: database.Pool, shop: Shop) -> None:
    poor = await open_shop(pool, shop.account_id, shop.replica_id, granted=1)
    await single(poor)
    async with pool.acquire() as connection, connection.transaction():
        assert (
            await queue.add_message(connection, poor.id, poor.account_id, 306900000001, "x", "S", 1)
            is None
        )
    assert await pool.fetchval("select count(*) from message") == 1


@pytest.mark.parametrize("column", ["paused", "closed", "idle"])
async def test_a_lane_that_is_stopped_gives_nothing(shop: Shop, column: str) -> None:
    campaign_id = await shop.sending(5)
    await shop.pool.execute(f"update lane set {column} = true where campaign_id = $1", campaign_id)
    claim = await ask(shop)
    assert (claim.grants, claim.waits_for) == ((), "work")
    await shop.pool.execute(f"update lane set {column} = false where campaign_id = $1", campaign_id)
    assert len(await shop.claim()) == 1


async def test_a_paused_account_gives_nothing_and_says_so(shop: Shop) -> None:
    await shop.sending(5)
    assert await queue.pause_account(shop.pool, shop.account_id, "UNAUTHORIZED", "no")
    assert not await queue.pause_account(shop.pool, shop.account_id, "MISDIRECTED", "later")
    claim = await ask(shop)
    assert (claim.grants, claim.waits_for, claim.back_us) == ((), "account_paused", None)
    assert (
        await shop.pool.fetchval("select paused_reason from traffic_account") == "UNAUTHORIZED"
    )


async def test_a_throttled_account_gives_nothing_until_then_on_every_replica(shop: Shop) -> None:
    await shop.sending(5)
    await queue.block_account(shop.pool, shop.account_id, 60)
    await queue.block_account(shop.pool, shop.account_id, 5)  # a shorter wait does not shorten it
    claim = await ask(shop)
    assert (claim.grants, claim.waits_for) == ((), "account_throttled")
    assert claim.back_us is not None
    assert 59 * SECOND_US < claim.back_us - claim.now_us <= 60 * SECOND_US


async def test_a_replica_that_was_declared_dead_gets_nothing(shop: Shop) -> None:
    await shop.sending(5)
    await queue.leave(shop.pool, shop.replica_id, "test")
    claim = await ask(shop)
    assert (claim.grants, claim.waits_for) == ((), "replica_gone")


# ------------------------------------------------------------------------------------ waking a lane


async def test_a_wake_that_commits_while_a_claim_finds_nothing_is_not_lost(shop: Shop) -> None:
    campaign_id = await shop.begin(10)
    await shop.expand(5, last=False)
    lane = await lane_of(shop.pool, campaign_id)
    (first,) = await shop.claim()
    async with shop.pool.acquire() as waker, waker.transaction():
        await queue.wake_lane(waker, lane, 0)
        claiming = asyncio.create_task(ask(shop))
        await until_somebody_waits(shop.pool)
    claim = await claiming
    assert claim.grants == ()
    assert claim.back_us is not None, "nobody would tell the claimer, so it must look again itself"
    assert not await shop.pool.fetchval("select idle from lane where id = $1", lane)
    assert first.campaign_id == campaign_id


@pytest.mark.parametrize("asleep", ["idle = true", f"not_before = clock_us() + {SECOND_US}"])
async def test_a_wake_is_heard_of_whatever_kind_of_sleep_it_ends(
    shop: Shop, dsn: str, asleep: str
) -> None:
    campaign_id = await shop.sending(5)
    lane = await lane_of(shop.pool, campaign_id)
    heard: asyncio.Queue[str] = asyncio.Queue()
    listener = await database.connect(dsn)
    await listener.add_listener("smsd_lane", lambda *news: heard.put_nowait(str(news[-1])))
    await shop.pool.execute(f"update lane set {asleep} where id = $1", lane)
    await queue.wake_lane(shop.pool, lane, 0)
    assert int(await asyncio.wait_for(heard.get(), 5)) == shop.account_id
    await listener.close()


async def test_what_commits_late_with_lower_ids_is_not_overlooked(shop: Shop, dsn: str) -> None:
    campaign_id = await shop.begin(20)
    lane = await lane_of(shop.pool, campaign_id)
    late = await database.connect(dsn)
    transaction = late.transaction()
    await transaction.start()
    first = await late.fetchval("select take_message_ids(5)")
    await add_batch(late, shop, campaign_id, lane, first)
    await shop.expand(5, last=False)
    assert len(await shop.claim(2)) == 1  # the cursor stands behind the ids that are still to come
    await transaction.commit()
    await queue.wake_lane(shop.pool, lane, first)
    assert [one.n for one in await shop.claim(2)] == [5]
    await late.close()
    await shop.expand(10)


async def add_batch(
    db: database.Connection, shop: Shop, campaign_id: int, lane: int, first: int
) -> None:
    """A batch of five messages, paid for."""
    await db.execute(
        "insert into message (campaign_id, id, phone, text, segments)"
        " select $1, $2 + i, 307000000000 + $2 + i, 'Hi', 1 from generate_series(0, 4) i",
        campaign_id, first,
    )  # fmt: skip
    await db.execute(
        "insert into batch (campaign_id, lane_id, tenant_id, account_id, first_id, last_id, n, segments, sender)"
        " values ($1, $2, $3, $4, $5, $6, 5, 5, 'Shop')",
        campaign_id, lane, shop.id, shop.account_id, first, first + 4,
    )  # fmt: skip
    assert await credits.hold(db, shop.id, 5, campaign_id)


async def test_a_lane_that_sleeps_beside_ready_batches_is_found_by_the_slow_look(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(10)
    await shop.pool.execute("update lane set idle = true, cursor = 1000000")
    assert await shop.claim() == []
    assert await queue.wake_stranded(shop.pool) == 1
    assert await queue.wake_stranded(shop.pool) == 0
    assert len(await shop.claim(2)) == 2
    await shop.act(campaign_id, campaigns.pause)


@pytest.mark.parametrize("column", ["paused", "closed"])
async def test_the_slow_look_leaves_alone_what_was_stopped(shop: Shop, column: str) -> None:
    await shop.sending(10)
    await shop.pool.execute(f"update lane set idle = true, {column} = true")
    assert await queue.wake_stranded(shop.pool) == 0


async def test_a_batch_that_waits_comes_when_it_is_due_and_before_ready_ones(shop: Shop) -> None:
    await shop.sending(15)
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(
        shop.pool, grant.batch_id, intent.attempt, "again", "retry", delay_seconds=0.4, most=6
    )
    (second,) = await shop.claim()
    assert second.batch_id != grant.batch_id
    await shop.pool.execute("update batch set not_before = clock_timestamp() where state = 1")
    assert [one.batch_id for one in await shop.claim()] == [grant.batch_id]


async def test_a_claim_says_when_the_next_waiting_batch_is_due_and_not_earlier(shop: Shop) -> None:
    await shop.sending(5)
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(
        shop.pool, grant.batch_id, intent.attempt, "again", "retry", delay_seconds=0.3, most=6
    )
    due = await shop.pool.fetchval("select to_us(not_before) from batch")
    claims = 0
    while not (claim := await ask(shop)).grants:
        assert claim.waits_for == "retry"
        assert claim.back_us is not None
        claims += 1
        await asyncio.sleep((claim.back_us - claim.now_us) / SECOND_US)
    assert claim.grants[0].batch_id == grant.batch_id
    assert due - 1_000 <= claim.now_us < due + 200_000
    assert claims <= 3, "it comes back at the time, not again and again before it"


# ------------------------------------------------------------------------------------------ limits


@pytest.fixture
async def clock(pool: database.Pool, shop: Shop) -> Clock:
    return await take_the_clock(pool)


async def grants_of(shop: Shop, clock: Clock, us: int, step_us: int = 20_000) -> list[Grant]:
    """All that is granted in so many microseconds to somebody who asks every `step_us`."""
    grants: list[Grant] = []
    for _ in range(us // step_us):
        while claimed := (await ask(shop, 8)).grants:
            grants += claimed
        await clock.move(step_us)
    return grants


@pytest.mark.parametrize("seed", range(6))
async def test_no_window_holds_more_than_the_limits_whatever_is_given_back_or_comes_late(
    pool: database.Pool, account: int, shop: Shop, clock: Clock, seed: int
) -> None:
    """Checked against a plain list: when each grant counts, which is when it came late if it did."""
    dice = random.Random(seed)
    requests, messages, own = dice.choice([(5, None, 3), (20, 60, 9), (12, 12, 12), (40, 100, 7)])
    other = await open_shop(pool, account, shop.replica_id)
    limits = {(None, 0): requests, (shop.id, 0): own, (shop.id, 1): 20}
    if messages is not None:
        limits[None, 1] = messages
    await limit(
        pool, "traffic_account", account, requests_per_second=requests, messages_per_second=messages
    )
    await limit(pool, "tenant", shop.id, requests_per_second=own, messages_per_second=20)
    await shop.sending(1_500, batch_size=dice.choice([1, 3, 10]))
    await other.sending(1_500, batch_size=dice.choice([1, 4]))
    counted: dict[Grant, int] = {}
    turns: Counter[int] = Counter()
    for _ in range(140):
        claim = await ask(shop, dice.randint(1, 8), lead_us=dice.choice([0, 10_000]))
        for grant in claim.grants:
            counted[grant] = grant.slot_us
            turns[grant.tenant_id] += 1
            inside = [g for g, at in counted.items() if grant.slot_us - WINDOW_US < at <= grant.slot_us]
            for (tenant_id, messages_too), most in limits.items():
                ours = [g for g in inside if tenant_id in (None, g.tenant_id)]
                if grant in ours:
                    assert sum(g.n if messages_too else 1 for g in ours) <= most
        open_ones = [g for g, at in counted.items() if at == g.slot_us > clock.now_us - 2_500_000]
        if open_ones and dice.random() < 0.3:
            grant = dice.choice(open_ones)
            if dice.random() < 0.5:
                assert await queue.withdraw(pool, grant, "test")
                del counted[grant]
            elif grant.slot_us < clock.now_us:
                await queue.arrived_late(pool, account, grant)
                counted[grant] = clock.now_us
        await clock.move(dice.choice([0, 5_000, 30_000, 100_000, 300_000]))
    assert min(turns[shop.id], turns[other.id]) > 0


async def test_sixteen_claimers_on_the_real_clock_keep_the_limit_and_use_it(
    pool: database.Pool, account: int, shop: Shop, dsn: str
) -> None:
    await limit(pool, "traffic_account", account, requests_per_second=40)
    await shop.sending(500, batch_size=1)
    slots: list[int] = []
    began_us = await pool.fetchval("select clock_us()")

    async def work() -> None:
        connection = await database.connect(dsn)
        now_us = began_us
        while now_us < began_us + 2 * SECOND_US:
            claim = await queue.claim(connection, account, shop.replica_id, 1, lead_us=5_000)
            now_us = claim.now_us
            for grant in claim.grants:
                assert now_us + 5_000 <= grant.slot_us <= now_us + HORIZON_US
                slots.append(grant.slot_us)
            if claim.back_us is not None:
                await asyncio.sleep((claim.back_us - now_us) / SECOND_US)
        await connection.close()

    await asyncio.gather(*(work() for _ in range(16)))
    assert largest_window([(slot, 1) for slot in slots], WINDOW_US) <= 40
    assert len(set(slots)) == len(slots)
    assert len(slots) >= 0.9 * 2 * 40


@pytest.mark.parametrize(
    ("table", "column"),
    [("traffic_account", "messages_per_second"), ("tenant", "messages_per_second"),
     ("traffic_account", "largest_request")],
)  # fmt: skip
async def test_a_batch_larger_than_a_limit_is_cut_in_place(
    shop: Shop, clock: Clock, table: str, column: str
) -> None:
    campaign_id = await shop.begin(10, batch_size=10)
    await shop.expand(10, segments=3)
    await shop.pool.execute(f"update {table} set {column} = 4")
    await shop.pool.execute(
        "insert into rate (scope, id, closed_until) select s, $1, 0 from unnest('{2,4}'::int[]) s", shop.id
    )  # fmt: skip
    grants = await grants_of(shop, clock, 4 * SECOND_US, step_us=100_000)
    assert [grant.n for grant in grants] == [4, 4, 2]
    if column == "messages_per_second":
        assert largest_window([(one.slot_us, one.n) for one in grants], WINDOW_US) <= 4
    posted: list[int] = []
    for grant in grants:
        intent = await queue.intent(shop.pool, grant, shop.replica_id)
        posted += intent.ids
        await shop.answer(grant, intent, ACCEPTED)
    assert sorted(posted) == posted
    assert len(set(posted)) == 10
    assert (await check_the_account(shop, campaign_id)).totals.spent == 30


async def test_a_tenant_at_its_limit_is_stepped_over_and_the_account_s_slot_goes_to_the_next(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await limit(pool, "traffic_account", account, requests_per_second=20)
    other = await open_shop(pool, account, shop.replica_id)
    await limit(pool, "tenant", shop.id, requests_per_second=2)
    await shop.sending(200, batch_size=1)
    await other.sending(200, batch_size=1)
    grants = await grants_of(shop, clock, 5 * SECOND_US)
    own = [(grant.slot_us, 1) for grant in grants if grant.tenant_id == shop.id]
    assert largest_window(own, WINDOW_US) == 2
    assert len(own) >= 8
    assert len(grants) >= 0.95 * 5 * 20


async def test_who_waits_for_a_tenant_s_limit_asks_seldom(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await limit(pool, "tenant", shop.id, requests_per_second=5)
    await shop.sending(100, batch_size=1)
    granted = asked = 0
    until = clock.now_us + 4 * SECOND_US
    while clock.now_us < until:
        claim = await ask(shop, 8, lead_us=10_000)
        granted, asked = granted + len(claim.grants), asked + 1
        if not claim.grants:
            assert claim.back_us is not None
            await clock.move(claim.back_us - claim.now_us)
    assert granted == 20
    assert asked <= 5 * granted


async def test_a_limiter_whose_state_was_lost_is_closed_until_no_slot_is_out(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await limit(pool, "traffic_account", account, requests_per_second=10)
    await shop.sending(100, batch_size=1)
    before = await grants_of(shop, clock, SECOND_US)
    assert before
    for scope in (1, 3):  # of the account, of the tenant
        await pool.execute("delete from rate where scope = $1", scope)
        lost_at = clock.now_us
        claim = await ask(shop)
        assert claim.grants == ()
        assert claim.back_us is not None
        grants = await grants_of(shop, clock, 2 * SECOND_US)
        first = min(grant.slot_us for grant in grants)
        assert lost_at + WINDOW_US + HORIZON_US <= first <= lost_at + 1_300_000


@pytest.mark.parametrize("back_us", [2 * SECOND_US, 3600 * SECOND_US])
async def test_a_clock_that_stepped_back_closes_the_limiter_as_long(
    pool: database.Pool, account: int, shop: Shop, clock: Clock, back_us: int
) -> None:
    await limit(pool, "traffic_account", account, requests_per_second=10)
    await limit(pool, "tenant", shop.id, requests_per_second=6)
    await shop.sending(100, batch_size=1)
    await grants_of(shop, clock, SECOND_US)
    stepped_at = clock.now_us - back_us
    await clock.move(-back_us)
    grants = await grants_of(shop, clock, 3 * SECOND_US)
    assert min(grant.slot_us for grant in grants) >= stepped_at + WINDOW_US
    assert len(grants) >= 6


async def test_a_small_step_back_of_the_clock_gives_no_slot_before_the_last(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await limit(pool, "traffic_account", account, requests_per_second=10)
    await shop.sending(100, batch_size=1)
    before = await grants_of(shop, clock, SECOND_US)
    await clock.move(-500_000)
    grants = before + await grants_of(shop, clock, 3 * SECOND_US)
    slots = [grant.slot_us for grant in grants]
    assert slots == sorted(slots)
    assert largest_window([(slot, 1) for slot in slots], WINDOW_US) <= 10


@pytest.mark.parametrize("table", ["traffic_account", "tenant"])
async def test_a_limit_that_was_changed_binds_at_the_next_claim(
    pool: database.Pool, shop: Shop, clock: Clock, table: str
) -> None:
    await pool.execute(f"update {table} set requests_per_second = 40")
    await shop.sending(300, batch_size=1)
    assert len(await grants_of(shop, clock, 2 * SECOND_US)) >= 70
    await pool.execute(f"update {table} set requests_per_second = 4")
    changed_at = clock.now_us + HORIZON_US
    later = [one.slot_us for one in await grants_of(shop, clock, 4 * SECOND_US)]
    assert largest_window([(at, 1) for at in later if at > changed_at], WINDOW_US) <= 4
    await pool.execute(f"update {table} set requests_per_second = 40")
    assert len(await grants_of(shop, clock, 2 * SECOND_US)) >= 60


async def test_the_limit_over_all_accounts_holds_across_them(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    other = await open_shop(pool, await new_account(pool, "second"), shop.replica_id)
    await shop.sending(100, batch_size=1)
    await other.sending(100, batch_size=1)
    slots: Counter[int] = Counter()
    tenants: Counter[int] = Counter()
    for _ in range(250):
        for one in (shop, other):
            for grant in (await ask(one, all_limit=10)).grants:
                slots[grant.slot_us] += 1
                tenants[grant.tenant_id] += 1
        await clock.move(20_000)
    assert largest_window(list(slots.items()), WINDOW_US) == 10
    assert min(tenants.values()) >= 10
    assert slots.total() >= 30


async def test_a_get_takes_of_the_same_limit_as_batches(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await limit(pool, "traffic_account", account, requests_per_second=10)
    await shop.sending(100, batch_size=1)
    slots: list[int] = []
    for _ in range(150):
        slots += [grant.slot_us for grant in (await ask(shop)).grants]
        slot, now_us, back_us = await queue.grant_request(pool, account, None)
        assert (slot is None) == (back_us is not None)
        if slot is not None:
            assert now_us <= slot <= now_us + HORIZON_US
            slots.append(slot)
        await clock.move(20_000)
    assert largest_window([(slot, 1) for slot in slots], WINDOW_US) <= 10
    assert len(slots) >= 27


async def test_a_grant_given_back_can_be_given_to_another_at_once(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await limit(pool, "tenant", shop.id, requests_per_second=3)
    await shop.sending(100, batch_size=1)
    first, *_ = (await ask(shop, 8)).grants
    assert (await ask(shop)).grants == ()
    assert await queue.withdraw(pool, first, "test")
    assert len((await ask(shop, 8)).grants) == 1
    assert not await queue.withdraw(pool, first, "test"), "nothing is given back twice"
    assert (await ask(shop)).grants == ()


async def test_a_grant_given_back_after_it_left_the_window_frees_no_other(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await limit(pool, "tenant", shop.id, requests_per_second=3)
    await shop.sending(100, batch_size=1)
    old, *_ = (await ask(shop, 8)).grants
    await clock.move(2 * SECOND_US)
    assert len((await ask(shop, 8)).grants) == 3
    assert await queue.withdraw(pool, old, "test")
    assert (await ask(shop)).grants == ()


async def test_what_may_have_arrived_late_is_counted_from_then_on(
    pool: database.Pool, account: int, shop: Shop, clock: Clock
) -> None:
    await limit(pool, "tenant", shop.id, requests_per_second=3)
    await shop.sending(100, batch_size=1)
    late, *_ = (await ask(shop, 8)).grants
    await clock.move(900_000)
    await queue.arrived_late(pool, account, late)
    late_at = clock.now_us
    await clock.move(SECOND_US - 900_000 + GUARD_US)
    later = (await ask(shop, 8)).grants
    counted = [(late_at, 1), *((grant.slot_us, 1) for grant in later)]
    assert largest_window(counted, WINDOW_US) <= 3


async def test_a_slot_is_never_earlier_than_the_lead(shop: Shop, clock: Clock) -> None:
    await shop.sending(100, batch_size=1)
    claim = await ask(shop, 8, lead_us=60_000)
    assert len(claim.grants) == 8
    assert all(claim.now_us + 60_000 <= grant.slot_us for grant in claim.grants)
