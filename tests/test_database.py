"""Migrations, named queries, and news from other sessions."""

import asyncio
import re

import asyncpg
import pytest

from smsd import database, tenants
from smsd.database import Connection, Pool, SchemaError

NEWEST = database.migrations()[-1]


ROOMS = sorted(path.stem for path in (database.sql_folder() / "queries").glob("*.sql"))


# Migrations


async def test_migrating_twice_runs_nothing_the_second_time(empty_dsn: str) -> None:
    assert await database.migrate(empty_dsn) == [m.name for m in database.migrations()]
    assert await database.migrate(empty_dsn) == []


async def test_many_migrate_at_once_and_each_migration_runs_once(empty_dsn: str) -> None:
    ran = await asyncio.gather(*(database.migrate(empty_dsn) for _ in range(8)))
    assert sorted(name for names in ran for name in names) == [
        migration.name for migration in database.migrations()
    ]


async def test_many_make_the_signing_key_at_once_and_there_is_one(dsn: str) -> None:
    async def make() -> None:
        connection = await database.connect(dsn)
        await tenants.ensure_signing_key(connection)
        await connection.close()

    await asyncio.gather(*(make() for _ in range(8)))
    connection = await database.connect(dsn)
    assert await connection.fetchval("select count(*) from signing_key") == 1
    await connection.close()


async def test_a_migration_changed_after_it_ran_is_refused(
    dsn: str, connection: Connection
) -> None:
    await connection.execute("update schema_migration set checksum = 'other' where number = 1")
    with pytest.raises(SchemaError, match=r"0001_tables was changed after it ran: restore"):
        await database.migrate(dsn)
    with pytest.raises(SchemaError, match=r"0001_tables was changed"):
        await database.check_schema(connection)


async def test_a_schema_that_needs_newer_code_is_refused(dsn: str, connection: Connection) -> None:
    await connection.execute("insert into schema_migration values (9000, '9000_future', 'x', 9000)")
    with pytest.raises(SchemaError, match=r"newer than this smsd .*9000_future.*upgrade smsd"):
        await database.check_schema(connection)
    with pytest.raises(SchemaError, match="9000_future"):
        await database.migrate(dsn)


async def test_a_newer_schema_that_suits_this_code_is_taken(connection: Connection) -> None:
    await connection.execute(
        "insert into schema_migration values (9000, '9000_future', 'x', $1)", NEWEST.number
    )
    await database.check_schema(connection)


async def test_a_schema_behind_says_to_migrate(connection: Connection) -> None:
    await connection.execute("delete from schema_migration where number = $1", NEWEST.number)
    with pytest.raises(SchemaError, match=rf"{NEWEST.name} is missing: run `smsd migrate`"):
        await database.check_schema(connection)


async def test_a_database_without_a_schema_says_to_migrate(empty_dsn: str) -> None:
    connection = await database.connect(empty_dsn)
    with pytest.raises(SchemaError, match="no schema yet: run `smsd migrate`"):
        await database.check_schema(connection)
    await connection.close()


async def test_a_migration_that_fails_leaves_nothing_behind(
    empty_dsn: str, connection: Connection
) -> None:
    other = await database.connect(empty_dsn)
    await other.execute("create table ledger ()")  # the first migration makes one
    with pytest.raises(asyncpg.DuplicateTableError):
        await database.migrate(empty_dsn)
    assert await other.fetchval("select to_regclass('tenant')") is None
    assert await other.fetchval("select count(*) from schema_migration") == 0
    await other.close()


# Queries


@pytest.mark.parametrize("room", ROOMS)
async def test_every_query_suits_the_schema(room: str, connection: Connection) -> None:
    unfit = {}
    for name, sql in database.queries(room).items():
        try:
            await connection.prepare(sql)
        except asyncpg.PostgresError as error:
            unfit[name] = str(error)
    assert unfit == {}


@pytest.mark.parametrize("room", ROOMS)
def test_every_query_says_what_it_promises(room: str) -> None:
    blocks = database.queries(room)
    assert blocks
    assert [name for name, sql in blocks.items() if not re.match(r"-- \w.*\n", sql)] == []


async def test_json_goes_in_and_out_as_python(connection: Connection) -> None:
    value = {"a": [1, None, "é😀"], "b": {"c": 1.5}}
    assert await connection.fetchval("select $1::jsonb", value) == value


# News


async def test_news_is_heard_again_after_the_connection_was_lost(pool: Pool) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    started: asyncio.Queue[None] = asyncio.Queue()
    listening = asyncio.create_task(
        database.listen(pool, {"news": heard.put_nowait}, lambda: started.put_nowait(None))
    )
    await started.get()
    await pool.execute("select pg_notify('news', 'first')")
    assert await heard.get() == "first"
    await pool.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where query ilike 'listen%' and datname = current_database()"
    )
    await started.get()
    await pool.execute("select pg_notify('news', 'second')")
    assert await heard.get() == "second"
    listening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await listening


async def test_what_must_be_written_is_tried_until_postgres_answers(pool: Pool) -> None:
    async def write() -> int:
        async with pool.acquire() as connection:
            if await connection.fetchval("select nextval('batch_pair')") < 3:
                await connection.execute("select pg_terminate_backend(pg_backend_pid())")
            return 1

    assert await database.until_written(write, pause_seconds=0.01) == 1
    assert await pool.fetchval("select last_value from batch_pair") == 3
