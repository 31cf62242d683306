"""The simulator is the oracle of the system tests, so it is itself tested over real HTTP."""

import asyncio
import io
import re
import signal
import socket
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from random import Random
from typing import Any, NamedTuple
from uuid import UUID

import aiohttp
import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from smsd.model import API_KEY_HEADER, BULK_PATH, MESSAGE_PATH, SEND_PATH
from smsd.simulator import Duplicate, Fault, Ledger, Report, Request, Simulator, Switches, run
from smsd.simulator.ledger import Draft, largest_window, parse_ulid, ulid, ulids
from smsd.simulator.receipts import POSTS_AT_ONCE
from smsd.simulator.server import REDIRECTED_PATH, WEBHOOKS_PATH
from smsd.simulator.wire import Refusal, bend, read_draft, read_items

ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
KEY = {API_KEY_HEADER: "any"}


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def ids(self) -> list[str | None]:
        return [element.get("messageId") for element in self.json["messages"]]


class Api:
    """A plain client of one simulator."""

    def __init__(self, session: aiohttp.ClientSession, mitto: Simulator) -> None:
        self._session, self._mitto = session, mitto

    async def ask(self, method: str, path: str, content: Any = None, **options: Any) -> Answer:
        if content is not None:
            body = content if isinstance(content, bytes) else orjson.dumps(content)
            options["data"] = io.BytesIO(body) if len(body) > 2**20 else body
        options = {"headers": KEY, "allow_redirects": False, **options}
        async with self._session.request(method, self._mitto.url + path, **options) as answer:
            return Answer(answer.status, await answer.read(), dict(answer.headers))

    async def bulk(self, *messages: Any) -> Answer:
        return await self.ask("POST", BULK_PATH, {"messages": list(messages)})

    async def send(self, message: Any) -> Answer:
        return await self.ask("POST", SEND_PATH, message)

    async def get(self, message_id: str) -> Answer:
        return await self.ask("GET", MESSAGE_PATH.format(message_id=message_id))

    async def control(self, method: str, name: str, content: Any = None) -> Answer:
        return await self.ask(method, f"/_simulator/{name}", content, headers={})


def message(number: int, account: str = "acc-1", text: str = "Hello", **more: Any) -> Any:
    """A fit message to a destination that ends in this number (seven digits)."""
    sms = {"text": text, "sender": "Shop"}
    return {
        "trafficAccountId": account,
        "destination": f"+30690{number:07d}",
        "sms": sms,
        **more,
    }


def numbers(mitto: Simulator) -> list[int]:
    """The last seven digits of every accepted destination, in order."""
    return [one.destination % 10_000_000 for one in mitto.ledger.messages()]


class Inbox:
    """A real webhook: keeps what it took, and answers as it is told."""

    def __init__(self) -> None:
        self.receipts: list[dict[str, Any]] = []
        self.sizes: list[int] = []  # receipts of each taken POST; 0 = a single object
        self.headers: list[dict[str, str]] = []
        self.refusals: list[int] = []  # answered first, in this order; 0 cuts the connection
        self.open = self.most_open = 0
        self.before_answer: Callable[[], Awaitable[object]] | None = None
        self.url = ""

    def told(self, key: str = "deliveryStatus") -> list[str]:
        return [receipt[key] for receipt in self.receipts]

    async def take(self, http: web.BaseRequest) -> web.StreamResponse:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            content = orjson.loads(await http.read())
            if self.before_answer is not None:
                await self.before_answer()
        finally:
            self.open -= 1
        if self.refusals:
            status = self.refusals.pop(0)
            if status == 0 and http.transport is not None:
                http.transport.close()
            return web.Response(status=status or 200)
        self.headers.append(dict(http.headers))
        self.sizes.append(len(content) if isinstance(content, list) else 0)
        self.receipts += content if isinstance(content, list) else [content]
        return web.Response(status=202)


@asynccontextmanager
async def inbox_server(port: int = 0) -> AsyncIterator[Inbox]:
    inbox = Inbox()
    runner = web.ServerRunner(web.Server(inbox.take, access_log=None), shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    inbox.url = f"http://127.0.0.1:{runner.addresses[0][1]}/dlr"
    yield inbox
    await runner.cleanup()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:
        yield session


@pytest.fixture
async def mitto() -> AsyncIterator[Simulator]:
    async with Simulator() as simulator:
        yield simulator


@pytest.fixture
async def api(session: aiohttp.ClientSession, mitto: Simulator) -> Api:
    return Api(session, mitto)


@pytest.fixture
async def inbox(mitto: Simulator) -> AsyncIterator[Inbox]:
    """A webhook that is registered for every account; receipts are due at once."""
    async with inbox_server() as inbox:
        mitto.receipts.register(inbox.url, {"X-Webhook-Secret": "s3cret"}, frozenset())
        mitto.switches.dlr_delay_seconds = (0.0, 0.0)
        yield inbox


# --- the API as documented ------------------------------------------------------------------


async def test_a_bulk_is_accepted_in_order_and_every_message_gets_an_id(
    api: Api, mitto: Simulator
) -> None:
    answer = await api.bulk(*[message(number) for number in (5, 3, 9)])

    assert answer.status == 200
    UUID(answer.json["bulkId"])
    assert [element["trafficAccountId"] for element in answer.json["messages"]] == ["acc-1"] * 3
    rows = list(mitto.ledger.messages())
    assert [row.message_id for row in rows] == answer.ids
    assert numbers(mitto) == [5, 3, 9]
    assert {row.bulk_id for row in rows} == {answer.json["bulkId"]}


async def test_ids_are_ulids_of_the_time_of_acceptance_that_grow(
    api: Api, mitto: Simulator
) -> None:
    before = time.time()
    ids = [
        str(one)
        for size in (3, 1, 2)
        for one in (await api.bulk(*[message(n) for n in range(size)])).ids
    ]
    after = time.time()

    assert all(ULID.fullmatch(one) for one in ids)
    assert ids == sorted(set(ids))
    milliseconds = [(parse_ulid(one) or 0) >> 80 for one in ids]
    assert int(before * 1000) <= min(milliseconds)
    assert max(milliseconds) <= int(after * 1000) + 1


async def test_a_single_send_is_answered_in_either_shape(api: Api, mitto: Simulator) -> None:
    listed = (await api.send(message(1))).json
    mitto.switches.send_shape = "flat"
    flat = (await api.send(message(2))).json

    first, second = [row.message_id for row in mitto.ledger.messages()]
    assert listed == {"messages": [{"trafficAccountId": "acc-1", "messageId": first}]}
    assert flat == {"trafficAccountId": "acc-1", "messageId": second}
    assert [row.bulk_id for row in mitto.ledger.messages()] == [None, None]


async def test_a_message_is_shown_by_its_id(api: Api, mitto: Simulator) -> None:
    mitto.switches.dlr_delay_seconds = (60, 60)
    [message_id] = (await api.bulk(message(7, text="Καλημέρα"))).ids
    shown = (await api.get(str(message_id))).json

    accepted_at = mitto.ledger.message(0).accepted_at
    assert datetime.fromisoformat(shown["createdAt"]).timestamp() == pytest.approx(
        accepted_at, abs=0.001
    )
    assert shown["conversation"].pop("id")
    assert {key: shown[key] for key in shown if key not in ("createdAt", "updatedAt")} == {
        "messageId": message_id,
        "trafficAccountId": "acc-1",
        "text": "Καλημέρα",
        "sender": "Shop",
        "conversation": {"participants": ["+306900000007", "Shop"]},
        "deliveryStatus": "Queued",
        "description": None,
        "messageParts": 1,
        "requestInfo": {"sms": {"sender": "Shop", "text": "Καλημέρα"}},
        "reference": None,
    }


async def test_a_message_is_shown_with_its_final_state_once_it_is_due(
    api: Api, mitto: Simulator
) -> None:
    mitto.switches.dlr_delay_seconds = (0, 0)
    mitto.switches.dlr_failed = 1.0
    [message_id] = (await api.bulk(message(7))).ids
    shown = (await api.get(str(message_id))).json

    assert (shown["deliveryStatus"], shown["description"]) == ("Failure", "Absent subscriber")


@pytest.mark.parametrize("message_id", ["01KATEST", "0" * 26, "7" + "Z" * 25, "%00", "a/b", ""])
async def test_an_unknown_id_is_404(api: Api, message_id: str) -> None:
    await api.bulk(message(1))
    assert (await api.get(message_id)).status == 404


async def test_without_a_key_or_with_an_unknown_one_nothing_is_accepted(
    session: aiohttp.ClientSession,
) -> None:
    async with Simulator(api_keys={"right"}) as mitto:
        api = Api(session, mitto)
        body = {"messages": [message(1)]}
        answers = [
            (await api.ask("POST", BULK_PATH, body, headers=headers)).status
            for headers in ({}, {API_KEY_HEADER: "wrong"}, {API_KEY_HEADER: "right"})
        ]
        assert answers == [401, 401, 200]
        assert mitto.ledger.accepted_count == 1
        assert (await api.ask("GET", "/api/v1.1/Messages/x", headers={})).status == 401
        assert (await api.ask("POST", WEBHOOKS_PATH, {"url": "x"}, headers={})).status == 401


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"null",
        b'{"messages": []}',
        b'{"messages": {}}',
        b'{"messages": [1, null]}',
        b'{"messages": [{}]}',
        b'{"messages": [{"trafficAccountId": "a", "destination": 5, "sms": []}]}',
        b'{"messages": ' + b"[" * 5000,
        b'{"messages": [{"trafficAccountId": "\\ud800"}]}',
    ],
)
async def test_junk_is_400_with_a_message_and_nothing_is_accepted(
    api: Api, mitto: Simulator, body: bytes
) -> None:
    for path in (BULK_PATH, SEND_PATH):
        answer = await api.ask("POST", path, body)
        assert answer.status == 400
        assert answer.json["message"]
    assert mitto.ledger.accepted_count == 0


