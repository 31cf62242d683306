"""Messages and batches: the room that shows them, and the endpoints of single ones."""

from datetime import UTC, datetime
from itertools import chain

import pytest
from shop import ACCEPTED, PHONE, REFUSED, UNKNOWN, Shop, new_shop

from smsd import campaigns, database, messages, queue
from smsd.model import Reason


@pytest.fixture
async def shop(pool: database.Pool) -> Shop:
    return await new_shop(pool)


# -------------------------------------------------------------------------------------------- messages


async def one_of_each(shop: Shop) -> tuple[int, dict[str, list[int]]]:
    """A campaign with messages in every status: its id, and the ids by status."""
    campaign_id = await shop.begin(32)
    await shop.expand(32, skipped=2)
    settled, unknown, sending, _ = await shop.post(4)
    await shop.answer(*settled, ACCEPTED, ACCEPTED, ACCEPTED, REFUSED, UNKNOWN)
    await shop.receive(M1=30, M2=20)
    await queue.settle_batch(
        shop.pool, unknown[0].batch_id, unknown[1].attempt, "unknown", "unknown"
    )
    ids = settled[1].ids
    last = sending[1].ids[-1]
    return campaign_id, {
        "delivered": [ids[0]],
        "failed": [ids[1], ids[3]],
        "accepted": [ids[2]],
        "unknown": [ids[4], *unknown[1].ids],
        "processing": [*range(last - 4, last + 6)],
        "queued": [*range(last + 6, last + 16)],
        "skipped": [last + 16, last + 17],
        "cancelled": [],
    }


async def test_messages_are_found_by_each_status_they_are_shown_in(shop: Shop) -> None:
    campaign_id, expected = await one_of_each(shop)
    assert expected.keys() == messages.STATUSES.keys()
    for status, ids in expected.items():
        found = await messages.page(shop.pool, campaign_id, status, None, 0, 100)
        assert [one.id for one in found] == ids, status
        assert {one.status for one in found} <= {status}
    await shop.act(campaign_id, campaigns.cancel)
    found = await messages.page(shop.pool, campaign_id, "cancelled", None, 0, 100)
    assert [one.id for one in found] == expected["queued"]
    assert {(one.reason, one.finished_at is not None) for one in found} == {
        (Reason.CAMPAIGN_CANCELLED, True)
    }


@pytest.mark.parametrize("status", [None, "queued", "unknown"])
async def test_pages_of_messages_follow_each_other_without_gap_or_repeat(
    shop: Shop, status: str | None
) -> None:
    campaign_id, expected = await one_of_each(shop)
    ids = expected[status] if status else sorted(chain(*expected.values()))
    seen: list[int] = []
    while page := await messages.page(
        shop.pool, campaign_id, status, None, seen[-1] if seen else 0, 3
    ):
        seen += [one.id for one in page]
    assert seen == ids


