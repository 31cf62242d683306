"""A hundred thousand contacts: imported, enqueued and expanded while the daemon stays small and answers."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import orjson
import pytest

from smsd.simulator import Simulator
from system.harness import LOOK_SECONDS, Daemon, Installation

N = 100_000
GROWTH_BYTES = 60 << 20
ANSWER_SECONDS = 0.1
LONGEST_SECONDS = 0.5  # on a machine that other tests share
ENQUEUE_SECONDS = 0.2

# A process of its own: what it measures must not wait for the loop of the test.
ASKER = """
import http.client, json, sys, threading, time
host, port = sys.argv[1].removeprefix("http://").split(":")
done = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
took = []
connection = http.client.HTTPConnection(host, int(port), timeout=10)
while not done.wait(0.02):
    started_at = time.monotonic()
    connection.request("GET", "/healthz")
    response = connection.getresponse()
    response.read()
    assert response.status == 200
    took.append(time.monotonic() - started_at)
print(json.dumps(took))
"""


@dataclass
class Watched:
    """What was seen of a daemon during something."""

    grown_bytes: int = 0
    answer_seconds: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """The time within which this share (0 to 1) of the answers came."""
        return sorted(self.answer_seconds)[int(share * (len(self.answer_seconds) - 1))]

    def __str__(self) -> str:
        return (
            f"grown by {self.grown_bytes / 2**20:.1f} MiB, {len(self.answer_seconds)} answers, "
            f"p99 {self.percentile(0.99) * 1000:.0f} ms, max {self.percentile(1) * 1000:.0f} ms"
        )


@contextlib.asynccontextmanager
async def watching(daemon: Daemon) -> AsyncIterator[Watched]:
    """Asks /healthz fifty times a second, and looks at the daemon's memory."""
    seen = Watched()
    before = daemon.resident_bytes()
    asker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ASKER, daemon.url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )

    async def look() -> None:
        while True:
            seen.grown_bytes = max(seen.grown_bytes, daemon.resident_bytes() - before)
            await asyncio.sleep(LOOK_SECONDS)

    looking = asyncio.create_task(look())
    try:
        yield seen
    finally:
        looking.cancel()
        out, _ = await asker.communicate(b"")
    seen.answer_seconds = orjson.loads(out)


@pytest.mark.alone
async def test_a_hundred_thousand_contacts_neither_fill_the_daemon_nor_hold_it_up(
    installation: Installation, mitto: Simulator
) -> None:
    await installation.migrate()
    daemon = await installation.serve()
    warm = await (await installation.shop()).with_contacts(5_000)
    await (await warm.send()).received()
    # Two requests a second: what is measured is not the simulator's share of this machine.
    shop = await installation.shop(requestsPerSecond=2)

    async with watching(daemon) as importing:
        await shop.with_contacts(N)
    async with watching(daemon) as expanding:
        campaign = await shop.draft()
        reply = await campaign.enqueue()
        status = await campaign.until(lambda status: status["expansion"]["done"])

    assert reply.status == 202
    assert reply.body["queued"] == status["metrics"]["total"] == N
    print(f"enqueue {reply.seconds * 1000:.0f} ms; import: {importing}; expansion: {expanding}")  # noqa: T201
    assert reply.seconds < ENQUEUE_SECONDS
    for seen in (importing, expanding):
        assert len(seen.answer_seconds) > 20
        assert seen.percentile(0.95) < ANSWER_SECONDS
        assert seen.percentile(1) < LONGEST_SECONDS
        assert seen.grown_bytes < GROWTH_BYTES
    await campaign.act("cancel")
    await campaign.until(lambda status: not status["metrics"]["processing"])
    await installation.audit()