async def test_a_body_that_is_not_what_its_encoding_says_is_400(api: Api) -> None:
    headers = {**KEY, "Content-Encoding": "gzip"}
    answer = await api.ask("POST", BULK_PATH, b"no gzip at all", headers=headers)
    assert answer.status == 400


_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "trafficAccountId", "destination", "sms", "text", "sender"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


def _fits(content: Any) -> bool:
    try:
        orjson.dumps(content)
    except TypeError:  # integers beyond 64 bits
        return False
    return True


@given(_JUNK.filter(_fits))
def test_no_json_at_all_breaks_the_reading_of_a_request(content: Any) -> None:
    with suppress(Refusal):
        assert read_items(orjson.dumps(content), "bulk")
    assert isinstance(read_draft(content), str | Draft)


_BAD = [
    message(1, destination="306900000001"),
    message(1, destination="+30"),
    message(1, destination="+٣٠٦٩٠٠٠٠٠٠٠٠"),
    message(1, text=""),
    message(1, sms={"text": "Hello", "sender": ""}),
    message(1, sms={"text": "Hello", "sender": "S" * 17}),
    "no object",
]


@pytest.mark.parametrize("bad", _BAD)
async def test_a_bad_item_fails_the_request_or_itself_as_the_switch_says(
    api: Api, mitto: Simulator, bad: Any
) -> None:
    whole = await api.bulk(message(1), bad, message(2))
    assert (whole.status, mitto.ledger.accepted_count) == (400, 0)
    assert "messages[1]" in whole.json["message"]

    mitto.switches.bad_item = "item_without_id"
    bare = (await api.bulk(message(1), bad, message(2))).json["messages"][1]
    assert bare.keys() == {"trafficAccountId"}

    mitto.switches.bad_item = "item_with_error"
    elements = (await api.bulk(message(3), bad, message(4))).json["messages"]
    assert elements[1].keys() == {"trafficAccountId", "error"}
    assert numbers(mitto) == [1, 2, 3, 4]
    assert [e.get("messageId") for e in elements] == [
        mitto.ledger.message(2).message_id,
        None,
        mitto.ledger.message(3).message_id,
    ]


async def test_a_request_above_the_largest_is_413(api: Api, mitto: Simulator) -> None:
    mitto.switches.largest_request = 2
    assert (await api.bulk(*[message(n) for n in range(3)])).status == 413
    assert (await api.bulk(*[message(n) for n in range(2)])).status == 200
    assert mitto.ledger.accepted_count == 2


async def test_a_request_of_many_megabytes_is_taken(api: Api, mitto: Simulator) -> None:
    answer = await api.bulk(*[message(n, text="x" * 1000) for n in range(5000)])
    assert (answer.status, mitto.ledger.accepted_count) == (200, 5000)
    assert len(set(answer.ids)) == 5000


async def test_errors_speak_under_the_key_of_the_switch(api: Api, mitto: Simulator) -> None:
    mitto.switches.error_key = "error"
    assert (await api.bulk()).json.keys() == {"error"}


async def test_a_reference_is_kept_only_if_the_switch_says_so(api: Api, mitto: Simulator) -> None:
    [dropped] = (await api.bulk(message(1, reference="r-1"))).ids
    mitto.switches.keep_reference = True
    [kept] = (await api.bulk(message(2, reference="r-2"))).ids

    assert (await api.get(str(dropped))).json["reference"] is None
    assert (await api.get(str(kept))).json["reference"] == "r-2"


async def test_the_clock_that_it_shows_can_be_wrong_but_never_the_ledger(
    api: Api, mitto: Simulator
) -> None:
    mitto.switches.clock_skew_seconds = -3600
    answer = await api.bulk(message(1))
    [message_id] = answer.ids
    shown = (await api.get(str(message_id))).json

    now = time.time()
    created = datetime.fromisoformat(shown["createdAt"]).timestamp()
    assert created == pytest.approx(now - 3600, abs=20)
    assert ((parse_ulid(str(message_id)) or 0) >> 80) / 1000 == pytest.approx(created, abs=0.01)
    dated = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    assert dated == pytest.approx(now - 3600, abs=20)
    assert mitto.ledger.message(0).accepted_at == pytest.approx(now, abs=20)


