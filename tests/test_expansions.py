"""Expansions: a chunk is all or nothing, is written by one replica, and leaves figures and money exact."""

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from shop import ACCEPTED, Shop, check_the_account, until_somebody_waits
from support import assert_sound, new_account, open_shop

from smsd import campaigns, credits, database, expansions, queue
from smsd.expansions import Chunk, Expansion, OutOfCredits, Rendered, Skipped
from smsd.model import Reason


@pytest.fixture
async def account(pool: database.Pool) -> int:
    return await new_account(pool)


@pytest.fixture
async def shop(pool: database.Pool, account: int) -> AsyncIterator[Shop]:
    yield await open_shop(pool, account, await queue.register(pool, "test", "0"))
    await assert_sound(pool)


def chunk(
    cursor: int, phones: range, *, skipped: int = 0, last: bool = False, segments: int = 1
) -> Chunk:
    """A chunk that reads these numbers, the last of which cannot be sent to."""
    sent = phones[: len(phones) - skipped]
    return Chunk(
        cursor,
        len(phones),
        last,
        [Rendered(phone, f"Hi {phone}", segments) for phone in sent],
        [Skipped(phone, Reason.OPTED_OUT, None) for phone in phones[len(sent) :]],
    )


async def claim(shop: Shop, replica_id: int | None = None) -> Expansion:
    expansion = await expansions.claim(shop.pool, replica_id or shop.replica_id)
    assert expansion is not None
    return expansion


async def ranges(pool: database.Pool, campaign_id: int) -> list[tuple[int, int, int, int]]:
    rows = await pool.fetch(
        "select first_id, last_id, n, segments from batch where campaign_id = $1 order by first_id",
        campaign_id,
    )
    return [(row["first_id"], row["last_id"], row["n"], row["segments"]) for row in rows]


# ------------------------------------------------------------------------------------------- chunks


async def test_a_chunk_writes_messages_batches_cursor_and_hold_at_once(shop: Shop) -> None:
    campaign_id = await shop.begin(20, batch_size=4, held=40)
    expansion = await claim(shop)
    assert (expansion.campaign_id, expansion.cursor, expansion.read) == (campaign_id, 0, 0)
    first = await expansions.commit(
        shop.pool, expansion, chunk(77, range(100, 111), skipped=1, segments=3), shop.replica_id
    )
    assert first
    assert await ranges(shop.pool, campaign_id) == [
        (first, first + 3, 4, 12), (first + 4, first + 7, 4, 12), (first + 8, first + 9, 2, 6),
    ]  # fmt: skip
    rows = await shop.pool.fetch("select * from message order by id")
    assert [row["id"] for row in rows] == list(range(first, first + 11))
    assert [row["phone"] for row in rows] == list(range(100, 111))
    assert [row["text"] for row in rows[:10]] == [f"Hi {phone}" for phone in range(100, 110)]
    assert (rows[10]["state"], rows[10]["reason"], rows[10]["text"]) == (50, "opted_out", None)
    after = await claim(shop)
    assert (after.cursor, after.read) == (77, 11)
    progress = await check_the_account(shop, campaign_id)
    assert (progress.totals.queued, progress.totals.skipped) == (10, 1)
    held = await shop.pool.fetchval("select held from expansion")
    assert held == 40 - 22, "eleven of twenty recipients had 22 of the 40 credits held"
    assert (await credits.balance(shop.pool, shop.id)).reserved == 18 + 30


async def test_the_last_chunk_gives_back_what_was_held_too_much(shop: Shop) -> None:
    campaign_id = await shop.begin(10, held=100)
    first, last = chunk(5, range(100, 105)), chunk(9, range(105, 109), skipped=4, last=True)
    for one in (first, last):
        await expansions.commit(shop.pool, await claim(shop), one, shop.replica_id)
    assert (await credits.balance(shop.pool, shop.id)).reserved == 5
    assert await expansions.claim(shop.pool, shop.replica_id) is None
    assert (await check_the_account(shop, campaign_id)).expanded


