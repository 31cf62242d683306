"""The queue room: who gets what, how fast, and what may become of it; each promise with an attempt to break it."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator

import asyncpg
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

from smsd import campaigns, credits, database, mitto, queue
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


async def test_sixteen_who_claim_at_once_get_every_batch_exactly_once(shop: Shop, dsn: str) -> None:
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
    await pool.execute("update share set v = v + 0.5 where tenant_id = $1", shop.id)
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


async def test_a_message_that_has_no_lane_is_not_queued_and_holds_nothing(
    pool: database.Pool, shop: Shop
) -> None:
    elsewhere = await new_account(pool, "second")
    async with pool.acquire() as connection:
        assert (
            await queue.add_message(connection, shop.id, elsewhere, 306900000001, "x", "S", 1)
            is None
        )
    assert await pool.fetchval("select count(*) from message") == 0
    assert (await credits.balance(pool, shop.id)).reserved == 0


@pytest.mark.parametrize("column", ["paused", "closed", "idle"])
async def test_a_lane_that_is_stopped_gives_nothing(shop: Shop, column: str) -> None:
    campaign_id = await shop.sending(5)
    await shop.pool.execute(f"update lane set {column} = true where campaign_id = $1", campaign_id)
    claim = await ask(shop)
    assert (claim.grants, claim.waits_for) == ((), "work")
    await shop.pool.execute(f"update lane set {column} = false where campaign_id = $1", campaign_id)
    assert len(await shop.claim()) == 1


async def test_a_paused_account_gives_nothing_and_says_so(shop: Shop) -> None:
    await shop.sending(10)
    assert not await queue.pause_account(shop.pool, shop.account_id, "UNAUTHORIZED", "no", "old")
    assert len(await shop.claim()) == 1, "a key that has been replaced says nothing of the account"
    assert await queue.pause_account(shop.pool, shop.account_id, "UNAUTHORIZED", "no", "key")
    assert not await queue.pause_account(shop.pool, shop.account_id, "MISDIRECTED", "later", "key")
    claim = await ask(shop)
    assert (claim.grants, claim.waits_for, claim.back_us) == ((), "account_paused", None)
    assert await shop.pool.fetchval("select paused_reason from traffic_account") == "UNAUTHORIZED"


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


async def test_a_wake_that_commits_while_a_claim_grants_another_batch_is_not_lost(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(10)
    lane = await lane_of(shop.pool, campaign_id)
    (first,) = await shop.claim()
    await queue.wake_lane(shop.pool, lane, 1_000)
    await shop.pool.execute("update batch set state = 0, slot = null where id = $1", first.batch_id)
    async with shop.pool.acquire() as waker, waker.transaction():
        await queue.wake_lane(waker, lane, 0)
        claiming = asyncio.create_task(ask(shop))
        await until_somebody_waits(shop.pool)
    (second,) = (await claiming).grants
    assert second.batch_id != first.batch_id
    assert [grant.batch_id for grant in await shop.claim()] == [first.batch_id]


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
    assert await credits.hold(db, shop.id, 5, campaign_id, "test")


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
            inside = [
                g for g, at in counted.items() if grant.slot_us - WINDOW_US < at <= grant.slot_us
            ]
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


@pytest.mark.alone
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
            assert now_us <= slot <= now_us + 2 * HORIZON_US
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


# ------------------------------------------------------------------------------- intent and withdraw


async def opt_out(shop: Shop, *phones: int) -> None:
    await shop.pool.execute(
        "insert into opt_out (tenant_id, phone, source) select $1, unnest($2::bigint[]), 'stop'",
        shop.id, list(phones),
    )  # fmt: skip


async def test_an_intent_says_what_to_post_in_the_order_of_the_ids(shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    (grant,) = await shop.claim()
    intent = await queue.intent(shop.pool, grant, shop.replica_id)
    assert (intent.verdict, intent.attempt, intent.sender) == ("post", 1, "Shop")
    rows = await shop.pool.fetch(
        "select id, phone, text from message where campaign_id = $1 order by id", campaign_id
    )
    assert intent.ids == [row["id"] for row in rows]
    assert intent.phones == [row["phone"] for row in rows]
    assert intent.texts == [row["text"] for row in rows]
    attempt = await shop.pool.fetchrow("select replica_id, to_us(slot_at) as slot from attempt")
    assert attempt is not None
    assert (attempt["replica_id"], attempt["slot"]) == (shop.replica_id, grant.slot_us)
    assert await batches(shop.pool) == {BatchState.SENDING: 1}


async def test_only_the_lease_s_owner_writes_an_intent_and_only_once(shop: Shop) -> None:
    await shop.sending(5)
    (grant,) = await shop.claim()
    other = await queue.register(shop.pool, "other", "0")
    assert (await queue.intent(shop.pool, grant, other)).verdict == "lost"
    stale = grant._replace(epoch=grant.epoch - 1)
    assert (await queue.intent(shop.pool, stale, shop.replica_id)).verdict == "lost"
    assert (await queue.intent(shop.pool, grant, shop.replica_id)).verdict == "post"
    assert (await queue.intent(shop.pool, grant, shop.replica_id)).verdict == "lost"


async def test_an_intent_after_a_cancel_is_refused_and_the_hold_comes_back(shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    (grant,) = await shop.claim()
    await shop.act(campaign_id, campaigns.cancel)
    assert (await queue.intent(shop.pool, grant, shop.replica_id)).verdict == "cancelled"
    assert await batches(shop.pool) == {BatchState.CANCELLED: 1}
    assert (await credits.balance(shop.pool, shop.id)).reserved == 0


@pytest.mark.parametrize("who", ["campaign", "account"])
async def test_an_intent_after_a_pause_puts_the_batch_back(shop: Shop, who: str) -> None:
    campaign_id = await shop.sending(5)
    (grant,) = await shop.claim()
    if who == "campaign":
        await shop.act(campaign_id, campaigns.pause)
    else:
        await queue.pause_account(shop.pool, shop.account_id, "UNAUTHORIZED", "x", "key")
    assert (await queue.intent(shop.pool, grant, shop.replica_id)).verdict == "paused"
    assert await batches(shop.pool) == {BatchState.READY: 1}
    await shop.pool.execute("update lane set paused = false")
    await shop.pool.execute("update traffic_account set paused_reason = null")
    assert [one.batch_id for one in await shop.claim()] == [grant.batch_id]


async def test_an_intent_that_meets_an_uncommitted_cancel_waits_for_it_and_posts_nothing(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(5)
    (grant,) = await shop.claim()
    async with shop.pool.acquire() as other, other.transaction():
        await other.execute("select cancel_campaign($1)", campaign_id)
        intending = asyncio.create_task(queue.intent(shop.pool, grant, shop.replica_id))
        await until_somebody_waits(shop.pool)
    assert (await intending).verdict == "cancelled"


async def test_who_opted_out_meanwhile_is_left_out_and_not_paid_for(shop: Shop) -> None:
    campaign_id = await shop.begin(5)
    await shop.expand(5, segments=2)
    (grant,) = await shop.claim()
    phones = [
        row["phone"] for row in await shop.pool.fetch("select phone from message order by id")
    ]
    await opt_out(shop, phones[0], phones[3])
    intent = await queue.intent(shop.pool, grant, shop.replica_id)
    assert intent.phones == [phones[1], phones[2], phones[4]]
    assert (await credits.balance(shop.pool, shop.id)).reserved == 6
    progress = await check_the_account(shop, campaign_id)
    assert (progress.totals.skipped, progress.totals.processing) == (2, 3)
    await shop.answer(grant, intent, ACCEPTED)
    assert (await check_the_account(shop, campaign_id)).totals.spent == 6


async def test_a_batch_of_which_all_opted_out_is_not_posted_and_its_grant_comes_back(
    shop: Shop, clock: Clock
) -> None:
    await limit(shop.pool, "tenant", shop.id, requests_per_second=1)
    campaign_id = await shop.sending(10)
    (grant,) = (await ask(shop)).grants
    rows = await shop.pool.fetch("select phone from message order by id limit 5")
    await opt_out(shop, *(row["phone"] for row in rows))
    assert (await queue.intent(shop.pool, grant, shop.replica_id)).verdict == "empty"
    assert (await check_the_account(shop, campaign_id)).totals.skipped == 5
    assert len((await ask(shop)).grants) == 1, "the tenant's one grant a second was not used up"


async def test_a_single_message_goes_to_whoever_opted_out_of_campaigns(shop: Shop) -> None:
    await single(shop)
    (grant,) = await shop.claim()
    await opt_out(shop, shop.phones)
    assert (await queue.intent(shop.pool, grant, shop.replica_id)).verdict == "post"


async def test_what_is_withdrawn_goes_back_to_its_place_without_a_try(shop: Shop) -> None:
    await shop.sending(15)
    first, second = await shop.claim(2)
    assert (await queue.intent(shop.pool, second, shop.replica_id)).verdict == "post"
    assert await queue.withdraw(shop.pool, second, "late")
    assert await queue.withdraw(shop.pool, first, "late")
    assert await shop.pool.fetchval("select max(tries) from batch") == 0
    rows = await shop.pool.fetch("select batch_id, outcome, detail from attempt")
    assert [tuple(row) for row in rows] == [(second.batch_id, "withdrawn", "late")]
    again = await shop.claim(3)
    assert [one.batch_id for one in again][:2] == [first.batch_id, second.batch_id]
    intent = await queue.intent(shop.pool, again[1], shop.replica_id)
    assert (intent.verdict, intent.attempt) == ("post", 2)


async def test_a_withdraw_that_names_an_older_lease_changes_nothing(shop: Shop) -> None:
    await shop.sending(5)
    (first,) = await shop.claim()
    assert await queue.withdraw(shop.pool, first, "late")
    (second,) = await shop.claim()
    assert second.epoch == first.epoch + 1
    assert not await queue.withdraw(shop.pool, first, "late")
    assert (await queue.intent(shop.pool, second, shop.replica_id)).verdict == "post"
    assert not await queue.withdraw(shop.pool, first, "late")
    assert await batches(shop.pool) == {BatchState.SENDING: 1}


async def test_a_withdraw_after_the_answer_changes_nothing(shop: Shop) -> None:
    await shop.sending(5)
    ((grant, intent),) = await shop.post()
    await shop.answer(grant, intent, ACCEPTED)
    assert not await queue.withdraw(shop.pool, grant, "late")
    assert await batches(shop.pool) == {BatchState.ACCEPTED: 1}


async def test_what_was_reaped_as_unknown_is_still_withdrawn_by_who_knows_that_nothing_left(
    shop: Shop,
) -> None:
    """And its campaign, which had ended as far as anybody could tell, goes on."""
    campaign_id = await shop.sending(5)
    ((grant, _),) = await shop.post()
    await queue.leave(shop.pool, shop.replica_id, "test")
    assert await queue.reap(shop.pool) == (0, 1)
    assert await campaigns.finish(shop.pool) == [campaign_id]
    assert await queue.withdraw(shop.pool, grant, "late")
    assert await shop.status(campaign_id) == "sending"
    assert (await shop.progress(campaign_id)).campaign.finished_at is None
    shop.replica_id = await queue.register(shop.pool, "test", "0")
    await shop.send_all(ACCEPTED)
    assert await campaigns.finish(shop.pool) == [campaign_id]
    assert (await check_the_account(shop, campaign_id)).totals.pending == 5


async def test_what_is_withdrawn_after_a_cancel_is_cancelled(shop: Shop) -> None:
    campaign_id = await shop.sending(10)
    (leased,) = await shop.claim()
    ((sending, _),) = await shop.post()
    await shop.act(campaign_id, campaigns.cancel)
    assert await queue.withdraw(shop.pool, leased, "late")
    assert await queue.withdraw(shop.pool, sending, "late")
    assert await batches(shop.pool) == {BatchState.CANCELLED: 2}
    assert (await credits.balance(shop.pool, shop.id)).reserved == 0


async def test_what_is_withdrawn_between_retries_waits_no_longer_and_keeps_its_tries(
    shop: Shop,
) -> None:
    await shop.sending(5)
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(shop.pool, grant.batch_id, intent.attempt, "again", "retry", most=6)
    (again,) = await shop.claim()
    assert await queue.withdraw(shop.pool, again, "late")
    assert await batches(shop.pool) == {BatchState.WAITING: 1}
    assert await shop.pool.fetchval("select tries from batch") == 1
    assert [one.batch_id for one in await shop.claim()] == [grant.batch_id]


# -------------------------------------------------------------------------------- settle, item by item


def items(
    ids: list[int], *states: tuple[MessageState, str | None] | MessageState
) -> list[ItemResult]:
    """Results of these messages; the last one stands for the rest."""
    results = []
    for i, message_id in enumerate(ids):
        state = states[min(i, len(states) - 1)]
        if isinstance(state, tuple):
            results.append(ItemResult(message_id, state[0], state[1], None))
        else:
            provider_id = f"P{message_id}" if state == ACCEPTED else None
            results.append(ItemResult(message_id, state, provider_id, "why"))
    return results


async def test_each_item_gets_the_state_that_its_answer_says(shop: Shop) -> None:
    campaign_id = await shop.begin(5)
    await shop.expand(5, segments=2)
    ((grant, intent),) = await shop.post()
    answer = items(intent.ids, ACCEPTED, REFUSED, UNKNOWN, ACCEPTED)
    assert await queue.settle_items(
        shop.pool, grant.batch_id, 1, queue.Answer.of(answer, "bulk-1", 200)
    )
    rows = await shop.pool.fetch("select * from message order by id")
    assert [row["state"] for row in rows] == [10, 40, 5, 10, 10]
    assert [row["provider_id"] for row in rows] == [one.provider_id for one in answer]
    assert [row["reason"] for row in rows][:3] == [None, "refused_by_provider", "unreadable_answer"]
    assert all(row["settled_at"] for row in rows)
    assert [row["finished_at"] is not None for row in rows] == [False, True, False, False, False]
    progress = await check_the_account(shop, campaign_id)
    sums = progress.totals
    assert (sums.pending, sums.refused, sums.unknown, sums.spent) == (3, 1, 1, 6)
    balance = await credits.balance(shop.pool, shop.id)
    assert (balance.balance, balance.reserved) == (10_000 - 6, 2)
    kinds = await shop.pool.fetch(
        "select kind, amount from ledger where batch_id = $1 order by id", grant.batch_id
    )
    assert [tuple(row) for row in kinds] == [("spend", 6), ("release", 2)]
    attempt = await shop.pool.fetchrow("select outcome, status from attempt")
    assert attempt is not None
    assert tuple(attempt) == ("accepted", 200)
    assert (
        await shop.pool.fetchval("select bulk_id from batch where id = $1", grant.batch_id)
        == "bulk-1"
    )


@pytest.mark.parametrize("analysed", [False, True])
async def test_an_answer_finds_its_messages_by_one_walk_along_its_batch(
    shop: Shop, analysed: bool
) -> None:
    """However little the planner knows of the table."""
    await shop.sending(9_000, batch_size=500)
    if analysed:
        await shop.pool.execute("analyze message")
    scans = (
        "select sum(pg_stat_get_xact_numscans(indexrelid))::int from pg_index"
        " where indrelid = 'message'::regclass"
    )
    ((grant, intent),) = await shop.post()
    async with shop.pool.acquire() as db, db.transaction():
        before = await db.fetchval(scans)
        answer = queue.Answer.of(items(intent.ids, ACCEPTED), None, 200)
        assert await queue.settle_items(db, grant.batch_id, intent.attempt, answer)
        assert await db.fetchval(scans) - before == 1


async def shown(db: database.Executor, campaign_id: int) -> list[tuple[object, ...]]:
    rows = await db.fetch(
        "select id, status, own_state, provider_id, settled_at, finished_at, reason from message_shown"
        " where campaign_id = $1 order by id",
        campaign_id,
    )
    return [tuple(row) for row in rows]


async def test_a_batch_that_was_accepted_whole_speaks_for_its_messages_until_their_receipts(
    shop: Shop,
) -> None:
    campaign_id = await shop.begin(5)
    await shop.expand(5, segments=2)
    ((grant, intent),) = await shop.post()
    rows = "select id, xmin::text from message order by id"
    before = await shop.pool.fetch(rows)
    shop.provider_ids = 0
    await shop.answer(grant, intent, ACCEPTED)
    assert await shop.pool.fetch(rows) == before, "no message was written"
    batch = await shop.pool.fetchrow("select * from batch")
    assert batch is not None
    assert (batch["state"], batch["n"], batch["segments"]) == (BatchState.ACCEPTED, 0, 0)
    assert (batch["owner"], batch["bulk_id"]) == (None, "bulk")
    assert await shown(shop.pool, campaign_id) == [
        (one, "accepted", ACCEPTED, f"M{place}", batch["done_at"], None, None)
        for place, one in enumerate(intent.ids, 1)
    ]
    entry = await shop.pool.fetchrow("select kind, amount from ledger order by id desc limit 1")
    assert entry is not None
    assert tuple(entry) == ("spend", 10)
    assert (await check_the_account(shop, campaign_id)).totals.spent == 10
    await shop.receive(M2=30, M3=20, M4=11)
    after = await shown(shop.pool, campaign_id)
    assert [one[1] for one in after] == ["accepted", "delivered", "failed", "accepted", "accepted"]
    assert [one[2] for one in after] == [10, 30, 20, 11, 10]
    assert [one[3] for one in after] == ["M1", "M2", "M3", "M4", "M5"]
    assert {one[4] for one in after} == {batch["done_at"]}
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.delivered, sums.delivery_failed) == (3, 1, 1)


async def test_an_answer_that_is_written_again_changes_nothing(shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    ((grant, intent),) = await shop.post()
    answer = queue.Answer.of(items(intent.ids, *((ACCEPTED, one) for one in "ABCDE")), None, 200)
    assert await queue.settle_items(shop.pool, grant.batch_id, intent.attempt, answer)
    before = await shown(shop.pool, campaign_id), await shop.pool.fetch("select * from attempt")
    assert await queue.settle_items(shop.pool, grant.batch_id, intent.attempt, answer)
    after = await shown(shop.pool, campaign_id), await shop.pool.fetch("select * from attempt")
    assert after == before
    assert (await check_the_account(shop, campaign_id)).totals.pending == 5


@pytest.mark.parametrize(
    "odd", ["opted out", "an id is ours", "an id is missing", "unsure", "late"]
)
async def test_what_is_out_of_the_ordinary_is_written_message_by_message(
    shop: Shop, odd: str
) -> None:
    campaign_id = await shop.sending(5)
    if odd == "opted out":
        await shop.pool.execute(
            "insert into opt_out (tenant_id, phone, source)"
            " select $1, phone, 'test' from message order by id offset 2 limit 1",
            shop.id,
        )
    ((grant, intent),) = await shop.post()
    if odd == "an id is ours":
        other = await shop.sending(5)
        ((first, posted),) = await shop.post()
        before = shop.provider_ids
        await shop.answer(first, posted, ACCEPTED)
        assert (await shown(shop.pool, other))[0][3] == f"M{before + 1}"
        shop.provider_ids = before
    elif odd == "unsure":
        await shop.pool.execute("update batch set unsure = 1")
    elif odd == "late":
        await queue.settle_batch(shop.pool, grant.batch_id, intent.attempt, "unknown", "unknown")
    if odd == "an id is missing":
        ids = ["A", None, "C", "D", "E"]
        answer = queue.Answer.of(items(intent.ids, *((ACCEPTED, one) for one in ids)), None, 200)
        await queue.settle_items(shop.pool, grant.batch_id, intent.attempt, answer)
    else:
        await shop.answer(grant, intent, ACCEPTED)
    assert (await batches(shop.pool))[BatchState.DONE] == 1, "and no batch speaks for it"
    own = await shop.pool.fetch(
        "select state from message where campaign_id = $1 order by id", campaign_id
    )
    expected = [10] * 5
    if odd == "opted out":
        expected[2] = 50
    elif odd == "an id is ours":
        expected = [5] * 5
    assert [row["state"] for row in own] == expected
    await check_the_account(shop, campaign_id)


async def test_an_answer_is_not_written_to_a_batch_that_is_declared_unknown_meanwhile(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(5)
    ((grant, intent),) = await shop.post()
    async with shop.pool.acquire() as db, db.transaction():
        await db.execute("update batch set state = 11, owner = null")
        await db.execute("update attempt set outcome = 'unknown', ended_at = now()")
        writing = asyncio.create_task(shop.answer(grant, intent, ACCEPTED))
        await until_somebody_waits(shop.pool)
    with pytest.raises(asyncpg.SerializationError):
        await writing
    assert await shop.pool.fetchval("select count(*) from provider_message") == 0
    await shop.answer(grant, intent, ACCEPTED)
    assert (await check_the_account(shop, campaign_id)).totals.pending == 5


async def test_messages_that_say_themselves_what_their_batch_said_are_shown_the_same(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(5)
    ((grant, intent),) = await shop.post()
    shop.provider_ids = 0
    await shop.answer(grant, intent, ACCEPTED)
    await shop.receive(M2=30, M3=20, M4=11)
    before = await shown(shop.pool, campaign_id)
    async with shop.pool.acquire() as db, db.transaction():
        await db.execute("select expose_accepted($1)", grant.batch_id)
        receipts = asyncio.create_task(shop.receive(M1=30, M5=20))
        await until_somebody_waits(shop.pool)
        again = asyncio.create_task(shop.pool.execute("select expose_accepted($1)", grant.batch_id))
        await until_somebody_waits(shop.pool, 2)
        assert await shown(db, campaign_id) == before
    await receipts
    await again
    assert (await batches(shop.pool)) == {BatchState.DONE: 1}
    after = await shown(shop.pool, campaign_id)
    assert [one[2] for one in after] == [30, 30, 20, 11, 20]
    assert [one[3:5] for one in after] == [one[3:5] for one in before]
    await check_the_account(shop, campaign_id)


async def test_an_id_that_is_already_ours_makes_its_message_unknown_and_no_other(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(10)
    first, second = await shop.post(2)
    await queue.settle_items(
        shop.pool, first[0].batch_id, 1, queue.Answer.of(items(first[1].ids, ACCEPTED), None, 200)
    )
    taken = f"P{first[1].ids[0]}"
    answer = items(second[1].ids, ACCEPTED, (ACCEPTED, taken), ACCEPTED)
    await queue.settle_items(shop.pool, second[0].batch_id, 1, queue.Answer.of(answer, None, 200))
    rows = await shop.pool.fetch(
        "select own_state as state, provider_id from message_shown where id = any ($1) order by id",
        second[1].ids,
    )
    assert [row["state"] for row in rows] == [10, 5, 10, 10, 10]
    assert rows[1]["provider_id"] is None
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 1


async def test_a_late_answer_is_written_whoever_has_declared_the_batch_unknown(shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    ((grant, intent),) = await shop.post()
    await queue.leave(shop.pool, shop.replica_id, "test")
    assert await queue.reap(shop.pool) == (0, 1)
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 5
    assert await queue.settle_items(
        shop.pool,
        grant.batch_id,
        intent.attempt,
        queue.Answer.of(items(intent.ids, ACCEPTED), None, 200),
    )
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.unknown, sums.pending) == (0, 5)
    outcomes = await shop.pool.fetch("select outcome from attempt")
    assert [row["outcome"] for row in outcomes] == ["accepted"]


async def test_a_late_answer_to_an_older_attempt_is_recorded_as_a_duplicate_and_changes_nothing_else(
    pool: database.Pool, account: int
) -> None:
    shop = await open_shop(pool, account, await queue.register(pool, "test", "0"))
    campaign_id = await shop.sending(5)
    ((grant, first),) = await shop.post()
    await queue.settle_batch(pool, grant.batch_id, first.attempt, "unknown", "unknown")
    await pool.execute("update batch set state = 0")  # as a person's resend will
    await queue.wake_lane(pool, await lane_of(pool, campaign_id), 0)
    ((grant, second),) = await shop.post()
    late = items(first.ids, (ACCEPTED, "late"), REFUSED)
    assert not await queue.settle_items(
        pool, grant.batch_id, first.attempt, queue.Answer.of(late, None, 200)
    )
    assert (await check_the_account(shop, campaign_id)).totals.processing == 5
    assert await pool.fetchval("select count(*) from provider_message") == 0
    await queue.settle_items(
        pool,
        grant.batch_id,
        second.attempt,
        queue.Answer.of(items(second.ids, ACCEPTED), None, 200),
    )
    await queue.settle_items(pool, grant.batch_id, first.attempt, queue.Answer.of(late, None, 200))
    outcomes = await pool.fetch("select outcome from attempt order by n")
    assert [row["outcome"] for row in outcomes] == ["duplicate", "accepted"]
    assert list(await broken(pool)) == ["once"]


@pytest.mark.parametrize("whole", [True, False])
async def test_a_late_refusal_of_an_older_attempt_is_no_duplicate(shop: Shop, whole: bool) -> None:
    campaign_id = await shop.sending(5)
    ((grant, first),) = await shop.post()
    await queue.settle_batch(shop.pool, grant.batch_id, first.attempt, "unknown", "unknown")
    await shop.pool.execute("update batch set state = 0")
    await queue.wake_lane(shop.pool, await lane_of(shop.pool, campaign_id), 0)
    await shop.post()
    if whole:
        became = await queue.settle_batch(
            shop.pool, grant.batch_id, first.attempt, "again", "retry", status=500
        )
        assert became == "late"
    else:
        late = items(first.ids, REFUSED)
        assert not await queue.settle_items(
            shop.pool, grant.batch_id, 1, queue.Answer.of(late, None, 200)
        )
    assert (await check_the_account(shop, campaign_id)).totals.processing == 5


async def test_an_answer_that_is_written_twice_counts_once_and_is_no_duplicate(shop: Shop) -> None:
    """Whoever hears no acknowledgement of a commit writes again."""
    campaign_id = await shop.sending(5)
    ((grant, intent),) = await shop.post()
    answer = items(intent.ids, ACCEPTED, REFUSED)
    for _ in range(2):
        assert await queue.settle_items(
            shop.pool, grant.batch_id, intent.attempt, queue.Answer.of(answer, "bulk", 200)
        )
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.refused) == (1, 4)
    assert await shop.pool.fetchval("select outcome from attempt") == "accepted"


@pytest.mark.parametrize("action", ["again", "back", "refused", "unknown"])
async def test_an_outcome_that_is_written_twice_moves_the_batch_once(
    shop: Shop, action: str
) -> None:
    campaign_id = await shop.sending(4, batch_size=4)
    ((grant, intent),) = await shop.post()
    for _ in range(2):
        await queue.settle_batch(
            shop.pool, grant.batch_id, intent.attempt, action, action, most=6, refusal="a",
            delay_seconds=1 if action == "again" else 0,
        )  # fmt: skip
    assert await shop.pool.fetchval("select max(tries) from batch") == int(action == "again")
    assert await shop.pool.fetchval("select count(*) from batch") == 1 + int(action == "refused")
    assert await shop.pool.fetchval("select outcome from attempt") == action
    await check_the_account(shop, campaign_id)


async def test_of_two_who_write_the_same_answer_at_once_one_writes(shop: Shop) -> None:
    campaign_id = await shop.sending(50, batch_size=5)
    for grant, intent in await shop.post(8):
        answer = items(intent.ids, ACCEPTED, REFUSED, UNKNOWN)

        async def write(grant: Grant = grant, answer: list[ItemResult] = answer) -> bool:
            return await database.until_written(
                lambda: queue.settle_items(
                    shop.pool, grant.batch_id, 1, queue.Answer.of(answer, None, 200)
                ),
                0.01,
            )

        assert all(await asyncio.gather(write(), write(), write()))
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.refused, sums.unknown, sums.queued) == (8, 8, 24, 10)


# -------------------------------------------------------------------------- settle, the batch as a whole


async def settle(shop: Shop, action: str, **options: object) -> str:
    """Posts the next batch and writes one outcome for all of it."""
    ((grant, intent),) = await shop.post()
    return await queue.settle_batch(
        shop.pool,
        grant.batch_id,
        intent.attempt,
        action,
        action,
        **options,  # type: ignore[arg-type]
    )


async def test_waits_double_from_try_to_try_and_the_sixth_failure_is_the_last(shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    waits = []
    for attempt in range(1, 6):
        assert await settle(shop, "again", delay_seconds=3, most=6, detail="500") == "waiting"
        waits.append(
            await shop.pool.fetchval(
                "select extract(epoch from b.not_before - a.ended_at)::float8 from batch b, attempt a where a.n = $1",
                attempt,
            )
        )
        assert (await check_the_account(shop, campaign_id)).totals.queued == 5
        await shop.pool.execute("update batch set not_before = clock_timestamp()")
        await queue.wake_lane(shop.pool, await lane_of(shop.pool, campaign_id), 0)
    assert waits == pytest.approx([3, 6, 12, 24, 48], abs=0.2)
    assert await settle(shop, "again", delay_seconds=3, most=6, detail="500") == "failed"
    assert (await check_the_account(shop, campaign_id)).totals.refused == 5
    assert (await credits.balance(shop.pool, shop.id)).reserved == 0
    reasons = await shop.pool.fetch("select distinct reason, detail from message")
    assert [tuple(row) for row in reasons] == [("server_error", "500")]


async def test_what_came_back_uncounted_keeps_its_place_and_its_tries(shop: Shop) -> None:
    campaign_id = await shop.sending(10)
    for _ in range(8):
        assert await settle(shop, "back") == "ready"
    assert await shop.pool.fetchval("select max(tries) from batch") == 0
    lowest = await shop.pool.fetchval("select min(id) from batch")
    assert [one.batch_id for one in await shop.claim()] == [lowest]
    await check_the_account(shop, campaign_id)


async def test_an_unknown_batch_keeps_its_hold_and_is_never_claimed_again(shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    assert await settle(shop, "unknown", detail="no answer") == "unknown"
    await queue.wake_lane(shop.pool, await lane_of(shop.pool, campaign_id), 0)
    assert await shop.claim() == []
    assert (await credits.balance(shop.pool, shop.id)).reserved == 5
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 5


async def test_late_word_that_an_unknown_batch_was_refused_for_now_lets_its_campaign_go_on(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(5)
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(shop.pool, grant.batch_id, intent.attempt, "unknown", "unknown")
    await campaigns.finish(shop.pool)
    assert await queue.settle_batch(
        shop.pool, grant.batch_id, intent.attempt, "again", "retry", most=6
    ) == "waiting"  # fmt: skip
    assert await shop.status(campaign_id) == "sending"
    await shop.send_all(ACCEPTED)
    await campaigns.finish(shop.pool)
    assert await shop.status(campaign_id) == "completed"
    assert (await check_the_account(shop, campaign_id)).totals.pending == 5


@pytest.mark.parametrize("action", ["again", "back", "refused"])
async def test_what_would_be_tried_again_after_a_cancel_is_cancelled(
    shop: Shop, action: str
) -> None:
    campaign_id = await shop.sending(5)
    ((grant, intent),) = await shop.post()
    await shop.act(campaign_id, campaigns.cancel)
    assert await queue.settle_batch(
        shop.pool, grant.batch_id, intent.attempt, action, action, most=6, refusal="a"
    ) == "cancelled"  # fmt: skip
    assert (await check_the_account(shop, campaign_id)).totals.cancelled == 5
    assert (await credits.balance(shop.pool, shop.id)).reserved == 0


async def provider(shop: Shop, bad: set[int], complaint: str = "") -> int:
    """A provider that refuses every request with a bad number in it; how many requests it saw."""
    requests = 0
    while posted := await shop.post(8):
        for grant, intent in posted:
            requests += 1
            inside = bad & set(intent.phones)
            if not inside:
                await shop.answer(grant, intent, ACCEPTED)
                continue
            await queue.settle_batch(
                shop.pool, grant.batch_id, intent.attempt, "refused", "refused", status=400,
                detail="bad number", refusal=complaint or f"number {max(inside)}",
            )  # fmt: skip
    return requests


@pytest.mark.parametrize("place", [0, 249, 250, 371, 499])
async def test_one_bad_item_of_five_hundred_is_found_by_halving(shop: Shop, place: int) -> None:
    campaign_id = await shop.sending(500, batch_size=500)
    bad = await shop.pool.fetchval("select phone from message order by id offset $1 limit 1", place)
    assert await provider(shop, {bad}) <= 2 * 9 + 1
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.refused) == (499, 1)
    refused = await shop.pool.fetch("select phone, reason from message where state = 40")
    assert [tuple(row) for row in refused] == [(bad, "refused_by_provider")]
    assert await shop.pool.fetchval("select splits from lane where campaign_id <> 0") <= 9


async def test_two_bad_items_with_their_own_complaints_are_both_found(shop: Shop) -> None:
    campaign_id = await shop.sending(64, batch_size=64)
    rows = await shop.pool.fetch("select phone from message order by id")
    bad = {rows[3]["phone"], rows[40]["phone"]}
    await provider(shop, bad)
    assert (await check_the_account(shop, campaign_id)).totals.refused == 2
    refused = await shop.pool.fetch("select phone from message where state = 40")
    assert {row["phone"] for row in refused} == bad
    assert await shop.status(campaign_id) == "sending"


@pytest.mark.parametrize("size", [2, 9, 100])
async def test_two_halves_refused_in_the_same_words_pause_the_campaign_and_ask_a_person(
    shop: Shop, size: int
) -> None:
    campaign_id = await shop.sending(size, batch_size=size)
    phones = {row["phone"] for row in await shop.pool.fetch("select phone from message")}
    requests = await provider(shop, phones, "sender is not allowed")
    assert requests == 3
    progress = await check_the_account(shop, campaign_id)
    campaign = progress.campaign
    assert (campaign.status, campaign.paused_reason, campaign.paused_detail) == (
        "paused", "REFUSED_BY_PROVIDER", "bad number",
    )  # fmt: skip
    assert progress.totals.queued + progress.totals.refused == size
    if size > 2:
        assert progress.totals.queued > 0
    await shop.act(campaign_id, campaigns.resume)
    await shop.send_all(ACCEPTED)
    assert (await check_the_account(shop, campaign_id)).totals.queued == 0


async def test_splits_beyond_twenty_a_minute_wait_for_the_next_minute(shop: Shop) -> None:
    campaign_id = await shop.sending(120, batch_size=4)
    became = [
        await queue.settle_batch(
            shop.pool, grant.batch_id, intent.attempt, "refused", "refused", refusal=str(grant)
        )
        for grant, intent in [one for _ in range(3) for one in await shop.post(8)]
    ]
    assert became == ["split"] * 24
    assert await batches(shop.pool) == {
        BatchState.READY: 6 + 2 * 20, BatchState.WAITING: 2 * 4,
    }  # fmt: skip
    wait = await shop.pool.fetchval(
        "select extract(epoch from max(not_before) - clock_timestamp())::float8 from batch"
    )
    assert 50 < wait <= 60
    await shop.pool.execute("update lane set splits_since = splits_since - interval '1 minute'")
    assert await settle(shop, "refused", refusal="x") == "split"
    assert await shop.pool.fetchval("select splits from lane where campaign_id <> 0") == 1
    await check_the_account(shop, campaign_id)


async def test_a_campaign_s_splits_are_not_another_s(shop: Shop) -> None:
    first = await shop.sending(100, batch_size=4)
    for _ in range(3):
        for grant, intent in await shop.post(8):
            await queue.settle_batch(
                shop.pool, grant.batch_id, intent.attempt, "refused", "refused", refusal=str(grant)
            )
    await shop.act(first, campaigns.pause)
    await shop.sending(4, batch_size=4)
    await settle(shop, "refused", refusal="x")
    assert len(await shop.claim(2)) == 2


async def test_a_refusal_that_pauses_a_campaign_and_its_cancel_do_not_lock_each_other_out(
    shop: Shop, connection: database.Connection
) -> None:
    """Whoever is told of a deadlock may be the person who cancels."""
    campaign_id = await shop.sending(8, batch_size=8)
    await settle(shop, "refused", refusal="x")
    (first, tried), (second, trying) = await shop.post(2)

    async def refuse(batch_id: int, attempt: int) -> str:
        return await queue.settle_batch(
            shop.pool, batch_id, attempt, "refused", "refused", refusal="x"
        )

    await refuse(first.batch_id, tried.attempt)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("select from attempt where batch_id = $1 for update", second.batch_id)
    refusing = asyncio.create_task(refuse(second.batch_id, trying.attempt))
    await until_somebody_waits(shop.pool)
    cancelling = asyncio.create_task(shop.act(campaign_id, campaigns.cancel))
    await until_somebody_waits(shop.pool, 2)
    await transaction.commit()
    assert await refusing == "lane_paused"
    await cancelling
    assert (await check_the_account(shop, campaign_id)).totals.cancelled == 8


async def test_a_request_too_large_is_cut_from_then_on(shop: Shop) -> None:
    campaign_id = await shop.sending(10, batch_size=10)
    await queue.lower_largest_request(shop.pool, shop.account_id, 10)
    await queue.lower_largest_request(shop.pool, shop.account_id, 100)
    assert await settle(shop, "back") == "ready"
    assert sorted(len(intent.ids) for _, intent in await shop.post(8)) == [5, 5]
    await queue.lower_largest_request(shop.pool, shop.account_id, 1)
    assert await shop.pool.fetchval("select largest_request from traffic_account") == 1
    await check_the_account(shop, campaign_id)


async def test_a_refusal_of_a_campaign_by_the_provider_tells_whether_another_tenant_s_stands_too(
    pool: database.Pool, account: int, shop: Shop
) -> None:
    other = await open_shop(pool, account, shop.replica_id)
    reason = "FORBIDDEN_BY_PROVIDER"
    found = []
    for one in (shop, shop, other):
        campaign_id = await one.sending(5)
        ((grant, intent),) = await one.post()
        found.append(await queue.pause_campaign_of(pool, grant.batch_id, reason, "no"))
        await queue.settle_batch(pool, grant.batch_id, intent.attempt, "back", "lane_broken")
        assert await one.status(campaign_id) == "paused"
    assert found == [(True, False), (True, False), (True, True)]


# ------------------------------------------------------------------------------------------ credits


async def test_sixty_four_who_hold_at_once_never_overdraw(pool: database.Pool, dsn: str) -> None:
    shop = await open_shop(pool, await new_account(pool), 0, granted=100)
    wide = await database.open_pool(dsn, 32)
    held = await asyncio.gather(*(credits.hold(wide, shop.id, 3, 0, "test") for _ in range(64)))
    await wide.close()
    assert sum(held) == 33
    assert await credits.balance(pool, shop.id) == (100, 99)
    assert await pool.fetchval("select count(*) from ledger where kind = 'hold'") == 33


# --------------------------------------------------------------------------------- replicas, clocks


async def test_a_replica_is_buried_only_if_its_heartbeat_stands_where_it_was_seen(
    pool: database.Pool,
) -> None:
    one, two = [await queue.register(pool, name, "0") for name in ("one", "two")]
    seen = await queue.beats(pool)
    assert await queue.beat(pool, two)
    assert not await queue.bury(pool, two, seen[two])
    assert await queue.bury(pool, one, seen[one])
    assert not await queue.beat(pool, one)
    assert list(await queue.beats(pool)) == [two]
    await queue.bury_all(pool)
    assert await queue.beats(pool) == {}


async def test_reaping_takes_from_the_dead_and_from_nobody_else(shop: Shop) -> None:
    campaign_id = await shop.sending(20)
    other = await queue.register(shop.pool, "other", "0")
    mine = await shop.post()
    await shop.claim()
    theirs = (await queue.claim(shop.pool, shop.account_id, other, 2, lead_us=0)).grants
    assert (await queue.intent(shop.pool, theirs[0], other)).verdict == "post"
    await queue.leave(shop.pool, other, "test")
    assert await queue.reap(shop.pool) == (1, 1)
    assert await queue.reap(shop.pool) == (0, 0)
    assert await batches(shop.pool) == {
        BatchState.LEASED: 1, BatchState.SENDING: 1, BatchState.UNKNOWN: 1, BatchState.READY: 1,
    }  # fmt: skip
    (again,) = await shop.claim()
    assert again.batch_id == theirs[1].batch_id
    await shop.answer(*mine[0], ACCEPTED)
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.unknown) == (5, 5)


async def test_what_the_dead_had_leased_of_a_cancelled_campaign_is_cancelled(shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    await shop.claim()
    await shop.act(campaign_id, campaigns.cancel)
    await queue.leave(shop.pool, shop.replica_id, "test")
    await queue.reap(shop.pool)
    assert (await check_the_account(shop, campaign_id)).totals.cancelled == 5


ways = st.floats(0, 0.004)


@given(
    offset=st.floats(-1e6, 1e6),
    readings=st.lists(st.tuples(st.floats(0.001, 5), ways, ways), min_size=1, max_size=8),
    slot=st.floats(0, 10),
)
def test_the_database_s_clock_is_known_as_an_interval_that_holds_the_truth(
    offset: float, readings: list[tuple[float, float, float]], slot: float
) -> None:
    clock, now = read_the_clock(offset, readings)
    slot_us = round((now + slot + offset) * 1e6)
    early, late = clock.maybe_at(slot_us), clock.surely_at(slot_us)
    assert early - 1e-5 <= now + slot <= late + 1e-5
    drift = 100e-6 * 2 * (now - 1_000)
    assert late - early <= min(there + back for _, there, back in readings) + drift + 1e-5


@given(
    offset=st.floats(-1e6, 1e6),
    readings=st.lists(st.tuples(st.floats(0.001, 5), st.floats(0, 0.2)), min_size=1, max_size=8),
)
def test_a_database_far_away_leaves_room_within_the_guard_and_is_as_far_there_as_back(
    offset: float, readings: list[tuple[float, float]]
) -> None:
    clock, now = read_the_clock(offset, [(pause, way, way) for pause, way in readings])
    slot_us = round((now + 1 + offset) * 1e6)
    early, late = clock.maybe_at(slot_us), clock.surely_at(slot_us)
    assert late - early <= GUARD_US / 4e6 + 1e-5
    assert early - 1e-5 <= now + 1 <= late + 1e-5


def read_the_clock(
    offset: float, readings: list[tuple[float, float, float]]
) -> tuple[queue.DatabaseClock, float]:
    """A clock after readings of (pause, way there, way back), and the local time then."""
    clock, now = queue.DatabaseClock(), 1_000.0
    for pause, there, back in readings:
        before = now + pause
        now = before + there + back
        clock.observe(before, now, round((before + there + offset) * 1e6))
    return clock, now


@given(
    offset=st.floats(-1e6, 1e6),
    waited=st.lists(st.tuples(st.floats(0.01, 0.6), st.floats(0.01, 0.6)), min_size=1, max_size=7),
    readings=st.integers(1, 7),
)
def test_answers_that_were_waited_for_do_not_tell_the_time(
    offset: float, waited: list[tuple[float, float]], readings: int
) -> None:
    assert not queue.DatabaseClock().is_known()
    slow = [(0.01, there, back) for there, back in waited]
    assert not read_the_clock(offset, slow)[0].is_known()
    clock, now = read_the_clock(offset, [*slow, (0.01, 0.003, 0.004)])
    assert clock.is_known()
    slot_us = round((now + 1 + offset) * 1e6)
    assert clock.surely_at(slot_us) == pytest.approx(now + 1, abs=0.01)
    # A Postgres that is far away answers always so: what many readings say is believed.
    assert read_the_clock(offset, [(0.01, 0.1, 0.1)] * (readings + 7))[0].is_known()


def test_a_clock_that_stepped_is_not_known_until_it_was_read_anew() -> None:
    clock = queue.DatabaseClock()
    clock.observe(10.0, 10.001, 50_000_000)
    assert clock.is_known()
    clock.observe(11.0, 11.5, 20_000_000)
    assert not clock.is_known()
    clock.observe(12.0, 12.002, 21_200_000)
    assert clock.is_known()


def test_a_clock_that_was_read_long_ago_is_not_known_by_one_slow_answer() -> None:
    ways = [(0.01, 0.1, 0.1)] * 8
    assert read_the_clock(0, [*ways, (10, 0.3, 0.3)])[0].is_known()
    assert not read_the_clock(0, [*ways, (1_000, 0.3, 0.3)])[0].is_known()
    assert read_the_clock(0, [*ways, (1_000, 0.003, 0.004)])[0].is_known()


async def test_the_clock_is_read_until_it_is_known(shop: Shop) -> None:
    clock = queue.DatabaseClock()
    assert await clock.learn(shop.pool) == 0
    assert clock.is_known()
    offset = time.time() - mitto.clock()
    assert clock.surely_at(int(offset * 1e6)) == pytest.approx(0, abs=0.01)


def test_a_clock_that_jumped_is_believed_anew() -> None:
    clock = queue.DatabaseClock()
    clock.observe(10.0, 10.001, 50_000_000)
    clock.observe(11.0, 11.001, 20_000_000)
    assert clock.surely_at(21_000_000) == pytest.approx(12.001)
    assert clock.maybe_at(21_000_000) == pytest.approx(12.0)


def test_a_lease_surely_holds_for_nine_tenths_of_its_length_since_the_last_heartbeat() -> None:
    assert queue.Standing("here", lease_seconds=10).id is None
    assert not queue.Standing("here", lease_seconds=10).holds(0)
    standing = queue.Standing("here", lease_seconds=10, replica_id=7, beat_at=100.0)
    assert standing.id == 7
    assert standing.holds(108.9)
    assert not standing.holds(109.1)
