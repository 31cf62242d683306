"""Money: grants, holds and releases add up under any concurrency, and the ledger explains them."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import asyncpg
import pytest
from conftest import Api
from shop import ACCEPTED, REFUSED, Shop, add_contacts, shop_of, until_somebody_waits
from support import assert_sound, broken, new_account, open_shop

from smsd import campaigns, database, expansions, mitto, queue
from smsd import credits as money
from smsd.credits import Credits
from smsd.database import Connection, Pool
from smsd.expander import Expander
from smsd.expansions import OutOfCredits
from smsd.model import CampaignStatus
from smsd.queue import Grant, Intent

T = TypeVar("T")


async def campaign_paused(db: Pool, tenant_id: int, reason: str) -> int:
    """A campaign of this tenant that stands still for a reason, with its lane and expansion."""
    campaign_id = int(
        await db.fetchval(
            "insert into campaign (tenant_id, name, status, paused_reason) values ($1, 'c', 'paused', $2) "
            "returning id",
            tenant_id,
            reason,
        )
    )
    lane_id = await db.fetchval(
        "insert into lane (account_id, tenant_id, class, campaign_id, paused) "
        "select account_id, id, 1, $2, true from tenant where id = $1 returning id",
        tenant_id,
        campaign_id,
    )
    await db.execute(
        "insert into expansion (campaign_id, tenant_id, lane_id, source, sender, template, as_of, batch_size, "
        "highest_id, of, held, state) values ($1, $2, $3, 'contacts', 's', 't', '2026-01-01', 100, 0, 0, 0, 'paused')",
        campaign_id,
        tenant_id,
        lane_id,
    )
    return campaign_id


async def state_of(db: Pool, campaign_id: int) -> tuple[str, str | None, str, bool, bool]:
    """Status, reason, expansion, whether its lane is paused, whether it is idle."""
    row = await db.fetchrow(
        "select c.status, c.paused_reason, e.state, l.paused, l.idle from campaign c "
        "join expansion e on e.campaign_id = c.id join lane l on l.campaign_id = c.id where c.id = $1",
        campaign_id,
    )
    assert row is not None
    return (row[0], row[1], row[2], row[3], row[4])


async def test_a_grant_is_in_the_balance_and_in_the_ledger(api: Api) -> None:
    tenant = await api.new_tenant()
    path = f"/api/admin/tenants/{tenant.id}/credits"
    granted = await api.admin.post(path, {"amount": 100, "reason": "invoice 17"})
    assert (granted.status, granted.body) == (
        200,
        {"balance": 100, "reserved": 0, "available": 100},
    )
    assert (await tenant.get("/api/credits")).body == granted.body
    ledger = (await tenant.get("/api/credits/ledger")).body
    assert (ledger["total"], ledger["page"], ledger["pageSize"]) == (1, 1, 20)
    entry = ledger["items"][0]
    assert (entry["kind"], entry["amount"], entry["reason"]) == ("grant", 100, "invoice 17")
    assert (entry["balanceAfter"], entry["reservedAfter"]) == (100, 0)
    assert entry["at"].endswith("Z")


async def test_a_hold_takes_from_what_is_available_and_a_release_gives_it_back(api: Api) -> None:
    tenant = await api.new_tenant(credits=100)
    assert await money.hold(api.ctx.pool, tenant.id, 60, 5, "campaign")
    assert await money.balance(api.ctx.pool, tenant.id) == Credits(100, 60)
    assert not await money.hold(api.ctx.pool, tenant.id, 41, 5, "campaign")
    assert await money.balance(api.ctx.pool, tenant.id) == Credits(100, 60)
    await money.release(api.ctx.pool, tenant.id, 10, 5, "shorter")
    assert (await tenant.get("/api/credits")).body == {
        "balance": 100,
        "reserved": 50,
        "available": 50,
    }
    entries, total = await money.ledger(api.ctx.pool, tenant.id, 10, 0)
    assert total == 3
    assert [(e.kind, e.amount, e.campaign_id, e.reason) for e in entries] == [
        ("release", 10, 5, "shorter"),
        ("hold", 60, 5, "campaign"),
        ("grant", 100, None, "test"),
    ]


async def test_holds_at_once_never_take_more_than_there_is(api: Api, dsn: str) -> None:
    tenant = await api.new_tenant(credits=100)
    held = await asyncio.gather(
        *(money.hold(api.ctx.pool, tenant.id, 7, 0, "race") for _ in range(40))
    )
    assert Counter(held) == {True: 14, False: 26}
    assert await money.balance(api.ctx.pool, tenant.id) == Credits(100, 98)


async def test_nothing_can_be_released_that_was_not_held(api: Api) -> None:
    tenant = await api.new_tenant(credits=100)
    with pytest.raises(asyncpg.CheckViolationError, match="credit_reserved_check"):
        await money.release(api.ctx.pool, tenant.id, 1, 1, "made up")
    assert await money.balance(api.ctx.pool, tenant.id) == Credits(100, 0)


async def test_the_ledger_adds_up_to_the_balance(api: Api) -> None:
    tenant = await api.new_tenant(credits=1000)
    pool = api.ctx.pool

    async def use(n: int) -> None:
        if await money.hold(pool, tenant.id, n, 0, "hold"):
            await money.release(pool, tenant.id, n // 2, 1, "part")

    await asyncio.gather(*(use(n) for n in range(40, 60)))
    row = await pool.fetchrow(
        "select sum(case kind when 'grant' then amount when 'spend' then -amount else 0 end) as balance, "
        "sum(case kind when 'hold' then amount when 'grant' then 0 else -amount end) as reserved "
        "from ledger where tenant_id = $1",
        tenant.id,
    )
    assert row is not None
    assert Credits(int(row["balance"]), int(row["reserved"])) == await money.balance(
        pool, tenant.id
    )


async def test_a_grant_pays_what_is_overdue_first(api: Api, connection: Connection) -> None:
    tenant = await api.new_tenant()
    await connection.execute("update credit set overdue = 30 where tenant_id = $1", tenant.id)
    path = f"/api/admin/tenants/{tenant.id}/credits"
    first = await api.admin.post(path, {"amount": 20, "reason": "part"})
    assert first.body == {"balance": 0, "reserved": 0, "available": 0}
    second = await api.admin.post(path, {"amount": 20, "reason": "rest"})
    assert second.body == {"balance": 10, "reserved": 0, "available": 10}
    row = await connection.fetchrow("select * from credit where tenant_id = $1", tenant.id)
    assert row is not None
    assert (row["granted"], row["spent"], row["overdue"]) == (40, 30, 0)


async def test_a_grant_lets_go_on_what_had_stopped_for_want_of_credits(api: Api) -> None:
    tenant = await api.new_tenant()
    pool = api.ctx.pool
    poor = await campaign_paused(pool, tenant.id, "INSUFFICIENT_CREDITS")
    halted = await campaign_paused(pool, tenant.id, "PAUSED_BY_USER")
    heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    async with pool.acquire() as listener:
        for channel in ("smsd_lane", "smsd_expansion"):
            await listener.add_listener(
                channel, lambda _c, _p, name, payload: heard.put_nowait((name, str(payload)))
            )
        await money_granted(api, tenant.id)
        news = {await heard.get(), await heard.get()}
        await listener.reset()
    assert news == {("smsd_lane", str(tenant.account_id)), ("smsd_expansion", str(poor))}
    assert await state_of(pool, poor) == ("sending", None, "running", False, False)
    assert (await state_of(pool, halted))[:4] == ("paused", "PAUSED_BY_USER", "paused", True)


async def money_granted(api: Api, tenant_id: int) -> None:
    path = f"/api/admin/tenants/{tenant_id}/credits"
    assert (await api.admin.post(path, {"amount": 5, "reason": "more"})).status == 200


async def test_credits_for_an_inactive_tenant_leave_its_campaigns_to_the_subscription(
    api: Api,
) -> None:
    tenant = await api.new_tenant()
    pool = api.ctx.pool
    poor = await campaign_paused(pool, tenant.id, "INSUFFICIENT_CREDITS")
    path = f"/api/admin/tenants/{tenant.id}"
    await api.admin.patch(path, {"subscription": "inactive"})
    await money_granted(api, tenant.id)
    assert (await state_of(pool, poor))[:2] == ("paused", "INACTIVE_SUBSCRIPTION")
    await api.admin.patch(path, {"subscription": "active"})
    assert (await state_of(pool, poor))[:3] == ("sending", None, "running")


async def test_a_tenant_sees_its_own_ledger_alone(api: Api) -> None:
    one, other = await api.new_tenant(credits=10), await api.new_tenant(credits=20)
    for tenant, amount in ((one, 10), (other, 20)):
        ledger = (await tenant.get("/api/credits/ledger")).body
        assert [entry["amount"] for entry in ledger["items"]] == [amount]


async def test_the_ledger_comes_in_pages_newest_first(api: Api) -> None:
    tenant = await api.new_tenant()
    path = f"/api/admin/tenants/{tenant.id}/credits"
    for amount in range(1, 6):
        await api.admin.post(path, {"amount": amount, "reason": "r"})
    pages = [
        (await tenant.get(f"/api/credits/ledger?page={page}&pageSize=2")).body for page in (1, 2, 3)
    ]
    assert [[e["amount"] for e in page["items"]] for page in pages] == [[5, 4], [3, 2], [1]]
    assert {page["total"] for page in pages} == {5}


@pytest.mark.parametrize("amount", [0, -1, 10**12 + 1, 1.5, True, "5", None])
async def test_an_amount_that_is_none_is_refused_by_name(api: Api, amount: object) -> None:
    tenant = await api.new_tenant()
    path = f"/api/admin/tenants/{tenant.id}/credits"
    reply = await api.admin.post(path, {"amount": amount, "reason": "r"})
    assert (reply.status, reply.body["code"]) == (400, "VALIDATION_ERROR")
    assert [detail["field"] for detail in reply.body["details"]] == ["amount"]
    assert (await tenant.get("/api/credits")).body["balance"] == 0


async def test_credits_for_nobody_are_404(api: Api) -> None:
    reply = await api.admin.post("/api/admin/tenants/99/credits", {"amount": 1, "reason": "r"})
    assert (reply.status, reply.body["code"]) == (404, "NOT_FOUND")


# ------------------------------------------------------------------------------------ the ledger stays


@pytest.mark.parametrize(
    "statement", ["update ledger set amount = 6", "delete from ledger", "truncate ledger"]
)
async def test_what_the_ledger_says_cannot_be_changed_but_by_retention(
    api: Api, connection: Connection, statement: str
) -> None:
    tenant = await api.new_tenant(credits=5)
    with pytest.raises(asyncpg.RestrictViolationError, match="the ledger only grows"):
        await connection.execute(statement)
    assert (await tenant.get("/api/credits/ledger")).body["items"][0]["amount"] == 5
    async with connection.transaction():
        await connection.execute("set local smsd.retention = 'on'")
        await connection.execute(statement)
    with pytest.raises(asyncpg.RestrictViolationError):
        await connection.execute(statement)


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        ("'grant', 5, null, null, null", "ledger_grant"),
        ("'grant', 5, 7, null, 'x'", "ledger_grant"),
        ("'grant', 5, null, 7, 'x'", "ledger_grant"),
        ("'hold', 5, 7, null, null", "ledger_hold"),
        ("'spend', 5, null, null, 'accepted'", "ledger_spend"),
        ("'spend', 5, null, null, null", "ledger_spend"),
        ("'release', 5, null, null, 'cancelled'", "ledger_release"),
        ("'grant', 0, null, null, 'x'", "ledger_amount_check"),
        ("'grant', -5, null, null, 'x'", "ledger_amount_check"),
        ("'refund', 5, null, null, 'x'", "ledger_kind_check"),
    ],
)
async def test_an_entry_that_explains_nothing_is_refused(
    connection: Connection, entry: str, rule: str
) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match=f'"{rule}"'):
        await connection.execute(
            "insert into ledger (tenant_id, balance_after, reserved_after, kind, amount, campaign_id, batch_id, reason)"
            f" select 1, 10, 10, {entry}"
        )


async def test_a_top_up_that_is_sent_again_and_again_is_one(api: Api) -> None:
    tenant = await api.new_tenant()
    path = f"/api/admin/tenants/{tenant.id}/credits"
    top_up = {"amount": 50, "reason": "invoice 18"}
    headers = {"Idempotency-Key": "invoice-18"}
    replies = await asyncio.gather(
        *(api.admin.post(path, top_up, headers=headers) for _ in range(12))
    )
    assert {reply.status for reply in replies} == {200}
    assert {reply.body["balance"] for reply in replies} == {50}
    assert (await tenant.get("/api/credits/ledger")).body["total"] == 1


# ------------------------------------------------------------------------------------ running dry


async def running_dry(pool: Pool) -> tuple[Shop, int, expansions.Expansion, OutOfCredits]:
    """A shop whose campaign's only chunk has just turned out to need more than there is."""
    shop = await open_shop(
        pool, await new_account(pool), await queue.register(pool, "test", "0"), granted=10
    )
    campaign_id = await shop.begin(10)
    expansion = await expansions.claim(pool, shop.replica_id)
    assert expansion is not None
    with pytest.raises(OutOfCredits) as short:
        await shop.write(expansion, 10, segments=3)
    await expansions.let_go(pool, expansion, shop.replica_id)
    return shop, campaign_id, expansion, short.value


