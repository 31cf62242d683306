"""The campaigns room: what its figures promise, whatever happens in whatever order."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

import pytest

from smsd import campaigns, credits, database, expansions, queue, tenants
from smsd.campaigns import Campaign, CampaignStatus, Snapshot
from smsd.expansions import Chunk, Expansion, Rendered, Skipped
from smsd.mitto import ItemResult
from smsd.model import MessageState, Reason
from smsd.queue import Grant, Intent, ReceiptRow

PHONE = 306_900_000_000


@dataclass
class Shop:
    """A tenant with credits on a fast account, and the one replica that works for it."""

    pool: database.Pool
    id: int
    account_id: int
    replica_id: int
    phones: int = PHONE
    posted: list[tuple[Grant, Intent]] = field(default_factory=list)
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

    async def expand(self, read: int, skipped: int = 0, last: bool = True, segments: int = 1) -> int:
        """One chunk of the expansion whose turn it is; 0 where nothing runs."""
        expansion = await expansions.claim(self.pool, self.replica_id)
        if expansion is None:
            return 0
        await self.write(expansion, read, skipped, last, segments)
        return expansion.campaign_id

    async def write(
        self, expansion: Expansion, read: int, skipped: int = 0, last: bool = True, segments: int = 1
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
        await queue.settle_items(self.pool, grant.batch_id, intent.attempt, items, "bulk", 200)

    async def send_all(self, *states: MessageState) -> None:
        """Posts and answers until nothing is ready."""
        while posted := await self.post(8):
            for grant, intent in posted:
                await self.answer(grant, intent, *states)

    async def act(
        self, campaign_id: int, action: Callable[[database.Connection, Campaign], Coroutine[Any, Any, Any]]
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


@pytest.fixture
async def shop(pool: database.Pool) -> Shop:
    return await new_shop(pool)


# ------------------------------------------------------------------------------------- totals are true

ACCEPTED, REFUSED, UNKNOWN = MessageState.ACCEPTED, MessageState.REFUSED, MessageState.UNKNOWN


async def check_the_account(shop: Shop, campaign_id: int) -> campaigns.Progress:
    """Totals against a count over the messages as they are shown; money against what is open and what was accepted;
    in one snapshot, since others may be at work."""
    async with shop.pool.acquire() as db, db.transaction(isolation="repeatable_read"):
        progress = await campaigns.totals(db, shop.id, campaign_id)
        assert progress is not None
        shown = dict(
            await db.fetch(
                "select coalesce(case when own_state in (20, 40) then own_state::text end, status), count(*)::int "
                "from message_shown where campaign_id = $1 group by 1", campaign_id,
            )
        )  # fmt: skip
        money = await db.fetchrow(
            "select granted, spent, reserved from credit where tenant_id = $1", shop.id
        )
        entries = dict(
            await db.fetch(
                "select kind, sum(amount)::bigint from ledger where tenant_id = $1 group by kind", shop.id
            )
        )
        held = await db.fetchval(
            "select coalesce((select sum(held) from expansion), 0)"
            " + coalesce((select sum(segments) from batch where state in (0, 1, 2, 3, 11)), 0)"
            " + coalesce((select sum(segments) from message where state = 5), 0)"
        )
        worth = await db.fetchval(
            "select coalesce(sum(segments), 0) from message where state in (10, 11, 20, 30)"
        )
        wrong = await db.fetch(
            "select b.id, b.state, b.n, m.n as found from batch b, lateral (select count(*) as n from message m"
            " where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null) m"
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


@dataclass
class Chance:
    """Everything that can happen to a campaign, in an order that a seed decides."""

    shop: Shop
    campaign_id: int
    dice: random.Random
    unread: int
    claimed: list[Grant] = field(default_factory=list)
    posted: list[tuple[Grant, Intent]] = field(default_factory=list)

    async def expand(self) -> None:
        read = min(self.unread, self.dice.randint(0, 12))
        last = read == self.unread
        skipped = self.dice.randint(0, read // 3)
        if await self.shop.expand(read, skipped, last, segments=self.dice.choice((1, 2))):
            self.unread -= read

    async def claim(self) -> None:
        self.claimed += await self.shop.claim(self.dice.randint(1, 4))

    async def intend(self) -> None:
        if self.claimed:
            grant = self.claimed.pop(self.dice.randrange(len(self.claimed)))
            intent = await queue.intent(self.shop.pool, grant, self.shop.replica_id)
            if intent.verdict == "post":
                self.posted.append((grant, intent))

    async def answer(self) -> None:
        if self.posted:
            grant, intent = self.dice.choice(self.posted)  # perhaps for the second time
            states = self.dice.choices((ACCEPTED, REFUSED, UNKNOWN), (6, 3, 1), k=len(intent.ids))
            await self.shop.answer(grant, intent, *states)

    async def one_outcome(self) -> None:
        if self.posted:
            grant, intent = self.dice.choice(self.posted)
            action = self.dice.choice(("again", "back", "refused", "unknown"))
            refusal = self.dice.choice(("a", "b")) if action == "refused" else None
            await queue.settle_batch(
                self.shop.pool, grant.batch_id, intent.attempt, action, action, most=3, refusal=refusal
            )

    async def withdraw(self) -> None:
        for grant in (*self.claimed[:1], *(one for one, _ in self.posted[-1:])):
            await queue.withdraw(self.shop.pool, grant, "late")

    async def receive(self) -> None:
        ids = [f"M{self.dice.randint(1, self.shop.provider_ids + 1)}" for _ in range(5)]
        await queue.apply_receipts(
            self.shop.pool,
            [ReceiptRow(None, one, self.dice.choice((11, 20, 30)), None, None) for one in ids],
        )
        await queue.rejoin_receipts(self.shop.pool, None)

    async def opt_out(self) -> None:
        await self.shop.pool.execute(
            "insert into opt_out (tenant_id, phone, source) values ($1, $2, 'stop') on conflict do nothing",
            self.shop.id, PHONE + self.dice.randint(0, 100),
        )  # fmt: skip

    async def die(self) -> None:
        await queue.leave(self.shop.pool, self.shop.replica_id, "test")
        await queue.reap(self.shop.pool)
        self.shop.replica_id = await queue.register(self.shop.pool, "test", "0")

    async def decide(self) -> None:
        action = self.dice.choices(
            (campaigns.pause, campaigns.resume, campaigns.retry_failed, campaigns.cancel), (6, 12, 6, 0.2)
        )[0]
        try:
            await self.shop.act(self.campaign_id, action)
        except campaigns.WrongStatus:
            pass

    async def finish(self) -> None:
        await campaigns.finish(self.shop.pool)


STEPS = (
    ("expand", 3), ("claim", 6), ("intend", 8), ("answer", 6), ("one_outcome", 4), ("withdraw", 1),
    ("receive", 4), ("opt_out", 1), ("die", 1), ("decide", 4), ("finish", 2),
)  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
async def test_totals_and_money_are_true_after_every_step_whatever_the_steps_are(
    shop: Shop, seed: int
) -> None:
    dice = random.Random(seed)
    campaign_id = await shop.begin(60, held=75)
    chance = Chance(shop, campaign_id, dice, unread=60)
    names, weights = zip(*STEPS, strict=True)
    done: list[str] = []
    for name in dice.choices(names, weights, k=120):
        done.append(name)
        await getattr(chance, name)()
        progress = await check_the_account(shop, campaign_id)
        if progress.campaign.status in (CampaignStatus.COMPLETED, CampaignStatus.FAILED):
            assert progress.totals.queued + progress.totals.processing == 0, done
    await drain(chance)
    progress = await check_the_account(shop, campaign_id)
    assert progress.totals.queued + progress.totals.processing == 0
    assert progress.campaign.status in ("completed", "failed", "cancelled")


@pytest.mark.parametrize("seed", range(3))
async def test_totals_and_money_are_true_while_many_work_at_once(shop: Shop, seed: int) -> None:
    campaign_id = await shop.begin(600, held=700)
    done = asyncio.Event()

    async def work(number: int, *steps: str, times: int) -> None:
        chance = Chance(shop, campaign_id, random.Random(f"{seed} {number}"), unread=600)
        for _ in range(times):
            await getattr(chance, chance.dice.choice(steps))()

    async def watch() -> None:
        while not done.is_set():
            await check_the_account(shop, campaign_id)

    watching = asyncio.create_task(watch())
    send = ("claim", "intend", "intend", "answer", "one_outcome", "withdraw")
    await asyncio.gather(
        work(0, "expand", times=80),
        work(1, *send, times=250),
        work(2, *send, times=250),
        work(3, *send, times=250),
        work(4, "receive", "opt_out", "finish", times=100),
        work(5, "decide", times=60),
    )
    done.set()
    await watching
    await check_the_account(shop, campaign_id)


async def drain(chance: Chance) -> None:
    """Lets the campaign come to its end."""
    shop = chance.shop
    await chance.die()
    await chance.shop.act(chance.campaign_id, _resume_if_paused)
    while chance.unread:
        before = chance.unread
        await chance.expand()
        if chance.unread == before and await shop.status(chance.campaign_id) == "cancelled":
            break
    if not chance.unread:
        await shop.expand(0)
    await shop.send_all(ACCEPTED)
    await campaigns.finish(shop.pool)


async def _resume_if_paused(db: database.Connection, campaign: Campaign) -> None:
    if campaign.status == CampaignStatus.PAUSED:
        await campaigns.resume(db, campaign)
