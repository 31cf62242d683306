"""Retention: what is over goes in pieces that leave every sum, certificate and promise as it was."""

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from conftest import Api, TenantCaller
from shop import ACCEPTED, REFUSED, UNKNOWN, Shop, shop_of
from support import assert_sound

from smsd import audit, campaigns, certificates, credits, database, faults, queue
from smsd.certificates import Certificate
from smsd.mitto import ItemResult
from smsd.queue import ReceiptRow
from smsd.retention import Retention

PIECE = 7
ROWS = (
    "message", "batch", "attempt", "provider_message", "recipient", "unmapped_id", "early_receipt", "raw_receipt",
    "import_job",
)  # fmt: skip


@dataclass
class Case:
    """A tenant with a campaign of every end that a message can come to, and with single messages."""

    api: Api
    pool: database.Pool
    tenant: TenantCaller
    shop: Shop
    campaign_id: int
    single_id: int

    async def age(self, days: float = 10) -> None:
        """Lets everything be so much longer ago."""
        for statement in (
            "update campaign set finished_at = finished_at - $1::interval",
            # of a campaign it says when messages were accepted, which its certificate has
            "update batch set done_at = done_at - $1::interval where campaign_id = 0",
            "update batch set created_at = created_at - $1::interval",
            "update attempt set intent_at = intent_at - $1::interval, ended_at = ended_at - $1::interval",
            "update early_receipt set received_at = received_at - $1::interval",
            "update raw_receipt set received_at = received_at - $1::interval",
            "update import_job set finished_at = finished_at - $1::interval",
            "update unmapped_id set created_at = created_at - $1::interval",
        ):
            await self.pool.execute(statement.replace("$1::interval", f"interval '{days} days'"))
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute("set local smsd.retention = 'on'")
            await connection.execute(f"update ledger set at = at - interval '{days} days'")

    async def sweep(self, days: float = 5, piece: int = PIECE) -> None:
        await Retention(self.pool, days, piece).sweep()

    async def certificate(self) -> Certificate:
        async with self.pool.acquire() as db, certificates.snapshot(db):
            found = await certificates.issue(db, self.shop.id, self.campaign_id)
        assert found is not None
        return found

    async def counted(self) -> dict[str, int]:
        """Rows by table."""
        return {name: await self.pool.fetchval(f"select count(*) from {name}") for name in ROWS}

    async def money(self) -> tuple[Any, ...]:
        """What the tenant has, and what the ledger says of it."""
        row = await self.pool.fetchrow(
            "select granted, spent, reserved, overdue from credit where tenant_id = $1",
            self.shop.id,
        )
        sums = await self.pool.fetch(
            "select kind, sum(amount) from ledger where tenant_id = $1 group by 1 order by 1",
            self.shop.id,
        )
        assert row is not None
        return (*row.values(), *map(tuple, sums))


async def end(shop: Shop) -> int:
    """A campaign of 23 that is over: skipped, refused, delivered, failed later, without receipt, unknown in two ways."""
    campaign_id = await shop.begin(23, batch_size=5)
    await shop.expand(23, skipped=3, segments=2)
    first, second, third, fourth = await shop.post(4)
    await shop.answer(*first, ACCEPTED, ACCEPTED, ACCEPTED, REFUSED, UNKNOWN)
    accepted = shop.provider_ids - 4
    await shop.receive(**{f"M{accepted}": 30, f"M{accepted + 1}": 20})
    await shop.answer(*second, ACCEPTED)
    grant, intent = third
    await queue.settle_batch(shop.pool, grant.batch_id, intent.attempt, "unknown", "unknown")
    await shop.answer(*fourth, REFUSED)
    await campaigns.finish(shop.pool)
    return campaign_id


async def single(shop: Shop) -> int:
    async with shop.pool.acquire() as connection, connection.transaction():
        found = await queue.add_message(
            connection, shop.id, shop.account_id, 306_911_111_111, "Hi", "Shop", 3
        )
    assert found is not None
    return found


