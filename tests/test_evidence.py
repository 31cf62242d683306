"""What may have been accepted: late results, evidence and verdicts, in whatever order they come."""

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from shop import ACCEPTED, REFUSED, UNKNOWN, Shop, check_the_account
from support import assert_sound, broken, new_account, open_shop

from smsd import campaigns, credits, database, evidence, queue
from smsd.evidence import Candidate, Selection, TooEarly
from smsd.mitto import Fetched, FetchOutcome, ItemResult
from smsd.queue import Grant, Intent


@pytest.fixture
async def account(pool: database.Pool) -> int:
    return await new_account(pool)


@pytest.fixture
async def shop(pool: database.Pool, account: int) -> AsyncIterator[Shop]:
    """A shop; whatever the test did with it, the audit finds nothing afterwards."""
    yield await open_shop(pool, account, await queue.register(pool, "test", "0"))
    await assert_sound(pool)
    # Or nobody would look for them.
    overlooked = (
        "select count(*) from batch b where b.unsure < (select count(*) from message m where m.state = 5"
        " and m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id)"
    )
    assert await pool.fetchval(overlooked) == 0


async def unknown(shop: Shop, of: int = 3, **options: Any) -> tuple[int, Grant, Intent]:
    """A campaign of one batch that was posted, and nobody knows what came of it."""
    campaign_id = await shop.sending(of, batch_size=of, **options)
    [(grant, intent)] = await shop.post()
    await lose(shop, grant, intent)
    return campaign_id, grant, intent


async def lose(shop: Shop, grant: Grant, intent: Intent) -> None:
    await queue.settle_batch(
        shop.pool, grant.batch_id, intent.attempt, "unknown", "unknown", detail="TimeoutError"
    )


async def expose(shop: Shop, grant: Grant) -> int:
    return int(await shop.pool.fetchval("select expose_unknown($1)", grant.batch_id))


async def age(shop: Shop, seconds: float) -> None:
    """All that was tried was tried that much earlier."""
    await shop.pool.execute(
        "with a as (update attempt set intent_at = intent_at - make_interval(secs => $1),"
        " ended_at = ended_at - make_interval(secs => $1))"
        "update message set settled_at = settled_at - make_interval(secs => $1)",
        seconds,
    )


async def say(
    shop: Shop, campaign_id: int, verdict: evidence.Verdict, which: Selection | None = None
) -> int:
    which = which or Selection(older_than=datetime.now(UTC) + timedelta(hours=1))
    async with shop.pool.acquire() as connection, connection.transaction():
        await campaigns.lock(connection, shop.id, campaign_id)
        return await evidence.give_verdict(connection, campaign_id, verdict, which, 110)


async def states(shop: Shop) -> list[tuple[int | None, str | None, str | None]]:
    rows = await shop.pool.fetch(
        "select own_state as state, reason, provider_id from message_shown order by id"
    )
    return [(row["state"], row["reason"], row["provider_id"]) for row in rows]


async def outcomes(shop: Shop) -> list[str]:
    rows = await shop.pool.fetch("select outcome from attempt order by intent_at, n")
    return [row["outcome"] for row in rows]


def answer(intent: Intent, *ids: str) -> list[ItemResult]:
    return [
        ItemResult(one, ACCEPTED, provider_id, None)
        for one, provider_id in zip(intent.ids, ids, strict=True)
    ]


async def settle(shop: Shop, grant: Grant, intent: Intent, *ids: str) -> bool:
    items = answer(intent, *ids)
    return await queue.settle_items(
        shop.pool, grant.batch_id, intent.attempt, queue.Answer.of(items, "bulk", 200)
    )


# ------------------------------------------------------------------------ a batch's word becomes its messages'


async def test_messages_of_an_unknown_batch_speak_for_themselves_with_holds_and_counts_unchanged(
    shop: Shop,
) -> None:
    campaign_id, grant, _ = await unknown(shop, 3)
    before = (await shop.progress(campaign_id)).totals
    assert await expose(shop, grant) == 3
    assert await expose(shop, grant) == 0
    assert (await check_the_account(shop, campaign_id)).totals == before
    assert before.unknown == 3
    assert await states(shop) == [(5, "no_answer", None)] * 3


