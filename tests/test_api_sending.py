"""Sending over HTTP: preview, the one moment of enqueue, and what may be done while and after it is sent."""

import asyncio
from datetime import date, datetime
from typing import Any

import pytest
from conftest import Api, Reply, TenantCaller
from shop import (
    ACCEPTED,
    PHONE,
    REFUSED,
    UNKNOWN,
    Shop,
    add_contacts,
    check_the_account,
    shop_of,
    until_somebody_waits,
)

from smsd import campaigns, contacts, queue
from smsd.database import Pool


@pytest.fixture
async def me(api: Api) -> TenantCaller:
    account_id = await api.new_account(requestsPerSecond=1_000)
    return await api.new_tenant(account_id=account_id, credits=1_000, requestsPerSecond=1_000)


@pytest.fixture
async def db(api: Api) -> Pool:
    return api.ctx.pool


async def draft(caller: TenantCaller, **fields: Any) -> int:
    """A new campaign of the service type, whose text is one segment; its id."""
    given = {"name": "Sale", "messageText": "Hi {{firstName}}", "messageType": "service"} | fields
    reply = await caller.post("/api/campaigns", given)
    assert reply.status == 201, reply.text
    return int(reply.body["id"])


async def enqueue(caller: TenantCaller, campaign_id: int, key: str | None = None) -> Reply:
    headers = {"Idempotency-Key": key} if key else {}
    return await caller.post(f"/api/campaigns/{campaign_id}/enqueue", headers=headers)


async def act(caller: TenantCaller, campaign_id: int, action: str, **options: Any) -> Reply:
    return await caller.post(f"/api/campaigns/{campaign_id}/{action}", **options)


async def status(caller: TenantCaller, campaign_id: int) -> Any:
    reply = await caller.get(f"/api/campaigns/{campaign_id}/status")
    assert reply.status == 200, reply.text
    return reply.body


async def recipients(caller: TenantCaller, campaign_id: int, *lines: str) -> None:
    body = "\n".join(["phone,firstName", *lines]).encode()
    headers = {"Content-Type": "text/csv"}
    reply = await caller.post(
        f"/api/campaigns/{campaign_id}/recipients", data=body, headers=headers
    )
    assert reply.status == 200, reply.text


async def untouched(db: Pool) -> bool:
    """Whether nothing of an enqueue is left behind."""
    for table in ("expansion", "lane where campaign_id <> 0", "ledger where kind <> 'grant'"):
        if await db.fetchval(f"select count(*) from {table}"):
            return False
    return not await db.fetchval("select sum(reserved) from credit")


# ------------------------------------------------------------------------------------------ enqueue


async def test_an_enqueue_holds_the_credits_and_leaves_the_rest_to_the_expander(
    api: Api, me: TenantCaller, db: Pool
) -> None:
    ids = await add_contacts(db, me.id, 120)
    campaign_id = await draft(me, linkUrl="https://shop.example")
    reply = await enqueue(me, campaign_id)
    assert (reply.status, reply.body) == (
        202,
        {
            "ok": True, "campaignId": campaign_id, "status": "sending", "created": 120, "queued": 120,
            "enqueuedJobs": 2,
        },
    )  # fmt: skip
    assert api.nudges == ["expander"]
    assert (await me.get("/api/credits")).body == {
        "balance": 1000, "reserved": 120, "available": 880,
    }  # fmt: skip
    expansion = await db.fetchrow("select * from expansion")
    assert expansion is not None
    assert (expansion["source"], expansion["sender"], expansion["template"]) == (
        "contacts", "Shop", "Hi {{firstName}}",
    )  # fmt: skip
    assert (expansion["batch_size"], expansion["highest_id"], expansion["of"], expansion["held"]) == (
        100, ids[-1], 120, 120,
    )  # fmt: skip
    assert await db.fetchval("select count(*) from message") == 0
    shown = await status(me, campaign_id)
    assert shown["campaign"]["status"] == "sending"
    assert (shown["campaign"]["total"], shown["metrics"]["total"]) == (120, 0)
    assert shown["expansion"] == {"done": False, "read": 0, "of": 120}