@pytest.fixture
async def case(api: Api) -> Case:
    pool = api.ctx.pool
    account_id = await api.new_account(requestsPerSecond=50_000)
    tenant = await api.new_tenant(account_id=account_id, credits=20_000, requestsPerSecond=50_000)
    shop = await shop_of(api, tenant)
    campaign_id = await end(shop)
    single_id = await single(shop)
    await shop.send_all(ACCEPTED)
    lost = await single(shop)
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(pool, grant.batch_id, intent.attempt, "unknown", "unknown")
    assert lost > single_id
    await pool.execute(
        "insert into recipient (campaign_id, phone, attributes) select $1, g, '{}' from generate_series(1, 20) g",
        campaign_id,
    )
    await pool.execute(
        "insert into import_job (tenant_id, status, finished_at) values ($1, 'completed', now())",
        tenant.id,
    )
    await pool.execute("insert into raw_receipt (body, why) values ('?', 'unreadable')")
    await queue.apply_receipts(pool, [ReceiptRow(None, "nobody's", 30, None, None)])
    await assert_sound(pool)
    return Case(api, pool, tenant, shop, campaign_id, single_id)


async def test_everything_goes_but_totals_certificate_and_money(case: Case) -> None:
    before, status = await case.certificate(), await case.shop.progress(case.campaign_id)
    assert before.credits.reserved == before.credits.unknown == 12
    money = await credits.balance(case.pool, case.shop.id)
    await case.age()
    await case.sweep()

    assert await case.counted() == dict.fromkeys(ROWS, 0)
    after = await case.certificate()
    assert (after.sha256, after.totals, after.reasons) == (
        before.sha256,
        before.totals,
        before.reasons,
    )
    assert after.credits == before.credits._replace(
        released=before.credits.released + 12, reserved=0, unknown=0
    )
    assert (await case.shop.progress(case.campaign_id)).totals == status.totals
    assert await credits.balance(case.pool, case.shop.id) == (money.balance, 0)
    kinds = await case.pool.fetch(
        "select campaign_id, kind, count(*) as n from ledger where kind <> 'grant' group by 1, 2"
    )
    assert {(row["campaign_id"], row["kind"], row["n"]) for row in kinds} == {
        (at, kind, 1) for at in (case.campaign_id, None) for kind in ("hold", "spend", "release")
    }
    await assert_sound(case.pool)


async def test_what_is_younger_stays(case: Case) -> None:
    before, money = await case.counted(), await case.money()
    await case.age(4)
    await case.sweep(5)
    assert await case.counted() == before
    assert await case.money() == money


async def test_a_cancelled_campaign_keeps_its_totals(case: Case) -> None:
    campaign_id = await case.shop.sending(20)
    ((grant, intent),) = await case.shop.post()
    await case.shop.answer(grant, intent, ACCEPTED)
    await case.shop.act(campaign_id, campaigns.cancel)
    before = (await case.shop.progress(campaign_id)).totals
    assert (before.pending, before.cancelled) == (5, 15)
    await case.age()
    await case.sweep()
    assert (await case.shop.progress(campaign_id)).totals == before
    assert await case.counted() == dict.fromkeys(ROWS, 0)
    await assert_sound(case.pool)


async def test_zero_days_keep_everything(case: Case) -> None:
    before = await case.counted()
    await case.age(1_000)
    await asyncio.wait_for(Retention(case.pool, 0).run(), 5)
    assert await case.counted() == before


async def test_a_fraction_of_a_day_will_do(case: Case) -> None:
    await case.age(0.01)
    await case.sweep(0.001)
    assert await case.counted() == dict.fromkeys(ROWS, 0)


async def test_what_still_sends_or_is_on_its_way_stays(case: Case) -> None:
    sending = await case.shop.sending(10)
    cancelled = await case.shop.sending(10)
    await case.shop.post()  # of the one that sends
    await case.shop.act(sending, campaigns.pause)
    await case.shop.post()
    await case.shop.act(cancelled, campaigns.cancel)
    await single(case.shop)
    await case.age()
    await case.sweep()
    left = await case.pool.fetch("select campaign_id, count(*) as n from message group by 1")
    assert {row["campaign_id"]: row["n"] for row in left} == {sending: 10, cancelled: 10, 0: 1}
    await assert_sound(case.pool)


