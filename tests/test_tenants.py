"""Traffic accounts, tenants, keys: what is kept, what is shown, what a change sets off."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import Api

from smsd import queue, tenants
from smsd.database import Connection, Pool

ACCOUNTS = "/api/admin/traffic-accounts"
TENANTS = "/api/admin/tenants"

ACCOUNT: dict[str, Any] = {"name": "Main", "trafficAccountId": "mitto-main"}


async def rates(db: Pool, scopes: tuple[int, ...], owner: int) -> dict[int, int]:
    """Limiter rows: scope → closed until."""
    rows = await db.fetch(
        "select scope, closed_until from rate where scope = any($1::smallint[]) and id = $2",
        list(scopes),
        owner,
    )
    return {row["scope"]: row["closed_until"] for row in rows}


# Traffic accounts


async def test_an_account_has_the_documented_defaults(api: Api) -> None:
    made = await api.admin.post(ACCOUNTS, ACCOUNT)
    assert made.status == 201
    created_at = datetime.fromisoformat(made.body["createdAt"])
    assert abs(datetime.now(UTC) - created_at) < timedelta(minutes=1)
    assert made.body == {
        "id": made.body["id"],
        "name": "Main",
        "trafficAccountId": "mitto-main",
        "hasApiKey": False,
        "hasWebhookSecret": False,
        "requestsPerSecond": 100,
        "messagesPerSecond": None,
        "maxInFlight": None,
        "limitUnit": "messages",
        "ceiling": None,
        "serverErrorMeans": "refused",
        "largestRequest": 500,
        "paused": False,
        "pausedReason": None,
        "pausedDetail": None,
        "blockedUntil": None,
        "capabilities": {},
        "createdAt": made.body["createdAt"],
        "updatedAt": made.body["updatedAt"],
    }
    assert (await api.admin.get(f"{ACCOUNTS}/{made.body['id']}")).body == made.body
    listed = (await api.admin.get(ACCOUNTS)).body
    assert (listed["items"], listed["total"]) == ([made.body], 1)


async def test_a_new_account_may_send_at_once(api: Api) -> None:
    plain = await api.new_account()
    limited = await api.new_account(messagesPerSecond=10)
    assert await rates(api.ctx.pool, (1, 2), plain) == {1: 0}
    assert await rates(api.ctx.pool, (1, 2), limited) == {1: 0, 2: 0}


async def test_secrets_of_an_account_never_come_back(api: Api) -> None:
    secrets = {"apiKey": "the-api-key", "webhookSecret": "the-webhook-secret"}
    made = await api.admin.post(ACCOUNTS, ACCOUNT | secrets)
    path = f"{ACCOUNTS}/{made.body['id']}"
    replies = [
        made,
        await api.admin.get(path),
        await api.admin.get(ACCOUNTS),
        await api.admin.patch(path, {"apiKey": "the-api-key-2"}),
    ]
    assert not any("the-" in reply.text for reply in replies)
    assert made.body["hasApiKey"]
    assert made.body["hasWebhookSecret"]
    account = await tenants.get_account(api.ctx.pool, made.body["id"])
    assert account is not None
    assert (account.api_key, account.webhook_secret) == ("the-api-key-2", "the-webhook-secret")
    assert "the-" not in repr(account)


async def test_an_id_of_mittos_belongs_to_one_account(api: Api) -> None:
    assert (await api.admin.post(ACCOUNTS, ACCOUNT)).status == 201
    again = await api.admin.post(ACCOUNTS, ACCOUNT | {"name": "Other"})
    assert (again.status, again.body["code"]) == (409, "TRAFFIC_ACCOUNT_EXISTS")
    other = await api.new_account()
    moved = await api.admin.patch(f"{ACCOUNTS}/{other}", {"trafficAccountId": "mitto-main"})
    assert (moved.status, moved.body["code"]) == (409, "TRAFFIC_ACCOUNT_EXISTS")


async def test_a_webhook_secret_names_one_account(api: Api) -> None:
    await api.new_account(webhookSecret="shared")
    reply = await api.admin.post(ACCOUNTS, ACCOUNT | {"webhookSecret": "shared"})
    assert (reply.status, reply.body["code"]) == (409, "WEBHOOK_SECRET_IN_USE")


async def test_a_change_of_an_account_changes_just_that_and_wakes_its_dispatchers(
    api: Api,
) -> None:
    account_id = await api.new_account(messagesPerSecond=7, maxInFlight=3)
    before = (await api.admin.get(f"{ACCOUNTS}/{account_id}")).body
    heard: asyncio.Queue[str] = asyncio.Queue()
    async with api.ctx.pool.acquire() as listener:
        await listener.add_listener(
            "smsd_lane", lambda _c, _p, _n, payload: heard.put_nowait(str(payload))
        )
        change = {"requestsPerSecond": 9, "messagesPerSecond": None}
        after = await api.admin.patch(f"{ACCOUNTS}/{account_id}", change)
        assert await heard.get() == str(account_id)
        await listener.reset()
    assert after.status == 200
    assert after.body["updatedAt"] > before["updatedAt"]
    assert after.body == before | change | {"updatedAt": after.body["updatedAt"]}


@pytest.mark.parametrize("change", [{"apiKey": "new"}, {"paused": False}])
async def test_a_new_key_or_a_person_lets_a_paused_account_send_again(
    api: Api, change: dict[str, Any]
) -> None:
    account_id = await api.new_account(apiKey="old")
    await queue.block_account(api.ctx.pool, account_id, 600)
    assert await queue.pause_account(
        api.ctx.pool, account_id, "UNAUTHORIZED", "Mitto said 401", "old"
    )
    stopped = (await api.admin.get(f"{ACCOUNTS}/{account_id}")).body
    assert (stopped["paused"], stopped["pausedReason"]) == (True, "UNAUTHORIZED")
    assert stopped["pausedDetail"] == "Mitto said 401"
    assert stopped["blockedUntil"] is not None

    renamed = await api.admin.patch(f"{ACCOUNTS}/{account_id}", {"name": "Renamed"})
    assert renamed.body["pausedReason"] == "UNAUTHORIZED"
    lifted = (await api.admin.patch(f"{ACCOUNTS}/{account_id}", change)).body
    assert (lifted["paused"], lifted["pausedReason"], lifted["pausedDetail"]) == (False, None, None)
    assert lifted["blockedUntil"] is None


async def test_a_person_pauses_an_account(api: Api) -> None:
    account_id = await api.new_account()
    reply = await api.admin.patch(f"{ACCOUNTS}/{account_id}", {"paused": True})
    assert (reply.body["paused"], reply.body["pausedReason"]) == (True, "PAUSED_BY_OPERATOR")


# Tenants


async def test_a_tenant_has_the_documented_defaults_and_its_key_works(api: Api) -> None:
    account_id = await api.new_account()
    made = await api.admin.post(TENANTS, {"name": "Shop", "accountId": account_id})
    assert made.status == 201
    key = made.body.pop("apiKey")
    assert key.startswith("sk_")
    assert len(key) >= 35
    assert made.body == {
        "id": made.body["id"],
        "name": "Shop",
        "accountId": account_id,
        "sender": None,
        "requestsPerSecond": 50,
        "messagesPerSecond": None,
        "weight": 1.0,
        "batchSize": None,
        "subscription": "active",
        "timezone": "UTC",
        "defaultCountry": "GR",
        "createdAt": made.body["createdAt"],
        "updatedAt": made.body["updatedAt"],
    }
    assert (await api.admin.get(f"{TENANTS}/{made.body['id']}")).body == made.body
    tenant = await tenants.authenticate(api.ctx.pool, key)
    assert tenant is not None
    assert tenant.id == made.body["id"]


async def test_a_new_tenant_may_send_at_once(api: Api) -> None:
    plain = await api.new_tenant()
    limited = await api.new_tenant(messagesPerSecond=10)
    pool = api.ctx.pool
    assert await rates(pool, (3, 4), plain.id) == {3: 0}
    assert await rates(pool, (3, 4), limited.id) == {3: 0, 4: 0}
    lanes = await pool.fetch(
        "select account_id, class, campaign_id from lane where tenant_id = $1", plain.id
    )
    assert [tuple(lane) for lane in lanes] == [(plain.account_id, 0, 0)]


async def test_a_tenant_of_no_account_is_refused_by_name(api: Api) -> None:
    reply = await api.admin.post(TENANTS, {"name": "Shop", "accountId": 99})
    assert (reply.status, reply.body["code"]) == (400, "VALIDATION_ERROR")
    assert [(d["field"], d["value"]) for d in reply.body["details"]] == [("accountId", 99)]
    assert (await api.admin.get(TENANTS)).body["total"] == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "   "),
        ("name", "x" * 201),
        ("sender", "TwelveLetter"),
        ("sender", "Not/Alnum"),
        ("sender", "Ωμέγα"),
        ("sender", "12345678901234567"),
        ("sender", ""),
        ("requestsPerSecond", 0),
        ("requestsPerSecond", 100_001),
        ("requestsPerSecond", None),
        ("requestsPerSecond", False),
        ("messagesPerSecond", 0),
        ("weight", 0),
        ("weight", 1001),
        ("weight", "1"),
        ("batchSize", 0),
        ("batchSize", 501),
        ("subscription", "paused"),
        ("timezone", "Athens"),
        ("timezone", "../../etc/passwd"),
        ("timezone", "Europe"),
        ("defaultCountry", "gr"),
        ("defaultCountry", "XX"),
        ("accountId", "1"),
        ("accountId", 2**63),
        ("apiKey", "sk_mine"),
    ],
)
async def test_a_wrong_field_of_a_tenant_is_refused_by_name(
    api: Api, field: str, value: object
) -> None:
    tenant = await api.new_tenant()
    given = {"name": "Shop", "accountId": tenant.account_id} | {field: value}
    replies = [
        await api.admin.post(TENANTS, given),
        await api.admin.patch(f"{TENANTS}/{tenant.id}", {field: value}),
    ]
    for reply in replies:
        assert (reply.status, reply.body["code"]) == (400, "VALIDATION_ERROR")
        assert [detail["field"] for detail in reply.body["details"]] == [field]
        assert reply.body["details"][0]["takes"]
    assert (await api.admin.get(TENANTS)).body["total"] == 1


@pytest.mark.parametrize("sender", ["A", "MyShop24", "12345678901", "1234567890123456"])
async def test_a_sender_of_letters_or_digits_is_taken(api: Api, sender: str) -> None:
    tenant = await api.new_tenant(sender=sender)
    assert (await api.admin.get(f"{TENANTS}/{tenant.id}")).body["sender"] == sender


async def test_a_change_of_a_tenant_changes_just_that(api: Api) -> None:
    tenant = await api.new_tenant(weight=2, batchSize=100)
    path = f"{TENANTS}/{tenant.id}"
    before = (await api.admin.get(path)).body
    change = {"weight": 3.5, "batchSize": None, "timezone": "Europe/Athens", "sender": None}
    after = (await api.admin.patch(path, change)).body
    assert after == before | change | {"updatedAt": after["updatedAt"]}
    assert (await api.admin.get(path)).body == after


async def campaign(db: Pool, tenant_id: int, status: str) -> int:
    """A campaign with its expansion and lane."""
    campaign_id = int(
        await db.fetchval(
            "insert into campaign (tenant_id, name, status) values ($1, 'c', $2) returning id",
            tenant_id,
            status,
        )
    )
    lane_id = await db.fetchval(
        "insert into lane (account_id, tenant_id, class, campaign_id) "
        "select account_id, id, 1, $2 from tenant where id = $1 returning id",
        tenant_id,
        campaign_id,
    )
    await db.execute(
        "insert into expansion (campaign_id, tenant_id, lane_id, source, sender, template, as_of, batch_size, "
        "highest_id, of, held) values ($1, $2, $3, 'contacts', 's', 't', '2026-01-01', 100, 0, 0, 0)",
        campaign_id,
        tenant_id,
        lane_id,
    )
    return campaign_id


async def standing(db: Pool) -> dict[int, tuple[str, str | None, str, bool]]:
    """Campaign → status, reason, expansion, lane paused."""
    rows = await db.fetch(
        "select c.id, c.status, c.paused_reason, e.state, l.paused from campaign c "
        "join expansion e on e.campaign_id = c.id join lane l on l.campaign_id = c.id"
    )
    return {row[0]: (row[1], row[2], row[3], row[4]) for row in rows}


async def test_an_inactive_tenant_stops_and_active_again_goes_on_with_just_that(api: Api) -> None:
    pool = api.ctx.pool
    tenant, neighbour = await api.new_tenant(), await api.new_tenant()
    sending = await campaign(pool, tenant.id, "sending")
    halted = await campaign(pool, tenant.id, "sending")
    await pool.execute("select pause_campaign($1, 'PAUSED_BY_USER', null)", halted)
    draft = await campaign(pool, tenant.id, "draft")
    others = await campaign(pool, neighbour.id, "sending")
    before = await standing(pool)

    path = f"{TENANTS}/{tenant.id}"
    assert (await api.admin.patch(path, {"subscription": "inactive"})).status == 200
    stopped = ("paused", "INACTIVE_SUBSCRIPTION", "paused", True)
    assert await standing(pool) == before | {sending: stopped}

    assert (await api.admin.patch(path, {"subscription": "active"})).status == 200
    assert await standing(pool) == before
    assert before[draft][0] == "draft"
    assert before[others] == before[sending] == ("sending", None, "running", False)


@pytest.mark.parametrize("status", ["sending", "paused"])
async def test_a_tenant_keeps_its_account_while_a_campaign_is_on_its_way(
    api: Api, status: str
) -> None:
    tenant = await api.new_tenant()
    campaign_id = await campaign(api.ctx.pool, tenant.id, status)
    other = await api.new_account()
    path = f"{TENANTS}/{tenant.id}"
    refused = await api.admin.patch(path, {"accountId": other})
    assert (refused.status, refused.body["code"]) == (409, "ACCOUNT_IN_USE")

    await api.ctx.pool.execute(
        "update campaign set status = 'completed' where id = $1", campaign_id
    )
    moved = await api.admin.patch(path, {"accountId": other})
    assert (moved.status, moved.body["accountId"]) == (200, other)
    lanes = await api.ctx.pool.fetch(
        "select account_id from lane where tenant_id = $1 and class = 0", tenant.id
    )
    assert {lane["account_id"] for lane in lanes} == {tenant.account_id, other}


async def test_a_tenant_keeps_its_account_while_a_single_message_waits(api: Api) -> None:
    tenant = await api.new_tenant(credits=5)
    async with api.ctx.pool.acquire() as db, db.transaction():
        assert await queue.add_message(
            db, tenant.id, tenant.account_id, 306900000000, "text", "Shop", 1
        )
    other = await api.new_account()
    refused = await api.admin.patch(f"{TENANTS}/{tenant.id}", {"accountId": other})
    assert (refused.status, refused.body["code"]) == (409, "ACCOUNT_IN_USE")


async def test_a_tenant_cannot_move_to_no_account(api: Api) -> None:
    tenant = await api.new_tenant()
    reply = await api.admin.patch(f"{TENANTS}/{tenant.id}", {"accountId": 99})
    assert (reply.status, reply.body["details"][0]["field"]) == (400, "accountId")


# Keys


async def test_a_key_is_shown_once_and_kept_as_a_hash(api: Api, connection: Connection) -> None:
    tenant = await api.new_tenant()
    path = f"{TENANTS}/{tenant.id}/keys"
    made = await api.admin.post(path, headers={"Idempotency-Key": "key-1"})
    assert made.status == 201
    assert set(made.body) == {"id", "apiKey"}
    key = made.body["apiKey"]
    listed = await api.admin.get(path)
    assert [set(item) for item in listed.body["items"]] == [
        {"id", "prefix", "createdAt", "revokedAt"}
    ] * 2
    assert listed.body["items"][1]["id"] == made.body["id"]
    assert key.startswith(listed.body["items"][1]["prefix"])
    assert key not in listed.text
    for table in ("tenant_key", "idempotency"):
        rows = await connection.fetch(f"select t::text as row from {table} t")
        assert rows
        assert not any(key in row["row"] or key.encode().hex() in row["row"] for row in rows)


async def test_a_revoked_key_opens_nothing_from_the_next_request_on(api: Api) -> None:
    tenant = await api.new_tenant()
    path = f"{TENANTS}/{tenant.id}/keys"
    second = (await api.admin.post(path)).body
    assert (await tenant.get("/api/credits")).status == 200
    first_id = (await api.admin.get(path)).body["items"][0]["id"]
    assert (await api.admin.delete(f"{path}/{first_id}")).status == 204
    refused = await tenant.get("/api/credits")
    assert (refused.status, refused.body["code"]) == (401, "UNAUTHORIZED")
    tenant.key = second["apiKey"]
    assert (await tenant.get("/api/credits")).status == 200
    item = (await api.admin.get(path)).body["items"][0]
    assert item["revokedAt"] is not None
    assert (await api.admin.delete(f"{path}/{first_id}")).status == 204
    assert (await api.admin.get(path)).body["items"][0] == item


async def test_a_key_is_revoked_by_the_way_of_its_own_tenant_alone(api: Api) -> None:
    tenant, other = await api.new_tenant(), await api.new_tenant()
    key_id = (await api.admin.get(f"{TENANTS}/{tenant.id}/keys")).body["items"][0]["id"]
    reply = await api.admin.delete(f"{TENANTS}/{other.id}/keys/{key_id}")
    assert (reply.status, reply.body["code"]) == (404, "NOT_FOUND")
    assert (await tenant.get("/api/credits")).status == 200


@pytest.mark.parametrize("method", ["GET", "PATCH"])
@pytest.mark.parametrize("path", [f"{ACCOUNTS}/99", f"{TENANTS}/99", f"{TENANTS}/{2**63}"])
async def test_what_does_not_exist_is_404(api: Api, method: str, path: str) -> None:
    reply = await api.admin(method, path, None if method == "GET" else {"name": "New"})
    assert (reply.status, reply.body["code"]) == (404, "NOT_FOUND")


async def test_keys_of_nobody_are_404(api: Api) -> None:
    for method in ("GET", "POST"):
        reply = await api.admin(method, f"{TENANTS}/99/keys")
        assert (reply.status, reply.body["code"]) == (404, "NOT_FOUND")


async def test_lists_come_in_pages(api: Api) -> None:
    made = [await api.new_account() for _ in range(3)]
    first = (await api.admin.get(f"{ACCOUNTS}?pageSize=2")).body
    second = (await api.admin.get(f"{ACCOUNTS}?page=2&pageSize=2")).body
    assert [item["id"] for item in first["items"] + second["items"]] == made
    assert (second["total"], second["page"], second["pageSize"]) == (3, 2, 2)


# Signing keys


async def test_of_signing_keys_the_newest_signs_and_two_verify(api: Api) -> None:
    pool = api.ctx.pool
    first = await tenants.signing_keys(pool)
    assert [len(key) for key in first] == [32]
    await pool.executemany(
        "insert into signing_key (key, retired_at) values ($1, $2)",
        [(b"second", None), (b"third", None), (b"retired", datetime.now(UTC))],
    )
    assert await tenants.signing_keys(pool) == [b"third", b"second"]