async def test_a_marketing_text_is_held_with_the_unsubscribe_link_that_it_gets(
    me: TenantCaller, db: Pool
) -> None:
    await add_contacts(db, me.id, 3)
    campaign_id = await draft(me, messageText="x" * 150, messageType="marketing", sender="Other")
    assert (await enqueue(me, campaign_id)).status == 202
    row = await db.fetchrow("select template, held, sender from expansion")
    assert row is not None
    assert tuple(row) == ("x" * 150 + "\n{{unsubscribeUrl}}", 6, "Other")


async def test_uploaded_recipients_go_before_stored_contacts(me: TenantCaller, db: Pool) -> None:
    await add_contacts(db, me.id, 10)
    campaign_id = await draft(me)
    await recipients(me, campaign_id, "+306911111111,Eva", "+306911111112,Ada", "bad,Bob")
    assert (await enqueue(me, campaign_id)).body["created"] == 2
    assert await db.fetchval("select source from expansion") == "recipients"


async def test_unreadable_recipients_never_become_all_contacts(me: TenantCaller, db: Pool) -> None:
    await add_contacts(db, me.id, 10)
    campaign_id = await draft(me)
    await recipients(me, campaign_id, "bad,Eva")
    reply = await enqueue(me, campaign_id)
    assert (reply.status, reply.body["code"]) == (400, "NO_RECIPIENTS")
    assert await untouched(db)


async def test_an_audience_is_what_lists_and_filters_take(me: TenantCaller, db: Pool) -> None:
    ids = await add_contacts(db, me.id, 10)
    some, few = [await contacts.create_list(db, me.id, name) for name in ("some", "few")]
    async with db.acquire() as connection, connection.transaction():
        await contacts.add_to_list(connection, me.id, some.id, ids[:6])
        await contacts.add_to_list(connection, me.id, few.id, ids[5:])
    await contacts.opt_out(db, me.id, PHONE, "api")
    campaign_id = await draft(me, listIds=[some.id], excludeListIds=[few.id])
    assert (await enqueue(me, campaign_id)).body["created"] == 4


async def test_the_batch_size_follows_size_and_limits(api: Api, db: Pool) -> None:
    account_id = await api.new_account(messagesPerSecond=400)
    tenant = await api.new_tenant(account_id=account_id, credits=10_000, messagesPerSecond=150)
    await add_contacts(db, tenant.id, 4_000)
    assert (await enqueue(tenant, await draft(tenant))).body["enqueuedJobs"] == 27
    assert await db.fetchval("select batch_size from expansion") == 150


# ------------------------------------------------------------------------------ refusals of enqueue


async def test_a_campaign_that_cannot_be_sent_says_what_is_missing(
    me: TenantCaller, db: Pool
) -> None:
    await add_contacts(db, me.id, 3)
    for fields, code in (
        ({"messageText": None}, "NO_MESSAGE_TEXT"),
        ({"messageText": " \n"}, "NO_MESSAGE_TEXT"),
        ({"messageText": "Hi {{firstName}"}, "VALIDATION_ERROR"),
        ({"messageText": "Hi {{}}"}, "VALIDATION_ERROR"),
        ({"filterGender": "male"}, "NO_RECIPIENTS"),
    ):
        campaign_id = await draft(me, **fields)
        reply = await enqueue(me, campaign_id)
        assert (reply.status, reply.body["code"]) == (400, code), fields
        if code == "VALIDATION_ERROR":
            assert reply.body["details"][0]["field"] == "messageText"
        assert (await status(me, campaign_id))["campaign"]["status"] == "draft"
    assert await untouched(db)


async def test_somebody_must_be_the_sender(api: Api, db: Pool) -> None:
    tenant = await api.new_tenant(credits=10, sender=None)
    await add_contacts(db, tenant.id, 3)
    campaign_id = await draft(tenant)
    reply = await enqueue(tenant, campaign_id)
    assert (reply.status, reply.body["code"]) == (400, "NO_SENDER")
    await tenant.put(f"/api/campaigns/{campaign_id}", {"sender": "Eva"})
    assert (await enqueue(tenant, campaign_id)).status == 202


