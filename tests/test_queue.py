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
    assert abs(turns[shop.id] - turns[other.id]) <= 1


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
        " values ($1, $2, $3, $4, $5, $5 + 4, 5, 5, 'Shop')",
        campaign_id, lane, shop.id, shop.account_id, first,
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
    assert due <= claim.now_us < due + 200_000
    assert claims <= 3, "it comes back at the time, not again and again before it"
