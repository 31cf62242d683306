"""Limits: what a grant costs, and how much of a limit is used.

A grant is one call of `queue.claim`: the fair lane, a time slot under every limit, the lease. Its reference is the
least that leases a batch: SKIP LOCKED and one update. Both on one connection, and on eight that want the same account
at once; "8 at a time" is how a sender asks while it has places, and "all limits" has requests and messages limited for
account and tenant, and requests over all accounts.

How much of a limit is used is seen by the simulator, by its own clock: the most requests in any second that it saw, and
all that came between the first second and the last, in parts of what the limit allows.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from bench import campaigns
from bench.common import Machine, Mitto, Options, Shop, Variant, alternate, report, shop
from smsd import database, queue
from smsd.database import Connection

SECONDS, QUICK_SECONDS = 5.0, 0.5
BATCHES, QUICK_BATCHES = 200_000, 20_000
CONNECTIONS = 8
LEAD_US = 1_000
HIGH = 100_000_000
"""A limit that is kept and never reached."""
FILL = """
with c as (insert into campaign (tenant_id, name, text, status, started_at)
           values ($1, 'bench', 'Hi', 'sending', now()) returning id),
l as (insert into lane (account_id, tenant_id, class, campaign_id, idle) select $2, $1, 1, id, false from c
      returning id, campaign_id)
insert into batch (campaign_id, lane_id, tenant_id, account_id, first_id, last_id, n, segments, sender)
select l.campaign_id, l.id, $1, $2, i * 500 + 1, i * 500 + 500, 500, 500, 'Shop'
  from l, generate_series(0, $3::int - 1) i
"""
BARE_LEASE = """
update batch set state = 2, owner = $1, epoch = epoch + 1
 where id = (select id from batch where lane_id = $2 and state = 0 order by first_id limit 1 for update skip locked)
