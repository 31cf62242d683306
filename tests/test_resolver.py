"""Evidence by GET against a provider that accepts and does not say so; what it must come to is what the provider has."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from shop import Shop, check_the_account
from structlog.testing import capture_logs
from support import assert_sound, eventually, new_account, open_shop

from smsd import campaigns, config, database, evidence, mitto, queue, tenants
from smsd.housekeeping import Housekeeping
from smsd.model import MessageState
from smsd.queue import ReceiptRow
from smsd.receipts import Inbox
from smsd.resolver import ASKS_MOST, AT_ONCE, Resolver
from smsd.sender import Sender
from smsd.simulator import Simulator, Switches

DELIVERED = int(MessageState.DELIVERED)


@pytest.fixture
async def account(pool: database.Pool) -> int:
    return await new_account(pool)


@pytest.fixture
async def shop(pool: database.Pool, account: int) -> AsyncIterator[Shop]:
    """A shop; whatever the test did with it, the audit finds nothing afterwards."""
    yield await open_shop(pool, account, await queue.register(pool, "test", "0"))
    await assert_sound(pool)


@pytest.fixture
async def provider() -> AsyncIterator[Simulator]:
    async with Simulator(Switches(dlr=False)) as simulator:
        yield simulator


@dataclass
class Work:
    """A sender and a resolver over one database; the resolver's rounds are run by the test."""

    pool: database.Pool
    sender: Sender
    resolver: Resolver
    settled: asyncio.Event

    async def until_done(self) -> None:
        """Returns once nothing is ready, waiting or on its way."""
        await eventually(
            self.settled, lambda: self.pool.fetchval("select min(state) >= 10 from batch")
        )

    async def resolve(self) -> None:
        """Rounds until nothing more is asked."""
        async with asyncio.timeout(20):
            while await self.resolver.round():
                pass


@contextlib.asynccontextmanager
async def working(
    pool: database.Pool, replica_id: int, url: str, patience_seconds: float = 0.0, **settings: Any
) -> AsyncIterator[Work]:
    """Retries after 20 ms."""
    given = {"mitto_timeout": 5, "backoff_seconds": 0.02} | settings
    loaded = config.load({f"SMSD_{name.upper()}": str(value) for name, value in given.items()})
    settled = asyncio.Event()
    standing = queue.Standing("test", 30, replica_id, mitto.clock())
    async with mitto.Client(url, loaded.mitto_timeout) as client:
        resolver = Resolver(pool, client, loaded, patience_seconds=patience_seconds)
        sender = Sender(pool, client, standing, loaded, settled.set, resolver.order_holds)
        news = {"smsd_lane": lambda account: sender.wake(int(account))}
        tasks = [
            asyncio.create_task(sender.run()),
            asyncio.create_task(database.listen(pool, news, lambda: sender.wake(None))),
        ]
        try:
            yield Work(pool, sender, resolver, settled)
        finally:
            async with asyncio.timeout(20):
                await sender.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def receive(
    pool: database.Pool, ids: Sequence[str], account_id: int | None = None, state: int = DELIVERED
) -> None:
    await queue.apply_receipts(
        pool, [ReceiptRow(account_id, one, state, None, None) for one in ids]
    )


def ids_of(provider: Simulator) -> list[str]:
    return [message.message_id for message in provider.ledger.messages()]


async def verdicts(pool: database.Pool) -> list[tuple[str | None, int]]:
    """What was found out about receipts that wait, and of how many messages each may speak."""
    rows = await pool.fetch("select verdict, cardinality(candidates) as n from early_receipt")
    return sorted((row["verdict"], row["n"]) for row in rows)


async def agree(pool: database.Pool, provider: Simulator) -> None:
    """Every message that the provider accepted is delivered here, under its own id."""
    theirs = {(one.destination, one.message_id) for one in provider.ledger.messages()}
    ours = await pool.fetch("select phone, provider_id from message_shown where own_state = 30")
    assert {(row["phone"], row["provider_id"]) for row in ours} == theirs
    assert provider.ledger.duplicates("destination") == []