@pytest.mark.parametrize("of", [1, 7, 20, 1000])
async def test_the_hold_ends_exact_however_wrong_the_count_was(shop: Shop, of: int) -> None:
    campaign_id = await shop.begin(of, held=of)
    for i in range(5):
        one = chunk(i + 1, range(100 + 4 * i, 104 + 4 * i), segments=1 + i % 3, last=i == 4)
        await expansions.commit(shop.pool, await claim(shop), one, shop.replica_id)
        await check_the_account(shop, campaign_id)
    exact = 4 * (1 + 2 + 3 + 1 + 2)
    assert (await credits.balance(shop.pool, shop.id)).reserved == exact


async def test_an_audience_of_nobody_is_expanded_and_finished(shop: Shop) -> None:
    campaign_id = await shop.begin(3)
    one = Chunk(0, 0, last=True, rendered=[], skipped=[])
    assert await expansions.commit(shop.pool, await claim(shop), one, shop.replica_id) == 0
    assert (await credits.balance(shop.pool, shop.id)).reserved == 0
    assert await campaigns.finish(shop.pool) == [campaign_id]


async def test_a_number_that_the_campaign_has_already_is_left_out(shop: Shop) -> None:
    """A contact whose number moved to another contact while the audience was read; or twice in one chunk."""
    campaign_id = await shop.begin(9, held=9)
    await expansions.commit(
        shop.pool, await claim(shop), chunk(1, range(100, 104), skipped=1), shop.replica_id
    )
    again = chunk(2, range(102, 106), last=True)
    again.rendered.append(Rendered(105, "twice", 1))
    again.skipped.append(Skipped(104, Reason.MISSING_VALUE, None))
    again.skipped += [Skipped(None, Reason.INVALID_NUMBER, raw) for raw in ("abc", "abc")]
    await expansions.commit(shop.pool, await claim(shop), again, shop.replica_id)
    rows = await shop.pool.fetch("select phone, reason from message order by id")
    assert [tuple(row) for row in rows] == [
        (100, None), (101, None), (102, None), (103, "opted_out"), (104, None), (105, None),
        (None, "invalid_number"), (None, "invalid_number"),
    ]  # fmt: skip
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.queued, sums.skipped) == (5, 3)


# -------------------------------------------------------------------------------------- one writes it


async def test_of_two_replicas_that_read_the_same_chunk_one_writes_it(shop: Shop) -> None:
    campaign_id = await shop.begin(10)
    first = await claim(shop)
    await queue.leave(shop.pool, shop.replica_id, "thought dead")
    other = await queue.register(shop.pool, "other", "0")
    second = await claim(shop, other)
    assert (first.cursor, second.cursor) == (0, 0)
    same = chunk(5, range(100, 105))
    written = await asyncio.gather(
        expansions.commit(shop.pool, first, same, shop.replica_id),
        expansions.commit(shop.pool, second, same, other),
    )
    assert written[0] is None
    assert written[1] is not None
    assert (await check_the_account(shop, campaign_id)).totals.queued == 5


async def test_a_chunk_is_not_written_twice_by_who_heard_no_acknowledgement(shop: Shop) -> None:
    campaign_id = await shop.begin(10)
    expansion = await claim(shop)
    assert await expansions.commit(shop.pool, expansion, chunk(5, range(100, 105)), shop.replica_id)
    again = chunk(5, range(105, 110))
    assert await expansions.commit(shop.pool, expansion, again, shop.replica_id) is None
    await claim(shop)  # ours again, but further on
    assert await expansions.commit(shop.pool, expansion, again, shop.replica_id) is None
    assert (await check_the_account(shop, campaign_id)).totals.queued == 5


