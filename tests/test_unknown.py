"""A person's word on unknown messages, over HTTP."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import Api, Reply, TenantCaller
from shop import ACCEPTED, UNKNOWN, Shop, check_the_account, shop_of
from support import assert_sound

from smsd import campaigns, evidence, queue
from smsd.queue import ReceiptRow


@dataclass
class Case:
    """A tenant with a campaign of two batches of two, both posted, of which nobody knows."""

    api: Api
    tenant: TenantCaller
    shop: Shop
    campaign_id: int
    batch_ids: list[int]
    message_ids: list[int]

    async def say(self, **body: Any) -> Reply:
        headers = {"Idempotency-Key": body.pop("key")} if "key" in body else {}
        path = f"/api/campaigns/{self.campaign_id}/unknown"
        return await self.tenant.post(path, body, headers=headers)

    async def age(self, seconds: float) -> None:
        await self.api.ctx.pool.execute(
            "update attempt set intent_at = intent_at - make_interval(secs => $1),"
            " ended_at = ended_at - make_interval(secs => $1)",
            seconds,
        )

    async def status(self) -> dict[str, Any]:
        reply = await self.tenant.get(f"/api/campaigns/{self.campaign_id}/status")
        assert reply.status == 200
        await check_the_account(self.shop, self.campaign_id)
        return dict(reply.body)


@pytest.fixture
async def case(api: Api) -> AsyncIterator[Case]:
    tenant = await api.new_tenant(credits=1_000)
    shop = await shop_of(api, tenant)
    campaign_id = await shop.sending(4, batch_size=2)
    posted = await shop.post(4)
    for grant, intent in posted:
        await queue.settle_batch(
            shop.pool, grant.batch_id, intent.attempt, "unknown", "unknown", detail="TimeoutError"
        )
    await campaigns.finish(shop.pool)
    ids = [one for _, intent in posted for one in intent.ids]
    yield Case(api, tenant, shop, campaign_id, [grant.batch_id for grant, _ in posted], ids)
    await assert_sound(shop.pool)


async def test_sent_makes_messages_accepted_and_spends_their_credits(case: Case) -> None:
    reply = await case.say(**{"as": "sent"}, batchId=case.batch_ids[0])
    assert (reply.status, reply.body) == (200, {"resolved": 2})
    metrics = (await case.status())["metrics"]
    assert (metrics["accepted"], metrics["pendingDelivery"], metrics["unknown"]) == (2, 2, 2)
    credits = await case.tenant.get("/api/credits")
    assert credits.body == {"balance": 998, "reserved": 2, "available": 996}
    message = await case.tenant.get(f"/api/messages/{case.message_ids[0]}")
    assert (message.body["status"], message.body["reason"]) == ("accepted", "verdict_sent")


async def test_failed_gives_credits_back_and_is_not_retried(case: Case) -> None:
    older = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    reply = await case.say(**{"as": "failed"}, olderThan=older)
    assert (reply.status, reply.body) == (200, {"resolved": 4})
    assert (await case.status())["metrics"]["failed"] == 4
    credits = await case.tenant.get("/api/credits")
    assert credits.body == {"balance": 1_000, "reserved": 0, "available": 1_000}
    message = await case.tenant.get(f"/api/messages/{case.message_ids[0]}")
    assert (message.body["status"], message.body["reason"]) == ("failed", "verdict_failed")
    retried = await case.tenant.post(f"/api/campaigns/{case.campaign_id}/retry-failed")
    assert retried.body == {"retried": 0}


async def test_a_campaign_ends_as_its_verdicts_have_it(case: Case) -> None:
    assert (await case.status())["campaign"]["status"] == "completed"
    await case.say(**{"as": "failed"}, messageIds=case.message_ids)
    assert "housekeeping" in case.api.nudges
    await campaigns.finish(case.shop.pool)
    assert (await case.status())["campaign"]["status"] == "failed"


async def test_resend_is_refused_while_the_first_may_still_arrive(case: Case) -> None:
    settings = case.api.ctx.settings
    wait = settings.mitto_timeout + settings.lease_seconds + 60
    await case.age(wait - 2)
    reply = await case.say(**{"as": "resend"}, messageIds=case.message_ids[:1])
    assert (reply.status, reply.body["code"]) == (409, "TOO_EARLY")
    until = datetime.fromisoformat(reply.body["details"]["notBefore"])
    assert timedelta(0) < until - datetime.now(UTC) < timedelta(seconds=3)
    assert (await case.status())["metrics"]["unknown"] == 4
    assert await case.shop.pool.fetchval("select count(*) from batch where state = 11") == 2
    await case.age(2)
    reply = await case.say(**{"as": "resend"}, messageIds=case.message_ids[:1])
    assert (reply.status, reply.body) == (200, {"resolved": 1})


async def test_resend_returns_the_campaign_to_sending_and_it_ends_again(case: Case) -> None:
    await case.age(200)
    await case.say(**{"as": "resend"}, batchId=case.batch_ids[1])
    assert (await case.status())["campaign"]["status"] == "sending"
    await case.shop.send_all(ACCEPTED)
    await campaigns.finish(case.shop.pool)
    status = await case.status()
    assert status["campaign"]["status"] == "completed"
    assert (status["metrics"]["accepted"], status["metrics"]["unknown"]) == (2, 2)
    message = (await case.tenant.get(f"/api/messages/{case.message_ids[2]}")).body
    assert [one["outcome"] for one in message["attempts"]] == ["unknown", "accepted"]
    assert message["attempts"][0]["detail"].endswith("sent again, as asked")


async def test_nothing_of_a_cancelled_campaign_is_sent_again(case: Case) -> None:
    await case.age(200)
    case.campaign_id = await case.shop.sending(2, batch_size=1)
    [(grant, intent)] = await case.shop.post()
    await queue.settle_batch(
        case.shop.pool, grant.batch_id, intent.attempt, "unknown", "unknown", detail="TimeoutError"
    )
    assert (await case.tenant.post(f"/api/campaigns/{case.campaign_id}/cancel")).status == 200
    reply = await case.say(**{"as": "resend"}, batchId=grant.batch_id)
    assert (reply.status, reply.body["code"]) == (409, "INVALID_STATUS")
    assert reply.body["currentStatus"] == "cancelled"
    assert (await case.say(**{"as": "failed"}, batchId=grant.batch_id)).body == {"resolved": 1}


async def test_the_same_key_decides_once(case: Case) -> None:
    older = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    for _ in range(2):
        reply = await case.say(**{"as": "failed"}, olderThan=older, key="one")
        assert (reply.status, reply.body) == (200, {"resolved": 4})
    other = await case.say(**{"as": "sent"}, olderThan=older, key="one")
    assert (other.status, other.body["code"]) == (422, "IDEMPOTENCY_MISMATCH")
    assert (await case.say(**{"as": "failed"}, olderThan=older)).body == {"resolved": 0}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "as"),
        ({"as": "lost", "batchId": 1}, "as"),
        ({"as": "sent"}, "messageIds"),
        ({"as": "sent", "batchId": 1, "messageIds": [1]}, "messageIds"),
        ({"as": "sent", "messageIds": []}, "messageIds"),
        ({"as": "sent", "messageIds": ["x"]}, "messageIds.0"),
        ({"as": "sent", "batchId": 0}, "batchId"),
        ({"as": "sent", "olderThan": "2026-01-01T00:00:00"}, "olderThan"),
        ({"as": "sent", "olderThan": "yesterday"}, "olderThan"),
        ({"as": "sent", "batchId": 1, "why": "x"}, "why"),
    ],
)
async def test_a_body_that_chooses_nothing_or_too_much_is_refused_by_name(
    case: Case, body: dict[str, Any], field: str
) -> None:
    reply = await case.say(**body)
    assert (reply.status, reply.body["code"]) == (400, "VALIDATION_ERROR")
    assert reply.body["details"][0]["field"] == field
    assert reply.body["details"][0]["takes"]
    assert (await case.status())["metrics"]["unknown"] == 4


async def test_another_tenants_campaign_does_not_exist(case: Case) -> None:
    stranger = await case.api.new_tenant()
    for method in ("POST", "GET"):
        body = {"as": "failed", "messageIds": case.message_ids} if method == "POST" else None
        reply = await stranger(method, f"/api/campaigns/{case.campaign_id}/unknown", body)
        assert reply.status == 404
    assert (await case.status())["metrics"]["unknown"] == 4


async def test_messages_and_batches_of_other_campaigns_are_left_alone(case: Case) -> None:
    other = await case.shop.sending(1)
    reply = await case.tenant.post(
        f"/api/campaigns/{other}/unknown", {"as": "failed", "messageIds": case.message_ids}
    )
    assert reply.body == {"resolved": 0}
    reply = await case.tenant.post(
        f"/api/campaigns/{other}/unknown", {"as": "failed", "batchId": case.batch_ids[0]}
    )
    assert reply.body == {"resolved": 0}
    assert (await case.status())["metrics"]["unknown"] == 4


async def test_ids_that_could_not_be_told_apart_are_listed_with_what_they_may_be(
    case: Case,
) -> None:
    await queue.apply_receipts(case.shop.pool, [ReceiptRow(None, "X", 30, None, None)])
    path = f"/api/campaigns/{case.campaign_id}/unknown"
    assert (await case.tenant.get(path)).body == {"items": []}
    await evidence.conclude(case.shop.pool, "X", "several", case.message_ids[:2], final=True)
    [item] = (await case.tenant.get(path)).body["items"]
    assert item.pop("receivedAt")
    assert item == {
        "providerMessageId": "X", "verdict": "several", "candidates": case.message_ids[:2],
    }  # fmt: skip


async def test_a_single_message_keeps_what_its_caller_wants_where_nobody_knows(api: Api) -> None:
    tenant = await api.new_tenant(credits=10)
    shop = await shop_of(api, tenant)
    sent = {"phone": "+306944123456", "text": "Hi", "onUnknown": "resend"}
    reply = await tenant.post("/api/messages", sent)
    assert reply.status == 202
    await shop.send_all(UNKNOWN)
    held = await tenant.post("/api/messages", {"phone": "+306944123456", "text": "Hi"})
    assert held.status == 202
    rows = await shop.pool.fetch("select on_unknown from batch order by id")
    assert [row["on_unknown"] for row in rows] == ["resend", "hold"]


async def test_a_refresh_passes_over_messages_without_an_id(case: Case) -> None:
    await case.say(**{"as": "sent"}, messageIds=case.message_ids)
    reply = await case.tenant.post(f"/api/campaigns/{case.campaign_id}/refresh-status")
    assert (reply.status, reply.body["refreshed"]) == (200, 0)
    reply = await case.tenant.post(f"/api/messages/{case.message_ids[0]}/refresh")
    assert (reply.status, reply.body["status"]) == (200, "accepted")
