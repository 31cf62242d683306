"""Who gets how much of a traffic account: the claim itself, on a clock that is moved by hand.

Half a minute of sending is claimed as fast as Postgres answers: whenever nothing may leave, the clock goes on to when
the claim says to come back. What is counted are grants, since each is a request that leaves at its slot.
"""

import functools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from shop import Shop
from support import (
    SECOND_US,
    Clock,
    largest_window,
    new_account,
    open_shop,
    sending,
    take_the_clock,
)

from smsd import campaigns, database, queue
from smsd.simulator import Simulator, Switches

LIMIT = 50


def jain(parts: Sequence[float]) -> float:
    """Jain's index: 1 where all parts are equal, 1/n where one has everything."""
    return sum(parts) ** 2 / (len(parts) * sum(part * part for part in parts))


class Sent(NamedTuple):
    """One request that left; `slot_us` on the clock of the test."""

    slot_us: int
    tenant_id: int
    campaign_id: int
    n: int


@dataclass
class Market:
    """An account that several tenants want."""

    pool: database.Pool
    clock: Clock
    account_id: int
    replica_id: int
    sent: list[Sent] = field(default_factory=list)
    lost: int = 0
    dice: random.Random = field(default_factory=lambda: random.Random(1))

    async def shop(self, **fields: object) -> Shop:
        return await open_shop(self.pool, self.account_id, self.replica_id, 10**9, **fields)

    async def run(self, seconds: float, deaths: float = 0) -> list[Sent]:
        """What leaves in so many seconds. After this part of the claims the replica dies, before anything has left:
        its leases are taken from it, and another goes on."""
        ends_us = self.clock.now_us + int(seconds * SECOND_US)
        before = len(self.sent)
        while self.clock.now_us < ends_us:
            claim = await queue.claim(self.pool, self.account_id, self.replica_id, 8, lead_us=0)
            if not claim.grants:
                back_us = ends_us if claim.back_us is None else min(claim.back_us, ends_us)
                await self.clock.move(max(back_us - self.clock.now_us, 1))
            elif self.dice.random() < deaths:
                await self.die()
                self.lost += len(claim.grants)
            else:
                self.sent += [
                    Sent(one.slot_us, one.tenant_id, one.campaign_id, one.n) for one in claim.grants
                ]
        return self.sent[before:]

    async def die(self) -> None:
        """The replica that claimed is declared dead, and what it had leased goes back."""
        beat = (await queue.beats(self.pool))[self.replica_id]
        assert await queue.bury(self.pool, self.replica_id, beat)
        released, unknown = await queue.reap(self.pool)
        assert (released > 0, unknown) == (True, 0)
        self.replica_id = await queue.register(self.pool, "next", "0")

    async def limit(self, **limits: int | None) -> None:
        for column, value in limits.items():
            await self.pool.execute(
                f"update traffic_account set {column} = $2 where id = $1", self.account_id, value
            )


@pytest.fixture
async def market(pool: database.Pool) -> Market:
    """An account of 50 requests per second, whose limiter has been open for a while."""
    account_id = await new_account(pool, requests_per_second=LIMIT)
    clock = await take_the_clock(pool)
    await clock.move(10 * SECOND_US)
    return Market(pool, clock, account_id, await queue.register(pool, "first", "0"))


def shares(
    sent: Sequence[Sent], shops: Sequence[Shop], of: Callable[[Sent], float] = lambda _: 1
) -> list[float]:
    """What each tenant got, in requests or in what `of` says."""
    got: Counter[int] = Counter()
    for one in sent:
        got[one.tenant_id] += of(one)  # type: ignore[assignment]
    return [got[shop.id] for shop in shops]


def messages(one: Sent) -> float:
    return one.n


def use(sent: Sequence[Sent], seconds: float, limit: int = LIMIT) -> float:
    """The part of the account's requests that was used."""
    return len(sent) / (limit * seconds)


