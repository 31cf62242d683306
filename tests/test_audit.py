"""The audit: quiet about a database in which everything stands that can stand, loud about each promise broken by hand."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from shop import ACCEPTED, REFUSED, UNKNOWN
from support import new_account, open_shop

from smsd import audit, campaigns, credits, database, queue
from smsd.database import Connection
from smsd.model import BatchState, MessageState


@dataclass
class Filled:
    """A database with every state in it."""

    connection: Connection
    sent: int  # the campaign of which everything was posted

    async def broken_by(self, statement: str) -> dict[str, str | None]:
        """What the audit finds broken after this statement, which is then undone."""
        transaction = self.connection.transaction(isolation="repeatable_read")
        await transaction.start()
        try:
            status = await self.connection.execute(statement)
            assert not status.endswith(" 0"), f"changed nothing: {statement}"
            return await broken(self.connection)
        finally:
            await transaction.rollback()


async def broken(connection: Connection) -> dict[str, str | None]:
    return {check.name: check.example for check in await audit.run(connection) if check.broken}


async def fill(pool: database.Pool) -> int:
    """Every state that a campaign, a batch and a message can be in; the id of the campaign with most of them."""
    account_id = await new_account(pool)
    replica_id = await queue.register(pool, "test", "0")
    shop = await open_shop(pool, account_id, replica_id)
    other = await open_shop(pool, account_id, replica_id)
    dead = await queue.register(pool, "dead", "0")
    await queue.leave(pool, dead, "stopped")

    sent = await shop.begin(40, batch_size=5)
    await shop.expand(40, skipped=2)
    posted = await shop.post(7)
    mixed = [ACCEPTED, ACCEPTED, ACCEPTED, REFUSED, UNKNOWN]
    for grant, intent in posted[:3]:
        await shop.answer(grant, intent, *mixed)
    first = shop.provider_ids - 4
    await shop.receive(**{f"M{first}": 30, f"M{first + 1}": 20, f"M{first + 2}": 11, "Y": 30})
    for (grant, intent), action in zip(
        posted[3:6], ["unknown", "again", "refused"], strict=True
    ):  # the seventh is being posted
        await queue.settle_batch(
            pool, grant.batch_id, intent.attempt, action, action, delay_seconds=60, most=6
        )
    await shop.claim()

    await shop.sending(5, batch_size=5)
    ((grant, intent),) = await shop.post()
    await shop.answer(grant, intent, ACCEPTED)
    first = shop.provider_ids - 4
    await shop.receive(**{f"M{first}": 30, f"M{first + 3}": 11})

    cancelled = await other.sending(10, batch_size=5)
    ((grant, intent),) = await other.post()
    await other.answer(grant, intent, ACCEPTED, REFUSED, UNKNOWN)
    await other.act(cancelled, campaigns.cancel)
    paused = await other.begin(20)
    await other.expand(10, last=False, segments=2)
    await other.act(paused, campaigns.pause)
    await other.begin(7)
    await other.draft()

    async with pool.acquire() as connection, connection.transaction():
        message = await queue.add_message(
            connection, other.id, account_id, 306_911_111_111, "Hi", "Shop", 3
        )
        await credits.grant(connection, other.id, 5, "more")
    assert message is not None
    return sent


@pytest.fixture
async def filled(pool: database.Pool, connection: Connection) -> AsyncIterator[Filled]:
    sent = await fill(pool)
    assert await broken(connection) == {}
    yield Filled(connection, sent)
    assert await broken(connection) == {}


async def test_nothing_is_broken_where_every_state_stands_and_everything_was_looked_at(
    filled: Filled,
) -> None:
    rows = await filled.connection.fetch("select distinct state from batch")
    assert {row["state"] for row in rows} == set(BatchState)
    rows = await filled.connection.fetch("select distinct state from message")
    assert {row["state"] for row in rows} == {None, *MessageState}
    checks = await audit.run(filled.connection)
    assert [check.name for check in checks] == list(audit.PROMISES)
    assert {check.name: check.promise for check in checks} == audit.PROMISES
    checked = {check.name: check.checked for check in checks}
    count = filled.connection.fetchval
    assert checked["once"] == await count("select count(*) from message where campaign_id <> 0")
    assert checked["lost"] == await count("select count(*) from message")
    assert checked["totals"] == await count("select count(*) from campaign")
    assert checked["money"] == 2
    assert checked["orphans"] == await count("select count(*) from provider_message")
    assert checked["leases"] == 2


async def test_an_empty_database_breaks_no_promise(connection: Connection) -> None:
    checks = await audit.run(connection)
    assert [(check.checked, check.broken, check.example) for check in checks] == [(0, 0, None)] * 6


async def test_nothing_is_broken_at_any_moment_of_a_campaign_at_work(
    pool: database.Pool, connection: Connection
) -> None:
    shop = await open_shop(pool, await new_account(pool), await queue.register(pool, "test", "0"))
    await shop.begin(900, batch_size=10)
    await shop.expand(300, last=False)

    async def work() -> None:
        for last in (False, True):
            await shop.expand(300, skipped=10, last=last)
            while posted := await shop.post(3):
                for grant, intent in posted:
                    await shop.answer(grant, intent, ACCEPTED, REFUSED, UNKNOWN, ACCEPTED)
                newest = f"M{shop.provider_ids}"
                await shop.receive(**{newest: 20, f"M{shop.provider_ids - 1}": 30, "Y": 30})
                await shop.receive(**{newest: 30})

    working, moments = asyncio.create_task(work()), 0
    while not working.done():
        assert await broken(connection) == {}
        moments += 1
    await working
    assert moments > 5, moments
    assert await broken(connection) == {}


ONE = "(select min(id) from message where state = 10 and campaign_id = {sent})"
TWO = "(select max(id) from message where state = 10 and campaign_id = {sent})"
AN_HOUR_AGO = "clock_timestamp() - interval '1 hour'"
RETENTION = "set local smsd.retention = 'on';"

BREAKS: dict[str, list[tuple[str, str]]] = {
    # how the audit's example begins: what was done by hand
    "once": [
        (
            "campaign {sent}: +306",
            ("drop index message_phone; update message set phone = (select phone from message"
            f" where id = {ONE} and campaign_id = {{sent}}) where id = {TWO}"),
        ),
        (
            "id M",
            (f"update message set provider_id = (select provider_id from message where id = {ONE}) where id = {TWO};"
            f" delete from provider_message where message_id = {TWO}"),
        ),
        ("batch ", "update attempt set outcome = 'duplicate' where outcome = 'accepted'"),
    ],
    "lost": [
        ("message ", "delete from batch where state = 12"),
        (
            "message ",
            "update batch set first_id = first_id + 1, n = n - 1, segments = segments - 1 where state = 12",
        ),
        ("batch ", "update batch set n = 2 where campaign_id = 0"),
        ("batch ", "update batch set segments = segments + 1 where state = 12"),
        ("batch ", "delete from message where campaign_id = 0"),
        (
            "batch ",
            "update attempt set provider_ids = provider_ids || E'\\nX' where provider_ids is not null",
        ),
        (
            "campaign 77 does not exist, and has messages",
            "insert into message (campaign_id, id, state) values (77, 7777777, 50)",
        ),
        (
            "campaign 77 does not exist, and has batches",
            ("insert into batch (campaign_id, lane_id, tenant_id, account_id, first_id, last_id, n, segments, state,"
             " sender) values (77, 1, 1, 1, 7777777, 7777777, 0, 0, 10, 'S')"),
        ),
        (
            "campaign ",
            (f"update campaign set status = 'sending', updated_at = {AN_HOUR_AGO} where status = 'cancelled';"
            f" update batch set done_at = {AN_HOUR_AGO} where done_at is not null"),
        ),
    ],
    "totals": [
        ("campaign {sent}: counters {{", (f"update campaign_counter set {column} = {column} + 1"
         " where campaign_id = {sent}"))
        for column in ("pending", "delivered", "delivery_failed", "refused", "unknown", "skipped", "spent")
    ] + [
        ("campaign {sent}: ", "delete from campaign_counter where campaign_id = {sent}"),
        ("campaign {sent}: ", f"update message set state = 30 where id = {ONE}"),
    ],
    "money": [
        ("tenant ", "update credit set granted = granted + 1"),
        ("tenant ", "update credit set spent = spent - 1 where spent > 0"),
        ("tenant ", "update credit set reserved = reserved - 1"),
        ("tenant ", f"{RETENTION} delete from ledger where kind = 'spend'"),
        ("tenant ", f"{RETENTION} update ledger set amount = amount + 1 where kind = 'hold'"),
        ("tenant ", "delete from credit"),
        (
            "tenant 77",
            ("insert into ledger (tenant_id, kind, amount, reason, balance_after, reserved_after)"
             " values (77, 'grant', 5, 'x', 5, 0)"),
        ),
        ("tenant ", "update credit set overdue = overdue + 1"),
        (
            "tenant ",
            (f"{RETENTION} update ledger l set campaign_id = (select max(id) from campaign c where"
             " c.tenant_id = l.tenant_id) where reason = 'enqueue'"),
        ),
        (
            "ledger entry ",
            (f"{RETENTION} update ledger set batch_id = (select min(id) from batch where campaign_id = 0)"
             " where kind = 'spend'"),
        ),
        ("tenant ", "update expansion set held = held + 1 where state = 'running'"),
    ],
    "orphans": [
        ("id M", f"update provider_message set message_id = {TWO} where message_id = {ONE}"),
        ("message ", f"delete from provider_message where message_id = {ONE}"),
        ("id M", f"update message set provider_id = null where id = {ONE}"),
        (
            "id M",
            "update attempt set provider_ids = replace(provider_ids, 'M', 'N') where provider_ids is not null",
        ),
        (
            "a receipt for M",
            ("insert into early_receipt (provider_id, state, received_at) select provider_id, 30,"
            f" {AN_HOUR_AGO} from provider_message"),
        ),
    ],
    "leases": [
        ("batch ", "update batch set owner = null where state = 2"),
        ("batch ", "update batch set owner = null where state = 3"),
        ("batch ", f"update replica set gone_at = {AN_HOUR_AGO} where name = 'test'"),
        (
            "batch ",
            f"update lane set idle = true where not paused; update batch set created_at = {AN_HOUR_AGO}",
        ),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", audit.PROMISES)
async def test_a_promise_that_is_broken_is_told_with_an_example_and_no_other_is(
    filled: Filled, name: str
) -> None:
    for example, statement in BREAKS[name]:
        found = await filled.broken_by(statement.format(sent=filled.sent))
        assert list(found) == [name], statement
        said = found[name]
        assert said is not None
        assert said.startswith(example.format(sent=filled.sent)), statement


async def test_what_will_be_seen_to_in_a_moment_is_not_broken(filled: Filled) -> None:
    for statement in (
        "update replica set gone_at = clock_timestamp() where name = 'test'",
        "update lane set idle = true",
        "update campaign set status = 'sending', updated_at = clock_timestamp() where status = 'cancelled'",
        "insert into early_receipt (provider_id, state) select provider_id, 30 from provider_message",
        f"insert into early_receipt (provider_id, state, received_at) select 'Z', 30, {AN_HOUR_AGO}",
        (
            "insert into early_receipt (provider_id, account_id, state, received_at)"
            f" select provider_id, account_id + 1, 30, {AN_HOUR_AGO} from provider_message"
        ),
    ):
        assert await filled.broken_by(statement) == {}, statement


async def test_a_batch_that_is_gone_is_missed_by_its_messages(filled: Filled) -> None:
    for state in (MessageState.ACCEPTED, MessageState.REFUSED, MessageState.UNKNOWN):
        found = await filled.broken_by(
            "delete from batch b using message m where m.campaign_id = b.campaign_id"
            f" and m.id between b.first_id and b.last_id and m.state = {int(state)}"
        )
        assert "has no batch" in str(found["lost"]), state


async def test_a_campaign_sends_with_nothing_to_do_once_neither_it_nor_a_batch_has_moved_lately(
    filled: Filled,
) -> None:
    moved = (
        "update campaign set status = 'sending', updated_at = clock_timestamp() - interval '{}'"
        " where status = 'cancelled';"
        " update batch set done_at = clock_timestamp() - interval '{}' where done_at is not null"
    )
    for campaign_moved, batch_moved in (("50 s", "1 hour"), ("1 hour", "50 s")):
        assert await filled.broken_by(moved.format(campaign_moved, batch_moved)) == {}
    found = await filled.broken_by(moved.format("70 s", "70 s"))
    assert "sends with nothing to do" in str(found["lost"])


async def test_a_replica_whose_heart_has_moved_since_somebody_looked_is_not_buried(
    pool: database.Pool,
) -> None:
    replica_id = await queue.register(pool, "slow", "0")
    seen = (await queue.beats(pool))[replica_id]
    assert await queue.beat(pool, replica_id)
    assert not await queue.bury(pool, replica_id, seen)
    assert await queue.beat(pool, replica_id)
    assert await queue.bury(pool, replica_id, seen + 2)
    assert not await queue.beat(pool, replica_id)