async def test_a_campaign_is_sent_once(me: TenantCaller, db: Pool) -> None:
    await add_contacts(db, me.id, 3)
    campaign_id = await draft(me)
    for standing, code in (
        ("sending", "ALREADY_SENDING"),
        ("paused", "ALREADY_SENDING"),
        ("completed", "INVALID_STATUS"),
        ("failed", "INVALID_STATUS"),
        ("cancelled", "INVALID_STATUS"),
    ):
        await db.execute("update campaign set status = $1", standing)
        reply = await enqueue(me, campaign_id)
        assert (reply.status, reply.body["code"]) == (409, code)
        assert reply.body["currentStatus"] == standing
    assert await untouched(db)


async def test_an_inactive_tenant_sends_nothing(api: Api, me: TenantCaller, db: Pool) -> None:
    await add_contacts(db, me.id, 3)
    campaign_id = await draft(me)
    sending = await draft(me)
    assert (await enqueue(me, sending)).status == 202
    await api.admin.patch(f"/api/admin/tenants/{me.id}", {"subscription": "inactive"})
    for reply in (
        await enqueue(me, campaign_id),
        await act(me, campaign_id, "test", json={"phone": "+306900000000"}),
        await act(me, sending, "resume"),
    ):
        assert (reply.status, reply.body["code"]) == (403, "INACTIVE_SUBSCRIPTION")
    shown = (await status(me, sending))["campaign"]
    assert (shown["status"], shown["pausedReason"]) == ("paused", "INACTIVE_SUBSCRIPTION")
    await api.admin.patch(f"/api/admin/tenants/{me.id}", {"subscription": "active"})
    assert (await status(me, sending))["campaign"]["status"] == "sending"
    assert (await enqueue(me, campaign_id)).status == 202


async def test_a_tenant_made_inactive_at_the_very_moment_of_an_enqueue_sends_nothing(
    api: Api, me: TenantCaller, db: Pool
) -> None:
    campaign_id = await draft(me)
    snapshot = campaigns.Snapshot("contacts", "Shop", "Hi", date(2026, 1, 1), 100, 9, 5, 5)
    async with db.acquire() as connection, connection.transaction():
        await campaigns.keep_tenant(connection, me.id)
        campaign = await campaigns.lock(connection, me.id, campaign_id)
        assert campaign is not None
        patching = asyncio.create_task(
            api.admin.patch(f"/api/admin/tenants/{me.id}", {"subscription": "inactive"})
        )
        await until_somebody_waits(db)
        await campaigns.begin(connection, campaign, me.account_id, snapshot)
    assert (await patching).status == 200
    shown = (await status(me, campaign_id))["campaign"]
    assert (shown["status"], shown["pausedReason"]) == ("paused", "INACTIVE_SUBSCRIPTION")


async def test_refusals_come_in_their_order(api: Api, db: Pool) -> None:
    tenant = await api.new_tenant(sender=None)
    campaign_id = await draft(tenant, messageText=None, sender=None)
    path = f"/api/campaigns/{campaign_id}"

    async def code() -> tuple[int, str]:
        reply = await enqueue(tenant, campaign_id)
        return reply.status, reply.body["code"]

    await db.execute("update campaign set status = 'completed'")
    await db.execute("update tenant set subscription = 'inactive'")
    assert await code() == (409, "INVALID_STATUS")
    await db.execute("update campaign set status = 'draft'")
    assert await code() == (403, "INACTIVE_SUBSCRIPTION")
    await db.execute("update tenant set subscription = 'active'")
    assert await code() == (400, "NO_MESSAGE_TEXT")
    await tenant.put(path, {"messageText": "Hi {{"})
    assert await code() == (400, "NO_SENDER")
    await tenant.put(path, {"sender": "Eva"})
    assert await code() == (400, "VALIDATION_ERROR")
    await tenant.put(path, {"messageText": "Hi"})
    assert await code() == (400, "NO_RECIPIENTS")
    await recipients(tenant, campaign_id, "+306911111111,Eva")
    assert await code() == (402, "INSUFFICIENT_CREDITS")