async def test_what_does_not_exist_is_404(api: Api) -> None:
    assert (await api.ask("GET", "/")).status == 404
    assert (await api.ask("DELETE", BULK_PATH)).status == 404


# --- faults ---------------------------------------------------------------------------------

_REFUSALS = [
    (Fault.FAIL_400, 400),
    (Fault.FAIL_401, 401),
    (Fault.FAIL_403, 403),
    (Fault.FAIL_404, 404),
    (Fault.FAIL_429, 429),
    (Fault.FAIL_500, 500),
    (Fault.FAIL_500_HTML, 500),
    (Fault.FAIL_502, 502),
    (Fault.FAIL_503, 503),
    (Fault.FAIL_503_RETRY_AFTER, 503),
    (Fault.FAIL_OTHER, 409),
]


@pytest.mark.parametrize(("fault", "status"), _REFUSALS)
async def test_a_refusal_accepts_nothing(
    api: Api, mitto: Simulator, fault: Fault, status: int
) -> None:
    mitto.switches = Switches.model_validate({fault.value: 1.0, "fail_other_status": 409})
    answers = [await api.bulk(message(1)), await api.send(message(2))]

    assert [answer.status for answer in answers] == [status, status]
    html = fault in (Fault.FAIL_500_HTML, Fault.FAIL_502)
    for answer in answers:
        if html:
            assert answer.body.startswith(b"<html>")
        else:
            assert answer.json.keys() == {"message"}
    assert mitto.ledger.accepted_count == 0
    assert mitto.ledger.answers() == {str(status): 2}
    assert {request.fault for request in mitto.ledger.requests} == {fault}


async def test_retry_after_is_absent_seconds_or_a_date(api: Api, mitto: Simulator) -> None:
    mitto.switches.fail_429 = 1.0
    assert "Retry-After" not in (await api.bulk(message(1))).headers

    mitto.switches.retry_after = 7
    assert (await api.bulk(message(1))).headers["Retry-After"] == "7"

    mitto.switches.retry_after = "date"
    answer = await api.bulk(message(1))
    wait = parsedate_to_datetime(answer.headers["Retry-After"]) - parsedate_to_datetime(
        answer.headers["Date"]
    )
    assert wait.total_seconds() in (1, 2, 3)


async def test_a_503_may_say_when_to_come_back(api: Api, mitto: Simulator) -> None:
    mitto.switches.fail_503_retry_after = 1.0
    assert (await api.bulk(message(1))).headers["Retry-After"] == "1"
    mitto.switches = Switches(fail_503=1.0)
    assert "Retry-After" not in (await api.bulk(message(1))).headers


async def test_a_redirect_is_counted_if_somebody_follows_it(api: Api, mitto: Simulator) -> None:
    mitto.switches.redirect = 1.0
    answer = await api.bulk(message(1))
    assert (answer.status, answer.headers["Location"]) == (307, mitto.url + REDIRECTED_PATH)
    assert (mitto.ledger.accepted_count, mitto.ledger.redirects_followed) == (0, 0)

    await api.ask("POST", BULK_PATH, {"messages": [message(1)]}, allow_redirects=True)
    assert (mitto.ledger.accepted_count, mitto.ledger.redirects_followed) == (0, 1)


@pytest.mark.parametrize(
    ("fault", "accepted"), [(Fault.HANG_BEFORE_ACCEPT, 0), (Fault.ACCEPT_THEN_HANG, 2)]
)
async def test_a_hang_lasts_until_the_client_leaves(
    api: Api, mitto: Simulator, fault: Fault, accepted: int
) -> None:
    setattr(mitto.switches, fault, 1.0)
    request = asyncio.create_task(api.bulk(message(1), message(2)))
    await mitto.until(lambda: any(one.fault == fault for one in mitto.ledger.requests))
    await mitto.accepted_reached(accepted)
    assert not request.done()
    assert mitto.ledger.in_flight == 1

    request.cancel()
    await mitto.until(lambda: mitto.ledger.in_flight == 0)
    assert mitto.ledger.accepted_count == accepted
    assert mitto.ledger.answers() == {"none": 1}


async def test_a_hang_ends_with_a_cut_connection_when_the_simulator_stops(
    session: aiohttp.ClientSession,
) -> None:
    mitto = Simulator(Switches(accept_then_hang=1.0))
    await mitto.start()
    request = asyncio.create_task(Api(session, mitto).bulk(message(1)))
    await mitto.accepted_reached(1)
    await mitto.stop()
    with pytest.raises(aiohttp.ClientError):
        await request


@pytest.mark.parametrize(
    ("fault", "accepted"),
    [
        (Fault.RESET_BEFORE_READING, 0),
        (Fault.RESET_AFTER_READING, 0),
        (Fault.ACCEPT_THEN_RESET, 1),
        (Fault.HALF_ANSWER, 1),
    ],
)
@pytest.mark.parametrize("text", ["short", "long " * 300_000])
async def test_a_cut_connection_is_an_error_for_the_client(
    api: Api, mitto: Simulator, fault: Fault, accepted: int, text: str
) -> None:
    setattr(mitto.switches, fault, 1.0)
    with pytest.raises(aiohttp.ClientError):
        await api.bulk(message(1, text=text))
    await mitto.until(lambda: mitto.ledger.in_flight == 0)
    assert mitto.ledger.accepted_count == accepted
    unread = fault == Fault.RESET_BEFORE_READING
    assert mitto.ledger.requests[0].account == (None if unread else "acc-1")


@pytest.mark.parametrize(("fault", "status"), [("accept_then_500", 500), ("accept_then_502", 502)])
async def test_an_error_can_hide_an_acceptance(
    api: Api, mitto: Simulator, fault: str, status: int
) -> None:
    setattr(mitto.switches, fault, 1.0)
    assert (await api.bulk(message(1))).status == status
    assert mitto.ledger.accepted_count == 1


async def test_a_4xx_can_carry_ids(api: Api, mitto: Simulator) -> None:
    mitto.switches.ids_in_4xx = 1.0
    answer = await api.bulk(message(1), message(2))
    assert answer.status == 400
    assert answer.ids == [row.message_id for row in mitto.ledger.messages()]


async def test_a_broken_answer_is_no_json_although_all_were_accepted(
    api: Api, mitto: Simulator
) -> None:
    mitto.switches.broken_answer = 1.0
    answer = await api.bulk(message(1), message(2))
    assert (answer.status, mitto.ledger.accepted_count) == (200, 2)
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(answer.body)