async def test_those_that_a_batch_speaks_for_and_those_that_say_so_themselves_are_one_list(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(15)
    mixed, whole, untold = await shop.post(3)
    await shop.answer(*mixed, ACCEPTED, ACCEPTED, REFUSED)
    await shop.answer(*whole, ACCEPTED)
    await shop.answer(*untold, ACCEPTED)
    await shop.receive(M1=30, M6=30, M8=20, M9=11)
    found: list[messages.Message] = []
    while page := await messages.page(
        shop.pool, campaign_id, "accepted", None, found[-1].id if found else 0, 2
    ):
        found += page
    assert [one.id for one in found] == [
        mixed[1].ids[1], *(whole[1].ids[i] for i in (1, 3, 4)), *untold[1].ids
    ]  # fmt: skip
    assert [one.provider_id for one in found] == [
        "M2", "M7", "M9", "M10", *(f"M{i}" for i in range(11, 16))
    ]  # fmt: skip
    assert all(one.accepted_at and not one.finished_at for one in found)
    for status, ids in {
        "delivered": [mixed[1].ids[0], whole[1].ids[0]],
        "failed": [*mixed[1].ids[2:], whole[1].ids[2]],
    }.items():
        listed = await messages.page(shop.pool, campaign_id, status, None, 0, 100)
        assert [one.id for one in listed] == ids, status
    await shop.receive(**{f"M{i}": 30 for i in range(1, 16)})
    assert await messages.page(shop.pool, campaign_id, "accepted", None, 0, 100) == []


async def test_a_message_is_found_by_its_number(shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    (found,) = await messages.page(shop.pool, campaign_id, None, PHONE + 3, 0, 10)
    assert found.phone == PHONE + 3
    assert await messages.page(shop.pool, campaign_id, "queued", PHONE + 3, 0, 10) == [found]
    assert await messages.page(shop.pool, campaign_id, "failed", PHONE + 3, 0, 10) == []
    assert await messages.page(shop.pool, campaign_id, None, PHONE + 3, found.id, 10) == []
    assert await messages.page(shop.pool, campaign_id, None, PHONE + 99, 0, 10) == []


async def test_a_message_is_found_by_its_id_by_its_tenant_alone(shop: Shop) -> None:
    campaign_id, expected = await one_of_each(shop)
    async with shop.pool.acquire() as db, db.transaction():
        single = await queue.add_message(db, shop.id, shop.account_id, PHONE, "Hi", "Shop", 1)
    assert single is not None
    for message_id in (*sorted(chain(*expected.values())), single):
        found = await messages.get(shop.pool, shop.id, message_id)
        assert found is not None, message_id
        assert found.campaign_id == (0 if message_id == single else campaign_id)
        assert await messages.get(shop.pool, shop.id + 1, message_id) is None
    assert await messages.get(shop.pool, shop.id, single + 1) is None


async def test_a_message_of_a_chunk_in_which_all_were_skipped_is_found_by_its_id(
    shop: Shop,
) -> None:
    async with shop.pool.acquire() as db, db.transaction():
        await queue.add_message(db, shop.id, shop.account_id, PHONE, "Hi", "Shop", 1)
    campaign_id = await shop.begin(3)
    await shop.expand(3, skipped=3)
    (first, *_) = await messages.page(shop.pool, campaign_id, None, None, 0, 10)
    assert await messages.get(shop.pool, shop.id, first.id) == first
    assert await messages.get(shop.pool, shop.id + 1, first.id) is None


async def test_a_message_tells_what_was_tried_with_it_across_splits_and_retries(shop: Shop) -> None:
    campaign_id = await shop.sending(4, batch_size=4)
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(
        shop.pool,
        grant.batch_id,
        intent.attempt,
        "refused",
        "refused",
        status=400,
        detail="bad",
        refusal="a",
    )
    left, right = await shop.post(2)
    await shop.answer(*left, REFUSED, ACCEPTED)
    await shop.answer(*right, ACCEPTED)
    await shop.act(campaign_id, campaigns.retry_failed)
    ((grant, intent),) = await shop.post()
    assert intent.ids == left[1].ids[:1]
    refused, accepted, other, _ = await messages.page(shop.pool, campaign_id, None, None, 0, 10)
    assert [(one.n, one.outcome, one.status, one.detail) for one in refused.attempts] == [
        (1, "refused", 400, "bad"),
        (2, "accepted", 200, None),
        (3, None, None, None),
    ]
    assert [(one.n, one.outcome) for one in accepted.attempts] == [(1, "refused"), (2, "accepted")]
    assert [one.n for one in other.attempts] == [1, 2]
    assert refused.status == "processing"
    assert refused.accepted_at is None
    assert accepted.accepted_at is not None
    assert accepted.provider_id is not None


@pytest.mark.parametrize(
    ("detail", "status", "reason"),
    [
        ("replica_died", None, Reason.REPLICA_DIED),
        ("TimeoutError", None, Reason.NO_ANSWER),
        ("the list is short", 200, Reason.UNREADABLE_ANSWER),
    ],
)
async def test_a_message_says_why_its_batch_is_unknown(
    shop: Shop, detail: str, status: int | None, reason: Reason
) -> None:
    campaign_id = await shop.sending(2)
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(
        shop.pool,
        grant.batch_id,
        intent.attempt,
        "unknown",
        "unknown",
        status=status,
        detail=detail,
    )
    (one, _) = await messages.page(shop.pool, campaign_id, None, None, 0, 10)
    assert (one.status, one.reason) == ("unknown", reason)


async def test_batches_are_listed_with_what_became_of_them(shop: Shop) -> None:
    campaign_id = await shop.sending(20)
    done, waits, unknown, _ = await shop.post(4)
    await shop.answer(*done, ACCEPTED)
    await queue.settle_batch(
        shop.pool, waits[0].batch_id, waits[1].attempt, "again", "retry", most=3, delay_seconds=60
    )
    await queue.settle_batch(
        shop.pool, unknown[0].batch_id, unknown[1].attempt, "unknown", "unknown"
    )
    page, total = await messages.batches(shop.pool, campaign_id, 10, 0)
    assert total == 4
    assert [(one.status, one.size, one.open, one.attempts) for one in page] == [
        ("done", 5, 0, 1), ("waiting", 5, 5, 1), ("unknown", 5, 5, 1), ("processing", 5, 5, 1),
    ]  # fmt: skip
    assert [one.first_id for one in page] == [one[1].ids[0] for one in (done, waits, unknown, _)]
    assert page[0].bulk_id == "bulk"
    assert page[0].done_at is not None
    assert (page[1].not_before or datetime.min.replace(tzinfo=UTC)) > datetime.now(UTC)
    assert (await messages.batches(shop.pool, campaign_id, 2, 3))[0] == page[3:]


async def test_a_refresh_goes_round_all_that_wait_for_a_receipt(shop: Shop) -> None:
    campaign_id = await shop.sending(10)
    await shop.send_all(ACCEPTED)
    await shop.receive(M2=30, M5=20, M6=11)
    waiting = {f"M{i}" for i in range(1, 11)} - {"M2", "M5"}
    asked: list[str] = []
    for expected in (3, 3, 3, 3):
        page = await messages.refresh_page(shop.pool, campaign_id, 3)
        assert len(page) == expected
        asked += [provider_id for _, provider_id in page]
    assert set(asked[:8]) == waiting
    assert asked[8:] == asked[:4]
    assert len(await messages.refresh_page(shop.pool, campaign_id, 100)) == 8


async def test_a_refresh_of_a_campaign_without_such_messages_asks_for_none(shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    assert await messages.refresh_page(shop.pool, campaign_id, 100) == []
