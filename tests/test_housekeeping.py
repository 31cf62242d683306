"""Housekeeping: who is dead and who only seems so, what becomes of what the dead had, and what is looked at regularly."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from shop import ACCEPTED, Shop, until_somebody_waits
from structlog.testing import capture_logs
from support import Relay, assert_sound, new_account, open_shop, take_the_clock

from smsd import campaigns, database, mitto, queue
from smsd.housekeeping import ROUND_SECONDS, Housekeeping
from smsd.model import BatchState, CampaignStatus

LEASE = 0.6


@pytest.fixture
async def account(pool: database.Pool) -> int:
    return await new_account(pool)


@pytest.fixture
async def shop(pool: database.Pool, account: int) -> AsyncIterator[Shop]:
    """A shop; whatever the test did with it, the audit finds nothing afterwards."""
    yield await open_shop(pool, account, await queue.register(pool, "test", "0"))
    await assert_sound(pool)


def watcher(pool: database.Pool, lease_seconds: float = LEASE, replica_id: int = 0) -> Housekeeping:
    return Housekeeping(pool, queue.Standing("watcher", lease_seconds, replica_id, mitto.clock()))


async def until(holds: Callable[[], Awaitable[object]], seconds: float = 20) -> None:
    """Returns once something holds that nobody tells of."""
    async with asyncio.timeout(seconds):
        while not await holds():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def at_work(*loops: Coroutine[object, object, None]) -> AsyncIterator[None]:
    """Loops that end with the block; what one died of is raised."""
    tasks = [asyncio.create_task(loop) for loop in loops]
    yield
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(outcome, asyncio.CancelledError):
            raise AssertionError("a loop ended") from outcome


async def hurried(house: Housekeeping) -> None:
    """`keep` without its pauses for want of news."""

    async def hurry() -> None:
        while True:
            house.wake()
            await asyncio.sleep(0.02)

    async with asyncio.TaskGroup() as group:
        group.create_task(hurry())
        group.create_task(house.keep())


async def alive(pool: database.Pool) -> list[int]:
    return list(await queue.beats(pool))


async def batches(pool: database.Pool) -> list[BatchState]:
    """In the order of their messages."""
    rows = await pool.fetch("select state from batch order by first_id")
    return [BatchState(row["state"]) for row in rows]


# ------------------------------------------------------------------------------------ who is dead


async def test_a_heart_that_rests_for_a_lease_is_buried_and_one_that_beats_never(
    pool: database.Pool, shop: Shop
) -> None:
    campaign_id = await shop.sending(20, batch_size=5)
    ((sending, intent),) = await shop.post()
    await shop.claim(2)
    beating, house = watcher(pool), watcher(pool)
    await beating.register()
    await house.register()
    started = mitto.clock()
    with capture_logs() as logs:
        async with at_work(beating.beat(), house.beat(), hurried(house)):
            await until(lambda: pool.fetchval("select count(*) from batch where state = 11"))
            assert mitto.clock() - started >= LEASE
            await asyncio.sleep(LEASE)  # the others have had their time too
    assert await alive(pool) == [beating._standing.replica_id, house._standing.replica_id]
    assert await batches(pool) == [BatchState.UNKNOWN, *[BatchState.READY] * 3]
    buried = [line["replica"] for line in logs if line["event"] == "replica.buried"]
    assert buried == [shop.replica_id]
    (reaped,) = [line for line in logs if line["event"] == "batches.reaped"]
    assert (reaped["released"], reaped["unknown"]) == (2, 1)
    # Its last answer is evidence whatever was thought of it meanwhile.
    await shop.answer(sending, intent, ACCEPTED)
    sums = (await shop.progress(campaign_id)).totals
    assert (sums.pending, sums.queued, sums.unknown) == (5, 15, 0)


async def test_a_replica_does_not_bury_itself(pool: database.Pool) -> None:
    house = watcher(pool)
    await house.register()
    other = await queue.register(pool, "other", "0")
    async with at_work(hurried(house)):
        await until(lambda: pool.fetchval("select gone_at from replica where id = $1", other))
    assert await alive(pool) == [house._standing.replica_id]


async def test_who_did_not_watch_for_a_while_begins_to_watch_anew(pool: database.Pool) -> None:
    await queue.register(pool, "resting", "0")
    house = watcher(pool)
    await house._round(slow=False)
    await asyncio.sleep(1.1 * LEASE)  # rests for a lease, and nobody looks
    began = mitto.clock()
    await house._round(slow=False)
    assert await alive(pool)

    async def buried() -> bool:
        await house._round(slow=False)
        return not await alive(pool)

    await until(buried)
    assert mitto.clock() - began >= LEASE


async def test_who_was_cut_off_from_postgres_begins_to_watch_anew(
    pool: database.Pool, dsn: str, tmp_path: Path
) -> None:
    lease = 1.5
    await queue.register(pool, "resting", "0")
    async with Relay(dsn, tmp_path, 1) as relay:
        cut_off = await database.open_pool(relay.dsn, 2)
        house = watcher(cut_off, lease)
        began = mitto.clock()
        with capture_logs() as logs:

            async def failed() -> bool:
                return any(line["event"] == "housekeeping.failed" for line in logs)

            async with at_work(hurried(house)):
                await until(lambda: asyncio.sleep(0.01, mitto.clock() - began > 0.7 * lease))
                await relay.__aexit__()
                await until(failed)
                back = mitto.clock()
                await relay.__aenter__()
                await until(lambda: nobody_left(pool))
                assert mitto.clock() - back >= lease
        cut_off.terminate()


async def nobody_left(pool: database.Pool) -> bool:
    return not await alive(pool)


async def test_the_shortest_lease_is_long_enough_for_rounds_that_take_their_time(
    pool: database.Pool,
) -> None:
    """Two seconds is the least that the settings take."""
    await queue.register(pool, "resting", "0")
    house = watcher(pool, 2)
    async with asyncio.timeout(20):
        while await alive(pool):
            await house._round(slow=False)
            await asyncio.sleep(1.2 * ROUND_SECONDS + 0.15)


# -------------------------------------------------------------------------------------- heartbeat


async def test_a_replica_that_was_declared_dead_registers_anew_and_can_claim_again(
    pool: database.Pool, shop: Shop
) -> None:
    await shop.sending(5)
    house = watcher(pool)
    standing = house._standing
    async with at_work(house.beat()):
        await until(lambda: alive_as(pool, standing.replica_id))
        first = standing.replica_id
        await queue.bury_all(pool)
        await until(lambda: asyncio.sleep(0.01, standing.replica_id not in (0, first)))
        second = standing.replica_id
        assert await alive(pool) == [second]
        assert standing.holds(mitto.clock())
    refused = await queue.claim(pool, shop.account_id, first, 1, lead_us=0)
    assert refused.waits_for == "replica_gone"
    assert (await queue.claim(pool, shop.account_id, second, 1, lead_us=0)).grants


async def alive_as(pool: database.Pool, replica_id: int) -> bool:
    return replica_id in await alive(pool)


async def test_a_lease_holds_from_when_the_heartbeat_was_sent_and_not_from_its_answer(
    pool: database.Pool, connection: database.Connection
) -> None:
    house = watcher(pool, 4)  # it is to be seen before it beats again
    standing = house._standing
    await house.register()
    registered_at = standing.beat_at
    async with at_work(house.beat()):
        async with connection.transaction():
            await connection.execute("select from replica for update")
            await until_somebody_waits(pool)
            waiting_at, before = mitto.clock(), standing.beat_at
        await until(lambda: asyncio.sleep(0.01, standing.beat_at > before))
        assert registered_at < standing.beat_at <= waiting_at


async def test_a_heart_goes_on_beating_when_postgres_is_back(
    pool: database.Pool, dsn: str, tmp_path: Path
) -> None:
    async with Relay(dsn, tmp_path, 1) as relay:
        cut_off = await database.open_pool(relay.dsn, 2)
        house = watcher(cut_off)
        await house.register()
        replica_id = house._standing.replica_id
        with capture_logs() as logs:

            async def failed() -> bool:
                return any(line["event"] == "heartbeat.failed" for line in logs)

            async with at_work(house.beat()):
                await relay.__aexit__()
                await until(failed)
                seen = (await queue.beats(pool))[replica_id]
                await relay.__aenter__()

                async def beats() -> bool:
                    return (await queue.beats(pool))[replica_id] > seen

                await until(beats)
        assert house._standing.replica_id == replica_id
        cut_off.terminate()


@pytest.mark.alone
async def test_a_heartbeat_that_was_not_acknowledged_prolongs_no_lease(
    pool: database.Pool, dsn: str, tmp_path: Path
) -> None:
    async with Relay(dsn, tmp_path, 0) as relay:
        deaf = await database.open_pool(relay.dsn, 2)
        house = watcher(deaf)
        await house.register()
        standing = house._standing
        async with at_work(house.beat()):
            relay.losing = 1.0
            lost_at = mitto.clock()
            await until(lambda: asyncio.sleep(0.01, not standing.holds(mitto.clock())))
            assert mitto.clock() - lost_at <= LEASE
            assert standing.beat_at <= lost_at
            relay.losing = 0.0
            await until(lambda: asyncio.sleep(0.01, standing.holds(mitto.clock())))
        deaf.terminate()


# ------------------------------------------------------------------------- what is looked at regularly


async def test_what_is_being_posted_is_left_to_a_living_owner_however_long_it_takes(
    pool: database.Pool, shop: Shop
) -> None:
    await shop.sending(5)
    await shop.post()
    await pool.execute("update batch set slot = slot - 600000000")
    assert await queue.reap(pool) == (0, 0)
    assert await batches(pool) == [BatchState.SENDING]


async def test_a_lease_whose_slot_is_long_past_goes_back_whoever_has_it(
    pool: database.Pool, shop: Shop
) -> None:
    await shop.sending(15)
    clock = await take_the_clock(pool)
    await clock.move(2_000_000)
    await shop.post()
    ((late, _), *_) = [(grant, None) for grant in await shop.claim()]
    await clock.move(late.slot_us + 5_000_000 - clock.now_us)
    assert await queue.reap(pool) == (0, 0)
    await clock.move(1)
    assert await queue.reap(pool) == (1, 0)
    assert await batches(pool) == [BatchState.SENDING, BatchState.READY, BatchState.READY]
    assert (await queue.intent(pool, late, shop.replica_id)).verdict == "lost"
    assert [grant.batch_id for grant in await shop.claim()] == [late.batch_id]


async def test_an_idle_lane_with_ready_batches_is_woken(
    pool: database.Pool, connection: database.Connection, shop: Shop
) -> None:
    await shop.sending(5)
    await pool.execute("update lane set idle = true")
    assert not await shop.claim()
    woken = asyncio.Event()
    await connection.add_listener("smsd_lane", lambda *_: woken.set())
    async with at_work(watcher(pool, 30).keep()), asyncio.timeout(10):
        await woken.wait()
    assert await shop.claim()


async def test_a_campaign_with_nothing_left_to_do_is_finished_at_the_news(
    pool: database.Pool, shop: Shop
) -> None:
    sent, open_ = await shop.sending(10), await shop.sending(5)
    await shop.send_all(ACCEPTED)
    coming = await shop.begin(5)
    house = watcher(pool, 30)

    async def finished() -> bool:
        house.wake()
        return await shop.status(sent) == CampaignStatus.COMPLETED

    await pool.execute("update batch set state = 3 where campaign_id = $1", open_)
    with capture_logs() as logs:
        async with at_work(house.keep()):
            await until(finished)
    assert [line["campaign"] for line in logs if line["event"] == "campaign.finished"] == [sent]
    assert await shop.status(open_) == await shop.status(coming) == CampaignStatus.SENDING
    await pool.execute("update batch set state = 13 where campaign_id = $1", open_)


async def test_receipts_that_were_missed_are_joined(pool: database.Pool, shop: Shop) -> None:
    await shop.sending(1)
    ((grant, intent),) = await shop.post()
    await shop.receive(**{f"M{shop.provider_ids + 1}": 30})
    await shop.answer(grant, intent, ACCEPTED)
    async with at_work(watcher(pool, 30).keep()):
        await until(lambda: pool.fetchval("select state = 30 from message"))


async def test_what_nobody_needs_any_more_is_dropped_and_what_may_be_needed_is_not(
    pool: database.Pool,
) -> None:
    await pool.execute(
        "insert into idempotency (tenant_id, route, key, body_hash, status, answer, created_at)"
        " select 1, 'POST /x', age::text, '', 200, '', clock_timestamp() - make_interval(hours => age)"
        " from unnest('{23, 49}'::int[]) as age"
    )
    async with at_work(watcher(pool, 30).keep()):
        await until(lambda: pool.fetchval("select count(*) = 1 from idempotency"))
    assert await pool.fetchval("select key from idempotency") == "23"


async def test_a_look_that_fails_keeps_nobody_else_from_looking(
    pool: database.Pool, shop: Shop
) -> None:
    await shop.sending(1)
    await pool.execute("alter function finish_campaigns() rename to finish_nothing")
    ((grant, intent),) = await shop.post()
    await shop.receive(**{f"M{shop.provider_ids + 1}": 30})
    await shop.answer(grant, intent, ACCEPTED)
    with capture_logs() as logs:
        async with at_work(watcher(pool, 30).keep()):
            await until(lambda: pool.fetchval("select state = 30 from message"))
    broken = next(line for line in logs if line["event"] == "housekeeping.broken")
    assert (broken["look"], broken["error"]) == ("finish_campaigns", "UndefinedFunctionError")


async def test_news_finish_campaigns_and_what_walks_far_keeps_its_pace(
    pool: database.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every settled batch is news; a reap reads all that was in flight since the oldest snapshot."""
    calls, finish, reap = Counter[str](), campaigns.finish, queue.reap

    async def counted_finish(db: Any) -> Any:
        calls["finish"] += 1
        return await finish(db)

    async def counted_reap(db: Any) -> Any:
        calls["reap"] += 1
        return await reap(db)

    monkeypatch.setattr(campaigns, "finish", counted_finish)
    monkeypatch.setattr(queue, "reap", counted_reap)

    async def many() -> bool:
        return calls["finish"] >= 30

    async with at_work(hurried(watcher(pool, lease_seconds=1))):
        await until(many)
    assert 1 <= calls["reap"] <= 1 + calls["finish"] / 10