async def test_lists_come_back_short_long_shuffled_or_with_an_id_twice(
    api: Api, mitto: Simulator
) -> None:
    messages = [message(number) for number in range(5)]

    async def answered(fault: Fault) -> tuple[list[str | None], list[str]]:
        mitto.switches = Switches.model_validate({fault.value: 1.0})
        await mitto.reset()
        ids = (await api.bulk(*messages)).ids
        true = [row.message_id for row in mitto.ledger.messages()]
        assert len(true) == 5
        return ids, true

    ids, true = await answered(Fault.SHORT_ANSWER)
    assert len(ids) == 4
    assert set(ids) < set(true)

    ids, true = await answered(Fault.LONG_ANSWER)
    [extra] = set(ids) - set(true)
    assert len(ids) == 6
    assert (await api.get(str(extra))).status == 404

    ids, true = await answered(Fault.SHUFFLED_ANSWER)
    assert sorted(map(str, ids)) == true
    assert all(shown != right for shown, right in zip(ids, true, strict=True))

    ids, true = await answered(Fault.REPEATED_ID_ANSWER)
    assert ids == [*true[:4], true[0]]


async def test_a_dripping_answer_is_whole_in_the_end(api: Api, mitto: Simulator) -> None:
    mitto.switches.slow_drip = 1.0
    mitto.switches.slow_drip_seconds = 0.2
    began = time.monotonic()
    answer = await api.bulk(message(1), message(2))
    assert time.monotonic() - began >= 0.19
    assert answer.ids == [row.message_id for row in mitto.ledger.messages()]


async def test_items_are_refused_doubtful_or_without_id(api: Api, mitto: Simulator) -> None:
    async def elements(switch: str) -> list[Any]:
        mitto.switches = Switches.model_validate({switch: 1.0})
        content = (await api.bulk(message(1), message(2))).json
        return [set(element) for element in content["messages"]]

    assert await elements("refuse_items") == [{"trafficAccountId", "error"}] * 2
    assert mitto.ledger.accepted_count == 0
    assert await elements("id_and_error") == [{"trafficAccountId", "error", "messageId"}] * 2
    assert mitto.ledger.accepted_count == 2
    assert await elements("items_without_id") == [{"trafficAccountId"}] * 2
    assert mitto.ledger.accepted_count == 4


async def test_among_refused_items_each_id_still_belongs_to_its_own(
    api: Api, mitto: Simulator
) -> None:
    mitto.switches.refuse_items = 0.5
    ids = (await api.bulk(*[message(number) for number in range(100)])).ids
    expected = [number for number, one in enumerate(ids) if one is not None]
    assert 20 < len(expected) < 80
    assert numbers(mitto) == expected
    assert [row.message_id for row in mitto.ledger.messages()] == [one for one in ids if one]


async def test_the_same_seed_strikes_the_same_requests_and_about_the_fraction(
    api: Api, mitto: Simulator
) -> None:
    async def statuses(seed: int) -> list[int]:
        mitto.switches = Switches(seed=seed, fail_500=0.2, fail_429=0.3)
        await mitto.reset()
        return [(await api.bulk(message(1))).status for _ in range(200)]

    first = await statuses(1)
    assert await statuses(1) == first
    assert await statuses(2) != first
    # five standard deviations of a binomial of 200
    assert abs(first.count(500) - 40) < 29
    assert abs(first.count(429) - 60) < 33
    assert set(first) == {200, 429, 500}


async def test_faults_end_when_none_are_left(api: Api, mitto: Simulator) -> None:
    mitto.switches = Switches(fail_500=1.0, faults_left=2)
    assert [(await api.bulk(message(1))).status for _ in range(4)] == [500, 500, 200, 200]
    assert mitto.switches.faults_left == 0


async def test_faults_strike_only_the_accounts_named(api: Api, mitto: Simulator) -> None:
    mitto.switches = Switches(hang_before_accept=1.0, latency_seconds=60, only_accounts=("bad",))
    hung = asyncio.create_task(api.bulk(message(1, account="bad")))
    await mitto.until(lambda: any(one.fault for one in mitto.ledger.requests))

    assert (await api.bulk(message(2, account="good"))).status == 200
    assert numbers(mitto) == [2]
    hung.cancel()


async def test_a_reset_for_one_account_leaves_the_others(api: Api, mitto: Simulator) -> None:
    mitto.switches = Switches(reset_before_reading=1.0, only_accounts=("bad",))
    with pytest.raises(aiohttp.ClientError):
        await api.bulk(message(1, account="bad"))
    assert (await api.bulk(message(2, account="good"))).status == 200


async def test_the_answer_is_late_but_the_acceptance_is_not(api: Api, mitto: Simulator) -> None:
    mitto.switches = Switches(latency_seconds=0.2, latency_jitter_seconds=0.05)
    began = time.monotonic()
    answer = asyncio.create_task(api.bulk(message(1)))
    await mitto.accepted_reached(1)
    assert not answer.done()
    assert (await answer).status == 200
    assert time.monotonic() - began >= 0.19


@pytest.mark.parametrize("by_account", [False, True])
async def test_an_account_above_its_limit_is_answered_429(
    api: Api, mitto: Simulator, by_account: bool
) -> None:
    limits = {"acc-1": 5} if by_account else {}
    mitto.switches = Switches(
        max_requests_per_second=1000 if by_account else 5, limits_by_account=limits
    )
    statuses = [(await api.bulk(message(number))).status for number in range(12)]

    allowed: list[float] = []
    for request, status in zip(mitto.ledger.requests, statuses, strict=True):
        recent = [at for at in allowed if at > request.arrived_monotonic - 1.0]
        assert status == (200 if len(recent) < 5 else 429)
        if status == 200:
            allowed.append(request.arrived_monotonic)
    assert 429 in statuses
    assert (await api.bulk(message(1, account="another"))).status == 200


async def test_magic_numbers_do_what_their_table_says(
    api: Api, mitto: Simulator, inbox: Inbox
) -> None:
    mitto.switches.magic_numbers = True
    elements = (await api.bulk(*[message(number) for number in (1, 2, 4, 6, 7)])).json["messages"]
    ids = [element.get("messageId") for element in elements]
    failed, refused, silent, early, doubled = ids
    assert "error" in elements[1]
    assert refused is None
    assert early in inbox.told("messageId")

    await mitto.receipts_settled()
    told = sorted((one["messageId"], one["deliveryStatus"]) for one in inbox.receipts)
    assert told == [
        (failed, "Failure"),
        (early, "Delivered"),
        (doubled, "Delivered"),
        (doubled, "Delivered"),
    ]
    assert silent is not None


@pytest.mark.parametrize(("digits", "accepted"), [(3, 1), (5, 0)])
async def test_a_request_with_a_magic_number_hangs(
    api: Api, mitto: Simulator, digits: int, accepted: int
) -> None:
    mitto.switches.magic_numbers = True
    hung = asyncio.create_task(api.send(message(digits)))
    await mitto.until(lambda: any(one.fault for one in mitto.ledger.requests))
    await mitto.accepted_reached(accepted)
    assert not hung.done()
    assert (await api.send(message(8))).status == 500
    assert mitto.ledger.accepted_count == accepted
    hung.cancel()


