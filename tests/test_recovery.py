"""What is forgotten in a failover or a restore: a copy of the database, made at some moment, on which work goes on."""

import asyncio
import random
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import asyncpg
import pytest
from conftest import database_url
from shop import ACCEPTED, Shop, check_the_account, until_somebody_waits
from support import assert_sound, new_account, open_shop

from smsd import database, expansions, mitto, queue, recovery
from smsd.mitto import ItemResult
from smsd.model import BatchState, CampaignStatus
from smsd.recovery import Memory


@dataclass
class World:
    """A shop whose database is copied at some moment, and forgets what came after it when the copy takes over. Every
    replica has a memory; `posted` counts what reached Mitto, which forgets nothing."""

    server: str
    name: str
    shop: Shop
    memories: dict[int, Memory] = field(default_factory=dict)
    posted: Counter[int] = field(default_factory=Counter)
    intents: dict[queue.Grant, queue.Intent] = field(default_factory=dict)

    @property
    def pool(self) -> database.Pool:
        return self.shop.pool

    async def join(self) -> int:
        """One more replica."""
        replica_id = await queue.register(self.pool, "test", "0")
        self.memories[replica_id] = Memory()
        self.memories[replica_id].beaten(replica_id, 0, 0.0)
        await self.beat(replica_id)
        return replica_id

    async def beat(self, replica_id: int) -> queue.Beat:
        memory = self.memories[replica_id]
        beat = await queue.beat(self.pool, replica_id, memory.known_beat)
        assert beat is not None
        if beat.kept and memory.kept is None:
            memory.kept = beat.identity
        if not memory.must_assert(beat):
            memory.beaten(replica_id, beat.beat, mitto.clock())
        return beat

    async def fork(self) -> None:
        """The copy, as it stands now."""
        await self.pool.close()
        connection = await asyncpg.connect(self.server)
        await connection.execute(f"drop database if exists {self.name}_copy with (force)")
        await connection.execute(
            f"create database {self.name}_copy template {self.name} strategy file_copy"
        )
        await connection.close()
        self.shop.pool = await database.open_pool(database_url(self.server, self.name), 4)

    async def fail_over(
        self, greet: Callable[[database.Connection], Awaitable[None]] | None = recovery.greet
    ) -> None:
        """The copy takes over."""
        await self.pool.close()
        url = database_url(self.server, f"{self.name}_copy")
        self.shop.pool = await database.open_pool(url, 4, greet)

    async def claim(self, replica_id: int, want: int = 1) -> list[queue.Grant]:
        claimed = await queue.claim(self.pool, self.shop.account_id, replica_id, want, lead_us=0)
        for grant in claimed.grants:
            self.memories[replica_id].begin(self.shop.account_id, replica_id, grant)
        return list(claimed.grants)

    async def post(self, replica_id: int, grant: queue.Grant) -> queue.Intent | None:
        """Intent and POST; None where the intent says no."""
        intent = await queue.intent(self.pool, grant, replica_id)
        memory = self.memories[replica_id]
        if intent.verdict != "post":
            memory.end(grant)
            return None
        memory.posted(grant, intent)
        self.intents[grant] = intent
        self.posted.update(intent.phones)
        return intent

    async def accept(self, replica_id: int, grant: queue.Grant, intent: queue.Intent) -> None:
        """Mitto took all of it, and that is written."""
        items = [ItemResult(one, ACCEPTED, f"M{one}", None) for one in intent.ids]

        async def write() -> object:
            return await queue.settle_items(
                self.pool, grant.batch_id, intent.attempt, queue.Answer.of(items, "bulk", 200)
            )

        await self.settle(replica_id, grant, write, sent=True)

    async def refuse(
        self, replica_id: int, grant: queue.Grant, intent: queue.Intent, action: str
    ) -> None:
        """Mitto took none of it (`again`, `back` or `refused`): it may be posted once more."""
        self.posted.subtract(intent.phones)

        async def write() -> object:
            return await queue.settle_batch(
                self.pool, grant.batch_id, intent.attempt, action, "retry", status=500, most=9, refusal="words"
            )  # fmt: skip

        await self.settle(replica_id, grant, write, sent=False)

    async def settle(
        self, replica_id: int, grant: queue.Grant, write: recovery.Write, *, sent: bool
    ) -> None:
        self.memories[replica_id].settling(grant, write, sent=sent)
        await write()
        self.memories[replica_id].end(grant)

    async def withdraw(self, replica_id: int, grant: queue.Grant, posted: bool) -> None:
        if posted:
            self.posted.subtract(self.intents[grant].phones)
        self.memories[replica_id].withdrew(grant, lambda: queue.withdraw(self.pool, grant, "test"))
        await queue.withdraw(self.pool, grant, "test")
        self.memories[replica_id].end(grant)

    async def send(self, replica_id: int, want: int = 1) -> list[tuple[queue.Grant, queue.Intent]]:
        """Claims and posts; nothing is answered yet."""
        intents = [
            (one, await self.post(replica_id, one)) for one in await self.claim(replica_id, want)
        ]
        return [(grant, intent) for grant, intent in intents if intent is not None]

    async def reassert(self, replica_id: int) -> None:
        beat = await self.beat(replica_id)
        memory = self.memories[replica_id]
        assert memory.must_assert(beat)
        await recovery.reassert(self.pool, memory, beat)

    async def long_ago(self) -> None:
        """The failover has lasted long enough."""
        await self.pool.execute("update instance set found_at = found_at - interval '3 seconds'")

    async def recover(self) -> None:
        """All replicas say what they had posted, and the queue goes on."""
        for replica_id in self.memories:
            await self.reassert(replica_id)
        await self.long_ago()
        for replica_id in self.memories:
            assert (await self.beat(replica_id)).kept

    async def send_the_rest(self, replica_id: int) -> None:
        """Whatever is queued is sent, and accepted."""
        while posted := await self.send(replica_id, 8):
            for grant, intent in posted:
                await self.accept(replica_id, grant, intent)

    async def batches(self) -> list[tuple[BatchState, int]]:
        """(state, messages) in the order of their messages."""
        rows = await self.pool.fetch("select state, n from batch order by first_id")
        return [(BatchState(row["state"]), row["n"]) for row in rows]

    async def accepted(self) -> int:
        return int(
            await self.pool.fetchval("select count(*) from message_shown where own_state = 10")
        )


