"""What a certificate costs: a campaign of delivered messages, read as the daemon reads it, in our own process.

Once for the sums and the hash alone, once with the lines going to a file, as `messages.csv` does it.
"""

import asyncio
import os
import time
from functools import partial

from bench.common import Machine, Options, alternate, forget_peak, memory_of, report
from smsd import certificates, database
from smsd.database import Connection

MESSAGES, QUICK_MESSAGES = 100_000, 1_000
FILL = """
with t as (insert into traffic_account (name, provider_id) values ('bench', 'bench') returning id),
tenant_ as (insert into tenant (name, account_id) select 'bench', id from t returning id, account_id),
credit_ as (insert into credit (tenant_id) select id from tenant_),
c as (insert into campaign (tenant_id, name, text, status, started_at)
      select id, 'bench', 'Hi', 'completed', now() from tenant_ returning id, tenant_id),
l as (insert into lane (account_id, tenant_id, class, campaign_id)
      select t.account_id, t.id, 1, c.id from tenant_ t, c returning id, account_id),
b as (insert into batch (campaign_id, lane_id, tenant_id, account_id, first_id, last_id, n, segments, state, sender)
      select c.id, l.id, c.tenant_id, l.account_id, i, least(i + 499, $1), 0, 0, 10, 'Shop'
        from c, l, generate_series(1, $1::int, 500) i),
m as (insert into message (campaign_id, id, phone, segments, state, text, settled_at, finished_at, provider_id)
      select c.id, i, 306900000000 + i, 1, 30, repeat('x', 100), now(), now(), '01JDXAB0123456789ABCDEF' || i
        from c, generate_series(1, $1::int) i)
select id from c
"""


async def run(machine: Machine, options: Options) -> None:
    """The benchmark; neither variant is the other's reference."""
    n = next(iter(options.messages), QUICK_MESSAGES if options.quick else MESSAGES)
    async with machine.database() as dsn:
        connection = await database.connect(dsn)
        try:
            campaign_id = await connection.fetchval(FILL, n)
            variants = {
                "certificate": partial(issue, connection, campaign_id, lines=False),
                "messages.csv": partial(issue, connection, campaign_id, lines=True),
            }
            results = await alternate(variants, options.runs, machine.settle)
        finally:
            await connection.close()
    report(
        "certificate", results, machine, options, title=f"The certificate of {n:,} messages",
        settings={"messages": n},
    )  # fmt: skip


async def issue(db: Connection, campaign_id: int, *, lines: bool) -> dict[str, float]:
    """One certificate and what it took."""
    gaps: list[float] = []
    ticking = asyncio.create_task(_tick(gaps))
    forget_peak(os.getpid())
    before = memory_of(os.getpid(), "VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    async with certificates.scratch() as file, certificates.snapshot(db):
        tenant_id = await certificates.owner(db, campaign_id)
        assert tenant_id is not None
        found = await certificates.issue(db, tenant_id, campaign_id, file if lines else None)
        size = file.tell()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    ticking.cancel()
    assert found is not None
    return {
        "seconds": wall,
        "CPU s": cpu,
        "more memory at the peak, MB": (memory_of(os.getpid(), "VmHWM") - before) / 1e6,
        "longest turn ms": max(gaps) * 1000,
        "bytes of lines": size,
    }


async def _tick(gaps: list[float]) -> None:
    """How much the event loop computes before somebody has a turn who wants one every millisecond."""
    while True:
        started = time.thread_time()
        await asyncio.sleep(0.001)
        gaps.append(time.thread_time() - started)
