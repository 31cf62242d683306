"""What `/metrics` says: it is in the format, it moves when things happen, and it tells nothing of anybody."""

import asyncio
import contextlib
import dataclasses
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from conftest import Api, Caller, TenantCaller
from prometheus_client.parser import text_string_to_metric_families
from shop import ACCEPTED, Shop, add_contacts, shop_of
from support import sending

import smsd
from smsd import api as http_api
from smsd import database, metrics, queue
from smsd.api import endpoint, system
from smsd.expander import Expander
from smsd.queue import Standing
from smsd.simulator import Simulator, Switches

ROOT = Path(__file__).parents[1]


class Scrape:
    """One answer, parsed."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = list(text_string_to_metric_families(text))
        self._values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: object) -> float:
        """The value of one sample, 0 where there is none (yet)."""
        wanted = frozenset((key, str(value)) for key, value in labels.items())
        return self._values.get((name, wanted), 0.0)

    def has(self, name: str) -> bool:
        return any(known == name for known, _ in self._values)


async def scrape(caller: Caller) -> Scrape:
    """A scrape that has not been answered from an earlier one."""
    caller.client.app[system.FIGURES].read_at = -system.FIGURES_SECONDS
    return await look(caller)


async def look(caller: Caller) -> Scrape:
    reply = await caller.get("/metrics")
    assert reply.status == 200, reply.text
    return Scrape(reply.text)


@contextlib.asynccontextmanager
async def served(ctx: endpoint.Context) -> AsyncIterator[Caller]:
    """The API with another context, without a key."""
    server = TestServer(http_api.build(ctx), host="127.0.0.1")
    async with TestClient(server) as client:
        yield Caller(client, None)


@pytest.fixture
async def me(api: Api) -> TenantCaller:
    account_id = await api.new_account(apiKey="key", requestsPerSecond=10_000)
    return await api.new_tenant(account_id=account_id, credits=10_000, requestsPerSecond=10_000)


@pytest.fixture
async def shop(api: Api, me: TenantCaller) -> Shop:
    return await shop_of(api, me)


@dataclasses.dataclass
class Idle:
    """A sender that has done nothing."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    in_flight: int = 0


# ---------------------------------------------------------------------------------------- the format


async def test_the_answer_is_in_prometheus_text_format_and_open(api: Api) -> None:
    reply = await api.public.get("/metrics")
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = Scrape(reply.text).families
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    assert [family.name for family in families if not family.documentation] == []
    assert [name for name in names if not name.startswith(("smsd_", "process_"))] == []


async def test_what_is_documented_is_there_and_what_is_there_is_documented(
    api: Api, shop: Shop
) -> None:
    await shop.sending(5)
    await api.public.get("/healthz")
    async with served(dataclasses.replace(api.ctx, sending=Idle())) as caller:
        found = await scrape(caller)
    table = (ROOT / "docs" / "metrics.md").read_text().partition("## ")[0]
    documented = set(re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE))
    names = {name for row in documented for name in re.findall(r"`(smsd_\w+)`", row)}
    there = {
        family.name + "_total" * (family.type == "counter")
        for family in found.families
        if family.name.startswith("smsd_")
    }
    assert there == names
    assert 20 <= len(there) <= 30


async def test_the_version_is_told(api: Api) -> None:
    assert (await scrape(api.public))("smsd_build_info", version=smsd.__version__) == 1


# ------------------------------------------------------------------------------------- what happens


async def test_requests_are_counted_by_route_and_status_and_never_by_what_was_asked_for(
    api: Api, me: TenantCaller
) -> None:
    name = "smsd_http_request_seconds_count"
    known = {"method": "GET", "route": "/api/campaigns/{id}", "status": 404}
    odd = {"method": "(any)", "route": "(unknown)", "status": 404}
    odd_id = "471147114711471147"  # so long that no figure has it by chance
    before = await scrape(api.public)
    for _ in range(3):
        assert (await me.get(f"/api/campaigns/{odd_id}")).status == 404
    assert (await me("PROPFIND", "/somewhere/306944123456")).status == 404
    after = await scrape(api.public)
    assert after(name, **known) - before(name, **known) == 3
    assert after(name, **odd) - before(name, **odd) == 1
    for word in (odd_id, "PROPFIND", "306944123456", "somewhere"):
        assert word not in after.text


