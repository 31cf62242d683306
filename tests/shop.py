"""A tenant with credits, and all that the daemon's loops would do for it, step by step."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import date
from typing import Any

from conftest import Api, TenantCaller

from smsd import campaigns, credits, database, expansions, queue, tenants
from smsd.campaigns import Campaign, Snapshot
from smsd.expansions import Chunk, Expansion, Rendered, Skipped
from smsd.mitto import ItemResult
from smsd.model import CampaignStatus, MessageState, Reason
from smsd.queue import Grant, Intent, ReceiptRow

ACCEPTED, REFUSED, UNKNOWN = MessageState.ACCEPTED, MessageState.REFUSED, MessageState.UNKNOWN
PHONE = 306_900_000_000
LOCK_MESSAGE = (
    "select from message m join provider_message k on k.campaign_id = m.campaign_id and k.message_id = m.id"
    " where k.provider_id = $1 for update of m"
)
"""Locks the row of the message that Mitto calls $1."""


@dataclass
class Shop:
    """A tenant with credits on a fast account, and the one replica that works for it."""

    pool: database.Pool
    id: int
    account_id: int
    replica_id: int
    phones: int = PHONE
    provider_ids: int = 0

    async def draft(self, **content: Any) -> Campaign:
        return await campaigns.create(self.pool, self.id, "Sale", {"text": "Hi", **content})

    async def begin(self, of: int, batch_size: int = 5, held: int | None = None) -> int:
        """A campaign just enqueued; its id."""
        campaign = await self.draft()
        snapshot = Snapshot(
            "contacts", "Shop", "Hi", date(2026, 1, 1), batch_size, 10**9, of, held or of
        )
        async with self.pool.acquire() as connection, connection.transaction():
            locked = await campaigns.lock(connection, self.id, campaign.id)
            assert locked is not None
            await campaigns.begin(connection, locked, self.account_id, snapshot)
            assert await credits.hold(connection, self.id, snapshot.held, campaign.id, "enqueue")
        return campaign.id

    async def expand(
        self, read: int, skipped: int = 0, last: bool = True, segments: int = 1
    ) -> int:
        """One chunk of the expansion whose turn it is; 0 where nothing runs."""
        expansion = await expansions.claim(self.pool, self.replica_id)
        if expansion is None:
            return 0
        await self.write(expansion, read, skipped, last, segments)
        return expansion.campaign_id

    async def write(
        self,
        expansion: Expansion,
        read: int,
        skipped: int = 0,
        last: bool = True,
        segments: int = 1,
    ) -> None:
        first = self.phones
        self.phones += read
        reached = read - skipped
        chunk = Chunk(
            cursor=expansion.cursor + read,
            read=read,
            last=last,
            rendered=[Rendered(first + i, f"Hi {i}", segments) for i in range(reached)],
            skipped=[Skipped(first + i, Reason.OPTED_OUT, None) for i in range(reached, read)],
        )
        first_id = await expansions.commit(self.pool, expansion, chunk, self.replica_id)
        if first_id:
            await queue.wake_lane(self.pool, expansion.lane_id, first_id)

    async def sending(self, of: int, **options: Any) -> int:
        """A campaign whose messages are all queued; its id."""
        campaign_id = await self.begin(of, **options)
        await self.expand(of)
        return campaign_id

    async def claim(self, want: int = 1) -> list[Grant]:
        claimed = await queue.claim(self.pool, self.account_id, self.replica_id, want, lead_us=0)
        return list(claimed.grants)

    async def post(self, want: int = 1) -> list[tuple[Grant, Intent]]:
        """Claims batches and writes their intents; those that may be posted."""
        out = []
        for grant in await self.claim(want):
            intent = await queue.intent(self.pool, grant, self.replica_id)
            if intent.verdict == "post":
                out.append((grant, intent))
        return out

    async def answer(self, grant: Grant, intent: Intent, *states: MessageState) -> None:
        """Mitto's answer item by item; the last state is that of all the rest."""
        items = []
        for i, message_id in enumerate(intent.ids):
            state = states[min(i, len(states) - 1)]
            self.provider_ids += 1
            provider_id = f"M{self.provider_ids}" if state == MessageState.ACCEPTED else None
            items.append(ItemResult(message_id, state, provider_id, None))
        await queue.settle_items(
            self.pool, grant.batch_id, intent.attempt, queue.Answer.of(items, "bulk", 200)
        )

    async def send_all(self, *states: MessageState) -> None:
        """Posts and answers until nothing is ready."""
        while posted := await self.post(8):
            for grant, intent in posted:
                await self.answer(grant, intent, *states)

    async def receive(self, **states: int) -> None:
        """Receipts: the provider's id → the state that it tells."""
        rows = [ReceiptRow(None, one, state, None, None) for one, state in states.items()]
        await queue.apply_receipts(self.pool, rows)

    async def act(
        self,
        campaign_id: int,
        action: Callable[[database.Connection, Campaign], Coroutine[Any, Any, Any]],
    ) -> Any:
        """An action on the locked campaign, in a transaction of its own."""
        async with self.pool.acquire() as connection, connection.transaction():
            locked = await campaigns.lock(connection, self.id, campaign_id)
            assert locked is not None
            return await action(connection, locked)

    async def progress(self, campaign_id: int) -> campaigns.Progress:
        progress = await campaigns.totals(self.pool, self.id, campaign_id)
        assert progress is not None
        return progress

    async def status(self, campaign_id: int) -> CampaignStatus:
        return (await self.progress(campaign_id)).campaign.status


