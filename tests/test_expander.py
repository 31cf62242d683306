"""The expander: a whole audience becomes messages, chunk by chunk, and whoever is left out is listed with a reason."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shop import ACCEPTED, Shop, check_the_account, until_somebody_waits
from structlog.testing import capture_logs
from support import assert_sound, new_account, open_shop

from smsd import campaigns, contacts, credits, database, mitto, queue, text
from smsd.campaigns import Snapshot
from smsd.csvfile import Recipient
from smsd.expander import CHUNK, SEGMENTS_MOST, SMALL_CHUNK, Expander, Renderer
from smsd.expansions import Rendered, Skipped
from smsd.model import Reason

KEYS = [b"a key of sixteen characters"]
BASE = "https://sms.example"


@pytest.fixture
async def account(pool: database.Pool) -> int:
    return await new_account(pool)


@pytest.fixture
async def shop(pool: database.Pool, account: int) -> AsyncIterator[Shop]:
    yield await open_shop(pool, account, await queue.register(pool, "test", "0"), granted=1_000_000)
    await assert_sound(pool)


def expander_of(shop: Shop, replica_id: int | None = None) -> Expander:
    standing = queue.Standing("test", 30, replica_id or shop.replica_id, mitto.clock())
    return Expander(shop.pool, standing, KEYS, BASE)


async def add_contacts(shop: Shop, count: int, first: int = 0) -> None:
    await shop.pool.execute(
        "insert into contact (tenant_id, phone, first_name, attributes)"
        " select $1, 306900000000 + i, 'Name' || i, jsonb_build_object('Stadt', 'Wien')"
        " from generate_series($2::int, $3::int) i",
        shop.id, first, first + count - 1,
    )  # fmt: skip


async def begin(
    shop: Shop,
    template: str,
    of: int,
    held: int | None = None,
    batch_size: int = 500,
    uploaded: Sequence[Recipient] = (),
    **content: Any,
) -> int:
    """A campaign to stored contacts, or to those that were uploaded for it, just enqueued; its id."""
    campaign = await shop.draft(**content)
    source = "contacts"
    if uploaded:
        source = "recipients"
        await contacts.add_recipients(shop.pool, campaign.id, uploaded)
    highest = await contacts.highest_id(shop.pool, shop.id)
    snapshot = Snapshot(
        source, "Shop", template, date(2026, 5, 1), batch_size, highest, of, of if held is None else held
    )  # fmt: skip
    async with shop.pool.acquire() as connection, connection.transaction():
        locked = await campaigns.lock(connection, shop.id, campaign.id)
        assert locked is not None
        await campaigns.begin(connection, locked, shop.account_id, snapshot)
        assert await credits.hold(connection, shop.id, snapshot.held, campaign.id, "enqueue")
    return campaign.id


async def expand(shop: Shop) -> int:
    """Chunk after chunk until nothing is left; how many there were."""
    expander, chunks = expander_of(shop), 0
    while await expander.expand_one():
        chunks += 1
    return chunks


# --------------------------------------------------------------------------------------- the audience


async def test_every_contact_gets_one_message_with_its_own_text(shop: Shop) -> None:
    count = SMALL_CHUNK + 700
    await add_contacts(shop, count)
    campaign_id = await begin(shop, "Hi {{firstName}} in {{stadt}}", count)
    assert await expand(shop) == 2
    rows = await shop.pool.fetch(
        "select id, phone, text from message where campaign_id = $1 order by id", campaign_id
    )
    assert [(row["phone"], row["text"]) for row in rows] == [
        (306900000000 + i, f"Hi Name{i} in Wien") for i in range(count)
    ]
    batches = await shop.pool.fetch("select first_id, last_id, n from batch order by first_id")
    assert [row["n"] for row in batches] == [500, 500, 500, 200]
    assert all(row["last_id"] - row["first_id"] + 1 == row["n"] for row in batches)
    progress = await check_the_account(shop, campaign_id)
    assert (progress.expanded, progress.read, progress.totals.queued) == (True, count, count)


async def test_what_was_read_ahead_of_somebody_s_erasure_is_read_again(shop: Shop) -> None:
    count = SMALL_CHUNK + CHUNK + 2
    await add_contacts(shop, count)
    campaign_id = await begin(shop, "Hi {{firstName}}", count)
    expander = expander_of(shop)
    assert await expander.expand_one()
    assert await expander.expand_one()
    assert expander._ahead is not None
    ahead = await expander._ahead[1]
    erased = 306900000000 + count - 1
    assert erased in [one.phone for one in ahead.rendered]
    outcome = await shop.pool.fetchval(
        "select outcome from contact c, erase_contact(c.tenant_id, c.id) where c.phone = $1", erased
    )
    assert outcome == "erased"

    while await expander.expand_one():
        pass
    phones = await shop.pool.fetch("select phone from message where campaign_id = $1", campaign_id)
    assert len(phones) == count - 1
    assert erased not in [row["phone"] for row in phones]


@pytest.mark.parametrize("count", [SMALL_CHUNK, SMALL_CHUNK - 1, SMALL_CHUNK + 1])
async def test_an_audience_as_large_as_a_chunk_is_read_to_its_end(shop: Shop, count: int) -> None:
    await add_contacts(shop, count)
    campaign_id = await begin(shop, "Hi", count)
    await expand(shop)
    assert (await check_the_account(shop, campaign_id)).totals.queued == count


async def test_later_chunks_are_large(shop: Shop) -> None:
    count = SMALL_CHUNK + CHUNK + 1
    await add_contacts(shop, count)
    campaign_id = await begin(shop, "Hi", count)
    assert await expand(shop) == 3
    assert (await shop.progress(campaign_id)).totals.queued == count


async def test_well_ahead_of_the_sender_chunks_are_small(shop: Shop) -> None:
    """A large one would be in the way of what is sent, and nothing waits for it: 100 batches are there."""
    count = 3 * SMALL_CHUNK + 1
    await add_contacts(shop, count)
    campaign_id = await begin(shop, "Hi", count, batch_size=SMALL_CHUNK // 100)
    assert await expand(shop) == 4
    assert (await shop.progress(campaign_id)).totals.queued == count


async def test_who_is_left_out_is_listed_with_the_reason_and_batches_stay_without_gaps(
    shop: Shop,
) -> None:
    """Some of the uploaded recipients can be sent to, the others each lack something else."""
    uploaded = [
        Recipient(phone, raw, {"name": name} if name else {})
        for phone, raw, name in [
            (306900000001, None, "Ada"), (None, "abc", "Bob"), (306900000003, None, None),
            (306900000004, None, "Cleo"), (306900000005, None, "x" * 160 * SEGMENTS_MOST),
            (306900000006, None, "Dora"),
        ]
    ]  # fmt: skip
    await shop.pool.execute(
        "insert into opt_out (tenant_id, phone, source) values ($1, 306900000004, 'stop')", shop.id
    )
    campaign_id = await begin(shop, "Hi {{name}}", 6, uploaded=uploaded)
    await expand(shop)
    rows = await shop.pool.fetch(
        "select phone, text, reason, detail, segments from message where campaign_id = $1 order by id",
        campaign_id,
    )
    assert [(row["phone"], row["text"], row["reason"]) for row in rows] == [
        (306900000001, "Hi Ada", None),
        (306900000006, "Hi Dora", None),
        (None, None, "invalid_number"),
        (306900000003, None, "missing_value"),
        (306900000004, None, "opted_out"),
        (306900000005, None, "text_too_long"),
    ]
    assert [row["detail"] for row in rows[2:]] == [
        "abc", "no value for {{name}}", None, "11 segments, 10 at most",
    ]  # fmt: skip
    assert [row["segments"] for row in rows] == [1, 1, 0, 0, 0, 0]
    batch = await shop.pool.fetchrow("select n, last_id - first_id + 1 as width from batch")
    assert batch is not None
    assert tuple(batch) == (2, 2)
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.queued, sums.skipped, sums.total) == (2, 4, 6)
    assert (await credits.balance(shop.pool, shop.id)).reserved == 2


async def test_whoever_came_after_the_enqueue_is_not_in_the_campaign(shop: Shop) -> None:
    await add_contacts(shop, 10)
    campaign_id = await begin(shop, "Hi", 10)
    await add_contacts(shop, 5, first=100)
    await expand(shop)
    assert (await check_the_account(shop, campaign_id)).totals.queued == 10


async def test_a_contact_that_took_over_another_s_number_in_between_is_not_texted_twice(
    shop: Shop,
) -> None:
    await add_contacts(shop, SMALL_CHUNK + 10)
    campaign_id = await begin(shop, "Hi", SMALL_CHUNK + 10)
    expander = expander_of(shop)
    await expander.expand_one()
    await shop.pool.execute("delete from contact where phone = 306900000000")
    await shop.pool.execute(
        "update contact set phone = 306900000000 where phone = $1", 306900000000 + SMALL_CHUNK + 5
    )
    await expander.expand_one()
    progress = await check_the_account(shop, campaign_id)
    assert progress.expanded
    assert progress.totals.queued == SMALL_CHUNK + 9


# ------------------------------------------------------------------------------------ beside others


async def test_two_replicas_expand_an_audience_together_and_nobody_is_texted_twice(
    shop: Shop,
) -> None:
    for i in range(4):
        await add_contacts(shop, 1_000, first=1_000 * i)
    ids = [await begin(shop, "Hi", 4_000) for _ in range(3)]
    others = [await queue.register(shop.pool, name, "0") for name in ("one", "two")]

    async def work(replica_id: int) -> int:
        expander, chunks = expander_of(shop, replica_id), 0
        while await shop.pool.fetchval(
            "select exists (select from expansion where state = 'running')"
        ):
            chunks += await expander.expand_one()
        return chunks

    chunks = await asyncio.gather(*map(work, others))
    assert sum(chunks) == 6
    for campaign_id in ids:
        assert (await shop.progress(campaign_id)).totals.queued == 4_000


async def test_a_replica_that_dies_in_the_middle_of_a_chunk_is_followed_by_another(
    shop: Shop,
) -> None:
    await add_contacts(shop, SMALL_CHUNK + 500)
    campaign_id = await begin(shop, "Hi {{firstName}}", SMALL_CHUNK + 500)
    dying = expander_of(shop)
    await dying.expand_one()
    for pause in (0, 0.005, 0.02, 0.05):
        task = asyncio.create_task(dying.expand_one())
        await asyncio.sleep(pause)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        progress = await shop.progress(campaign_id)
        assert progress.totals.total == progress.read
    await queue.leave(shop.pool, shop.replica_id, "killed")
    shop.replica_id = await queue.register(shop.pool, "second", "0")
    await expand(shop)
    assert (await check_the_account(shop, campaign_id)).totals.queued == SMALL_CHUNK + 500


async def test_the_loop_expands_what_is_enqueued_and_wakes_its_lane(shop: Shop, dsn: str) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    listener = await database.connect(dsn)
    await listener.add_listener("smsd_lane", lambda *news: heard.put_nowait(str(news[-1])))
    expander = expander_of(shop)
    loop = asyncio.create_task(expander.run())
    await add_contacts(shop, 10)
    await begin(shop, "Hi", 10, batch_size=5)
    expander.wake()
    async with asyncio.timeout(5):
        assert int(await heard.get()) == shop.account_id
    assert sum(grant.n for grant in await shop.claim(8)) == 10
    loop.cancel()
    with suppress(asyncio.CancelledError):
        await loop
    await listener.close()


# ------------------------------------------------------------------------------------------- poison


async def test_an_audience_that_cannot_be_read_pauses_its_campaign_and_stands_in_nobody_s_way(
    pool: database.Pool, account: int, shop: Shop
) -> None:
    """An attribute column that is no object: nobody writes such a row, so nobody reads one."""
    other = await open_shop(pool, account, shop.replica_id, granted=1_000)
    await add_contacts(shop, 20)
    await add_contacts(other, 20)
    await pool.execute(
        "update contact set attributes = '[1]' where tenant_id = $1 and id % 7 = 0", shop.id
    )
    broken, sound = await begin(shop, "Hi {{x|y}}", 20), await begin(other, "Hi", 20)
    expander = expander_of(shop)
    loop = asyncio.create_task(expander.run())
    async with asyncio.timeout(10):
        while await shop.status(broken) != "paused" or not (await other.progress(sound)).expanded:
            await asyncio.sleep(0.01)
    campaign = (await shop.progress(broken)).campaign
    assert campaign.paused_reason == "EXPANSION_FAILED"
    assert str(campaign.paused_detail).startswith("AssertionError at the recipients after 0")
    await check_the_account_of(other, sound)
    async with pool.acquire() as connection, connection.transaction():
        await credits.grant(connection, shop.id, 5, "that is not what it waits for")
    assert (await shop.progress(broken)).campaign.status == "paused"
    await pool.execute("update contact set attributes = '{}' where tenant_id = $1", shop.id)
    await shop.act(broken, campaigns.resume)
    expander.wake()
    async with asyncio.timeout(10):
        while not (await shop.progress(broken)).expanded:
            await asyncio.sleep(0.01)
    assert await check_the_account_of(shop, broken) == 20
    assert not loop.done()
    loop.cancel()
    with suppress(asyncio.CancelledError):
        await loop


async def test_what_breaks_the_look_for_work_does_not_end_the_loop(
    pool: database.Pool, shop: Shop
) -> None:
    await add_contacts(shop, 3)
    campaign_id = await begin(shop, "Hi", 3)
    await pool.execute("alter table expansion rename column served_at to gone")
    expander = expander_of(shop)
    loop = asyncio.create_task(expander.run())
    with capture_logs() as lines:
        async with asyncio.timeout(5):
            while not any(line["event"] == "expansion.failed" for line in lines):
                await asyncio.sleep(0.01)
    await pool.execute("alter table expansion rename column gone to served_at")
    expander.wake()
    async with asyncio.timeout(10):
        while not (await shop.progress(campaign_id)).expanded:
            await asyncio.sleep(0.01)
    loop.cancel()
    with suppress(asyncio.CancelledError):
        await loop


# ------------------------------------------------------------------------------------------- ids


async def test_whoever_is_cancelled_while_it_takes_ids_holds_nobody_up(
    pool: database.Pool, dsn: str, connection: database.Connection
) -> None:
    """Cancelled between the lock and the sequence, where it waits for who holds that."""
    taking = await database.connect(dsn)
    async with connection.transaction():
        await connection.execute("alter sequence message_id cache 1")
        task = asyncio.create_task(taking.fetchval("select take_message_ids(10)"))
        await until_somebody_waits(pool)
        await connection.execute("select pg_cancel_backend($1)", taking.get_server_pid())
        with pytest.raises(asyncpg.QueryCanceledError):
            await task
    async with asyncio.timeout(5):
        first = await pool.fetchval("select take_message_ids(10)")
    assert await taking.fetchval("select take_message_ids(1)") == first + 10
    await taking.close()


async def test_blocks_of_ids_taken_at_once_have_no_gaps_and_do_not_overlap(
    pool: database.Pool,
) -> None:
    taking = "select array_agg(take_message_ids(3)) from generate_series(1, 1000)"
    taken = await asyncio.gather(*(pool.fetchval(taking) for _ in range(4)))
    blocks = sorted(first for firsts in taken for first in firsts)
    assert blocks == list(range(blocks[0], blocks[0] + 3 * 4_000, 3))


async def test_ids_are_taken_without_waiting_for_who_took_some_and_did_not_commit_yet(
    pool: database.Pool, connection: database.Connection
) -> None:
    async with connection.transaction(), asyncio.timeout(5):
        first = await connection.fetchval("select take_message_ids(5)")
        assert await pool.fetchval("select take_message_ids(5)") == first + 5


# ------------------------------------------------------------------------------------------- credits


async def test_a_campaign_that_runs_out_of_credits_waits_for_a_top_up_and_comes_to_its_end(
    pool: database.Pool, account: int, shop: Shop
) -> None:
    count = SMALL_CHUNK + 100
    poor = await open_shop(pool, account, shop.replica_id, granted=count + 40)
    await add_contacts(poor, count)
    await pool.execute(
        "update contact set attributes = jsonb_build_object('x', repeat('y', 200)) where id % 20 = 0"
    )
    campaign_id = await begin(poor, "{{x|z}}", count)
    await expand(poor)
    campaign = (await poor.progress(campaign_id)).campaign
    assert (campaign.status, campaign.paused_reason) == ("paused", "INSUFFICIENT_CREDITS")
    assert "needs 1050 credits" in str(campaign.paused_detail)
    assert (await check_the_account_of(poor, campaign_id)) == 0
    async with pool.acquire() as connection, connection.transaction():
        await credits.grant(connection, poor.id, 200, "top-up")
    await expand(poor)
    await poor.send_all(ACCEPTED)
    assert await campaigns.finish(pool) == [campaign_id]
    assert await check_the_account_of(poor, campaign_id) == count
    assert (await credits.balance(pool, poor.id)).balance == 240 - 55


async def check_the_account_of(shop: Shop, campaign_id: int) -> int:
    await assert_sound(shop.pool)
    return (await shop.progress(campaign_id)).totals.total


async def test_opting_out_gives_the_estimate_back(shop: Shop) -> None:
    await add_contacts(shop, 20)
    campaign_id = await begin(shop, "x" * 200, 20, held=40)
    await shop.pool.execute(
        "insert into opt_out (tenant_id, phone, source) select $1, phone, 'stop' from contact where id % 2 = 0",
        shop.id,
    )
    await expand(shop)
    assert (await credits.balance(shop.pool, shop.id)).reserved == 20
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.queued, sums.skipped) == (10, 10)


# ------------------------------------------------------------------------------------------- rendering


def renderer(template: str, link_url: str | None = None) -> Renderer:
    return Renderer(
        text.Template(template), keys=KEYS, link_base=BASE, tenant_id=3, campaign_id=4, link_url=link_url
    )  # fmt: skip


def row(**values: object) -> Mapping[str, object]:
    attributes = json.dumps(values.pop("attributes", {}))
    return {"phone": 306900000001, "opted_out": False, "attributes": attributes, **values}


@pytest.mark.parametrize(
    ("template", "values", "rendered"),
    [
        ("Hi {{firstName}}", {"first_name": "Ada"}, "Hi Ada"),
        ("Hi {{first_name}}", {"first_name": "Ada"}, "Hi Ada"),
        ("Hi {{firstName}}", {"first_name": "Ada", "attributes": {"firstName": "Bob"}}, "Hi Ada"),
        ("Hi {{firstName}}", {"first_name": None, "attributes": {"firstName": "Bob"}}, "Hi Bob"),
        ("Hi {{firstName|you}}", {"first_name": None}, "Hi you"),
        ("{{n}} points", {"attributes": {"n": 7}}, "7 points"),
        ("{{phone}}", {}, "+306900000001"),
        ("{{birthday}}", {"birthday": date(1990, 5, 1)}, "1990-05-01"),
    ],
)  # fmt: skip
def test_a_tag_stands_for_a_column_or_else_for_an_attribute(
    template: str, values: dict[str, object], rendered: str
) -> None:
    assert renderer(template).render(row(**values)) == Rendered(306900000001, rendered, 1)


def test_a_text_without_a_link_needs_no_key() -> None:
    keyless = Renderer(
        text.Template("Hi {{firstName}}"), keys=(), link_base=BASE, tenant_id=3, campaign_id=4, link_url=None
    )  # fmt: skip
    assert keyless.render(row(first_name="Ada")) == Rendered(306900000001, "Hi Ada", 1)


def test_links_are_the_campaign_s_own_and_the_recipient_s_own() -> None:
    one = renderer("{{link}} {{unsubscribeUrl}}", "https://shop.example/sale").render(row())
    assert isinstance(one, Rendered)
    link, unsubscribe = one.text.split()
    assert link == "https://shop.example/sale"
    base, token = unsubscribe.rsplit("/", 1)
    assert base == f"{BASE}/u"
    assert text.read_unsubscribe(KEYS, token) == (3, 4, 306900000001)


@given(
    values=st.dictionaries(st.text(max_size=5), st.none() | st.text(max_size=2_000) | st.integers())
)
def test_whatever_a_recipient_s_values_are_there_is_a_text_or_a_reason(
    values: dict[str, object],
) -> None:
    one = renderer("{{a}}{{b|}}").render(row(attributes=values))
    if isinstance(one, Skipped):
        assert one.reason in (Reason.MISSING_VALUE, Reason.TEXT_TOO_LONG)
    else:
        assert 1 <= one.segments <= SEGMENTS_MOST


VALUES = st.sampled_from(
    [None, "", " ", "Ada", "Ünal", "Κώστας", "€" * 80, "x" * 1_600, "{{phone}}"]
)


@given(
    template=st.sampled_from([
        "Hi {{firstName}}, {{link}} {{unsubscribeUrl}}", "{{lastName|}}", "{{firstName|you}}{{birthday}}", "{{n}} {{firstName}}",
        "to {{phone}} {{phone}}", "Hi", "", "{{link}}",
    ]),
    people=st.lists(
        st.fixed_dictionaries({
            "phone": st.sampled_from([None, 306900000001, 12025550123]), "raw": st.just("?"), "opted_out": st.booleans() | st.just(False),
            "first_name": VALUES, "last_name": VALUES, "birthday": st.sampled_from([None, date(1990, 5, 1)]),
            "attributes": st.sampled_from(["{}", '{"n": 7, "firstName": "Bob"}']),
        }), min_size=1, max_size=3,
    ),
    link_url=st.sampled_from([None, "https://shop.example/sale"]),
)  # fmt: skip
def test_many_at_once_are_told_the_same_as_one_by_one(
    template: str, people: list[Mapping[str, object]], link_url: str | None
) -> None:
    all_ = renderer(template, link_url)
    one_by_one = [all_.render(one) for one in people]
    usual = all_.render_usual(people)
    if usual is not None:
        assert usual == one_by_one
    is_usual = all(isinstance(one, Rendered) for one in one_by_one) and all(
        one["first_name"] and one["last_name"] and one["birthday"] and str(one["first_name"]).strip()
        and str(one["last_name"]).strip() for one in people
    )  # fmt: skip
    assert usual is not None or not is_usual or "{{n}}" in template, "this is what it is for"
