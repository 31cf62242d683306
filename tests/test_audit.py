"""The audit: it finds nothing where nothing is wrong, and each kind of wrong where it was planted."""

import pytest
from shop import ACCEPTED, REFUSED, UNKNOWN, Shop
from support import broken, new_account, open_shop

from smsd import audit, campaigns, database, queue


@pytest.fixture
async def shop(pool: database.Pool) -> Shop:
    """A shop with something of everything: sent, refused, unknown, delivered, waiting, leased, cancelled, skipped."""
    shop = await open_shop(pool, await new_account(pool), await queue.register(pool, "test", "0"))
    await shop.begin(40, batch_size=4)
    await shop.expand(30, skipped=2, last=False)
    sent, retried, unknown, *_ = await shop.post(4)
    await shop.answer(*sent, ACCEPTED, ACCEPTED, REFUSED, UNKNOWN)
    for (grant, intent), action in ((retried, "again"), (unknown, "unknown")):
        await queue.settle_batch(
            pool, grant.batch_id, intent.attempt, action, action, most=6, delay_seconds=60
        )
    await shop.claim()
    await shop.receive(**{f"M{shop.provider_ids - 2}": 30, "nobody": 20})
    gone = await shop.begin(10)
    await shop.expand(10, last=False)
    await shop.act(gone, campaigns.cancel)
    return shop


async def test_the_audit_of_a_sound_database_finds_nothing_and_has_looked(
    pool: database.Pool, shop: Shop, connection: database.Connection
) -> None:
    checks = await audit.run(connection)
    assert [check.name for check in checks] == list(audit.PROMISES)
    assert [check for check in checks if check.broken] == []
    assert [check for check in checks if check.example] == []
    counts = {check.name: check.checked for check in checks}
    assert counts["lost"] == await pool.fetchval("select count(*) from message")
    assert counts["totals"] == 2
    assert counts["money"] == 1
    assert counts["orphans"] == 2
    assert counts["leases"] == 2


async def test_the_audit_of_an_empty_database_finds_nothing(
    pool: database.Pool, connection: database.Connection
) -> None:
    assert all(not check.broken for check in await audit.run(connection))


PLANTED = {
    "the same number twice": (
        "once",
        (
            "drop index message_phone; update message set phone = (select min(phone) from message) where id ="
            " (select max(id) from message where campaign_id = 1)"
        ),
    ),
    "the same id on two messages": (
        "once",
        "update message set provider_id = (select min(provider_id) from message) where state = 5",
    ),
    "a batch that was posted again after it was accepted": (
        "once",
        "update attempt set outcome = 'duplicate' where n = 1 and batch_id = 1",
    ),
    "a message that no batch speaks for": (
        "lost",
        "update message set state = null where id = (select min(id) from message where state = 10)",
    ),
    "a batch that says more messages than it has": (
        "lost",
        "update batch set n = n + 1 where id = (select min(id) from batch where state = 0)",
    ),
    "a batch worth more than its messages": (
        "lost",
        "update batch set segments = segments + 1 where id = (select min(id) from batch where state = 0)",
    ),
    "a batch that is gone": (
        "lost",
        "delete from batch where id = (select max(id) from batch where campaign_id = 1)",
    ),
    "a campaign that sends with nothing to do": (
        "lost",
        (
            "update expansion set state = 'done' where campaign_id = 1;"
            "update batch set state = greatest(state, 10), done_at = clock_timestamp() - interval '2 minutes';"
            "update campaign set updated_at = clock_timestamp() - interval '2 minutes'"
        ),
    ),
    "a counter that counts too much": (
        "totals",
        "update campaign_counter set pending = pending + 1 where campaign_id = 1",
    ),
    "a counter that forgot": ("totals", "update campaign_counter set skipped = 0"),
    "a message delivered without its counter": (
        "totals",
        "update message set state = 30 where state = 10",
    ),
    "spent beyond the ledger": ("money", "update credit set spent = spent + 1"),
    "granted beyond the ledger": ("money", "update credit set granted = granted + 1"),
    "a hold that nobody knows of": ("money", "update credit set reserved = reserved + 1"),
    "a ledger without its last line": (
        "money",
        "delete from ledger where id = (select max(id) from ledger)",
    ),
    "a hold of a message that is gone": (
        "money",
        "update message set state = 40 where state = 5",
    ),
    "an id that names a message that does not have it": (
        "orphans",
        "update message set provider_id = null where state = 10",
    ),
    "a message with an id that nobody can look up": (
        "orphans",
        "delete from provider_message where provider_id = (select min(provider_id) from provider_message)",
    ),
    "a known receipt that waits": (
        "orphans",
        (
            "insert into early_receipt (provider_id, state, received_at)"
            " select min(provider_id), 30, clock_timestamp() - interval '2 minutes' from provider_message"
        ),
    ),
    "a lease of nobody": ("leases", "update batch set owner = null where state = 2"),
    "a lease of the dead": (
        "leases",
        "update replica set gone_at = clock_timestamp() - interval '2 minutes'",
    ),
    "a lane that sleeps beside open batches": (
        "leases",
        (
            "update lane set idle = true;"
            "update batch set created_at = created_at - interval '2 minutes'"
        ),
    ),
}


@pytest.mark.parametrize("what", PLANTED)
async def test_what_was_planted_is_found_with_an_example(
    pool: database.Pool, shop: Shop, what: str
) -> None:
    promise, statement = PLANTED[what]
    await pool.execute(statement)
    found = await broken(pool)
    assert promise in found
    assert found[promise]


async def test_a_receipt_for_an_id_of_another_account_is_no_fault(
    pool: database.Pool, shop: Shop
) -> None:
    await pool.execute(
        "insert into early_receipt (provider_id, account_id, state, received_at)"
        " select min(provider_id), 999, 30, clock_timestamp() - interval '2 minutes' from provider_message"
    )
    assert await broken(pool) == {}


async def test_what_is_being_done_just_now_is_no_fault(pool: database.Pool, shop: Shop) -> None:
    await pool.execute("update replica set gone_at = clock_timestamp()")
    await pool.execute("update lane set idle = true")
    await pool.execute(
        "insert into early_receipt (provider_id, state) select min(provider_id), 30 from provider_message"
    )
    assert await broken(pool) == {}