@pytest.mark.parametrize(
    ("detail", "status", "reason"),
    [
        ("replica_died", None, "replica_died"),
        ("TimeoutError", None, "no_answer"),
        ("?", 502, "unreadable_answer"),
    ],
)
async def test_the_reason_of_what_is_unknown_is_kept(
    shop: Shop, detail: str, status: int | None, reason: str
) -> None:
    await shop.sending(1)
    [(grant, intent)] = await shop.post()
    await queue.settle_batch(
        shop.pool,
        grant.batch_id,
        intent.attempt,
        "unknown",
        "unknown",
        status=status,
        detail=detail,
    )
    await expose(shop, grant)
    assert await states(shop) == [(5, reason, None)]


async def test_an_answer_that_comes_after_its_messages_speak_for_themselves_is_written(
    shop: Shop,
) -> None:
    campaign_id, grant, intent = await unknown(shop, 3)
    await expose(shop, grant)
    assert await settle(shop, grant, intent, "A", "B", "C")
    assert await states(shop) == [(10, None, "A"), (10, None, "B"), (10, None, "C")]
    assert (await check_the_account(shop, campaign_id)).totals.pending == 3
    assert await outcomes(shop) == ["accepted"]
    assert await settle(shop, grant, intent, "A", "B", "C"), "the same result, written twice"
    await check_the_account(shop, campaign_id)


async def test_an_answer_that_refuses_some_after_messages_speak_for_themselves_gives_their_credits_back(
    shop: Shop,
) -> None:
    campaign_id, grant, intent = await unknown(shop, 3)
    await expose(shop, grant)
    await shop.answer(grant, intent, ACCEPTED, REFUSED)
    totals = (await check_the_account(shop, campaign_id)).totals
    assert (totals.pending, totals.refused, totals.unknown) == (1, 2, 0)


@pytest.mark.parametrize(
    ("action", "became", "batches"),
    [("refused", "split", [0, 0]), ("again", "waiting", [1]), ("back", "ready", [0])],
)
async def test_a_refusal_that_comes_after_messages_speak_for_themselves_is_written(
    shop: Shop, action: str, became: str, batches: list[int]
) -> None:
    campaign_id, grant, intent = await unknown(shop, 4)
    await expose(shop, grant)
    got = await queue.settle_batch(
        shop.pool, grant.batch_id, intent.attempt, action, action, status=400, most=6
    )
    assert got == became
    rows = await shop.pool.fetch("select state from batch order by first_id")
    assert [row["state"] for row in rows] == batches
    assert (await check_the_account(shop, campaign_id)).totals.queued == 4


async def test_an_intent_that_was_reaped_and_exposed_is_still_withdrawn(shop: Shop) -> None:
    campaign_id, grant, _ = await unknown(shop, 3)
    await expose(shop, grant)
    assert await queue.withdraw(shop.pool, grant, "not acknowledged")
    assert (await check_the_account(shop, campaign_id)).totals.queued == 3
    assert await outcomes(shop) == ["withdrawn"]
    assert len(await shop.post()) == 1


