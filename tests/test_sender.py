"""The sender against a provider that does everything a provider can do; what it must come to is the outcome table."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from shop import Shop, check_the_account
from structlog.testing import capture_logs
from support import Relay, assert_sound, new_account, open_shop, sending

from smsd import campaigns, config, credits, database, faults, pace, queue, tenants
from smsd.mitto import Account, Client, Result, Withdrawn, clock, parse_dlr
from smsd.model import Outcome
from smsd.pace import Pace, Place, Recent
from smsd.queue import ReceiptRow
from smsd.receipts import Inbox
from smsd.sender import Sender
from smsd.simulator import Simulator, Switches


@pytest.fixture
async def account(pool: database.Pool) -> int:
    return await new_account(pool)


@pytest.fixture
async def shop(pool: database.Pool, account: int) -> AsyncIterator[Shop]:
    """A shop; whatever the test did with it, the audit finds nothing afterwards."""
    yield await open_shop(pool, account, await queue.register(pool, "test", "0"))
    await assert_sound(pool)


@pytest.fixture
async def mitto() -> AsyncIterator[Simulator]:
    async with Simulator(Switches(dlr=False)) as simulator:
        yield simulator


async def outcomes(pool: database.Pool) -> list[str]:
    """Of all that left, or tried to, in order. What a busy machine was late for was withdrawn and does not count."""
    return [
        row["outcome"]
        for row in await pool.fetch(
            "select outcome from attempt where outcome is distinct from 'withdrawn' order by ended_at"
        )
    ]


async def paused(pool: database.Pool) -> tuple[str | None, str | None]:
    row = await pool.fetchrow("select paused_reason, paused_detail from traffic_account")
    assert row is not None
    return row["paused_reason"], row["paused_detail"]


def nobody_twice(mitto: Simulator) -> None:
    assert mitto.ledger.duplicates("destination") == []


# ------------------------------------------------------------------------------------- what is sent


async def test_every_message_arrives_once_with_its_text_number_and_sender(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    campaign_id = await shop.sending(230, batch_size=50)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until_done()
    rows = await pool.fetch("select phone, text, provider_id from message_shown")
    sent = list(mitto.ledger.messages())
    assert sorted((one.destination, one.text, one.message_id) for one in sent) == sorted(
        (row["phone"], row["text"], row["provider_id"]) for row in rows
    )
    assert {(one.account, one.sender) for one in sent} == {("main", "Shop")}
    assert (await check_the_account(shop, campaign_id)).totals.pending == 230
    stored = await pool.fetch("select distinct bulk_id from batch")
    assert {row["bulk_id"] for row in stored} == {one.bulk_id for one in sent}


@pytest.mark.alone
async def test_a_campaign_that_begins_while_the_sender_waits_is_sent_at_once(
    pool: database.Pool, shop: Shop, mitto: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "SLOW_LOOK_SECONDS", 60)
    await shop.sending(5)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until_done()
        await shop.sending(5)
        started = time.monotonic()
        await mitto.accepted_reached(10)
        assert time.monotonic() - started < 0.9, "woken, not found by the slow look"


async def test_a_receipt_that_overtakes_the_answer_is_not_lost(
    pool: database.Pool, shop: Shop
) -> None:
    inbox = Inbox(pool)

    async def take(request: web.Request) -> web.Response:
        dlr = parse_dlr(await request.read())
        rows = [
            ReceiptRow(None, one.provider_id, int(one.state or 0), one.at, None)
            for one in dlr.receipts
        ]
        await inbox.put(rows)
        return web.Response(status=202)

    app = web.Application()
    app.router.add_post("/", take)
    writing = asyncio.create_task(inbox.run())
    switches = Switches(dlr_before_answer=0.5, dlr_delay_seconds=(0, 0), dlr_batch=50)
    campaign_id = await shop.sending(400, batch_size=20)
    async with (
        TestServer(app) as server,
        Simulator(switches, webhook_url=str(server.make_url("/"))) as mitto,
        sending(pool, shop.replica_id, mitto.url) as at_work,
    ):
        await at_work.until_done()
        await mitto.receipts_settled()
    writing.cancel()
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.delivered) == (0, 400)
    assert await pool.fetchval("select count(*) from early_receipt") == 0


async def test_an_answer_that_is_written_again_after_a_failover_finds_its_early_receipts(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    """The database that was promoted may know of fewer receipts than there were: its count says nothing."""
    remembered: list[Any] = []
    campaign_id = await shop.sending(2)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        memory = at_work.sender._memory
        settling = memory.settling

        def remember(grant: queue.Grant, write: Any, *, sent: bool) -> None:
            remembered.append(write)
            settling(grant, write, sent=sent)

        memory.settling = remember  # type: ignore[method-assign]
        await at_work.until_done()
        for one in mitto.ledger.messages():
            await pool.execute(
                "insert into early_receipt (provider_id, state, received_at)"
                " values ($1, 30, now() - interval '2 minutes')",
                one.message_id,
            )
        await pool.execute("select setval('early_receipt_id_seq', 1, false)")
        await remembered[-1]()
    assert (await check_the_account(shop, campaign_id)).totals.delivered == 2


async def test_a_fault_in_what_is_counted_late_costs_no_answer(
    pool: database.Pool, shop: Shop, mitto: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> int:
        raise asyncpg.InternalServerError("a fault")

    monkeypatch.setattr(queue, "arrived_late", broken)
    monkeypatch.setattr(
        faults, "point", lambda name: time.sleep(0.05) if name == "gate.passed" else None
    )
    campaign_id = await shop.sending(20, batch_size=5)
    with capture_logs() as logs:
        async with sending(pool, shop.replica_id, mitto.url) as at_work:
            await at_work.until_done()
    assert any(line["event"] == "late.not_counted" for line in logs)
    assert at_work.sender.counts["late"] == 4
    assert (await check_the_account(shop, campaign_id)).totals.pending == 20


# ------------------------------------------------------------------------------- the outcome table


@pytest.mark.parametrize("fault", ["fail_429", "fail_503_retry_after"])
async def test_a_throttled_account_waits_as_long_as_it_was_told_and_counts_no_attempt(
    pool: database.Pool, shop: Shop, mitto: Simulator, fault: str
) -> None:
    mitto.switches = Switches(dlr=False, **{fault: 1.0}, faults_left=1, retry_after=0.5)
    campaign_id = await shop.sending(15)
    async with sending(pool, shop.replica_id, mitto.url, worker_concurrency=1) as at_work:
        await at_work.until_done()
    first, second, *_ = mitto.ledger.requests
    assert second.arrived_monotonic - first.arrived_monotonic >= 0.45
    blocked = await pool.fetchval(
        "select extract(epoch from blocked_until - ended_at)::float8"
        " from traffic_account, attempt where outcome = 'throttled'"
    )
    assert blocked == pytest.approx(0.5, abs=0.2), "other replicas wait too"
    assert sorted(await outcomes(pool)) == ["accepted"] * 3 + ["throttled"]
    assert await pool.fetchval("select max(tries) from batch") == 0
    assert (await check_the_account(shop, campaign_id)).totals.pending == 15
    nobody_twice(mitto)


@pytest.mark.alone
async def test_a_throttled_account_that_was_told_no_time_waits_longer_each_time(
    pool: database.Pool, shop: Shop, mitto: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    mitto.switches = Switches(dlr=False, fail_429=1, faults_left=2)
    waited = []

    def throttle_seconds(account: Pace, result: Result) -> float:
        waited.append(seconds := told(account, result))
        return seconds

    told = Pace.throttle_seconds
    monkeypatch.setattr(Pace, "throttle_seconds", throttle_seconds)
    await shop.sending(5)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until_done()
    assert sorted(set(waited)) == [0.25, 0.5]
    first, second, third = [one.arrived_monotonic for one in mitto.ledger.requests]
    assert 0.2 <= second - first < 0.45
    assert 0.45 <= third - second < 1.5


async def test_an_unauthorized_account_stops_and_nothing_fails(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    mitto.api_keys = {"the right one"}
    campaign_id = await shop.sending(15)
    async with sending(pool, shop.replica_id, mitto.url, worker_concurrency=1) as at_work:
        await at_work.until(
            lambda: pool.fetchval(
                "select bool_and(state = 0) from batch having exists (select from traffic_account where paused_reason <> '')"
            )
        )
        reason, detail = await paused(pool)
        assert reason == "UNAUTHORIZED"
        assert "X-Mitto-API-Key is missing or unknown" in str(detail)
        totals = (await check_the_account(shop, campaign_id)).totals
        assert totals.queued + totals.processing == 15, "a claim may have begun before the stop"
        async with pool.acquire() as connection, connection.transaction():
            await tenants.change_account(connection, shop.account_id, {"api_key": "the right one"})
        await at_work.until_done()
    assert await paused(pool) == (None, None), "a POST with the old key may have come after the new"
    assert (await check_the_account(shop, campaign_id)).totals.pending == 15
    nobody_twice(mitto)


async def test_a_forbidden_campaign_stops_and_with_a_second_tenant_s_the_account(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator
) -> None:
    mitto.switches = Switches(dlr=False, fail_403=1)
    first = await shop.sending(5)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        stopped = (
            "select bool_and(b.state = 0 and l.paused) from batch b join lane l on l.id = b.lane_id"
        )
        await at_work.until(lambda: pool.fetchval(stopped))
        campaign = (await shop.progress(first)).campaign
        assert (campaign.status, campaign.paused_reason) == ("paused", "FORBIDDEN_BY_PROVIDER")
        assert await paused(pool) == (None, None)
        other = await open_shop(pool, account, shop.replica_id)
        second = await other.sending(5)
        await at_work.until(lambda: pool.fetchval(stopped))
    assert (await paused(pool))[0] == "FORBIDDEN_BY_PROVIDER"
    assert await other.status(second) == "paused"
    assert (await shop.progress(first)).totals.queued == 5


async def test_a_redirect_is_never_followed_and_stops_the_account_with_its_target(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    mitto.switches = Switches(dlr=False, redirect=1)
    campaign_id = await shop.sending(5)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until(
            lambda: pool.fetchval(
                "select state = 0 from batch, traffic_account where paused_reason is not null"
            )
        )
    reason, detail = await paused(pool)
    assert reason == "MISDIRECTED"
    assert f"{mitto.url}/redirected" in str(detail)
    assert mitto.ledger.redirects_followed == 0
    assert (await check_the_account(shop, campaign_id)).totals.queued == 5


async def test_a_request_too_large_is_halved_until_it_fits_and_nothing_is_refused(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    mitto.switches = Switches(dlr=False, largest_request=3)
    campaign_id = await shop.sending(32, batch_size=16)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until_done()
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.refused) == (32, 0)
    assert await pool.fetchval("select largest_request from traffic_account") == 2
    nobody_twice(mitto)


async def test_a_single_message_too_large_by_itself_is_refused(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    mitto.switches = Switches(dlr=False, fail_other=1, fail_other_status=413)
    campaign_id = await shop.sending(1)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until_done()
    assert (await check_the_account(shop, campaign_id)).totals.refused == 1


@pytest.mark.parametrize("fault", ["fail_500", "fail_503"])
async def test_a_server_error_is_tried_again_until_it_works(
    pool: database.Pool, shop: Shop, mitto: Simulator, fault: str
) -> None:
    mitto.switches = Switches(dlr=False, **{fault: 1.0}, faults_left=3)
    campaign_id = await shop.sending(5)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until_done()
    assert await outcomes(pool) == ["retry", "retry", "retry", "accepted"]
    arrived = [one.arrived_monotonic for one in mitto.ledger.requests]
    gaps = [after - before for before, after in pairwise(arrived)]
    assert all(gap >= 0.02 * 2**i for i, gap in enumerate(gaps))
    assert (await check_the_account(shop, campaign_id)).totals.pending == 5
    nobody_twice(mitto)


async def test_a_server_error_that_lasts_fails_after_the_first_try_and_five_more(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    mitto.switches = Switches(dlr=False, fail_500=1)
    campaign_id = await shop.sending(5)
    async with sending(pool, shop.replica_id, mitto.url, backoff_seconds=0.005) as at_work:
        await at_work.until_done()
        assert await campaigns.finish(pool) == [campaign_id]
    assert len(mitto.ledger.requests) == 6
    progress = await check_the_account(shop, campaign_id)
    assert (progress.campaign.status, progress.totals.refused) == ("failed", 5)
    assert await credits.balance(pool, shop.id) == (10_000, 0)


async def test_one_bad_number_is_found_and_all_others_are_sent_once(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    campaign_id = await shop.sending(100, batch_size=100)
    bad = await pool.fetchval("select id from message order by id offset 57 limit 1")
    await pool.execute("update message set text = '' where id = $1", bad)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until_done()
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.refused) == (99, 1)
    assert await pool.fetchval("select id from message where state = 40") == bad
    assert mitto.ledger.accepted_count == 99
    nobody_twice(mitto)


@pytest.mark.parametrize(
    ("switches", "pending", "refused", "unknown"),
    [
        ({"refuse_items": 1.0}, 0, 10, 0),
        ({"id_and_error": 1.0}, 10, 0, 0),
        ({"items_without_id": 1.0}, 0, 0, 10),
        ({"repeated_id_answer": 1.0}, 8, 0, 2),
    ],
)
async def test_what_an_answer_says_of_an_item_is_what_becomes_of_it(
    pool: database.Pool, shop: Shop, mitto: Simulator,
    switches: dict[str, float], pending: int, refused: int, unknown: int,
) -> None:  # fmt: skip
    mitto.switches = Switches(dlr=False, **switches)
    campaign_id = await shop.sending(10, batch_size=10)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until_done()
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.refused, sums.unknown) == (pending, refused, unknown)


@pytest.mark.parametrize(
    "fault",
    ["accept_then_reset", "accept_then_hang", "accept_then_500", "accept_then_502", "ids_in_4xx",
     "broken_answer", "half_answer", "short_answer", "long_answer", "reset_after_reading",
     "hang_before_accept", "fail_502", "fail_500_html"],
)  # fmt: skip
async def test_what_may_have_been_accepted_is_never_posted_again_and_keeps_its_hold(
    pool: database.Pool, shop: Shop, mitto: Simulator, fault: str
) -> None:
    """A 500 with Mitto's own body after acceptance is what serverErrorMeans decides; here it says unknown."""
    await pool.execute("update traffic_account set server_error_means = 'unknown'")
    mitto.switches = Switches(dlr=False, **{fault: 1.0})
    campaign_id = await shop.begin(10)
    await shop.expand(10, segments=2)
    async with sending(pool, shop.replica_id, mitto.url, mitto_timeout=0.4) as at_work:
        await at_work.until_done()
        await queue.wake_lane(pool, await pool.fetchval("select lane_id from expansion"), 0)
        assert await campaigns.finish(pool) == [campaign_id]
    assert len(mitto.ledger.requests) == 2
    sums = (await check_the_account(shop, campaign_id)).totals
    assert sums.unknown == 10
    assert await credits.balance(pool, shop.id) == (10_000, 20)
    assert await outcomes(pool) == ["unknown", "unknown"]


