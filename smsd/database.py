"""Postgres: the pool, named queries, migrations and news from other sessions.

SQL stands in `sql/`: migrations as numbered files that only go forward, queries as blocks with a name, one file
a room. Nothing here knows what the queries are about.
"""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
import orjson
import structlog
import tenacity

log = structlog.get_logger()

Record = asyncpg.Record
if TYPE_CHECKING:
    Pool = asyncpg.Pool[Record]
    Connection = asyncpg.Connection[Record] | asyncpg.pool.PoolConnectionProxy[Record]
    Executor = Pool | Connection
else:
    Pool = asyncpg.Pool
    Connection = asyncpg.Connection
    Executor = object

T = TypeVar("T")

# What an absent or departing Postgres raises; whoever writes must be able to write again.
AWAY: tuple[type[BaseException], ...] = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InternalClientError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
)

_MIGRATION_LOCK = 7276300
_SERVER_SETTINGS = {
    "application_name": "smsd",
    # A replica that is stopped in the middle must not hold a tenant's row.
    "idle_in_transaction_session_timeout": "5s",
    "statement_timeout": "30s",
    "lock_timeout": "10s",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10s",
    "client_connection_check_interval": "2s",
    # Set-based statements over arrays are short: compiling them costs more than it saves.
    "jit": "off",
}


class SchemaError(Exception):
    """The schema does not suit this code; the message says which of the two is behind and what to do."""


@dataclass(frozen=True)
class Migration:
    """One file of sql/migrations. `oldest_code`: the number of the newest migration that code must know."""

    number: int
    name: str
    sql: str
    checksum: str
    oldest_code: int
    in_transaction: bool


def sql_folder() -> Path:
    """The folder `sql/`: inside an installed package, or beside it in a checkout."""
    package = Path(str(files("smsd")))
    inside = package / "sql"
    return inside if inside.is_dir() else package.parent / "sql"


@cache
def queries(room: str) -> dict[str, str]:
    """The named blocks of sql/queries/<room>.sql: name → SQL."""
    text = (sql_folder() / "queries" / f"{room}.sql").read_text()
    blocks = re.split(r"^-- name: *(\w+) *$", text, flags=re.MULTILINE)[1:]
    return {
        name: body.strip().rstrip(";") for name, body in zip(blocks[::2], blocks[1::2], strict=True)
    }


# --------------------------------------------------------------------------------------- connections


async def _prepare(connection: Any) -> None:
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        encoder=lambda value: b"\x01" + orjson.dumps(value),
        decoder=lambda data: orjson.loads(data[1:]),
        format="binary",
    )


async def _keep_as_is(_connection: Any) -> None:
    """Nothing here sets session state, so a connection is fit for the next user without four statements."""


async def open_pool(dsn: str, size: int) -> Pool:
    """A pool of up to `size` connections, each opened when it is first needed: Postgres need not be there yet."""
    return await asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=size,
        init=_prepare,
        reset=_keep_as_is,
        server_settings=_SERVER_SETTINGS,
        timeout=5,
        command_timeout=60,
        max_inactive_connection_lifetime=0,
    )


async def connect(dsn: str) -> "asyncpg.Connection[Record]":
    """One connection outside a pool, with the same settings but no statement time-out."""
    connection = await asyncpg.connect(
        dsn, timeout=5, server_settings={**_SERVER_SETTINGS, "statement_timeout": "0"}
    )
    await _prepare(connection)
    return connection


async def wait_for(dsn: str, on_wait: Callable[[BaseException], None]) -> None:
    """Returns when Postgres answers, however long that takes; `on_wait` hears of each refusal."""

    def before_sleep(state: tenacity.RetryCallState) -> None:
        if state.outcome is not None and (error := state.outcome.exception()) is not None:
            on_wait(error)

    async for attempt in tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(AWAY),
        wait=tenacity.wait_exponential_jitter(initial=0.1, max=3),
        before_sleep=before_sleep,
        reraise=True,
    ):
        with attempt:
            connection = await asyncpg.connect(dsn, timeout=5)
            await connection.close()