async def test_magic_numbers_are_off_by_default(api: Api, mitto: Simulator, inbox: Inbox) -> None:
    answer = await api.bulk(*[message(number) for number in range(1, 9)])
    assert None not in answer.ids
    await mitto.receipts_settled()
    assert inbox.told() == ["Delivered"] * 8


# --- switches -------------------------------------------------------------------------------


def test_a_wrong_switch_is_refused_and_changes_nothing() -> None:
    switches = Switches(fail_500=0.7)
    for name, value in (("fail_400", 0.4), ("fail_400", 2), ("dlr_delay_seconds", (2, 1))):
        before = getattr(switches, name)
        with pytest.raises(ValidationError):
            setattr(switches, name, value)
        assert getattr(switches, name) == before
    with pytest.raises(ValidationError):
        Switches(refuse_items=0.6, id_and_error=0.6)


def test_every_fault_has_its_switch() -> None:
    assert {fault.value for fault in Fault} <= Switches.model_fields.keys()


# --- the ledger's questions -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrivals", "most"),
    [
        ([], 0),
        ([3.0], 1),
        ([0.0, 0.5, 0.999, 1.0, 1.5], 3),
        ([0.0, 1.0, 2.0], 1),  # half-open: exactly one second later is another window
        ([2.0, 0.2, 0.1, 0.0, 0.9, 1.05], 4),  # in no order; 0.0 to 0.9, and 0.1 to 1.05
    ],
)
def test_the_worst_second_of_known_arrivals(arrivals: list[float], most: int) -> None:
    assert largest_window(arrivals, [1] * len(arrivals)) == most


@given(
    st.lists(
        st.tuples(
            st.floats(0, 5) | st.sampled_from([0.0, 0.25, 1.0, 1.25, 2.0, 2.25]),
            st.integers(0, 500),
        ),
        max_size=30,
    )
)
def test_the_worst_second_is_that_of_brute_force(arrivals: list[tuple[float, int]]) -> None:
    windows = [
        sum(weight for at, weight in arrivals if start <= at < start + 1.0) for start, _ in arrivals
    ]
    found = largest_window([at for at, _ in arrivals], [weight for _, weight in arrivals])
    assert found == max(windows, default=0)


def posted(
    ledger: Ledger, account: str, arrived: float, finished: float | None = None, messages: int = 1
) -> Request:
    request = ledger.open_request("bulk", arrived, arrived)
    request.account, request.messages = account, messages
    if finished is not None:
        ledger.close_request(request, finished)
    return request


def test_the_worst_second_is_asked_by_account_and_unit() -> None:
    ledger = Ledger()
    for account, arrived, messages in (("a", 0.0, 500), ("a", 0.9, 1), ("b", 0.95, 2)):
        posted(ledger, account, arrived, messages=messages)
    posted(ledger, "a", 1.2, messages=100)
    got = ledger.open_request("get", 1.1, 1.1)
    got.account = "a"

    assert ledger.worst_second("a") == 3  # 0.9, the GET at 1.1, 1.2
    assert ledger.worst_second("a", "posts") == 2
    assert ledger.worst_second("a", "messages") == 501
    assert ledger.worst_second(None, "requests") == 4
    assert ledger.worst_second(None, "messages") == 503
    assert ledger.worst_second("nobody") == 0


def test_the_most_in_flight_counts_overlaps_only() -> None:
    ledger = Ledger()
    posted(ledger, "a", 0.0, 1.0)
    posted(ledger, "a", 1.0, 2.0)  # begins as the other ends
    posted(ledger, "b", 0.5, 1.5)
    posted(ledger, "b", 1.2)  # open still
    assert ledger.max_in_flight("a") == 1
    assert ledger.max_in_flight("b") == 2
    assert ledger.max_in_flight() == 3
    assert ledger.in_flight == 1


def accepted(ledger: Ledger, *drafts: tuple[int, str], account: str = "a", at: float = 1e9) -> Any:
    request = ledger.open_request("bulk", at, at)
    kept = [Draft(account, number, "Shop", text, None) for number, text in drafts]
    return ledger.accept(request, kept, at, at)


def test_duplicates_are_recipients_accepted_more_than_once() -> None:
    ledger = Ledger()
    accepted(ledger, (1, "x"), (2, "x"), (3, "x"))
    accepted(ledger, (1, "x"), (2, "y"), (4, "x"), account="b")
    accepted(ledger, (1, "x"))

    assert ledger.duplicates() == [Duplicate(1, "x", 3)]
    assert ledger.duplicates("destination") == [Duplicate(1, None, 3), Duplicate(2, None, 2)]
    assert ledger.accepted_by_account() == {"a": 4, "b": 3}


def test_of_two_final_receipts_delivered_is_kept() -> None:
    ledger = Ledger()
    accepted(ledger, (1, "x"), (2, "x"), (3, "x"), (4, "x"))
    for row, reports in enumerate(
        ([Report.FAILED, Report.DELIVERED], [Report.DELIVERED, Report.FAILED], [Report.FAILED])
    ):
        for report in reports:
            ledger.receipt_answered(row, report)
    ledger.receipt_answered(3, Report.SENT)
    assert ledger.final_receipts() == {"Delivered": 2, "Failure": 1, "none": 1}


@given(st.integers(0, 2**128 - 1))
def test_a_ulid_comes_back_as_the_number_that_it_was(value: int) -> None:
    encoded = ulid(value)
    assert ULID.fullmatch(encoded)
    assert parse_ulid(encoded) == value
    assert parse_ulid(encoded.lower() + " ") is None


@given(st.integers(0, 2**127), st.integers(0, 3000))
def test_consecutive_ulids_are_those_of_consecutive_numbers(first: int, count: int) -> None:
    assert ulids(first, count) == [ulid(first + place) for place in range(count)]


def test_an_id_leads_back_to_its_message_even_after_the_clock_went_back() -> None:
    ledger = Ledger()
    ids: list[str] = []
    for at in (1e9, 1e9, 1e9 - 3600, 1e9 + 1):
        ids += accepted(ledger, *[(number, "x") for number in range(700)], at=at)
    assert ids == sorted(set(ids))
    for row in (0, 699, 700, 1500, 2799):
        found = ledger.find(ids[row])
        assert found is not None
        assert (found.row, found.destination) == (row, row % 700)
    neighbour = ulid((parse_ulid(ids[-1]) or 0) + 1)
    assert ledger.find(neighbour) is None


def test_a_message_costs_less_than_64_bytes_beside_its_text() -> None:
    ledger = Ledger()
    batch = [(number, "x") for number in range(500)]
    tracemalloc.start()
    for at in range(100):
        accepted(ledger, *batch, at=1e9 + at)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ledger.accepted_count == 50_000
    assert kept / 50_000 < 64


