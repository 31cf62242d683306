"""The sender's pace, its neighbours and its losses: limits as Mitto sees them, accounts and tenants beside each other,
slots that are missed, and a Postgres that goes away in the middle."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from shop import Shop, check_the_account
from structlog.testing import capture_logs
from support import Relay, assert_sound, largest_window, new_account, open_shop, sending

from smsd import config, credits, database, queue
from smsd.mitto import Client, Result
from smsd.mitto import clock as mitto_clock
from smsd.model import Outcome
from smsd.pace import REPLICA_IN_FLIGHT, Pace
from smsd.sender import Sender
from smsd.simulator import Simulator, Switches

SECOND_US = 1_000_000


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
    """A provider; whatever the test did to it, nobody got a message twice."""
    async with Simulator(Switches(dlr=False)) as simulator:
        yield simulator
        assert simulator.ledger.duplicates("destination") == []


async def change_account(pool: database.Pool, account_id: int, **fields: int | str) -> None:
    for name, value in fields.items():
        await pool.execute(
            f"update traffic_account set {name} = $2 where id = $1", account_id, value
        )


async def outcomes(pool: database.Pool) -> list[str]:
    """What the posts came to, sorted; what was withdrawn never became one (a busy machine withdraws now and then)."""
    rows = await pool.fetch(
        "select outcome from attempt where outcome is distinct from 'withdrawn' order by 1"
    )
    return [row["outcome"] for row in rows]


async def one_message(pool: database.Pool, shop: Shop, phone: int) -> None:
    """Queues a single message, as the API does."""
    async with pool.acquire() as connection, connection.transaction():
        assert await queue.add_message(
            connection, shop.id, shop.account_id, phone, "Code", "Shop", 1
        )


class Sent(NamedTuple):
    """One request of a batch, and how long after the batch's slot it arrived (one clock: one machine)."""

    tenant_id: int
    arrived: float
    late_seconds: float


async def sent_requests(pool: database.Pool, mitto: Simulator) -> list[Sent]:
    """Every request of which something was accepted, in the order of arrival."""
    rows = await pool.fetch(
        "select m.phone, b.tenant_id, extract(epoch from a.slot_at)::float8 as slot_at from message m"
        " join batch b on m.id between b.first_id and b.last_id and m.campaign_id = b.campaign_id"
        " join attempt a on a.batch_id = b.id and a.n = b.attempt"
    )
    batches = {row["phone"]: row for row in rows}
    requests = {}
    for one in mitto.ledger.messages():
        if (batch := batches.get(one.destination)) is not None:
            requests[one.request] = batch
    return [
        Sent(batch["tenant_id"], request.arrived_monotonic, request.arrived_at - batch["slot_at"])
        for number, batch in sorted(requests.items())
        for request in [mitto.ledger.requests[number]]
    ]


def worst_second(arrivals: list[float]) -> int:
    return largest_window([(int(at * SECOND_US), 1) for at in arrivals], SECOND_US)


async def reached(mitto: Simulator, rate: float, requests: int) -> None:
    """Returns once so many requests arrived, and so many of them within a second: on a machine that is busy with
    something else not every second is full."""
    async with asyncio.timeout(20):
        await mitto.requests_reached(requests)
        await mitto.until(lambda: mitto.ledger.worst_second("main") >= rate)


# --------------------------------------------------------------------------------------------- limits


