"""The campaigns room: what its figures promise, whatever happens in whatever order."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import pytest
from shop import (
    ACCEPTED,
    PHONE,
    REFUSED,
    UNKNOWN,
    Shop,
    check_the_account,
    new_shop,
    until_somebody_waits,
    until_waited_for,
)

from smsd import campaigns, credits, database, expansions, queue
from smsd.campaigns import Campaign, Snapshot
from smsd.model import CampaignStatus, MessageState
from smsd.queue import Grant, Intent, ReceiptRow


@pytest.fixture
async def shop(pool: database.Pool) -> Shop:
    return await new_shop(pool)


# ------------------------------------------------------------------------------------- totals are true


@dataclass
class Chance:
    """Everything that can happen to a campaign, in an order that a seed decides."""

    shop: Shop
    campaign_id: int
    dice: random.Random
    unread: int
    claimed: list[Grant] = field(default_factory=list)
    posted: list[tuple[Grant, Intent]] = field(default_factory=list)

    async def expand(self) -> None:
        read = min(self.unread, self.dice.randint(0, 12))
        last = read == self.unread
        skipped = self.dice.randint(0, read // 3)
        if await self.shop.expand(read, skipped, last, segments=self.dice.choice((1, 2))):
            self.unread -= read

    async def claim(self) -> None:
        self.claimed += await self.shop.claim(self.dice.randint(1, 4))

    async def intend(self) -> None:
        if self.claimed:
            grant = self.claimed.pop(self.dice.randrange(len(self.claimed)))
            intent = await queue.intent(self.shop.pool, grant, self.shop.replica_id)
            if intent.verdict == "post":
                self.posted.append((grant, intent))

    async def answer(self) -> None:
        if self.posted:
            grant, intent = self.dice.choice(self.posted)  # perhaps for the second time
            states = self.dice.choices((ACCEPTED, REFUSED, UNKNOWN), (6, 3, 1), k=len(intent.ids))
            await self.shop.answer(grant, intent, *states)

    async def one_outcome(self) -> None:
        if self.posted:
            grant, intent = self.dice.choice(self.posted)
            action = self.dice.choice(("again", "back", "refused", "unknown"))
            refusal = self.dice.choice(("a", "b")) if action == "refused" else None
            await queue.settle_batch(
                self.shop.pool,
                grant.batch_id,
                intent.attempt,
                action,
                action,
                most=3,
                refusal=refusal,
            )

    async def withdraw(self) -> None:
        for grant in (*self.claimed[:1], *(one for one, _ in self.posted[-1:])):
            await queue.withdraw(self.shop.pool, grant, "late")

    async def receive(self) -> None:
        ids = [f"M{self.dice.randint(1, self.shop.provider_ids + 1)}" for _ in range(5)]
        await queue.apply_receipts(
            self.shop.pool,
            [ReceiptRow(None, one, self.dice.choice((11, 20, 30)), None, None) for one in ids],
        )
        await queue.rejoin_receipts(self.shop.pool, None)

    async def opt_out(self) -> None:
        await self.shop.pool.execute(
            "insert into opt_out (tenant_id, phone, source) values ($1, $2, 'stop') on conflict do nothing",
            self.shop.id, PHONE + self.dice.randint(0, 100),
        )  # fmt: skip

    async def die(self) -> None:
        await queue.leave(self.shop.pool, self.shop.replica_id, "test")
        await queue.reap(self.shop.pool)
        self.shop.replica_id = await queue.register(self.shop.pool, "test", "0")

    async def decide(self) -> None:
        action = self.dice.choices(
            (campaigns.pause, campaigns.resume, campaigns.retry_failed, campaigns.cancel),
            (6, 12, 6, 0.2),
        )[0]
        with suppress(campaigns.WrongStatus):
            await self.shop.act(self.campaign_id, action)

    async def finish(self) -> None:
        await campaigns.finish(self.shop.pool)


STEPS = (
    ("expand", 3), ("claim", 6), ("intend", 8), ("answer", 6), ("one_outcome", 4), ("withdraw", 1),
    ("receive", 4), ("opt_out", 1), ("die", 1), ("decide", 4), ("finish", 2),
)  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
async def test_totals_and_money_are_true_after_every_step_whatever_the_steps_are(
    shop: Shop, seed: int
) -> None:
    dice = random.Random(seed)
    campaign_id = await shop.begin(60, held=75)
    chance = Chance(shop, campaign_id, dice, unread=60)
    names, weights = zip(*STEPS, strict=True)
    done: list[str] = []
    for name in dice.choices(names, weights, k=120):
        done.append(name)
        await getattr(chance, name)()
        progress = await check_the_account(shop, campaign_id)
        if progress.campaign.status in (CampaignStatus.COMPLETED, CampaignStatus.FAILED):
            assert progress.totals.queued + progress.totals.processing == 0, done
    await drain(chance)
    progress = await check_the_account(shop, campaign_id)
    assert progress.totals.queued + progress.totals.processing == 0
    assert progress.campaign.status in ("completed", "failed", "cancelled")


@pytest.mark.parametrize("seed", range(3))
async def test_totals_and_money_are_true_while_many_work_at_once(shop: Shop, seed: int) -> None:
    campaign_id = await shop.begin(600, held=700)
    done = asyncio.Event()

    async def work(number: int, *steps: str, times: int) -> None:
        chance = Chance(shop, campaign_id, random.Random(f"{seed} {number}"), unread=600)
        for _ in range(times):
            await getattr(chance, chance.dice.choice(steps))()

    async def watch() -> None:
        while not done.is_set():
            await check_the_account(shop, campaign_id)

    watching = asyncio.create_task(watch())
    send = ("claim", "intend", "intend", "answer", "one_outcome", "withdraw")
    await asyncio.gather(
        work(0, "expand", times=80),
        work(1, *send, times=250),
        work(2, *send, times=250),
        work(3, *send, times=250),
        work(4, "receive", "opt_out", "finish", times=100),
        work(5, "decide", times=60),
    )
    done.set()
    await watching
    await check_the_account(shop, campaign_id)


async def drain(chance: Chance) -> None:
    """Lets the campaign come to its end."""
    shop = chance.shop
    await chance.die()
    await chance.shop.act(chance.campaign_id, _resume_if_paused)
    while chance.unread:
        before = chance.unread
        await chance.expand()
        if chance.unread == before and await shop.status(chance.campaign_id) == "cancelled":
            break
    if not chance.unread:
        await shop.expand(0)
    await shop.send_all(ACCEPTED)
    await campaigns.finish(shop.pool)


async def _resume_if_paused(db: database.Connection, campaign: Campaign) -> None:
    if campaign.status == CampaignStatus.PAUSED:
        await campaigns.resume(db, campaign)


# ----------------------------------------------------------------------------------------- batch sizes


@pytest.mark.parametrize(
    ("count", "largest", "tenants", "limits", "size"),
    [
        (1, 500, None, (), 100),
        (2_000, 500, None, (), 100),
        (2_001, 500, None, (), 101),
        (6_000, 500, None, (), 300),
        (10_000, 500, None, (), 500),
        (1_000_000, 500, None, (), 500),
        (1_000_000, 200, None, (), 200),
        (1_000_000, 500, 50, (), 50),
        (100, 500, 1, (), 1),
        (1_000_000, 500, None, (None, None), 500),
        (1_000_000, 500, None, (1_000, None), 500),
        (8_000, 500, None, (500, None), 250),
        (1_000_000, 500, None, (499, None), 499),
        (1_000_000, 500, None, (30, None), 30),
        (1_000_000, 500, None, (1, None), 1),
        (1_000_000, 500, None, (1_000, 700), 350),
        (1_000_000, 500, 7, (10,), 5),
    ],
)
def test_a_batch_is_a_twentieth_within_every_bound(
    count: int, largest: int, tenants: int | None, limits: tuple[int | None, ...], size: int
) -> None:
    assert campaigns.batch_size(count, largest, tenants, limits) == size


# ------------------------------------------------------------------------------------------- beginning


async def test_of_two_who_begin_at_once_exactly_one_does(shop: Shop) -> None:
    campaign = await shop.draft()
    snapshot = Snapshot("contacts", "Shop", "Hi", date(2026, 1, 1), 100, 9, 5, 5)

    async def begin() -> str:
        try:
            await shop.act(
                campaign.id,
                lambda db, locked: campaigns.begin(db, locked, shop.account_id, snapshot),
            )
        except campaigns.WrongStatus as error:
            return error.status
        return "begun"

    assert sorted(await asyncio.gather(begin(), begin(), begin())) == [
        "begun",
        "sending",
        "sending",
    ]
    assert await shop.pool.fetchval("select count(*) from expansion") == 1
    assert await shop.pool.fetchval("select count(*) from lane where campaign_id <> 0") == 1


async def test_a_begin_is_told_to_the_expanders_when_it_commits(
    shop: Shop, connection: database.Connection
) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    await connection.add_listener(
        "smsd_expansion", lambda _c, _pid, _channel, payload: heard.put_nowait(str(payload))
    )
    campaign_id = await shop.begin(3)
    assert int(await asyncio.wait_for(heard.get(), 5)) == campaign_id


async def test_what_was_not_sent_can_be_changed_and_deleted_with_its_recipients(shop: Shop) -> None:
    campaign = await shop.draft(sender="A", list_ids=[1, 2])
    await shop.pool.execute(
        "insert into recipient (campaign_id, phone) values ($1, 1)", campaign.id
    )
    changed = await shop.act(
        campaign.id,
        lambda db, locked: campaigns.update(db, locked, {"text": None, "list_ids": [3]}),
    )
    assert (changed.text, changed.list_ids, changed.sender) == (None, [3], "A")
    await shop.act(campaign.id, campaigns.delete)
    assert await campaigns.get(shop.pool, shop.id, campaign.id) is None
    assert await shop.pool.fetchval("select count(*) from recipient") == 0


async def test_what_was_sent_can_be_neither_changed_nor_deleted(shop: Shop) -> None:
    campaign = await shop.draft()
    for status in ("sending", "paused", "completed", "failed", "cancelled"):
        await shop.pool.execute("update campaign set status = $1", status)
        for act in (
            lambda db, locked: campaigns.update(db, locked, {"name": "x"}),
            campaigns.delete,
        ):
            with pytest.raises(campaigns.WrongStatus) as refused:
                await shop.act(campaign.id, act)
            assert refused.value.status == status
    assert (await shop.progress(campaign.id)).campaign.name == "Sale"


# --------------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize(
    ("states", "skipped", "ends"),
    [
        ((ACCEPTED,), 0, "completed"),
        ((REFUSED,), 0, "failed"),
        ((REFUSED,), 2, "failed"),
        ((ACCEPTED, REFUSED), 0, "completed"),
        ((UNKNOWN, REFUSED), 0, "completed"),
        ((), 4, "completed"),
    ],
    ids=["accepted", "refused", "refused or skipped", "one accepted", "one unknown", "all skipped"],
)
async def test_a_campaign_fails_only_if_nothing_may_have_arrived_and_something_was_refused(
    shop: Shop, states: tuple[MessageState, ...], skipped: int, ends: str
) -> None:
    campaign_id = await shop.begin(4)
    await shop.expand(4, skipped)
    await shop.send_all(*states)
    assert await campaigns.finish(shop.pool) == [campaign_id]
    progress = await check_the_account(shop, campaign_id)
    assert progress.campaign.status == ends
    assert progress.campaign.finished_at is not None
    assert await campaigns.finish(shop.pool) == []


async def test_a_campaign_goes_on_while_anything_is_left_to_read_or_send(shop: Shop) -> None:
    campaign_id = await shop.begin(20)
    assert await campaigns.finish(shop.pool) == []
    await shop.expand(10, last=False)
    await shop.send_all(ACCEPTED)
    assert await campaigns.finish(shop.pool) == []
    await shop.expand(10)
    posted = await shop.post(8)
    assert await campaigns.finish(shop.pool) == []
    await shop.answer(*posted[0], ACCEPTED)
    grant, intent = posted[1]
    await queue.settle_batch(shop.pool, grant.batch_id, intent.attempt, "again", "retry", most=3)
    assert await campaigns.finish(shop.pool) == []
    await shop.send_all(ACCEPTED)
    assert await campaigns.finish(shop.pool) == [campaign_id]


async def test_an_unknown_batch_keeps_no_campaign_open(shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(shop.pool, grant.batch_id, intent.attempt, "unknown", "unknown")
    assert await campaigns.finish(shop.pool) == [campaign_id]
    progress = await check_the_account(shop, campaign_id)
    assert progress.campaign.status == "completed"
    assert progress.totals.unknown == 5


async def test_a_finish_that_meets_a_retry_leaves_the_campaign_sending(shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    await shop.send_all(REFUSED)
    async with shop.pool.acquire() as db, db.transaction():
        locked = await campaigns.lock(db, shop.id, campaign_id)
        assert locked is not None
        await campaigns.retry_failed(db, locked)
        assert await campaigns.finish(shop.pool) == []
    assert await campaigns.finish(shop.pool) == []
    assert await shop.status(campaign_id) == "sending"


async def test_a_finish_that_meets_a_batch_given_back_leaves_the_campaign_sending(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(5)
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(shop.pool, grant.batch_id, intent.attempt, "unknown", "unknown")
    async with shop.pool.acquire() as db, db.transaction():
        assert await queue.withdraw(db, grant, "late")
        assert await campaigns.finish(shop.pool) == []
    assert await campaigns.finish(shop.pool) == []
    progress = await check_the_account(shop, campaign_id)
    assert (progress.campaign.status, progress.totals.queued) == ("sending", 5)


async def test_a_campaign_that_ended_sends_again_when_a_batch_of_it_is_given_back(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(5)
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(shop.pool, grant.batch_id, intent.attempt, "unknown", "unknown")
    assert await campaigns.finish(shop.pool) == [campaign_id]
    assert await queue.withdraw(shop.pool, grant, "late")
    campaign = (await check_the_account(shop, campaign_id)).campaign
    assert (campaign.status, campaign.finished_at) == ("sending", None)


# ------------------------------------------------------------------------------- pause, resume, cancel


async def test_a_paused_campaign_reads_and_posts_nothing_until_it_is_resumed(shop: Shop) -> None:
    campaign_id = await shop.begin(20)
    await shop.expand(10, last=False)
    (leased,) = await shop.claim()
    await shop.act(campaign_id, campaigns.pause)
    assert await shop.claim() == []
    assert (await queue.intent(shop.pool, leased, shop.replica_id)).verdict == "paused"
    assert await shop.expand(10) == 0
    progress = await check_the_account(shop, campaign_id)
    assert (progress.campaign.status, progress.campaign.paused_reason) == (
        "paused",
        "PAUSED_BY_USER",
    )
    await shop.act(campaign_id, campaigns.resume)
    await shop.expand(10)
    await shop.send_all(ACCEPTED)
    assert await campaigns.finish(shop.pool) == [campaign_id]
    assert (await check_the_account(shop, campaign_id)).totals.pending == 20


async def test_a_chunk_that_was_read_before_a_pause_is_not_written_after_it(shop: Shop) -> None:
    campaign_id = await shop.begin(5)
    expansion = await expansions.claim(shop.pool, shop.replica_id)
    assert expansion is not None
    await shop.act(campaign_id, campaigns.pause)
    await shop.write(expansion, 5)
    assert (await check_the_account(shop, campaign_id)).totals.total == 0
    await shop.act(campaign_id, campaigns.resume)
    await shop.expand(5)
    assert (await check_the_account(shop, campaign_id)).totals.queued == 5


async def test_a_person_s_pause_stands_over_one_that_would_end_by_itself(shop: Shop) -> None:
    campaign_id = await shop.begin(5)
    await shop.pool.execute("select pause_campaign($1, 'INSUFFICIENT_CREDITS', 'x')", campaign_id)
    await shop.act(campaign_id, campaigns.pause)
    async with shop.pool.acquire() as db:
        await credits.grant(db, shop.id, 5, "top-up")
    campaign = (await shop.progress(campaign_id)).campaign
    assert (campaign.status, campaign.paused_reason, campaign.paused_detail) == (
        "paused", "PAUSED_BY_USER", None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("action", "taken"),
    [
        (campaigns.pause, {"sending": "paused", "paused": "paused"}),
        (campaigns.resume, {"sending": "sending", "paused": "sending"}),
        (
            campaigns.cancel,
            {"scheduled": "cancelled", "sending": "cancelled", "paused": "cancelled", "cancelled": "cancelled"},
        ),
        (
            campaigns.retry_failed,
            {"sending": "sending", "paused": "paused", "completed": "completed", "failed": "failed"},
        ),
    ],
    ids=["pause", "resume", "cancel", "retry"],
)  # fmt: skip
async def test_each_action_is_taken_in_some_statuses_and_refused_in_all_others(
    shop: Shop, action: Callable[..., Coroutine[Any, Any, Any]], taken: dict[str, str]
) -> None:
    campaign = await shop.draft()
    for status in CampaignStatus:
        await shop.pool.execute("update campaign set status = $1", status)
        if status in taken:
            await shop.act(campaign.id, action)
            assert await shop.status(campaign.id) == taken[status]
        else:
            with pytest.raises(campaigns.WrongStatus) as refused:
                await shop.act(campaign.id, action)
            assert refused.value.status == status
            assert await shop.status(campaign.id) == status


async def test_a_cancel_takes_back_all_that_has_not_left_and_records_what_has(shop: Shop) -> None:
    campaign_id = await shop.begin(100, held=130)
    await shop.expand(40, last=False, segments=2)
    sent, sending, waits = await shop.post(3)
    await shop.answer(*sent, ACCEPTED)
    await queue.settle_batch(
        shop.pool, waits[0].batch_id, waits[1].attempt, "again", "retry", most=3, delay_seconds=60
    )
    (leased,) = await shop.claim()
    await shop.act(campaign_id, campaigns.cancel)
    assert (await queue.intent(shop.pool, leased, shop.replica_id)).verdict == "cancelled"
    assert await shop.claim() == []
    assert await shop.expand(10) == 0
    await shop.answer(*sending, ACCEPTED, REFUSED)
    progress = await check_the_account(shop, campaign_id)
    assert progress.campaign.status == "cancelled"
    sums = progress.totals
    assert (sums.pending, sums.refused, sums.cancelled, sums.total) == (6, 4, 30, 40)
    assert (progress.expanded, progress.shown_total, sums.processed) == (True, 40, 40)
    assert (await credits.balance(shop.pool, shop.id)) == (10_000 - 12, 0)
    released = await shop.pool.fetch("select amount from ledger where reason = 'cancelled'")
    assert sorted(row["amount"] for row in released) == [10, 78 + 50]
    assert await campaigns.finish(shop.pool) == []


async def test_a_batch_given_back_or_cut_while_its_campaign_is_cancelled_is_cancelled_too(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(10)
    (leased,) = await shop.claim()
    async with shop.pool.acquire() as other, other.transaction():
        assert await queue.withdraw(other, leased, "late")
        await other.execute("select cut_batch($1, 2)", leased.batch_id)
        cancelling = asyncio.create_task(shop.act(campaign_id, campaigns.cancel))
        await until_somebody_waits(shop.pool)
    await cancelling
    progress = await check_the_account(shop, campaign_id)
    assert progress.totals.cancelled == 10
    assert await shop.pool.fetchval("select count(*) from batch where state < 10") == 0


async def test_batches_cut_again_and_again_while_their_campaign_is_cancelled_are_cancelled_too(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(20, batch_size=10)
    pool = shop.pool
    first, second = [row["id"] for row in await pool.fetch("select id from batch order by id")]
    async with pool.acquire() as one, pool.acquire() as other, pool.acquire() as third:
        await one.execute("begin")
        await one.execute("select cut_batch($1, 4)", first)
        await other.execute("begin")
        await other.execute("select from batch where id = $1 for no key update", second)
        cancelling = asyncio.create_task(shop.act(campaign_id, campaigns.cancel))
        await until_waited_for(pool, one)
        await one.execute("commit")
        await until_waited_for(pool, other)
        # What was cut off is claimed and cut once more, all of it unseen by the first look.
        rest = await pool.fetchval("select max(id) from batch")
        await third.execute("begin")
        await third.execute("select cut_batch($1, 2)", rest)
        await third.execute("update batch set state = 2 where id = $1", rest)
        await other.execute("commit")
        await until_waited_for(pool, third)
        await third.execute("commit")
        await cancelling
    assert await pool.fetchval("select count(*) from batch where state in (0, 1)") == 0


# ------------------------------------------------------------------------------------------ retry failed


async def test_retry_sends_what_was_refused_once_more_and_nothing_else(shop: Shop) -> None:
    campaign_id = await shop.sending(10)
    await shop.send_all(ACCEPTED, REFUSED, UNKNOWN, ACCEPTED)
    await campaigns.finish(shop.pool)
    before = await credits.balance(shop.pool, shop.id)
    retry = await shop.act(campaign_id, campaigns.retry_failed)
    assert retry == (2, 2, True)
    progress = await check_the_account(shop, campaign_id)
    assert (progress.campaign.status, progress.campaign.finished_at) == ("sending", None)
    assert (await credits.balance(shop.pool, shop.id)).reserved == before.reserved + 2
    posted = await shop.post(8)
    assert sorted(len(intent.ids) for _, intent in posted) == [1, 1]
    for one in posted:
        await shop.answer(*one, ACCEPTED)
    assert await campaigns.finish(shop.pool) == [campaign_id]
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.refused, sums.unknown) == (8, 0, 2)


async def test_retry_takes_whole_batches_that_ran_out_of_attempts(shop: Shop) -> None:
    campaign_id = await shop.sending(10)
    for grant, intent in await shop.post(2):
        assert await queue.settle_batch(
            shop.pool, grant.batch_id, intent.attempt, "again", "retry", most=1
        ) == "failed"  # fmt: skip
    await campaigns.finish(shop.pool)
    assert await shop.status(campaign_id) == "failed"
    assert await shop.act(campaign_id, campaigns.retry_failed) == (10, 10, True)
    await shop.send_all(ACCEPTED)
    await campaigns.finish(shop.pool)
    progress = await check_the_account(shop, campaign_id)
    assert (progress.campaign.status, progress.totals.pending) == ("completed", 10)


async def test_a_retry_with_nothing_to_retry_changes_nothing(shop: Shop) -> None:
    campaign_id = await shop.begin(5)
    await shop.expand(5, skipped=5)
    await campaigns.finish(shop.pool)
    assert await shop.act(campaign_id, campaigns.retry_failed) == (0, 0, True)
    assert await shop.status(campaign_id) == "completed"


async def test_a_retry_beyond_the_credits_says_so_and_leaves_no_trace_once_rolled_back(
    pool: database.Pool,
) -> None:
    shop = await new_shop(pool, granted=5)
    campaign_id = await shop.sending(5)
    await shop.send_all(REFUSED)
    other = await shop.begin(3)
    before = await check_the_account(shop, campaign_id)
    with pytest.raises(ZeroDivisionError):
        await shop.act(campaign_id, _retry_and_fail)
    after = await check_the_account(shop, campaign_id)
    assert (after.campaign, after.totals) == (before.campaign, before.totals)
    await shop.act(other, campaigns.cancel)
    assert await shop.act(campaign_id, campaigns.retry_failed) == (5, 5, True)


async def _retry_and_fail(db: database.Connection, campaign: Campaign) -> None:
    assert await campaigns.retry_failed(db, campaign) == (5, 5, False)
    raise ZeroDivisionError


async def test_a_paused_campaign_stays_paused_when_its_failures_are_queued_again(
    shop: Shop,
) -> None:
    campaign_id = await shop.sending(10)
    ((grant, intent),) = await shop.post()
    await shop.answer(grant, intent, REFUSED)
    await shop.act(campaign_id, campaigns.pause)
    assert await shop.act(campaign_id, campaigns.retry_failed) == (5, 5, True)
    assert await shop.claim() == []
    await shop.act(campaign_id, campaigns.resume)
    await shop.send_all(ACCEPTED)
    assert (await check_the_account(shop, campaign_id)).totals.pending == 10


async def test_late_evidence_of_an_attempt_before_the_retry_changes_nothing(shop: Shop) -> None:
    campaign_id = await shop.sending(5)
    ((grant, intent),) = await shop.post()
    await shop.answer(grant, intent, REFUSED)
    await shop.act(campaign_id, campaigns.retry_failed)
    await shop.answer(grant, intent, ACCEPTED)
    assert (await check_the_account(shop, campaign_id)).totals.queued == 5


# -------------------------------------------------------------------------------------------- progress


async def test_the_bar_ends_at_what_was_counted_until_all_is_read(shop: Shop) -> None:
    campaign_id = await shop.begin(30)
    progress = await shop.progress(campaign_id)
    assert (progress.expanded, progress.read, progress.of, progress.shown_total) == (
        False,
        0,
        30,
        30,
    )
    assert progress.rate_per_second is None
    await shop.expand(10, last=False)
    await shop.send_all(ACCEPTED)
    progress = await shop.progress(campaign_id)
    assert (progress.read, progress.totals.total, progress.shown_total) == (10, 10, 30)
    seconds = (progress.now - (progress.campaign.started_at or progress.now)).total_seconds()
    assert progress.rate_per_second == pytest.approx(10 / seconds)
    await shop.expand(15)
    progress = await shop.progress(campaign_id)
    assert (progress.expanded, progress.read, progress.totals.total, progress.shown_total) == (
        True, 25, 25, 25,
    )  # fmt: skip


async def test_what_a_campaign_waits_for_has_a_word(shop: Shop) -> None:
    async def word() -> str | None:
        return await campaigns.limited_by(shop.pool, await shop.progress(campaign_id))

    campaign_id = await shop.begin(30)
    assert await word() == "expansion"
    await shop.expand(30)
    assert await word() is None
    await shop.claim()
    for table, limited in (("tenant", "tenant_limit"), ("traffic_account", "account_limit")):
        await shop.pool.execute(f"update {table} set requests_per_second = 1")
        assert await word() == limited
        await shop.pool.execute(f"update {table} set requests_per_second = 50000")
    await queue.block_account(shop.pool, shop.account_id, 60)
    assert await word() == "account_throttled"
    await queue.pause_account(shop.pool, shop.account_id, "UNAUTHORIZED", "x", "")
    assert await word() == "account_paused"
    await shop.act(campaign_id, campaigns.pause)
    assert await word() is None


async def test_a_list_shows_what_became_of_the_messages_newest_first(shop: Shop) -> None:
    first = await shop.sending(10)
    await shop.send_all(ACCEPTED, REFUSED, ACCEPTED)
    await shop.receive(M1=30, M3=20)
    second = await shop.draft()
    page, total = await campaigns.list_page(shop.pool, shop.id, None, None, 10, 0)
    assert [(campaign.id, stats) for campaign, stats in page] == [
        (second.id, (0, 0, 0, 0)),
        (first, (7, 1, 3, 6)),
    ]
    assert total == 2
    assert await campaigns.stats(shop.pool, first) == (7, 1, 3, 6)


SEARCHES: list[tuple[str | None, str | None, list[str]]] = [
    (None, None, ["100% off", "spring_sale", "Spring"]),
    ("SPRING", None, ["spring_sale", "Spring"]),
    ("%", None, ["100% off"]),
    ("_", None, ["spring_sale"]),
    ("winter", None, []),
    (None, "draft", ["100% off", "spring_sale"]),
    ("spring", "completed", ["Spring"]),
]


async def test_a_list_is_searched_by_part_of_the_name_and_by_status(shop: Shop) -> None:
    for name in ("Spring", "spring_sale", "100% off"):
        await campaigns.create(shop.pool, shop.id, name, {})
    await shop.pool.execute("update campaign set status = 'completed' where name = 'Spring'")
    for q, status, names in SEARCHES:
        page, total = await campaigns.list_page(shop.pool, shop.id, q, status, 10, 0)
        assert ([campaign.name for campaign, _ in page], total) == (names, len(names)), (q, status)