async def test_a_request_arrives_with_its_first_byte_not_with_its_last(mitto: Simulator) -> None:
    body = orjson.dumps({"messages": [message(1)]})
    head = f"POST {BULK_PATH} HTTP/1.1\r\nHost: x\r\n{API_KEY_HEADER}: k\r\n"
    reader, writer = await asyncio.open_connection(mitto.host, mitto.port)
    before = time.monotonic()
    writer.write(head.encode())
    await asyncio.sleep(0.2)  # the time between the bytes is what is measured
    between = time.monotonic()
    writer.write(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await mitto.accepted_reached(1)
    await reader.readuntil(b"\r\n\r\n")
    writer.close()

    [request] = mitto.ledger.requests
    assert before <= request.arrived_monotonic < between <= request.accepted_monotonic


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says when bytes came in")
async def test_a_request_arrives_when_the_kernel_has_it_not_when_a_busy_process_reads_it(
    mitto: Simulator,
) -> None:
    body = orjson.dumps({"messages": [message(1)]})
    head = f"POST {BULK_PATH} HTTP/1.1\r\nHost: x\r\n{API_KEY_HEADER}: k\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((mitto.host, mitto.port)) as client:  # not even accepted yet
        before = time.monotonic()
        client.sendall(head.encode() + body)
        sent = time.monotonic()
        time.sleep(0.3)  # noqa: ASYNC251 - this is the busy process
        await mitto.accepted_reached(1)
        [request] = mitto.ledger.requests
        assert before - 0.008 <= request.arrived_monotonic <= sent + 0.008
        assert request.arrived_at - request.arrived_monotonic == pytest.approx(
            time.time() - time.monotonic(), abs=0.01
        )


# --- receipts -------------------------------------------------------------------------------


async def test_a_receipt_carries_the_static_header_the_id_and_the_state(
    api: Api, mitto: Simulator, inbox: Inbox
) -> None:
    [message_id] = (await api.bulk(message(1))).ids
    await mitto.receipts_settled()
    [receipt] = inbox.receipts
    at = datetime.fromisoformat(receipt.pop("updatedAt")).timestamp()
    assert receipt == {"messageId": message_id, "deliveryStatus": "Delivered"}
    assert at == pytest.approx(mitto.ledger.message(0).due_at, abs=0.001)
    assert inbox.headers[0]["X-Webhook-Secret"] == "s3cret"
    assert inbox.sizes == [0]
    assert mitto.ledger.final_receipts() == {"Delivered": 1, "Failure": 0, "none": 0}


@pytest.mark.parametrize(
    ("style", "keys", "delivered", "failed"),
    [
        ("v1", ("messageId", "deliveryStatus", "updatedAt", "description"), "Delivered", "Failure"),
        ("v2", ("id", "status", "timestamp", "error"), "delivered", "failed"),
        ("v3", ("MessageId", "Status", "Timestamp", "Error"), "DELIVRD", "UNDELIV"),
        ("v4", ("messageId", "delivery_status", "doneAt", "errorMessage"), "completed", "Rejected"),
    ],
)
async def test_receipts_are_spelled_in_four_styles(
    api: Api,
    mitto: Simulator,
    inbox: Inbox,
    style: str,
    keys: tuple[str, ...],
    delivered: str,
    failed: str,
) -> None:
    mitto.switches = Switches.model_validate({**mitto.switches.model_dump(), "dlr_style": style})
    await api.bulk(message(1))
    await mitto.receipts_settled()
    mitto.switches.dlr_failed = 1.0
    await api.bulk(message(2))
    await mitto.receipts_settled()

    assert [set(receipt) for receipt in inbox.receipts] == [set(keys[:3]), set(keys)]
    assert inbox.told(keys[0]) == [row.message_id for row in mitto.ledger.messages()]
    assert inbox.told(keys[1]) == [delivered, failed]


async def test_mixed_receipts_come_in_every_style(api: Api, mitto: Simulator, inbox: Inbox) -> None:
    mitto.switches.dlr_style = "mixed"
    await api.bulk(*[message(number) for number in range(8)])
    await mitto.receipts_settled()
    assert len({frozenset(receipt) for receipt in inbox.receipts}) == 4


async def test_receipts_come_in_arrays_of_the_size_of_the_switch(
    api: Api, mitto: Simulator, inbox: Inbox
) -> None:
    mitto.switches.dlr_batch = 40
    answer = await api.bulk(*[message(number) for number in range(100)])
    await mitto.receipts_settled()
    assert sorted(inbox.sizes) == [20, 40, 40]
    assert sorted(inbox.told("messageId")) == answer.ids


@pytest.mark.parametrize(
    ("switch", "told"),
    [
        ({"dlr": False}, []),
        ({"dlr_never": 1.0}, []),
        ({"dlr_failed": 1.0}, ["Failure"]),
        ({"dlr_intermediate": True}, ["Sent", "Delivered"]),
        ({"dlr_doubled": 1.0}, ["Delivered", "Delivered"]),
        ({"dlr_out_of_order": 1.0}, ["Delivered", "Sent"]),
        ({"dlr_contradicting": 1.0}, ["Delivered", "Failure"]),
        ({"dlr_unknown_word": 1.0}, ["Teleported", "Delivered"]),
    ],
)
async def test_each_switch_of_receipts_shows_at_the_webhook(
    api: Api, mitto: Simulator, inbox: Inbox, switch: dict[str, Any], told: list[str]
) -> None:
    # in one array, so that the order within it is the order of posting
    mitto.switches = Switches.model_validate(
        {"dlr_delay_seconds": (0.05, 0.05), "dlr_batch": 10, **switch}
    )
    await api.bulk(message(1))
    await mitto.receipts_settled()
    assert inbox.told() == told
    final = {"Delivered": 0, "Failure": 0, "none": 0}
    final["Delivered" if "Delivered" in told else told[0] if told else "none"] = 1
    assert mitto.ledger.final_receipts() == final


async def test_a_receipt_that_was_sent_out_of_order_still_tells_the_earlier_time(
    api: Api, mitto: Simulator, inbox: Inbox
) -> None:
    mitto.switches = Switches(dlr_delay_seconds=(0.1, 0.1), dlr_out_of_order=1.0)
    await api.bulk(message(1))
    await mitto.receipts_settled()
    delivered, sent = inbox.receipts
    assert (delivered["deliveryStatus"], sent["deliveryStatus"]) == ("Delivered", "Sent")
    assert sent["updatedAt"] < delivered["updatedAt"]


async def test_a_receipt_can_be_taken_before_the_send_is_answered(
    api: Api, mitto: Simulator, inbox: Inbox
) -> None:
    mitto.switches.dlr_before_answer = 1.0
    mitto.switches.dlr_batch = 2
    answer = await api.bulk(*[message(number) for number in range(5)])
    assert inbox.told("messageId") == answer.ids
    assert inbox.sizes == [2, 2, 1]
    assert mitto.receipts.outstanding == 0


async def test_an_early_receipt_that_is_refused_comes_later(
    api: Api, mitto: Simulator, inbox: Inbox
) -> None:
    mitto.switches.dlr_before_answer = 1.0
    inbox.refusals = [500]
    answer = await api.bulk(message(1))
    await mitto.receipts_settled()
    assert inbox.told("messageId") == answer.ids


async def test_an_early_receipt_survives_a_client_that_leaves(
    api: Api, mitto: Simulator, inbox: Inbox
) -> None:
    mitto.switches.dlr_before_answer = 1.0
    may_answer, asked = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        asked.set()
        await may_answer.wait()

    inbox.before_answer = hold
    sending = asyncio.create_task(api.bulk(message(1), message(2)))
    await asked.wait()
    sending.cancel()
    await mitto.until(lambda: mitto.ledger.in_flight == 0)
    may_answer.set()
    await mitto.receipts_settled()
    assert set(inbox.told("messageId")) == {row.message_id for row in mitto.ledger.messages()}


async def test_receipts_are_posted_again_until_they_are_taken(
    api: Api, mitto: Simulator, inbox: Inbox
) -> None:
    inbox.refusals = [500, 0, 401, 302]
    answer = await api.bulk(message(1))
    await mitto.receipts_settled()
    assert inbox.told("messageId") == answer.ids
    assert (mitto.receipts.posts, mitto.receipts.failed_posts) == (5, 4)


async def test_a_webhook_that_is_away_gets_its_receipts_when_it_is_back(
    api: Api, mitto: Simulator
) -> None:
    async with inbox_server() as gone:
        port = int(gone.url.split(":")[2].split("/")[0])
    mitto.receipts.register(gone.url, {}, frozenset())
    mitto.switches.dlr_delay_seconds = (0, 0)
    answer = await api.bulk(*[message(number) for number in range(50)])
    await mitto.until(lambda: mitto.receipts.failed_posts >= POSTS_AT_ONCE)
    async with inbox_server(port) as back:
        await mitto.receipts_settled()
    assert sorted(back.told("messageId")) == answer.ids


async def test_no_more_posts_are_open_at_once_than_the_bound(
    api: Api, mitto: Simulator, inbox: Inbox
) -> None:
    full = asyncio.Event()

    async def wait_for_the_others() -> None:
        if inbox.open == POSTS_AT_ONCE:
            full.set()
        await full.wait()

    inbox.before_answer = wait_for_the_others
    await api.bulk(*[message(number) for number in range(100)])
    await mitto.receipts_settled()
    assert inbox.most_open == POSTS_AT_ONCE
    assert len(inbox.receipts) == 100


async def test_many_thousands_of_receipts_all_arrive_once(
    api: Api, mitto: Simulator, inbox: Inbox
) -> None:
    mitto.switches = Switches(dlr_batch=500, dlr_delay_seconds=(0, 0.3), dlr_intermediate=True)
    bulks = [[message(batch * 500 + place) for place in range(500)] for batch in range(20)]
    answers = await asyncio.gather(*[api.bulk(*bulk) for bulk in bulks])
    await mitto.receipts_settled()

    ids = sorted(str(one) for answer in answers for one in answer.ids)
    for word in ("Sent", "Delivered"):
        told = [one["messageId"] for one in inbox.receipts if one["deliveryStatus"] == word]
        assert sorted(told) == ids
    assert max(inbox.sizes) <= 500


async def test_without_a_webhook_there_is_nothing_to_settle(api: Api, mitto: Simulator) -> None:
    await api.bulk(message(1))
    await mitto.receipts_settled()
    assert mitto.ledger.final_receipts() == {"Delivered": 0, "Failure": 0, "none": 1}


async def test_webhooks_are_registered_with_headers_and_for_accounts(
    api: Api, mitto: Simulator, inbox: Inbox
) -> None:
    async with inbox_server() as own:
        registration = {
            "url": own.url,
            "triggers": ["MessageStatus"],
            "headers": {"X-Webhook-Secret": "of acc-2"},
            "trafficAccountIds": ["acc-2"],
        }
        answer = await api.ask("POST", WEBHOOKS_PATH, registration)
        assert answer.status == 201
        assert answer.json["trafficAccountIds"] == ["acc-2"]
        ids = (await api.bulk(message(1), message(2, account="acc-2"))).ids
        await mitto.receipts_settled()
    assert inbox.told("messageId") == ids[:1]
    assert own.told("messageId") == ids[1:]
    assert own.headers[0]["X-Webhook-Secret"] == "of acc-2"


async def test_a_webhook_registered_anew_gets_what_the_old_address_did_not_take(
    api: Api, mitto: Simulator
) -> None:
    async with inbox_server() as gone:
        pass
    mitto.switches.dlr_delay_seconds = (0, 0)
    await api.ask("POST", WEBHOOKS_PATH, {"url": gone.url})
    answer = await api.bulk(message(1))
    async with inbox_server() as inbox:
        await api.ask("POST", WEBHOOKS_PATH, {"url": inbox.url})
        await mitto.receipts_settled()
    assert inbox.told("messageId") == answer.ids


@pytest.mark.parametrize(
    "registration",
    [
        {},
        {"url": 5},
        {"url": "ftp://x"},
        {"url": "http://x", "headers": {"a": 1}},
        {"url": "http://x", "headers": []},
        {"url": "http://x", "trafficAccountIds": "acc-1"},
        {"url": "http://x", "triggers": [1]},
    ],
)
async def test_an_unfit_registration_is_400(api: Api, registration: Any) -> None:
    assert (await api.ask("POST", WEBHOOKS_PATH, registration)).status == 400


async def test_a_simulator_that_was_away_comes_back_with_ledger_and_receipts(
    api: Api, mitto: Simulator, inbox: Inbox
) -> None:
    inbox.refusals = [503] * 4
    answer = await api.bulk(message(1))
    url = mitto.url
    await mitto.stop()
    with pytest.raises(aiohttp.ClientConnectorError):
        await api.bulk(message(2))
    await mitto.start()

    assert mitto.url == url
    await mitto.receipts_settled()
    assert inbox.told("messageId") == answer.ids
    assert (await api.get(str(answer.ids[0]))).status == 200


# --- the control surface --------------------------------------------------------------------


async def test_switches_are_read_changed_and_replaced(api: Api, mitto: Simulator) -> None:
    changed = await api.control("PATCH", "switches", {"fail_500": 1.0, "only_accounts": ["a"]})
    assert (changed.status, changed.json["fail_500"]) == (200, 1.0)
    assert (mitto.switches.fail_500, mitto.switches.only_accounts) == (1.0, ("a",))

    await api.control("PATCH", "switches", {"dlr_delay_seconds": [1, 2]})
    shown = (await api.control("GET", "switches")).json
    assert shown.keys() == Switches.model_fields.keys()
    assert (shown["fail_500"], shown["dlr_delay_seconds"]) == (1.0, [1, 2])

    await api.control("PUT", "switches", {"dlr": False})
    assert mitto.switches == Switches(dlr=False)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"fail_600": 1.0}, "fail_600"),
        ({"fail_500": 1.5}, "fail_500"),
        ({"bad_item": "maybe"}, "bad_item"),
        ({"fail_500": 0.6, "fail_400": 0.6}, "add up to 1.2"),
        ([], "object"),
    ],
)
async def test_a_wrong_switch_is_400_and_named(
    api: Api, mitto: Simulator, given: Any, named: str
) -> None:
    for method in ("PUT", "PATCH"):
        answer = await api.control(method, "switches", given)
        assert answer.status == 400
        assert named in answer.json["message"]
    assert mitto.switches == Switches()


