"""Receipts: whatever comes, in whatever order and however often, the end is the same; what is answered is durable."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from itertools import permutations, product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shop import ACCEPTED, REFUSED, Shop, check_the_account, until_somebody_waits
from support import assert_sound, new_account, open_shop

from smsd import database, queue
from smsd.mitto import ItemResult
from smsd.model import MessageState
from smsd.queue import ReceiptRow
from smsd.receipts import WAITING_MOST, Full, Inbox

ENROUTE, FAILED, DELIVERED = 11, 20, 30
AT = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
async def account(pool: database.Pool) -> int:
    return await new_account(pool)


@pytest.fixture
async def shop(pool: database.Pool, account: int) -> AsyncIterator[Shop]:
    yield await open_shop(pool, account, await queue.register(pool, "test", "0"))
    await assert_sound(pool)


@pytest.fixture
async def inbox(pool: database.Pool) -> AsyncIterator[Inbox]:
    inbox = Inbox(pool)
    task = asyncio.create_task(inbox.run())
    yield inbox
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def receipt(
    provider_id: str, state: int, account: int | None = None, description: str | None = None
) -> ReceiptRow:
    return ReceiptRow(account, provider_id, state, AT, description)


async def accepted(shop: Shop, count: int, batch_size: int = 100) -> list[str]:
    """A campaign that Mitto took; the ids that it gave, in the order of the messages."""
    campaign_id = await shop.sending(count, batch_size=batch_size)
    await shop.send_all(ACCEPTED)
    rows = await shop.pool.fetch(
        "select provider_id from message where campaign_id = $1 order by id", campaign_id
    )
    return [row["provider_id"] for row in rows]


async def states(pool: database.Pool, ids: list[str]) -> list[int]:
    rows = await pool.fetch(
        "select provider_id, state from message where provider_id = any ($1)", ids
    )
    found = {row["provider_id"]: row["state"] for row in rows}
    return [found[one] for one in ids]


def end_of(seen: tuple[int, ...]) -> int:
    """What the contract says of a set of receipts."""
    if DELIVERED in seen:
        return DELIVERED
    if FAILED in seen:
        return FAILED
    return max((int(ACCEPTED), *seen))


# ------------------------------------------------------------------------- a function of the set


SEQUENCES = [
    sequence
    for length in range(1, 5)
    for sequence in product((ENROUTE, FAILED, DELIVERED), repeat=length)
]


@pytest.mark.parametrize("how", ["one by one", "all at once", "half before the result"])
async def test_every_order_of_up_to_four_receipts_ends_where_their_set_says(
    pool: database.Pool, shop: Shop, how: str
) -> None:
    count = len(SEQUENCES)
    campaign_id = await shop.sending(count, batch_size=count)
    ((grant, intent),) = await shop.post()
    ids = [f"id-{i}" for i in range(count)]
    answer = [
        ItemResult(message_id, MessageState.ACCEPTED, one, None)
        for message_id, one in zip(intent.ids, ids, strict=True)
    ]

    async def receive(*places: int) -> None:
        rows = [
            receipt(one, sequence[place])
            for one, sequence in zip(ids, SEQUENCES, strict=True)
            for place in places
            if place < len(sequence)
        ]
        await queue.apply_receipts(pool, rows)
        await check_the_account(shop, campaign_id)

    early = (0, 1) if how == "half before the result" else ()
    if early:
        await receive(*early)
    await queue.settle_items(pool, grant.batch_id, intent.attempt, answer, None, 200)
    await queue.rejoin_receipts(pool, ids)
    late = [place for place in range(4) if place not in early]
    if how == "all at once":
        await receive(*late)
    else:
        for place in late:
            await receive(place)
    assert await states(pool, ids) == [end_of(sequence) for sequence in SEQUENCES]
    assert await pool.fetchval("select count(*) from early_receipt") == 0


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
async def test_receipts_in_any_grouping_come_to_the_same(
    pool: database.Pool, shop: Shop, data: st.DataObject
) -> None:
    ids = await accepted(shop, 6)
    sent = data.draw(
        st.lists(
            st.tuples(st.sampled_from(ids), st.sampled_from((ENROUTE, FAILED, DELIVERED))),
            min_size=1,
            max_size=20,
        )
    )
    rest = list(sent)
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        group, rest = rest[:cut], rest[cut:]
        await queue.apply_receipts(pool, [receipt(*one) for one in group])
    expected = [end_of(tuple(state for one, state in sent if one == own)) for own in ids]
    assert await states(pool, ids) == expected


@pytest.mark.parametrize("order", list(permutations((ENROUTE, FAILED, DELIVERED))))
async def test_receipts_for_one_message_at_the_same_time_come_to_the_same(
    pool: database.Pool, shop: Shop, order: tuple[int, ...]
) -> None:
    ids = await accepted(shop, 40)
    await asyncio.gather(
        *(queue.apply_receipts(pool, [receipt(one, state) for one in ids]) for state in order),
        *(queue.apply_receipts(pool, [receipt(one, order[0])]) for one in ids[:10]),
    )
    assert await states(pool, ids) == [DELIVERED] * 40


async def test_delivered_after_failed_takes_the_failure_back(
    pool: database.Pool, shop: Shop
) -> None:
    campaign_id = await shop.sending(1)
    await shop.send_all(ACCEPTED)
    one = await pool.fetchval("select provider_id from message")
    await queue.apply_receipts(pool, [receipt(one, FAILED, description="Absent subscriber")])
    row = await pool.fetchrow("select reason, detail, finished_at from message")
    assert row is not None
    assert tuple(row) == ("delivery_failed", "Absent subscriber", AT)
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.delivered, sums.delivery_failed) == (0, 0, 1)
    await queue.apply_receipts(pool, [receipt(one, DELIVERED)])
    row = await pool.fetchrow("select reason, detail, state from message")
    assert row is not None
    assert tuple(row) == (None, None, DELIVERED)
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.delivered, sums.delivery_failed) == (0, 1, 0)
    await queue.apply_receipts(pool, [receipt(one, FAILED), receipt(one, ENROUTE)])
    assert await states(pool, [one]) == [DELIVERED]


async def test_receipts_of_single_messages_move_no_campaign(
    pool: database.Pool, shop: Shop
) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await queue.add_message(connection, shop.id, shop.account_id, 306900000001, "x", "S", 1)
    await shop.send_all(ACCEPTED)
    one = await pool.fetchval("select provider_id from message")
    assert await queue.apply_receipts(pool, [receipt(one, DELIVERED)]) == (1, 0)
    assert await pool.fetchval("select count(*) from campaign_counter") == 0


async def test_what_mitto_refused_is_not_changed_by_a_receipt(
    pool: database.Pool, shop: Shop
) -> None:
    await shop.sending(2)
    await shop.send_all(ACCEPTED, REFUSED)
    one = await pool.fetchval("select provider_id from message where provider_id is not null")
    assert await queue.apply_receipts(
        pool, [receipt("P-unknown", DELIVERED), receipt(one, ENROUTE)]
    ) == (1, 1)
    rows = await pool.fetch("select state from message order by id")
    assert [row["state"] for row in rows] == [ENROUTE, 40]


# --------------------------------------------------------------------------------------- whose ids


async def test_an_account_s_webhook_touches_no_other_account_s_message(
    pool: database.Pool, account: int, shop: Shop
) -> None:
    other = await open_shop(pool, await new_account(pool, "second"), shop.replica_id)
    ours, theirs = await accepted(shop, 1), await accepted(other, 1)
    moved = await queue.apply_receipts(
        pool, [receipt(theirs[0], DELIVERED, account), receipt(ours[0], DELIVERED, account)]
    )
    assert moved == (1, 1)
    assert await states(pool, ours + theirs) == [DELIVERED, int(ACCEPTED)]
    await queue.rejoin_receipts(pool, None)
    assert await states(pool, theirs) == [int(ACCEPTED)]
    assert await queue.apply_receipts(pool, [receipt(theirs[0], FAILED)]) == (1, 0)
    assert await states(pool, theirs) == [FAILED]


# ---------------------------------------------------------------------------------- before the result


async def test_a_receipt_and_the_result_it_belongs_to_never_miss_each_other(
    pool: database.Pool, shop: Shop, inbox: Inbox
) -> None:
    """Both look before the other has committed, in one of many orders, two hundred times."""
    await shop.sending(200, batch_size=1)
    dice = random.Random(1)

    async def settle(batch_id: int, message_id: int) -> None:
        await asyncio.sleep(dice.random() * 0.002)
        item = ItemResult(message_id, MessageState.ACCEPTED, f"id-{message_id}", None)
        await queue.settle_items(pool, batch_id, 1, [item], None, 200)
        await queue.rejoin_receipts(pool, [f"id-{message_id}"])

    async def receive(message_id: int) -> None:
        await asyncio.sleep(dice.random() * 0.002)
        await inbox.put([receipt(f"id-{message_id}", DELIVERED)])

    while posted := await shop.post(8):
        await asyncio.gather(
            *(settle(grant.batch_id, intent.ids[0]) for grant, intent in posted),
            *(receive(intent.ids[0]) for _, intent in posted),
        )
    rows = await pool.fetch("select state, count(*) as n from message group by state")
    assert [tuple(row) for row in rows] == [(DELIVERED, 200)]
    assert await pool.fetchval("select count(*) from early_receipt") == 0


async def test_a_receipt_that_both_missed_is_found_by_the_look_at_all(
    pool: database.Pool, shop: Shop
) -> None:
    await shop.sending(2, batch_size=2)
    ((grant, intent),) = await shop.post()
    assert await queue.apply_receipts(
        pool, [receipt("early", FAILED), receipt("early", DELIVERED)]
    ) == (0, 1)
    answer = [
        ItemResult(message_id, MessageState.ACCEPTED, one, None)
        for message_id, one in zip(intent.ids, ("early", "later"), strict=True)
    ]
    await queue.settle_items(pool, grant.batch_id, 1, answer, None, 200)
    assert await queue.rejoin_receipts(pool, ["later"]) == 0
    assert await queue.rejoin_receipts(pool, None) == 1
    assert await queue.rejoin_receipts(pool, None) == 0
    assert await states(pool, ["early", "later"]) == [DELIVERED, int(ACCEPTED)]


# ------------------------------------------------------------------------------------- group commit


async def test_nothing_is_answered_before_it_is_durable(
    pool: database.Pool, shop: Shop, inbox: Inbox, connection: database.Connection
) -> None:
    ids = await accepted(shop, 3)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("select from message where provider_id = $1 for update", ids[0])
    waiting = [asyncio.create_task(inbox.put([receipt(one, DELIVERED)])) for one in ids]
    await until_somebody_waits(pool)
    assert not any(task.done() for task in waiting)
    await transaction.commit()
    await asyncio.gather(*waiting)
    fresh = await connection.fetch("select state from message")
    assert [row["state"] for row in fresh] == [DELIVERED] * 3


async def test_what_gathers_while_a_group_is_written_is_written_as_the_next(
    pool: database.Pool, shop: Shop, inbox: Inbox, connection: database.Connection
) -> None:
    ids = await accepted(shop, 300)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("select from message where provider_id = $1 for update", ids[0])
    first = asyncio.create_task(inbox.put([receipt(ids[0], DELIVERED)]))
    await until_somebody_waits(pool)
    before = await pool.fetchval("select pg_current_xact_id()::text::bigint")
    rest = [asyncio.create_task(inbox.put([receipt(one, DELIVERED)])) for one in ids[1:]]
    await transaction.commit()
    await asyncio.gather(first, *rest)
    after = await pool.fetchval("select pg_current_xact_id()::text::bigint")
    assert await states(pool, ids) == [DELIVERED] * 300
    assert after - before <= 4, "299 receipts took a transaction or two, not one each"


async def test_when_postgres_goes_away_everybody_hears_of_it_and_nothing_is_lost_once_repeated(
    pool: database.Pool, shop: Shop, inbox: Inbox, connection: database.Connection
) -> None:
    ids = await accepted(shop, 20)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("select from message where provider_id = $1 for update", ids[0])
    waiting = [asyncio.create_task(inbox.put([receipt(one, DELIVERED)])) for one in ids]
    await until_somebody_waits(pool)
    await connection.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and wait_event_type = 'Lock'"
    )
    heard = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(one, database.AWAY) for one in heard)
    await transaction.rollback()
    assert await states(pool, ids) == [int(ACCEPTED)] * 20
    await asyncio.gather(*(inbox.put([receipt(one, DELIVERED)]) for one in ids))
    assert await states(pool, ids) == [DELIVERED] * 20


async def test_a_receipt_that_postgres_will_not_take_is_kept_raw_and_the_others_are_applied(
    pool: database.Pool, shop: Shop, inbox: Inbox, account: int
) -> None:
    ids = await accepted(shop, 3)
    bad = receipt(ids[1], FAILED, account, "Absent\x00subscriber")
    await asyncio.gather(
        inbox.put([receipt(ids[0], DELIVERED)]),
        inbox.put([bad]),
        inbox.put([receipt(ids[2], FAILED)]),
    )
    assert await states(pool, ids) == [DELIVERED, int(ACCEPTED), FAILED]
    rows = await pool.fetch("select account_id, body, why from raw_receipt")
    assert [(row["account_id"], row["why"]) for row in rows] == [(account, "cannot be stored")]
    assert ids[1] in rows[0]["body"]
    assert "subscriber" in rows[0]["body"]


async def test_a_caller_that_goes_away_takes_nobody_else_s_receipts_along(
    pool: database.Pool, shop: Shop, inbox: Inbox, connection: database.Connection
) -> None:
    ids = await accepted(shop, 3)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("select from message where provider_id = $1 for update", ids[0])
    first, second = [asyncio.create_task(inbox.put([receipt(one, DELIVERED)])) for one in ids[:2]]
    await until_somebody_waits(pool)
    first.cancel()
    third = asyncio.create_task(inbox.put([receipt(ids[2], DELIVERED)]))
    await transaction.commit()
    await asyncio.gather(second, third)
    assert await states(pool, ids) == [DELIVERED] * 3


async def test_no_more_wait_than_memory_should_hold(pool: database.Pool) -> None:
    inbox = Inbox(pool)  # nobody writes
    many = [receipt(f"id-{i}", DELIVERED) for i in range(WAITING_MOST + 1)]
    waiting = asyncio.create_task(inbox.put(many))
    await asyncio.sleep(0)
    with pytest.raises(Full):
        await inbox.put([receipt("one more", DELIVERED)])
    assert await inbox.put([]) == 0
    waiting.cancel()


async def test_ten_thousand_in_one_call_on_tables_that_were_never_analysed(
    pool: database.Pool, shop: Shop, inbox: Inbox
) -> None:
    ids = await accepted(shop, 10_000, batch_size=500)
    random.Random(1).shuffle(ids)
    started = time.monotonic()
    moved = await inbox.put([receipt(one, DELIVERED) for one in ids])
    assert moved == 10_000
    assert time.monotonic() - started < 5, "as long as it takes if the tables are read whole"
    assert await pool.fetchval("select sum(delivered) from campaign_counter") == 10_000
