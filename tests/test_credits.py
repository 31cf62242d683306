"""Money: grants, holds and releases add up under any concurrency, and the ledger explains them."""

import asyncio
from collections import Counter

import pytest
from conftest import Api

from smsd import credits as money
from smsd.credits import Credits
from smsd.database import Connection, Pool


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
    with pytest.raises(Exception, match="check constraint"):
        await money.release(api.ctx.pool, tenant.id, 1, 0, "made up")
    assert await money.balance(api.ctx.pool, tenant.id) == Credits(100, 0)


async def test_the_ledger_adds_up_to_the_balance(api: Api) -> None:
    tenant = await api.new_tenant(credits=1000)
    pool = api.ctx.pool

    async def use(n: int) -> None:
        if await money.hold(pool, tenant.id, n, 0, "hold"):
            await money.release(pool, tenant.id, n // 2, 0, "part")

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