async def test_after_a_402_and_a_top_up_the_same_key_sends_and_then_repeats_its_answer(
    api: Api, db: Pool
) -> None:
    tenant = await api.new_tenant(credits=5)
    await add_contacts(db, tenant.id, 8)
    campaign_id = await draft(tenant)
    reply = await enqueue(tenant, campaign_id, "press")
    assert (reply.status, reply.body["code"]) == (402, "INSUFFICIENT_CREDITS")
    assert reply.body["details"] == {"required": 8, "available": 5}
    assert await untouched(db)
    assert api.nudges == []
    await api.admin.post(
        f"/api/admin/tenants/{tenant.id}/credits", {"amount": 3, "reason": "top-up"}
    )
    first = await enqueue(tenant, campaign_id, "press")
    again = await enqueue(tenant, campaign_id, "press")
    assert (first.status, again.status, again.body) == (202, 202, first.body)
    assert (await tenant.get("/api/credits")).body["reserved"] == 8


async def test_of_many_presses_at_once_one_sends(me: TenantCaller, db: Pool) -> None:
    await add_contacts(db, me.id, 8)
    campaign_id = await draft(me)
    async with db.acquire() as gate, gate.transaction():
        await gate.execute("select from tenant for update")
        presses = [asyncio.create_task(enqueue(me, campaign_id)) for _ in range(5)]
        await until_somebody_waits(db, 5)
    replies = await asyncio.gather(*presses)
    assert sorted(reply.status for reply in replies) == [202, 409, 409, 409, 409]
    assert {r.body["code"] for r in replies if r.status == 409} == {"ALREADY_SENDING"}
    assert await db.fetchval("select count(*) from expansion") == 1
    assert (await me.get("/api/credits")).body["reserved"] == 8


async def test_presses_at_once_under_one_key_get_one_answer(me: TenantCaller, db: Pool) -> None:
    await add_contacts(db, me.id, 8)
    campaign_id = await draft(me)
    replies = await asyncio.gather(*(enqueue(me, campaign_id, "press") for _ in range(4)))
    assert {(reply.status, reply.text) for reply in replies} == {(202, replies[0].text)}
    assert await db.fetchval("select count(*) from expansion") == 1