async def top_up(connection: Connection, shop: Shop) -> None:
    await money.grant(connection, shop.id, 20, "top-up")


async def test_a_top_up_between_running_dry_and_the_pause_leaves_nothing_paused(pool: Pool) -> None:
    shop, campaign_id, expansion, short = await running_dry(pool)
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await top_up(connection, shop)
        pausing = asyncio.create_task(expansions.pause_for_credits(pool, expansion, short))
        await until_somebody_waits(pool)
        await transaction.commit()
        await pausing
    assert await shop.status(campaign_id) == CampaignStatus.SENDING
    assert await shop.expand(10, segments=3) == campaign_id
    await assert_sound(pool)


async def test_a_top_up_while_the_pause_is_written_resumes(pool: Pool) -> None:
    shop, campaign_id, expansion, short = await running_dry(pool)

    async def topping_up() -> None:
        async with pool.acquire() as connection, connection.transaction():
            await top_up(connection, shop)

    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await expansions.pause_for_credits(connection, expansion, short)
        topped_up = asyncio.create_task(topping_up())
        await until_somebody_waits(pool)
        await transaction.commit()
        await topped_up
    assert await shop.status(campaign_id) == CampaignStatus.SENDING
    assert await shop.expand(10, segments=3) == campaign_id
    await assert_sound(pool)


