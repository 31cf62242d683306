"""Enqueue → last result recorded: personalised messages with unsubscribe links, no limits.

smsd, its daemon a process as in production, against the bare pipeline (bench/bare.py) and against general queues
(bench/peers.py); "batches" is the bare pipeline that claims rows that stand for batches, "simulator" what the simulator
alone can take. The simulator and the Postgres are the same for all; receipts are off, they have a benchmark of their
own. A run's time begins when the work is asked for, by a request or a line, and ends when its last result is committed.
"""

import asyncio
import importlib.util
import sys
import time
from typing import Any

import asyncpg

from bench import bare
from bench.common import Daemon, Machine, Mitto, Options, Process, Variant, alternate, report, shop

MESSAGES, QUICK_MESSAGES = 100_000, 1_000
LOOK_SECONDS, LAST_LOOK_SECONDS = 0.02, 0.002
"""How often it is looked for the end: the last of them as for a peer, seldom before, as each look is a query."""
LIMIT_SECONDS = 300.0
TEXT = "Hi {{firstName}}, 20% off everything until Sunday at the corner shop."
"""smsd appends the unsubscribe link to it, on a line of its own, as it does to every marketing text."""
PEERS = ("pgqueuer", "procrastinate")
RECORDED = (
    "select coalesce(sum(pending + delivered), 0) from campaign_counter where campaign_id = $1"
)


class Pipeline:
    """The variants, all on one Postgres and one simulator."""

    def __init__(self, machine: Machine, mitto: Mitto, n: int) -> None:
        self._machine, self._mitto, self._n = machine, mitto, n

    async def smsd(self) -> dict[str, float]:
        """The daemon: expands, limits, accounts and sends as it always does."""
        async with self._machine.database() as dsn:
            tenant = await shop(dsn, self._n)
            async with Daemon(dsn, self._mitto, self._machine.folder) as daemon:
                body = {"name": "Sale", "messageText": TEXT}
                campaign = (await daemon.ask("POST", "/api/campaigns", tenant.key, body))["id"]
                looking = await asyncpg.connect(dsn)
                try:
                    watch = await self._begin(daemon)
                    path = f"/api/campaigns/{campaign}/enqueue"
                    await daemon.ask("POST", path, tenant.key)
                    async with asyncio.timeout(LIMIT_SECONDS):
                        while (recorded := await looking.fetchval(RECORDED, campaign)) < self._n:
                            often = recorded >= 0.98 * self._n
                            await asyncio.sleep(LAST_LOOK_SECONDS if often else LOOK_SECONDS)
                    return await self._end(watch, daemon)
                finally:
                    await looking.close()

    def beside(self, module: str, variant: str) -> Variant:
        """A variant of bench/bare.py or bench/peers.py, in a process of its own."""
        return lambda: self._worker(module, variant)

    async def _worker(self, module: str, variant: str) -> dict[str, float]:
        async with self._machine.database(migrated=False) as dsn:
            admin = await asyncpg.connect(dsn)
            await admin.execute(bare.SCHEMA)
            worker = Process(variant, self._machine.folder)
            await worker.start(
                (sys.executable, "-m", module, variant, dsn, self._mitto.url, str(self._n))
            )
            try:
                await worker.said("ready")
                watch = await self._begin(worker)
                await worker.tell("go")
                await worker.said("done", LIMIT_SECONDS, look=0.002)
                figures = await self._end(watch, worker)
                recorded = await admin.fetchval("select count(provider_id) from message")
                assert variant == "simulator" or recorded == self._n, f"{recorded} are recorded"
                return figures
            finally:
                await worker.stop()
                await admin.close()

    async def _begin(self, worker: Process) -> tuple[float, ...]:
        await self._mitto.reset()
        return time.monotonic(), *self._used(worker)

    async def _end(self, watch: tuple[float, ...], worker: Process) -> dict[str, float]:
        now = (time.monotonic(), *self._used(worker))
        seconds, *used = (after - before for before, after in zip(watch, now, strict=True))
        accepted = await self._mitto.accepted()
        assert accepted == self._n, f"Mitto accepted {accepted:,} of {self._n:,}"
        first = (await self._mitto.control("GET", "requests?limit=1"))["rows"][0]
        names = ("sender µs CPU/message", "Postgres µs CPU/message", "Mitto µs CPU/message")
        return {
            "messages/s": self._n / seconds,
            "seconds": seconds,
            "first request s": first["arrivedMonotonic"] - watch[0],
            **{name: one / self._n * 1e6 for name, one in zip(names, used, strict=True)},
        }

    def _used(self, worker: Process) -> tuple[float, float, float]:
        return worker.cpu_seconds(), self._machine.cpu_seconds(), self._mitto.cpu_seconds()


async def run(machine: Machine, options: Options) -> None:
    """The benchmark; peers that are not installed are left out with a line said."""
    n = next(iter(options.messages), QUICK_MESSAGES if options.quick else MESSAGES)
    async with Mitto(machine.folder) as mitto:
        pipeline = Pipeline(machine, mitto, n)
        variants: dict[str, Variant] = {"bare": pipeline.beside("bench.bare", "bare")}
        variants["smsd"] = pipeline.smsd
        for other in ("batches", "simulator"):
            variants[other] = pipeline.beside("bench.bare", other)
        for peer in PEERS:
            if importlib.util.find_spec(peer) is None:
                print(f"  {peer} is left out: it is not installed (make bench installs it)")
            else:
                variants[peer] = pipeline.beside("bench.peers", peer)
        results = await alternate(variants, options.runs, machine.settle)
    settings: dict[str, Any] = {"messages": n, "batch": bare.BATCH, "receipts": "off"}
    report(
        "pipeline", results, machine, options, reference="bare", figure="messages/s",
        title=f"{n:,} messages, enqueue → last result recorded", settings=settings,
    )  # fmt: skip