async def test_the_ledger_is_read_from_outside(api: Api, mitto: Simulator, inbox: Inbox) -> None:
    await api.bulk(message(1), message(2))
    await api.bulk(message(1), message(3, account="acc-2"))
    await api.bulk()
    await mitto.receipts_settled()

    figures = (await api.control("GET", "ledger")).json
    assert figures["accepted"] == 4
    assert figures["acceptedByAccount"] == {"acc-1": 3, "acc-2": 1}
    assert figures["requestsByAccount"] == {"acc-1": 2}
    assert figures["answers"] == {"200": 2, "400": 1}
    assert figures["inFlight"] == 0
    assert figures["finalReceipts"] == {"Delivered": 4, "Failure": 0, "none": 0}
    assert figures["receipts"] == {"outstanding": 0, "answered": 4, "posts": 4, "failedPosts": 0}

    duplicates = (await api.control("GET", "duplicates?key=destination")).json
    repeated = {"destination": "+306900000001", "text": None, "times": 2}
    assert duplicates == {"duplicates": [repeated], "total": 1}
    requests = (await api.control("GET", "requests")).json
    assert [row["status"] for row in requests["rows"]] == [200, 200, 400]
    worst = (await api.control("GET", "worst-second?account=acc-1&unit=messages")).json
    assert worst["worstSecond"] == mitto.ledger.worst_second("acc-1", "messages")
    most = (await api.control("GET", "max-in-flight?account=acc-1")).json
    assert most == {"account": "acc-1", "maxInFlight": 1}


