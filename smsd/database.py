"""Postgres: the pool, named queries, migrations and news from other sessions.

SQL stands in `sql/`: migrations as numbered files that only go forward, queries as blocks with a name, one file
a room. Nothing here knows what the queries are about.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, wraps
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg
import orjson
import structlog
import tenacity

log = structlog.get_logger()

Record = asyncpg.Record
if TYPE_CHECKING:
    Pool = asyncpg.Pool[Record]
    Connection = asyncpg.Connection[Record] | asyncpg.pool.PoolConnectionProxy[Record]
    Executor: TypeAlias = "Pool | Connection | Share"
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
    asyncpg.ReadOnlySQLTransactionError,
)
UNUSABLE_DSN = asyncpg.exceptions.ClientConfigurationError
"""What the URL asks for does not exist; waiting does not help. Also one of AWAY, so to be caught before."""
UNDEFINED_FUNCTION = asyncpg.UndefinedFunctionError

_MIGRATION_LOCK = 7276300
KEPT_SECONDS = 0.02
"""How long a share keeps a connection that is free."""
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


def _ends_on_a_standby(method: Any) -> Any:
    """A server that is no primary any more: this connection ends, so that the pool opens another."""

    @wraps(method)
    async def call(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return await method(self, *args, **options)
        except asyncpg.ReadOnlySQLTransactionError:
            self.terminate()
            raise

    return call


class _Connection(asyncpg.Connection):
    execute = _ends_on_a_standby(asyncpg.Connection.execute)
    fetch = _ends_on_a_standby(asyncpg.Connection.fetch)
    fetchrow = _ends_on_a_standby(asyncpg.Connection.fetchrow)
    fetchval = _ends_on_a_standby(asyncpg.Connection.fetchval)


def hosts_of(dsn: str) -> list[str]:
    """A URL for each of the hosts that it names, separated by commas, after the @ or as `host`."""
    parts = urlsplit(dsn)
    account, at, named = parts.netloc.rpartition("@")
    if named:
        return [
            urlunsplit(parts._replace(netloc=f"{account}{at}{one}")) for one in named.split(",")
        ]
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    hosts, ports = query.get("host", "").split(","), query.get("port", "5432").split(",")
    if len(hosts) == 1:
        return [dsn]
    ports = ports if len(ports) == len(hosts) else ports[:1] * len(hosts)
    each = [query | {"host": host, "port": port} for host, port in zip(hosts, ports, strict=True)]
    return [urlunsplit(parts._replace(query=urlencode(one))) for one in each]


class _Dial:
    """Connects to the first host that answers and can be written to, and asks that one first the next time: a machine
    that is gone answers nothing, and must not use up the time of those behind it."""

    def __init__(self, dsn: str) -> None:
        self._dsns = hosts_of(dsn)

    async def __call__(self, *_dsn: Any, **options: Any) -> "asyncpg.Connection[Record]":
        fault: BaseException | None = None
        patience = 5 if len(self._dsns) == 1 else 2
        for dsn in list(self._dsns):
            try:
                connection: asyncpg.Connection[Record] = await asyncpg.connect(
                    dsn, **{"timeout": patience, "target_session_attrs": "read-write", **options}
                )
            except UNUSABLE_DSN:
                raise
            except AWAY as error:
                fault = error
            else:
                self._dsns.sort(key=lambda one: one != dsn)
                return connection
        assert fault is not None
        raise fault


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


async def open_pool(
    dsn: str, size: int, greet: Callable[[Connection], Awaitable[None]] | None = None
) -> Pool:
    """A pool of up to `size` connections, each opened when it is first needed: Postgres need not be there yet.
    `greet`: what is done with each before it is used."""

    async def init(connection: Any) -> None:
        await _prepare(connection)
        if greet is not None:
            await greet(connection)

    return await asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=size,
        connect=_Dial(dsn),
        connection_class=_Connection,
        init=init,
        reset=_keep_as_is,
        server_settings=_SERVER_SETTINGS,
        command_timeout=60,
        max_inactive_connection_lifetime=0,
    )


class Share:
    """`size` of a pool's connections for work that would have all of them busy at once: its statements wait for each
    other here, and others find a connection. One that is free is kept for a moment, as going back to the pool and
    coming from it takes as long as a small statement; the one used last is taken first, and the others are given back."""

    def __init__(self, pool: Pool, size: int) -> None:
        self._pool, self._turns = pool, asyncio.Semaphore(size)
        self._kept: list[Any] = []
        self._rested = 0  # of those, from the first on: how many were not used since the last look
        self._look: asyncio.TimerHandle | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    async def execute(self, query: str, *args: Any) -> str:
        """As the pool's."""
        async with self.acquire() as connection:
            return await connection.execute(query, *args)

    async def fetch(self, query: str, *args: Any) -> list[Record]:
        """As the pool's."""
        async with self.acquire() as connection:
            return await connection.fetch(query, *args)

    async def fetchrow(self, query: str, *args: Any) -> Record | None:
        """As the pool's."""
        async with self.acquire() as connection:
            return await connection.fetchrow(query, *args)

    async def fetchval(self, query: str, *args: Any) -> Any:
        """As the pool's."""
        async with self.acquire() as connection:
            return await connection.fetchval(query, *args)

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        """As the pool's."""
        async with self._turns:
            connection = self._take() or await self._pool.acquire()
            try:
                yield connection
            except BaseException:  # whatever state it is in, the pool knows what to do
                await self._pool.release(connection)
                raise
            self._kept.append(connection)
            if self._look is None:
                self._look_later()

    def _take(self) -> Any:
        while self._kept:
            connection = self._kept.pop()
            self._rested = min(self._rested, len(self._kept))
            try:
                if not connection.is_closed():
                    return connection
            except asyncpg.InterfaceError:  # it ended while it was kept, and the pool has seen it
                continue
            self._give_back(connection)
        return None

    def _look_later(self) -> None:
        self._rested = len(self._kept)
        self._look = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._look_now)

    def _look_now(self) -> None:
        self._look = None
        rested, self._kept = self._kept[: self._rested], self._kept[self._rested :]
        for connection in rested:
            self._give_back(connection)
        if self._kept:
            self._look_later()

    def _give_back(self, connection: Any) -> None:
        task = asyncio.get_running_loop().create_task(self._pool.release(connection))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