@pytest.fixture
async def world(postgres: str, dsn: str) -> AsyncIterator[World]:
    """A shop with 10,000 credits; whatever the test did with it, the audit finds nothing in the copy afterwards."""
    pool = await database.open_pool(dsn, 4)
    shop = await open_shop(pool, await new_account(pool), 0)
    one = World(postgres, urlsplit(dsn).path.lstrip("/"), shop)
    shop.replica_id = await one.join()
    yield one
    await assert_sound(one.pool)
    await one.pool.close()
    connection = await asyncpg.connect(postgres)
    await connection.execute(f"drop database if exists {one.name}_copy with (force)")
    await connection.close()


def once(world: World, n: int) -> None:
    """So many recipients, each posted exactly once as far as Mitto may have taken it."""
    assert len(+world.posted) == n
    assert set((+world.posted).values()) == {1}


# ------------------------------------------------------------------------------------------- the gate


async def test_in_another_database_nothing_is_claimed_expanded_or_posted(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    await shop.sending(10)
    (leased,) = await world.claim(me)
    await shop.begin(5)
    await world.fork()
    await world.fail_over()
    assert (await world.beat(me)).kept is False
    claimed = await queue.claim(world.pool, shop.account_id, me, 8, lead_us=0)
    assert (claimed.grants, claimed.waits_for) == ((), "recovery")
    assert (await queue.intent(world.pool, leased, me)).verdict == "paused"
    assert await expansions.claim(world.pool, me) is None
    assert await world.batches() == [(BatchState.READY, 5)] * 2
    world.memories[me].end(leased)
    await world.recover()
    await world.send_the_rest(me)
    assert len(await world.batches()) == 2
    assert await shop.expand(5)
    await world.send_the_rest(me)
    once(world, 15)


async def test_a_chunk_that_was_read_before_does_not_commit_in_another_database(
    world: World,
) -> None:
    me, shop = world.shop.replica_id, world.shop
    await shop.begin(5)
    expansion = await expansions.claim(world.pool, me)
    assert expansion is not None
    await world.fork()
    await world.fail_over()
    await shop.write(expansion, 5)
    assert await world.batches() == []


async def test_the_queue_goes_on_when_all_who_were_at_work_have_spoken(world: World) -> None:
    me, other = world.shop.replica_id, await world.join()
    await world.fork()
    await world.fail_over()
    await world.reassert(me)
    await world.long_ago()
    assert not (await world.beat(me)).kept
    await world.reassert(other)
    assert (await world.beat(me)).kept
    assert await recovery.waiting(world.pool) is None


async def test_many_who_come_to_another_database_at_once_find_it_closed(world: World) -> None:
    await world.fork()
    await world.fail_over(greet=None)
    look = "select look_at_instance()"
    async with world.pool.acquire() as first, asyncio.TaskGroup() as group, first.transaction():
        assert not await first.fetchval(look)
        # They saw nothing of the first one's note, and wait for its row.
        others = [group.create_task(world.pool.fetchval(look)) for _ in range(2)]
        await until_somebody_waits(world.pool, 2)
    assert [await one for one in others] == [False, False]
    assert await recovery.waiting(world.pool) is not None


async def test_it_stays_closed_for_three_seconds_for_those_whose_registration_was_forgotten(
    world: World,
) -> None:
    me = world.shop.replica_id
    await world.fork()
    await world.fail_over()
    await world.reassert(me)
    await world.pool.execute("update instance set found_at = clock_timestamp() - interval '2 s'")
    assert not (await world.beat(me)).kept
    await world.pool.execute("update instance set found_at = clock_timestamp() - interval '3 s'")
    assert (await world.beat(me)).kept


async def test_a_replica_that_died_without_a_word_keeps_it_closed_until_a_person_decides(
    world: World,
) -> None:
    me, dead = world.shop.replica_id, await world.join()
    await world.fork()
    await world.fail_over()
    await world.reassert(me)
    await queue.bury(world.pool, dead, (await queue.beats(world.pool))[dead])
    await world.long_ago()
    assert not (await world.beat(me)).kept
    waits = await recovery.waiting(world.pool)
    assert waits is not None
    assert (waits.asserted, waits.awaited, waits.gone) == ([me], [], [dead])
    async with world.pool.acquire() as connection:
        report = await recovery.recover(connection, decide=True, as_unknown=False)
    assert report.waiting is None
    assert (await world.beat(me)).kept


async def test_a_newcomer_knows_nothing_and_opens_nothing(world: World) -> None:
    me = world.shop.replica_id
    await queue.leave(world.pool, me, "stopped")
    await world.fork()
    await world.fail_over()
    newcomer = await world.join()
    await world.reassert(newcomer)
    await world.long_ago()
    assert not (await world.beat(newcomer)).kept


async def test_a_replica_whose_registration_was_forgotten_speaks_under_its_new_one(
    world: World,
) -> None:
    me, shop = world.shop.replica_id, world.shop
    await shop.sending(5)
    await world.fork()
    late = await world.join()
    ((grant, intent),) = await world.send(late)
    await world.fail_over()
    assert await queue.beat(world.pool, late) is None
    memory = world.memories.pop(late)
    again = await queue.register(world.pool, "test", "0")
    assert again > late + 1000
    memory.beaten(again, 0, 0.0)
    world.memories[again] = memory
    await world.reassert(again)
    assert await world.batches() == [(BatchState.SENDING, 5)]
    await world.reassert(me)
    await world.long_ago()
    assert (await world.beat(me)).kept
    world.memories[late] = memory
    await world.accept(late, grant, intent)
    once(world, 5)


async def test_who_does_not_remember_all_that_was_forgotten_does_not_open_it(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    memory = Memory(messages=7)
    world.memories[me]._beats.clear()
    memory.kept = world.memories[me].kept
    memory.beaten(me, 1, 0.0)
    world.memories[me] = memory
    await shop.sending(10)
    await world.fork()
    for _ in range(2):
        ((grant, intent),) = await world.send(me)
        await world.accept(me, grant, intent)
    await world.fail_over()
    await world.reassert(me)
    assert await world.accepted() == 5
    await world.long_ago()
    assert not (await world.beat(me)).kept


async def test_what_was_dropped_from_memory_before_the_last_heartbeat_here_does_not_count(
    world: World,
) -> None:
    me, shop = world.shop.replica_id, world.shop
    world.memories[me]._most = 7
    await shop.sending(10)
    for _ in range(2):
        ((grant, intent),) = await world.send(me)
        await world.accept(me, grant, intent)
    assert world.memories[me].complete_since > 0
    await world.beat(me)
    await world.fork()
    await world.fail_over()
    await world.recover()
    once(world, 10)


async def test_a_heartbeat_that_went_back_closes_it_even_where_the_database_seems_the_same(
    world: World,
) -> None:
    me = world.shop.replica_id
    for _ in range(3):
        await world.beat(me)
    await world.pool.execute("update replica set beat = beat - 2")
    assert not (await world.beat(me)).kept
    waits = await recovery.waiting(world.pool)
    assert waits is not None
    assert waits.doubted
    await world.recover()


@pytest.mark.parametrize("greeted", [True, False])
async def test_ids_that_were_handed_out_and_forgotten_are_not_handed_out_again(
    world: World, greeted: bool
) -> None:
    await world.fork()
    await world.shop.sending(5)
    message_id = await world.pool.fetchval("select max(last_id) from batch")
    batch_id = await world.pool.fetchval("select max(id) from batch")
    await world.fail_over(greet=recovery.greet if greeted else None)
    if not greeted:
        assert await world.pool.fetchval("select take_message_ids(1)") > message_id + 1000
    assert await world.pool.fetchval("select nextval('batch_id_seq')") > batch_id + 1000


# ----------------------------------------------------------------------------------- re-assertion


async def test_a_batch_whose_claim_was_forgotten_is_not_posted_again(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    campaign_id = await shop.sending(10)
    await world.fork()
    ((grant, intent),) = await world.send(me)
    await world.accept(me, grant, intent)
    await world.fail_over()
    await world.recover()
    assert await world.batches() == [(BatchState.ACCEPTED, 0), (BatchState.READY, 5)]
    progress = await check_the_account(shop, campaign_id)
    assert (progress.totals.pending, progress.totals.queued) == (5, 5)
    await world.send_the_rest(me)
    once(world, 10)


@pytest.mark.parametrize("forked_after", ["claim", "intent"])
async def test_a_batch_whose_intent_or_result_was_forgotten_is_not_posted_again(
    world: World, forked_after: str
) -> None:
    me, shop = world.shop.replica_id, world.shop
    await shop.sending(10)
    (grant,) = await world.claim(me)
    if forked_after == "claim":
        await world.fork()
    intent = await world.post(me, grant)
    assert intent is not None
    if forked_after == "intent":
        await world.fork()
    await world.accept(me, grant, intent)
    await world.fail_over()
    await world.recover()
    assert await world.accepted() == 5
    await world.send_the_rest(me)
    once(world, 10)


async def test_what_is_still_on_its_way_is_being_sent_and_settled_as_usual(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    await shop.sending(5)
    await world.fork()
    ((grant, intent),) = await world.send(me)
    await world.fail_over()
    await world.recover()
    assert await world.batches() == [(BatchState.SENDING, 5)]
    await world.accept(me, grant, intent)
    once(world, 5)
    assert await world.accepted() == 5


async def test_what_turns_out_not_to_have_left_is_withdrawn_as_usual(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    await shop.sending(5)
    await world.fork()
    ((grant, _),) = await world.send(me)
    await world.fail_over()
    await world.recover()
    await world.withdraw(me, grant, posted=True)
    assert await world.batches() == [(BatchState.READY, 5)]
    await world.send_the_rest(me)
    once(world, 5)


async def test_saying_it_twice_changes_nothing(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    await shop.sending(10)
    await world.fork()
    for grant, intent in (await world.send(me, 2))[:1]:
        await world.accept(me, grant, intent)
    await world.fail_over()
    await world.reassert(me)
    rows = "select (select array_agg(b order by id) from batch b)::text, (select array_agg(c) from credit c)::text"
    before = await world.pool.fetchrow(rows)
    world.memories[me].asserted_at = None
    await world.reassert(me)
    assert await world.pool.fetchrow(rows) == before
    await world.long_ago()
    assert (await world.beat(me)).kept


@pytest.mark.parametrize("chunk", ["first", "second"])
async def test_messages_whose_chunk_was_forgotten_are_brought_back_and_not_expanded_again(
    world: World, chunk: str
) -> None:
    me, shop = world.shop.replica_id, world.shop
    campaign_id = await shop.begin(20)
    if chunk == "second":
        await shop.expand(10, last=False)
        for grant, intent in await world.send(me, 2):
            await world.accept(me, grant, intent)
    await world.fork()
    first = shop.phones
    await shop.expand(10, last=chunk == "second")
    ((grant, intent),) = await world.send(me)
    await world.accept(me, grant, intent)
    await world.fail_over()
    await world.recover()
    await check_the_account(shop, campaign_id)
    shop.phones = first  # it is read again
    await shop.expand(10, last=chunk == "second")
    await check_the_account(shop, campaign_id)
    if chunk == "first":
        await shop.expand(10)
    await world.send_the_rest(me)
    progress = await check_the_account(shop, campaign_id)
    assert progress.totals.accepted == progress.totals.total == 20
    once(world, 20)


async def test_what_is_brought_back_is_paid_from_what_was_held_for_its_audience(
    world: World,
) -> None:
    me, shop = world.shop.replica_id, world.shop
    await shop.begin(10)
    await world.fork()
    await shop.expand(10)
    ((grant, intent),) = await world.send(me)
    await world.accept(me, grant, intent)
    await world.fail_over()
    await shop.begin(9_990)  # holds all the rest
    await world.recover()
    assert await world.accepted() == 5
    assert await world.pool.fetchval("select spent from credit") == 5


async def test_a_message_that_cannot_be_paid_any_more_was_sent_all_the_same(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    await shop.sending(1)
    await world.send_the_rest(me)
    async with world.pool.acquire() as connection, connection.transaction():
        await queue.add_message(
            connection, shop.id, shop.account_id, 306_900_000_001, "Hi", "Shop", 1
        )
    await world.fork()
    async with world.pool.acquire() as connection, connection.transaction():
        await queue.add_message(
            connection, shop.id, shop.account_id, 306_900_000_002, "Hi", "Shop", 1
        )
    await world.send_the_rest(me)
    await world.fail_over()
    await shop.begin(9_998)  # holds all that there is
    await world.recover()
    assert await world.accepted() == 3


async def test_batches_that_were_cut_and_forgotten_are_cut_again(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    campaign_id = await shop.sending(30, batch_size=30)
    await world.fork()
    await world.pool.execute("update traffic_account set largest_request = 10")
    sent = []
    for _ in range(2):
        sent += await world.send(me)
    assert len(sent) == 2
    for grant, intent in sent[1:]:
        await world.accept(me, grant, intent)
    await world.fail_over()
    await world.recover()
    assert await world.batches() == [
        (BatchState.SENDING, 10), (BatchState.ACCEPTED, 0), (BatchState.READY, 10)
    ]  # fmt: skip
    await check_the_account(shop, campaign_id)
    await world.accept(me, *sent[0])
    await world.send_the_rest(me)
    once(world, 30)


async def test_a_batch_that_was_split_and_forgotten_is_split_again(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    campaign_id = await shop.sending(10, batch_size=10)
    await world.fork()
    ((grant, intent),) = await world.send(me)
    await world.refuse(me, grant, intent, "refused")
    for half in await world.send(me, 2):
        await world.accept(me, *half)
    await world.fail_over()
    await world.recover()
    await check_the_account(shop, campaign_id)
    assert await world.accepted() == 10
    once(world, 10)


@pytest.mark.parametrize("forked_after", ["intent", "nothing"])
async def test_a_retry_that_was_forgotten_is_known_again(world: World, forked_after: str) -> None:
    me, shop = world.shop.replica_id, world.shop
    await shop.sending(5)
    if forked_after == "nothing":
        await world.fork()
    ((grant, intent),) = await world.send(me)
    if forked_after == "intent":
        await world.fork()
    await world.refuse(me, grant, intent, "again")
    ((grant, intent),) = await world.send(me)
    await world.accept(me, grant, intent)
    await world.fail_over()
    await world.recover()
    assert await world.accepted() == 5
    once(world, 5)


async def test_a_withdrawal_that_was_forgotten_is_done_again(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    await shop.sending(5)
    ((grant, _),) = await world.send(me)
    await world.fork()
    await world.withdraw(me, grant, posted=True)
    await world.fail_over()
    assert await world.batches() == [(BatchState.SENDING, 5)]
    await world.recover()
    assert await world.batches() == [(BatchState.READY, 5)]
    await world.send_the_rest(me)
    once(world, 5)


async def test_what_stands_as_posted_by_one_who_knows_nothing_of_it_is_unknown(
    world: World,
) -> None:
    me, shop = world.shop.replica_id, world.shop
    campaign_id = await shop.sending(5)
    await world.send(me)
    await world.fork()
    world.memories[me]._running.clear()
    await world.fail_over()
    await world.recover()
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 5


async def test_what_was_accepted_in_its_place_stays_where_it_is(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    campaign_id = await shop.sending(5)
    ((grant, intent),) = await world.send(me)
    await world.accept(me, grant, intent)
    rows = "select id, own_state, provider_id, settled_at from message_shown order by id"
    before = await world.pool.fetch(rows)
    said = await world.pool.fetchval(
        "select reassert($1, $2, 2, $3, $4, $5, $6, $7, 'S', $8, $9, $10, $11)",
        grant.batch_id, grant.epoch + 1, campaign_id, shop.id, shop.account_id, me, grant.slot_us,
        intent.ids, intent.phones, intent.texts, [1] * 5,
    )  # fmt: skip
    assert said == "conflict"
    assert await world.pool.fetch(rows) == before


async def test_a_lease_that_was_forgotten_cannot_be_withdrawn_from_who_has_it_now(
    world: World,
) -> None:
    me, other, shop = world.shop.replica_id, await world.join(), world.shop
    await shop.sending(5)
    await world.fork()
    (old,) = await world.claim(me)
    await world.fail_over()
    await world.recover()
    (new,) = await world.claim(other)
    assert new.batch_id == old.batch_id
    assert not await queue.withdraw(world.pool, old, "late")
    intent = await world.post(other, new)
    assert intent is not None
    world.memories[me].end(old)
    await world.accept(other, new, intent)
    once(world, 5)


async def test_a_single_message_that_was_forgotten_is_there_again(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    async with world.pool.acquire() as connection, connection.transaction():
        await queue.add_message(
            connection, shop.id, shop.account_id, 306_900_000_001, "Hi", "Shop", 1
        )
    await world.fork()
    async with world.pool.acquire() as connection, connection.transaction():
        forgotten = await queue.add_message(
            connection, shop.id, shop.account_id, 306_900_000_002, "Hello", "Shop", 1
        )
    for grant, intent in await world.send(me, 2):
        await world.accept(me, grant, intent)
    await world.fail_over()
    await world.recover()
    rows = await world.pool.fetch(
        "select phone, text, own_state, segments from message_shown where id = $1", forgotten
    )
    assert [tuple(row) for row in rows] == [(306_900_000_002, "Hello", 10, 1)]
    assert await world.accepted() == 2


async def test_who_opted_out_before_a_forgotten_intent_stays_left_out(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    campaign_id = await shop.sending(5)
    await world.fork()
    phones = [
        row["phone"] for row in await world.pool.fetch("select phone from message order by id")
    ]
    await world.pool.execute(
        "insert into opt_out (tenant_id, phone, source) values ($1, $2, 'test')", shop.id, phones[2]
    )
    ((grant, intent),) = await world.send(me)
    assert len(intent.ids) == 4
    await world.accept(me, grant, intent)
    await world.fail_over()
    await world.recover()
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.skipped) == (4, 1)


async def test_a_campaign_that_is_forgotten_altogether_is_told_and_stops_nobody(
    world: World,
) -> None:
    me, shop = world.shop.replica_id, world.shop
    await world.fork()
    await shop.sending(5)
    ((grant, intent),) = await world.send(me)
    await world.accept(me, grant, intent)
    await world.fail_over()
    await world.recover()
    assert await world.batches() == []


async def test_a_campaign_that_was_cancelled_in_between_keeps_what_was_posted(world: World) -> None:
    me, shop = world.shop.replica_id, world.shop
    campaign_id = await shop.sending(10)
    await world.fork()
    ((grant, intent),) = await world.send(me)
    await world.fail_over()
    await world.pool.execute("select cancel_campaign($1)", campaign_id)
    await world.recover()
    await world.accept(me, grant, intent)
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.cancelled) == (5, 5)


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_was_forgotten_nobody_gets_it_twice(world: World, seed: int) -> None:
    dice = random.Random(seed)
    me, shop = world.shop.replica_id, world.shop
    await world.join()
    campaigns = [await shop.begin(60, batch_size=dice.choice([7, 20])) for _ in range(2)]
    for _ in campaigns:
        await shop.expand(30, last=False)
    underway: list[tuple[int, queue.Grant]] = []
    fork_at = dice.randrange(5, 25)
    for step in range(30):
        if step == fork_at:
            await world.fork()
        largest = dice.choice([4, 9, 100, 100])
        await world.pool.execute("update traffic_account set largest_request = $1", largest)
        if dice.random() < 0.5 or not underway:
            replica_id = dice.choice([*world.memories])
            claimed = await world.claim(replica_id, dice.randint(1, 2))
            underway += [(replica_id, grant) for grant in claimed]
        else:
            await one_step(world, dice, underway)
    await world.fail_over()
    await world.recover()
    await assert_sound(world.pool)
    for replica_id, grant in underway:
        intent = world.intents.get(grant) or await world.post(replica_id, grant)
        if intent is not None:
            await world.accept(replica_id, grant, intent)
    await world.pool.execute("update batch set not_before = clock_timestamp() where state = 1")
    await world.pool.execute("select wake_lane(id, 0) from lane")
    await world.send_the_rest(me)
    for campaign_id in campaigns:
        await check_the_account(shop, campaign_id)
    assert max((+world.posted).values()) == 1


async def one_step(
    world: World, dice: random.Random, underway: list[tuple[int, queue.Grant]]
) -> None:
    """Something happens to one of the leases: it is posted, given back, or answered."""
    replica_id, grant = underway.pop(dice.randrange(len(underway)))
    intent = world.intents.get(grant)
    if dice.random() < 0.1:
        await world.withdraw(replica_id, grant, posted=intent is not None)
    elif intent is None:
        if await world.post(replica_id, grant) is not None:
            underway.append((replica_id, grant))
    elif dice.random() < 0.6:
        await world.accept(replica_id, grant, intent)
    else:
        await world.refuse(replica_id, grant, intent, dice.choice(["again", "back", "refused"]))


# ----------------------------------------------------------------------------------------- a person


async def test_what_is_queued_after_a_restore_becomes_unknown_if_a_person_says_so(
    world: World,
) -> None:
    me, shop = world.shop.replica_id, world.shop
    sending, reading = await shop.sending(10), await shop.begin(20)
    await shop.expand(5, last=False)
    await world.claim(me)
    await world.fork()
    await world.fail_over()
    async with world.pool.acquire() as connection:
        report = await recovery.recover(connection, decide=False, as_unknown=False)
        assert report.waiting is not None
        assert [(one.id, one.queued + one.processing, one.unread) for one in report.campaigns] == [
            (sending, 10, 0), (reading, 5, 15)
        ]  # fmt: skip
        assert "smsd recover --as-unknown" in "\n".join(recovery.describe(report))
        report = await recovery.recover(connection, decide=True, as_unknown=True)
        assert (report.waiting, report.unknown, report.paused) == (None, 15, 1)
    assert (await check_the_account(shop, sending)).totals.unknown == 10
    assert await shop.status(reading) == CampaignStatus.PAUSED
    assert await world.send(me, 8) == []
    assert await world.pool.fetchval("select count(*) from attempt where detail = 'restored'") == 3


async def test_nothing_becomes_unknown_where_replicas_work_and_nothing_was_forgotten(
    world: World,
) -> None:
    await world.shop.sending(5)
    async with world.pool.acquire() as connection:
        with pytest.raises(recovery.AtWork, match="1 replicas work in this database"):
            await recovery.recover(connection, decide=True, as_unknown=True)
        await queue.leave(connection, world.shop.replica_id, "stopped")
        report = await recovery.recover(connection, decide=True, as_unknown=True)
    assert report.unknown == 5


async def test_what_was_posted_is_remembered_as_it_was_in_little_more_memory_than_its_texts() -> (
    None
):
    memory = Memory()

    async def written() -> None:
        """Nothing to write."""

    tracemalloc.start()
    try:
        for number in range(20):
            grant = queue.Grant(number, 1, 1, 1, 500, 0)
            memory.begin(1, 1, grant)
            memory.posted(grant, _five_hundred(number))
            memory.settling(grant, written, sent=True)
            memory.end(grant)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    posted = [_five_hundred(number) for number in range(20)]
    texts = sum(len(text.encode()) for intent in posted for text in intent.texts)
    assert kept < 1.5 * texts
    assert [(one.attempt, one.intent) for one in memory] == [(3, intent) for intent in posted]


def _five_hundred(number: int) -> queue.Intent:
    """As Postgres answers: new objects each time."""
    ids = [2**33 + 500 * number + i for i in range(500)]
    texts = [
        f"Γειά σου {one}, sale until Friday in all shops and on all days of the week" for one in ids
    ]
    return queue.Intent("post", 3, "Shop", ids, [one + 306900000000 for one in ids], texts)