# ------------------------------------------------------------------------------------ all at once


async def test_64_enqueues_at_once_beside_senders_spend_what_there_is_and_no_more(
    api: Api, dsn: str
) -> None:
    recipients, affordable = 5, 20
    tenant = await api.new_tenant(credits=recipients * affordable, requestsPerSecond=5_000)
    await api.admin.patch(
        f"/api/admin/traffic-accounts/{tenant.account_id}", {"requestsPerSecond": 5_000}
    )
    await add_contacts(api.ctx.pool, tenant.id, recipients)
    ids = []
    for i in range(64):
        draft = {"name": f"Sale {i}", "messageText": "Hi", "messageType": "service"}
        ids.append((await tenant.post("/api/campaigns", draft)).body["id"])
    shop = await shop_of(api, tenant)
    wide = await database.open_pool(dsn, 6)
    shop.pool = wide
    standing = queue.Standing("test", 30, shop.replica_id, mitto.clock())
    expander = Expander(wide, standing, api.ctx.keys, "https://sms.example")
    over = asyncio.Event()

    async def expand() -> None:
        while not over.is_set():
            await asyncio.sleep(0 if await expander.expand_one() else 0.005)

    async def send() -> None:
        while not over.is_set():
            await shop.send_all(ACCEPTED)
            await asyncio.sleep(0.005)

    working = [asyncio.create_task(work()) for work in (expand, send, send, send)]
    replies = await asyncio.gather(*(tenant.post(f"/api/campaigns/{one}/enqueue") for one in ids))
    assert Counter(reply.status for reply in replies) == {202: affordable, 402: 64 - affordable}
    async with asyncio.timeout(20):
        while (await money.balance(wide, tenant.id)).balance:
            await asyncio.sleep(0.01)
    over.set()
    await asyncio.gather(*working)
    assert await money.balance(wide, tenant.id) == Credits(0, 0)
    await assert_sound(wide)
    await wide.close()


