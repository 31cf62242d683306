"""Half an hour at half speed with a retention of minutes: nothing may grow once as much goes as comes.

Half of what bursts without a limit reach, campaign after campaign. Every ten seconds: the daemon's memory, how late
its event loop is, connections, bytes a message row, and the size of each table that grows with messages. What counts
is a straight line through the second and the last third: in the first one tables and caches fill.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from statistics import linear_regression, mean, median
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from bench.campaigns import Campaigns, installation, sizes
from bench.common import Machine, Mitto, Options, Results, report, show

MINUTES, QUICK_MINUTES = 30.0, 0.1
RETENTION_MINUTES = 3.0
"""Of half an hour; in proportion where it is shorter."""
CAMPAIGN, QUICK_CAMPAIGN = 50_000, 500
BURSTS = 3
SAMPLES = 180
THIRDS = ("first third", "second third", "last third")
TABLES = ("message", "provider_message", "batch", "attempt", "ledger")
MEGABYTE = 1_000_000
FLAT = 0.05
NOISE = {"memory MB": 5.0, "loop lag ms": 3.0, "connections": 1.0}
"""What may come and go without meaning anything, where that is more than FLAT."""
Sample = dict[str, float]


class Watch:
    """What stands at each moment."""

    def __init__(self, campaigns: Campaigns) -> None:
        self._campaigns = campaigns
        self._counted: dict[str, float] = {}

    async def sample(self, seconds: float) -> Sample:
        """One look, so many seconds after the last one."""
        campaigns = self._campaigns
        before, self._counted = self._counted, await _counters(campaigns)
        moved = {name: value - before.get(name, 0.0) for name, value in self._counted.items()}
        connections = await campaigns.db.fetchval(
            "select count(*) - 1 from pg_stat_activity where datname = current_database()"
        )
        tables = await sizes(campaigns.db)
        messages = tables["message"]
        figures = {
            "messages/s": moved["accepted"] / seconds,
            "memory MB": campaigns.daemon.resident_bytes() / MEGABYTE,
            "loop lag ms": moved["lag"] / max(moved["looks"], 1) * 1e3,
            "connections": float(connections),
            "bytes a row": (messages.heap + messages.indexes) / max(messages.live, 1),
        }
        for name in TABLES:
            figures[f"{name} MB"] = (tables[name].heap + tables[name].indexes) / MEGABYTE
        return figures

    async def keep(self, samples: list[Sample], seconds: float) -> None:
        """Looks until cancelled."""
        await self.sample(seconds)  # from here on counters are differences
        while True:
            await asyncio.sleep(seconds)
            samples.append(await self.sample(seconds))


async def _counters(campaigns: Campaigns) -> dict[str, float]:
    """What the daemon counts of itself, by our names."""
    names = {
        ("smsd_messages_total", "accepted"): "accepted",
        ("smsd_loop_lag_seconds_sum", None): "lag",
        ("smsd_loop_lag_seconds_count", None): "looks",
    }
    counted = dict.fromkeys(names.values(), 0.0)
    async with aiohttp.request("GET", f"{campaigns.daemon.url}/metrics") as response:
        exposition = await response.text()
    for family in text_string_to_metric_families(exposition):
        for one in family.samples:
            if name := names.get((one.name, one.labels.get("result"))):
                counted[name] = one.value
    return counted


# ----------------------------------------------------------------------------------------- judging


def thirds(samples: Sequence[Sample]) -> Results:
    """The samples of each third, by figure; a remainder belongs to the first."""
    size = len(samples) // 3
    cuts = (0, len(samples) - 2 * size, len(samples) - size, len(samples))
    return {
        third: {name: [one[name] for one in samples[start:end]] for name in samples[0]}
        for third, start, end in zip(THIRDS, cuts[:-1], cuts[1:], strict=True)
    }


def drift(values: Sequence[float]) -> float:
    """How much the straight line through the values (least squares) climbs from the first to the last."""
    slope, _ = linear_regression(range(len(values)), values)
    return slope * (len(values) - 1)


def climbing(results: Results) -> list[str]:
    """What is not flat from the second third on: a line each."""
    lines = []
    for name in results[THIRDS[1]]:
        values = results[THIRDS[1]][name] + results[THIRDS[2]][name]
        climb, allowed = drift(values), max(FLAT * mean(values), NOISE.get(name, 0.0))
        if name != "messages/s" and climb > allowed:
            lines.append(f"{name} climbs by {show(climb)} to {show(values[-1])}")
    return lines


def _draw(results: Results, minutes: float, axes: Any) -> None:
    """Every figure in parts of its median in the second third."""
    for name in results[THIRDS[1]]:
        values = [value for third in THIRDS for value in results[third][name]]
        middle = median(results[THIRDS[1]][name]) or 1.0
        times = [minutes * (place + 1) / len(values) for place in range(len(values))]
        axes.plot(times, [value / middle for value in values], label=name, linewidth=1)
    axes.set_ylim(0, 2)
    axes.set_xlabel("minutes; 1 is the median of the second third")
    axes.legend(fontsize="xx-small", ncols=3)


async def run(machine: Machine, options: Options) -> None:
    """The benchmark, once: half an hour is repetition enough."""
    minutes = options.minutes or (QUICK_MINUTES if options.quick else MINUTES)
    n = QUICK_CAMPAIGN if options.quick else next(iter(options.messages), CAMPAIGN)
    retention = RETENTION_MINUTES * minutes / MINUTES
    samples: list[Sample] = []
    async with (
        Mitto(machine.folder) as mitto,
        installation(machine, mitto, n, retention_days=retention / 1440) as campaigns,
    ):
        bursts = [await campaigns.burst() for _ in range(BURSTS)]
        await campaigns.settle()
        half = int(median(burst.messages / burst.seconds for burst in bursts) / 2)
        await campaigns.limit(messages=half)
        print(
            f"  bursts reach {2 * half:,} messages/s; from now on {half:,}, kept {retention:g} min"
        )
        watch = Watch(campaigns)
        watching = asyncio.create_task(watch.keep(samples, minutes * 60 / SAMPLES))
        try:
            await campaigns.steadily(minutes * 60)
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        await campaigns.audited()
    results = thirds(samples)
    report(
        "soak", results, machine, replace(options, runs=1), reference=THIRDS[1],
        figure="messages/s", title=f"{minutes:g} minutes at {half:,} messages/s",
        settings={
            "minutes": minutes, "messages/s": half, "messages a campaign": n,
            "retention minutes": retention, "receipts": "in arrays of 100",
        },
        draw=lambda axes: _draw(results, minutes, axes),
    )  # fmt: skip
    print("\n".join(climbing(results)) or "flat from the second third on")