async def test_what_never_left_costs_no_attempt_and_goes_out_when_the_provider_is_back(
    pool: database.Pool, shop: Shop
) -> None:
    async with Simulator(Switches(dlr=False)) as mitto:
        url = mitto.url
    campaign_id = await shop.sending(40)
    with capture_logs() as logs:
        async with sending(pool, shop.replica_id, url) as at_work:
            await at_work.until(lambda: _logged(logs, "breaker.opened"))
            left = len([line for line in logs if line["event"] == "batch.settled"])
            await mitto.start()
            await at_work.until_done()
    await mitto.stop()
    assert left <= 3 + 5, "three in a row, and what was on its way by then"
    assert set(await outcomes(pool)) == {"never_left", "accepted"}
    assert await pool.fetchval("select max(tries) from batch") == 0
    assert (await check_the_account(shop, campaign_id)).totals.pending == 40
    nobody_twice(mitto)


async def _logged(logs: Sequence[Mapping[str, Any]], event: str) -> bool:
    return any(line["event"] == event for line in logs)


async def test_a_breaker_that_is_open_lets_one_probe_through_at_a_time(
    pool: database.Pool, shop: Shop
) -> None:
    async with Simulator() as mitto:
        url = mitto.url
    await shop.sending(200)
    with capture_logs() as logs:
        async with sending(pool, shop.replica_id, url) as at_work:
            await at_work.until(lambda: _times(logs, "breaker.opened", 2))
    tried = [line for line in logs if line.get("outcome") == "never_left"]
    before = [i for i, line in enumerate(logs) if line["event"] == "breaker.opened"]
    assert [line["seconds"] for line in logs if line["event"] == "breaker.opened"][:1] == [1.0]
    assert len(before) >= 2
    assert len(tried) <= 12
    await assert_sound(pool)


