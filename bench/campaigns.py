"""Campaigns as a frontend sends them: one, a burst of them, or one after another at a steady rate under a limit."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

from bench.common import NO_LIMIT, Daemon, Machine, Mitto, Shop, shop
from smsd import audit, database
from smsd.database import Connection

TEXT = "Hi {{firstName|there}}, 20% off in {{city|town}} until Sunday. Show this text at the till."
"""Marketing, so that an unsubscribe link is appended."""
PARTS = ("queued", "processing", "success", "failed", "unknown", "cancelled", "skipped")
LIMIT_SECONDS = 1_800.0
LOOK_SECONDS = 0.1
WAIT_SECONDS = 60
NEXT_AFTER = 0.8
"""The next of steady campaigns begins when so much of one is done."""
FORGET_AFTER = 500_000
"""How many messages the simulator keeps before it is asked whether all is well, and emptied."""


class Wrong(Exception):  # noqa: N818 - what a benchmark says last
    """A figure that speed must not change has changed."""


class Sent(NamedTuple):
    """A burst that is over: messages, and seconds from its first enqueue to the last result that was recorded."""

    messages: int
    seconds: float


class Campaigns:
    """A tenant's campaigns, each to all of its `n` contacts, and their account."""

    def __init__(
        self, dsn: str, db: Connection, daemons: Sequence[Daemon], mitto: Mitto, shop: Shop, n: int
    ) -> None:
        self.dsn, self.db, self.daemons, self.mitto, self.shop = dsn, db, daemons, mitto, shop
        self.n = n
        self.daemon = daemons[0]
        self._open: list[int] = []
        self._expected = 0

    async def draft(self) -> int:
        """A new campaign's id."""
        body = {"name": "Sale", "messageText": TEXT}
        answer = await self.daemon.ask("POST", "/api/campaigns", self.shop.key, body)
        return int(answer["id"])

    async def enqueue(self, campaign_id: int) -> None:
        """Sends it on its way."""
        self._open.append(campaign_id)
        self._expected += self.n
        await self.daemon.ask("POST", f"/api/campaigns/{campaign_id}/enqueue", self.shop.key)

    async def until(
        self, campaign_id: int, holds: Callable[[Any], bool], look_seconds: float = LOOK_SECONDS
    ) -> Any:
        """Its status, once something holds of it. Raises Wrong when its parts are not its total or nothing moves."""
        path = f"/api/campaigns/{campaign_id}/status"
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            status = await self.daemon.ask("GET", path, self.shop.key)
            _check_parts(status)
            if holds(status):
                return status
            await asyncio.sleep(look_seconds)
        raise Wrong(f"campaign {campaign_id} did not get on in {LIMIT_SECONDS:g} s: {status}")

    async def ended(self, campaign_id: int) -> Any:
        """Its status, once nothing is left to send."""
        return await self.until(
            campaign_id, lambda status: status["campaign"]["status"] not in ("sending", "scheduled")
        )

    async def burst(self, campaigns: int = 1) -> Sent:
        """So many campaigns at once."""
        ids = [await self.draft() for _ in range(campaigns)]
        begun = await self.db.fetchval("select clock_timestamp()")
        for campaign_id in ids:
            await self.enqueue(campaign_id)
        for campaign_id in ids:
            await self.ended(campaign_id)
        done = await self.db.fetchval(
            "select max(done_at) from batch where campaign_id = any ($1)", ids
        )
        return Sent(campaigns * self.n, (done - begun).total_seconds())

    async def steadily(self, seconds: float) -> int:
        """Campaign after campaign for so long, each begun before the last one is through; messages sent, once all
        are."""
        deadline, sent = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            sent += self.n
            campaign_id = await self.draft()
            await self.enqueue(campaign_id)
            await self.until(campaign_id, _nearly_done)
            if self._expected >= FORGET_AFTER:
                await self.settle()
        await self.settle()
        return sent

    async def settle(self) -> None:
        """Waits until all campaigns are through and all receipts taken; empties the simulator. Raises Wrong when it
        has not accepted each message once."""
        for campaign_id in self._open:
            await self.ended(campaign_id)
        await self.receipts_in()
        await self.accepted_once()
        await self.mitto.reset()
        self._open.clear()
        self._expected = 0

    async def receipts_in(self) -> None:
        """Returns when the simulator has none left to post."""
        wait = f"wait?receipts_settled=1&timeout={WAIT_SECONDS}"
        deadline = time.monotonic() + LIMIT_SECONDS
        while not (await self.mitto.control("GET", wait))["reached"]:
            if time.monotonic() > deadline:
                raise Wrong(f"receipts were not taken in {LIMIT_SECONDS:g} s")

    async def accepted_once(self) -> None:
        """Raises Wrong unless Mitto accepted every message of the campaigns since the last `settle`, once."""
        accepted = await self.mitto.accepted()
        twice = (await self.mitto.control("GET", "duplicates"))["total"]
        if accepted != self._expected or twice:
            raise Wrong(
                f"Mitto accepted {accepted:,} of {self._expected:,}, {twice:,} of them twice"
            )

    async def limit(self, requests_per_second: int = NO_LIMIT, messages: int | None = None) -> None:
        """Sets the limits of account and tenant; without figures there is none."""
        for table, key in (("traffic_account", self.shop.account_id), ("tenant", self.shop.id)):
            await self.db.execute(
                f"update {table} set requests_per_second = $2, messages_per_second = $3 where id = $1",
                key, requests_per_second, messages,
            )  # fmt: skip

    async def audited(self) -> None:
        """Raises Wrong when the audit finds something."""
        broken = [check for check in await audit.run(self.db) if check.broken]
        if broken:
            raise Wrong(f"the audit finds {broken}")