async def test_receipts_are_counted_by_what_became_of_them(
    api: Api, me: TenantCaller, shop: Shop
) -> None:
    await shop.sending(5)
    await shop.send_all(ACCEPTED)
    ids = [row[0] for row in await shop.pool.fetch("select provider_id from message_shown")]
    before = await scrape(api.public)
    receipts: list[dict[str, Any]] = [
        {"messageId": one, "status": "Delivered"} for one in [*ids[:3], "nobody's"]
    ]
    body = (await api.public.post("/webhooks/mitto/dlr", [*receipts, {"odd": 1}])).body
    assert body["received"] == 5
    after = await scrape(api.public)
    moved = {
        what: after("smsd_receipts_total", what=what) - before("smsd_receipts_total", what=what)
        for what in ("received", "applied", "early", "raw")
    }
    assert moved == {"received": 4, "applied": 3, "early": 1, "raw": 1}


async def test_batches_and_messages_are_counted_by_what_mitto_answered(
    api: Api, shop: Shop
) -> None:
    async with Simulator(Switches(dlr=False)) as mitto:
        await shop.sending(20, batch_size=10)
        async with (
            sending(shop.pool, shop.replica_id, mitto.url) as at_work,
            served(dataclasses.replace(api.ctx, sending=at_work.sender)) as caller,
        ):
            before = await scrape(caller)
            await at_work.until_done()
            between = await scrape(caller)
            assert _moved(before, between) == {"batches": 2, "accepted": 20, "refused": 0}
            mitto.switches = Switches(dlr=False, refuse_items=1.0)
            await shop.sending(5)
            await at_work.until_done()
            after = await scrape(caller)
        assert _moved(between, after) == {"batches": 1, "accepted": 0, "refused": 5}
        assert after("smsd_batches_in_flight") == at_work.sender.in_flight == 0
        assert after("smsd_grants_total") == at_work.sender.counts["granted"] >= 3