async def test_an_expansion_that_a_living_replica_reads_is_nobody_else_s(shop: Shop) -> None:
    await shop.begin(10)
    other = await queue.register(shop.pool, "other", "0")
    expansion = await claim(shop)
    assert await expansions.claim(shop.pool, other) is None
    await expansions.let_go(shop.pool, expansion, other)
    assert await expansions.claim(shop.pool, other) is None
    await expansions.let_go(shop.pool, expansion, shop.replica_id)
    assert await expansions.claim(shop.pool, other) is not None


async def test_sixteen_who_claim_at_once_share_expansions_without_waiting(
    shop: Shop, dsn: str
) -> None:
    for _ in range(10):
        await shop.begin(5)
    wide = await database.open_pool(dsn, 16)
    replicas = [await queue.register(shop.pool, f"replica {i}", "0") for i in range(16)]
    claimed = await asyncio.gather(*(expansions.claim(wide, one) for one in replicas))
    await wide.close()
    taken = [one.campaign_id for one in claimed if one is not None]
    assert len(taken) == len(set(taken))


async def test_a_chunk_that_breaks_off_leaves_no_trace_and_is_read_again(
    shop: Shop, connection: database.Connection
) -> None:
    """Postgres ends the session after the messages are in, before the money is moved."""
    campaign_id = await shop.begin(10, held=10)
    expansion = await claim(shop)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("select from credit where tenant_id = $1 for update", shop.id)
    one = chunk(10, range(100, 110), segments=2, last=True)
    writing = asyncio.create_task(expansions.commit(shop.pool, expansion, one, shop.replica_id))
    await until_somebody_waits(shop.pool)
    await connection.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and wait_event_type = 'Lock'"
    )
    with pytest.raises(database.AWAY):
        await writing
    await transaction.commit()
    assert (await check_the_account(shop, campaign_id)).totals.total == 0
    assert await expansions.commit(shop.pool, await claim(shop), one, shop.replica_id)
    assert (await check_the_account(shop, campaign_id)).totals.queued == 10


async def test_a_chunk_read_before_a_cancel_is_dropped(shop: Shop) -> None:
    campaign_id = await shop.begin(10, held=25)
    await expansions.commit(
        shop.pool, await claim(shop), chunk(5, range(100, 105)), shop.replica_id
    )
    expansion = await claim(shop)
    await shop.act(campaign_id, campaigns.cancel)
    late = chunk(10, range(105, 110), last=True)
    assert await expansions.commit(shop.pool, expansion, late, shop.replica_id) is None
    assert (await credits.balance(shop.pool, shop.id)).reserved == 0
    assert (await check_the_account(shop, campaign_id)).totals.cancelled == 5


async def test_a_cancel_that_meets_a_chunk_being_written_takes_all_of_it_back(
    shop: Shop, connection: database.Connection
) -> None:
    campaign_id = await shop.begin(10, held=25)
    expansion = await claim(shop)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("select from credit where tenant_id = $1 for update", shop.id)
    writing = asyncio.create_task(
        expansions.commit(shop.pool, expansion, chunk(5, range(100, 105)), shop.replica_id)
    )
    await until_somebody_waits(shop.pool)
    cancelling = asyncio.create_task(shop.act(campaign_id, campaigns.cancel))
    await transaction.commit()
    await asyncio.gather(writing, cancelling)
    assert (await credits.balance(shop.pool, shop.id)).reserved == 0
    assert (await check_the_account(shop, campaign_id)).totals.queued == 0
    assert await shop.claim() == []


# -------------------------------------------------------------------------------------------- credits