async def test_the_audit_holds_after_every_piece_and_whoever_comes_next_goes_on(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sweep dies after its next piece, as by kill -9, and another goes on."""

    class Killed(BaseException):
        pass

    deaths: Counter[str] = Counter()

    def die(point: str) -> None:
        deaths[point] += 1
        if point == "retention.piece" or deaths[point] < 3:
            raise Killed

    before = await case.certificate()
    await case.age()
    monkeypatch.setattr(faults, "point", die)
    while True:
        try:
            await case.sweep(piece=2)
            break
        except Killed:
            await assert_sound(case.pool)
            assert (await case.certificate()).sha256 == before.sha256
    assert deaths["retention.piece"] > 7
    assert deaths["retention.certified"] == 3
    assert await case.counted() == dict.fromkeys(ROWS, 0)
    assert (await case.certificate()).totals == before.totals


async def test_an_audit_that_runs_all_the_while_finds_nothing(case: Case) -> None:
    for _ in range(3):
        await end(case.shop)
    await case.age()
    over = asyncio.Event()
    checks = 0

    async def look() -> None:
        nonlocal checks
        async with case.pool.acquire() as connection:
            while not over.is_set():
                assert [c for c in await audit.run(connection) if c.broken] == []
                checks += 1

    looking = asyncio.create_task(look())
    await case.sweep()
    over.set()
    await looking
    assert checks > 1
    assert await case.counted() == dict.fromkeys(ROWS, 0)


async def test_two_replicas_at_once_remove_everything_once(case: Case) -> None:
    await end(case.shop)
    await case.age()
    await asyncio.gather(*(case.sweep() for _ in range(3)))
    await case.sweep()
    assert await case.counted() == dict.fromkeys(ROWS, 0)
    await assert_sound(case.pool)


async def test_a_receipt_that_comes_too_late_changes_nothing(case: Case) -> None:
    before = await case.shop.progress(case.campaign_id)
    await case.age()
    await case.sweep()
    await case.shop.receive(**{f"M{n}": 20 for n in range(1, case.shop.provider_ids + 1)})
    assert (await case.shop.progress(case.campaign_id)).totals == before.totals
    assert await case.pool.fetchval("select count(*) from early_receipt") == case.shop.provider_ids
    await assert_sound(case.pool)
    await case.age()
    await case.sweep()
    assert await case.pool.fetchval("select count(*) from early_receipt") == 0


async def test_a_receipt_that_comes_while_messages_go_changes_nothing_either(case: Case) -> None:
    """From the first stage on, nothing that comes in moves a message."""
    before = await case.certificate()
    batch = await case.pool.fetchrow(
        "select id, attempt, array(select m.id from message m where m.campaign_id = b.campaign_id"
        " and m.id between b.first_id and b.last_id order by 1) as ids"
        " from batch b where campaign_id = $1 and state = 11",
        case.campaign_id,
    )
    await case.age()
    assert await case.pool.fetchval("select begin_removal(1)") == case.campaign_id
    while await case.pool.fetchval("select close_piece($1, 4)", case.campaign_id):
        await assert_sound(case.pool)
    await case.shop.receive(**{f"M{n}": 30 for n in range(1, case.shop.provider_ids + 1)})
    assert batch is not None
    late = [ItemResult(one, ACCEPTED, f"L{one}", None) for one in batch["ids"]]
    await queue.settle_items(
        case.pool, batch["id"], batch["attempt"], queue.Answer.of(late, "bulk", 200)
    )
    assert (await case.certificate()).sha256 == before.sha256
    await assert_sound(case.pool)
    await case.sweep()
    assert (await case.shop.progress(case.campaign_id)).totals == before.totals
    await assert_sound(case.pool)


async def test_a_result_that_comes_after_its_batch_is_gone_is_no_fault(case: Case) -> None:
    row = await case.pool.fetchrow(
        "select id, attempt from batch where state = 11 and campaign_id = 0"
    )
    assert row is not None
    await case.age()
    await case.sweep()
    became = await queue.settle_batch(
        case.pool, row["id"], row["attempt"], "again", "retry", delay_seconds=1, most=6
    )
    assert became == "settled"
    await assert_sound(case.pool)


async def test_a_certificate_that_something_moved_under_is_not_kept(case: Case) -> None:
    before = await case.certificate()
    await case.age()
    await case.pool.fetchval("select begin_removal(1)")
    while await case.pool.fetchval("select close_piece($1, 100)", case.campaign_id):
        pass
    totals = [0] * 10
    assert not await case.pool.fetchval(
        "select keep_certificate($1, $2, $3)", case.campaign_id, totals, certificates.kept(before)
    )
    await case.sweep()
    assert (await case.certificate()).sha256 == before.sha256


async def test_nothing_of_a_removed_campaign_can_be_sent_again(case: Case) -> None:
    """Not even by a replica whose code knows of no retention."""
    await case.age()
    await case.pool.fetchval("select begin_removal(1)")
    with pytest.raises(asyncpg.CheckViolationError):
        await case.pool.fetchrow("select * from retry_failed($1)", case.campaign_id)
    await assert_sound(case.pool)
    path = f"/api/campaigns/{case.campaign_id}"
    assert (await case.tenant.post(f"{path}/retry-failed")).status == 410
    assert (
        await case.tenant.post(
            f"{path}/unknown", {"as": "sent", "olderThan": "2030-01-01T00:00:00Z"}
        )
    ).status == 410


@pytest.mark.parametrize(
    "what", ["messages", "messages.csv", "batches", "unknown", "messages?status=delivered"]
)
async def test_what_was_removed_answers_since_when(case: Case, what: str) -> None:
    path = f"/api/campaigns/{case.campaign_id}"
    assert (await case.tenant.get(f"{path}/{what}")).status == 200
    assert (await case.tenant.get(path)).body["messagesRemovedAt"] is None
    await case.age()
    await case.sweep()
    since = (await case.tenant.get(path)).body["messagesRemovedAt"]
    reply = await case.tenant.get(f"{path}/{what}")
    assert (reply.status, reply.body["code"]) == (410, "MESSAGES_REMOVED")
    assert reply.body["details"] == {"removedAt": since}
    assert since is not None
    other = await case.api.new_tenant()
    assert (await other.get(f"{path}/{what}")).status == 404


async def test_status_and_certificate_answer_as_before(case: Case) -> None:
    path = f"/api/campaigns/{case.campaign_id}"
    status, certificate = (
        (await case.tenant.get(f"{path}/status")).body,
        (await case.tenant.get(f"{path}/certificate")).body,
    )
    await case.age()
    await case.sweep()
    after = (await case.tenant.get(f"{path}/status")).body
    assert after["metrics"] == status["metrics"]
    assert after["expansion"] == status["expansion"]
    kept = (await case.tenant.get(f"{path}/certificate")).body
    changed = {name for name in kept if kept[name] != certificate[name]}
    assert changed == {"at", "credits", "campaign", "messagesRemovedAt"}  # finishedAt was aged
    assert (await case.tenant.get(f"{path}/explain")).status == 200
    assert (await case.tenant.get(f"{path}/stats")).status in (200, 501)
    assert (await case.tenant.get(f"/api/messages/{case.single_id}")).status == 404


async def test_the_ledger_gets_no_entry_of_retention_by_hand(case: Case) -> None:
    with pytest.raises(asyncpg.RestrictViolationError):
        await case.pool.execute("delete from ledger")
    await case.age()
    await case.sweep()
    with pytest.raises(asyncpg.RestrictViolationError):
        await case.pool.execute("delete from ledger")


async def test_a_hold_never_outlives_its_message_and_evidence_of_it_finds_nothing(
    case: Case,
) -> None:
    row = await case.pool.fetchrow(
        "select id, phone from message where campaign_id = 0 order by id desc limit 1"
    )
    assert row is not None
    await case.age()
    await case.sweep()
    reserved = await case.pool.fetchval(
        "select reserved from credit where tenant_id = $1", case.shop.id
    )
    assert reserved == 0
    assert (
        await case.pool.fetch(
            "select * from candidates($1, $2, $3, clock_timestamp(), 1e7)",
            case.shop.account_id,
            row["phone"],
            row["id"],
        )
        == []
    )


async def test_a_doubted_database_loses_nothing(case: Case) -> None:
    await case.age()
    await case.pool.execute("update instance set doubted = true")
    before = await case.counted()
    await case.pool.fetchval("select begin_removal(1)")
    await case.pool.fetchrow("select * from remove_singles(1, 0, 100)")
    left = await case.counted()
    assert left["message"] == before["message"]
    assert await case.pool.fetchval("select count(*) from campaign_archive") == 0


async def test_removed_ranges_are_used_again(case: Case) -> None:
    """The same work again and again, removed each time, does not make tables or indexes grow."""
    tables = ["message", "provider_message", "batch", "attempt"]
    for table in tables:  # one that came by itself in between would make the first round smaller
        await case.pool.execute(f"alter table {table} set (autovacuum_enabled = off)")

    async def size() -> int:
        await case.pool.execute("vacuum message, provider_message, batch, attempt, ledger")
        found = await case.pool.fetchval(
            "select sum(pg_total_relation_size(name::regclass)) from unnest($1::text[]) name",
            tables,
        )
        return int(found)

    sizes = []
    for _ in range(6):
        campaign_id = await case.shop.begin(2_000, batch_size=100)
        await case.shop.expand(2_000)
        await case.shop.send_all(ACCEPTED)
        await campaigns.finish(case.pool)
        await case.age()
        await Retention(case.pool, 5, 500).sweep()
        assert not await case.pool.fetchval(
            "select count(*) from message where campaign_id = $1", campaign_id
        )
        sizes.append(await size())
    assert sizes[-1] <= sizes[1] * 1.1
