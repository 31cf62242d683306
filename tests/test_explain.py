"""Why work waits: each cause is made, by what makes it in life, and then read from the explanation."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import Api, TenantCaller, open_api
from shop import ACCEPTED, UNKNOWN, Shop, add_contacts, shop_of
from support import sending

from smsd import config, explain, queue
from smsd.causes import Code
from smsd.database import Pool
from smsd.expander import Expander
from smsd.queue import Standing
from smsd.simulator import Simulator, Switches

LEASE_SECONDS = 30
SECRET_TEXT = "Dear Maria, your code is 4711"
CODES = list(Code)


@pytest.fixture
async def me(api: Api) -> TenantCaller:
    account_id = await api.new_account(apiKey="key")
    return await api.new_tenant(account_id=account_id, credits=1_000)


@pytest.fixture
async def shop(api: Api, me: TenantCaller) -> Shop:
    return await shop_of(api, me)


@pytest.fixture
async def mitto() -> AsyncIterator[Simulator]:
    async with Simulator(Switches(dlr=False)) as simulator:
        yield simulator


async def why(caller: TenantCaller, campaign_id: int) -> list[dict[str, Any]]:
    """The causes, which always stand in the order of their strength."""
    reply = await caller.get(f"/api/campaigns/{campaign_id}/explain")
    assert reply.status == 200, reply.text
    found = reply.body["causes"]
    places = [CODES.index(Code(cause["code"])) for cause in found]
    assert places == sorted(places)
    return list(found)


async def words(caller: TenantCaller, campaign_id: int) -> list[tuple[str, str]]:
    """What holds work up, and who can lift it."""
    return [(cause["code"], cause["canBeLiftedBy"]) for cause in await why(caller, campaign_id)]


async def the(caller: TenantCaller, campaign_id: int, code: Code) -> dict[str, Any]:
    """The one cause of this code."""
    (cause,) = [one for one in await why(caller, campaign_id) if one["code"] == code]
    return cause


def at(cause: dict[str, Any], name: str) -> datetime:
    value = cause[name]
    assert value is not None
    return datetime.fromisoformat(value)


async def change(api: Api, kind: str, number: int, **fields: Any) -> None:
    reply = await api.admin.patch(f"/api/admin/{kind}/{number}", fields)
    assert reply.status == 200, reply.text


async def draft(caller: TenantCaller, **fields: Any) -> int:
    given = {"name": "Sale", "messageText": "Hi {{firstName}}", "messageType": "service"} | fields
    reply = await caller.post("/api/campaigns", given)
    assert reply.status == 201, reply.text
    return int(reply.body["id"])


async def act(caller: TenantCaller, campaign_id: int, action: str) -> None:
    reply = await caller.post(f"/api/campaigns/{campaign_id}/{action}")
    assert reply.status in (200, 202), reply.text


async def claim_one(shop: Shop, all_limit: int | None = None) -> None:
    """Claims one batch, when the limiters say so."""
    async with asyncio.timeout(10):
        while True:
            claimed = await queue.claim(
                shop.pool, shop.account_id, shop.replica_id, 1, lead_us=0, all_limit=all_limit
            )
            if claimed.grants:
                return
            assert claimed.back_us is not None
            await asyncio.sleep((claimed.back_us - claimed.now_us) / 1e6)


async def settle(shop: Shop, action: str, **fields: Any) -> int:
    """Posts one batch, and Mitto's answer is the same for all of it; the batch's id."""
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(
        shop.pool, grant.batch_id, intent.attempt, action, action, **({"most": 9} | fields)
    )
    return grant.batch_id


# ------------------------------------------------------------------------------- of a campaign itself


async def test_a_draft_waits_for_its_tenant(me: TenantCaller) -> None:
    campaign_id = await draft(me)
    (cause,) = await why(me, campaign_id)
    assert (cause["code"], cause["canBeLiftedBy"]) == ("DRAFT", "tenant")
    assert "enqueue" in cause["how"]
    created_at = (await me.get(f"/api/campaigns/{campaign_id}")).body["createdAt"]
    assert cause["since"] == created_at


async def test_a_draft_of_an_inactive_tenant_could_not_be_sent_either(
    api: Api, me: TenantCaller
) -> None:
    campaign_id = await draft(me)
    await change(api, "tenants", me.id, subscription="inactive")
    assert await words(me, campaign_id) == [("DRAFT", "tenant"), ("CAMPAIGN_PAUSED", "operator")]
    assert (await why(me, campaign_id))[1]["reason"] == "INACTIVE_SUBSCRIPTION"


async def test_a_scheduled_campaign_says_when(me: TenantCaller, shop: Shop) -> None:
    campaign_id = await draft(me)
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    await shop.pool.execute(
        "update campaign set status = 'scheduled', scheduled_at = $2 where id = $1",
        campaign_id, tomorrow,
    )  # fmt: skip
    (cause,) = await why(me, campaign_id)
    assert (cause["code"], cause["canBeLiftedBy"]) == ("SCHEDULED", "tenant")
    assert at(cause, "until") == tomorrow


async def test_a_pause_names_who_paused_and_ends_with_resume(me: TenantCaller, shop: Shop) -> None:
    campaign_id = await shop.sending(10)
    before = await shop.pool.fetchval("select clock_timestamp()")
    await act(me, campaign_id, "pause")
    (cause,) = await why(me, campaign_id)
    assert (cause["code"], cause["reason"], cause["canBeLiftedBy"]) == (
        "CAMPAIGN_PAUSED", "PAUSED_BY_USER", "tenant",
    )  # fmt: skip
    assert at(cause, "since") >= before
    assert "resume" in cause["how"]
    await act(me, campaign_id, "resume")
    assert await words(me, campaign_id) == [("NEXT", "nobody needed")]


async def test_an_inactive_subscription_is_lifted_by_the_operator(
    api: Api, me: TenantCaller, shop: Shop
) -> None:
    campaign_id = await shop.sending(10)
    await change(api, "tenants", me.id, subscription="inactive")
    (cause,) = await why(me, campaign_id)
    assert (cause["code"], cause["reason"], cause["canBeLiftedBy"]) == (
        "CAMPAIGN_PAUSED", "INACTIVE_SUBSCRIPTION", "operator",
    )  # fmt: skip
    await change(api, "tenants", me.id, subscription="active")
    assert await words(me, campaign_id) == [("NEXT", "nobody needed")]


async def test_a_campaign_that_ran_out_of_credits_says_how_many_there_are(api: Api) -> None:
    me = await api.new_tenant(credits=7)
    pool = api.ctx.pool
    ids = await add_contacts(pool, me.id, 5)
    campaign_id = await draft(me, messageText="Hi {{firstName}}{{note}}")
    for contact_id in ids:
        reply = await me.put(f"/api/contacts/{contact_id}", {"attributes": {"note": "!"}})
        assert reply.status == 200, reply.text
    await act(me, campaign_id, "enqueue")
    for contact_id in ids:  # between the quote and the reading, every text grows to three segments
        await me.put(f"/api/contacts/{contact_id}", {"attributes": {"note": "x" * 400}})
    replica_id = await queue.register(pool, "test", "0")
    expander = Expander(pool, Standing("test", 30, replica_id), api.ctx.keys, "https://s.example")
    assert await expander.expand_one()
    cause = (await why(me, campaign_id))[0]
    assert (cause["code"], cause["reason"], cause["canBeLiftedBy"]) == (
        "CAMPAIGN_PAUSED", "INSUFFICIENT_CREDITS", "operator",
    )  # fmt: skip
    assert "2 are available" in cause["message"]
    grant = {"amount": 50, "reason": "top-up"}
    assert (await api.admin.post(f"/api/admin/tenants/{me.id}/credits", grant)).status == 200
    assert await words(me, campaign_id) == [("EXPANSION", "nobody needed")]


async def test_what_mitto_refuses_as_a_whole_is_paused_with_its_words(
    me: TenantCaller, shop: Shop
) -> None:
    campaign_id = await shop.sending(4, batch_size=2)
    for _ in range(3):  # a batch, then its two halves
        await settle(shop, "refused", status=400, detail="Sender unknown", refusal="same")
    cause = (await why(me, campaign_id))[0]
    assert (cause["code"], cause["reason"], cause["canBeLiftedBy"]) == (
        "CAMPAIGN_PAUSED", "REFUSED_BY_PROVIDER", "tenant",
    )  # fmt: skip
    assert "Sender unknown" in cause["message"]


# --------------------------------------------------------------------- of the account and the provider


async def test_an_account_that_the_operator_paused_is_lifted_by_the_operator(
    api: Api, me: TenantCaller, shop: Shop
) -> None:
    campaign_id = await shop.sending(10)
    await change(api, "traffic-accounts", me.account_id, paused=True)
    (cause,) = await why(me, campaign_id)
    assert (cause["code"], cause["reason"], cause["canBeLiftedBy"]) == (
        "ACCOUNT_PAUSED", "PAUSED_BY_OPERATOR", "operator",
    )  # fmt: skip
    assert '"paused": false' in cause["how"]
    assert cause["since"] is not None
    await change(api, "traffic-accounts", me.account_id, paused=False)
    assert await words(me, campaign_id) == [("NEXT", "nobody needed")]


@pytest.mark.parametrize(
    ("fault", "reason", "hint"),
    [("fail_401", "UNAUTHORIZED", "apiKey"), ("redirect", "MISDIRECTED", "SMSD_MITTO_BASE_URL")],
)
async def test_an_account_that_mitto_turned_away_names_its_answer_and_what_to_do(
    me: TenantCaller, shop: Shop, mitto: Simulator, fault: str, reason: str, hint: str
) -> None:
    mitto.switches = Switches(dlr=False, **{fault: 1.0})
    campaign_id = await shop.sending(5)
    async with sending(shop.pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until(
            lambda: shop.pool.fetchval("select bool_and(paused_reason <> '') from traffic_account")
        )
    cause = (await why(me, campaign_id))[0]
    assert (cause["code"], cause["reason"], cause["canBeLiftedBy"]) == (
        "ACCOUNT_PAUSED", reason, "operator",
    )  # fmt: skip
    assert hint in cause["how"]
    detail = await shop.pool.fetchval("select paused_detail from traffic_account")
    assert detail
    assert detail in cause["message"]


async def test_a_throttled_account_says_until_when(
    me: TenantCaller, shop: Shop, mitto: Simulator
) -> None:
    mitto.switches = Switches(dlr=False, fail_429=1.0, retry_after=60)
    campaign_id = await shop.sending(5)
    async with sending(shop.pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until(
            lambda: shop.pool.fetchval(
                "select (select bool_and(blocked_until > now()) from traffic_account)"
                " and (select min(state) = 0 from batch)"
            )
        )
    cause = await the(me, campaign_id, Code.ACCOUNT_THROTTLED)
    assert cause["canBeLiftedBy"] == "time"
    assert at(cause, "until") == await shop.pool.fetchval(
        "select blocked_until from traffic_account"
    )
    assert cause["since"] is not None


async def test_a_breaker_is_open_while_mitto_is_not_there_and_closed_when_it_is_back(
    api: Api, me: TenantCaller, shop: Shop
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    campaign_id = await shop.sending(5)
    async with sending(shop.pool, shop.replica_id, f"http://127.0.0.1:{port}") as at_work:
        told = "select exists (select from replica_account)"
        causes: list[Any] = []
        async with asyncio.timeout(
            20
        ):  # open for a second, then for two, four … and shut in between to probe
            while not causes:
                await asyncio.sleep(0.02)
                causes = [
                    one for one in await why(me, campaign_id) if one["code"] == Code.BREAKER_OPEN
                ]
        cause = causes[0]
        assert cause["canBeLiftedBy"] == "mitto"
        assert "1 of 1 replicas" in cause["message"]
        assert at(cause, "since") <= at(cause, "until")
        async with asyncio.timeout(20):
            while (await api.admin.get("/api/admin/queue")).body["accounts"][0][
                "openBreakers"
            ] != 1:
                await asyncio.sleep(0.02)
        async with Simulator(Switches(dlr=False), port=port):
            await at_work.until_done()
            async with asyncio.timeout(20):
                while await shop.pool.fetchval(told):
                    await asyncio.sleep(0.02)
    assert await words(me, campaign_id) == [("AWAITING_RECEIPTS", "mitto")]


async def test_a_breaker_of_a_replica_that_is_gone_holds_nothing(
    me: TenantCaller, shop: Shop
) -> None:
    campaign_id = await shop.sending(5)
    other = await queue.register(shop.pool, "other", "0")
    await explain.open_breaker(shop.pool, other, me.account_id, 3, "refused", 30)
    assert (await words(me, campaign_id))[0] == ("BREAKER_OPEN", "mitto")
    assert "1 of 2 replicas" in (await why(me, campaign_id))[0]["message"]
    await queue.leave(shop.pool, other, "stopped")
    assert await words(me, campaign_id) == [("NEXT", "nobody needed")]


# --------------------------------------------------------------------------------- of the installation


async def test_without_a_replica_nobody_sends(me: TenantCaller, shop: Shop) -> None:
    campaign_id = await shop.sending(10)
    await queue.leave(shop.pool, shop.replica_id, "stopped")
    (cause,) = await why(me, campaign_id)
    assert (cause["code"], cause["canBeLiftedBy"]) == ("NO_REPLICA", "operator")
    assert at(cause, "since") == await shop.pool.fetchval("select gone_at from replica")


async def test_a_replica_whose_heartbeat_rests_for_a_lease_is_not_alive(
    me: TenantCaller, shop: Shop
) -> None:
    campaign_id = await shop.sending(10)
    rest = "update replica set beat_at = clock_timestamp() - make_interval(secs => $1)"
    await shop.pool.execute(rest, LEASE_SECONDS - 1)
    assert await words(me, campaign_id) == [("NEXT", "nobody needed")]
    await shop.pool.execute(rest, LEASE_SECONDS)
    assert (await words(me, campaign_id))[0] == ("NO_REPLICA", "operator")
    await queue.beat(shop.pool, shop.replica_id)
    assert await words(me, campaign_id) == [("NEXT", "nobody needed")]


async def test_after_a_restore_it_names_the_replicas_that_have_not_said_what_they_posted(
    me: TenantCaller, shop: Shop
) -> None:
    campaign_id = await shop.sending(10)
    await shop.pool.execute("update instance set identity = 'the one before'")
    await queue.beat(shop.pool, shop.replica_id)
    cause = (await why(me, campaign_id))[0]
    assert (cause["code"], cause["canBeLiftedBy"]) == ("RECOVERING", "operator")
    assert f"replicas {shop.replica_id} " in cause["message"]
    assert "smsd recover" in cause["how"]
    assert at(cause, "since") == await shop.pool.fetchval("select found_at from instance")


async def test_a_limiter_that_lost_its_state_is_closed_for_a_moment(
    me: TenantCaller, shop: Shop
) -> None:
    campaign_id = await shop.sending(10)
    await shop.pool.execute("truncate rate")  # what a crash of Postgres leaves of an unlogged table
    assert await words(me, campaign_id) == [("LIMITER_CLOSED", "time")]
    assert await shop.claim() == []
    cause = await the(me, campaign_id, Code.LIMITER_CLOSED)
    closed_us = await shop.pool.fetchval("select closed_until from rate where scope = 1")
    assert at(cause, "until").timestamp() == pytest.approx(closed_us / 1e6, abs=0.001)


# ------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("kind", "fields", "code", "said"),
    [
        ("traffic-accounts", {"requestsPerSecond": 1}, Code.ACCOUNT_LIMIT, "1 requests a second"),
        ("traffic-accounts", {"messagesPerSecond": 5}, Code.ACCOUNT_LIMIT, "5 messages a second"),
        ("tenants", {"requestsPerSecond": 1}, Code.TENANT_LIMIT, "1 requests a second"),
        ("tenants", {"messagesPerSecond": 5}, Code.TENANT_LIMIT, "5 messages a second"),
    ],
)
async def test_a_limit_names_itself_and_since_when_work_waits_for_it(
    api: Api, me: TenantCaller, shop: Shop, kind: str, fields: dict[str, int], code: Code, said: str
) -> None:
    await change(api, kind, me.id if kind == "tenants" else me.account_id, **fields)
    campaign_id = await shop.sending(10, batch_size=5)
    if "messagesPerSecond" in fields:  # a limit that is new knows of nothing that was sent
        assert (await words(me, campaign_id))[0] == ("LIMITER_CLOSED", "time")
    await claim_one(shop)
    assert await shop.claim() == []
    cause = await the(me, campaign_id, code)
    assert said in cause["message"]
    assert cause["canBeLiftedBy"] == "operator"
    (name,) = fields
    assert name in cause["how"]
    ready_since = await shop.pool.fetchval("select min(created_at) from batch where state = 0")
    assert at(cause, "since") == ready_since
    held = [one["code"] for one in await why(me, campaign_id) if one["code"] != "ON_ITS_WAY"]
    assert held == [code]
    if code is Code.TENANT_LIMIT or "requestsPerSecond" in fields:
        assert at(cause, "until") > ready_since


async def test_the_limit_of_all_accounts_together_is_the_settings(
    pool: Pool, settings: config.Settings
) -> None:
    limited = settings.model_copy(update={"requests_per_second": 1})
    async with open_api(pool, limited) as api:
        me = await api.new_tenant(credits=100)
        shop = await shop_of(api, me)
        campaign_id = await shop.sending(10, batch_size=5)
        await claim_one(shop, all_limit=1)
        cause = await the(me, campaign_id, Code.INSTALLATION_LIMIT)
        assert cause["canBeLiftedBy"] == "operator"
        assert "SMSD_REQUESTS_PER_SECOND" in cause["how"]


async def test_a_limit_that_mitto_taught_us_climbs_back_by_itself(
    api: Api, me: TenantCaller, shop: Shop
) -> None:
    await change(api, "traffic-accounts", me.account_id, requestsPerSecond=2)
    campaign_id = await shop.sending(10, batch_size=5)
    now_us = await shop.pool.fetchval("select clock_us()")
    assert await queue.throttle_account(shop.pool, me.account_id, 0.0, now_us)
    await claim_one(shop)
    cause = await the(me, campaign_id, Code.ACCOUNT_LIMIT)
    assert cause["canBeLiftedBy"] == "time"
    assert "limit of 1 requests a second; 2 are set" in cause["message"]
    (account,) = (await api.admin.get("/api/admin/queue")).body["accounts"]
    assert (account["limiter"]["ceiling"], account["limiter"]["requests"]["limit"]) == (1, 2)


async def test_others_on_the_account_leave_a_share_by_weight(api: Api) -> None:
    account_id = await api.new_account(requestsPerSecond=1)
    me = await api.new_tenant(account_id=account_id, credits=100)
    other = await api.new_tenant(account_id=account_id, credits=100, weight=3)
    shop, others = await shop_of(api, me), await shop_of(api, other)
    campaign_id = await shop.sending(10)
    assert [code for code, _ in await words(me, campaign_id)] == ["NEXT"]
    await others.sending(10)
    assert len(await shop.claim()) == 1
    cause = await the(me, campaign_id, Code.SHARED)
    assert "25%" in cause["message"]
    assert cause["canBeLiftedBy"] == "operator"


async def test_requests_on_their_way_fill_the_places_that_there_are(
    api: Api, me: TenantCaller, shop: Shop
) -> None:
    await change(api, "traffic-accounts", me.account_id, maxInFlight=1)
    campaign_id = await shop.sending(10, batch_size=5)
    assert len(await shop.post()) == 1
    assert await shop.claim() == []
    assert await words(me, campaign_id) == [
        ("IN_FLIGHT_LIMIT", "operator"),
        ("ON_ITS_WAY", "nobody needed"),
    ]


# ------------------------------------------------------------------------------------ of the batches


async def test_what_was_refused_for_now_says_when_it_is_tried_again_and_what_was_answered(
    me: TenantCaller, shop: Shop
) -> None:
    campaign_id = await shop.sending(10, batch_size=5)
    batch_id = await settle(shop, "again", status=503, detail="overloaded", delay_seconds=60)
    cause = await the(me, campaign_id, Code.RETRY)
    assert cause["canBeLiftedBy"] == "time"
    assert "5 messages were refused for now, up to 1 time," in cause["message"]
    assert "HTTP 503: overloaded" in cause["message"]
    assert at(cause, "until") == await shop.pool.fetchval(
        "select not_before from batch where id = $1", batch_id
    )
    await shop.pool.execute("update batch set not_before = clock_timestamp() where state = 1")
    assert await words(me, campaign_id) == [("NEXT", "nobody needed")]


async def test_a_search_for_the_bad_message_that_took_its_budget_waits(
    api: Api, me: TenantCaller, shop: Shop
) -> None:
    await change(api, "traffic-accounts", me.account_id, requestsPerSecond=10_000)
    await change(api, "tenants", me.id, requestsPerSecond=10_000)
    campaign_id = await shop.sending(64, batch_size=64)
    tried = 0
    while await shop.pool.fetchval("select max(splits) from lane") <= 20:
        tried += 1
        await settle(shop, "refused", status=400, detail="bad", refusal=f"words {tried}")
    cause = await the(me, campaign_id, Code.SPLIT_BUDGET)
    assert cause["canBeLiftedBy"] == "time"
    assert at(cause, "until") == await shop.pool.fetchval(
        "select max(not_before) from batch where state = 1"
    )


async def test_an_audience_that_is_still_being_read_says_how_far(
    me: TenantCaller, shop: Shop
) -> None:
    campaign_id = await shop.begin(30)
    cause = await the(me, campaign_id, Code.EXPANSION)
    assert (cause["canBeLiftedBy"], "0 of 30" in cause["message"]) == ("nobody needed", True)
    await shop.expand(20, last=False)
    assert "20 of 30" in (await the(me, campaign_id, Code.EXPANSION))["message"]
    await shop.expand(10)
    assert await words(me, campaign_id) == [("NEXT", "nobody needed")]


async def test_unknown_messages_wait_for_evidence_first_and_for_a_person_then(
    api: Api, me: TenantCaller, shop: Shop, pool: Pool, settings: config.Settings
) -> None:
    campaign_id = await shop.sending(5)
    batch_id = await settle(shop, "unknown")
    intent_at = await pool.fetchval("select intent_at from attempt where batch_id = $1", batch_id)
    cause = await the(me, campaign_id, Code.UNKNOWN)
    assert (cause["canBeLiftedBy"], at(cause, "since")) == ("mitto", intent_at)
    assert at(cause, "until") == intent_at + timedelta(seconds=settings.unknown_after)
    assert "5 messages" in cause["message"]
    impatient = settings.model_copy(update={"unknown_after": 0.0})
    async with open_api(pool, impatient) as later:
        mine = TenantCaller(later.client, me.key, me.id, me.account_id)
        cause = await the(mine, campaign_id, Code.UNKNOWN)
        assert (cause["canBeLiftedBy"], cause["until"]) == ("tenant", None)
        assert "unknown" in cause["how"]


async def test_messages_that_are_unknown_one_by_one_are_counted_too(
    me: TenantCaller, shop: Shop
) -> None:
    campaign_id = await shop.sending(5)
    ((grant, intent),) = await shop.post()
    await shop.answer(grant, intent, ACCEPTED, UNKNOWN)
    cause = await the(me, campaign_id, Code.UNKNOWN)
    assert "4 messages" in cause["message"]


async def test_from_ready_to_delivered_each_step_says_that_nobody_is_needed(
    me: TenantCaller, shop: Shop
) -> None:
    campaign_id = await shop.sending(5)
    assert await words(me, campaign_id) == [("NEXT", "nobody needed")]
    ((grant, intent),) = await shop.post()
    assert await words(me, campaign_id) == [("ON_ITS_WAY", "nobody needed")]
    await shop.answer(grant, intent, ACCEPTED)
    assert await words(me, campaign_id) == [("AWAITING_RECEIPTS", "mitto")]
    ids = await shop.pool.fetch("select provider_id from message_shown")
    await shop.receive(**{row["provider_id"]: 30 for row in ids})
    assert await words(me, campaign_id) == [("NOTHING_WAITS", "nobody needed")]


async def test_a_cancelled_campaign_waits_for_nothing(me: TenantCaller, shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    await act(me, campaign_id, "cancel")
    assert await words(me, campaign_id) == [("NOTHING_WAITS", "nobody needed")]


# -------------------------------------------------------------------------------------- all together


async def test_causes_come_strongest_first(api: Api, me: TenantCaller, shop: Shop) -> None:
    await change(api, "tenants", me.id, requestsPerSecond=1)
    campaign_id = await shop.sending(30, batch_size=5)
    await settle(shop, "again", delay_seconds=60)
    await shop.pool.execute("truncate rate")
    await shop.pool.execute("update lane set not_before = 0")
    await change(api, "traffic-accounts", me.account_id, paused=True)
    await queue.leave(shop.pool, shop.replica_id, "stopped")
    assert await words(me, campaign_id) == [
        ("ACCOUNT_PAUSED", "operator"),
        ("NO_REPLICA", "operator"),
        ("LIMITER_CLOSED", "time"),
        ("RETRY", "time"),
    ]
    await act(me, campaign_id, "pause")  # then limits and retries are not what it waits for
    assert await words(me, campaign_id) == [
        ("CAMPAIGN_PAUSED", "tenant"),
        ("ACCOUNT_PAUSED", "operator"),
        ("NO_REPLICA", "operator"),
    ]


async def test_a_campaign_of_somebody_else_does_not_exist(api: Api, shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    stranger = await api.new_tenant()
    reply = await stranger.get(f"/api/campaigns/{campaign_id}/explain")
    assert (reply.status, reply.body["code"]) == (404, "NOT_FOUND")
    assert (await api.public.get(f"/api/campaigns/{campaign_id}/explain")).status == 401


def test_every_cause_has_its_own_place() -> None:
    assert len(set(CODES)) == len(CODES)


# ---------------------------------------------------------------------------------------- the queue


async def test_the_queue_counts_batches_and_messages_by_what_they_do(
    api: Api, me: TenantCaller, shop: Shop
) -> None:
    campaign_id = await shop.sending(30, batch_size=5)
    await settle(shop, "again", delay_seconds=60)
    await settle(shop, "unknown")
    assert len(await shop.post()) == 1
    assert len(await shop.claim()) == 1
    reply = await api.admin.get("/api/admin/queue")
    assert reply.status == 200, reply.text
    (lane,), (account,) = reply.body["items"], reply.body["accounts"]
    one = {"batches": 1, "messages": 5}
    opened = {
        "ready": {"batches": 2, "messages": 10}, "waiting": one, "leased": one, "sending": one,
        "unknown": one,
    }  # fmt: skip
    assert (lane["open"], account["open"]) == (opened, opened)
    assert (lane["campaignId"], lane["tenantId"], lane["accountId"], lane["priority"]) == (
        campaign_id, me.id, me.account_id, False,
    )  # fmt: skip
    assert account["limiter"]["requests"] == {"used": 4, "limit": 100}
    assert lane["limiter"]["requests"] == {"used": 4, "limit": 50}
    assert datetime.fromisoformat(account["limiter"]["nextSlotAt"])
    oldest = await shop.pool.fetchval(
        "select extract(epoch from clock_timestamp() - min(created_at))::float8 from batch"
    )
    assert 0 < lane["oldestSeconds"] <= oldest
    assert [cause["code"] for cause in lane["causes"]] == [
        one["code"] for one in await why(me, campaign_id)
    ]


async def test_the_queue_shows_single_messages_and_where_each_lane_stands(api: Api) -> None:
    account_id = await api.new_account()
    me = await api.new_tenant(account_id=account_id, credits=100)
    shop = await shop_of(api, me)
    first, second = await shop.sending(5), await shop.sending(5)
    reply = await me.post("/api/messages", {"phone": "+306944123456", "text": SECRET_TEXT})
    assert reply.status == 202, reply.text
    lanes = (await api.admin.get("/api/admin/queue")).body["items"]
    assert [(one["campaignId"], one["priority"], one["position"]) for one in lanes] == [
        (None, True, 1), (first, False, 2), (second, False, 3),
    ]  # fmt: skip
    assert len(await shop.claim(2)) == 2  # the message, and a batch of the first
    lanes = (await api.admin.get("/api/admin/queue")).body["items"]
    (left,) = [one for one in lanes if one["open"]["ready"]["batches"]]
    assert left["campaignId"] == second


async def test_what_a_whole_account_waits_for_stands_at_the_account(
    api: Api, me: TenantCaller, shop: Shop
) -> None:
    await shop.sending(5)
    idle = await api.new_account()
    await change(api, "traffic-accounts", me.account_id, paused=True)
    await change(api, "traffic-accounts", idle, paused=True)
    accounts = (await api.admin.get("/api/admin/queue")).body["accounts"]
    assert {one["id"]: [c["code"] for c in one["causes"]] for one in accounts} == {
        me.account_id: ["ACCOUNT_PAUSED"], idle: [],
    }  # fmt: skip


async def test_the_queue_has_pages_and_one_account_alone(api: Api) -> None:
    shops = [await shop_of(api, await api.new_tenant(credits=100)) for _ in range(2)]
    made = [await shop.sending(5) for shop in shops for _ in range(3)]
    pages = [
        (await api.admin.get("/api/admin/queue", params={"page": page, "pageSize": 4})).body
        for page in (1, 2, 3)
    ]
    assert [page["total"] for page in pages] == [6, 6, 6]
    assert [one["campaignId"] for page in pages for one in page["items"]] == made
    account = shops[1].account_id
    alone = (await api.admin.get("/api/admin/queue", params={"accountId": account})).body
    assert [one["campaignId"] for one in alone["items"]] == made[3:]
    assert [one["id"] for one in alone["accounts"]] == [account]
    missing = await api.admin.get("/api/admin/queue", params={"accountId": account + 1})
    assert (missing.status, missing.body["code"]) == (404, "NOT_FOUND")


async def test_the_queue_answers_fast_with_a_thousand_lanes(
    api: Api, me: TenantCaller, shop: Shop
) -> None:
    await shop.sending(50, batch_size=5)
    await shop.pool.execute(
        """
        with l as (
          insert into lane (account_id, tenant_id, class, campaign_id, idle)
          select $1, $2, 1, 1000 + i, false from generate_series(1, 1000) i returning id, campaign_id)
        insert into batch (campaign_id, lane_id, tenant_id, account_id, first_id, last_id, n, segments, sender)
        select l.campaign_id, l.id, $2, $1, 1000000 + l.id * 1000 + j * 10, 1000000 + l.id * 1000 + j * 10 + 9, 10, 10, 'Shop'
          from l, generate_series(0, 49) j
        """,
        me.account_id, me.id,
    )  # fmt: skip
    started = time.monotonic()
    reply = await api.admin.get("/api/admin/queue", params={"pageSize": 100})
    took = time.monotonic() - started
    assert reply.status == 200, reply.text
    assert (len(reply.body["items"]), reply.body["total"]) == (100, 1001)
    assert reply.body["accounts"][0]["open"]["ready"] == {"batches": 50_010, "messages": 500_050}
    assert took < 2, "hundreds of milliseconds, and not one query a lane"


async def test_the_queue_and_the_replicas_are_the_operators(api: Api, me: TenantCaller) -> None:
    for path in ("/api/admin/queue", "/api/admin/replicas"):
        assert [(await who.get(path)).status for who in (api.public, me)] == [401, 401]
        assert (await api.admin.get(path)).status == 200


async def test_no_number_and_no_text_is_in_an_explanation_or_in_the_queue(
    api: Api, me: TenantCaller, pool: Pool
) -> None:
    ids = await add_contacts(pool, me.id, 3)
    campaign_id = await draft(me, messageText=SECRET_TEXT)
    await act(me, campaign_id, "enqueue")
    replica_id = await queue.register(pool, "test", "0")
    expander = Expander(pool, Standing("test", 30, replica_id), api.ctx.keys, "https://s.example")
    assert await expander.expand_one()
    phones = [row["phone"] for row in await pool.fetch("select phone from contact")]
    assert len(phones) == len(ids)
    said = (await me.get(f"/api/campaigns/{campaign_id}/explain")).text
    said += (await api.admin.get("/api/admin/queue")).text
    said += (await api.admin.get("/api/admin/replicas")).text
    assert [word for word in (*map(str, phones), "Maria", "4711") if word in said] == []


# ----------------------------------------------------------------------------------------- replicas


async def test_replicas_come_newest_first_with_what_they_hold(api: Api, shop: Shop) -> None:
    pool = api.ctx.pool
    gone = await queue.register(pool, "gone", "1.0")
    await queue.leave(pool, gone, "stopped")
    idle = await queue.register(pool, "idle", "2.0")
    await shop.sending(15, batch_size=5)
    await shop.post()
    await shop.claim(2)
    body = (await api.admin.get("/api/admin/replicas")).body
    assert [
        (one["id"], one["name"], one["alive"], one["leased"], one["sending"], one["goneReason"])
        for one in body["items"]
    ] == [
        (idle, "idle", True, 0, 0, None),
        (gone, "gone", False, 0, 0, "stopped"),
        (shop.replica_id, "test", True, 2, 1, None),
    ]
    assert (body["total"], body["items"][0]["version"]) == (3, "2.0")


async def test_replicas_can_be_those_alive_or_the_others_and_have_pages(api: Api) -> None:
    pool = api.ctx.pool
    ids = [await queue.register(pool, f"r{i}", "0") for i in range(5)]
    await queue.leave(pool, ids[0], "stopped")
    await pool.execute(
        "update replica set beat_at = clock_timestamp() - interval '1 hour' where id = $1", ids[1]
    )

    async def shown(**params: Any) -> tuple[list[int], int]:
        reply = await api.admin.get("/api/admin/replicas", params=params)
        assert reply.status == 200, reply.text
        return [one["id"] for one in reply.body["items"]], reply.body["total"]

    assert await shown(alive="true") == ([ids[4], ids[3], ids[2]], 3)
    assert await shown(alive="false") == ([ids[1], ids[0]], 2)
    assert await shown(page=2, pageSize=2) == ([ids[2], ids[1]], 5)
    refused = await api.admin.get("/api/admin/replicas", params={"alive": "perhaps"})
    assert (refused.status, refused.body["code"]) == (400, "VALIDATION_ERROR")
