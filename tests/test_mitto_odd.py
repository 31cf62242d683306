"""Answers of odd shapes, item by item, from the wire to the ledger: what an answer does not say of a message is unknown,
what it says is written, and totals, money and audit stay true."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from shop import Shop, check_the_account
from support import assert_sound, new_account, open_shop, sending

from smsd import credits, database, queue
from smsd.model import BULK_PATH, SEND_PATH, MessageState

ACCEPTED, REFUSED, UNKNOWN = (int(state) for state in (
    MessageState.ACCEPTED, MessageState.REFUSED, MessageState.UNKNOWN
))  # fmt: skip
ERROR = {"error": "Destination is not allowed"}

Answer = Callable[[int], list[Any]]
"""The elements that answer a request of so many messages."""


@dataclass
class Provider:
    """A provider that takes everything and answers as it is told."""

    answer: Answer
    requests: list[list[Any]] = field(default_factory=list)
    url: str = ""

    async def take(self, http: web.Request) -> web.Response:
        body = orjson.loads(await http.read())
        items = body.get("messages", [body])
        self.requests.append(items)
        return web.json_response({"bulkId": "b", "messages": self.answer(len(items))})


@contextlib.asynccontextmanager
async def provider(answer: Answer) -> AsyncIterator[Provider]:
    one = Provider(answer)
    app = web.Application()
    app.router.add_post(BULK_PATH, one.take)
    app.router.add_post(SEND_PATH, one.take)
    async with TestServer(app, host="127.0.0.1") as server:
        one.url = str(server.make_url("")).rstrip("/")
        yield one


_NUMBERS = count(1)


def accepted() -> dict[str, str]:
    """An element with an id of its own."""
    return {"messageId": f"01ODD{next(_NUMBERS):021}"}


@pytest.fixture
async def shop(pool: database.Pool) -> AsyncIterator[Shop]:
    """A shop; whatever was answered, the audit finds nothing afterwards."""
    account = await new_account(pool)
    yield await open_shop(pool, account, await queue.register(pool, "test", "0"))
    await assert_sound(pool)


async def states(pool: database.Pool, campaign_id: int) -> list[int]:
    """Each message's state in the order of posting; of what its whole batch is unknown for, UNKNOWN."""
    rows = await pool.fetch(
        "select case status when 'unknown' then 5 else own_state end as state from message_shown"
        " where campaign_id = $1 order by id",
        campaign_id,
    )
    return [row["state"] for row in rows]


async def send(
    shop: Shop, answer: Answer, n: int, batch_size: int | None = None
) -> tuple[int, Provider]:
    """A campaign of n messages, all answered so; its id, and who answered."""
    campaign_id = await shop.sending(n, batch_size=batch_size or n)
    async with (
        provider(answer) as there,
        sending(shop.pool, shop.replica_id, there.url) as at_work,
    ):
        await at_work.until_done()
    await check_the_account(shop, campaign_id)
    return campaign_id, there


# ------------------------------------------------------------------------------------- one element each


@pytest.mark.parametrize(
    ("element", "state"),
    [
        ({"messageId": "01ONE", **ERROR}, ACCEPTED),
        ({"messageId": " 01ONE "}, ACCEPTED),
        ({"MessageId": "01ONE", "trafficAccountId": None}, ACCEPTED),
        ({"id": "01ONE", "messageId": ""}, ACCEPTED),
        (ERROR, REFUSED),
        ({"messageId": None, **ERROR}, REFUSED),
        ({"messageId": "", "errors": [{"code": 7}]}, REFUSED),
        ({"messageId": 17, **ERROR}, REFUSED),
        ({}, UNKNOWN),
        ({"error": ""}, UNKNOWN),
        ({"error": None, "messageId": None}, UNKNOWN),
        ({"messageId": 17}, UNKNOWN),
        ({"messageId": "x" * 65}, UNKNOWN),
        ({"messageId": "01\u0000ONE"}, UNKNOWN),
        ({"messageId": {"value": "01ONE"}}, UNKNOWN),
        (None, UNKNOWN),
        ("01ONE", UNKNOWN),
        ([{"messageId": "01ONE"}], UNKNOWN),
        (False, UNKNOWN),
    ],
)  # fmt: skip
async def test_an_odd_element_decides_its_own_message_and_no_other(
    shop: Shop, element: Any, state: int
) -> None:
    campaign_id, there = await send(shop, lambda _: [accepted(), element, accepted()], 3)
    assert await states(shop.pool, campaign_id) == [ACCEPTED, state, ACCEPTED]
    assert len(there.requests) == 1