def _moved(before: Scrape, after: Scrape) -> dict[str, float]:
    def moved(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    return {
        "batches": moved("smsd_batches_total", outcome="accepted"),
        "accepted": moved("smsd_messages_total", result="accepted"),
        "refused": moved("smsd_messages_total", result="refused"),
    }


async def test_recipients_are_counted_as_they_are_read(api: Api, me: TenantCaller) -> None:
    pool = api.ctx.pool
    await add_contacts(pool, me.id, 7)
    await pool.execute(
        "insert into opt_out (tenant_id, phone, source) select tenant_id, phone, 'test' from contact limit 2"
    )
    given = {"name": "Sale", "messageText": "Hi {{firstName}} {{city}}", "messageType": "service"}
    campaign_id = (await me.post("/api/campaigns", given)).body["id"]
    assert (await me.post(f"/api/campaigns/{campaign_id}/enqueue")).status == 202
    replica_id = await queue.register(pool, "test", "0")
    before = await scrape(api.public)
    standing = Standing("test", 30, replica_id)
    assert await Expander(pool, standing, api.ctx.keys, "https://s.example").expand_one()
    after = await scrape(api.public)
    totals = await pool.fetchrow("select queued, skipped from campaign_totals")
    assert totals is not None
    for became, n in (("message", totals["queued"]), ("skipped", totals["skipped"])):
        name = "smsd_expanded_recipients_total"
        assert after(name, became=became) - before(name, became=became) == n > 0


async def test_a_loop_that_comes_back_late_is_seen() -> None:
    before = Scrape(metrics.exposition([]).decode())
    asleep = metrics.Sleeper()
    time.sleep(0.03)  # noqa: ASYNC251 - that is what makes a loop late
    asleep.slept(0.0)
    after = Scrape(metrics.exposition([]).decode())
    name = "smsd_loop_lag_seconds"
    assert after(f"{name}_count") - before(f"{name}_count") == 1
    assert after(f"{name}_bucket", le=0.025) == before(f"{name}_bucket", le=0.025)


# -------------------------------------------------------------------------------- what stands there


async def test_what_is_open_is_told_by_account_and_state(
    api: Api, me: TenantCaller, shop: Shop
) -> None:
    await shop.sending(30, batch_size=5)
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(shop.pool, grant.batch_id, intent.attempt, "unknown", "unknown")
    await shop.claim(2)
    found = await scrape(api.public)
    expected = {"ready": (3, 15), "leased": (2, 10), "unknown": (1, 5), "sending": (0, 0)}
    for state, (batches, messages) in expected.items():
        labels = {"account": me.account_id, "state": state}
        assert found("smsd_queue_batches", **labels) == batches
        assert found("smsd_queue_messages", **labels) == messages
    oldest = await shop.pool.fetchval(
        "select extract(epoch from clock_timestamp() - min(created_at))::float8 from batch"
    )
    labels = {"account": me.account_id, "state": "ready"}
    assert 0 < found("smsd_queue_oldest_seconds", **labels) <= oldest
    assert (found("smsd_replicas_alive"), found("smsd_replica_registered")) == (1, 1)
    assert found("smsd_database_up") == 1


async def test_the_pool_is_told(api: Api) -> None:
    pool = api.ctx.pool
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(pool.get_max_size() - 1):
            await stack.enter_async_context(pool.acquire())
        found = await scrape(api.public)
    assert found("smsd_pool_connections", state="in_use") >= pool.get_max_size() - 1
    assert found("smsd_pool_size") == pool.get_max_size()
    assert found("smsd_pool_waiting") == 0


async def test_who_waits_for_a_connection_is_counted_and_a_scrape_does_not_wait_long(
    api: Api,
) -> None:
    pool = api.ctx.pool
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(pool.get_max_size()):
            await stack.enter_async_context(pool.acquire())
        waiting = [_waits(pool) for _ in range(3)]
        async with contextlib.AsyncExitStack() as waits:
            for one in waiting:
                await waits.enter_async_context(one)
            started = time.monotonic()
            found = await scrape(api.public)
            assert time.monotonic() - started < system.READY_SECONDS + 1
            assert found("smsd_pool_waiting") == 3
            assert found("smsd_database_up") == 0


@contextlib.asynccontextmanager
async def _waits(pool: database.Pool) -> AsyncIterator[None]:
    async def wait() -> None:
        async with pool.acquire():
            pass

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_old_snapshot_is_seen(api: Api, connection: database.Connection) -> None:
    async with connection.transaction(isolation="repeatable_read"):
        await connection.fetchval("select 1")
        since = await api.ctx.pool.fetchval("select clock_timestamp()")
        await connection.fetchval("select pg_sleep(0.2)")
        found = await scrape(api.public)
        age = await api.ctx.pool.fetchval(
            "select extract(epoch from clock_timestamp() - $1::timestamptz)::float8", since
        )
        assert 0.2 <= found("smsd_database_oldest_snapshot_seconds") <= age + 0.2


async def test_a_scrape_is_answered_while_the_database_is_away(api: Api, me: TenantCaller) -> None:
    away = await database.open_pool("postgresql://smsd@127.0.0.1:9/smsd", 2)
    async with served(dataclasses.replace(api.ctx, pool=away)) as caller:
        found = await scrape(caller)
        assert found("smsd_database_up") == 0
        assert found("smsd_pool_size") == 2
        assert not found.has("smsd_queue_batches")
        assert not found.has("smsd_replicas_alive")
        assert found.has("smsd_http_request_seconds_count")
    await away.close()


async def test_many_scrapes_cost_the_database_one_look(
    api: Api, me: TenantCaller, shop: Shop
) -> None:
    labels = {"account": me.account_id, "state": "ready"}
    assert (await scrape(api.public))("smsd_queue_batches", **labels) == 0
    await shop.sending(5)
    assert (await look(api.public))("smsd_queue_batches", **labels) == 0
    assert (await scrape(api.public))("smsd_queue_batches", **labels) == 1


async def test_no_number_and_no_text_is_in_the_metrics(
    api: Api, me: TenantCaller, shop: Shop
) -> None:
    text = "Dear Maria, your code is K4711X"
    reply = await me.post("/api/messages", {"phone": "+306944123456", "text": text})
    assert reply.status == 202
    await shop.sending(5)
    await me.get("/api/campaigns", params={"q": "306944123456"})
    found = await scrape(api.public)
    phones = [str(row[0]) for row in await shop.pool.fetch("select phone from message")]
    assert len(phones) == 6
    assert me.key is not None
    assert [word for word in (*phones, "Maria", "K4711X", me.key) if word in found.text] == []
