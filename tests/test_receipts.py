"""Receipts: whatever comes, in whatever order and however often, the end is the same; what is answered is durable."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import permutations, product
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shop import (
    ACCEPTED,
    LOCK_MESSAGE,
    REFUSED,
    Shop,
    check_the_account,
    until_somebody_waits,
    until_waited_for,
)
from structlog.testing import capture_logs
from support import assert_sound, new_account, open_shop
from system.harness import Installation

from smsd import campaigns, database, queue, receipts
from smsd.mitto import ItemResult
from smsd.model import MessageState
from smsd.queue import RawReceipt, ReceiptRow
from smsd.receipts import NO_MESSAGE, REPLAYED_AT_ONCE, WAITING_MOST, Full, Inbox, Replay
from smsd.simulator import Simulator

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
        "select provider_id from message_shown where campaign_id = $1 order by id", campaign_id
    )
    return [row["provider_id"] for row in rows]


async def states(pool: database.Pool, ids: list[str]) -> list[int]:
    rows = await pool.fetch(
        "select provider_id, own_state as state from message_shown where provider_id = any ($1)",
        ids,
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
    await queue.settle_items(
        pool, grant.batch_id, intent.attempt, queue.Answer.of(answer, None, 200)
    )
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


@pytest.mark.parametrize(
    ("first", "second", "moved", "ends"),
    [
        (ENROUTE, DELIVERED, 1, DELIVERED), (FAILED, DELIVERED, 1, DELIVERED),
        (DELIVERED, DELIVERED, 0, DELIVERED), (FAILED, ENROUTE, 0, FAILED),
    ],
)  # fmt: skip
async def test_a_receipt_that_waited_for_another_one_counts_from_where_that_left_off(
    pool: database.Pool, shop: Shop, connection: database.Connection,
    first: int, second: int, moved: int, ends: int,
) -> None:  # fmt: skip
    """Of one message; the group has others as well, before and after it."""
    campaign_id = await shop.sending(3)
    await shop.send_all(*[ACCEPTED] * 3)
    ids = [
        row["provider_id"] for row in await pool.fetch("select * from message_shown order by id")
    ]
    transaction = connection.transaction()
    await transaction.start()
    await queue.apply_receipts(connection, [receipt(ids[1], first)])
    waits = asyncio.create_task(
        queue.apply_receipts(pool, [receipt(one, second) for one in reversed(ids)])
    )
    await until_waited_for(pool, connection)
    await transaction.commit()
    assert await waits == (2 + moved, 0)
    assert await states(pool, ids) == [second, ends, second]
    await check_the_account(shop, campaign_id)


async def test_delivered_after_failed_takes_the_failure_back(
    pool: database.Pool, shop: Shop
) -> None:
    campaign_id = await shop.sending(1)
    await shop.send_all(ACCEPTED)
    one = await pool.fetchval("select provider_id from message_shown")
    await queue.apply_receipts(pool, [receipt(one, FAILED, description="Absent subscriber")])
    row = await pool.fetchrow("select reason, detail, finished_at from message")
    assert row is not None
    assert tuple(row) == ("delivery_failed", "Absent subscriber", AT)
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.delivered, sums.delivery_failed) == (0, 0, 1)
    await queue.apply_receipts(pool, [receipt(one, DELIVERED)])
    row = await pool.fetchrow("select reason, detail, own_state as state from message_shown")
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
    one = await pool.fetchval("select provider_id from message_shown")
    assert await queue.apply_receipts(pool, [receipt(one, DELIVERED)]) == (1, 0)
    assert await pool.fetchval("select count(*) from campaign_counter") == 0


async def test_what_mitto_refused_is_not_changed_by_a_receipt(
    pool: database.Pool, shop: Shop
) -> None:
    await shop.sending(2)
    await shop.send_all(ACCEPTED, REFUSED)
    one = await pool.fetchval("select provider_id from message_shown where provider_id is not null")
    assert await queue.apply_receipts(
        pool, [receipt("P-unknown", DELIVERED), receipt(one, ENROUTE)]
    ) == (1, 1)
    rows = await pool.fetch("select own_state as state from message_shown order by id")
    assert [row["state"] for row in rows] == [ENROUTE, 40]


@pytest.mark.parametrize("place", [0, 1])
async def test_of_receipts_for_one_message_by_two_webhooks_in_one_call_the_furthest_counts(
    pool: database.Pool, account: int, shop: Shop, place: int
) -> None:
    """One that names the account and one that names nobody are about the same message."""
    ids = await accepted(shop, 20)
    both = [(FAILED, None), (DELIVERED, account)]
    if place:
        both = [(DELIVERED, None), (FAILED, account)]
    rows = [receipt(one, state, whose) for one in ids for state, whose in both]
    random.Random(place).shuffle(rows)
    assert await queue.apply_receipts(pool, rows) == (20, 0)
    assert await states(pool, ids) == [DELIVERED] * 20
    assert await pool.fetchval("select sum(delivered) from campaign_counter") == 20


@pytest.mark.parametrize("place", [0, 1])
async def test_of_two_that_say_the_same_the_earlier_time_is_kept(
    pool: database.Pool, account: int, shop: Shop, place: int
) -> None:
    ids = await accepted(shop, 10)
    whose = [(AT, None), (AT + timedelta(seconds=9), account)]
    if place:
        whose = [(AT + timedelta(seconds=9), None), (AT, account)]
    rows = [
        ReceiptRow(one, provider_id, DELIVERED, at + later, None)
        for provider_id in ids
        for at, one in whose
        for later in (timedelta(seconds=1), timedelta())
    ]
    await queue.apply_receipts(pool, rows)
    ends = await pool.fetch("select distinct finished_at from message")
    assert [row["finished_at"] for row in ends] == [AT]


async def test_messages_of_a_cancelled_campaign_take_their_receipts(
    pool: database.Pool, shop: Shop
) -> None:
    campaign_id = await shop.sending(10, batch_size=5)
    ((grant, intent),) = await shop.post()
    await shop.answer(grant, intent, ACCEPTED)
    await shop.act(campaign_id, campaigns.cancel)
    rows = await pool.fetch("select provider_id from message_shown where provider_id is not null")
    ids = [row["provider_id"] for row in rows]
    moved = await queue.apply_receipts(pool, [receipt(one, DELIVERED) for one in ids])
    assert moved == (5, 0)
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.delivered, sums.cancelled) == (5, 5)


async def test_a_receipt_for_an_unknown_message_waits_and_decides_once_its_id_is_known(
    pool: database.Pool, shop: Shop
) -> None:
    campaign_id = await shop.sending(2, batch_size=2)
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(pool, grant.batch_id, intent.attempt, "unknown", "unknown")
    assert await queue.apply_receipts(pool, [receipt("late", DELIVERED)]) == (0, 1)
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.unknown, sums.delivered) == (2, 0)
    answer = [
        ItemResult(message_id, MessageState.ACCEPTED, one, None)
        for message_id, one in zip(intent.ids, ("late", "later"), strict=True)
    ]
    await queue.settle_items(
        pool, grant.batch_id, intent.attempt, queue.Answer.of(answer, None, 200)
    )
    assert await queue.rejoin_receipts(pool, ["late", "later"]) == 1
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.unknown, sums.delivered, sums.pending) == (0, 1, 1)


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
    moved = await queue.apply_receipts(
        pool, [receipt(theirs[0], DELIVERED, account), receipt(ours[0], ENROUTE, account)]
    )
    assert moved == (0, 0)
    assert await states(pool, ours + theirs) == [DELIVERED, FAILED]


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
        await queue.settle_items(pool, batch_id, 1, queue.Answer.of([item], None, 200))
        await queue.rejoin_receipts(pool, [f"id-{message_id}"])

    async def receive(message_id: int) -> None:
        await asyncio.sleep(dice.random() * 0.002)
        await inbox.put([receipt(f"id-{message_id}", DELIVERED)])

    while posted := await shop.post(8):
        await asyncio.gather(
            *(settle(grant.batch_id, intent.ids[0]) for grant, intent in posted),
            *(receive(intent.ids[0]) for _, intent in posted),
        )
    rows = await pool.fetch(
        "select own_state as state, count(*) as n from message_shown group by 1"
    )
    assert [tuple(row) for row in rows] == [(DELIVERED, 200)]
    assert await pool.fetchval("select count(*) from early_receipt") == 0


async def test_a_receipt_that_its_result_missed_looks_again_once_it_is_committed(
    pool: database.Pool, shop: Shop, inbox: Inbox, connection: database.Connection
) -> None:
    """Its transaction began before the result was there, and the result looked before it was committed."""
    (known,) = await accepted(shop, 1)
    await shop.sending(1)
    ((grant, intent),) = await shop.post()
    async with connection.transaction():
        await connection.execute(LOCK_MESSAGE, known)
        putting = asyncio.create_task(
            inbox.put([receipt(known, ENROUTE), receipt("missed", DELIVERED)])
        )
        await until_somebody_waits(pool)
        item = ItemResult(intent.ids[0], MessageState.ACCEPTED, "missed", None)
        await queue.settle_items(
            pool, grant.batch_id, intent.attempt, queue.Answer.of([item], None, 200)
        )
        assert await queue.rejoin_receipts(pool, ["missed"]) == 0
    assert await putting == 2
    assert await states(pool, [known, "missed"]) == [ENROUTE, DELIVERED]


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
    await queue.settle_items(pool, grant.batch_id, 1, queue.Answer.of(answer, None, 200))
    assert await queue.rejoin_receipts(pool, ["later"]) == 0
    assert await queue.rejoin_receipts(pool, None) == 1
    assert await queue.rejoin_receipts(pool, None) == 0
    assert await states(pool, ["early", "later"]) == [DELIVERED, int(ACCEPTED)]


async def test_an_early_receipt_that_comes_again_is_kept_once(pool: database.Pool) -> None:
    early = "select account_id, state from early_receipt order by id"
    await queue.apply_receipts(pool, [receipt("x", FAILED)])
    for again in (receipt("x", FAILED), receipt("x", ENROUTE)):
        assert await queue.apply_receipts(pool, [again]) == (0, 0)
    assert await queue.apply_receipts(pool, [receipt("x", DELIVERED)]) == (0, 1)
    assert await queue.apply_receipts(pool, [receipt("x", FAILED, 7)]) == (0, 1)
    rows = await pool.fetch(early)
    assert [tuple(row) for row in rows] == [(None, FAILED), (None, DELIVERED), (7, FAILED)]


async def test_the_mark_of_early_receipts_moves_with_each_whether_or_not_it_is_committed_or_still_there(
    pool: database.Pool,
) -> None:
    shop = await open_shop(pool, await new_account(pool), await queue.register(pool, "test", "0"))

    async def mark() -> int:
        """As an intent and its answer tell it."""
        await shop.sending(1)
        ((grant, intent),) = await shop.post()
        answer = queue.Answer.of(
            [ItemResult(intent.ids[0], ACCEPTED, f"mark {intent.ids[0]}", None)], None, 200
        )
        written = await queue.settle(pool, grant.batch_id, intent.attempt, answer)
        assert written == (True, intent.early_mark)
        return written.early_mark

    marks = [await mark()]
    async with pool.acquire() as db:
        transaction = db.transaction()
        await transaction.start()
        await queue.apply_receipts(db, [receipt("a", DELIVERED)])
        marks.append(await mark())
        await transaction.rollback()
    await queue.apply_receipts(pool, [receipt("b", DELIVERED)])
    marks.append(await mark())
    await pool.execute("delete from early_receipt")
    await queue.apply_receipts(pool, [receipt("c", DELIVERED)])
    marks.append(await mark())
    assert marks == sorted(set(marks))


async def test_early_receipts_that_came_and_went_cost_the_next_ones_nothing(
    pool: database.Pool,
) -> None:
    """While a snapshot is held, their old versions stay in every index; what the planner sees is an empty table."""
    await pool.execute("analyze early_receipt")
    read = (
        "select sum(pg_stat_get_xact_tuples_returned(indexrelid))::int from pg_index"
        " where indrelid = 'early_receipt'::regclass"
    )
    async with pool.acquire() as holder, holder.transaction(isolation="repeatable_read"):
        await holder.fetchval("select count(*) from early_receipt")
        async with pool.acquire() as db:
            for k in range(20):
                ids = [f"{k} {i}" for i in range(50)]
                await queue.apply_receipts(db, [receipt(one, DELIVERED) for one in ids])
                await db.execute(
                    "insert into provider_message select unnest($1::text[]), 1, 1, 1", ids
                )
                await queue.rejoin_receipts(db, ids)
            assert await db.fetchval("select count(*) from early_receipt") == 0
            async with db.transaction():
                new = [receipt(f"new {i}", DELIVERED) for i in range(10)]
                before = await db.fetchval(read)
                assert await queue.apply_receipts(db, new) == (0, 10)
                assert await queue.rejoin_receipts(db, [one.provider_id for one in new]) == 0
                assert await db.fetchval(read) - before <= 3 * len(new)


# ------------------------------------------------------------------------------ what nobody asks for


AGE = "update early_receipt set received_at = clock_timestamp() - $1::interval"


async def known_too_late(shop: Shop, one: str, age: timedelta) -> None:
    """A receipt of that age whose message has just become known, and nobody has looked since."""
    await shop.sending(1)
    ((grant, intent),) = await shop.post()
    await queue.apply_receipts(shop.pool, [receipt(one, DELIVERED)])
    await shop.pool.execute(AGE, age)
    item = ItemResult(intent.ids[0], MessageState.ACCEPTED, one, None)
    await queue.settle_items(
        shop.pool, grant.batch_id, intent.attempt, queue.Answer.of([item], None, 200)
    )


async def test_every_round_looks_at_the_receipts_of_the_last_minute_and_the_sweep_at_all(
    pool: database.Pool, shop: Shop
) -> None:
    await known_too_late(shop, "fresh", timedelta(seconds=50))
    assert await queue.rejoin_receipts(pool, None) == 1
    await known_too_late(shop, "old", timedelta(seconds=70))
    assert await queue.rejoin_receipts(pool, None) == 0
    swept = await queue.sweep_early_receipts(pool, 0, 10)
    assert (swept.joined, swept.given_up) == (1, 0)
    assert await states(pool, ["fresh", "old"]) == [DELIVERED] * 2


async def test_the_sweep_walks_through_all_a_slice_at_a_time(pool: database.Pool) -> None:
    await queue.apply_receipts(pool, [receipt(f"id-{i}", DELIVERED) for i in range(25)])
    ids = [row["id"] for row in await pool.fetch("select id from early_receipt order by id")]
    seen, after_id = list[int | None](), 0
    while (swept := await queue.sweep_early_receipts(pool, after_id, 10)).last_id is not None:
        after_id = swept.last_id
        seen.append(after_id)
    assert seen == [ids[9], ids[19], ids[24]]


async def test_a_receipt_without_a_message_goes_to_the_raw_inbox_after_a_day(
    pool: database.Pool, account: int
) -> None:
    await queue.apply_receipts(
        pool, [receipt("a", DELIVERED, account), receipt("b", FAILED, None, "Absent"), receipt("c", ENROUTE)]
    )  # fmt: skip
    await pool.execute(AGE, timedelta(hours=23))
    assert (await queue.sweep_early_receipts(pool, 0, 10)).given_up == 0
    await pool.execute(AGE, timedelta(hours=25))
    await queue.apply_receipts(pool, [receipt("young", DELIVERED)])
    assert (await queue.sweep_early_receipts(pool, 0, 10)).given_up == 3
    left = await pool.fetch("select provider_id from early_receipt")
    assert [row["provider_id"] for row in left] == ["young"]
    rows = await pool.fetch(
        "select account_id, body::json as body, why, received_at < now() - interval '24 hours' as old"
        " from raw_receipt order by id"
    )
    assert [(row["account_id"], row["why"], row["old"]) for row in rows] == [
        (account, NO_MESSAGE, True), (None, NO_MESSAGE, True), (None, NO_MESSAGE, True),
    ]  # fmt: skip
    said = [tuple(orjson.loads(row["body"]).values()) for row in rows]
    assert [(one, word, why) for one, word, _, why in said] == [
        ("a", "Delivered", None), ("b", "Failure", "Absent"), ("c", "Sent", None),
    ]  # fmt: skip
    assert {datetime.fromisoformat(at) for _, _, at, _ in said} == {AT}


async def test_what_mitto_will_be_asked_or_a_person_is_to_choose_stays_longer(
    pool: database.Pool,
) -> None:
    await queue.apply_receipts(
        pool, [receipt(one, DELIVERED) for one in ("asked", "listed", "over")]
    )
    await pool.execute(AGE, timedelta(hours=25))
    for one, found, next_ask_at in (("asked", "{}", "now()"), ("listed", "{3,4}", "'infinity'"), ("over", "{}", "'infinity'")):  # fmt: skip
        await pool.execute(
            f"update early_receipt set asked = 1, candidates = '{found}', next_ask_at = {next_ask_at}"
            " where provider_id = $1", one
        )  # fmt: skip
    left = "select array_agg(provider_id order by id) from early_receipt"
    assert (await queue.sweep_early_receipts(pool, 0, 10)).given_up == 1
    assert await pool.fetchval(left) == ["asked", "listed"]
    await pool.execute(AGE, timedelta(days=8))
    assert (await queue.sweep_early_receipts(pool, 0, 10)).given_up == 1
    assert await pool.fetchval(left) == ["listed"]


async def test_the_loop_that_sweeps_outlives_what_it_cannot_read(pool: database.Pool) -> None:
    await queue.apply_receipts(pool, [receipt("nobody", DELIVERED)])
    await pool.execute(AGE, timedelta(hours=25))
    await pool.execute("alter table raw_receipt rename to gone")
    with capture_logs() as lines:
        task = asyncio.create_task(receipts.sweep(pool, pause_seconds=0.02))
        async with asyncio.timeout(5):
            while not any(line["event"] == "receipts.not_swept" for line in lines):
                await asyncio.sleep(0.01)
        await pool.execute("alter table gone rename to raw_receipt")
        async with asyncio.timeout(5):
            while not await pool.fetchval("select count(*) from raw_receipt"):
                await asyncio.sleep(0.01)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


# ------------------------------------------------------------------------------------------- replay


RAW = [
    ('{"messageId": "M1", "deliveryStatus": "Delivered"}', "unknown state 'Delivered'"),
    ('[{"id": "M2", "status": "failed"}, {"id": "M3", "status": "ok"}]', "not an object"),
    ('{"messageId": "nobody", "deliveryStatus": "Delivered"}', "unknown state 'Delivered'"),
    ('{"messageId": "nobody", "deliveryStatus": "Failure"}', NO_MESSAGE),
    ('{"messageId": "M1", "deliveryStatus": "Teleported"}', "it was said otherwise"),
    ('{"messageId": "M1", "deliveryStatus": "Teleported", "n": 2}', "unknown state 'Teleported'"),
    ("{", "not JSON"),
    ("7", "?"),
]


async def put_raw(pool: database.Pool, *rows: tuple[str, str]) -> None:
    await queue.keep_raw_receipts(pool, [RawReceipt(None, *row) for row in rows])


async def test_a_replay_applies_what_is_understood_by_now_and_says_what_is_not(
    pool: database.Pool, shop: Shop
) -> None:
    shop.provider_ids = 0
    ids = await accepted(shop, 3)
    assert ids == ["M1", "M2", "M3"]
    await put_raw(pool, *RAW)
    done = await receipts.replay(pool)
    assert (done.replayed, done.updated, done.unreadable) == (3, 3, 5)
    assert sorted(done.reasons.items()) == [
        (NO_MESSAGE, 1),
        ("the body is not JSON: unexpected end of data: line 1 column 2 (char 1)", 1),
        ("the body must be a JSON object or an array of objects, not int", 1),
        ("unknown state 'Teleported'", 2),
    ]
    assert await states(pool, ids) == [DELIVERED, FAILED, DELIVERED]
    left = await pool.fetch("select body, why from raw_receipt order by id")
    assert [row["body"] for row in left] == [body for body, _ in RAW[3:]]
    assert sum(done.reasons[row["why"]] for row in left) == 1 + 2 * 2 + 1 + 1
    waits = await pool.fetch("select provider_id from early_receipt")
    assert [row["provider_id"] for row in waits] == ["nobody"]
    again = await receipts.replay(pool)
    assert again == Replay(0, 0, 5, done.reasons)


async def test_a_receipt_that_was_given_up_is_replayed_once_its_message_is_known(
    pool: database.Pool, shop: Shop, account: int
) -> None:
    ids = await accepted(shop, 2)
    rows = [receipt(ids[0], DELIVERED, account), receipt(ids[1], FAILED, account + 1)]
    await queue.keep_raw_receipts(
        pool, [RawReceipt(row.account_id, receipts._spelled(row), NO_MESSAGE) for row in rows]
    )
    done = await receipts.replay(pool)
    assert (done.replayed, done.updated, done.unreadable) == (1, 1, 1)
    assert await states(pool, ids) == [DELIVERED, int(ACCEPTED)]
    assert await pool.fetchval("select finished_at from message where state = 30") == AT


async def test_replays_at_once_apply_each_receipt_once(pool: database.Pool, shop: Shop) -> None:
    count = 2 * REPLAYED_AT_ONCE + 100
    ids = await accepted(shop, count, batch_size=500)
    spelled = [(receipts._spelled(receipt(one, DELIVERED)), "unknown state 'x'") for one in ids]
    await put_raw(pool, *spelled)
    done = await asyncio.gather(*(receipts.replay(pool) for _ in range(4)))
    assert sum(one.replayed for one in done) == sum(one.updated for one in done) == count
    assert await states(pool, ids) == [DELIVERED] * count
    assert await pool.fetchval("select count(*) from raw_receipt") == 0


async def test_what_postgres_will_not_take_stays_raw_however_often_it_is_replayed(
    pool: database.Pool, inbox: Inbox, shop: Shop
) -> None:
    """NUL is taken out when it is read again; a state that there is none of stays."""
    (one,) = await accepted(shop, 1)
    await inbox.put([receipt(one, DELIVERED, None, "a\x00b"), receipt(one, 1 << 20)])
    for replayed, unreadable in ((1, 1), (0, 1)):
        done = await receipts.replay(pool)
        assert (done.replayed, done.unreadable) == (replayed, unreadable)
    assert await states(pool, [one]) == [DELIVERED]
    assert await pool.fetchval("select why from raw_receipt") == f"unknown state '{1 << 20}'"


async def test_the_command_prints_what_a_replay_came_to(
    pool: database.Pool, dsn: str, shop: Shop, tmp_path: Path
) -> None:
    (one,) = await accepted(shop, 1)
    said = receipts._spelled(receipt(one, DELIVERED))
    await put_raw(pool, (said, "unknown state 'Delivered'"), *RAW[-3:])
    async with Installation(dsn, Simulator(), tmp_path) as shell:
        programs = await shell.command("receipts", "replay", "--json")
        people = await shell.command("receipts", "replay")
    assert (programs.code, people.code) == (0, 0), programs.err + people.err
    done = orjson.loads(programs.out)
    assert (done["replayed"], done["updated"], done["unreadable"]) == (1, 1, 3)
    assert done["reasons"]["unknown state 'Teleported'"] == 1
    lines = people.out.splitlines()
    assert lines[0] == "replayed 0 (0 messages moved), still unreadable 3"
    assert "          1  unknown state 'Teleported'" in lines[1:]
    assert await states(pool, [one]) == [DELIVERED]


# ------------------------------------------------------------------------------------- group commit


async def test_nothing_is_answered_before_it_is_durable(
    pool: database.Pool, shop: Shop, inbox: Inbox, connection: database.Connection
) -> None:
    ids = await accepted(shop, 3)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(LOCK_MESSAGE, ids[0])
    waiting = [asyncio.create_task(inbox.put([receipt(one, DELIVERED)])) for one in ids]
    await until_somebody_waits(pool)
    assert not any(task.done() for task in waiting)
    await transaction.commit()
    await asyncio.gather(*waiting)
    fresh = await connection.fetch("select own_state as state from message_shown")
    assert [row["state"] for row in fresh] == [DELIVERED] * 3


async def test_what_gathers_while_a_group_is_written_is_written_as_the_next(
    pool: database.Pool, shop: Shop, inbox: Inbox, connection: database.Connection
) -> None:
    ids = await accepted(shop, 300)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(LOCK_MESSAGE, ids[0])
    first = asyncio.create_task(inbox.put([receipt(ids[0], DELIVERED)]))
    await until_somebody_waits(pool)
    rest = [asyncio.create_task(inbox.put([receipt(one, DELIVERED)])) for one in ids[1:]]
    await transaction.commit()
    await asyncio.gather(first, *rest)
    assert await states(pool, ids) == [DELIVERED] * 300
    groups = "select count(distinct xmin::text) from message where provider_id = any ($1::text[])"
    assert await pool.fetchval(groups, ids[1:]) <= 2, "299 receipts took two transactions at most"


@pytest.mark.parametrize(
    ("n", "rounds", "groups"), [(20, 0, [20]), (20, 20, [20]), (100, 0, [50, 50])]
)
async def test_receipts_are_written_together_and_many_are_divided_among_the_writers(
    pool: database.Pool, monkeypatch: pytest.MonkeyPatch, n: int, rounds: int, groups: list[int]
) -> None:
    """rounds: of the loop, in each of which one comes; 0: all at once."""
    written, apply = list[int](), queue.apply_receipts

    async def noted(db: Any, rows: Any) -> Any:
        written.append(len(rows))
        return await apply(db, rows)

    monkeypatch.setattr(queue, "apply_receipts", noted)
    inbox, waiting = Inbox(pool), list[asyncio.Task[int]]()
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(inbox.run())
        for i in range(n):
            waiting.append(tasks.create_task(inbox.put([receipt(f"{i}", DELIVERED)])))
            if i < rounds:
                await asyncio.sleep(0)
        await asyncio.gather(*waiting)
        running.cancel()
    assert written == groups


async def test_when_postgres_goes_away_everybody_hears_of_it_and_nothing_is_lost_once_repeated(
    pool: database.Pool, shop: Shop, inbox: Inbox, connection: database.Connection
) -> None:
    ids = await accepted(shop, 20)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(LOCK_MESSAGE, ids[0])
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
    await connection.execute(LOCK_MESSAGE, ids[0])
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


async def test_whoever_put_receipts_that_are_written_makes_room_for_others(
    pool: database.Pool, inbox: Inbox
) -> None:
    many = [receipt("one and the same", DELIVERED)] * (WAITING_MOST // 2 + 1)
    for _ in range(3):
        assert await inbox.put(many) == 0


async def test_what_nobody_foresaw_is_the_fault_of_one_call_alone(
    pool: database.Pool, shop: Shop, inbox: Inbox
) -> None:
    ids = await accepted(shop, 2)
    odd: Any = [ReceiptRow(None, "no", DELIVERED, None, object())]  # type: ignore[arg-type]
    first, fault, second = await asyncio.gather(
        inbox.put([receipt(ids[0], DELIVERED)]), inbox.put(odd), inbox.put([receipt(ids[1], FAILED)]),
        return_exceptions=True,
    )  # fmt: skip
    assert (first, second) == (1, 1)
    assert isinstance(fault, Exception)
    assert not isinstance(fault, database.AWAY)
    assert await states(pool, ids) == [DELIVERED, FAILED]
    assert await inbox.put([receipt(ids[1], DELIVERED)]) == 1


async def test_nobody_waits_longer_for_an_answer_than_is_promised(
    pool: database.Pool, shop: Shop, connection: database.Connection
) -> None:
    (one,) = await accepted(shop, 1)
    inbox = Inbox(pool, answer_seconds=0.2)
    task = asyncio.create_task(inbox.run())
    async with connection.transaction():
        await connection.execute(LOCK_MESSAGE, one)
        for state in (ENROUTE, DELIVERED):
            with pytest.raises(TimeoutError):
                await inbox.put([receipt(one, state)])
    async with asyncio.timeout(5):
        while await states(pool, [one]) != [
            DELIVERED
        ]:  # nobody waits for it any more, and it lands
            await asyncio.sleep(0.01)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_ten_thousand_calls_at_once_are_all_answered_once_they_are_durable(
    pool: database.Pool, shop: Shop, inbox: Inbox
) -> None:
    ids = await accepted(shop, 1_000, batch_size=500)
    rows = [receipt(one, state) for one in ids for state in (ENROUTE, FAILED, DELIVERED, FAILED)]
    rows += [receipt(f"nobody-{i}", DELIVERED) for i in range(6_000)]
    random.Random(2).shuffle(rows)
    await asyncio.gather(*(inbox.put([row]) for row in rows))
    assert await states(pool, ids) == [DELIVERED] * 1_000
    assert await pool.fetchval("select count(*) from early_receipt") == 6_000


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
