"""Receipts: 64 connections post them as fast as they are answered, one a request, then arrays of 100.

smsd answers a receipt when it is committed; the bare handler parses and answers, and keeps nothing. Client, bytes and
server (aiohttp on uvloop) are the same for both. The messages were really sent, by the daemon to the simulator, so that
what a receipt finds is as large and as old as it will be; afterwards every one of them must be delivered, by its own
row and by its campaign's counters, as soon as the last answer is there.
"""

import asyncio
import random
import sys
import uuid
from pathlib import Path

import orjson

from bench import campaigns
from bench.common import Machine, Mitto, Options, Process, Results, alternate, report
from smsd.database import Connection

MESSAGES, QUICK_MESSAGES = 100_000, 2_000
"""So many one by one, and so many in arrays."""
CONNECTIONS = 64
ARRAY = 100
ARRAYS = "arrays: "
DISORDER = 10_000
"""Receipts come about in the order in which messages were accepted: this far off."""
UPDATED_AT = "2026-01-05T10:00:00.000Z"
IDS = "select provider_id from message_shown where campaign_id = $1 order by id"
ACCOUNT = (
    "select count(*) filter (where state = 30 and finished_at is not null) as delivered,"
    " (select sum(delivered) from campaign_counter where campaign_id = $1)::bigint as counted,"
    " (select sum(pending) from campaign_counter where campaign_id = $1)::bigint as pending,"
    " (select count(*) from early_receipt) + (select count(*) from raw_receipt) as kept"
    " from message where campaign_id = $1"
)


class Receipts:
    """The variants on one Postgres and one simulator; n receipts one by one, and n in arrays."""

    def __init__(self, machine: Machine, mitto: Mitto, n: int) -> None:
        self._machine, self._mitto, self._n = machine, mitto, n

    async def smsd(self) -> dict[str, float]:
        """The daemon: each answered after its commit."""
        async with campaigns.installation(self._machine, self._mitto, 2 * self._n) as sent:
            await self._mitto.switch()
            await sent.burst()
            await self._machine.settle()
            campaign_id = await sent.db.fetchval("select id from campaign")
            ids = [row["provider_id"] for row in await sent.db.fetch(IDS, campaign_id)]
            figures = await self._posted(sent.daemon, sent.daemon.url, ids)
            await _check_account(sent.db, campaign_id, 2 * self._n)
            await sent.audited()
            return figures

    async def bare(self) -> dict[str, float]:
        """The handler that keeps nothing."""
        server = Process("handler", self._machine.folder)
        await server.start((sys.executable, "-m", "bench.load", "take"))
        try:
            url = (await server.said("listens on")).split()[-1]
            ids = [f"{number:026d}" for number in range(2 * self._n)]
            return await self._posted(server, url, ids)
        finally:
            await server.stop()

    async def _posted(self, server: Process, url: str, ids: list[str]) -> dict[str, float]:
        dice = random.Random(1)
        ids = [
            ids[place]
            for place in sorted(range(len(ids)), key=lambda p: p + dice.random() * DISORDER)
        ]
        one_by_one = [orjson.dumps(_receipt(one)) for one in ids[: self._n]]
        rest = ids[self._n :]
        arrays = [
            orjson.dumps([_receipt(one) for one in rest[start : start + ARRAY]])
            for start in range(0, len(rest), ARRAY)
        ]
        singly = await self._load(server, url, one_by_one)
        in_arrays = await self._load(server, url, arrays)
        return {**singly, **{ARRAYS + name: value for name, value in in_arrays.items()}}

    async def _load(self, server: Process, url: str, bodies: list[bytes]) -> dict[str, float]:
        """Posts these bodies, in which there are n receipts."""
        n = self._n
        file = self._machine.folder / f"bodies-{uuid.uuid4().hex[:6]}"
        await asyncio.to_thread(file.write_bytes, b"\n".join(bodies))
        client = Process("poster", self._machine.folder)
        await client.start(
            (sys.executable, "-m", "bench.load", "post", url, str(file), str(CONNECTIONS))
        )
        try:
            await client.said("ready")
            before = server.cpu_seconds(), self._machine.cpu_seconds()
            await client.tell("go")
            line = await client.said("done", 300, look=0.05)
            after = server.cpu_seconds(), self._machine.cpu_seconds()
        finally:
            await client.stop()
            await asyncio.to_thread(Path.unlink, file)
        found = orjson.loads(line.partition(" ")[2])
        if found["answered"] != len(bodies):
            raise campaigns.Wrong(f"{found['answered']:,} of {len(bodies):,} requests are answered")
        ms = {"p50 ms": found["p50"] * 1000, "p99 ms": found["p99"] * 1000}
        cpu = {
            "server µs CPU": (after[0] - before[0]) / n * 1e6,
            "Postgres µs CPU": (after[1] - before[1]) / n * 1e6,
            "client µs CPU": found["cpu"] / n * 1e6,
        }
        return {"receipts/s": n / found["seconds"], **ms, **cpu}


def _receipt(provider_id: str) -> dict[str, str]:
    """A receipt as Mitto writes them."""
    return {
        "messageId": provider_id,
        "deliveryStatus": "Delivered",
        "updatedAt": UPDATED_AT,
        "description": "Message delivered to handset",
    }


async def _check_account(db: Connection, campaign_id: int, n: int) -> None:
    """Raises Wrong unless all messages of the campaign are delivered, and everything says so."""
    row = await db.fetchrow(ACCOUNT, campaign_id)
    assert row is not None
    if tuple(row.values()) != (n, n, 0, 0):
        raise campaigns.Wrong(f"{n:,} receipts were answered, and there are {dict(row)}")


async def run(machine: Machine, options: Options) -> None:
    """The benchmark: two tables, as one by one and in arrays are two things to compare."""
    n = options.messages[0] if options.messages else QUICK_MESSAGES if options.quick else MESSAGES
    async with Mitto(machine.folder) as mitto:
        receipts = Receipts(machine, mitto, n)
        variants = {"bare": receipts.bare, "smsd": receipts.smsd}
        results = await alternate(variants, options.runs, machine.settle)
    how = f"by {CONNECTIONS} connections, answered after commit"
    for name, arrays, title in (
        ("receipts", False, f"Receipts one a request {how}"),
        ("receipts-arrays", True, f"Receipts in arrays of {ARRAY} {how}"),
    ):
        report(
            name, _half(results, arrays=arrays), machine, options, reference="bare",
            figure="receipts/s", title=title, settings={"receipts": n, "connections": CONNECTIONS},
        )  # fmt: skip


def _half(results: Results, *, arrays: bool) -> Results:
    """The figures of the arrays, or the others."""
    return {
        variant: {
            name.removeprefix(ARRAYS): values
            for name, values in figures.items()
            if name.startswith(ARRAYS) is arrays
        }
        for variant, figures in results.items()
    }
