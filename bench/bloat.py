"""Half an hour of campaigns at a steady rate while another session holds a snapshot, and the same once it is gone.

Vacuum clears no row version that the snapshot may still see, so the rows that every claim and every answer change
leave their old versions behind. Before, in the middle, at the end, and after the snapshot is gone and vacuum has run,
among as many rows as at the end: what a claim, an intent, an answer and a group of receipts take at the steady rate,
and the rate that bursts without any limit reach, in turns with bursts of a second installation: on the same Postgres,
in a database of its own that no snapshot holds, idle meanwhile. A machine is not as fast now as half an hour ago.
"""

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from statistics import median

import asyncpg

from bench.campaigns import Campaigns, installation, sizes
from bench.common import Machine, Mitto, Options, report
from smsd.database import Connection

MINUTES, QUICK_MINUTES = 30.0, 0.05
REQUESTS_PER_SECOND, BATCH = 25, 100
"""Old versions come by the request, so batches are the smallest that smsd cuts a campaign into: 45,000 of them."""
CAMPAIGN, QUICK_CAMPAIGN = 20_000, 500
BURSTS = 6
RECEIPTS_A_POST = 20
WINDOW_SECONDS = 60.0
ASKED = 0.9
RATE = "messages/s, no limit"
CLEAN = "of the clean one in turns"
STATEMENTS = {
    "claim": "claim ms", "intent": "intent ms", "settle_items": "settle ms",
    "apply_receipts": "receipts ms",
}  # fmt: skip
TRACK = (
    "do $$ begin execute format('alter database %I set track_functions = ''pl''',"
    " current_database()); end $$"
)
Calls = dict[str, tuple[int, float]]


async def calls(db: Connection) -> Calls:
    """How often each of STATEMENTS was called so far, and milliseconds in all."""
    rows = await db.fetch(
        "select funcname, sum(calls)::bigint as calls, sum(total_time) as ms"
        " from pg_stat_user_functions where funcname = any ($1) group by funcname",
        list(STATEMENTS),
    )
    return {row["funcname"]: (row["calls"], row["ms"]) for row in rows}


def per_call(before: Calls, after: Calls) -> dict[str, float]:
    """Milliseconds a call between two looks."""
    figures = {}
    for name, (n, ms) in after.items():
        old_n, old_ms = before.get(name, (0, 0.0))
        if n > old_n:
            figures[STATEMENTS[name]] = (ms - old_ms) / (n - old_n)
    return figures


class Bloat:
    """Looks at an installation: so many seconds at the steady rate, then bursts in turns with the clean one."""

    def __init__(self, campaigns: Campaigns, clean: Campaigns, window_seconds: float) -> None:
        self._campaigns, self._clean, self._window = campaigns, clean, window_seconds

    async def look(self, seconds: float = 0.0) -> dict[str, list[float]]:
        """Figures after so many seconds more."""
        campaigns = self._campaigns
        await campaigns.limit(REQUESTS_PER_SECOND)
        if seconds > self._window:
            await campaigns.steadily(seconds - self._window)
        before, started = await calls(campaigns.db), time.monotonic()
        sent = await campaigns.steadily(self._window)
        steady = sent / (time.monotonic() - started)
        took = per_call(before, await calls(campaigns.db))
        await campaigns.limit()
        rates: dict[Campaigns, list[float]] = {campaigns: [], self._clean: []}
        for number in range(BURSTS):
            for one in rates if number % 2 == 0 else reversed(rates):
                burst = await one.burst()
                await one.settle()
                rates[one].append(burst.messages / burst.seconds)
        return {
            RATE: rates[campaigns],
            CLEAN: rates[self._clean],
            "messages/s, steady": [steady],
            **{name: [ms] for name, ms in took.items()},
        }

    async def dead(self) -> dict[str, int]:
        """Dead row versions by table, the most first."""
        dead = {name: size.dead for name, size in (await sizes(self._campaigns.db)).items()}
        return {name: n for name, n in sorted(dead.items(), key=lambda one: -one[1]) if n}


@contextlib.asynccontextmanager
async def _snapshot(dsn: str) -> AsyncIterator[None]:
    """A session that keeps one open."""
    holder = await asyncpg.connect(
        dsn, server_settings={"idle_in_transaction_session_timeout": "0"}
    )
    try:
        await holder.execute("begin isolation level repeatable read")
        await holder.fetchval("select count(*) from batch")
        yield
    finally:
        await holder.close()


async def run(machine: Machine, options: Options) -> None:
    """The benchmark, once: half an hour is repetition enough for its steady figures."""
    minutes = options.minutes or (QUICK_MINUTES if options.quick else MINUTES)
    n = QUICK_CAMPAIGN if options.quick else next(iter(options.messages), CAMPAIGN)
    async with contextlib.AsyncExitStack() as stack:
        both = []
        for _ in range(2):
            mitto = await stack.enter_async_context(Mitto(machine.folder))
            entered = installation(
                machine, mitto, n, prepare=TRACK, receipts_a_post=RECEIPTS_A_POST, batch_size=BATCH
            )
            both.append(await stack.enter_async_context(entered))
            await both[-1].burst()  # plans and caches are warm
            await both[-1].settle()
        campaigns, clean = both
        bloat = Bloat(campaigns, clean, min(WINDOW_SECONDS, minutes * 60 / 10))
        results = {"before": await bloat.look()}
        async with _snapshot(campaigns.dsn):
            results["held, half time"] = await bloat.look(minutes * 30)
            results["held, at the end"] = await bloat.look(minutes * 30)
            dead = await bloat.dead()
        await campaigns.db.execute("vacuum (analyze)")
        await machine.settle()
        results["after"] = await bloat.look()
        for one in both:
            await one.audited()
    report(
        "bloat", results, machine, replace(options, runs=1), reference="after", figure=RATE,
        title=f"Messages/s without a limit, a snapshot held for {minutes:g} minutes",
        settings={
            "minutes": minutes, "messages a campaign": n, "batch": BATCH,
            "steady requests/s": REQUESTS_PER_SECOND, "receipts": f"in arrays of {RECEIPTS_A_POST}",
            "dead row versions at the end": dead,
        },
    )  # fmt: skip
    print(
        f"dead row versions at the end: {', '.join(f'{table} {k:,}' for table, k in dead.items())}"
    )
    end = results["held, at the end"]
    reached = median(end[RATE]) / median(end[CLEAN])
    print(f"at the end {reached:.0%} of the clean rate beside a snapshot (asked: {ASKED:.0%})")
