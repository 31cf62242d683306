"""A TCP proxy that does harm: between a daemon and Mitto, or between a daemon and Postgres.

Each piece that a client sends (for Mitto about a request, for Postgres about a statement) may be struck by the harm
of the moment; connections that are kept for long are struck like new ones.
"""

import asyncio
import contextlib
import random
import socket
import struct
import time
from enum import StrEnum
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit, urlunsplit

from smsd.simulator.wire import lay_seconds

_NO_LINGER = struct.pack("ii", 1, 0)
_PIECE = 65_536
_DRIPS, _DRIP_SECONDS = 10, 0.05


class Harm(StrEnum):
    """What befalls a piece that a client sends, or its answer."""

    NONE = "none"
    REFUSED = "refused"  # nobody listens, and every connection is cut
    BLACK_HOLE = "black hole"  # taken, never passed on, never answered
    RESET_BEFORE = "reset before"  # not a byte of it is passed on
    RESET_IN = "reset in"  # half of it is
    RESET_AFTER = "reset after"  # all of it is, and its answer is lost
    HALF_ANSWER = "half answer"
    SLOW = "slow drip"  # passed on drop by drop, and so is its answer
    LATE = "late"  # the answer waits
    CLOSED = "closed under us"  # closed in order right after the answer


class Proxy:
    """Listens on a port of its own and passes everything on to one address: (host, port), or a Unix socket's path."""

    def __init__(self, target: tuple[str, int] | str, seed: int = 0) -> None:
        self._target = target
        self._dice = random.Random(seed)
        self.harm = Harm.NONE
        self.share = 1.0
        """Of the pieces, those that are struck."""
        self.struck = 0
        self.late: list[tuple[float, float]] = []
        """(from, to) by `time.monotonic`: when pieces lay in the kernel as this process had other things to do."""
        self._port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._deafen()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def do(self, harm: Harm, share: float = 1.0) -> None:
        """From now on this harm, to this share of the pieces."""
        if harm is Harm.REFUSED:
            self.struck += 1
            self._deafen()
        elif self._server is None:
            await self._listen()
        if harm is Harm.NONE:
            for connection in self._connections:
                if connection.swallows:
                    connection.reset()
        self.harm, self.share = harm, share

    def draw(self) -> Harm:
        """The harm that strikes the next piece."""
        if self.harm is Harm.NONE or self._dice.random() >= self.share:
            return Harm.NONE
        self.struck += 1
        return self.harm

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def _deafen(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for connection in self._connections:
            connection.reset()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            if isinstance(self._target, str):
                up = await asyncio.open_unix_connection(self._target)
            else:
                up = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(self, (reader, writer), up)
        self._connections.add(connection)
        try:
            # Swallowed at the end: on Python 3.11 the server asks a task that was cancelled for its exception.
            with contextlib.suppress(asyncio.CancelledError):
                await connection.run()
        finally:
            self._connections.discard(connection)


class _Connection:
    """One connection of a client and the one behind it."""

    def __init__(
        self,
        proxy: Proxy,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = client
        self._from_server, self._to_server = server
        self._answer = Harm.NONE
        self.swallows = False

    async def run(self) -> None:
        pumps = {asyncio.create_task(self._ask()), asyncio.create_task(self._tell())}
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._to_client.close()
            self._to_server.close()

    def reset(self) -> None:
        """Cuts both sides; the client's with an RST."""
        raw: Any = self._to_client.get_extra_info("socket")
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self._to_client.transport.abort()
        self._to_server.transport.abort()

    async def _ask(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._from_client.read(_PIECE):
                if not self.swallows and not await self._pass_on(data):
                    return

    async def _pass_on(self, data: bytes) -> bool:
        """Whether the connection goes on."""
        harm = self._proxy.draw()
        match harm:
            case Harm.BLACK_HOLE:
                self.swallows = True
                return True
            case Harm.REFUSED | Harm.RESET_BEFORE:
                self.reset()
                return False
            case Harm.RESET_IN:
                await _write(self._to_server, data[: len(data) // 2])
                self.reset()
                return False
            case Harm.SLOW:
                self._answer = harm
                await _drip(self._to_server, data)
            case _:
                self._answer = harm
                await _write(self._to_server, data)
                self._note_delay()
        return True

    def _note_delay(self) -> None:
        if delay := lay_seconds(self._to_client.transport):
            now = time.monotonic()
            self._proxy.late.append((now - delay, now + 0.05))

    async def _tell(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._from_server.read(_PIECE):
                harm, self._answer = self._answer, Harm.NONE
                if self.swallows:
                    continue
                match harm:
                    case Harm.RESET_AFTER:
                        self.reset()
                        return
                    case Harm.HALF_ANSWER:
                        await _write(self._to_client, data[: len(data) // 2])
                        return
                    case Harm.SLOW:
                        await _drip(self._to_client, data)
                    case Harm.LATE:
                        await asyncio.sleep(_DRIPS * _DRIP_SECONDS / 4)
                        await _write(self._to_client, data)
                    case _:
                        await _write(self._to_client, data)
                if harm is Harm.CLOSED:
                    return


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


async def _drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    size = -(-len(data) // _DRIPS)
    for start in range(0, len(data), size):
        await _write(writer, data[start : start + size])
        await asyncio.sleep(_DRIP_SECONDS)


def to_mitto(url: str, seed: int = 0) -> Proxy:
    """A proxy before the HTTP server at this URL."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return Proxy((parts.hostname, parts.port), seed)


def to_postgres(dsn: str, seed: int = 0) -> Proxy:
    """A proxy before the Postgres of this URL, on a Unix socket or a port."""
    parts = urlsplit(dsn)
    query = parse_qs(parts.query)
    if "host" in query:
        port = query.get("port", ["5432"])[0]
        return Proxy(f"{query['host'][0]}/.s.PGSQL.{port}", seed)
    return Proxy((parts.hostname or "127.0.0.1", parts.port or 5432), seed)


def dsn_through(proxy: Proxy, dsn: str) -> str:
    """The URL of the same database by way of the proxy."""
    parts = urlsplit(dsn)
    user = parts.netloc.rpartition("@")[0]
    netloc = f"{user}@{proxy.address}" if user else proxy.address
    return urlunsplit(parts._replace(netloc=netloc, query="sslmode=disable"))