async def written(action: Callable[[], Awaitable[T]]) -> T:
    """Until nobody stands in its way, as `database.until_written` does, but without a pause."""
    while True:
        try:
            return await action()
        except (asyncpg.TransactionRollbackError, asyncpg.LockNotAvailableError):
            await asyncio.sleep(0)


@dataclass
class Bustle:
    """Everybody who moves credits at work at once, each step drawn from one seed."""

    shop: Shop
    dice: random.Random
    campaigns: list[int]
    in_doubt: list[tuple[Grant, Intent]] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    decided: asyncio.Event = field(default_factory=asyncio.Event)

    async def expand_on(self) -> None:
        while not self.decided.is_set():
            await self.expand()
            await asyncio.sleep(0.005)

    async def expand(self) -> None:
        while (one := await expansions.claim(self.shop.pool, self.shop.replica_id)) is not None:
            last, skipped = one.read + 10 >= one.of, self.dice.randrange(3)
            segments = self.dice.choice((1, 1, 2))
            try:
                await written(partial(self.shop.write, one, 10, skipped, last, segments))
            except OutOfCredits as short:
                await expansions.let_go(self.shop.pool, one, self.shop.replica_id)
                await expansions.pause_for_credits(self.shop.pool, one, short)
                self.done["ran dry"] += 1
            await asyncio.sleep(0)

    async def send(self) -> None:
        while not self.decided.is_set():
            for grant in await written(lambda: self.shop.claim(2)):
                await self.go_on_with(grant)
            await asyncio.sleep(0.002)

    async def go_on_with(self, grant: Grant) -> None:
        pool, shop = self.shop.pool, self.shop
        if self.dice.random() < 0.1:
            await written(lambda: queue.withdraw(pool, grant, "test"))
            return
        intent = await written(lambda: queue.intent(pool, grant, shop.replica_id))
        self.done[intent.verdict] += 1
        if intent.verdict != "post":
            return
        action = self.dice.choice(
            (
                "accepted",
                "refused",
                "mixed",
                "withdraw",
                "again",
                "back",
                "refused",
                "unknown",
                "die",
            )
        )
        self.done[action] += 1
        if action in ("unknown", "die"):
            self.in_doubt.append((grant, intent))
        if action in ("accepted", "mixed"):
            states = [ACCEPTED, REFUSED] if action == "mixed" else [ACCEPTED]
            await written(lambda: shop.answer(grant, intent, *states))
        elif action == "withdraw":
            await written(lambda: queue.withdraw(pool, grant, "test"))
        elif action != "die":
            await written(lambda: self.settle(grant, intent, action))
            if self.dice.random() < 0.3:  # its acknowledgement was lost
                await written(lambda: self.settle(grant, intent, action))

    async def settle(self, grant: Grant, intent: Intent, action: str) -> str:
        return await queue.settle_batch(
            self.shop.pool, grant.batch_id, intent.attempt, action, action, most=2
        )

    async def decide(self) -> None:
        for _ in range(20):
            action = self.dice.choice(
                (campaigns.pause, campaigns.resume, campaigns.retry_failed, campaigns.retry_failed)
                + (campaigns.cancel,) * (self.dice.random() < 0.3)
            )
            with suppress(campaigns.WrongStatus, NotHeld):
                await written(partial(self.act, self.dice.choice(self.campaigns), action))
                self.done[action.__name__] += 1
            await asyncio.sleep(0.01)
        self.decided.set()

    async def act(self, campaign_id: int, action: Callable[..., Any]) -> None:
        async def all_or_nothing(connection: Connection, campaign: campaigns.Campaign) -> None:
            result = await action(connection, campaign)
            if isinstance(result, campaigns.Retry) and not result.held:
                raise NotHeld

        await self.shop.act(campaign_id, all_or_nothing)

    async def opt_out(self) -> None:
        for _ in range(8):
            phone = self.shop.phones - self.dice.randrange(1, 60)
            await self.shop.pool.execute(
                "insert into opt_out (tenant_id, phone, source) values ($1, $2, 'stop') on conflict do nothing",
                self.shop.id, phone,
            )  # fmt: skip
            await asyncio.sleep(0.01)

    async def end(self) -> None:
        """Everything comes to its end: what is in doubt is answered, what waits is sent or cancelled."""
        pool, shop = self.shop.pool, self.shop
        for campaign_id in self.campaigns:
            with suppress(campaigns.WrongStatus):
                action = campaigns.cancel if self.dice.random() < 0.5 else campaigns.resume
                await shop.act(campaign_id, action)
        async with pool.acquire() as connection, connection.transaction():
            await money.grant(connection, shop.id, 1_000, "enough")
        await self.expand()
        await shop.send_all(ACCEPTED)
        for grant, intent in self.in_doubt:
            await written(partial(shop.answer, grant, intent, ACCEPTED, REFUSED))
        await shop.send_all(ACCEPTED)


class NotHeld(Exception):  # noqa: N818
    """A retry that the credits do not reach for: all of it is rolled back."""


@pytest.mark.parametrize("seed", range(5))
async def test_every_hold_comes_back_once_or_is_spent_once_whatever_happens_at_once(
    pool: Pool, connection: Connection, seed: int
) -> None:
    account_id = await new_account(pool, requests_per_second=50_000)
    shop = await open_shop(pool, account_id, await queue.register(pool, "test", "0"), granted=130)
    bustle = Bustle(shop, random.Random(seed), [await shop.begin(20) for _ in range(6)])
    over = asyncio.Event()

    async def watch() -> None:
        while not over.is_set():
            assert await broken(pool) == {}
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    await asyncio.gather(
        bustle.expand_on(), bustle.send(), bustle.send(), bustle.send(), bustle.decide(),
        bustle.decide(), bustle.opt_out(),
    )  # fmt: skip
    await bustle.end()
    over.set()
    await watching
    assert await pool.fetchval("select count(*) from batch where state < 10 or state = 11") == 0
    assert (await money.balance(pool, shop.id)).reserved == 0
    await assert_sound(pool)
    assert bustle.done["post"], "nothing was sent"
