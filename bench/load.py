"""Who posts receipts, and who takes them doing nothing, each as a process of its own.

  python -m bench.load post URL BODIES CONNECTIONS   says "ready", waits for a line, posts each line of the file BODIES
                                                     as a request, says "done {…}" with its figures
  python -m bench.load take                          says "listens on URL": the bare handler, which parses and answers

The poster speaks HTTP/1.1 over kept connections by itself, with bytes that were made beforehand: one request at a time
on each, the next as soon as the answer is whole. It costs a fraction of what any server does, and so leaves the server
to be measured.
"""

import asyncio
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import orjson
import uvloop
from aiohttp import web

PATH = "/webhooks/mitto/dlr"
ACCEPTED = b"HTTP/1.1 202"
END, LENGTH = b"\r\n\r\n", b"\r\ncontent-length:"


def requests_of(bodies: list[bytes], host: str) -> list[bytes]:
    """The bytes of a POST of each body, with the headers that the simulator sends."""
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nAccept: */*\r\nContent-Type: application/json\r\n"
    )
    return [head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies]


class Poster(asyncio.Protocol):
    """One connection: posts what is left until nothing is."""

    def __init__(self, left: Iterator[bytes], seconds: list[float]) -> None:
        self._left, self._seconds = left, seconds
        self.done = asyncio.get_running_loop().create_future()
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed a connection"))

    def post(self) -> None:
        """The next request, if there is one."""
        request = next(self._left, None)
        if request is None:
            self.done.set_result(None)
            return
        self._posted_at = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head = self._answer.find(END)
        if head < 0:
            return
        start = self._answer[:head].lower().find(LENGTH) + len(LENGTH)
        length = int(self._answer[start : self._answer.index(b"\r", start)])
        if len(self._answer) < head + len(END) + length:
            return
        if not self._answer.startswith(ACCEPTED):
            if not self.done.done():
                self.done.set_exception(RuntimeError(f"answered {self._answer[:300]!r}"))
            return
        self._seconds.append(time.perf_counter() - self._posted_at)
        self._answer = b""
        self.post()


async def post(url: str, file: str, connections: str) -> None:
    """Posts all, and says how long that took and what an answer took: p50 and p99."""
    parts = urlsplit(url)
    bodies = await asyncio.to_thread(Path(file).read_bytes)
    requests = requests_of(bodies.splitlines(), parts.netloc)
    seconds: list[float] = []
    left = iter(requests)
    loop = asyncio.get_running_loop()
    posters = [
        (
            await loop.create_connection(
                lambda: Poster(left, seconds), parts.hostname or "", parts.port or 80
            )
        )[1]
        for _ in range(int(connections))
    ]
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    begun, used = time.perf_counter(), time.process_time()
    for poster in posters:
        poster.post()
    await asyncio.gather(*(poster.done for poster in posters))
    took = time.perf_counter() - begun
    seconds.sort()
    figures = {
        "seconds": took,
        "cpu": time.process_time() - used,
        "p50": seconds[len(seconds) // 2],
        "p99": seconds[len(seconds) * 99 // 100],
        "answered": len(seconds),
    }
    print("done", orjson.dumps(figures).decode(), flush=True)
    await asyncio.Event().wait()


async def take() -> None:
    """The bare handler, on the server that the daemon has."""

    async def handle(request: web.Request) -> web.Response:
        document = orjson.loads(await request.read())
        received = len(document) if isinstance(document, list) else 1
        answer = orjson.dumps({"ok": True, "received": received, "updated": received})
        return web.Response(body=answer, status=202, content_type="application/json")

    app = web.Application()
    app.router.add_post(PATH, handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    host, port = runner.addresses[0][:2]
    print(f"listens on http://{host}:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(post(*sys.argv[2:]) if sys.argv[1] == "post" else take())