async def many_batches(shop: Shop, campaign_id: int, batches: int, n: int) -> None:
    """So many more ready batches of n messages, without the messages: a claim does not look at them."""
    await shop.pool.execute(
        "with ids as (select take_message_ids($2::int * $3::int) as first), lane_ as (select * from lane where campaign_id = $1"
        " and tenant_id = $4 and class = (case when $1::bigint = 0 then 0 else 1 end)), batch_ as ("
        " insert into batch (campaign_id, lane_id, tenant_id, account_id, first_id, last_id, n, segments, sender)"
        " select $1, l.id, $4::bigint, l.account_id, first + i * $3, first + (i + 1) * $3 - 1, $3, $3, 'Shop'"
        " from ids, lane_ l, generate_series(0, $2 - 1) i)"
        " select wake_lane(l.id, first) from ids, lane_ l",
        campaign_id, batches, n, shop.id,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- by weight


async def test_equal_tenants_get_equal_parts(market: Market) -> None:
    shops = [await market.shop() for _ in range(5)]
    for shop in shops:
        await shop.sending(200, batch_size=1)
    sent = await market.run(10)
    assert jain(shares(sent, shops)) >= 0.99
    assert use(sent, 10) >= 0.95


async def test_weights_of_one_two_and_four_are_kept_within_a_twentieth(market: Market) -> None:
    shops = [await market.shop(weight=float(weight)) for weight in (1, 2, 4)]
    for shop in shops:
        await shop.sending(1_000, batch_size=1)
    sent = await market.run(30)
    for part, weight in zip(shares(sent, shops), (1, 2, 4), strict=True):
        assert part == pytest.approx(len(sent) * weight / 7, rel=0.05)


async def test_several_campaigns_of_a_tenant_share_its_part(market: Market) -> None:
    many, one = await market.shop(), await market.shop()
    own = [await many.sending(400, batch_size=1) for _ in range(3)]
    await one.sending(800, batch_size=1)
    sent = await market.run(20)
    assert jain(shares(sent, [many, one])) >= 0.999
    by_campaign = Counter(each.campaign_id for each in sent)
    assert jain([by_campaign[campaign_id] for campaign_id in own]) >= 0.99


async def test_a_new_campaign_does_not_stand_before_its_tenant_s_old_one_after_a_crash_of_postgres(
    market: Market,
) -> None:
    """A crash empties what is not logged, limiters and shares; lanes remember how much they had."""
    shop = await market.shop()
    old = await shop.sending(800, batch_size=1)
    await market.run(10)
    await market.pool.execute("truncate rate, share")
    new = await shop.sending(400, batch_size=1)
    await market.run(1.5)  # limiters without a memory are closed
    by_campaign = Counter(one.campaign_id for one in await market.run(4))
    assert jain([by_campaign[old], by_campaign[new]]) >= 0.99


async def test_fifty_unequal_tenants_get_by_weight_what_their_own_limits_leave(
    market: Market,
) -> None:
    await market.limit(requests_per_second=100)
    weights = [1 + i % 4 for i in range(50)]
    limits = [1 if i % 5 == 0 else 1_000 for i in range(50)]
    shops = [
        await market.shop(weight=float(weight), requests_per_second=limit)
        for weight, limit in zip(weights, limits, strict=True)
    ]
    for i, shop in enumerate(shops):
        await shop.sending(100 * (1 + i % 3), batch_size=1 + i % 3)
    sent = await market.run(12)
    got = shares(sent, shops)
    limited = [part for part, limit in zip(got, limits, strict=True) if limit == 1]
    free = [
        part / weight for part, weight, limit in zip(got, weights, limits, strict=True) if limit > 1
    ]
    assert min(limited) >= 11
    assert jain(free) >= 0.99
    assert use(sent, 12, 100) >= 0.95


# ------------------------------------------------------------------------------------- who comes, who waited


async def test_the_first_request_of_a_newcomer_behind_a_million_leaves_within_a_second(
    market: Market,
) -> None:
    large, newcomer = await market.shop(), await market.shop()
    await many_batches(large, await large.sending(1), 2_000, 500)
    await market.run(10)
    began_us = market.clock.now_us
    await newcomer.sending(1)
    sent = await market.run(2)
    (first,) = [one.slot_us for one in sent if one.tenant_id == newcomer.id]
    assert first - began_us < SECOND_US
    assert sum(one.n for one in sent if one.tenant_id == large.id) > 40_000, (
        "a million is before it"
    )


async def test_beside_a_campaign_that_takes_all_a_newcomer_s_first_message_arrives_within_a_second(
    pool: database.Pool,
) -> None:
    """On the real clock, with a sender and a provider."""
    account_id = await new_account(pool, requests_per_second=10)
    replica_id = await queue.register(pool, "test", "0")
    large = await open_shop(pool, account_id, replica_id, 10**9)
    await large.sending(50_000, batch_size=500)
    async with (
        Simulator(Switches(dlr=False)) as mitto,
        sending(pool, replica_id, mitto.url),
    ):
        await mitto.requests_reached(5)
        for come in range(1, 4):
            newcomer = await open_shop(pool, account_id, replica_id)
            started = time.monotonic()
            await newcomer.sending(1)
            await mitto.until(functools.partial(has_come, mitto, come))
            assert time.monotonic() - started < 1
        assert mitto.ledger.accepted_count < 40_000


def has_come(mitto: Simulator, n: int) -> bool:
    """Whether so many requests brought one message alone."""
    return sum(1 for one in mitto.ledger.requests if one.accepted == 1) >= n


@pytest.mark.parametrize("limit", ["requests_per_second", "messages_per_second"])
async def test_a_small_campaign_beside_a_large_one_takes_little_more_than_its_fair_time(
    market: Market, limit: str
) -> None:
    """3,000 messages in batches of 100 beside more in batches of 500: half of what counts is theirs."""
    if limit == "messages_per_second":
        await market.limit(requests_per_second=1_000, messages_per_second=5_000)
    fair_seconds = 30 / (LIMIT / 2) if limit == "requests_per_second" else 3_000 / (5_000 / 2)
    large, small = await market.shop(), await market.shop()
    if limit == "messages_per_second":
        await large.sending(20_000, batch_size=500)
    else:
        await many_batches(large, await large.sending(1), 200, 500)
    await market.run(1)
    began_us = market.clock.now_us
    await small.sending(3_000, batch_size=100)
    sent = [one for one in await market.run(3) if one.tenant_id == small.id]
    assert sum(one.n for one in sent) == 3_000
    assert max(one.slot_us for one in sent) - began_us <= 1.8 * fair_seconds * SECOND_US


@pytest.mark.parametrize("known", [False, True])
async def test_a_tenant_that_was_idle_earns_no_burst(market: Market, known: bool) -> None:
    """Whether or not it had sent before it was idle."""
    busy, idle = await market.shop(), await market.shop()
    await busy.sending(1_000, batch_size=1)
    if known:
        await idle.sending(20, batch_size=1)
    await market.run(10)
    await idle.sending(300, batch_size=1)
    for _ in range(3):
        one, other = shares(await market.run(1), [busy, idle])
        assert abs(one - other) <= 3


@pytest.mark.parametrize("held_by", ["a limit", "a pause", "quiet hours"])
async def test_who_is_released_starves_nobody_with_old_credit(market: Market, held_by: str) -> None:
    held, others = await market.shop(), [await market.shop() for _ in range(3)]
    campaign_id = await held.sending(600, batch_size=1)
    for other in others:
        await other.sending(600, batch_size=1)
    await market.run(2)
    change = "update tenant set requests_per_second = $2 where id = $1"
    match held_by:
        case "a limit":
            await market.pool.execute(change, held.id, 1)
        case "a pause":
            await held.act(campaign_id, campaigns.pause)
        case "quiet hours":
            until_us = market.clock.now_us + 10 * SECOND_US
            await market.pool.execute(
                "update lane set not_before = $2 where campaign_id = $1", campaign_id, until_us
            )
    (little,) = shares(await market.run(10), [held])
    assert little <= 15
    match held_by:
        case "a limit":
            await market.pool.execute(change, held.id, 1_000)
        case "a pause":
            await held.act(campaign_id, campaigns.resume)
    await market.run(1.1)  # what a limit had put off
    for _ in range(4):
        sent = await market.run(1)
        assert max(shares(sent, [held])) <= LIMIT / 4 + 2
        assert min(shares(sent, others)) >= LIMIT / 4 - 3
    sent = market.sent[-4 * LIMIT :]
    assert jain(shares(sent, [held, *others])) >= 0.99


async def test_a_tenant_limited_to_one_a_second_costs_the_others_nothing(market: Market) -> None:
    limited = await market.shop(requests_per_second=1)
    others = [await market.shop() for _ in range(3)]
    for shop in (limited, *others):
        await shop.sending(600, batch_size=1)
    sent = await market.run(30)
    assert use(sent, 30) >= 0.95
    assert jain(shares(sent, others)) >= 0.99
    own = [(one.slot_us, 1) for one in sent if one.tenant_id == limited.id]
    assert largest_window(own, SECOND_US) == 1
    assert len(own) >= 27


# --------------------------------------------------------------------------------------------- what is paid


async def test_by_messages_a_tenant_with_batches_of_one_takes_no_more_than_its_part(
    market: Market,
) -> None:
    """Requests are plenty here: batches of one may come fifty times as often, and do."""
    await market.limit(requests_per_second=1_000, messages_per_second=500)
    small, large = await market.shop(), await market.shop()
    await small.sending(3_000, batch_size=1)
    await large.sending(6_000, batch_size=50)
    sent = await market.run(10)
    one, other = shares(sent, [small, large], messages)
    assert one == pytest.approx(other, rel=0.05)
    assert (one + other) / (500 * 10) >= 0.8


async def test_by_requests_a_tenant_with_batches_of_one_takes_no_more_than_its_part(
    market: Market,
) -> None:
    small, large = await market.shop(), await market.shop()
    await small.sending(600, batch_size=1)
    await large.sending(20_000, batch_size=50)
    one, other = shares(await market.run(15), [small, large])
    assert one == pytest.approx(other, rel=0.02)


async def test_where_both_are_limited_each_pays_for_what_it_needs_more_of(market: Market) -> None:
    """A batch of one takes a fiftieth of a second of requests, one of fifty a twentieth of a second of messages: both
    get as many seconds of the account, so five batches of one leave for two of fifty."""
    await market.limit(messages_per_second=1_000)
    small, large = await market.shop(), await market.shop()
    await small.sending(800, batch_size=1)
    await large.sending(15_000, batch_size=50)
    one, other = shares(await market.run(20), [small, large])
    assert one / other == pytest.approx(2.5, rel=0.05)


# ------------------------------------------------------------------------------------------- single messages


async def test_a_tenant_with_many_single_messages_pays_for_them_out_of_its_part(
    market: Market,
) -> None:
    """They go first only while their tenant is not more than a second of its share ahead."""
    single, other = await market.shop(), await market.shop()
    await many_batches(single, 0, 1_000, 1)
    await other.sending(1_000, batch_size=1)
    await market.run(5)
    sent = await market.run(10)
    assert jain(shares(sent, [single, other])) >= 0.99


async def test_a_single_message_leaves_in_its_turn_before_the_campaigns_of_all_tenants(
    market: Market,
) -> None:
    """A turn comes round every half second here."""
    shops = [await market.shop() for _ in range(25)]
    for shop in shops:
        await shop.sending(40, batch_size=1)
    await market.run(3)
    for shop in shops[:4]:
        began_us = market.clock.now_us
        await many_batches(shop, 0, 1, 1)
        sent = await market.run(1)
        (slot_us,) = [one.slot_us for one in sent if one.campaign_id == 0]
        assert slot_us - began_us < 0.2 * SECOND_US


async def test_campaigns_keep_a_tenth_beside_any_number_of_single_messages(market: Market) -> None:
    """Of one tenant, so that nothing but the rank of single messages decides."""
    shop = await market.shop()
    await many_batches(shop, 0, 600, 1)
    await shop.sending(300, batch_size=1)
    sent = await market.run(10)
    campaign = sum(1 for one in sent if one.campaign_id)
    assert campaign / len(sent) >= 0.099
    assert campaign / len(sent) <= 0.2, "single messages go first"
    assert use(sent, 10) >= 0.95


# --------------------------------------------------------------------------------------------------- replicas


async def test_replicas_that_die_change_no_share(market: Market) -> None:
    """About every seventh claim is its replica's last; what it had leased is claimed again by the next."""
    shops = [await market.shop(weight=float(weight)) for weight in (1, 2, 4)]
    for shop in shops:
        await shop.sending(1_000, batch_size=1)
    sent = await market.run(30, deaths=0.15)
    assert market.lost > 100
    for part, weight in zip(shares(sent, shops), (1, 2, 4), strict=True):
        assert part == pytest.approx(len(sent) * weight / 7, rel=0.05)