def waiting(pool: Pool) -> int:
    """How many tasks wait for a connection of the pool (asyncpg does not tell, its queue does)."""
    getters = getattr(getattr(pool, "_queue", None), "_getters", ())
    return sum(not getter.done() for getter in getters)


async def connect(dsn: str) -> "asyncpg.Connection[Record]":
    """One connection outside a pool, with the same settings but no statement time-out."""
    connection = await _Dial(dsn)(server_settings={**_SERVER_SETTINGS, "statement_timeout": "0"})
    await _prepare(connection)
    return connection


async def wait_for(dsn: str, on_wait: Callable[[BaseException], None]) -> None:
    """Returns when Postgres answers, however long that takes; `on_wait` hears of each refusal. Raises UNUSABLE_DSN."""
    dial = _Dial(dsn)

    def before_sleep(state: tenacity.RetryCallState) -> None:
        if state.outcome is not None and (error := state.outcome.exception()) is not None:
            on_wait(error)

    async for attempt in tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(AWAY)
        & tenacity.retry_if_not_exception_type(UNUSABLE_DSN),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=3),
        before_sleep=before_sleep,
        reraise=True,
    ):
        with attempt:
            await (await dial()).close()


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
            if isinstance(
                error, ValueError
            ):  # asyncpg's word for a value that no Postgres would take
                raise
            log.warning("database.away", error=repr(error))
            await asyncio.sleep(pause_seconds)