class Size(NamedTuple):
    """Bytes of a table with its partitions, and what is in it as vacuum knows it."""

    heap: int
    indexes: int
    live: int
    dead: int


async def sizes(db: Connection) -> dict[str, Size]:
    """Of every table."""
    rows = await db.fetch(
        "select coalesce(pg_partition_root(c.oid), c.oid)::regclass::text as name,"
        " sum(pg_table_size(c.oid))::bigint as heap, sum(pg_indexes_size(c.oid))::bigint as indexes,"
        " sum(pg_stat_get_live_tuples(c.oid))::bigint as live,"
        " sum(pg_stat_get_dead_tuples(c.oid))::bigint as dead"
        " from pg_class c where c.relkind = 'r' and c.relnamespace = 'public'::regnamespace"
        " group by 1"
    )
    return {row["name"]: Size(*list(row)[1:]) for row in rows}


def _check_parts(status: Any) -> None:
    figures = status["metrics"]
    if figures["total"] != sum(figures[part] for part in PARTS):
        raise Wrong(f"the parts are not the total: {figures}")


def _nearly_done(status: Any) -> bool:
    campaign = status["campaign"]
    if campaign["status"] == "paused":
        raise Wrong(f"paused: {campaign}")
    return bool(campaign["processed"] >= NEXT_AFTER * campaign["total"])


@asynccontextmanager
async def installation(
    machine: Machine, mitto: Mitto, n: int, *, replicas: int = 1, prepare: str = "",
    receipts_a_post: int = 100, **settings: object,
) -> AsyncIterator[Campaigns]:  # fmt: skip
    """A tenant with n contacts on a fresh database, and its daemons; the first one gets the receipts.

    prepare: SQL for the database before a daemon connects. settings: of the daemons, see `Daemon`.
    """
    async with machine.database() as dsn, AsyncExitStack() as stack:
        tenant = await shop(dsn, n)
        db = await database.connect(dsn)
        stack.push_async_callback(db.close)
        if prepare:
            await db.execute(prepare)
        await mitto.reset()
        await mitto.switch(dlr=True, dlr_batch=receipts_a_post)
        daemons = [
            await stack.enter_async_context(Daemon(dsn, mitto, machine.folder, **settings))
            for _ in range(replicas)
        ]
        await mitto.register(f"{daemons[0].url}/webhooks/mitto/dlr")
        yield Campaigns(dsn, db, daemons, mitto, tenant, n)