returning id, epoch, campaign_id, tenant_id, n
"""
LIMITS, QUICK_LIMITS = (10, 100, 1_000), (100,)
USE_SECONDS, QUICK_USE_SECONDS = 20, 3
BATCH = 5
"""Messages a request where the limit counts requests: small, for a limit of 1,000 to be a matter of requests."""

Lease = Callable[[Connection], Awaitable[int]]


class Grants:
    """What leases cost, on one Postgres."""

    def __init__(self, machine: Machine, seconds: float, batches: int) -> None:
        self._machine, self._seconds, self._batches = machine, seconds, batches

    def bare(self, connections: int) -> Variant:
        """A lease without any limit."""

        async def prepared(db: Connection, _: Shop, replica_id: int) -> Lease:
            lane_id = await db.fetchval("select id from lane where class = 1")

            async def lease(connection: Connection) -> int:
                return len(await connection.fetch(BARE_LEASE, replica_id, lane_id))

            return lease

        return lambda: self._measure(prepared, connections)

    def claim(self, connections: int, want: int = 1, *, all_limits: bool = False) -> Variant:
        """What a sender does."""

        async def prepared(db: Connection, tenant: Shop, replica_id: int) -> Lease:
            if all_limits:
                await db.execute("update traffic_account set messages_per_second = $1", HIGH)
                await db.execute("update tenant set messages_per_second = $1", HIGH)

            async def lease(connection: Connection) -> int:
                found = await queue.claim(
                    connection, tenant.account_id, replica_id, want, lead_us=LEAD_US,
                    all_limit=HIGH if all_limits else None,
                )  # fmt: skip
                return len(found.grants)

            while not await lease(db):  # a new limiter is closed for a second
                await asyncio.sleep(0.1)
            return lease

        return lambda: self._measure(prepared, connections)

    async def _measure(
        self, prepare: Callable[[Connection, Shop, int], Awaitable[Lease]], connections: int
    ) -> dict[str, float]:
        async with self._machine.database() as dsn, AsyncExitStack() as stack:
            tenant = await shop(dsn)
            opened = [await database.connect(dsn) for _ in range(connections)]
            for one in opened:
                stack.push_async_callback(one.close)
            replica_id = await queue.register(opened[0], "bench", "0")
            await opened[0].execute(FILL, tenant.id, tenant.account_id, self._batches)
            await opened[0].execute("vacuum (analyze) batch")
            lease = await prepare(opened[0], tenant, replica_id)
            before, used = time.perf_counter(), self._machine.cpu_seconds()
            until = before + self._seconds

            async def work(connection: Connection) -> tuple[int, int]:
                calls = grants = 0
                while time.perf_counter() < until:
                    grants += await lease(connection)
                    calls += 1
                return calls, grants

            done = await asyncio.gather(*(work(one) for one in opened))
            seconds, used = time.perf_counter() - before, self._machine.cpu_seconds() - used
            calls, grants = (sum(column) for column in zip(*done, strict=True))
            return {
                "grants/s": grants / seconds,
                "grants a call": grants / calls,
                "ms a call": seconds * connections / calls * 1000,
                "Postgres µs CPU a grant": used / max(grants, 1) * 1e6,
            }


class Use:
    """How much of a limit a daemon uses, and whether it keeps it."""

    def __init__(self, machine: Machine, mitto: Mitto, seconds: int) -> None:
        self._machine, self._mitto, self._seconds = machine, mitto, seconds

    def of(self, limit: int) -> Variant:
        """Of so many requests a second."""
        return lambda: self._measure(limit)

    async def _measure(self, limit: int) -> dict[str, float]:
        n = limit * self._seconds * BATCH
        prepare = (
            f"update traffic_account set requests_per_second = {limit};"
            f"update tenant set requests_per_second = {limit}, batch_size = {BATCH}"
        )
        async with campaigns.installation(self._machine, self._mitto, n, prepare=prepare) as sent:
            await self._mitto.switch()
            used = sent.daemon.cpu_seconds()
            await sent.burst()
            used = sent.daemon.cpu_seconds() - used
            await sent.accepted_once()
        found = await self._mitto.control("GET", "requests?limit=100000")
        arrivals = sorted(row["arrivedMonotonic"] for row in found["rows"])
        worst = (await self._mitto.control("GET", "worst-second?unit=requests"))["worstSecond"]
        first = arrivals[0] + 1.0  # it starts from nothing
        seconds = int(arrivals[-1] - first)
        inside = sum(first <= at < first + seconds for at in arrivals)
        return {
            "use": inside / (limit * seconds),
            "worst second / limit": worst / limit,
            "requests": len(arrivals),
            "daemon ms CPU a request": used / len(arrivals) * 1000,
        }


async def run(machine: Machine, options: Options) -> None:
    """The benchmark: two tables."""
    quick = options.quick
    seconds = QUICK_SECONDS if quick else SECONDS
    grants = Grants(machine, seconds, QUICK_BATCHES if quick else BATCHES)
    variants = {
        "bare lease": grants.bare(1),
        f"bare lease, {CONNECTIONS} connections": grants.bare(CONNECTIONS),
        "claim": grants.claim(1),
        f"claim, {CONNECTIONS} connections": grants.claim(CONNECTIONS),
        "claim, 8 at a time": grants.claim(1, 8),
        "claim, all limits": grants.claim(1, all_limits=True),
    }
    results = await alternate(variants, options.runs, machine.settle)
    report(
        "grants", results, machine, options, reference="bare lease", figure="grants/s",
        title="Batches leased a second", settings={"seconds": seconds},
    )  # fmt: skip
    async with Mitto(machine.folder) as mitto:
        use = Use(machine, mitto, QUICK_USE_SECONDS if quick else USE_SECONDS)
        limits = QUICK_LIMITS if quick else LIMITS
        by_limit = {f"{limit:,} requests/s": use.of(limit) for limit in limits}
        results = await alternate(by_limit, options.runs, machine.settle)
    report(
        "limits", results, machine, options, figure="use",
        title="Use of a limit, by the simulator's clock", settings={"messages a request": BATCH},
    )  # fmt: skip