async def single(shop: Shop, phone: int, text: str = "Code 1", on_unknown: str = "hold") -> int:
    async with shop.pool.acquire() as connection, connection.transaction():
        message_id = await queue.add_message(
            connection, shop.id, shop.account_id, phone, text, "Shop", 1, on_unknown=on_unknown
        )
        assert message_id is not None
    return message_id


# -------------------------------------------------------------------------------------- by receipt and GET


async def test_what_was_accepted_without_an_answer_is_found_by_its_receipts(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_reset = 1.0
    campaign_id = await shop.sending(20, batch_size=10)
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
        assert (await check_the_account(shop, campaign_id)).totals.unknown == 20
        await receive(pool, ids_of(provider)[:15])
        await work.resolve()
    totals = (await check_the_account(shop, campaign_id)).totals
    assert (totals.delivered, totals.unknown) == (15, 5)
    assert await pool.fetchval("select count(*) from early_receipt") == 0
    assert await pool.fetchval("select count(*) from message where state = 5") == 5


async def test_a_single_message_is_found_too(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_hang = 1.0
    await single(shop, shop.phones)
    async with working(pool, shop.replica_id, provider.url, mitto_timeout=0.3) as work:
        await work.until_done()
        await receive(pool, ids_of(provider))
        await work.resolve()
    await agree(pool, provider)


async def test_a_receipt_of_our_own_result_is_not_asked_about(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    await shop.sending(5)
    async with working(pool, shop.replica_id, provider.url, patience_seconds=30) as work:
        await receive(pool, ["never-heard-of"])
        await work.until_done()
        await pool.execute("update batch set unsure = 1")
        assert await work.resolver.round() == 0
    assert provider.ledger.requests_by_account() == {"main": 1 + 2}, "the order was looked at"
    await pool.execute("update batch set unsure = 0")


async def test_nothing_is_asked_while_nothing_is_unknown(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    await shop.sending(1)
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
        await receive(pool, ["never-heard-of"])
        await work.resolve()
    assert [one.kind for one in provider.ledger.requests] == ["send"]


async def test_mittos_clock_an_hour_ahead_is_no_obstacle(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_502 = 1.0
    provider.switches.clock_skew_seconds = 3600.0
    await shop.sending(5)
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
        await receive(pool, ids_of(provider))
        await work.resolve()
    await agree(pool, provider)


async def test_two_messages_that_an_id_may_belong_to_are_both_listed_and_neither_is_taken(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_reset = 1.0
    first, second = [await single(shop, shop.phones) for _ in range(2)]
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
        await receive(pool, ids_of(provider)[:1])
        with capture_logs() as logs:
            await work.resolve()
    assert await verdicts(pool) == [("several", 2)]
    assert await pool.fetchval("select candidates from early_receipt") == [first, second]
    assert await pool.fetchval("select count(*) from message where state is null") == 2
    assert [one["event"] for one in logs].count("message.undecided") == 1
    assert [one.kind for one in provider.ledger.requests].count("get") == 1, "not asked again"


async def test_a_reference_tells_two_messages_apart(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_reset = 1.0
    provider.switches.keep_reference = True
    await tenants.learn(pool, shop.account_id, {"referenceKept": True})
    first, second = [await single(shop, shop.phones) for _ in range(2)]
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
        await receive(pool, ids_of(provider))
        await work.resolve()
    sent = {one.message_id: one.reference for one in provider.ledger.messages()}
    ours = await pool.fetch("select id, provider_id from message_shown where own_state = 30")
    assert {row["provider_id"]: f"smsd-{row['id']}-1" for row in ours} == sent
    assert {row["id"] for row in ours} == {first, second}


async def test_no_reference_is_sent_to_an_account_that_is_not_known_to_keep_it(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.keep_reference = True
    await shop.sending(3)
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
    assert {one.reference for one in provider.ledger.messages()} == {None}


async def test_an_id_of_another_account_is_evidence_for_nothing(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    other = await open_shop(pool, await new_account(pool, "other"), shop.replica_id)
    other.phones = shop.phones
    provider.switches.accept_then_reset = 1.0
    await single(shop, shop.phones)
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
        await pool.execute("update batch set account_id = $1", other.account_id)
        await receive(pool, ids_of(provider), other.account_id)
        await work.resolve()
        await pool.execute("update batch set account_id = $1", shop.account_id)
    assert await verdicts(pool) == [("wrong_account", 0)]
    assert await pool.fetchval("select state from batch") == 11


async def test_a_receipt_that_names_no_account_finds_its_message_by_asking_one_after_the_other(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    other = await open_shop(pool, await new_account(pool, "other"), shop.replica_id)
    other.phones = shop.phones
    provider.switches.accept_then_reset = 1.0
    campaign_ids = [await shop.sending(3), await other.sending(3)]
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
        await receive(pool, ids_of(provider))
        await work.resolve()
    for one, campaign_id in zip((shop, other), campaign_ids, strict=True):
        assert (await one.progress(campaign_id)).totals.delivered == 3
    wrong = (
        "select count(*) from message m join provider_message p on p.provider_id = m.provider_id"
        " join campaign c on c.id = m.campaign_id join tenant t on t.id = c.tenant_id where p.account_id <> t.account_id"
    )
    assert await pool.fetchval(wrong) == 0


async def test_an_attempt_that_is_not_over_decides_nothing_yet(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_hang = 1.0
    await single(shop, shop.phones)
    async with working(pool, shop.replica_id, provider.url, mitto_timeout=4) as work:
        await provider.accepted_reached(1)
        [message_id] = ids_of(provider)
        await pool.execute("update batch set unsure = 1")  # as if something else were unresolved
        await receive(pool, [message_id])
        assert await work.resolver.round() == 1
        assert await verdicts(pool) == [("sending", 1)]
        await work.until_done()
        await work.resolve()
    await agree(pool, provider)
    await pool.execute("update batch set unsure = 0")


async def test_an_id_that_mitto_does_not_know_is_asked_about_a_bounded_number_of_times(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_reset = 1.0
    await single(shop, shop.phones)
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
        await receive(pool, ["01ARZ3NDEKTSV4RRFFQ69G5FAV"])
        await work.resolve()
    assert await verdicts(pool) == [("not_found", 0)]
    assert [one.kind for one in provider.ledger.requests].count("get") == ASKS_MOST


@pytest.mark.parametrize("status", [401, 403, 429])
async def test_an_account_that_refuses_to_be_asked_is_left_alone_for_a_while(
    pool: database.Pool, shop: Shop, provider: Simulator, status: int
) -> None:
    provider.switches.accept_then_reset = 1.0
    await single(shop, shop.phones)
    asked = 0

    async def refuse(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.json_response({"message": "no"}, status=status, headers={"Retry-After": "30"})

    app = web.Application()
    app.router.add_get("/{path:.*}", refuse)
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
    async with TestServer(app) as server, working(pool, 0, str(server.make_url(""))) as work:
        await receive(pool, ids_of(provider))
        await work.resolve()
        await pool.execute("update early_receipt set next_ask_at = '-infinity'")
        await work.resolve()
    assert asked == 1
    row = await pool.fetchrow("select asked, next_ask_at > now() + interval '20 s' as later from early_receipt")  # fmt: skip
    assert row is not None
    assert tuple(row) == (0, True)


async def test_an_account_that_does_not_answer_holds_up_nobody(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_reset = 1.0
    await shop.sending(40, batch_size=40)
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
    async with working(pool, 0, "http://127.0.0.1:9") as work:
        await receive(pool, ids_of(provider))
        assert await work.resolver.round() == 40
    asked = await pool.fetchval("select sum(asked) from early_receipt")
    assert asked <= AT_ONCE, "the others were put off, and that is not counted"


async def test_two_replicas_do_not_ask_the_same(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_reset = 1.0
    await shop.sending(30, batch_size=30)
    async with (
        # Also how long the others leave to whoever asks: longer than a round takes on a busy machine.
        working(pool, shop.replica_id, provider.url, patience_seconds=3.0) as one,
        working(pool, 0, provider.url, patience_seconds=3.0) as other,
    ):
        await one.until_done()
        await receive(pool, ids_of(provider))
        await asyncio.sleep(3.02)  # they are as old as that
        # What found no turn on a busy machine is asked a second later.
        async with asyncio.timeout(20):
            while await pool.fetchval("select exists (select from early_receipt)"):
                await asyncio.gather(one.resolver.round(), other.resolver.round())
    await agree(pool, provider)
    assert [one.kind for one in provider.ledger.requests].count("get") == 30


async def test_what_one_replica_is_about_to_ask_another_passes_by(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_reset = 1.0
    await shop.sending(3, batch_size=3)
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
        await receive(pool, ids_of(provider))
    async with pool.acquire() as one, one.transaction(), asyncio.timeout(5):
        assert len(await evidence.take_questions(one, 64, 0, ASKS_MOST)) == 3
        assert await evidence.take_questions(pool, 64, 0, ASKS_MOST) == []


async def test_while_nothing_is_unresolved_no_receipt_is_looked_at(
    pool: database.Pool, shop: Shop
) -> None:
    """Twice a second; beside a long snapshot all that ever waited are still in every index."""
    reads = (
        "select pg_stat_get_xact_tuples_returned('early_receipt'::regclass) +"
        " (select sum(pg_stat_get_xact_tuples_returned(indexrelid)) from pg_index"
        " where indrelid = 'early_receipt'::regclass)"
    )
    await receive(pool, [f"X{i}" for i in range(20)])
    async with pool.acquire() as db, db.transaction():
        before = await db.fetchval(reads)
        assert await evidence.take_questions(db, 64, 0, ASKS_MOST) == []
        assert await db.fetchval(reads) == before


async def test_a_replica_that_does_not_reach_mitto_leaves_the_questions_to_the_others(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_reset = 1.0
    await shop.sending(3, batch_size=3)
    async with (
        working(pool, shop.replica_id, provider.url) as one,
        working(pool, 0, "http://127.0.0.1:1") as cut_off,
    ):
        await one.until_done()
        await receive(pool, ids_of(provider))
        assert await cut_off.resolver.round() == 3
        await pool.execute("update early_receipt set next_ask_at = '-infinity'")
        assert await cut_off.resolver.round() == 0
        await one.resolve()
    await agree(pool, provider)


# ----------------------------------------------------------------------------- verdicts and what comes after


async def test_a_receipt_after_a_verdict_of_failed_is_accepted_and_paid(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_reset = 1.0
    campaign_id = await shop.sending(2)
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
        which = evidence.Selection(batch_id=await pool.fetchval("select id from batch"))
        async with pool.acquire() as connection, connection.transaction():
            assert await evidence.give_verdict(connection, campaign_id, "failed", which, 0) == 2
        await receive(pool, ids_of(provider))
        await work.resolve()
    await agree(pool, provider)
    assert (await check_the_account(shop, campaign_id)).totals.delivered == 2


async def test_what_was_sent_again_and_accepted_twice_is_accepted_here_once(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_reset = 1.0
    campaign_id = await shop.sending(1)
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
        provider.switches.accept_then_reset = 0.0
        which = evidence.Selection(batch_id=await pool.fetchval("select id from batch"))
        async with pool.acquire() as connection, connection.transaction():
            assert await evidence.give_verdict(connection, campaign_id, "resend", which, 0) == 1
        await work.until_done()
        await receive(pool, ids_of(provider))
        await work.resolve()
    first, second = ids_of(provider)
    assert (
        await pool.fetchval("select provider_id from message_shown where own_state = 30") == second
    )
    assert await pool.fetchval("select provider_id from early_receipt") == first
    assert await verdicts(pool) == [("taken", 1)]
    await check_the_account(shop, campaign_id)


async def test_a_single_message_whose_caller_wants_it_rather_twice_is_posted_again(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.hang_before_accept = 1.0
    provider.switches.faults_left = 1
    await single(shop, shop.phones, on_unknown="resend")
    async with working(pool, shop.replica_id, provider.url, mitto_timeout=0.3) as work:
        await work.until_done()
        await work.resolver.round()
        await work.until_done()
    assert provider.ledger.accepted_count == 1
    attempts = await pool.fetch("select outcome, detail from attempt order by n")
    assert [row["outcome"] for row in attempts] == ["unknown", "accepted"]
    assert attempts[0]["detail"].endswith("sent again, as asked")


async def test_what_stays_unknown_is_told_once_with_its_count(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.accept_then_reset = 1.0
    campaign_id = await shop.sending(4, batch_size=2)
    async with working(pool, shop.replica_id, provider.url, unknown_after=0.01) as work:
        await work.until_done()
        with capture_logs() as logs:
            for _ in range(3):
                await asyncio.sleep(0.02)
                await work.resolver.round()
    told = [one for one in logs if one["event"] == "messages.unknown"]
    assert [(one["campaign"], one["n"]) for one in told] == [(campaign_id, 4)]
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 4


# -------------------------------------------------------------------------------------- order of answers


async def test_an_account_that_shuffles_its_answers_is_found_out_before_ids_are_given_away(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    provider.switches.shuffled_answer = 1.0
    campaign_id = await shop.sending(60, batch_size=10)
    async with working(pool, shop.replica_id, provider.url) as work:
        with capture_logs() as logs:
            await work.until_done()
        assert (await check_the_account(shop, campaign_id)).totals.pending == 60
        await receive(pool, ids_of(provider))
        await work.resolve()
    assert [one["event"] for one in logs].count("account.order_broken") == 1
    assert await pool.fetchval("select capabilities from traffic_account") == {"orderKept": False}
    await agree(pool, provider)
    assert (await check_the_account(shop, campaign_id)).totals.delivered == 60
    assert await pool.fetchval("select count(*) from unmapped_id") == 0


async def test_an_answer_in_order_is_looked_at_first_and_then_one_in_fifty(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    # At a pace, or all hundred were answered while the first was looked at.
    await pool.execute("update traffic_account set requests_per_second = 100")
    await shop.sending(200, batch_size=2)
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
    assert [one.kind for one in provider.ledger.requests].count("get") == 2 * 2


async def test_an_account_that_is_known_to_keep_the_order_is_not_asked(
    pool: database.Pool, shop: Shop, provider: Simulator
) -> None:
    await tenants.learn(pool, shop.account_id, {"orderKept": True})
    await shop.sending(10)
    async with working(pool, shop.replica_id, provider.url) as work:
        await work.until_done()
    assert [one.kind for one in provider.ledger.requests].count("get") == 0


async def test_looks_that_tell_nothing_settle_as_usual_and_become_seldom(
    pool: database.Pool, shop: Shop
) -> None:
    looks = 0

    async def refuse(_: web.Request) -> web.Response:
        nonlocal looks
        looks += 1
        return web.Response(status=500)

    app = web.Application()
    app.router.add_get("/{path:.*}", refuse)
    async with TestServer(app) as server, mitto.Client(str(server.make_url("")), 1) as client:
        resolver = Resolver(pool, client, config.load({}))
        for _ in range(100):
            assert await resolver.order_holds(ASKED, None, [1, 2], answered(2))
    assert looks == 2 * 7  # the 1st, 2nd, 4th, 8th, 16th, 32nd and 64th answer


async def test_a_fault_of_ours_in_a_look_stops_no_answer_and_the_next_is_looked_at(
    pool: database.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    async def ask(*_: object) -> mitto.Fetched:
        nonlocal looks
        looks += 1
        raise asyncpg.InternalServerError("a fault")

    async with mitto.Client("http://127.0.0.1:9", 1) as client:
        resolver = Resolver(pool, client, config.load({}))
        monkeypatch.setattr(resolver._questions, "ask", ask)
        for _ in range(3):
            assert await resolver.order_holds(ASKED, None, [1, 2], answered(2))
    assert looks == 2  # the 1st and the 2nd answer


ASKED = mitto.Account(1, "main", "key", "refused")


def answered(n: int) -> list[mitto.ItemResult]:
    accepted = MessageState.ACCEPTED
    return [mitto.ItemResult(i, accepted, f"X{i}", None) for i in range(1, n + 1)]


async def test_one_item_is_in_order_whatever_is_known_of_its_account(pool: database.Pool) -> None:
    async with mitto.Client("http://127.0.0.1:9", 1) as client:
        resolver = Resolver(pool, client, config.load({}))
        assert await resolver.order_holds(ASKED, False, [1], answered(1))
        assert not await resolver.order_holds(ASKED, False, [1, 2], answered(2))
        no_id = mitto.ItemResult(2, MessageState.REFUSED, None, "no")
        assert not await resolver.order_holds(ASKED, False, [1, 2], [*answered(1), no_id])


# ------------------------------------------------------------------------------------------ all together


async def test_all_that_mitto_accepted_is_delivered_here_and_nothing_is_sent_twice(
    pool: database.Pool, shop: Shop
) -> None:
    inbox = Inbox(pool)

    async def take(request: web.Request) -> web.Response:
        dlr = mitto.parse_dlr(await request.read())
        await inbox.put(
            [
                ReceiptRow(None, one.provider_id, int(one.state or 0), one.at, one.description)
                for one in dlr.receipts
            ]
        )
        return web.Response(status=202)

    app = web.Application()
    app.router.add_post("/", take)
    switches = Switches(
        seed=7, accept_then_hang=0.08, accept_then_reset=0.08, accept_then_502=0.08, half_answer=0.05,
        hang_before_accept=0.04, repeated_id_answer=0.03, items_without_id=0.01, dlr_batch=100, dlr_delay_seconds=(0, 0.3), dlr_before_answer=0.1,
    )  # fmt: skip
    campaign_id = await shop.sending(2_000, batch_size=50)
    housekeeping = Housekeeping(pool, queue.Standing("test", 30, shop.replica_id, mitto.clock()))
    writing = asyncio.create_task(inbox.run())
    async with (
        TestServer(app) as server,
        Simulator(switches, webhook_url=str(server.make_url("/"))) as provider,
        working(pool, shop.replica_id, provider.url, 0.1, mitto_timeout=1) as work,
    ):
        keeping = asyncio.create_task(housekeeping.keep())
        resolving = asyncio.create_task(work.resolver.run())
        await work.until_done()

        async def all_delivered() -> bool:
            delivered = (await shop.progress(campaign_id)).totals.delivered
            return delivered == provider.ledger.accepted_count

        async with asyncio.timeout(30):
            while not await all_delivered():
                await asyncio.sleep(0.05)
        for task in (keeping, resolving, writing):
            task.cancel()
        await asyncio.gather(keeping, resolving, writing, return_exceptions=True)
        await agree(pool, provider)
        totals = (await check_the_account(shop, campaign_id)).totals
        assert totals.unknown == 2_000 - provider.ledger.accepted_count
        assert sum(one.fault is not None for one in provider.ledger.requests) > 3
        assert totals.refused == 0
    await campaigns.finish(pool)
    assert await shop.status(campaign_id) == "completed"