async def test_accepted_messages_are_read_page_by_page(api: Api, mitto: Simulator) -> None:
    ids = (await api.bulk(*[message(number) for number in range(5)])).ids
    rows: list[Any] = []
    while True:
        page = (await api.control("GET", f"accepted?after={len(rows)}&limit=2")).json
        assert page["total"] == 5
        rows += page["rows"]
        assert page["next"] == len(rows)
        if not page["rows"]:
            break
    assert [row["messageId"] for row in rows] == ids
    assert [row["destination"] for row in rows] == [f"+3069{n:08d}" for n in range(5)]


async def test_one_can_wait_for_what_happens(api: Api, mitto: Simulator, inbox: Inbox) -> None:
    query = "wait?accepted=2&requests=2&receipts_settled=1&timeout=20"
    waiting = asyncio.create_task(api.control("GET", query))
    await api.bulk(message(1))
    await mitto.receipts_settled()
    assert not waiting.done()
    await api.bulk(message(2))
    assert (await waiting).json == {"reached": True}
    assert len(inbox.receipts) == 2

    late = await api.control("GET", "wait?in_flight=1&timeout=0")
    assert (late.status, late.json) == (200, {"reached": False})


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("accepted?after=-1", "after"),
        ("accepted?limit=x", "limit"),
        ("wait?timeout=1e3", "timeout"),
        ("worst-second?unit=bytes", "unit"),
        ("duplicates?key=text", "key"),
    ],
)
async def test_a_wrong_question_is_400_and_named(api: Api, query: str, named: str) -> None:
    answer = await api.control("GET", query)
    assert answer.status == 400
    assert named in answer.json["message"]


async def test_an_unknown_question_is_404_and_says_which_there_are(api: Api) -> None:
    answer = await api.control("GET", "weather")
    assert answer.status == 404
    assert "GET worst-second" in answer.json["message"]


async def test_a_reset_empties_the_ledger_and_forgets_receipts(
    api: Api, mitto: Simulator, inbox: Inbox
) -> None:
    mitto.switches.dlr_batch = 3
    inbox.refusals = [503] * 100
    await api.bulk(*[message(number) for number in range(50)])
    await mitto.until(lambda: mitto.ledger.accepted_count == 50)
    assert (await api.control("POST", "reset")).json == {"ok": True}
    assert (mitto.ledger.accepted_count, mitto.receipts.outstanding) == (0, 0)

    inbox.refusals = []
    inbox.receipts.clear()
    answer = await api.bulk(message(7))
    await mitto.receipts_settled()
    assert inbox.told("messageId") == answer.ids
    assert mitto.receipts.outstanding == 0


async def test_a_reset_while_a_request_is_open_leaves_a_sound_ledger(
    api: Api, mitto: Simulator
) -> None:
    mitto.switches.hang_before_accept = 1.0
    hung = asyncio.create_task(api.bulk(message(1)))
    await mitto.until(lambda: any(one.fault for one in mitto.ledger.requests))
    await mitto.reset()
    hung.cancel()
    mitto.switches.hang_before_accept = 0.0
    assert (await api.bulk(message(2))).status == 200
    assert mitto.ledger.in_flight == 0
    assert [request.number for request in mitto.ledger.requests] == [0]


# --- the process ----------------------------------------------------------------------------


async def test_the_process_says_where_it_listens_and_stops_on_a_signal(
    session: aiohttp.ClientSession,
) -> None:
    program = "import asyncio, smsd.simulator as s; asyncio.run(s.run('127.0.0.1', 0))"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    found = re.search(r"listens on (http://127\.0\.0\.1:\d+)", line)
    assert found is not None
    async with session.get(found[1] + "/_simulator/switches") as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGTERM)
    rest, _ = await process.communicate()
    assert (process.returncode, rest) == (0, b"")


async def test_it_stops_when_cancelled(capsys: pytest.CaptureFixture[str]) -> None:
    running = asyncio.create_task(run("127.0.0.1", 0))
    while not (line := capsys.readouterr().out):
        await asyncio.sleep(0)
    assert line.startswith("The Mitto simulator listens on http://127.0.0.1:")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def test_an_id_that_is_repeated_says_of_nothing_accepted_that_it_was_refused() -> None:
    refused: dict[str, Any] = {"error": "refused"}
    one, two = {"messageId": "1"}, {"messageId": "2"}
    dice = Random(1)
    assert bend([refused, one, two], Fault.REPEATED_ID_ANSWER, "3", dice) == [refused, one, one]
    assert bend([refused, one], Fault.REPEATED_ID_ANSWER, "3", dice) == [refused, one]
    assert bend([one, refused], Fault.REPEATED_ID_ANSWER, "3", dice) == [one, one]
    assert bend([refused, refused], Fault.REPEATED_ID_ANSWER, "3", dice) == [refused, refused]