async def test_a_claim_is_made_when_the_next_slot_can_be_had_and_not_before(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each one locks the limit, and a single message waits behind it."""
    claims: list[int] = []
    claim = queue.claim

    async def counted(*arguments: Any, **options: Any) -> queue.Claim:
        claimed = await claim(*arguments, **options)
        claims.append(len(claimed.grants))
        return claimed

    monkeypatch.setattr(queue, "claim", counted)
    await change_account(pool, account, requests_per_second=20)
    await shop.sending(100, batch_size=1)
    async with sending(pool, shop.replica_id, mitto.url):
        await mitto.requests_reached(40)
    from_first = claims[next(place for place, grants in enumerate(claims) if grants) :]
    assert len(from_first) < 1.5 * sum(from_first)


@pytest.mark.alone
async def test_who_was_told_that_there_is_no_work_asks_again_at_news_or_a_second_later(
    pool: database.Pool, shop: Shop, mitto: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not at each answer that frees a place: neither while only a single message could be had, nor when nothing is
    left. A single message is news."""
    asked = 0
    claim = queue.claim

    async def counted(*arguments: Any, **options: Any) -> queue.Claim:
        nonlocal asked
        claimed = await claim(*arguments, **options)
        asked += claimed.waits_for == "work"
        return claimed

    monkeypatch.setattr(queue, "claim", counted)
    mitto.switches = Switches(dlr=False, latency_seconds=0.05)
    await shop.sending(100, batch_size=1)
    async with sending(
        pool, shop.replica_id, mitto.url, worker_concurrency=2, mitto_timeout=4
    ) as at_work:
        began_at = time.monotonic()
        await at_work.until_done()
        assert asked <= 2 + time.monotonic() - began_at
        mitto.switches = Switches(dlr=False, hang_before_accept=1, faults_left=400)
        await shop.sending(400, batch_size=1)
        await mitto.until(lambda: mitto.ledger.in_flight == REPLICA_IN_FLIGHT // 2)
        mitto.switches.faults_left = 0
        began_at = time.monotonic()
        await one_message(pool, shop, 306911111111)
        await mitto.until(
            lambda: any(one.destination == 306911111111 for one in mitto.ledger.messages())
        )
        assert time.monotonic() - began_at < 0.5


@pytest.mark.alone
@pytest.mark.parametrize("limit", [20, 100])
async def test_two_replicas_together_keep_to_the_limit_and_use_it(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator, dsn: str, limit: int
) -> None:
    await change_account(pool, account, requests_per_second=limit)
    await shop.sending(10 * limit, batch_size=1)
    async with AsyncExitStack() as stack:
        for name in ("first", "second"):
            own = await database.open_pool(dsn, 8)
            stack.push_async_callback(own.close)
            replica_id = await queue.register(own, name, "0")
            await stack.enter_async_context(sending(own, replica_id, mitto.url))
        await reached(mitto, 0.9 * limit, 3 * limit)
    assert 0.9 * limit <= mitto.ledger.worst_second("main") <= limit
    late = [one.late_seconds for one in await sent_requests(pool, mitto)]
    assert min(late) > -0.001
    assert max(late) < queue.GUARD_US / SECOND_US
    replicas = await pool.fetchval("select count(distinct replica_id) from attempt")
    assert replicas == 2, "otherwise it was not shown that they share the limit"


async def test_a_batch_that_somebody_leased_and_never_sent_is_sent_soon_after_its_slot(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator
) -> None:
    """Whose replica was killed with its lease: nobody reaps here, and it would be seconds until a reaper may."""
    await shop.sending(1)
    killed = await queue.register(pool, "killed", "0")
    assert len((await queue.claim(pool, account, killed, 1, lead_us=0)).grants) == 1
    async with sending(pool, shop.replica_id, mitto.url), asyncio.timeout(4):
        await mitto.accepted_reached(1)


@pytest.mark.alone
async def test_a_tenant_s_lower_limit_holds_and_the_account_s_other_tenant_takes_the_rest(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator
) -> None:
    await change_account(pool, account, requests_per_second=100)
    slow = await open_shop(pool, account, shop.replica_id, requests_per_second=10)
    await slow.sending(200, batch_size=1)
    await shop.sending(1_500, batch_size=1)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await reached(mitto, 90, 300)
        await at_work.sender.stop()
        sent = await sent_requests(pool, mitto)
    arrivals = {
        tenant_id: [one.arrived for one in sent if one.tenant_id == tenant_id]
        for tenant_id in (slow.id, shop.id)
    }
    assert 9 <= worst_second(arrivals[slow.id]) <= 10
    assert mitto.ledger.worst_second("main") <= 100
    assert worst_second(arrivals[shop.id]) >= 80


@pytest.mark.alone
async def test_the_requests_in_flight_grow_to_what_a_slow_provider_needs_for_the_limit(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator
) -> None:
    mitto.switches = Switches(dlr=False, latency_seconds=0.3)
    await change_account(pool, account, requests_per_second=100)
    await shop.sending(1_500, batch_size=1)
    async with sending(pool, shop.replica_id, mitto.url, worker_concurrency=5):
        await reached(mitto, 90, 200)
    assert mitto.ledger.worst_second("main") <= 100
    assert 27 <= mitto.ledger.max_in_flight("main") <= 60, "100 a second, 0.3 s each: 30"


async def test_a_process_that_has_just_started_uses_the_limit_before_the_first_answer(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator
) -> None:
    mitto.switches = Switches(dlr=False, latency_seconds=2)
    await change_account(pool, account, requests_per_second=20)
    await shop.sending(30, batch_size=1)
    async with sending(pool, shop.replica_id, mitto.url, worker_concurrency=5):
        await mitto.requests_reached(15)
        assert mitto.ledger.max_in_flight("main") >= 15


def eight_at_once() -> Pace:
    row = queue.AccountRow(1, "main", "key", "refused", 10**9, None, None)
    return Pace(row, config.load({"SMSD_WORKER_CONCURRENCY": "8"}))


def burst(account: Pace) -> list[queue.Grant]:
    grants = [queue.Grant(i, 1, 1, 1, 5, 0) for i in range(8)]
    for grant in grants:
        account.start(grant, asyncio.sleep(0))
    return grants


async def grown_to_32() -> Pace:
    account = eight_at_once()
    for _ in range(3):  # 24 answers: 8 + 24 may be in flight
        for grant in burst(account):
            account.answered(grant, Result(Outcome.ACCEPTED))
            account.release(grant)
        await asyncio.gather(*account.sending)
    return account


async def takes_at_once(account: Pace, most: int) -> None:
    taken = [queue.Grant(100 + i, 1, 1, 1, 5, 0) for i in range(most - 3)]
    for grant in taken:
        account.start(grant, asyncio.sleep(0))
    await asyncio.gather(*account.sending)
    assert account.room() == (3, False)
    for grant in taken:
        account.release(grant)


async def test_no_more_is_claimed_than_has_its_intent_written_in_time() -> None:
    """Intents share a few connections: one of a full batch takes as long as those of many small ones."""
    account = await grown_to_32()
    large = [queue.Grant(200 + i, 1, 1, 1, 500, 0) for i in range(2)]
    for grant in large:
        account.start(grant, asyncio.sleep(0))
    await asyncio.gather(*account.sending)
    assert account.room() == (4, False)
    with account.intending(large[0]):
        assert account.room() == (3, False)
        with account.intending(large[1]):
            _, priority_only = account.room()
            assert priority_only
            account.freed.clear()
        assert account.freed.is_set(), "or nobody would claim again"
    small = queue.Grant(300, 1, 1, 1, 5, 0)
    account.start(small, asyncio.sleep(0))
    await asyncio.gather(*account.sending)
    with account.intending(small):
        assert account.room() == (8, False)


async def test_slots_missed_by_one_burst_halve_what_may_be_in_flight_once_and_never_below_the_least() -> (
    None
):
    account = await grown_to_32()
    for may_be_in_flight in (16, 8, 8):
        for grant in burst(account):
            account.missed_slot(grant)
            account.release(grant)
        await asyncio.gather(*account.sending)
        await takes_at_once(account, may_be_in_flight)


async def test_a_process_so_late_that_its_lease_was_taken_back_has_fewer_on_their_way(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator
) -> None:
    """Or a machine with more work than it can do would claim, lose and claim again, and send nothing."""
    await shop.sending(1)
    (grant,) = (await queue.claim(pool, account, shop.replica_id, 1, lead_us=0)).grants
    async with asyncio.timeout(5):
        while not await queue.take_back_missed(pool, account):
            await asyncio.sleep(0.02)  # until it is late enough
    standing = queue.Standing("test", 30, shop.replica_id, mitto_clock())
    client = Client(mitto.url, 5)
    sender = Sender(pool, client, standing, config.load({}), lambda: None)
    await sender._clock.learn(pool)
    pace = await grown_to_32()
    pace.start(grant, sender._send(pace, grant))
    await asyncio.gather(*pace.sending)
    await takes_at_once(pace, 16)
    assert mitto.ledger.requests == []


@pytest.mark.parametrize("outcome", [Outcome.NEVER_LEFT, Outcome.THROTTLED])
async def test_a_burst_closes_an_account_as_one_and_an_outage_of_days_for_no_more_than_a_minute(
    outcome: Outcome,
) -> None:
    account = eight_at_once()
    now = mitto_clock()
    for grant in burst(account):
        account.answered(grant, Result(outcome))
    await asyncio.gather(*account.sending)
    assert account.room() == (0, False)
    first = 1 if outcome is Outcome.NEVER_LEFT else 0.25
    assert now + first <= account._open_until < now + first + 0.2
    for _ in range(1_100):
        account._open_until = 0.0  # as if that time were over
        grant = queue.Grant(9, 1, 1, 1, 5, 0)
        account.start(grant, asyncio.sleep(0))
        account.answered(grant, Result(outcome))
    await asyncio.gather(*account.sending)
    assert mitto_clock() + 29 < account._open_until <= mitto_clock() + 60


async def test_a_breaker_whose_time_is_over_lets_one_probe_through() -> None:
    account = eight_at_once()
    for grant in burst(account)[:3]:
        account.answered(grant, Result(Outcome.NEVER_LEFT))
    account._open_until = 0.0
    assert account.room() == (0, False), "what was on its way is waited for"
    account._places.clear()
    assert account.room() == (1, False)
    (probe, *_) = burst(account)
    assert account.room() == (0, False)
    account.answered(probe, Result(Outcome.ACCEPTED))
    await asyncio.gather(*account.sending)


# ------------------------------------------------------------------------------------ one beside another


@pytest.mark.alone
async def test_beside_an_account_that_hangs_another_s_single_message_leaves_at_once(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    mitto.switches = Switches(dlr=False, hang_before_accept=1, only_accounts=("main",))
    second = await open_shop(pool, await new_account(pool, "second"), shop.replica_id)
    await shop.sending(1_000)
    seconds = []
    async with sending(pool, shop.replica_id, mitto.url, mitto_timeout=4):
        await one_message(pool, second, 306911111110)  # wakes its limiter, which begins closed
        await mitto.until(lambda: mitto.ledger.accepted_count == 1 and mitto.ledger.in_flight > 0)
        for i in range(1, 6):
            started = time.monotonic()
            await one_message(pool, second, 306911111110 + i)
            await mitto.accepted_reached(1 + i)
            seconds.append(time.monotonic() - started)
        assert mitto.ledger.in_flight > 0, "the other hangs all the while"
    assert sorted(seconds)[2] < 0.25
    assert max(seconds) < 1


async def test_a_throttled_account_is_quiet_on_every_replica_until_its_time(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator, dsn: str
) -> None:
    """What had its intent already when the 429 came may still arrive; nothing else."""
    await change_account(pool, account, requests_per_second=50)
    mitto.switches = Switches(dlr=False, fail_429=1, faults_left=0, retry_after=1)
    campaign_id = await shop.sending(120, batch_size=1)
    async with AsyncExitStack() as stack:
        for name in ("first", "second"):
            own = await database.open_pool(dsn, 8)
            stack.push_async_callback(own.close)
            replica_id = await queue.register(own, name, "0")
            await stack.enter_async_context(sending(own, replica_id, mitto.url))
        await mitto.requests_reached(20)
        mitto.switches.faults_left = 1
        await mitto.accepted_reached(120)
    (refused,) = [one for one in mitto.ledger.requests if one.status == 429]
    assert refused.finished_monotonic is not None
    since = [one.arrived_monotonic - refused.finished_monotonic for one in mitto.ledger.requests]
    quiet = [seconds for seconds in since if 0.15 < seconds < 0.95]
    assert quiet == []
    assert any(seconds >= 1 for seconds in since)
    assert await outcomes(pool) == ["accepted"] * 120 + ["throttled"]
    assert await pool.fetchval("select max(tries) from batch") == 0
    assert (await check_the_account(shop, campaign_id)).totals.pending == 120


# --------------------------------------------------------------------------------- what became of a POST


@pytest.mark.parametrize(
    "fault",
    ["accept_then_reset", "accept_then_hang", "accept_then_502", "hang_before_accept", "fail_502",
     "fail_500_html", "broken_answer", "short_answer", "long_answer"],
)  # fmt: skip
async def test_one_unknown_batch_stays_out_while_the_rest_of_its_campaign_goes_on(
    pool: database.Pool, shop: Shop, mitto: Simulator, fault: str
) -> None:
    """Also where Mitto's own error body means refused."""
    mitto.switches = Switches(dlr=False, **{fault: 1.0}, faults_left=1)
    campaign_id = await shop.begin(20)
    await shop.expand(20, segments=3)
    async with sending(pool, shop.replica_id, mitto.url, mitto_timeout=2) as at_work:
        await at_work.until_done()
        await shop.sending(5)  # what would have been posted once more stands before this one
        await at_work.until_done()
    assert len(mitto.ledger.requests) == 5
    assert await outcomes(pool) == ["accepted"] * 4 + ["unknown"]
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.unknown) == (15, 5)
    assert await credits.balance(pool, shop.id) == (10_000 - 50, 15)


async def test_a_server_error_with_mitto_s_own_body_is_unknown_where_the_account_says_so(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator
) -> None:
    await change_account(pool, account, server_error_means="unknown")
    mitto.switches = Switches(dlr=False, fail_500=1, faults_left=1)
    campaign_id = await shop.sending(10)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until_done()
    assert len(mitto.ledger.requests) == 2
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.unknown) == (5, 5)


async def test_connections_that_the_provider_closed_while_they_rested_lose_nothing(
    pool: database.Pool, shop: Shop, mitto: Simulator
) -> None:
    campaigns = []
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        for _ in range(3):
            campaigns.append(await shop.sending(20))
            await at_work.until_done()
            await mitto.stop()
            await mitto.start()
    for campaign_id in campaigns:
        assert (await check_the_account(shop, campaign_id)).totals.pending == 20
    assert set(await outcomes(pool)) <= {"accepted", "never_left"}
    assert mitto.ledger.accepted_count == 60


# --------------------------------------------------------------------------------------- missed slots


async def test_a_loop_blocked_between_intent_and_slot_sends_in_another_slot(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator, connection: database.Connection
) -> None:
    """Blocked by our own hearing of the intent: that is when it has just become durable."""
    await connection.execute(
        "create function tell() returns trigger language plpgsql as"
        " $$ begin notify intent_written; return null; end $$;"
        "create trigger tell after insert on attempt execute function tell()"
    )
    times = 0

    def block(*_: object) -> None:
        nonlocal times
        times += 1
        if times <= 3:
            time.sleep(0.3)

    await connection.add_listener("intent_written", block)
    await change_account(pool, account, requests_per_second=20)
    campaign_id = await shop.sending(20)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await at_work.until_done()
    await connection.remove_listener("intent_written", block)
    assert at_work.sender.counts["retaken"] > 0
    late = [one.late_seconds for one in await sent_requests(pool, mitto)]
    assert -0.001 < min(late) <= max(late) < queue.GUARD_US / SECOND_US
    assert await outcomes(pool) == ["accepted"] * 4
    granted = "select cum[array_length(cum, 1)] - base from rate where scope = 1"
    assert await pool.fetchval(granted) <= 4, "what was missed does not count against the limit"
    assert await pool.fetchval("select max(tries) from batch") == 0
    assert len(mitto.ledger.requests) == 4
    assert (await check_the_account(shop, campaign_id)).totals.pending == 20


async def test_a_heartbeat_that_is_not_acknowledged_any_more_stops_what_has_its_intent(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator
) -> None:
    await change_account(pool, account, requests_per_second=20)
    await shop.sending(20, batch_size=1)
    with capture_logs() as logs:
        async with sending(pool, shop.replica_id, mitto.url) as at_work:
            await mitto.requests_reached(3)
            at_work.standing.beat_at -= 0.9 * at_work.standing.lease_seconds
            before = len(mitto.ledger.requests)
            await at_work.until(lambda: withdrawn_for(logs, "heartbeat", 2))
            assert len(mitto.ledger.requests) == before
            at_work.standing.beat_at += 0.9 * at_work.standing.lease_seconds
            await at_work.until_done()
    assert len(mitto.ledger.requests) == 20
    assert await outcomes(pool) == ["accepted"] * 20


async def withdrawn_for(logs: list[Any], why: str, times: int) -> bool:
    found = [one for one in logs if one["event"] == "batch.withdrawn" and why in one["reason"]]
    return len(found) >= times


# ---------------------------------------------------------------------------------- stop, and Postgres away


async def test_a_stop_leaves_no_lease_no_open_attempt_and_no_counted_try(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator
) -> None:
    mitto.switches = Switches(dlr=False, latency_seconds=0.5)
    await change_account(pool, account, requests_per_second=20)
    campaign_id = await shop.sending(100, batch_size=1)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await mitto.requests_reached(6)
        started = time.monotonic()
        await at_work.sender.stop()
        took = time.monotonic() - started
    posted = len(mitto.ledger.requests)
    assert took < 1.5, "an answer takes 0.5 s"
    assert mitto.ledger.accepted_count == posted < 12
    states = await pool.fetch("select state, count(*) as n from batch group by 1 order by 1")
    assert [tuple(row) for row in states] == [(0, 100 - posted), (13, posted)]
    assert not await pool.fetchval(
        "select count(*) from batch where owner is not null or tries > 0"
    )
    assert await outcomes(pool) == ["accepted"] * posted
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await mitto.requests_reached(posted + 10)
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 0
    assert mitto.ledger.worst_second("main") <= 20, "a stop and a start are no excuse"


async def test_what_only_waits_for_its_slot_is_given_back_by_a_stop(
    pool: database.Pool, account: int, shop: Shop, mitto: Simulator, connection: database.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(queue, "HORIZON_US", 400_000)
    await connection.execute(
        "create function tell() returns trigger language plpgsql as"
        " $$ begin notify leased; return null; end $$;"
        "create trigger tell after update on batch for each row when (new.state = 2)"
        " execute function tell()"
    )
    leased = asyncio.Event()
    await connection.add_listener("leased", lambda *_: leased.set())
    await change_account(pool, account, requests_per_second=2)
    campaign_id = await shop.sending(50)
    with capture_logs() as logs:
        async with sending(pool, shop.replica_id, mitto.url) as at_work:
            await mitto.requests_reached(2)
            leased.clear()
            await leased.wait()  # its slot is most of 0.4 s ahead
            before = len(mitto.ledger.requests)
            await at_work.sender.stop()
            assert len(mitto.ledger.requests) == before
    assert await withdrawn_for(logs, "stopping", 1)
    assert not await pool.fetchval(
        "select count(*) from batch where owner is not null or tries > 0"
    )
    assert (await check_the_account(shop, campaign_id)).totals.processing == 0


async def test_answers_are_written_after_every_connection_to_postgres_was_cut(
    pool: database.Pool, shop: Shop, mitto: Simulator, connection: database.Connection
) -> None:
    mitto.switches = Switches(dlr=False, latency_seconds=0.3)
    campaign_id = await shop.sending(60)
    async with sending(pool, shop.replica_id, mitto.url) as at_work:
        await mitto.requests_reached(4)
        cut = await connection.fetchval(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        assert cut > 1
        await at_work.until(lambda: none_open(connection))
    assert await outcomes(pool) == ["accepted"] * 12
    assert (await check_the_account(shop, campaign_id)).totals.pending == 60
    assert len(mitto.ledger.requests) == 12


async def none_open(db: database.Executor) -> bool:
    return int(await db.fetchval("select count(*) from batch where state < 10")) == 0


class Deaf(Relay):
    """A relay that loses exactly one answer: the next that says "post", the verdict of an intent."""

    deaf = False

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, lossy: bool
    ) -> None:
        while data := await reader.read(65536):
            if lossy and self.deaf and b"\x00\x00\x00\x04post" in data:
                self.deaf = False
                self.lost += 1
                return
            writer.write(data)


async def test_an_intent_that_was_written_but_not_acknowledged_is_withdrawn_and_sent_later_once(
    pool: database.Pool, shop: Shop, mitto: Simulator, dsn: str, tmp_path: Path
) -> None:
    campaign_id = await shop.sending(5)
    with capture_logs() as logs:
        relay = Deaf(dsn, tmp_path, 0)
        relay.deaf = True
        async with relay:
            own = await database.open_pool(relay.dsn, 8)
            try:
                async with sending(own, shop.replica_id, mitto.url) as at_work:
                    await at_work.until(lambda: none_open(pool))
            finally:
                own.terminate()
    assert relay.lost == 1
    assert await withdrawn_for(logs, "intent not acknowledged", 1)
    assert await outcomes(pool) == ["accepted"]
    assert await pool.fetchval("select count(*) from attempt where outcome = 'withdrawn'") >= 1
    assert len(mitto.ledger.requests) == 1
    assert (await check_the_account(shop, campaign_id)).totals.pending == 5