async def test_campaigns_enqueued_at_once_never_hold_more_than_there_is(api: Api, db: Pool) -> None:
    tenant = await api.new_tenant(credits=20)
    await add_contacts(db, tenant.id, 8)
    ids = [await draft(tenant) for _ in range(5)]
    replies = await asyncio.gather(*(enqueue(tenant, one) for one in ids))
    assert sorted(reply.status for reply in replies) == [202, 202, 402, 402, 402]
    assert (await tenant.get("/api/credits")).body == {
        "balance": 20, "reserved": 16, "available": 4,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ preview


async def test_a_preview_shows_samples_and_cost_and_changes_nothing(
    me: TenantCaller, db: Pool
) -> None:
    await add_contacts(db, me.id, 30)
    campaign_id = await draft(me, messageText="Hi {{firstName}} of {{city|nowhere}}")
    reply = await me.get(f"/api/campaigns/{campaign_id}/preview")
    assert reply.status == 200, reply.text
    assert reply.body["count"] == 30
    assert len(reply.body["sample"]) == 10
    assert reply.body["sample"][:2] == [
        {"to": f"+{PHONE}", "text": "Hi Maria of Athens", "segments": 1},
        {"to": f"+{PHONE + 1}", "text": "Hi Maria of nowhere", "segments": 1},
    ]
    assert reply.body["credits"] == {"required": 30, "available": 1000}
    assert (reply.body["encoding"], reply.body["problems"]) == ("GSM-7", [])
    assert await untouched(db)


async def test_a_preview_quotes_what_an_enqueue_holds(me: TenantCaller, db: Pool) -> None:
    await add_contacts(db, me.id, 30)
    text = (
        "x" * 150 + " {{city|somewhere far away}}"
    )  # one segment for half of them, two for the rest
    campaign_id = await draft(me, messageText=text)
    quoted = (await me.get(f"/api/campaigns/{campaign_id}/preview")).body["credits"]["required"]
    assert quoted == 45
    await enqueue(me, campaign_id)
    assert (await me.get("/api/credits")).body["reserved"] == quoted


async def test_a_preview_links_to_this_recipient_alone(me: TenantCaller, db: Pool) -> None:
    await add_contacts(db, me.id, 2)
    campaign_id = await draft(
        me, messageType="marketing", linkUrl="https://x.example", messageText="{{link}}"
    )
    sample = (await me.get(f"/api/campaigns/{campaign_id}/preview")).body["sample"]
    links = [one["text"].split("\n") for one in sample]
    assert [first for first, _ in links] == ["https://x.example"] * 2
    assert all(second.startswith("https://sms.example/u/") for _, second in links)
    assert links[0][1] != links[1][1]


ODD: list[tuple[dict[str, Any], list[str]]] = [
    ({"messageText": None}, ["messageText"]),
    ({"messageText": "Hi {{firstName"}, ["begins no tag"]),
    ({"messageText": "Hi {{surname}}"}, ["'surname'", "first 4"]),
    ({"messageText": "Hi {{lastName}}"}, ["4 of the first 4", "{{lastname}}", "missing_value"]),
    ({"messageText": "Hi {{city}}"}, ["2 of the first 4", "{{city}}", "default"]),
    ({"messageText": "Hi {{link}}"}, ["{{link}}"]),
    ({"messageText": "Γειά σου {{firstName}}"}, ["4 of 4 texts", "UCS-2", "'ά' (U+03AC)"]),
    ({"messageText": "“Hi”"}, ["UCS-2", "'“' (U+201C), '”' (U+201D)"]),
    ({"messageText": "x" * 161}, ["up to 2 segments", "2.0 on average"]),
    ({"messageText": "x" * 2_000}, ["more than 10 segments", "text_too_long"]),
]


async def test_a_preview_tells_what_is_odd(me: TenantCaller, db: Pool) -> None:
    await add_contacts(db, me.id, 4)
    for fields, words in ODD:
        reply = await me.get(f"/api/campaigns/{await draft(me, **fields)}/preview")
        assert reply.status == 200
        problems = reply.body["problems"]
        assert any(all(word in problem for word in words) for problem in problems), problems


async def test_a_preview_of_nobody_has_no_samples(me: TenantCaller) -> None:
    reply = await me.get(f"/api/campaigns/{await draft(me)}/preview")
    assert (reply.body["count"], reply.body["sample"]) == (0, [])
    assert reply.body["credits"]["required"] == 0


# ------------------------------------------------------------------------------------------- status


async def sent_campaign(api: Api, me: TenantCaller, n: int = 10) -> tuple[int, Shop]:
    """A campaign of which all was read and nothing sent yet."""
    await add_contacts(api.ctx.pool, me.id, n)
    campaign_id = await draft(me)
    assert (await enqueue(me, campaign_id)).status == 202
    shop = await shop_of(api, me)
    await shop.expand(n)
    return campaign_id, shop


async def test_a_status_is_the_whole_account(api: Api, me: TenantCaller) -> None:
    campaign_id, shop = await sent_campaign(api, me)
    await shop.send_all(ACCEPTED, ACCEPTED, ACCEPTED, REFUSED, UNKNOWN, ACCEPTED)
    await shop.receive(M1=30, M2=20)
    shown = await status(me, campaign_id)
    assert shown["metrics"] == {
        "total": 10, "queued": 0, "processing": 0, "success": 7, "failed": 2, "accepted": 8, "delivered": 1,
        "deliveryFailed": 1, "pendingDelivery": 6, "unknown": 1, "cancelled": 0, "skipped": 0, "processed": 10,
    }  # fmt: skip
    assert shown["canonical"] == {
        "status": "sending",
        "queued": 0,
        "totals": {"recipients": 10, "accepted": 8, "sent": 7, "delivered": 1, "failed": 2},
        "delivery": {"pendingDelivery": 6, "delivered": 1, "failedDelivery": 1},
    }
    assert shown["expansion"] == {"done": True, "read": 10, "of": 10}
    campaign = shown["campaign"]
    assert {name: campaign[name] for name in ("id", "name", "total", "sent", "failed", "processed")} == {
        "id": campaign_id, "name": "Sale", "total": 10, "sent": 7, "failed": 2, "processed": 10,
    }  # fmt: skip
    assert datetime.fromisoformat(shown["eta"]["finishAt"]) >= datetime.fromisoformat(
        campaign["startedAt"]
    )
    assert await campaigns.finish(shop.pool) == [campaign_id]
    shown = await status(me, campaign_id)
    assert shown["campaign"]["status"] == "completed"
    assert shown["campaign"]["finishedAt"] is not None
    assert shown["eta"] == {"finishAt": None, "ratePerSecond": None, "limitedBy": None}
    (item,) = (await me.get("/api/campaigns")).body["items"]
    assert item["stats"] == {"sent": 7, "delivered": 1, "failed": 2, "pendingDelivery": 6}


async def test_an_estimate_says_when_and_what_it_waits_for(api: Api, me: TenantCaller) -> None:
    await add_contacts(api.ctx.pool, me.id, 10)
    campaign_id = await draft(me)
    assert (await status(me, campaign_id))["eta"]["limitedBy"] is None
    await enqueue(me, campaign_id)
    eta = (await status(me, campaign_id))["eta"]
    assert eta == {"finishAt": None, "ratePerSecond": None, "limitedBy": "expansion"}
    shop = await shop_of(api, me)
    await shop.expand(5, last=False)
    await shop.send_all(ACCEPTED)
    eta = (await status(me, campaign_id))["eta"]
    assert eta["ratePerSecond"] > 0
    assert eta["finishAt"].endswith("Z")


# -------------------------------------------------------------------------------- pause and the like


async def test_pause_resume_and_cancel_answer_with_the_status(api: Api, me: TenantCaller) -> None:
    campaign_id, shop = await sent_campaign(api, me)
    for action, becomes, reason in (
        ("pause", "paused", "PAUSED_BY_USER"),
        ("pause", "paused", "PAUSED_BY_USER"),
        ("resume", "sending", None),
        ("resume", "sending", None),
        ("cancel", "cancelled", None),
        ("cancel", "cancelled", None),
    ):
        reply = await act(me, campaign_id, action)
        assert reply.status == 200, reply.text
        assert reply.body["campaign"]["status"] == becomes
        assert reply.body["campaign"]["pausedReason"] == reason
        after = await status(me, campaign_id)
        assert reply.body["metrics"] == after["metrics"]
    assert after["metrics"]["cancelled"] == 10
    assert (await me.get("/api/credits")).body["reserved"] == 0
    for action in ("pause", "resume", "retry-failed", "enqueue"):
        reply = await act(me, campaign_id, action)
        assert (reply.status, reply.body["code"]) == (409, "INVALID_STATUS")
        assert reply.body["currentStatus"] == "cancelled"
    await check_the_account(shop, campaign_id)


async def test_a_draft_can_only_be_sent(me: TenantCaller) -> None:
    campaign_id = await draft(me)
    for action in ("pause", "resume", "cancel", "retry-failed"):
        reply = await act(me, campaign_id, action)
        assert (reply.status, reply.body["code"]) == (409, "INVALID_STATUS")
        assert reply.body["currentStatus"] == "draft"


async def test_a_person_may_resume_what_a_machine_paused(api: Api, me: TenantCaller) -> None:
    campaign_id, _ = await sent_campaign(api, me)
    for reason in ("INSUFFICIENT_CREDITS", "REFUSED_BY_PROVIDER"):
        api.nudges.clear()
        await api.ctx.pool.execute("select pause_campaign($1, $2, 'why')", campaign_id, reason)
        shown = (await status(me, campaign_id))["campaign"]
        assert (shown["pausedReason"], shown["pausedDetail"]) == (reason, "why")
        reply = await act(me, campaign_id, "resume")
        assert (reply.status, reply.body["campaign"]["status"]) == (200, "sending")
        assert api.nudges == ["expander"]


async def test_failures_are_retried_once_and_paid_again(api: Api, me: TenantCaller) -> None:
    campaign_id, shop = await sent_campaign(api, me)
    await shop.send_all(ACCEPTED, REFUSED)
    await campaigns.finish(shop.pool)
    headers = {"Idempotency-Key": "again"}
    reply = await act(me, campaign_id, "retry-failed", headers=headers)
    assert (reply.status, reply.body) == (200, {"retried": 9})
    assert (await act(me, campaign_id, "retry-failed", headers=headers)).body == {"retried": 9}
    assert (await act(me, campaign_id, "retry-failed")).body == {"retried": 0}
    shown = await status(me, campaign_id)
    assert (shown["campaign"]["status"], shown["metrics"]["queued"]) == ("sending", 9)
    assert (await me.get("/api/credits")).body == {"balance": 999, "reserved": 9, "available": 990}
    await check_the_account(shop, campaign_id)


async def test_a_retry_beyond_the_credits_is_refused_and_leaves_no_trace(api: Api) -> None:
    account_id = await api.new_account(requestsPerSecond=1_000)
    tenant = await api.new_tenant(account_id=account_id, credits=10, requestsPerSecond=1_000)
    campaign_id, shop = await sent_campaign(api, tenant)
    await shop.send_all(REFUSED)
    await campaigns.finish(shop.pool)
    assert (await enqueue(tenant, await draft(tenant))).status == 202
    reply = await act(tenant, campaign_id, "retry-failed")
    assert (reply.status, reply.body["code"]) == (402, "INSUFFICIENT_CREDITS")
    assert reply.body["details"] == {"required": 10, "available": 0}
    shown = await status(tenant, campaign_id)
    assert (shown["campaign"]["status"], shown["metrics"]["failed"]) == ("failed", 10)
    await check_the_account(shop, campaign_id)


# --------------------------------------------------------------------------------------------- test


async def test_a_test_message_has_a_samples_values_and_goes_to_one_number(
    api: Api, me: TenantCaller
) -> None:
    await add_contacts(api.ctx.pool, me.id, 3)
    campaign_id = await draft(
        me, messageText="Hi {{firstName}} of {{city}}, {{phone}}", sender="Test"
    )
    headers = {"Idempotency-Key": "test"}
    reply = await act(me, campaign_id, "test", json={"phone": "6944 123 456"}, headers=headers)
    again = await act(me, campaign_id, "test", json={"phone": "6944 123 456"}, headers=headers)
    assert (reply.status, reply.body["status"], again.body) == (202, "queued", reply.body)
    shown = (await me.get(f"/api/messages/{reply.body['id']}")).body
    assert (shown["to"], shown["text"]) == ("+306944123456", "Hi Maria of Athens, +306944123456")
    assert await api.ctx.pool.fetchval("select sender from batch") == "Test"
    assert (await me.get("/api/credits")).body["reserved"] == 1
    assert (await status(me, campaign_id))["campaign"]["status"] == "draft"


async def test_a_test_without_any_recipient_shows_the_tags_by_name(me: TenantCaller) -> None:
    campaign_id = await draft(me, messageText="Hi {{firstName}} {{city|there}}")
    reply = await act(me, campaign_id, "test", json={"phone": "+306944123456"})
    assert (await me.get(f"/api/messages/{reply.body['id']}")).body["text"] == "Hi firstname city"


async def test_a_test_that_cannot_be_sent_says_why(me: TenantCaller, db: Pool) -> None:
    phone = "+306944123456"
    cases: list[tuple[dict[str, Any], str | None, int, str]] = [
        ({}, "bad", 400, "VALIDATION_ERROR"),
        ({}, None, 400, "VALIDATION_ERROR"),
        ({"messageText": None}, phone, 400, "NO_MESSAGE_TEXT"),
        ({"messageText": "Hi {{"}, phone, 400, "VALIDATION_ERROR"),
        ({"messageText": "x" * 2_000}, phone, 400, "VALIDATION_ERROR"),
    ]
    for fields, to, expected, code in cases:
        reply = await act(me, await draft(me, **fields), "test", json={"phone": to})
        assert (reply.status, reply.body["code"]) == (expected, code), (fields, to)
    assert await untouched(db)


async def test_a_test_costs_credits(api: Api) -> None:
    tenant = await api.new_tenant(credits=1)
    campaign_id = await draft(tenant, messageText="x" * 200)
    reply = await act(tenant, campaign_id, "test", json={"phone": "+306944123456"})
    assert (reply.status, reply.body["details"]) == (402, {"required": 2, "available": 1})


# ----------------------------------------------------------------------------- messages and batches


async def test_messages_of_a_campaign_are_paged_by_cursor_and_filtered(
    api: Api, me: TenantCaller
) -> None:
    campaign_id, shop = await sent_campaign(api, me)
    ((grant, intent),) = await shop.post()
    await shop.answer(grant, intent, ACCEPTED, REFUSED, ACCEPTED)
    path = f"/api/campaigns/{campaign_id}/messages"
    seen: list[Any] = []
    cursor: int | None = 0
    while cursor is not None:
        reply = await me.get(path, params={"cursor": str(cursor), "pageSize": "4"})
        seen += reply.body["items"]
        cursor = reply.body["nextCursor"]
    assert [one["to"] for one in seen] == [f"+{PHONE + i}" for i in range(10)]
    assert {one["campaignId"] for one in seen} == {campaign_id}
    refused = (await me.get(path, params={"status": "failed"})).body["items"]
    assert [(one["to"], one["reason"]) for one in refused] == [
        (f"+{PHONE + 1}", "refused_by_provider")
    ]
    (found,) = (await me.get(path, params={"phone": f"+{PHONE}"})).body["items"]
    assert found == seen[0]
    assert found["status"] == "accepted"
    assert found["providerMessageId"] == "M1"
    assert found["bulkId"] == "bulk"
    assert [(one["n"], one["outcome"]) for one in found["attempts"]] == [(1, "accepted")]
    assert found["acceptedAt"] is not None
    (batch,) = (await me.get(f"/api/campaigns/{campaign_id}/batches")).body["items"]
    assert (batch["status"], batch["n"], batch["open"], batch["attempts"]) == ("done", 10, 0, 1)


async def test_a_query_that_cannot_be_taken_is_refused(me: TenantCaller) -> None:
    path = f"/api/campaigns/{await draft(me)}/messages"
    for name, value in (
        ("status", "odd"), ("phone", "x"), ("cursor", "-1"), ("cursor", "x"), ("pageSize", "101"), ("q", "x"),
    ):  # fmt: skip
        reply = await me.get(path, params={name: value})
        assert (reply.status, reply.body["code"]) == (400, "VALIDATION_ERROR"), (name, value)


async def test_a_campaign_that_is_expanded_while_it_is_paused_waits(
    api: Api, me: TenantCaller
) -> None:
    await add_contacts(api.ctx.pool, me.id, 5)
    campaign_id = await draft(me)
    await enqueue(me, campaign_id)
    await act(me, campaign_id, "pause")
    shop = await shop_of(api, me)
    assert await shop.expand(5) == 0
    await act(me, campaign_id, "resume")
    assert await shop.expand(5) == campaign_id
    assert len(await shop.post()) == 1
    assert await queue.wake_stranded(shop.pool) == 0
