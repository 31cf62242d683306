"""The daemon on one page: what starts, in which order, and how it stops.

Start: embedded Postgres if there is no other → HTTP (an absent database shows in /readyz, not as a restart) → READY →
schema → registration → rehearsal → loops. Stop, within `SMSD_SHUTDOWN_SECONDS`: nothing new is claimed, what Mitto
has is waited for and written while receipts are still taken, HTTP closes, loops end, this replica says goodbye.
Whatever stands in between when the process is killed instead is what the next one finds in the database.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import structlog

from smsd import (
    api,
    database,
    embedded,
    metrics,
    mitto,
    queue,
    receipts,
    recovery,
    rehearsal,
    telemetry,
    tenants,
)
from smsd.api.endpoint import Context
from smsd.config import Settings
from smsd.database import Pool
from smsd.expander import Expander
from smsd.housekeeping import Housekeeping
from smsd.importer import Importer
from smsd.receipts import Inbox
from smsd.resolver import Resolver
from smsd.retention import Retention
from smsd.sender import Sender

log = structlog.get_logger()

TICK_SECONDS = 1.0
KEEP_SECONDS = 0.5
UNWIND_SECONDS = 3.0
"""What is kept of the shutdown budget for closing HTTP, loops and connections."""
LEAST_SHARE = 3
"""Three tenths of the connections, and no fewer than this, are for new work: expanding, claims, intents. More at once
take Postgres longer where it shares two cores with us."""


class ListenError(Exception):
    """The address cannot be listened on; the one line says which and what to do next."""


async def serve(
    settings: Settings,
    *,
    on_ready: Callable[[str], None] = lambda _url: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Runs until SIGTERM or SIGINT, or until `stop` is set. `on_ready` gets the base URL once campaigns can be sent.
    Raises SchemaError when the schema does not suit, EmbeddedError when there is no Postgres to be started,
    ListenError when somebody else listens already."""
    stop = stop or asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_signals(stop))
        (await stack.enter_async_context(_Loops(stop))).start("tick", _tick())
        # First of all the address: links to this daemon are made from the port that it really has.
        listener = stack.enter_context(_listener(settings))
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        _warn(settings)
        dsn = await stack.enter_async_context(postgres(settings))
        pool = await database.open_pool(dsn, settings.pool_size, recovery.greet)
        stack.push_async_callback(_close, pool)
        client = await stack.enter_async_context(
            mitto.Client(settings.mitto_base_url, settings.mitto_timeout)
        )
        keys = settings.signing_keys

        standing = queue.Standing(f"{socket.gethostname()}:{os.getpid()}", settings.lease_seconds)
        memory = recovery.Memory()
        housekeeping = Housekeeping(pool, standing, memory)
        share = database.Share(pool, max(LEAST_SHARE, settings.pool_size * 3 // 10))
        expander = Expander(share, standing, keys, settings.link_base)
        importer = Importer(pool, lambda: standing.replica_id)
        inbox = Inbox(pool)
        resolver = Resolver(pool, client, settings)
        sender = Sender(
            pool, client, standing, settings, housekeeping.wake, resolver.order_holds, memory, share
        )

        def look_everywhere() -> None:
            sender.wake(None)
            expander.wake()

        stack.push_async_callback(_goodbye, pool, standing)
        loops = await stack.enter_async_context(_Loops(stop))
        nudges = {
            "expander": expander.wake,
            "importer": importer.wake,
            "housekeeping": housekeeping.wake,
        }
        context = Context(
            pool=pool, settings=settings, keys=keys, nudge=lambda name: nudges[name](),
            receipts=inbox, mitto=client, replica=standing, sending=sender,
        )  # fmt: skip
        url = await stack.enter_async_context(_http(context, listener))
        log.info("http.listening", url=url)
        telemetry.notify_systemd("READY=1")

        async def prepare() -> None:
            await _prepare(dsn, settings, pool, keys, housekeeping)

        # Postgres may go away again between any two of its statements.
        if not await _before(stop, database.until_written(prepare)):
            return
        for name, loop in {
            "heartbeat": housekeeping.beat(),
            "housekeeping": housekeeping.keep(),
            "receipts": inbox.run(),
            "early receipts": receipts.sweep(pool),
            "retention": Retention(pool, settings.retention_days).run(),
            "expander": expander.run(),
            "importer": importer.run(),
            "sender": sender.run(),
            "resolver": resolver.run(),
            "news": database.listen(
                pool,
                {
                    "smsd_lane": lambda account: sender.wake(int(account)),
                    "smsd_expansion": lambda _campaign: expander.wake(),
                },
                on_lost=look_everywhere,
            ),
        }.items():
            loops.start(name, loop)
        log.info("daemon.started", url=url, replica=standing.replica_id)
        on_ready(url)
        await stop.wait()

        telemetry.notify_systemd("STOPPING=1")
        log.info("daemon.stopping", seconds=settings.shutdown_seconds)
        try:
            async with asyncio.timeout(settings.shutdown_seconds - UNWIND_SECONDS):
                await sender.stop()
        except TimeoutError:
            log.error(
                "daemon.stopped_late", detail="requests in flight did not end: they are unknown"
            )
    log.info("daemon.stopped")


# ------------------------------------------------------------------------------------------- parts


@contextlib.asynccontextmanager
async def postgres(settings: Settings, *, beside: bool = False) -> AsyncIterator[str]:
    """The database to use: the one of the settings, or an embedded one that lives as long as this context.
    beside: the embedded one of a daemon that runs will do."""
    if settings.database_url is not None:
        yield settings.database_url.get_secret_value()
        return
    data_dir = settings.data_dir.expanduser()
    if beside and await _answers(embedded.dsn_of(data_dir)):
        yield embedded.dsn_of(data_dir)
        return
    async with embedded.Postgres(data_dir, postgres_bin=settings.postgres_bin) as server:
        keeping = asyncio.create_task(_keep(server), name="postgres")
        try:
            yield server.dsn
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)


async def _answers(dsn: str) -> bool:
    try:
        connection = await database.connect(dsn)
    except database.AWAY:
        return False
    await connection.close()
    return True


async def _keep(server: embedded.Postgres) -> None:
    """Brings the embedded Postgres back whenever it has died: it is ours, so nobody else will."""
    while True:
        await asyncio.sleep(KEEP_SECONDS)
        if server.pid is None:
            log.error("postgres.died", detail=await server.wait_exit())
            try:
                await server.start()
            except embedded.EmbeddedError as error:
                log.error("postgres.not_started", detail=str(error))


async def migrate(dsn: str) -> list[str]:
    """Brings the schema up to date and makes sure there is a signing key; the names of migrations that ran."""
    ran = await database.migrate(dsn)
    connection = await database.connect(dsn)
    try:
        await tenants.ensure_signing_key(connection)
    finally:
        await connection.close()
    return ran


async def _prepare(
    dsn: str, settings: Settings, pool: Pool, keys: list[bytes], housekeeping: Housekeeping
) -> None:
    """Waits for Postgres, as long as that takes; checks the schema; reads the signing keys; registers; rehearses."""
    await database.wait_for(dsn, lambda error: log.warning("database.awaited", error=repr(error)))
    if settings.auto_migrate or settings.database_url is None:
        for name in await migrate(dsn):
            log.info("schema.migrated", migration=name)
    await database.check_schema(pool)
    stored = await tenants.signing_keys(pool)
    if settings.database_url is None:
        await queue.bury_all(pool)  # the folder's lock is ours: nobody else can be alive
    await housekeeping.register()
    keys.extend(stored)
    await rehearsal.rehearse(pool, settings.pool_size)


async def _before(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Runs `work`. False: told to stop before it was done."""
    stopping = asyncio.create_task(stop.wait())
    working = asyncio.create_task(work)
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        working.result()
        return True
    finally:
        stopping.cancel()
        working.cancel()
        await asyncio.gather(stopping, working, return_exceptions=True)


@contextlib.asynccontextmanager
async def _http(context: Context, listener: socket.socket) -> AsyncIterator[str]:
    settings = context.settings
    async with api.serving(context, listener):
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        yield f"http://{host}:{settings.port}"


def _listener(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[0].lower()
        raise ListenError(
            f"cannot listen on {settings.host}:{settings.port} ({why}): set SMSD_HOST and SMSD_PORT to an "
            "address of this machine and a port that is free"
        ) from None


def _warn(settings: Settings) -> None:
    """What works, and is not what one wants in production."""
    for name in settings.weak_secrets:
        log.warning("settings.secret_is_short", name=name, detail="take 16 characters or more")
    if settings.public_url is None and not settings.on_loopback:
        log.warning(
            "settings.public_url_missing",
            detail=f"unsubscribe links start with {settings.link_base}: set SMSD_PUBLIC_URL",
        )


class _Loops:
    """Background loops: when one dies, everything stops; when everything stops, they are cancelled in reverse."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._tasks: list[asyncio.Task[Any]] = []
        self._fault: BaseException | None = None

    async def __aenter__(self) -> "_Loops":
        return self

    def start(self, name: str, loop: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(loop, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("loop.died", loop=task.get_name(), exc_info=error)
            self._fault = self._fault or error
            self._stop.set()

    async def __aexit__(self, *_: object) -> None:
        for task in reversed(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._fault is not None:
            raise self._fault


async def _tick() -> None:
    """Feeds systemd's watchdog as long as the event loop turns. It asks nothing of the database: an outage there
    must not kill every daemon in the middle of its requests."""
    seconds = min(telemetry.watchdog_seconds() or TICK_SECONDS, TICK_SECONDS)
    while True:
        telemetry.notify_systemd("WATCHDOG=1")
        asleep = metrics.Sleeper()
        await asyncio.sleep(seconds)
        asleep.slept(seconds)


async def _goodbye(pool: Pool, standing: queue.Standing) -> None:
    if not standing.replica_id:
        return
    with contextlib.suppress(*database.AWAY):
        async with asyncio.timeout(2):
            await queue.leave(pool, standing.replica_id, "stopped")


async def _close(pool: Pool) -> None:
    try:
        async with asyncio.timeout(2):
            await pool.close()
    except TimeoutError:
        pool.terminate()


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """First SIGTERM or SIGINT: stop in order. Second: exit now."""
    loop = asyncio.get_running_loop()

    def hear() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, hear)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
