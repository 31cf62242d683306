"""Housekeeping: who is declared dead, who never is, and what is looked at again although somebody should have seen it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from shop import ACCEPTED, Shop, check_the_account
from support import Relay, assert_sound, new_account, open_shop

from smsd import database, mitto, queue
from smsd.housekeeping import Housekeeping
from smsd.model import BatchState

LEASE = 0.6


@pytest.fixture
async def shop(pool: database.Pool) -> AsyncIterator[Shop]:
    account = await new_account(pool)
    yield await open_shop(pool, account, await queue.register(pool, "victim", "0"))
    await assert_sound(pool)


@contextlib.asynccontextmanager
async def keeping(
    pool: database.Pool, *, beats: bool = True
) -> AsyncIterator[tuple[Housekeeping, queue.Standing]]:
    """A replica that keeps house, with a heartbeat of its own."""
    standing = queue.Standing("keeper", LEASE)
    housekeeping = Housekeeping(pool, standing)
    await housekeeping.register()
    loops = [housekeeping.keep()] + ([housekeeping.beat()] if beats else [])
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        yield housekeeping, standing
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in ended), ended


async def soon(holds: Callable[[], Awaitable[object]], seconds: float = 10) -> None:
    """Returns once something in the database holds."""
    async with asyncio.timeout(seconds):
        while not await holds():
            await asyncio.sleep(0.02)


async def is_gone(pool: database.Pool, replica_id: int) -> bool:
    return bool(
        await pool.fetchval("select gone_at is not null from replica where id = $1", replica_id)
    )


async def states(pool: database.Pool) -> dict[BatchState, int]:
    rows = await pool.fetch("select state, count(*) as n from batch group by state")
    return {BatchState(row["state"]): row["n"] for row in rows}


# --------------------------------------------------------------------------------------- the dead


async def test_whose_heartbeat_rests_for_a_lease_is_dead_and_what_it_had_is_taken(
    pool: database.Pool, shop: Shop
) -> None:
    campaign_id = await shop.sending(15)
    await shop.post()
    await shop.claim()
    started = time.monotonic()
    async with keeping(pool) as (_, standing):
        await soon(lambda: is_gone(pool, shop.replica_id))
        assert time.monotonic() - started >= LEASE
        await soon(lambda: pool.fetchval("select count(*) = 0 from batch where state in (2, 3)"))
        assert not await is_gone(pool, standing.replica_id)
    assert await states(pool) == {BatchState.READY: 2, BatchState.UNKNOWN: 1}
    reason = await pool.fetchval("select gone_reason from replica where id = $1", shop.replica_id)
    assert reason == "no heartbeat for a lease"
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 5


async def test_whose_heartbeat_moves_is_never_dead(pool: database.Pool, shop: Shop) -> None:
    await shop.sending(5)
    await shop.claim()
    until = time.monotonic() + 4 * LEASE
    async with keeping(pool):
        while time.monotonic() < until:
            assert await queue.beat(pool, shop.replica_id)
            await asyncio.sleep(LEASE / 4)
    assert await states(pool) == {BatchState.LEASED: 1}


async def test_who_did_not_watch_all_the_while_begins_anew(pool: database.Pool, shop: Shop) -> None:
    """A process that was stopped for longer than a lease must not bury all that it did not see moving."""
    async with keeping(pool):
        await asyncio.sleep(LEASE / 2)
        time.sleep(LEASE)  # noqa: ASYNC251 - all of it stands still
        awake = time.monotonic()
        await soon(lambda: is_gone(pool, shop.replica_id))
        assert time.monotonic() - awake >= LEASE


async def test_an_outage_of_postgres_buries_nobody(
    pool: database.Pool, shop: Shop, dsn: str, tmp_path: Path
) -> None:
    async with Relay(dsn, tmp_path, 0) as relay:
        cut = await database.open_pool(relay.dsn, 4)
        async with keeping(cut):
            await soon(lambda: pool.fetchval("select max(beat) > 1 from replica"))
            relay.losing = 1.0
            await asyncio.sleep(1.5 * LEASE)
            relay.losing = 0.0
            back = time.monotonic()
            await soon(lambda: is_gone(pool, shop.replica_id))
            assert time.monotonic() - back >= LEASE
        cut.terminate()
    assert relay.lost > 0


async def test_who_was_declared_dead_registers_anew_and_works_on(
    pool: database.Pool, shop: Shop
) -> None:
    async with keeping(pool) as (_, standing):
        first = standing.replica_id
        assert standing.holds(mitto.clock())
        await pool.execute("update replica set gone_at = clock_timestamp() where id = $1", first)
        await soon(lambda: _differs(standing, first))
        assert standing.holds(mitto.clock())
        assert list(await queue.beats(pool)) == [shop.replica_id, standing.replica_id]
    await shop.sending(5)
    claim = await queue.claim(pool, shop.account_id, first, 1, lead_us=0)
    assert claim.waits_for == "replica_gone"
    claim = await queue.claim(pool, shop.account_id, standing.replica_id, 1, lead_us=0)
    assert len(claim.grants) == 1


async def _differs(standing: queue.Standing, replica_id: int) -> bool:
    return standing.replica_id not in (0, replica_id)


async def test_a_heartbeat_that_was_not_acknowledged_prolongs_no_lease(
    pool: database.Pool, shop: Shop, dsn: str, tmp_path: Path
) -> None:
    async with Relay(dsn, tmp_path, 0) as relay:
        cut = await database.open_pool(relay.dsn, 4)
        async with keeping(cut) as (_, standing):
            relay.losing = 1.0
            lost = mitto.clock()
            await soon(lambda: _no_longer_holds(standing))
            assert mitto.clock() - lost <= LEASE
            relay.losing = 0.0
            await soon(lambda: _holds(standing))
        cut.terminate()


async def _holds(standing: queue.Standing) -> bool:
    return standing.holds(mitto.clock())


async def _no_longer_holds(standing: queue.Standing) -> bool:
    return not standing.holds(mitto.clock())


async def test_a_lease_that_its_owner_does_not_use_goes_back(
    pool: database.Pool, shop: Shop
) -> None:
    """Its owner lives, and may not know of it: the answer to its claim got lost."""
    await shop.sending(10)
    forgotten, fresh = await shop.claim(2)
    await pool.execute("update batch set slot = slot - 6000000 where id = $1", forgotten.batch_id)
    assert await queue.reap(pool) == (1, 0)
    assert (await queue.intent(pool, forgotten, shop.replica_id)).verdict == "lost"
    assert (await queue.intent(pool, fresh, shop.replica_id)).verdict == "post"
    assert [one.batch_id for one in await shop.claim()] == [forgotten.batch_id]


async def test_what_is_being_posted_is_left_to_a_living_owner_however_long_it_takes(
    pool: database.Pool, shop: Shop
) -> None:
    await shop.sending(5)
    await shop.post()
    await pool.execute("update batch set slot = slot - 600000000")
    assert await queue.reap(pool) == (0, 0)
    assert await states(pool) == {BatchState.SENDING: 1}


# ------------------------------------------------------------------------------------ looked at again


async def test_a_campaign_is_finished_soon_after_its_last_batch(
    pool: database.Pool, shop: Shop
) -> None:
    campaign_id = await shop.sending(5)
    async with keeping(pool) as (housekeeping, _):
        await asyncio.sleep(0.3)
        assert await shop.status(campaign_id) == "sending"
        await shop.send_all(ACCEPTED)
        housekeeping.wake()
        started = time.monotonic()
        await soon(lambda: _is(shop, campaign_id, "completed"))
        assert time.monotonic() - started < 0.6


async def _is(shop: Shop, campaign_id: int, status: str) -> bool:
    return await shop.status(campaign_id) == status


async def test_a_receipt_that_was_missed_is_matched_within_a_second(
    pool: database.Pool, shop: Shop
) -> None:
    await shop.sending(1)
    await shop.receive(**{f"M{shop.provider_ids + 1}": 30})
    await shop.send_all(ACCEPTED)
    async with keeping(pool):
        await soon(lambda: pool.fetchval("select state = 30 from message"), 1)


async def test_a_lane_that_was_forgotten_is_woken(pool: database.Pool, shop: Shop) -> None:
    await shop.sending(5)
    await pool.execute("update lane set idle = true where campaign_id <> 0")
    async with keeping(pool):
        await soon(lambda: pool.fetchval("select not idle from lane where campaign_id <> 0"))
    assert len(await shop.claim()) == 1
