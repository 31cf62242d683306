"""What the tests of the queue and of the loops around it share: more than one shop, a clock that is moved by hand,
and the audit as their oracle."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from shop import Shop

from smsd import audit, config, credits, database, mitto, queue, tenants
from smsd.housekeeping import Housekeeping
from smsd.sender import Sender

GUARD_US = 30_000
SECOND_US = 1_000_000


async def new_account(pool: database.Pool, provider_id: str = "main", **fields: Any) -> int:
    """A traffic account, unlimited for a test's purposes; its id."""
    given: dict[str, Any] = {
        "name": provider_id, "api_key": "key", "requests_per_second": 50_000, "messages_per_second": None,
        "max_in_flight": None, "webhook_secret": None, "server_error_means": "refused",
    }  # fmt: skip
    async with pool.acquire() as connection, connection.transaction():
        account = await tenants.create_account(
            connection, provider_id=provider_id, **(given | fields)
        )
    return account.id


async def open_shop(
    pool: database.Pool, account_id: int, replica_id: int, granted: int = 10_000, **fields: Any
) -> Shop:
    """One more tenant on an account, whose messages get ids and numbers that no other shop has."""
    given: dict[str, Any] = {
        "name": "Shop", "sender": "Shop", "requests_per_second": 50_000, "messages_per_second": None, "weight": 1.0,
        "batch_size": None, "subscription": "active", "timezone": "UTC", "default_country": "GR",
    }  # fmt: skip
    async with pool.acquire() as connection, connection.transaction():
        tenant = await tenants.create_tenant(connection, account_id=account_id, **(given | fields))
        await credits.grant(connection, tenant.id, granted, "test")
    shop = Shop(pool, tenant.id, account_id, replica_id)
    shop.provider_ids = tenant.id * 1_000_000
    shop.phones += tenant.id * 1_000_000
    return shop


async def broken(pool: database.Pool) -> dict[str, str | None]:
    """The promises that the audit finds broken, each with its example."""
    async with pool.acquire() as connection:
        # A loop that was cancelled while it prepared a statement may have left its connection in a transaction.
        await connection.execute("rollback")
        return {check.name: check.example for check in await audit.run(connection) if check.broken}


async def assert_sound(pool: database.Pool) -> None:
    """The audit finds nothing."""
    assert await broken(pool) == {}


async def eventually(
    news: asyncio.Event, holds: Callable[[], Awaitable[object]], seconds: float = 20
) -> None:
    """Returns once something holds; looks whenever `news` comes."""
    async with asyncio.timeout(seconds):
        while True:
            news.clear()
            if await holds():
                return
            await news.wait()


class Clock:
    """The limiter's clock of one database, moved by hand."""

    def __init__(self, pool: database.Pool, now_us: int) -> None:
        self.pool, self.now_us = pool, now_us

    async def move(self, us: int) -> None:
        """Goes on by so many microseconds, or back."""
        self.now_us += us
        await self.pool.execute("update hand_clock set us = $1", self.now_us)


async def take_the_clock(pool: database.Pool) -> Clock:
    """From now on the limiters of this database go by our clock, which starts at the present."""
    now_us = await pool.fetchval("select clock_us()")
    await pool.execute(
        f"create table hand_clock as select {now_us}::bigint as us;"
        "create or replace function clock_us() returns bigint language sql volatile as"
        " $$ select us from hand_clock $$"
    )
    return Clock(pool, now_us)


def largest_window(costs: list[tuple[int, int]], width_us: int) -> int:
    """The most cost that any window [t, t + width) over (time, cost) holds."""
    ordered = sorted(costs)
    largest = inside = oldest = 0
    for at, cost in ordered:
        inside += cost
        while at >= ordered[oldest][0] + width_us:
            inside -= ordered[oldest][1]
            oldest += 1
        largest = max(largest, inside)
    return largest


# ----------------------------------------------------------------------------------------- sending


@dataclass
class Sending:
    """A sender at work. `settled` is set whenever a batch's way has ended."""

    pool: database.Pool
    sender: Sender
    standing: queue.Standing
    settled: asyncio.Event

    async def until(self, holds: Callable[[], Awaitable[object]], seconds: float = 20) -> None:
        """Returns once something holds; looks whenever a batch's way has ended."""
        await eventually(self.settled, holds, seconds)

    async def until_done(self) -> None:
        """Returns once nothing is ready, waiting or on its way."""
        await self.until(lambda: self.pool.fetchval("select min(state) >= 10 from batch"))


@contextlib.asynccontextmanager
async def sending(
    pool: database.Pool,
    replica_id: int,
    mitto_url: str,
    *,
    keep_house: bool = False,
    **settings: object,
) -> AsyncIterator[Sending]:
    """A sender and what wakes it, as the daemon has them; stopped in order at the end. `keep_house`: with heartbeat
    and reaping. Settings by their names; time-out 5 s, retries after 20 ms."""
    given = {"mitto_timeout": 5, "backoff_seconds": 0.02} | settings
    loaded = config.load({f"SMSD_{name.upper()}": str(value) for name, value in given.items()})
    standing = queue.Standing("test", 30, replica_id, mitto.clock())
    settled = asyncio.Event()
    housekeeping = Housekeeping(pool, standing)

    def on_settled() -> None:
        housekeeping.wake()
        settled.set()

    async with mitto.Client(mitto_url, loaded.mitto_timeout) as client:
        sender = Sender(pool, client, standing, loaded, on_settled)
        news = {"smsd_lane": lambda account: sender.wake(int(account))}
        loops = [sender.run(), database.listen(pool, news, on_lost=lambda: sender.wake(None))]
        if keep_house:
            loops += [housekeeping.beat(), housekeeping.keep()]
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            yield Sending(pool, sender, standing, settled)
        finally:
            async with asyncio.timeout(20):
                await sender.stop()
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for fault in ended:
            if isinstance(fault, Exception):
                raise fault


# ------------------------------------------------------------------------- a Postgres that loses answers


class Relay:
    """A relay before Postgres that loses some answers: what was asked is done, and nobody hears of it."""

    def __init__(self, dsn: str, folder: Path, seed: int) -> None:
        self._target, self._folder, self._dice = urlsplit(dsn), folder, random.Random(seed)
        self.losing = 0.0
        self.lost = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def dsn(self) -> str:
        """How to reach the same database by way of the relay."""
        user = self._target.netloc.rpartition("@")[0]
        where = f"host={self._folder}&port=5432&sslmode=disable"
        return f"postgresql://{user}@/{self._target.path.lstrip('/')}?{where}"

    async def __aenter__(self) -> "Relay":
        path = self._folder / ".s.PGSQL.5432"
        self._server = await asyncio.start_unix_server(self._serve, path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        query = parse_qs(self._target.query)
        if "host" in query:
            port = query.get("port", ["5432"])[0]
            return await asyncio.open_unix_connection(f"{query['host'][0]}/.s.PGSQL.{port}")
        return await asyncio.open_connection(self._target.hostname, self._target.port or 5432)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        up_reader, up_writer = await self._connect()
        asking = asyncio.create_task(self._pump(reader, up_writer, lossy=False))
        answering = asyncio.create_task(self._pump(up_reader, writer, lossy=True))
        try:
            await asyncio.wait({asking, answering}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asking.cancel()
            answering.cancel()
            up_writer.transport.abort()
            writer.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, lossy: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if lossy and self._dice.random() < self.losing:
                    self.lost += 1
                    return
                writer.write(data)
                await writer.drain()