async def listen(
    pool: Pool, channels: dict[str, Callable[[str], None]], on_lost: Callable[[], None]
) -> None:
    """Hears NOTIFY on a connection of the pool until cancelled. Calls `on_lost` at each new start: news may have
    been missed, so the caller looks at everything once. Comes back by itself when Postgres does."""
    while True:
        try:
            async with pool.acquire() as connection:
                lost = asyncio.Event()
                connection.add_termination_listener(lambda _c, lost=lost: lost.set())
                for channel, hear in channels.items():
                    await connection.add_listener(
                        channel, lambda _c, _pid, _ch, payload, hear=hear: hear(str(payload))
                    )
                on_lost()
                try:
                    await lost.wait()
                finally:
                    await connection.reset()  # it goes back to the pool and must not hear on
        except AWAY as error:
            log.warning("listen.failed", error=repr(error))
        await asyncio.sleep(0.5)


# --------------------------------------------------------------------------------------- migrations


@cache
def migrations() -> tuple[Migration, ...]:
    """All migrations that this code knows, in order."""
    found = []
    for path in sorted((sql_folder() / "migrations").glob("[0-9]*_*.sql")):
        sql = path.read_text()
        oldest = re.search(r"^-- oldest code: (\d+)$", sql, re.MULTILINE)
        if oldest is None:
            raise SchemaError(f"{path.name} has no line `-- oldest code: N`")
        found.append(
            Migration(
                number=int(path.name[:4]),
                name=path.stem,
                sql=sql,
                checksum=hashlib.sha256(sql.encode()).hexdigest(),
                oldest_code=int(oldest[1]),
                in_transaction="-- no transaction" not in sql,
            )
        )
    return tuple(found)


async def migrate(dsn: str) -> list[str]:
    """Brings the schema up to date; returns the names of the migrations that ran. Safe with many at once."""
    connection = await connect(dsn)
    try:
        # Polled: waiting inside Postgres would deadlock with CREATE INDEX CONCURRENTLY of the one that works.
        while not await connection.fetchval("select pg_try_advisory_lock($1)", _MIGRATION_LOCK):
            await asyncio.sleep(0.1)
        await connection.execute(
            "create table if not exists schema_migration (number int primary key, name text not null, "
            "checksum text not null, oldest_code int not null, applied_at timestamptz not null default now())"
        )
        done = {row["number"]: row for row in await connection.fetch("table schema_migration")}
        _check_applied(done)
        ran = []
        for migration in migrations():
            if migration.number not in done:
                await _apply(connection, migration)
                ran.append(migration.name)
        return ran
    finally:
        await connection.close()


async def _apply(connection: Connection, migration: Migration) -> None:
    record = (
        "insert into schema_migration (number, name, checksum, oldest_code) values ($1, $2, $3, $4)"
    )
    values = (migration.number, migration.name, migration.checksum, migration.oldest_code)
    if not migration.in_transaction:
        await connection.execute(migration.sql)
        await connection.execute(record, *values)
        return
    async with connection.transaction():
        await connection.execute(migration.sql)
        await connection.execute(record, *values)


def _check_applied(done: dict[int, Any]) -> None:
    newest = migrations()[-1].number
    for migration in migrations():
        row = done.get(migration.number)
        if row is not None and row["checksum"] != migration.checksum:
            raise SchemaError(
                f"migration {migration.name} was changed after it ran: restore that file, and put the change "
                "into a new migration"
            )
    too_new = [row["name"] for row in done.values() if row["oldest_code"] > newest]
    if too_new:
        raise SchemaError(
            f"the schema is newer than this smsd (it has {max(too_new)}, which needs newer code; this one knows "
            f"migrations up to {newest}): upgrade smsd"
        )


async def check_schema(db: Executor) -> None:
    """Raises SchemaError unless the schema suits this code: nothing behind, nothing that needs newer code."""
    if await db.fetchval("select to_regclass('schema_migration')") is None:
        raise SchemaError("the database has no schema yet: run `smsd migrate`")
    done = {row["number"]: row for row in await db.fetch("table schema_migration")}
    _check_applied(done)
    behind = [m.name for m in migrations() if m.number not in done]
    if behind:
        raise SchemaError(f"the schema is behind, {behind[0]} is missing: run `smsd migrate`")


async def until_written(action: Callable[[], Awaitable[T]], pause_seconds: float = 0.5) -> T:
    """Runs an action until Postgres answers. Only for what may be written twice without harm."""
    while True:
        try:
            return await action()
        except AWAY as error:
            log.warning("database.away", error=repr(error))
            await asyncio.sleep(pause_seconds)
