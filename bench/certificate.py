"""What a certificate costs: `python bench/certificate.py [messages]` (100,000).

A campaign of delivered messages is written straight into the tables of an embedded Postgres, then read as the daemon
reads it: once for the sums and the hash, once with the lines going to a file.
"""

import asyncio
import resource
import sys
import tempfile
import time
from pathlib import Path

from smsd import certificates, database, embedded
from smsd.database import Connection

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


async def ticks(gaps: list[float]) -> None:
    """How much the event loop computes before somebody has a turn who wants one every millisecond."""
    while True:
        started = time.thread_time()
        await asyncio.sleep(0.001)
        gaps.append(time.thread_time() - started)


async def measure(db: Connection, campaign_id: int, name: str, *, lines: bool) -> None:
    gaps: list[float] = []
    ticking = asyncio.create_task(ticks(gaps))
    wall, cpu = time.perf_counter(), time.process_time()
    async with certificates.scratch() as file, certificates.snapshot(db):
        tenant_id = await certificates.owner(db, campaign_id)
        assert tenant_id is not None
        found = await certificates.issue(db, tenant_id, campaign_id, file if lines else None)
        size = file.tell()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    ticking.cancel()
    assert found is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{name:12} {found.totals.total:>9,} lines, {size:>11,} bytes: {wall:5.1f} s, {cpu:5.1f} s of CPU, "
        f"peak RSS {peak} MB, at most {max(gaps) * 1000:.1f} ms of it between two turns"
    )


async def main(messages: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = embedded.Postgres(Path(folder) / "postgres")
        dsn = await server.start()
        try:
            await database.migrate(dsn)
            connection = await database.connect(dsn)
            campaign_id = await connection.fetchval(FILL, messages)
            await measure(connection, campaign_id, "certificate", lines=False)
            await measure(connection, campaign_id, "messages.csv", lines=True)
            await connection.close()
        finally:
            await server.stop()


asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000))
