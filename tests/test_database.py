"""Migrations, named queries, and news from other sessions."""

import asyncio
import re
import socket
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg
import pytest
from shop import until_somebody_waits

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


async def test_a_share_has_no_more_connections_than_it_was_given(pool: Pool) -> None:
    share = database.Share(pool, 2)
    wait = "select pg_advisory_xact_lock(1)"
    async with pool.acquire() as holder, holder.transaction():
        await holder.execute(wait)
        calls = [share.fetch, share.execute, share.fetchrow, share.fetchval]
        waiting = [asyncio.ensure_future(call(wait)) for call in calls]
        await until_somebody_waits(pool, 2)
        asleep = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        assert await pool.fetchval(asleep) == 2, "and there is one left to ask"
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        await until_somebody_waits(pool, 2)
        assert await pool.fetchval(asleep) == 2
    await asyncio.gather(*waiting[1:])
    with pytest.raises(asyncpg.UndefinedColumnError):
        await share.fetch("select nothing")
    async with share.acquire() as one, share.acquire() as other:
        assert await one.fetchval("select 1") == await other.fetchval("select 1")


async def all_are_back(pool: Pool) -> None:
    async with asyncio.timeout(5):
        while pool.get_idle_size() < pool.get_size():
            await asyncio.sleep(0.005)


async def test_a_share_uses_the_connection_that_it_used_last_and_gives_back_what_rests(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    share, who = database.Share(pool, 3), "select pg_backend_pid()"
    monkeypatch.setattr(database, "KEPT_SECONDS", 0.2)
    async with share.acquire() as one, share.acquire() as other:
        last = await one.fetchval(who)
        assert last != await other.fetchval(who)
    kept = []
    for _ in range(80):
        kept.append(pool.get_size() - pool.get_idle_size())
        assert await share.fetchval(who) == last
        await asyncio.sleep(0.01)
    assert (kept[0], kept[-1]) == (2, 1), "the other rested"
    assert min(kept) == 1, "and the last did not"
    await all_are_back(pool)


async def test_a_share_uses_no_connection_again_that_ended_or_failed(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    share, who = database.Share(pool, 1), "select pg_backend_pid()"
    monkeypatch.setattr(database, "KEPT_SECONDS", 60)
    async with share.acquire() as connection:
        ended = await connection.fetchval(who)
    await pool.execute("select pg_terminate_backend($1)", ended)
    await all_are_back(pool)  # the pool has seen its end
    assert await share.fetchval(who) != ended
    with pytest.raises(asyncpg.UndefinedColumnError):
        await share.fetch("select nothing")
    await all_are_back(pool)


async def test_what_must_be_written_is_tried_until_postgres_answers(pool: Pool) -> None:
    async def write() -> int:
        async with pool.acquire() as connection:
            if await connection.fetchval("select nextval('batch_pair')") < 3:
                await connection.execute("select pg_terminate_backend(pg_backend_pid())")
            return 1

    assert await database.until_written(write, pause_seconds=0.01) == 1
    assert await pool.fetchval("select last_value from batch_pair") == 3


async def test_a_value_that_no_postgres_takes_is_not_written_for_ever(pool: Pool) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(asyncpg.DataError):
            await database.until_written(lambda: pool.fetchval("select $1::int", "one"))


# Hosts


@pytest.mark.parametrize(
    ("dsn", "hosts"),
    [
        ("postgresql://u:p@one/db", ["postgresql://u:p@one/db"]),
        ("postgresql:///db?host=/run", ["postgresql:///db?host=/run"]),
        (
            "postgresql://u:p@one:5,two/db?sslmode=disable",
            [
                "postgresql://u:p@one:5/db?sslmode=disable",
                "postgresql://u:p@two/db?sslmode=disable",
            ],
        ),
        (
            "postgresql://u@/db?host=/a,/b&port=5,6",
            ["postgresql://u@/db?host=%2Fa&port=5", "postgresql://u@/db?host=%2Fb&port=6"],
        ),
        (
            "postgresql://u@/db?host=/a,/b&port=7",
            ["postgresql://u@/db?host=%2Fa&port=7", "postgresql://u@/db?host=%2Fb&port=7"],
        ),
    ],
)
def test_a_url_names_its_hosts(dsn: str, hosts: list[str]) -> None:
    assert database.hosts_of(dsn) == hosts


async def test_a_host_that_says_nothing_takes_no_time_from_the_one_behind_it(
    dsn: str, tmp_path: Path
) -> None:
    """A machine that is gone drops what is sent to it; here it is one that listens and never answers."""
    given = urlsplit(dsn)
    query = dict(parse_qsl(given.query))
    if "host" not in query:
        pytest.skip("SMSD_TEST_DATABASE_URL is not on a Unix socket")
    silent = socket.socket(socket.AF_UNIX)
    silent.bind(str(tmp_path / ".s.PGSQL.5432"))
    silent.listen()
    hosts = urlencode({**query, "host": f"{tmp_path},{query['host']}", "port": "5432,5432"})
    pool = await database.open_pool(urlunsplit(given._replace(query=hosts)), 2)
    async with asyncio.timeout(4.5):
        assert await pool.fetchval("select 1") == 1
    async with asyncio.timeout(1.5), pool.acquire() as first, pool.acquire() as second:
        assert await second.fetchval("select 1") == await first.fetchval("select 1") == 1
    await pool.close()
    silent.close()


async def test_a_server_that_takes_no_writes_any_more_is_left(dsn: str) -> None:
    pool = await database.open_pool(dsn, 1)
    demoted = await pool.fetchval("select pg_backend_pid()")
    await pool.execute("set default_transaction_read_only = on")
    with pytest.raises(database.AWAY):
        await pool.execute("insert into signing_key (key) values ('')")
    assert await pool.fetchval("select pg_backend_pid()") != demoted
    await pool.execute("insert into signing_key (key) values ('')")
    await pool.close()


async def test_a_url_that_asks_for_nonsense_is_refused_and_not_waited_for(dsn: str) -> None:
    nonsense = dsn.replace("sslmode=disable", "sslmode=nonsense")
    with pytest.raises(database.UNUSABLE_DSN, match="sslmode"):
        await database.wait_for(nonsense, lambda _error: None)