async def test_messages_that_were_unknown_by_an_earlier_attempt_are_not_swept_up_by_a_later_one(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(2, batch_size=2)
    [(grant, intent)] = await shop.post()
    await shop.answer(grant, intent, UNKNOWN, REFUSED)
    await shop.act(campaign_id, campaigns.retry_failed)
    [(again, second)] = await shop.post()
    assert second.ids == intent.ids[1:]
    await lose(shop, again, second)
    await expose(shop, again)
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 2
    assert await settle(shop, again, second, "B")
    assert await states(shop) == [(5, "unreadable_answer", None), (10, None, "B")]
    await check_the_account(shop, campaign_id)


async def test_unknown_messages_beyond_a_cut_are_still_found(shop: Shop) -> None:
    campaign_id = await shop.sending(4, batch_size=4)
    [(grant, intent)] = await shop.post()
    await shop.answer(grant, intent, REFUSED, REFUSED, REFUSED, UNKNOWN)
    await shop.act(campaign_id, campaigns.retry_failed)
    await shop.pool.execute("select cut_batch(id, 2) from batch")
    assert await say(shop, campaign_id, "sent", Selection(message_ids=[intent.ids[3]])) == 1
    assert (await check_the_account(shop, campaign_id)).totals.pending == 1


# ------------------------------------------------------------------------------------------ verdicts


async def test_sent_is_accepted_and_paid_and_an_id_that_comes_later_is_taken(shop: Shop) -> None:
    campaign_id, grant, intent = await unknown(shop, 2)
    assert await say(shop, campaign_id, "sent") == 2
    totals = (await check_the_account(shop, campaign_id)).totals
    assert (totals.pending, totals.unknown) == (2, 0)
    assert await states(shop) == [(10, "verdict_sent", None)] * 2
    assert await settle(shop, grant, intent, "A", "B")
    assert await states(shop) == [(10, None, "A"), (10, None, "B")]
    assert (await check_the_account(shop, campaign_id)).totals == totals, "paid once"
    assert await outcomes(shop) == ["accepted"]


async def test_failed_gives_the_credits_back_and_an_answer_that_comes_later_is_paid(
    shop: Shop,
) -> None:
    campaign_id, grant, intent = await unknown(shop, 2)
    assert await say(shop, campaign_id, "failed") == 2
    assert await states(shop) == [(40, "verdict_failed", None)] * 2
    assert (await check_the_account(shop, campaign_id)).totals.refused == 2
    assert await credits.balance(shop.pool, shop.id) == (10_000, 0)
    assert await settle(shop, grant, intent, "A", "B")
    assert await states(shop) == [(10, None, "A"), (10, None, "B")]
    assert (await check_the_account(shop, campaign_id)).totals.pending == 2
    assert await credits.balance(shop.pool, shop.id) == (9_998, 0)


async def test_evidence_after_a_verdict_is_overdue_where_credits_are_short_and_the_next_top_up_pays(
    pool: database.Pool, account: int
) -> None:
    shop = await open_shop(pool, account, await queue.register(pool, "test", "0"), granted=3)
    campaign_id, grant, intent = await unknown(shop, 3)
    await say(shop, campaign_id, "failed")
    await shop.begin(2)  # another campaign holds what came back
    assert await settle(shop, grant, intent, "A", "B", "C")
    row = await pool.fetchrow("select spent, reserved, overdue from credit")
    assert row is not None
    assert tuple(row) == (1, 2, 2)
    for left in (1, 0):
        async with pool.acquire() as connection, connection.transaction():
            await credits.grant(connection, shop.id, 1, "top-up")
        assert await pool.fetchval("select overdue from credit") == left
    await check_the_account(shop, campaign_id)
    await assert_sound(pool)


async def test_a_campaign_that_failed_by_verdict_is_completed_by_evidence(shop: Shop) -> None:
    campaign_id, grant, intent = await unknown(shop, 1)
    await campaigns.finish(shop.pool)
    await say(shop, campaign_id, "failed")
    await campaigns.finish(shop.pool)
    assert await shop.status(campaign_id) == "failed"
    await settle(shop, grant, intent, "A")
    await campaigns.finish(shop.pool)
    assert await shop.status(campaign_id) == "completed"


async def test_resend_posts_once_more_and_what_the_first_attempt_came_to_is_recorded_as_asked_for(
    shop: Shop,
) -> None:
    campaign_id, grant, intent = await unknown(shop, 2)
    await campaigns.finish(shop.pool)
    await age(shop, 111)
    assert await say(shop, campaign_id, "resend", Selection(batch_id=grant.batch_id)) == 2
    assert await shop.status(campaign_id) == "sending"
    assert (await check_the_account(shop, campaign_id)).totals.queued == 2
    [(again, second)] = await shop.post()
    assert second.ids == intent.ids
    assert await settle(shop, again, second, "C", "D")
    assert not await settle(shop, grant, intent, "A", "B")
    assert await states(shop) == [(10, None, "C"), (10, None, "D")]
    assert await outcomes(shop) == ["duplicate_asked", "accepted"]
    assert (await check_the_account(shop, campaign_id)).totals.pending == 2
    await campaigns.finish(shop.pool)
    assert await shop.status(campaign_id) == "completed"


async def test_the_first_attempt_may_be_heard_of_while_nobody_knows_of_the_second(
    shop: Shop,
) -> None:
    campaign_id, grant, intent = await unknown(shop, 2)
    await age(shop, 111)
    await say(shop, campaign_id, "resend")
    [(again, second)] = await shop.post()
    await lose(shop, again, second)
    assert await settle(shop, grant, intent, "A", "B")
    assert await states(shop) == [(10, None, "A"), (10, None, "B")]
    assert (await check_the_account(shop, campaign_id)).totals.pending == 2
    assert not await settle(shop, again, second, "C", "D")
    assert await states(shop) == [(10, None, "A"), (10, None, "B")]
    assert await outcomes(shop) == ["accepted", "duplicate_asked"]


async def test_a_second_posting_that_nobody_asked_for_is_a_breach(
    pool: database.Pool, account: int
) -> None:
    shop = await open_shop(pool, account, await queue.register(pool, "test", "0"))
    await shop.sending(1)
    [(grant, intent)] = await shop.post()
    await queue.settle_batch(pool, grant.batch_id, 1, "again", "retry", status=500, most=6)
    [(again, second)] = await shop.post()
    await settle(shop, again, second, "B")
    await pool.execute("update attempt set outcome = 'unknown' where n = 1")
    assert not await settle(shop, grant, intent, "A")
    assert set(await broken(pool)) == {"once"}


async def test_an_answer_that_comes_before_what_was_asked_for_is_sent_again_spares_it(
    shop: Shop,
) -> None:
    campaign_id, grant, intent = await unknown(shop, 3)
    await age(shop, 111)
    await say(shop, campaign_id, "resend", Selection(message_ids=intent.ids[:2]))
    totals = (await check_the_account(shop, campaign_id)).totals
    assert (totals.queued, totals.unknown) == (2, 1)
    assert await settle(shop, grant, intent, "A", "B", "C")
    assert (await check_the_account(shop, campaign_id)).totals.pending == 3
    assert await shop.post() == []


async def test_an_answer_for_several_is_written_message_by_message_where_some_were_sent_again(
    shop: Shop,
) -> None:
    campaign_id, grant, intent = await unknown(shop, 3)
    await age(shop, 111)
    await say(shop, campaign_id, "resend", Selection(message_ids=intent.ids[:1]))
    [(again, second)] = await shop.post()
    await settle(shop, again, second, "X")
    await settle(shop, grant, intent, "A", "B", "C")
    assert await states(shop) == [(10, None, "X"), (10, None, "B"), (10, None, "C")]
    assert (await check_the_account(shop, campaign_id)).totals.pending == 3


async def test_nothing_is_sent_again_while_it_might_still_arrive(shop: Shop) -> None:
    campaign_id, _, _ = await unknown(shop, 2)
    await age(shop, 100)
    with pytest.raises(TooEarly) as raised:
        await say(shop, campaign_id, "resend")
    left = raised.value.until - datetime.now(UTC)
    assert timedelta(seconds=8) < left < timedelta(seconds=10)
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 2


async def test_a_verdict_is_on_what_was_chosen_and_on_nothing_else(shop: Shop) -> None:
    campaign_id = await shop.sending(6, batch_size=2)
    posted = await shop.post(8)
    for grant, intent in posted:
        await lose(shop, grant, intent)
    first, second, third = (intent.ids for _, intent in posted)
    assert await say(shop, campaign_id, "sent", Selection(message_ids=[first[0], 10**9])) == 1
    assert await say(shop, campaign_id, "failed", Selection(batch_id=posted[1][0].batch_id)) == 2
    await shop.pool.execute(
        "update attempt set ended_at = ended_at - interval '1 hour' where batch_id = $1",
        posted[2][0].batch_id,
    )
    older = Selection(older_than=datetime.now(UTC) - timedelta(minutes=30))
    assert await say(shop, campaign_id, "failed", older) == 2
    shown = {row["id"]: row["state"] for row in await shop.pool.fetch("table message")}
    assert [shown[one] for one in first] == [10, 5]
    assert [shown[one] for one in (*second, *third)] == [40] * 4
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 1
    assert await say(shop, campaign_id, "failed") == 1
    assert await say(shop, campaign_id, "failed") == 0


async def test_only_what_was_certainly_refused_is_retried(shop: Shop) -> None:
    campaign_id, _, _ = await unknown(shop, 2)
    await say(shop, campaign_id, "failed")
    assert (await shop.act(campaign_id, campaigns.retry_failed)).retried == 0


async def test_items_with_neither_id_nor_error_take_a_verdict_too(shop: Shop) -> None:
    campaign_id = await shop.sending(2, batch_size=2)
    [(grant, intent)] = await shop.post()
    await shop.answer(grant, intent, UNKNOWN, ACCEPTED)
    await age(shop, 111)
    assert await say(shop, campaign_id, "resend") == 1
    [(_, second)] = await shop.post()
    assert second.ids == intent.ids[:1]


# ------------------------------------------------------------------------------------ who is told, and when


async def test_what_stays_unknown_waits_for_a_person_who_is_told_once(shop: Shop) -> None:
    campaign_id, _, _ = await unknown(shop, 3)
    assert await evidence.expose_old(shop.pool, 900, 10) == []
    await age(shop, 901)
    assert await evidence.expose_old(shop.pool, 900, 10) == [(campaign_id, shop.id, 3)]
    assert await evidence.expose_old(shop.pool, 900, 10) == []
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 3


async def test_after_a_week_only_what_is_still_unknown_is_looked_for(shop: Shop) -> None:
    campaign_id, _, intent = await unknown(shop, 3)
    await say(shop, campaign_id, "failed", Selection(message_ids=intent.ids[:2]))
    await age(shop, 901)
    await evidence.expose_old(shop.pool, 900, 10)
    for days, unsure in ((6, 3), (2, 1)):
        await shop.pool.execute(
            "update batch set told_at = told_at - make_interval(days => $1)", days
        )
        await evidence.expose_old(shop.pool, 900, 10)
        assert await shop.pool.fetchval("select unsure from batch") == unsure


async def test_a_person_is_told_of_items_without_id_and_error_too(shop: Shop) -> None:
    campaign_id = await shop.sending(3, batch_size=3)
    [(grant, intent)] = await shop.post()
    await shop.answer(grant, intent, UNKNOWN, ACCEPTED)
    await age(shop, 901)
    assert await evidence.expose_old(shop.pool, 900, 10) == [(campaign_id, shop.id, 1)]


# ------------------------------------------------------------------------------------- whose an id is


def fetched(phone: int, **fields: Any) -> Fetched:
    given: dict[str, Any] = {
        "destination": phone, "sender": "Shop", "text": "Hi 0", "created_at": datetime.now(UTC),
        "provider_id": "X", "date_skew_seconds": 0.0,
    }  # fmt: skip
    return Fetched(FetchOutcome.FOUND, 200, **(given | fields))


def candidate(message_id: int, situation: str = "open", text: str = "Hi", sender: str = "Shop") -> Candidate:  # fmt: skip
    return Candidate(1, message_id, situation, sender, text)


def test_one_candidate_is_a_match_and_two_are_nothing() -> None:
    said = fetched(1, text="Hi")
    assert evidence.decide(said, [candidate(1)]).match == candidate(1)
    assert evidence.decide(said, [candidate(1), candidate(1)]).match == candidate(1)
    several = evidence.decide(said, [candidate(1), candidate(2)])
    assert (several.word, several.match, several.candidates) == ("several", None, (1, 2))
    assert evidence.decide(said, []).word == "no_candidate"


def test_a_candidate_that_is_on_its_way_decides_nothing_yet() -> None:
    waiting = evidence.decide(fetched(1, text="Hi"), [candidate(1), candidate(2, "sending")])
    assert (waiting.word, waiting.match, waiting.final) == ("sending", None, False)


def test_a_message_that_may_have_brought_another_id_is_a_candidate_too() -> None:
    said = fetched(1, text="Hi")
    assert evidence.decide(said, [candidate(1), candidate(2, "taken")]).word == "several"
    assert evidence.decide(said, [candidate(2, "taken")]).word == "taken"


def test_texts_agree_whatever_their_composition_and_line_ends() -> None:
    said = fetched(1, text="cafe\u0301\nbar")
    assert evidence.decide(said, [candidate(1, text="caf\u00e9\r\nbar")]).match is not None
    assert evidence.decide(said, [candidate(1, text="caf\u00e9 bar")]).match is None
    assert evidence.decide(said, [candidate(1, text="caf\u00e9\nbar", sender="shop")]).match is None


def test_a_reference_names_the_message_whatever_became_of_its_text() -> None:
    said = fetched(1, text="cut", reference=evidence.reference(7, 2))
    assert evidence.named(said) == 7
    assert evidence.decide(said, [candidate(7)]).match == candidate(7)
    assert evidence.named(fetched(1, reference="smsd-7-2x")) is None


async def test_an_id_is_created_while_its_attempt_lasts(shop: Shop) -> None:
    await unknown(shop, 1)
    now = datetime.now(UTC)
    for seconds, fits in ((0, 1), (-30, 0), (30, 0)):
        said = fetched(shop.phones - 1, created_at=now + timedelta(seconds=seconds))
        assert len(await evidence.candidates(shop.pool, shop.account_id, said)) == fits


async def test_mittos_clock_may_be_an_hour_off(shop: Shop) -> None:
    await unknown(shop, 1)
    theirs = datetime.now(UTC) + timedelta(hours=1)
    said = fetched(shop.phones - 1, created_at=theirs, date_skew_seconds=3600.0)
    assert len(await evidence.candidates(shop.pool, shop.account_id, said)) == 1
    said = fetched(shop.phones - 1, created_at=theirs, date_skew_seconds=0.0)
    assert await evidence.candidates(shop.pool, shop.account_id, said) == []


async def test_our_clock_may_be_an_hour_off(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    await unknown(shop, 1)
    truth = datetime.now(UTC)
    ours = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: ours)
    said = fetched(shop.phones - 1, created_at=truth, date_skew_seconds=3600.0)
    assert len(await evidence.candidates(shop.pool, shop.account_id, said)) == 1


async def test_candidates_are_of_the_account_and_of_the_number(shop: Shop) -> None:
    await unknown(shop, 2)
    other = await new_account(shop.pool, "other")
    assert await evidence.candidates(shop.pool, other, fetched(shop.phones - 1)) == []
    assert await evidence.candidates(shop.pool, shop.account_id, fetched(shop.phones)) == []
    [one] = await evidence.candidates(shop.pool, shop.account_id, fetched(shop.phones - 1))
    assert (one.situation, one.text, one.sender) == ("open", "Hi 1", "Shop")


async def test_a_reference_to_a_message_of_another_number_names_nobody(shop: Shop) -> None:
    _, _, intent = await unknown(shop, 2)
    right = fetched(intent.phones[0], reference=evidence.reference(intent.ids[0], 1))
    wrong = fetched(intent.phones[1], reference=evidence.reference(intent.ids[0], 1))
    assert len(await evidence.candidates(shop.pool, shop.account_id, right)) == 1
    assert await evidence.candidates(shop.pool, shop.account_id, wrong) == []


async def test_what_is_being_posted_is_a_candidate_that_is_not_decided(shop: Shop) -> None:
    await shop.sending(1)
    await shop.post()
    [one] = await evidence.candidates(shop.pool, shop.account_id, fetched(shop.phones - 1))
    assert one.situation == "sending"


async def test_a_message_with_a_verdict_is_still_a_candidate(shop: Shop) -> None:
    campaign_id, _, _ = await unknown(shop, 1)
    await say(shop, campaign_id, "failed")
    [one] = await evidence.candidates(shop.pool, shop.account_id, fetched(shop.phones - 1))
    assert one.situation == "open"
    assert await evidence.accept(shop.pool, one, "X")
    assert await states(shop) == [(10, None, "X")]
    await check_the_account(shop, campaign_id)


async def test_a_message_that_was_sent_again_is_a_candidate_that_takes_no_second_id(
    shop: Shop,
) -> None:
    campaign_id, _, _ = await unknown(shop, 1)
    await age(shop, 111)
    await say(shop, campaign_id, "resend")
    said = fetched(shop.phones - 1, created_at=datetime.now(UTC) - timedelta(seconds=111))
    [one] = await evidence.candidates(shop.pool, shop.account_id, said)
    assert one.situation == "taken"
    await shop.send_all(ACCEPTED)
    [one] = await evidence.candidates(shop.pool, shop.account_id, said)
    assert one.situation == "taken"
    assert not await evidence.accept(shop.pool, one, "X")
    await check_the_account(shop, campaign_id)


async def test_evidence_on_one_message_leaves_the_others_unknown_and_the_answer_still_settles_them(
    shop: Shop,
) -> None:
    campaign_id, grant, intent = await unknown(shop, 3)
    match = Candidate(grant.batch_id, intent.ids[1], "open", "Shop", "Hi 1")
    assert await evidence.accept(shop.pool, match, "B")
    assert not await evidence.accept(shop.pool, match, "B")
    totals = (await check_the_account(shop, campaign_id)).totals
    assert (totals.pending, totals.unknown) == (1, 2)
    assert await settle(shop, grant, intent, "A", "B", "C")
    assert [provider_id for *_, provider_id in await states(shop)] == ["A", "B", "C"]
    assert (await check_the_account(shop, campaign_id)).totals.pending == 3
    assert await outcomes(shop) == ["accepted"]


async def test_an_id_that_is_somebodys_already_is_evidence_for_nobody_else(shop: Shop) -> None:
    campaign_id, grant, intent = await unknown(shop, 2)
    first, second = (Candidate(grant.batch_id, one, "open", "Shop", "") for one in intent.ids)
    assert await evidence.accept(shop.pool, first, "A")
    assert not await evidence.accept(shop.pool, second, "A")
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 1


# ------------------------------------------------------------------------------ answers out of order


async def test_an_answer_out_of_order_is_accepted_and_its_ids_find_their_messages_by_number(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(3, batch_size=3)
    [(grant, intent)] = await shop.post()
    items = answer(intent, "C", "A", "B")
    written = await queue.settle_items(
        shop.pool, grant.batch_id, 1, queue.Answer.of(items, "bulk", 200), mapped=False
    )
    assert written
    assert await states(shop) == [(10, None, None)] * 3
    assert (await check_the_account(shop, campaign_id)).totals.pending == 3
    for provider_id, phone in zip("ABC", intent.phones, strict=True):
        assert await evidence.map_id(shop.pool, provider_id, phone)
    assert not await evidence.map_id(shop.pool, "A", intent.phones[0])
    assert [provider_id for *_, provider_id in await states(shop)] == ["A", "B", "C"]
    assert await shop.pool.fetchval("select count(*) from unmapped_id") == 0
    await check_the_account(shop, campaign_id)


async def test_an_answer_out_of_order_with_a_refusal_leaves_all_unknown_until_ids_tell(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(3, batch_size=3)
    [(grant, intent)] = await shop.post()
    items = [*answer(intent, "B", "A", "C")[:2], ItemResult(intent.ids[2], REFUSED, None, "no")]
    await queue.settle_items(
        shop.pool, grant.batch_id, 1, queue.Answer.of(items, "bulk", 200), mapped=False
    )
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 3
    assert await evidence.map_id(shop.pool, "A", intent.phones[0])
    assert await evidence.map_id(shop.pool, "B", intent.phones[2])
    totals = (await check_the_account(shop, campaign_id)).totals
    assert (totals.pending, totals.unknown) == (2, 1)


# ------------------------------------------------------------------------- a caller who wants it rather twice


async def single(shop: Shop, on_unknown: str) -> int:
    async with shop.pool.acquire() as connection, connection.transaction():
        message_id = await queue.add_message(
            connection,
            shop.id,
            shop.account_id,
            shop.phones,
            "Hi 0",
            "Shop",
            1,
            on_unknown=on_unknown,
        )
        assert message_id is not None
    return message_id


async def test_a_single_message_is_sent_again_only_where_its_caller_said_so(shop: Shop) -> None:
    await single(shop, "hold")
    await single(shop, "resend")
    for grant, intent in await shop.post(8):
        await lose(shop, grant, intent)
    assert await evidence.resend_asked(shop.pool, 6, 0) == 1
    assert await evidence.resend_asked(shop.pool, 6, 0) == 0
    [(grant, intent)] = await shop.post(8)
    assert await settle(shop, grant, intent, "B")
    assert await outcomes(shop) == ["unknown", "unknown", "accepted"]


async def test_a_single_message_is_sent_again_within_the_attempts(shop: Shop) -> None:
    await single(shop, "resend")
    for _ in range(3):
        [(grant, intent)] = await shop.post()
        await lose(shop, grant, intent)
        await evidence.resend_asked(shop.pool, 3, 0)
    assert await shop.post() == []
    assert await shop.pool.fetchval("select state from batch") == 11
    assert await credits.balance(shop.pool, shop.id) == (10_000, 1)
    assert intent.attempt == 3