async def test_every_shape_in_one_answer_moves_money_once_for_each(shop: Shop) -> None:
    """Accepted is spent, refused comes back, unknown keeps its hold."""

    def answer(_: int) -> list[Any]:
        return [accepted(), ERROR, {}, {"messageId": "01TWICE"}, {"messageId": "01TWICE"},
                accepted() | ERROR, None, accepted()]  # fmt: skip

    campaign_id = await shop.begin(8, batch_size=8, held=16)
    await shop.expand(8, segments=2)
    async with provider(answer) as there, sending(shop.pool, shop.replica_id, there.url) as at_work:
        await at_work.until_done()
    assert await states(shop.pool, campaign_id) == [
        ACCEPTED, REFUSED, UNKNOWN, UNKNOWN, UNKNOWN, ACCEPTED, UNKNOWN, ACCEPTED,
    ]  # fmt: skip
    sums = (await check_the_account(shop, campaign_id)).totals
    assert (sums.pending, sums.refused, sums.unknown) == (3, 1, 4)
    assert await credits.balance(shop.pool, shop.id) == (10_000 - 6, 8)
    assert len(there.requests) == 1


# ---------------------------------------------------------------------------------------- of another length


@pytest.mark.parametrize("more", [-3, -1, 1, 4])
async def test_a_list_of_another_length_says_nothing_of_any_message_and_is_not_posted_again(
    shop: Shop, more: int
) -> None:
    campaign_id, there = await send(shop, lambda n: [accepted() for _ in range(n + more)], 12, 4)
    assert await states(shop.pool, campaign_id) == [UNKNOWN] * 12
    assert [len(items) for items in there.requests] == [4, 4, 4]
    assert await credits.balance(shop.pool, shop.id) == (10_000, 12)


async def test_an_empty_list_says_nothing(shop: Shop) -> None:
    campaign_id, there = await send(shop, lambda _: [], 2)
    assert await states(shop.pool, campaign_id) == [UNKNOWN] * 2
    assert len(there.requests) == 1


# ------------------------------------------------------------------------------------------------- ids that are ours


async def test_an_id_that_is_another_message_s_already_stays_that_one_s(
    pool: database.Pool, shop: Shop
) -> None:
    first, _ = await send(shop, lambda _: [{"messageId": "01OURS"}], 1)
    second, _ = await send(shop, lambda _: [accepted(), {"messageId": "01OURS"}, accepted()], 3)
    assert await states(pool, first) == [ACCEPTED]
    assert await states(pool, second) == [ACCEPTED, UNKNOWN, ACCEPTED]
    await shop.receive(**{"01OURS": int(MessageState.DELIVERED)})
    assert (await shop.progress(first)).totals.delivered == 1
    assert (await shop.progress(second)).totals.delivered == 0
    await check_the_account(shop, second)


async def test_an_id_of_another_account_s_message_stays_that_one_s(
    pool: database.Pool, shop: Shop
) -> None:
    first, _ = await send(shop, lambda _: [{"messageId": "01OURS"}], 1)
    other = await open_shop(pool, await new_account(pool, "second"), shop.replica_id)
    campaign_id = await other.sending(1)
    async with (
        provider(lambda _: [{"messageId": "01OURS"}]) as there,
        sending(pool, shop.replica_id, there.url) as at_work,
    ):
        await at_work.until_done()
    assert await states(pool, first) == [ACCEPTED]
    assert await states(pool, campaign_id) == [UNKNOWN]
    assert await credits.balance(pool, other.id) == (10_000, 1)


async def test_of_answers_that_give_one_id_at_once_one_gets_it(
    pool: database.Pool, shop: Shop
) -> None:
    campaign_id = await shop.sending(12, batch_size=1)
    together = asyncio.Event()

    async def hold(http: web.Request) -> web.Response:
        there.requests.append([await http.read()])
        if len(there.requests) >= 4:
            together.set()
        await together.wait()
        return web.json_response({"messageId": "01SAME"})

    there = Provider(lambda _: [])
    app = web.Application()
    app.router.add_post(SEND_PATH, hold)
    async with (
        TestServer(app, host="127.0.0.1") as server,
        sending(pool, shop.replica_id, str(server.make_url("")).rstrip("/")) as at_work,
    ):
        await at_work.until_done()
    assert sorted(await states(pool, campaign_id)) == [UNKNOWN] * 11 + [ACCEPTED]
    assert len(there.requests) == 12
    assert (await check_the_account(shop, campaign_id)).totals.unknown == 11
