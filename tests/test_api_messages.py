"""Single messages over HTTP, and asking Mitto again, of a look-alike that is a real server."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from conftest import Api, TenantCaller
from shop import PHONE, Shop, add_contacts, shop_of

from smsd import api as http_api
from smsd import mitto, queue
from smsd.database import Connection, Pool
from smsd.simulator import Simulator, Switches


@pytest.fixture
async def me(api: Api) -> TenantCaller:
    return await api.new_tenant(credits=100)


@pytest.fixture
async def db(api: Api) -> Pool:
    return api.ctx.pool


# ------------------------------------------------------------------------------------- single ones


async def test_a_message_is_queued_held_and_told_to_the_senders(
    me: TenantCaller, db: Pool, connection: Connection
) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    await connection.add_listener(
        "smsd_lane", lambda _c, _pid, _channel, payload: heard.put_nowait(str(payload))
    )
    reply = await me.post(
        "/api/messages", {"phone": "6944123456", "text": "Γεια", "reference": "order 7"}
    )
    assert (reply.status, reply.body["status"]) == (202, "queued")
    assert await asyncio.wait_for(heard.get(), 5) == str(me.account_id)
    shown = await me.get(f"/api/messages/{reply.body['id']}")
    assert shown.status == 200
    created_at = shown.body.pop("createdAt")
    assert created_at.endswith("Z")
    assert shown.body == {
        "id": reply.body["id"], "campaignId": None, "to": "+306944123456", "text": "Γεια", "segments": 1,
        "status": "queued", "reason": None, "detail": None, "providerMessageId": None, "bulkId": None,
        "reference": "order 7", "attempts": [], "acceptedAt": None, "finishedAt": None,
    }  # fmt: skip
    assert (await me.get("/api/credits")).body["reserved"] == 1
    assert await db.fetchval("select sender from batch") == "Shop"


async def test_a_message_that_is_asked_for_many_times_at_once_under_one_key_is_one(
    me: TenantCaller, db: Pool
) -> None:
    body, headers = {"phone": "+306944123456", "text": "Hi"}, {"Idempotency-Key": "k"}
    replies = await asyncio.gather(
        *(me.post("/api/messages", body, headers=headers) for _ in range(12))
    )
    assert {reply.status for reply in replies} == {202}
    assert len({reply.text for reply in replies}) == 1
    assert await db.fetchval("select count(*) from message") == 1
    assert (await me.get("/api/credits")).body["reserved"] == 1


async def test_a_message_to_a_contact_goes_to_its_number(me: TenantCaller, db: Pool) -> None:
    (contact_id,) = await add_contacts(db, me.id, 1)
    reply = await me.post("/api/messages", {"contactId": contact_id, "text": "Hi", "sender": "Eva"})
    assert reply.status == 202
    assert (await me.get(f"/api/messages/{reply.body['id']}")).body["to"] == f"+{PHONE}"
    assert await db.fetchval("select sender from batch") == "Eva"


BAD: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"text": "Hi"}, 400, "VALIDATION_ERROR", "phone"),
    ({"phone": "+306944123456", "contactId": 1, "text": "Hi"}, 400, "VALIDATION_ERROR", "phone"),
    ({"phone": "none", "text": "Hi"}, 400, "VALIDATION_ERROR", "phone"),
    ({"phone": 306944123456, "text": "Hi"}, 400, "VALIDATION_ERROR", "phone"),
    ({"phone": "+30694\x00", "text": "Hi"}, 400, "VALIDATION_ERROR", "phone"),
    ({"contactId": 999, "text": "Hi"}, 400, "VALIDATION_ERROR", "contactId"),
    ({"contactId": "1", "text": "Hi"}, 400, "VALIDATION_ERROR", "contactId"),
    ({"phone": "+306944123456"}, 400, "VALIDATION_ERROR", "text"),
    ({"phone": "+306944123456", "text": ""}, 400, "VALIDATION_ERROR", "text"),
    ({"phone": "+306944123456", "text": "x" * 1_601}, 400, "VALIDATION_ERROR", "text"),
    ({"phone": "+306944123456", "text": "a\x07"}, 400, "VALIDATION_ERROR", "text"),
    ({"phone": "+306944123456", "text": "a\0"}, 400, "VALIDATION_ERROR", "text"),
    ({"phone": "+306944123456", "text": "Hi", "sender": "a b"}, 400, "VALIDATION_ERROR", "sender"),
    (
        {"phone": "+306944123456", "text": "Hi", "reference": ""},
        400,
        "VALIDATION_ERROR",
        "reference",
    ),
    (
        {"phone": "+306944123456", "text": "Hi", "onUnknown": "x"},
        400,
        "VALIDATION_ERROR",
        "onUnknown",
    ),
    ({"phone": "+306944123456", "text": "Hi", "odd": 1}, 400, "VALIDATION_ERROR", "odd"),
    ({"phone": "+306944123456", "text": "x" * 1_600 + "\n"}, 400, "VALIDATION_ERROR", "text"),
]


async def test_a_message_that_cannot_be_sent_is_refused_by_name(me: TenantCaller, db: Pool) -> None:
    for body, status, code, field in BAD:
        reply = await me.post("/api/messages", body)
        assert (reply.status, reply.body["code"]) == (status, code), body
        if field is not None:
            assert reply.body["details"][0]["field"] == field, body
            assert field in reply.body["message"], body
    assert await db.fetchval("select count(*) from message") == 0
    assert await db.fetchval("select sum(reserved) from credit") == 0


async def test_a_message_needs_a_sender_credits_and_an_active_subscription(api: Api) -> None:
    tenant = await api.new_tenant(sender=None, credits=1)
    message = {"phone": "+306944123456", "text": "x" * 161}
    reply = await tenant.post("/api/messages", message)
    assert (reply.status, reply.body["code"]) == (400, "NO_SENDER")
    message["sender"] = "Eva"
    headers = {"Idempotency-Key": "one"}
    reply = await tenant.post("/api/messages", message, headers=headers)
    assert (reply.status, reply.body["code"]) == (402, "INSUFFICIENT_CREDITS")
    assert reply.body["details"] == {"required": 2, "available": 1}
    await api.admin.patch(f"/api/admin/tenants/{tenant.id}", {"subscription": "inactive"})
    reply = await tenant.post("/api/messages", message)
    assert (reply.status, reply.body["code"]) == (403, "INACTIVE_SUBSCRIPTION")
    await api.admin.patch(f"/api/admin/tenants/{tenant.id}", {"subscription": "active"})
    grant = {"amount": 1, "reason": "top-up"}
    await api.admin.post(f"/api/admin/tenants/{tenant.id}/credits", grant)
    first = await tenant.post("/api/messages", message, headers=headers)
    again = await tenant.post("/api/messages", message, headers=headers)
    assert (first.status, again.status, again.body) == (202, 202, first.body)
    assert await api.ctx.pool.fetchval("select count(*) from message") == 1


async def test_messages_sent_at_once_never_cost_more_than_there_is(api: Api) -> None:
    tenant = await api.new_tenant(credits=3)
    message = {"phone": "+306944123456", "text": "Hi"}
    replies = await asyncio.gather(*(tenant.post("/api/messages", message) for _ in range(6)))
    assert sorted(reply.status for reply in replies) == [202, 202, 202, 402, 402, 402]
    assert len({r.body["id"] for r in replies if r.status == 202}) == 3
    assert (await tenant.get("/api/credits")).body == {"balance": 3, "reserved": 3, "available": 0}


async def test_another_tenants_contact_and_message_do_not_exist(
    api: Api, me: TenantCaller, db: Pool
) -> None:
    (contact_id,) = await add_contacts(db, me.id, 1)
    sent = await me.post("/api/messages", {"contactId": contact_id, "text": "Hi"})
    other = await api.new_tenant(credits=10)
    reply = await other.post("/api/messages", {"contactId": contact_id, "text": "Hi"})
    assert (reply.status, reply.body["details"][0]["field"]) == (400, "contactId")
    for message_id in (sent.body["id"], sent.body["id"] + 99, 2**63 - 1, 2**63, 0):
        for reply in (
            await other.get(f"/api/messages/{message_id}"),
            await other.post(f"/api/messages/{message_id}/refresh"),
        ):
            assert (reply.status, reply.body["code"]) == (404, "NOT_FOUND")


# --------------------------------------------------------------------------------------- asking again


@dataclass
class World:
    """The API with a look-alike of Mitto behind it, and a tenant whose messages that accepted."""

    api: Api
    me: TenantCaller
    shop: Shop
    simulator: Simulator
    client: mitto.Client

    async def send(self) -> None:
        """Posts all that is ready, and settles as the sender does."""
        account = mitto.Account(self.me.account_id, "mitto-1", "secret", "refused")
        while posted := await self.shop.post(8):
            for grant, intent in posted:
                items = [
                    mitto.Item(id_, phone, text, intent.sender)
                    for id_, phone, text in zip(
                        intent.ids, intent.phones, intent.texts, strict=True
                    )
                ]
                result = await self.client.send(account, items, lambda: None)
                await queue.settle_items(
                    self.shop.pool,
                    grant.batch_id,
                    intent.attempt,
                    queue.Answer.of(result.items, result.bulk_id, 200),
                )

    async def campaign(self, n: int) -> int:
        """A campaign of so many accepted messages; its id."""
        await add_contacts(self.shop.pool, self.me.id, n)
        body = {"name": "Sale", "messageText": "Hi", "messageType": "service"}
        campaign_id = int((await self.me.post("/api/campaigns", body)).body["id"])
        assert (await self.me.post(f"/api/campaigns/{campaign_id}/enqueue")).status == 202
        await self.shop.expand(n)
        await self.send()
        return campaign_id


@pytest.fixture
async def world(api: Api) -> AsyncIterator[World]:
    switches = Switches(dlr=False, dlr_delay_seconds=(0, 0))
    async with (
        Simulator(switches, api_keys={"secret"}) as simulator,
        mitto.Client(simulator.url, 5) as client,
    ):
        ctx = replace(api.ctx, mitto=client)
        async with TestClient(TestServer(http_api.build(ctx), host="127.0.0.1")) as caller:
            around = Api(caller, ctx, api.nudges)
            account_id = await around.new_account(apiKey="secret", requestsPerSecond=1_000)
            me = await around.new_tenant(
                account_id=account_id, credits=1_000, requestsPerSecond=1_000
            )
            yield World(around, me, await shop_of(around, me), simulator, client)


async def test_a_message_is_asked_about_until_its_fate_is_known(world: World) -> None:
    message_id = (
        await world.me.post("/api/messages", {"phone": "+306944123456", "text": "Hi"})
    ).body["id"]
    path = f"/api/messages/{message_id}/refresh"
    assert (await world.me.post(path)).body["status"] == "queued"
    await world.send()
    shown = (await world.me.post(path)).body
    assert shown["status"] == "delivered"
    assert shown["finishedAt"] is not None
    asked = len(world.simulator.ledger.requests)
    assert (await world.me.post(path)).body == shown
    assert len(world.simulator.ledger.requests) == asked


async def test_a_refresh_asks_for_a_hundred_at_a_time_and_goes_on_where_it_stopped(
    world: World,
) -> None:
    campaign_id = await world.campaign(130)
    path = f"/api/campaigns/{campaign_id}/refresh-status"
    first = await world.me.post(path)
    assert (first.status, first.body) == (200, {"refreshed": 100, "updated": 100, "pending": 30})
    assert (await world.me.post(path)).body == {"refreshed": 30, "updated": 30, "pending": 0}
    assert (await world.me.post(path)).body == {"refreshed": 0, "updated": 0, "pending": 0}
    metrics = (await world.me.get(f"/api/campaigns/{campaign_id}/status")).body["metrics"]
    assert (metrics["delivered"], metrics["pendingDelivery"]) == (130, 0)


async def test_a_refresh_that_brings_no_news_changes_nothing(world: World) -> None:
    world.simulator.switches = Switches(dlr=False, dlr_delay_seconds=(600, 600))
    campaign_id = await world.campaign(5)
    reply = await world.me.post(f"/api/campaigns/{campaign_id}/refresh-status")
    assert reply.body["refreshed"] == 5
    assert reply.body["pending"] == 5


async def test_a_refresh_stays_within_its_share_of_the_accounts_limit(world: World) -> None:
    campaign_id = await world.campaign(12)
    path = f"/api/admin/traffic-accounts/{world.me.account_id}"
    await world.api.admin.patch(path, {"requestsPerSecond": 50})
    before = len(world.simulator.ledger.requests)
    reply = await world.me.post(f"/api/campaigns/{campaign_id}/refresh-status")
    assert reply.body["refreshed"] == 12
    arrived = sorted(one.arrived_at for one in world.simulator.ledger.requests[before:])
    assert len(arrived) == 12
    # A fifth of 50 a second: the first at once, each of the other eleven a tenth of a second later.
    assert arrived[-1] - arrived[0] > 11 * 0.1 - 0.05


async def test_a_refresh_stops_when_mitto_wants_less_and_the_account_waits(world: World) -> None:
    campaign_id = await world.campaign(30)
    world.simulator.switches.max_requests_per_second = 1
    before = len(world.simulator.ledger.requests)
    reply = await world.me.post(f"/api/campaigns/{campaign_id}/refresh-status")
    assert reply.status == 200
    assert reply.body["refreshed"] < 30
    # One that is answered, and those that were on their way when it said so.
    assert len(world.simulator.ledger.requests) - before <= 1 + 8
    blocked = await world.shop.pool.fetchval(
        "select blocked_until > clock_timestamp() - interval '10 s' from traffic_account where id = $1",
        world.me.account_id,
    )
    assert blocked


async def test_a_refresh_survives_a_mitto_that_is_away(world: World) -> None:
    campaign_id = await world.campaign(3)
    await world.simulator.stop()
    reply = await world.me.post(f"/api/campaigns/{campaign_id}/refresh-status")
    assert (reply.status, reply.body) == (200, {"refreshed": 0, "updated": 0, "pending": 3})
    await world.simulator.start()
    reply = await world.me.post(f"/api/campaigns/{campaign_id}/refresh-status")
    assert reply.body == {"refreshed": 3, "updated": 3, "pending": 0}