async def _times(logs: Sequence[Mapping[str, Any]], event: str, times: int) -> bool:
    return len([line for line in logs if line["event"] == event]) >= times


# -------------------------------------------------------------------------------------- one beside another


@pytest.mark.alone
async def test_an_account_that_hangs_stops_no_other(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    mitto.switches = Switches(dlr=False, hang_before_accept=1, only_accounts=("main",))
    other = await open_shop(pool, await new_account(pool, "second"), shop.replica_id)
    hanging = await shop.sending(25)
    going = await other.sending(500)
    async with sending(pool, shop.replica_id, mitto.url, mitto_timeout=1) as at_work:
        await mitto.accepted_reached(500)
        assert (await shop.progress(hanging)).totals.unknown == 0
        await at_work.until_done()
    assert (await check_accounts(pool, other, going)) == 500
    assert (await shop.progress(hanging)).totals.unknown == 25


async def check_accounts(pool: database.Pool, shop: Shop, campaign_id: int) -> int:
    await assert_sound(pool)
    return (await shop.progress(campaign_id)).totals.pending


@pytest.mark.parametrize("most", [1, 3])
async def test_no_more_requests_are_in_flight_than_the_account_may_have(
    pool: database.Pool, shop: Shop, mitto: Simulator, most: int
) -> None:
    mitto.switches = Switches(dlr=False, latency_seconds=0.2)
    await pool.execute("update traffic_account set max_in_flight = $1", most)
    await shop.sending(30)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until_done()
    assert min(most, 2) <= mitto.ledger.max_in_flight("main") <= most


async def test_two_places_are_kept_for_single_messages(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator
) -> None:
    """At one a second a campaign has two: what leaves in the second that an answer may take, and one more."""
    await pool.execute("update traffic_account set requests_per_second = 1")
    mitto.switches = Switches(dlr=False, hang_before_accept=1, faults_left=2)
    await shop.sending(25)
    async with sending(
        pool, shop.replica_id, mitto.url, worker_concurrency=2, mitto_timeout=4
    ) as at_work:
        await mitto.requests_reached(2)
        async with pool.acquire() as connection, connection.transaction():
            await queue.add_message(connection, shop.id, account, 306911111111, "Code", "Shop", 1)
        await mitto.requests_reached(3)
        single = next(iter(mitto.ledger.messages()))
        assert (single.destination, single.text) == (306911111111, "Code")
        assert mitto.ledger.in_flight == 2
        await at_work.until_done()


@pytest.mark.alone
async def test_the_limit_holds_at_the_provider(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    await pool.execute("update traffic_account set requests_per_second = 30")
    await shop.sending(300)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until_done()
    assert mitto.ledger.worst_second("main") <= 30
    requests = mitto.ledger.requests
    assert len(requests) == 60
    assert requests[-1].arrived_monotonic - requests[0].arrived_monotonic < 3


# ----------------------------------------------------------------------------------------- too late


async def test_what_is_late_for_its_slot_is_withdrawn_and_sent_later_once(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    campaign_id = await shop.sending(60)
    hogging = True

    async def hog() -> None:
        """Takes the event loop for longer than a slot lasts, again and again."""
        while hogging:
            time.sleep(0.03)  # noqa: ASYNC251
            await asyncio.sleep(0)

    with capture_logs() as logs:
        async with sending(pool, shop.replica_id, mitto.url) as at_work:
            hogs = asyncio.create_task(hog())
            await at_work.until(lambda: _times(logs, "batch.withdrawn", 4))
            hogging = False
            await hogs
            await at_work.until_done()
    withdrawn = [line for line in logs if line["event"] == "batch.withdrawn"]
    assert any("past its slot" in str(line["reason"]) for line in withdrawn)
    assert await pool.fetchval("select max(tries) from batch") == 0
    assert (await check_the_account(shop, campaign_id)).totals.pending == 60
    nobody_twice(mitto)


async def test_nothing_leaves_without_a_heartbeat_that_holds(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    campaign_id = await shop.sending(15)
    with capture_logs() as logs:
        async with sending(pool, shop.replica_id, mitto.url) as at_work:
            at_work.standing.beat_at -= 27.1

            async def withheld() -> bool:
                return any("heartbeat" in str(line.get("reason")) for line in logs)

            await at_work.until(withheld)
            assert mitto.ledger.requests == []
            at_work.standing.beat_at += 27.1
            await at_work.until_done()
    assert (await check_the_account(shop, campaign_id)).totals.pending == 15


async def test_nobody_waits_for_a_slot_that_a_clock_put_an_hour_ahead(
    pool: database.Pool, mitto: Simulator
) -> None:
    """The clock of Postgres went back between a claim and its POST, and another claim has read it."""
    client = Client(mitto.url, 5)
    sender = Sender(pool, client, queue.Standing("test", 30), config.load({}), lambda: None)
    sender._clock.observe(clock(), clock(), 1_000_000_000)
    grant = queue.Grant(1, 1, 1, 1, 1, 4_600_000_000)
    intent = queue.Intent("post", 1, "Shop", [1], [306900000001], ["Hi"])
    place = Place(pool, sender._clock, 1, grant)
    async with client, asyncio.timeout(5):
        with pytest.raises(Withdrawn, match="stepped back"):
            await sender._post(one_account(), Account(1, "main", "key", "refused"), place, intent)
    assert mitto.ledger.requests == []


# -------------------------------------------------------------------------------------- stop and go on


@pytest.mark.alone
async def test_a_stop_gives_back_what_has_not_left_and_waits_for_what_has(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    """Slots are 50 ms apart, so that there is always a batch that waits for its own."""
    await pool.execute("update traffic_account set requests_per_second = 20")
    mitto.switches = Switches(dlr=False, latency_seconds=0.4)
    campaign_id = await shop.sending(200)
    with capture_logs() as logs:
        async with sending(pool, shop.replica_id, mitto.url) as at_work:
            await mitto.requests_reached(6)
            assert mitto.ledger.in_flight > 0
            await at_work.sender.stop()
            assert mitto.ledger.in_flight == 0
            posted = mitto.ledger.accepted_count
            sums = (await check_the_account(shop, campaign_id)).totals
            assert (sums.pending, sums.queued, sums.processing) == (posted, 200 - posted, 0)
            assert sums.unknown == 0
    assert any(line.get("reason") == "stopping" for line in logs)
    assert mitto.ledger.accepted_count == posted


async def test_another_replica_goes_on_where_one_was_killed_and_nothing_is_sent_twice(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    """Killed: its tasks end in the middle of whatever they do, and nothing is written any more."""
    mitto.switches = Switches(dlr=False, latency_seconds=0.05)
    campaign_id = await shop.sending(300)
    before = asyncio.all_tasks()
    with suppress(asyncio.CancelledError):
        async with sending(pool, shop.replica_id, mitto.url):
            await mitto.accepted_reached(50)
            ours = asyncio.all_tasks() - before
            for task in ours:
                if task.get_name().startswith(("batch", "account")):
                    task.cancel()
    await queue.leave(pool, shop.replica_id, "killed")
    _, unknown = await queue.reap(pool)
    shop.replica_id = await queue.register(pool, "second", "0")
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until_done()
    sums = (await check_the_account(shop, campaign_id)).totals
    assert sums.unknown == unknown * 5
    assert sums.unknown > 0
    assert sums.pending + sums.unknown == 300
    nobody_twice(mitto)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_answers_of_postgres_are_lost_every_message_is_sent_once_and_accounted_for(
    pool: database.Pool, shop: Shop, mitto: Simulator, dsn: str, tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    mitto.switches = Switches(dlr=False, fail_500=0.1, fail_429=0.03, retry_after=0.1, seed=seed)
    campaign_id = await shop.sending(500)
    async with Relay(dsn, tmp_path, seed) as relay:
        lossy = await database.open_pool(relay.dsn, 8)
        try:
            async with sending(
                lossy,
                shop.replica_id,
                mitto.url,
                keep_house=True,
                backoff_seconds=0.05,
                max_attempts=20,
            ) as at_work:
                relay.losing = dice.choice([0.05, 0.08, 0.1])
                await mitto.accepted_reached(300)
                relay.losing = 0.0
                await at_work.until(lambda: pool.fetchval("select min(state) >= 10 from batch"), 40)
        finally:
            lossy.terminate()
    assert relay.lost > 3
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.unknown, sums.refused) == (500, 0, 0)
    assert mitto.ledger.accepted_count == 500
    nobody_twice(mitto)


# --------------------------------------------------------------------------------- an account's places


def one_account(**settings: int) -> Pace:
    row = queue.AccountRow(1, "main", "key", "refused", 1_000, None, None)
    return Pace(row, config.load({f"SMSD_{k.upper()}": str(v) for k, v in settings.items()}))


async def test_a_batch_that_is_back_before_its_last_way_has_ended_keeps_its_own_place() -> None:
    account = one_account()
    first = queue.Grant(1, 1, 1, 1, 5, 0)
    second = first._replace(epoch=2)
    account.start(first, asyncio.sleep(0))
    account.answered(first, Result(Outcome.RETRY))
    account.start(second, asyncio.sleep(0))
    account.release(first)
    account.answered(second, Result(Outcome.ACCEPTED))
    account.release(second)
    room, _ = account.room()
    assert room > 0
    await asyncio.gather(*account.sending)


async def test_who_was_throttled_claims_nothing_until_then() -> None:
    account = one_account()
    grant = queue.Grant(1, 1, 1, 1, 5, 0)
    account.start(grant, asyncio.sleep(0))
    account.answered(grant, Result(Outcome.THROTTLED, retry_after_seconds=0.5))
    account.release(grant)
    assert account.room() == (0, False)
    assert 0.4 < account.closed_seconds() <= 0.5
    await asyncio.gather(*account.sending)


def test_a_percentile_is_the_value_below_which_that_share_lies() -> None:
    recent = Recent(1.0, size=4)
    assert recent.percentile(0.99) == 1.0
    for value in (5.0, 4.0, 3.0, 2.0):
        recent.add(value)
    assert [recent.percentile(share) for share in (0, 0.5, 0.75, 1)] == [2.0, 4.0, 5.0, 5.0]
