"""The rehearsal: every connection has gone the whole way of a batch, and nothing of it is to be seen."""

import asyncio
from contextlib import AsyncExitStack

from shop import ACCEPTED, Shop
from structlog.testing import capture_logs
from support import assert_sound, new_account, open_shop

from smsd import database, queue, rehearsal

TABLES = "select relname from pg_class where relkind = 'r' and relnamespace = current_schema()::regnamespace order by 1"
SEQUENCES = (
    "select sequencename, last_value from pg_sequences where sequencename <> 'ledger_id_seq'"
)
PREPARED = "select statement from pg_prepared_statements"
WAY = ("claim", "intent", "settle_accepted", "rejoin_receipts", "apply_receipts")


async def counts(pool: database.Pool) -> dict[str, int]:
    return {
        name: await pool.fetchval(f"select count(*) from {name}")
        for (name,) in await pool.fetch(TABLES)
    }


async def test_every_connection_goes_the_whole_way_and_nothing_is_left_of_it(
    pool: database.Pool,
) -> None:
    replica_id = await queue.register(pool, "here", "1")
    shop: Shop = await open_shop(pool, await new_account(pool), replica_id)
    await shop.sending(of=10)
    before = await counts(pool), await pool.fetch(SEQUENCES)

    await rehearsal.rehearse(pool, 4)

    assert (await counts(pool), await pool.fetch(SEQUENCES)) == before
    async with AsyncExitStack() as stack:
        for _ in range(4):
            connection = await stack.enter_async_context(pool.acquire())
            prepared = {row["statement"] for row in await connection.fetch(PREPARED)}
            assert {queue.SQL[name] for name in WAY} <= prepared
    await shop.send_all(ACCEPTED)
    assert await pool.fetchval("select count(provider_id) from message_shown") == 10
    await assert_sound(pool)


async def test_it_waits_for_nobody_who_works(pool: database.Pool) -> None:
    """Whatever a claim, a settle and a heartbeat lock is locked, and two rehearse at once."""
    replica_id = await queue.register(pool, "here", "1")
    shop = await open_shop(pool, await new_account(pool), replica_id)
    await shop.sending(of=10)
    await pool.execute("insert into rate (scope, id, closed_until) values (0, 0, 0)")
    async with pool.acquire() as connection, connection.transaction():
        [grant] = (
            await queue.claim(connection, shop.account_id, replica_id, 1, lead_us=0, all_limit=9)
        ).grants
        await queue.intent(connection, grant, replica_id)
        await queue.beat(connection, replica_id)
        async with asyncio.timeout(5):
            await asyncio.gather(rehearsal.rehearse(pool, 2), rehearsal.rehearse(pool, 2))


async def test_where_it_cannot_be_the_start_goes_on(pool: database.Pool) -> None:
    """In a database that is not the one kept nothing is claimed, and an older schema may not have all of it."""
    await queue.register(pool, "here", "1")
    await pool.execute("update instance set identity = 'another'")
    await rehearsal.rehearse(pool, 2)
    await pool.execute("alter function intent rename to intent_of_old")
    await pool.execute("update instance set identity = instance_now()")
    with capture_logs() as logs:
        await rehearsal.rehearse(pool, 1)
    assert [one["event"] for one in logs] == ["rehearsal.failed"]
    assert await pool.fetchval("select 1") == 1
