"""One campaign of 100,000 to 1,000,000 recipients: what a message costs, and whether anything grows with the campaign.

And the same campaign with 1, 2 and 4 replicas, all on this machine. Receipts come in arrays of 100 while it is sent.
After each run everything is counted: at the simulator, in the campaign's sums, by the audit.
"""

import time
from functools import partial
from statistics import median

from bench.campaigns import Campaigns, Size, Wrong, installation, sizes
from bench.common import Machine, Mitto, Options, Results, alternate, report, show
from smsd.model import MessageState

SIZES, QUICK_SIZES = (100_000, 300_000, 1_000_000), (2_000,)
REPLICAS, QUICK_REPLICAS = (1, 2, 4), (2,)
REPLICAS_SIZE = 200_000
MEGABYTE = 1_000_000
TIMES = (
    "messages/s", "µs a message", "µs with receipts", "enqueue ms", "first request ms",
    "daemon's peak MB",
)  # fmt: skip


class Scale:
    """The variants, all on one Postgres and one simulator."""

    def __init__(self, machine: Machine, mitto: Mitto) -> None:
        self._machine, self._mitto = machine, mitto

    async def send(self, n: int, replicas: int = 1) -> dict[str, float]:
        """One campaign, from its enqueue to its last receipt; raises Wrong where something does not add up."""
        async with installation(self._machine, self._mitto, n, replicas=replicas) as campaigns:
            campaign_id = await campaigns.draft()
            figures = await self._measure(campaigns, campaign_id)
            await _check(campaigns, campaign_id)
            return figures

    async def _measure(self, campaigns: Campaigns, campaign_id: int) -> dict[str, float]:
        db, n = campaigns.db, campaigns.n
        await self._machine.settle()
        for daemon in campaigns.daemons:
            daemon.forget_peak()
        before = await sizes(db)
        wal = await db.fetchval("select pg_current_wal_lsn()")
        begun, started = await db.fetchval("select clock_timestamp()"), time.monotonic()
        await campaigns.enqueue(campaign_id)
        enqueued = time.monotonic() - started
        await campaigns.ended(campaign_id)
        await campaigns.receipts_in()
        await campaigns.until(campaign_id, lambda status: not status["metrics"]["pendingDelivery"])
        received = time.monotonic() - started
        done = await db.fetchval(
            "select max(done_at) from batch where campaign_id = $1", campaign_id
        )
        seconds = (done - begun).total_seconds()
        written = await db.fetchval("select pg_wal_lsn_diff(pg_current_wal_lsn(), $1)::float8", wal)
        return {
            "messages/s": n / seconds,
            "µs a message": seconds / n * 1e6,
            "µs with receipts": received / n * 1e6,
            "enqueue ms": enqueued * 1e3,
            "first request ms": (await self._first_request() - started) * 1e3,
            "daemon's peak MB": max(one.peak_bytes() for one in campaigns.daemons) / MEGABYTE,
            "WAL": written / n,
            **_grown(before, await sizes(db), n),
        }

    async def _first_request(self) -> float:
        """When the first request with messages arrived, on the clock that all processes of a machine share."""
        rows = (await self._mitto.control("GET", "requests?limit=100"))["rows"]
        return min(float(row["arrivedMonotonic"]) for row in rows if row["kind"] == "bulk")


def _grown(before: dict[str, Size], after: dict[str, Size], n: int) -> dict[str, float]:
    """Bytes a message that were added to the tables that grow with messages, and to all others together."""
    others = 0.0
    figures: dict[str, float] = {}
    for name, size in after.items():
        old = before.get(name, Size(0, 0, 0, 0))
        heap, indexes = (size.heap - old.heap) / n, (size.indexes - old.indexes) / n
        if name in ("message", "provider_message"):
            figures[f"{name}'s heap"], figures[f"{name}'s indexes"] = heap, indexes
        else:
            others += heap + indexes
    return {**figures, "others": others}


async def _check(campaigns: Campaigns, campaign_id: int) -> None:
    """What no size and no number of replicas may change."""
    await campaigns.accepted_once()
    n, figures = campaigns.n, (await campaigns.ended(campaign_id))["metrics"]
    exact = {"total": n, "processed": n, "success": n, "accepted": n, "delivered": n}
    if {name: figures[name] for name in exact} != exact:
        raise Wrong(f"a campaign of {n:,} says {figures}")
    rows = await campaigns.db.fetchrow(
        "select count(*) as messages, count(distinct phone) as phones,"
        " count(distinct provider_id) as ids from message where campaign_id = $1 and state = $2",
        campaign_id, MessageState.DELIVERED,
    )  # fmt: skip
    if rows is None or set(rows.values()) != {n}:
        raise Wrong(f"a campaign of {n:,} has {rows}")
    await campaigns.audited()


# ------------------------------------------------------------------------------------------ verdicts


def _of(results: Results, *figures: str) -> Results:
    """Some figures of each variant."""
    return {
        name: {figure: values[figure] for figure in figures if figure in values}
        for name, values in results.items()
    }


def _judge_sizes(results: Results) -> None:
    """What the largest is to the smallest."""
    figures = [{f: median(values) for f, values in one.items()} for one in results.values()]
    small, large = figures[0], figures[-1]
    times = large["µs a message"] / small["µs a message"]
    memory = large["daemon's peak MB"] - small["daemon's peak MB"]
    print(f"from the smallest to the largest: time a message × {times:.2f} (within ± 15 %),")
    print(f"the daemon's peak {memory:+.1f} MB (within ± 50 MB),")
    first = show(large["first request ms"])
    print(f"first request of the largest {first} ms after its enqueue (within 2,000)")


def _judge_replicas(results: Results) -> None:
    one, *others = [median(values["messages/s"]) for values in results.values()]
    for name, rate in zip(list(results)[1:], others, strict=True):
        print(f"{name}: {rate / one:.2f} of the first one's speed; every figure is exact")


async def run(machine: Machine, options: Options) -> None:
    """The benchmark: sizes, then replicas."""
    numbers = QUICK_SIZES if options.quick else options.messages or SIZES
    counts, size = (QUICK_REPLICAS, QUICK_SIZES[0]) if options.quick else (REPLICAS, REPLICAS_SIZE)
    if options.messages:
        size = min(size, max(numbers))
    async with Mitto(machine.folder) as mitto:
        scale = Scale(machine, mitto)
        by_size = await alternate(
            {f"{n:,} recipients": partial(scale.send, n) for n in numbers},
            options.runs, machine.settle,
        )  # fmt: skip
        by_replicas = await alternate(
            {f"replicas: {k}": partial(scale.send, size, k) for k in counts},
            options.runs, machine.settle,
        )  # fmt: skip
    smallest = next(iter(by_size))
    written = [figure for figure in by_size[smallest] if figure not in TIMES]
    report(
        "scale", _of(by_size, *TIMES), machine, options, reference=smallest, figure="µs a message",
        title="One campaign, by its size", settings={"receipts": "in arrays of 100"},
    )  # fmt: skip
    report(
        "bytes", _of(by_size, *written), machine, options, reference=smallest,
        figure="WAL", title="Bytes a message, by the size of the campaign",
    )  # fmt: skip
    report(
        "replicas", _of(by_replicas, *TIMES), machine, options, reference=next(iter(by_replicas)),
        figure="messages/s", title=f"{size:,} messages by replicas on one machine",
        settings={"messages": size},
    )  # fmt: skip
    _judge_sizes(by_size)
    _judge_replicas(by_replicas)