async def new_shop(pool: database.Pool, granted: int = 10_000) -> Shop:
    async with pool.acquire() as connection, connection.transaction():
        account = await tenants.create_account(
            connection, name="Main", provider_id="main", api_key=None, requests_per_second=50_000,
            messages_per_second=None, max_in_flight=None, webhook_secret=None, server_error_means="refused",
        )  # fmt: skip
        tenant = await tenants.create_tenant(
            connection, name="Shop", account_id=account.id, sender="Shop", requests_per_second=50_000,
            messages_per_second=None, weight=1.0, batch_size=None, subscription="active", timezone="UTC",
            default_country="GR",
        )  # fmt: skip
        await credits.grant(connection, tenant.id, granted, "test")
    return Shop(pool, tenant.id, account.id, await queue.register(pool, "test", "0"))


async def counts(db: database.Connection, sql: str, *args: object) -> dict[str, int]:
    return {row[0]: row[1] for row in await db.fetch(sql, *args)}


async def check_the_account(shop: Shop, campaign_id: int) -> campaigns.Progress:
    """Totals against a count over the messages as they are shown; money against what is open and what was accepted;
    in one snapshot, since others may be at work."""
    async with shop.pool.acquire() as db, db.transaction(isolation="repeatable_read"):
        progress = await campaigns.totals(db, shop.id, campaign_id)
        assert progress is not None
        shown = await counts(
            db,
            "select coalesce(case when own_state in (20, 40) then own_state::text end, status), count(*)::int "
            "from message_shown where campaign_id = $1 group by 1",
            campaign_id,
        )
        money = await db.fetchrow(
            "select granted, spent, reserved from credit where tenant_id = $1", shop.id
        )
        entries = await counts(
            db,
            "select kind, sum(amount)::bigint from ledger where tenant_id = $1 group by kind",
            shop.id,
        )
        held = await db.fetchval(
            "select coalesce((select sum(held) from expansion), 0)"
            " + coalesce((select sum(segments) from batch where state in (0, 1, 2, 3, 11)), 0)"
            " + coalesce((select sum(segments) from message where state = 5), 0)"
        )
        worth = await db.fetchval(
            "select coalesce(sum(segments), 0) from message_shown where own_state in (10, 11, 20, 30)"
        )
        wrong = await db.fetch(
            "select b.id, b.state, b.n, m.n as found from batch b, lateral (select count(*) as n from message_shown m"
            " where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.own_state is null) m"
            " where b.n <> m.n"
        )
    sums = progress.totals
    counted = {
        "queued": sums.queued, "processing": sums.processing, "accepted": sums.pending,
        "delivered": sums.delivered, "20": sums.delivery_failed, "40": sums.refused,
        "unknown": sums.unknown, "cancelled": sums.cancelled, "skipped": sums.skipped,
    }  # fmt: skip
    assert {status: n for status, n in counted.items() if n} == shown
    assert sums.accepted == sums.delivered + sums.delivery_failed + sums.pending
    assert sums.total == sum(shown.values())
    assert sums.processed == sums.total - sums.queued - sums.processing
    assert money is not None
    assert money["reserved"] == held
    assert money["spent"] == worth == entries.get("spend", 0)
    assert money["granted"] == entries["grant"]
    given_back = entries.get("spend", 0) + entries.get("release", 0)
    assert money["reserved"] == entries.get("hold", 0) - given_back
    assert wrong == []
    return progress


async def until_somebody_waits(pool: database.Pool, n: int = 1) -> None:
    """Returns once so many sessions of this database wait for a lock."""
    waiting = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    async with asyncio.timeout(10):
        while await pool.fetchval(waiting) < n:
            await asyncio.sleep(0.01)


async def until_waited_for(pool: database.Pool, holder: database.Connection) -> None:
    """Returns once a session waits for a lock of the holder's."""
    waiting = "select exists (select from pg_stat_activity where $1 = any (pg_blocking_pids(pid)))"
    async with asyncio.timeout(10):
        while not await pool.fetchval(waiting, holder.get_server_pid()):
            await asyncio.sleep(0.01)


async def shop_of(api: Api, tenant: TenantCaller) -> Shop:
    """A shop for a tenant of the API."""
    replica_id = await queue.register(api.ctx.pool, "test", "0")
    return Shop(api.ctx.pool, tenant.id, tenant.account_id, replica_id)


async def add_contacts(pool: database.Pool, tenant_id: int, n: int) -> list[int]:
    """So many contacts, numbers from PHONE on, all of them called Maria and every second of Athens; their ids."""
    rows = await pool.fetch(
        "insert into contact (tenant_id, phone, first_name, attributes) "
        "select $1, $2::bigint + i, 'Maria', case when i % 2 = 0 then '{\"city\": \"Athens\"}'::jsonb else '{}' end "
        "from generate_series(0, $3::int - 1) i order by i returning id",
        tenant_id, PHONE, n,
    )  # fmt: skip
    return [row["id"] for row in rows]