async def test_a_chunk_beyond_the_credits_is_not_written_and_pauses_until_a_top_up(
    pool: database.Pool, account: int, shop: Shop
) -> None:
    poor = await open_shop(pool, account, shop.replica_id, granted=10)
    campaign_id = await poor.begin(10, held=10)
    expansion = await claim(poor)
    one = chunk(10, range(100, 110), segments=3, last=True)
    with pytest.raises(OutOfCredits, match="10 messages needs 30 credits") as short:
        await expansions.commit(pool, expansion, one, poor.replica_id)
    assert short.value.available == 0
    assert await credits.balance(pool, poor.id) == (10, 10)
    await expansions.let_go(pool, expansion, poor.replica_id)
    await expansions.pause_for_credits(pool, expansion, short.value)
    campaign = (await poor.progress(campaign_id)).campaign
    assert (campaign.status, campaign.paused_reason) == ("paused", "INSUFFICIENT_CREDITS")
    assert await expansions.claim(pool, poor.replica_id) is None
    async with pool.acquire() as connection, connection.transaction():
        await credits.grant(connection, poor.id, 20, "top-up")
    assert await expansions.commit(pool, await claim(poor), one, poor.replica_id)
    assert await credits.balance(pool, poor.id) == (30, 30)


async def test_chunks_of_many_campaigns_never_overdraw_a_tenant(
    pool: database.Pool, account: int, shop: Shop, dsn: str
) -> None:
    poor = await open_shop(pool, account, shop.replica_id, granted=100)
    for _ in range(20):
        await poor.begin(5, held=2)
    claimed = [await claim(poor, await queue.register(pool, f"{i}", "0")) for i in range(20)]
    owners = {row["campaign_id"]: row["owner"] for row in await pool.fetch("table expansion")}
    wide = await database.open_pool(dsn, 20)

    async def write(expansion: Expansion) -> bool:
        one = chunk(5, range(100, 105), segments=2, last=True)
        try:
            await expansions.commit(wide, expansion, one, owners[expansion.campaign_id])
        except OutOfCredits:
            return False
        return True

    written = await asyncio.gather(*map(write, claimed))
    await wide.close()
    balance = await credits.balance(pool, poor.id)
    assert balance.reserved == 10 * sum(written) + 2 * (20 - sum(written))
    assert balance.reserved <= 100
    assert sum(written) == 7, "7 x 10 and 13 x 2 held make 96; an eighth would need 104"


# -------------------------------------------------------------------------------------------- fairness


async def test_the_tenant_least_recently_served_is_next(
    pool: database.Pool, account: int, shop: Shop
) -> None:
    other = await open_shop(pool, account, shop.replica_id)
    many = [await shop.begin(100) for _ in range(3)]
    one = await other.begin(100)
    turns = []
    for i in range(8):
        expansion = await claim(shop)
        turns.append(expansion.campaign_id)
        phones = range(1_000 + 5 * i, 1_005 + 5 * i)
        await expansions.commit(
            pool, expansion, chunk(expansion.cursor + 5, phones), shop.replica_id
        )
    assert turns.count(one) == 4
    assert {turns.count(campaign_id) for campaign_id in many} <= {1, 2}
    assert all((before == one) != (after == one) for before, after in pairwise(turns))


async def test_a_tenant_that_comes_later_does_not_wait_for_what_is_there(
    pool: database.Pool, account: int, shop: Shop
) -> None:
    await shop.begin(1_000)
    for i in range(3):
        expansion = await claim(shop)
        phones = range(1_000 + 5 * i, 1_005 + 5 * i)
        await expansions.commit(
            pool, expansion, chunk(expansion.cursor + 5, phones), shop.replica_id
        )
    other = await open_shop(pool, account, shop.replica_id)
    late = await other.begin(5)
    assert (await claim(shop)).campaign_id == late


async def test_messages_of_chunks_written_at_once_have_ids_without_gaps_inside_each(
    pool: database.Pool, shop: Shop
) -> None:
    ids = await asyncio.gather(
        *(pool.fetchval("select take_message_ids($1)", n) for n in (7, 1, 100, 3, 50, 2) * 5)
    )
    taken = [
        number
        for first, n in zip(ids, (7, 1, 100, 3, 50, 2) * 5, strict=True)
        for number in range(first, first + n)
    ]
    assert len(set(taken)) == len(taken)
    await shop.sending(5)
    await shop.send_all(ACCEPTED)
