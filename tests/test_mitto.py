"""The room that knows the provider, against real servers on loopback that a test scripts."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smsd import mitto
from smsd.mitto import FetchOutcome, Item, Result
from smsd.model import MessageState, Outcome

KEY = "k3y-of-the-account"
ACCOUNT = mitto.Account(id=7, provider_id="TA-77", api_key=KEY, server_error_means="refused")
DISTRUSTED = mitto.Account(id=8, provider_id="TA-88", api_key=KEY, server_error_means="unknown")
ITEMS = [
    Item(message_id=101, phone=306900000001, text="Γεια σου Άννα", sender="Shop"),
    Item(message_id=102, phone=306900000002, text="Hello 🙂", sender="Shop"),
    Item(message_id=103, phone=491700000003, text="Hi", sender="4917000"),
]
ACCEPTED, REFUSED, UNKNOWN = MessageState.ACCEPTED, MessageState.REFUSED, MessageState.UNKNOWN


# --- a provider that a test scripts ----------------------------------------------------------
@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


Script = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Provider:
    """Hands every request that was read whole to `script`, and counts what came in."""

    script: Script
    url: str = ""
    connections: int = 0
    received: int = 0
    requests: list[Request] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        held = b""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                self.received += len(data)
                held += data
                request, held = parse_request(held)
                if request is not None:
                    self.requests.append(request)
                    await self.script(request, writer)
        writer.close()


def parse_request(data: bytes) -> tuple[Request | None, bytes]:
    head, separator, rest = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    length = int(headers.get("content-length", "0"))
    if not separator or len(rest) < length:
        return None, data
    method, path, _ = lines[0].split(" ")
    return Request(method, path, headers, rest[:length]), rest[length:]


@contextlib.asynccontextmanager
async def provider(script: Script) -> AsyncIterator[Provider]:
    state = Provider(script)
    server = await asyncio.start_server(state.handle, "127.0.0.1", 0)
    state.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield state
    finally:
        server.close()
        for writer in state.writers:
            writer.transport.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(tasks, timeout=2) if tasks else None


def http(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def answering(*answers: bytes) -> Script:
    """A script that gives the answers in turn, and the last one for ever."""
    left = list(answers)

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(left.pop(0) if len(left) > 1 else left[0])
        await writer.drain()

    return script


def accepting(request: Request, writer: asyncio.StreamWriter) -> Awaitable[None]:
    """A script that takes every message and numbers the ids by phone."""
    posted = orjson.loads(request.body)
    messages = [
        {"trafficAccountId": m["trafficAccountId"], "messageId": f"ID{m['destination']}"}
        for m in posted.get("messages", [posted])
    ]
    writer.write(http(200, orjson.dumps({"bulkId": "bulk-1", "messages": messages})))
    return writer.drain()


class Gate:
    """Opens, or says no with `reason`, and counts how often it was asked."""

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        self.asked = 0

    def __call__(self) -> None:
        self.asked += 1
        if self.reason is not None:
            raise mitto.Withdrawn(self.reason)


async def post(
    script: Script,
    count: int = 2,
    account: mitto.Account = ACCOUNT,
    timeout_seconds: float = 5.0,
) -> tuple[Result, Provider, Gate]:
    """One POST of `count` items to a provider with this script."""
    gate = Gate()
    async with provider(script) as there, mitto.Client(there.url, timeout_seconds) as client:
        result = await client.send(account, ITEMS[:count], gate)
    return result, there, gate


# --- requests --------------------------------------------------------------------------------
async def test_one_item_is_posted_alone_to_the_send_path() -> None:
    result, there, _ = await post(accepting, count=1)
    [request] = there.requests
    assert (request.method, request.path) == ("POST", "/api/v1.1/Messages/send")
    assert orjson.loads(request.body) == {
        "trafficAccountId": "TA-77",
        "destination": "+306900000001",
        "sms": {"text": "Γεια σου Άννα", "sender": "Shop"},
    }
    assert result.items == (mitto.ItemResult(101, ACCEPTED, "ID+306900000001", None),)


async def test_several_items_are_posted_as_one_bulk_in_their_order() -> None:
    result, there, gate = await post(accepting, count=3)
    [request] = there.requests
    assert (request.method, request.path) == ("POST", "/api/v1.1/Messages/sendmessagesbulk")
    assert request.headers["x-mitto-api-key"] == KEY
    assert request.headers["content-type"] == "application/json"
    messages = orjson.loads(request.body)["messages"]
    assert [m["destination"] for m in messages] == [f"+{item.phone}" for item in ITEMS]
    assert [m["sms"]["text"] for m in messages] == [item.text for item in ITEMS]
    assert [m["sms"]["sender"] for m in messages] == ["Shop", "Shop", "4917000"]
    assert {m["trafficAccountId"] for m in messages} == {"TA-77"}
    assert [item.message_id for item in result.items] == [101, 102, 103]
    assert result.bulk_id == "bulk-1"
    assert gate.asked == 1


async def test_an_empty_batch_is_not_posted() -> None:
    async with mitto.Client("http://127.0.0.1:1", 1.0) as client:
        with pytest.raises(ValueError, match="nothing to post"):
            await client.send(ACCOUNT, [], Gate())


async def test_a_base_url_with_a_path_and_a_slash_keeps_the_path() -> None:
    async with (
        provider(accepting) as there,
        mitto.Client(there.url + "/eu/", 5.0) as client,
    ):
        await client.send(ACCOUNT, ITEMS[:1], Gate())
    assert there.requests[0].path == "/eu/api/v1.1/Messages/send"


async def test_a_body_of_more_than_a_megabyte_goes_out_whole() -> None:
    items = [Item(n, 306900000000 + n, "ω" * 6000, "Shop") for n in range(100)]
    async with provider(accepting) as there, mitto.Client(there.url, 5.0) as client:
        result = await client.send(ACCOUNT, items, Gate())
    assert len(there.requests[0].body) > 2**20
    assert result.outcome is Outcome.ACCEPTED
    assert len(result.items) == 100


async def test_cookies_are_neither_kept_nor_sent() -> None:
    script = answering(http(200, b'{"messageId": "A"}', {"Set-Cookie": "session=1"}))
    async with (
        provider(script) as there,
        # By name: no jar of aiohttp's keeps the cookies of an address.
        mitto.Client(there.url.replace("127.0.0.1", "localhost"), 5.0) as client,
    ):
        await client.send(ACCOUNT, ITEMS[:1], Gate())
        await client.send(ACCOUNT, ITEMS[:1], Gate())
    assert [request.headers.get("cookie") for request in there.requests] == [None, None]


# --- the outcome table -----------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """An answer and what it must come to; `states` are those of the items, for ACCEPTED."""

    label: str
    status: int
    body: bytes
    outcome: Outcome
    headers: Mapping[str, str] = field(default_factory=dict)
    count: int = 2
    account: mitto.Account = ACCOUNT
    states: tuple[MessageState, ...] = ()
    expect: Mapping[str, Any] = field(default_factory=dict)


OWN = b'{"message": "No such sender"}'
OWN_ERROR = b'{"error": {"code": 12, "text": "database is away"}}'
HTML = b"<html><body>Bad gateway</body></html>"
NOW = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)


def http_date(seconds: float) -> str:
    return format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)


def bulk(*elements: object, **more: object) -> bytes:
    return orjson.dumps({"bulkId": "bulk-9", "messages": elements, **more})


def message(number: object, **more: object) -> dict[str, object]:
    return {"trafficAccountId": "TA-77", "messageId": number, **more}


CASES = [
    # 2xx, item by item
    Case(
        "ids for all",
        200,
        bulk(message("A"), message("B")),
        Outcome.ACCEPTED,
        states=(ACCEPTED, ACCEPTED),
        expect={"bulk_id": "bulk-9", "detail": "", "refusal_hash": None},
    ),
    Case("201", 201, bulk(message("A"), message("B")), Outcome.ACCEPTED, states=(ACCEPTED,) * 2),
    Case(
        "202 without a bulk id",
        202,
        b'{"messages": [{"messageId": "A"}, {"messageId": "B"}]}',
        Outcome.ACCEPTED,
        states=(ACCEPTED,) * 2,
        expect={"bulk_id": None},
    ),
    Case(
        "an id beside an error",
        200,
        bulk(message("A", error="late"), message("B")),
        Outcome.ACCEPTED,
        states=(ACCEPTED, ACCEPTED),
    ),
    Case(
        "an error without id",
        200,
        bulk(message("A"), {"error": "bad number"}),
        Outcome.ACCEPTED,
        states=(ACCEPTED, REFUSED),
    ),
    Case(
        "an error object",
        200,
        bulk({"error": {"code": 3}}, message("B")),
        Outcome.ACCEPTED,
        states=(REFUSED, ACCEPTED),
    ),
    Case(
        "neither id nor error",
        200,
        bulk(message("A"), {"trafficAccountId": "TA-77", "error": None}),
        Outcome.ACCEPTED,
        states=(ACCEPTED, UNKNOWN),
    ),
    Case(
        "elements that are no objects",
        200,
        bulk(None, "B", 3),
        Outcome.ACCEPTED,
        count=3,
        states=(UNKNOWN,) * 3,
    ),
    Case(
        "an id twice",
        200,
        bulk(message("A"), message("B"), message("A")),
        Outcome.ACCEPTED,
        count=3,
        states=(UNKNOWN, ACCEPTED, UNKNOWN),
    ),
    Case(
        "ids that are none",
        200,
        bulk(message(""), message("  "), message("x" * 65)),
        Outcome.ACCEPTED,
        count=3,
        states=(UNKNOWN,) * 3,
    ),
    Case(
        "ids of other types",
        200,
        bulk(message(12), message(None), message(["A"])),
        Outcome.ACCEPTED,
        count=3,
        states=(UNKNOWN,) * 3,
    ),
    Case(
        "an id that Postgres cannot hold",
        200,
        bulk(message("A\x00"), message("x" * 64)),
        Outcome.ACCEPTED,
        states=(UNKNOWN, ACCEPTED),
    ),
    Case(
        "other spellings of the keys",
        200,
        b'{"Messages": [{"MessageId": "A"}, {"id": "B"}], "BulkId": "b"}',
        Outcome.ACCEPTED,
        states=(ACCEPTED,) * 2,
        expect={"bulk_id": "b"},
    ),
    Case("one too few", 200, bulk(message("A")), Outcome.UNKNOWN, expect={"bulk_id": None}),
    Case("one too many", 200, bulk(message("A"), message("B"), message("C")), Outcome.UNKNOWN),
    Case("fields at top level for two", 200, b'{"messageId": "A"}', Outcome.UNKNOWN),
    Case("an array", 200, b'[{"messageId": "A"}, {"messageId": "B"}]', Outcome.UNKNOWN),
    Case("messages that are no list", 200, b'{"messages": {"0": "A", "1": "B"}}', Outcome.UNKNOWN),
    Case("200 without a body", 200, b"", Outcome.UNKNOWN),
    Case("204", 204, b"", Outcome.UNKNOWN),
    Case("200 with HTML", 200, HTML, Outcome.UNKNOWN),
    Case("JSON cut off", 200, bulk(message("A"), message("B"))[:-3], Outcome.UNKNOWN),
    Case("NaN", 200, b'{"messages": [NaN, NaN]}', Outcome.UNKNOWN),
    Case("nested too deep", 200, b"[" * 100_000, Outcome.UNKNOWN),
    Case("not UTF-8", 200, b'{"messages": ["\xff", "\xfe"]}', Outcome.UNKNOWN),
    # one message: two shapes
    Case("one, in a list", 200, bulk(message("A")), Outcome.ACCEPTED, count=1, states=(ACCEPTED,)),
    Case(
        "one, at top level",
        200,
        b'{"messageId": "A", "trafficAccountId": "TA-77"}',
        Outcome.ACCEPTED,
        count=1,
        states=(ACCEPTED,),
    ),
    Case("one, an error", 200, b'{"error": "no"}', Outcome.ACCEPTED, count=1, states=(REFUSED,)),
    Case("one, an empty list", 200, b'{"messages": []}', Outcome.UNKNOWN, count=1),
    Case("one, an empty object", 200, b"{}", Outcome.UNKNOWN, count=1),
    Case("one, null", 200, b"null", Outcome.UNKNOWN, count=1),
    # throttled
    Case("429", 429, b"", Outcome.THROTTLED, expect={"retry_after_seconds": None}),
    Case(
        "429 in seconds",
        429,
        OWN,
        Outcome.THROTTLED,
        {"Retry-After": "17"},
        expect={"retry_after_seconds": 17.0},
    ),
    Case(
        "429 for longer than we wait",
        429,
        b"",
        Outcome.THROTTLED,
        {"Retry-After": "86400"},
        expect={"retry_after_seconds": 600.0},
    ),
    Case(
        "429 until a date",
        429,
        b"",
        Outcome.THROTTLED,
        {"Retry-After": http_date(42), "Date": http_date(0)},
        expect={"retry_after_seconds": 42.0},
    ),
    Case(
        "429 until a date that is past",
        429,
        b"",
        Outcome.THROTTLED,
        {"Retry-After": http_date(-9), "Date": http_date(0)},
        expect={"retry_after_seconds": 0.0},
    ),
    Case(
        "429 until something",
        429,
        b"",
        Outcome.THROTTLED,
        {"Retry-After": "inf"},
        expect={"retry_after_seconds": None},
    ),
    Case(
        "503 with Retry-After",
        503,
        HTML,
        Outcome.THROTTLED,
        {"Retry-After": "3"},
        expect={"retry_after_seconds": 3.0},
    ),
    Case("503 with both", 503, OWN, Outcome.THROTTLED, {"Retry-After": "3"}),
    # server errors
    Case("500 with Mitto's body", 500, OWN, Outcome.RETRY, expect={"detail": OWN.decode()}),
    Case("503 with Mitto's body", 503, OWN_ERROR, Outcome.RETRY),
    Case("500, an account that takes it as unknown", 500, OWN, Outcome.UNKNOWN, account=DISTRUSTED),
    Case("500 of a proxy", 500, HTML, Outcome.UNKNOWN),
    Case("500 without a body", 500, b"", Outcome.UNKNOWN),
    Case("500 with an empty message", 500, b'{"message": ""}', Outcome.UNKNOWN),
    Case("500 with an array", 500, b'[{"message": "no"}]', Outcome.UNKNOWN),
    Case("500 with an id", 500, b'{"message": "no", "messageId": "A"}', Outcome.UNKNOWN),
    Case("503 without a body", 503, b"", Outcome.UNKNOWN),
    Case(
        "503 with a Retry-After that says nothing", 503, b"", Outcome.UNKNOWN, {"Retry-After": ""}
    ),
    Case("502", 502, OWN, Outcome.UNKNOWN),
    Case("504", 504, OWN, Outcome.UNKNOWN),
    Case("501", 501, OWN, Outcome.UNKNOWN),
    # refused
    Case("400", 400, OWN, Outcome.REFUSED),
    Case("404", 404, HTML, Outcome.REFUSED),
    Case("422", 422, b"", Outcome.REFUSED),
    Case("402", 402, OWN, Outcome.REFUSED),
    Case("a 400 with an id of its own", 400, b'{"id": "err-1", "message": "x"}', Outcome.REFUSED),
    Case("a 400 with a null id", 400, b'{"messageId": null, "message": "x"}', Outcome.REFUSED),
    Case("a 400 with an id", 400, bulk(message("A"), {"error": "x"}), Outcome.UNKNOWN),
    Case("a 400 with short ids", 400, b'{"messages": [{"id": "A"}]}', Outcome.UNKNOWN),
    Case("a 400 with an id deep down", 400, b'{"a": [{"MessageID" : "A"}]}', Outcome.UNKNOWN),
    Case("a 400 with an id and cut off", 400, b'{"messages": [{"messageId": "A"', Outcome.UNKNOWN),
    Case(
        "a 400 with an id in a string", 400, b'{"e": "{\\"messageId\\": \\"A\\"}"}', Outcome.UNKNOWN
    ),
    Case("a 429 with an id", 429, bulk(message("A")), Outcome.UNKNOWN),
    Case("413", 413, HTML, Outcome.TOO_LARGE, expect={"refusal_hash": None}),
    Case("401", 401, OWN, Outcome.ACCOUNT_BROKEN),
    Case("403", 403, OWN, Outcome.LANE_BROKEN),
    Case("408", 408, OWN, Outcome.UNKNOWN),
    Case("409", 409, OWN, Outcome.UNKNOWN),
    Case("425", 425, OWN, Outcome.UNKNOWN),
    # elsewhere, or nowhere
    *(
        Case(
            str(status),
            status,
            b"",
            Outcome.MISDIRECTED,
            {"Location": "https://elsewhere.example/login"},
            expect={"detail": "redirected to https://elsewhere.example/login"},
        )
        for status in (301, 302, 303, 307, 308)
    ),
    Case("300 without a target", 300, b"", Outcome.MISDIRECTED),
    Case("304", 304, b"", Outcome.MISDIRECTED),
    Case("101", 101, b"", Outcome.UNKNOWN, {"Connection": "upgrade", "Upgrade": "echo"}),
    Case("600", 600, OWN, Outcome.UNKNOWN),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
async def test_an_answer_comes_to_its_row_of_the_outcome_table(case: Case) -> None:
    script = answering(http(case.status, case.body, case.headers))
    result, there, gate = await post(script, case.count, case.account, timeout_seconds=2.0)
    assert result.outcome is case.outcome
    assert tuple(item.state for item in result.items) == case.states
    assert {name: getattr(result, name) for name in case.expect} == dict(case.expect)
    assert result.status in (case.status, None)
    assert (result.refusal_hash is not None) == (case.outcome is Outcome.REFUSED)
    assert len(there.requests) == 1
    assert gate.asked == 1
    assert result.left_at is not None
    for item in result.items:
        assert (item.provider_id is not None) == (item.state is ACCEPTED)


async def test_what_an_item_was_refused_for_is_told_redacted_and_in_short() -> None:
    error = f"+306900000002 is blocked, key {KEY} " + "x" * 400
    result, _, _ = await post(answering(http(200, bulk(message("A"), {"error": error}))))
    detail = result.items[1].detail
    assert detail is not None
    assert detail.startswith("***02 is blocked, key *** xxx")
    assert len(detail) == 300


async def test_no_secret_stands_in_the_detail() -> None:
    said = {
        "message": f"bad key {KEY} for +306900000001 or 00306900000002\n\x00",
        "header": "Authorization: Bearer abc.def-123",
        "apiKey": "another-secret",
    }
    result, _, _ = await post(answering(http(401, orjson.dumps(said))))
    for secret in (KEY, "30690000000", "abc.def", "another-secret", "\n", "\x00"):
        assert secret not in result.detail
    assert "bad key *** for ***01 or ***02" in result.detail


async def test_a_long_body_is_cut_in_the_detail() -> None:
    result, _, _ = await post(answering(http(422, b"y" * 100_000)))
    assert result.detail == "y" * 500


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (OWN, OWN, True),
        (HTML, HTML, True),
        (OWN, b'{"message": "Text too long"}', False),
        (b"plain one", b"plain other", False),
        (b'{"message": "x", "field": "a"}', b'{"field": "a", "message": "x"}', True),
        (b'{"message": "x", "errors": [1]}', b'{"message": "x", "errors": [2]}', False),
        (b'{"title": "x", "traceId": "00-1"}', b'{"title": "x", "traceId": "00-2"}', True),
    ],
)
def test_equal_complaints_have_equal_hashes(one: bytes, other: bytes, same: bool) -> None:
    first, second = (mitto.classify(400, {}, body, ITEMS, ACCOUNT) for body in (one, other))
    assert first.refusal_hash
    assert (first.refusal_hash == second.refusal_hash) is same


async def test_the_skew_of_the_providers_clock_is_told() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    result, _, _ = await post(
        answering(http(200, bulk(message("A"), message("B")), {"Date": date}))
    )
    assert result.date_skew_seconds is not None
    assert 88 < result.date_skew_seconds <= 90


async def test_a_date_that_cannot_be_read_is_no_skew() -> None:
    result, _, _ = await post(answering(http(429, b"", {"Date": "yesterday", "Retry-After": "?"})))
    assert result.date_skew_seconds is None


async def test_the_times_enclose_the_exchange() -> None:
    before = mitto.clock()
    result, _, _ = await post(accepting)
    assert result.left_at is not None
    assert result.answered_at is not None
    assert before < result.left_at < result.answered_at < mitto.clock()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["messages", "messageId", "id", "error", "message", "MessageID"])
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    status=st.integers(100, 599),
    body=st.binary(max_size=60) | json_values.map(orjson.dumps),
    headers=st.dictionaries(st.sampled_from(["Date", "Retry-After", "Location"]), st.text()),
    count=st.integers(1, 3),
)
def test_no_answer_is_taken_for_safe_to_repeat_while_it_names_an_id(
    status: int, body: bytes, headers: dict[str, str], count: int
) -> None:
    result = mitto.classify(status, headers, body, ITEMS[:count], ACCOUNT)
    if result.outcome is Outcome.ACCEPTED:
        assert 200 <= status <= 299
        assert len(result.items) == count
        ids = [item.provider_id for item in result.items if item.provider_id]
        assert len(set(ids)) == len(ids)
    elif result.outcome is not Outcome.UNKNOWN:
        assert not names_an_id(body)
    assert len(result.detail) <= 500


def names_an_id(body: bytes) -> bool:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    waiting = [found]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            given = (v for name, v in value.items() if name.lower() == "messageid")
            if any(isinstance(v, str) and v.isalnum() for v in given):
                return True
            waiting += value.values()
    return False


# --- what the network does -------------------------------------------------------------------
async def never_left(url: str, timeout_seconds: float = 2.0) -> Result:
    gate = Gate()
    async with mitto.Client(url, timeout_seconds) as client:
        result = await client.send(ACCOUNT, ITEMS, gate)
    assert result.outcome is Outcome.NEVER_LEFT
    assert (result.status, result.left_at, result.answered_at) == (None, None, None)
    assert gate.asked == 0
    return result


async def test_a_refused_connection_never_left() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        result = await never_left(f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert "ClientConnectorError" in result.detail


async def test_a_name_that_does_not_resolve_never_left() -> None:
    await never_left("http://mitto.invalid")


async def test_a_failed_tls_handshake_never_left() -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 This is not TLS\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        result = await never_left(f"https://127.0.0.1:{port}")
    assert "SSL" in result.detail


@pytest.mark.parametrize(("timeout_seconds", "connect_seconds"), [(0.2, 5.0), (5.0, 0.2)])
async def test_a_connection_that_does_not_come_up_in_time_never_left(
    timeout_seconds: float, connect_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mitto, "CONNECT_SECONDS", connect_seconds)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):  # more than the backlog holds: the next handshake gets no answer
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        started = mitto.clock()
        await never_left(f"http://127.0.0.1:{server.getsockname()[1]}", timeout_seconds)
        assert mitto.clock() - started < 1.0


async def test_a_key_that_is_no_header_never_left() -> None:
    account = mitto.Account(1, "TA-77", "key\n", "refused")
    async with provider(accepting) as there, mitto.Client(there.url, 5.0) as client:
        result = await client.send(account, ITEMS, Gate())
    assert (result.outcome, result.left_at) == (Outcome.NEVER_LEFT, None)
    assert there.received == 0


def cut_off(answer: bytes = b"") -> Script:
    """Says `answer` and closes; resets instead where there is nothing to say."""

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        if answer:
            writer.write(answer)
            await writer.drain()
            writer.close()
        else:
            writer.transport.abort()

    return script


async def hang(request: Request, writer: asyncio.StreamWriter) -> None:
    """Reads on and never answers."""


async def drip(request: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.02)  # the drip itself, not a wait


async def huge(request: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(http(200, b" " * (mitto.ANSWER_BYTES_MAX + 1)))
    await writer.drain()


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        pytest.param(cut_off(), None, "Error", id="reset after the request"),
        pytest.param(cut_off(b"HT"), None, "Error", id="closed in the status line"),
        pytest.param(cut_off(http(200, b"{}" * 99)[:-1]), 200, "Error", id="half an answer"),
        pytest.param(cut_off(http(429, b"{}" * 99)[:-1]), 429, "Error", id="half a refusal"),
        pytest.param(answering(b"220 smtp\r\n\r\n"), None, "Error", id="not HTTP"),
        pytest.param(hang, None, "no answer within 0.3 s", id="no answer in time"),
        pytest.param(drip, 200, "no answer within 0.3 s", id="an answer that drips"),
        pytest.param(huge, 200, "larger than", id="an answer without end"),
    ],
)
async def test_what_breaks_after_the_first_byte_is_unknown(
    script: Script, status: int | None, said: str
) -> None:
    timeout_seconds = 0.3 if "no answer" in said else 5.0
    started = mitto.clock()
    result, there, gate = await post(script, timeout_seconds=timeout_seconds)
    assert mitto.clock() - started < 2.0
    assert (result.outcome, result.status) == (Outcome.UNKNOWN, status)
    assert said in result.detail
    assert result.left_at is not None
    assert result.answered_at is None
    assert (len(there.requests), gate.asked) == (1, 1)


async def test_a_connection_closed_before_the_request_is_read_is_unknown() -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.transport.abort()

    server = await asyncio.start_server(deaf, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with mitto.Client(url, 5.0) as client:
            result = await client.send(ACCOUNT, ITEMS, Gate())
    assert result.outcome is Outcome.UNKNOWN
    assert result.left_at is not None


async def test_a_body_that_the_connection_does_not_take_is_watched_all_the_while() -> None:
    """Larger than every buffer on the way: the write waits for a provider that does not read."""
    unseen, over = asyncio.Event(), asyncio.Event()

    async def deaf(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.transport.abort()

    taps = socket.create_server(("127.0.0.1", 0))
    taps.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    server = await asyncio.start_server(deaf, sock=taps, limit=1024)
    items = [ITEMS[0]._replace(text="x" * 20_000)] * 500
    async with server, mitto.Client(f"http://127.0.0.1:{taps.getsockname()[1]}", 10) as client:
        posting = asyncio.create_task(client.send(ACCOUNT, items, Gate(), on_unseen=unseen.set))
        async with asyncio.timeout(5):
            await unseen.wait()
        assert not posting.done()
        over.set()
        assert (await posting).outcome is Outcome.UNKNOWN


async def test_a_cancelled_post_stays_cancelled_and_closes_its_connection() -> None:
    arrived, gone = asyncio.Event(), asyncio.Event()

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        arrived.set()

    async with provider(script) as there, mitto.Client(there.url, 5.0) as client:
        posting = asyncio.create_task(client.send(ACCOUNT, ITEMS, Gate()))
        await arrived.wait()
        posting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await posting
        async with asyncio.timeout(2):
            await there.writers[0].wait_closed()
            gone.set()
    assert gone.is_set()


# --- connections that are used again ---------------------------------------------------------
async def settled(there: Provider) -> None:
    """Returns once the client has read whatever the provider wrote until now.

    An exchange on a connection of our own: the loop that brings its answer has by then brought
    what was in the client's sockets before it.
    """
    host, port = there.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /settled HTTP/1.1\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()


async def test_a_connection_is_used_again() -> None:
    async with provider(accepting) as there, mitto.Client(there.url, 5.0) as client:
        for _ in range(3):
            await client.send(ACCOUNT, ITEMS, Gate())
    assert (there.connections, len(there.requests)) == (1, 3)


async def test_a_connection_closed_while_idle_is_not_used_again() -> None:
    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        if request.method == "GET":
            writer.write(http(200))
            return
        await accepting(request, writer)
        writer.close()

    async with provider(script) as there, mitto.Client(there.url, 5.0) as client:
        await client.send(ACCOUNT, ITEMS, Gate())
        await settled(there)
        result = await client.send(ACCOUNT, ITEMS, Gate())
    assert result.outcome is Outcome.ACCEPTED
    assert [request.method for request in there.requests] == ["POST", "GET", "POST"]


async def test_a_connection_closed_under_the_second_post_is_unknown_and_not_posted_again() -> None:
    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        if len(there.requests) == 1:
            await accepting(request, writer)
        else:
            writer.close()

    async with provider(script) as there, mitto.Client(there.url, 5.0) as client:
        first = await client.send(ACCOUNT, ITEMS, Gate())
        second = await client.send(ACCOUNT, ITEMS, Gate())
    assert (first.outcome, second.outcome) == (Outcome.ACCEPTED, Outcome.UNKNOWN)
    assert (there.connections, len(there.requests)) == (1, 2)


@contextlib.contextmanager
def in_a_thread(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server for one connection that goes on while the event loop is held up; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                serve(connection)

        thread = threading.Thread(target=run)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def take_one(connection: socket.socket) -> None:
    data, request = b"", None
    while request is None:
        data += connection.recv(65536)
        request, _ = parse_request(data)
    connection.sendall(http(200, b'{"messageId": "A"}'))


async def test_a_hang_up_that_the_loop_has_not_read_yet_never_left() -> None:
    hang_up, gone = threading.Event(), threading.Event()

    def serve(connection: socket.socket) -> None:
        take_one(connection)
        hang_up.wait(5)
        connection.close()
        gone.set()

    gate = Gate()
    with in_a_thread(serve) as url:
        async with mitto.Client(url, 2.0) as client:
            first = await client.send(ACCOUNT, ITEMS[:1], gate)
            hang_up.set()
            assert gone.wait(5)  # on purpose without letting the loop run
            second = await client.send(ACCOUNT, ITEMS[:1], gate)
    assert first.outcome is Outcome.ACCEPTED
    assert (second.outcome, second.left_at) == (Outcome.NEVER_LEFT, None)
    assert gate.asked == 1


async def test_an_answer_that_nobody_asked_for_is_not_taken_for_the_next_one() -> None:
    stray = http(200, b'{"messageId": "STRAY"}')
    async with provider(accepting) as there, mitto.Client(there.url, 5.0) as client:
        await client.send(ACCOUNT, ITEMS[:1], Gate())
        there.script = answering(http(200, b'{"messageId": "REAL"}'))
        there.writers[0].write(stray)
        await settled(there)
        gate = Gate()
        second = await client.send(ACCOUNT, ITEMS[:1], gate)
        third = await client.send(ACCOUNT, ITEMS[:1], gate)
    assert (second.outcome, second.left_at) == (Outcome.NEVER_LEFT, None)
    assert [item.provider_id for item in third.items] == ["REAL"]
    assert gate.asked == 1


async def test_a_fetch_goes_to_another_connection_when_its_own_has_gone_stale() -> None:
    script = answering(http(200, b'{"messageId": "01JABC"}'))
    async with provider(script) as there, mitto.Client(there.url, 5.0) as client:
        await client.send(ACCOUNT, ITEMS[:1], Gate())
        there.writers[0].write(http(404))
        await settled(there)
        fetched = await client.fetch(ACCOUNT, "01JABC")
    assert fetched.found


async def test_a_question_leaves_once_though_its_connection_is_closed_under_it() -> None:
    async def hanging_up(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with provider(accepting) as there, mitto.Client(there.url, 5.0) as client:
        await client.send(ACCOUNT, ITEMS[:1], Gate())
        there.script = hanging_up
        fetched = await client.fetch(ACCOUNT, "01JABC")
    assert fetched.outcome is FetchOutcome.FAILED
    assert fetched.arrived_by is not None
    assert [request.method for request in there.requests] == ["POST", "GET"]


async def test_a_question_that_missed_its_slot_does_not_leave() -> None:
    async with provider(accepting) as there, mitto.Client(there.url, 5.0) as client:
        with pytest.raises(mitto.Withdrawn):
            await client.fetch(ACCOUNT, "01JABC", Gate("slot is over"))
    assert not there.requests


# --- the gate --------------------------------------------------------------------------------
async def test_no_byte_leaves_when_the_gate_is_shut() -> None:
    async with provider(accepting) as there, mitto.Client(there.url, 5.0) as client:
        with pytest.raises(mitto.Withdrawn) as raised:
            await client.send(ACCOUNT, ITEMS, Gate("slot is over"))
        withdrawn_bytes = there.received
        await client.send(ACCOUNT, ITEMS, Gate())
    assert raised.value.reason == "slot is over"
    assert withdrawn_bytes == 0
    assert len(there.requests) == 1


async def test_a_withdrawn_post_gives_its_connection_back() -> None:
    gate = Gate("late")
    async with provider(accepting) as there, mitto.Client(there.url, 5.0) as client:
        for _ in range(3):
            with pytest.raises(mitto.Withdrawn):
                await client.send(ACCOUNT, ITEMS, gate)
        await client.send(ACCOUNT, ITEMS, Gate())
        with pytest.raises(mitto.Withdrawn):
            await client.send(ACCOUNT, ITEMS, gate)
        await client.send(ACCOUNT, ITEMS, Gate())
    assert (there.connections, gate.asked) == (1, 4)
    assert there.received == sum(map(wire_length, there.requests))


def wire_length(request: Request) -> int:
    head = [f"{request.method} {request.path} HTTP/1.1"]
    head += [f"{name}: {value}" for name, value in request.headers.items()]
    return len("\r\n".join(head)) + 4 + len(request.body)


async def test_an_aiohttp_that_would_not_ask_the_gate_early_still_has_to_pass_it() -> None:
    async with provider(answering(http(200))) as there, aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectionError, match="late"):
            await session.post(there.url, data=mitto._Body(b"{}", Gate("late")))
        async with session.post(there.url, data=mitto._Body(b"{}", Gate())):
            pass
    assert [request.body for request in there.requests] == [b"{}"]
    assert there.received == wire_length(there.requests[0])


async def test_a_gate_that_breaks_withholds_the_post_too() -> None:
    def gate() -> None:
        raise OSError("clock is gone")

    async with provider(accepting) as there, mitto.Client(there.url, 5.0) as client:
        with pytest.raises(OSError, match="clock is gone"):
            await client.send(ACCOUNT, ITEMS, gate)
        await client.send(ACCOUNT, ITEMS, Gate())
    assert (there.connections, len(there.requests)) == (1, 1)


async def test_the_gate_is_asked_with_the_connection_up_and_nothing_on_it() -> None:
    looked = threading.Event()
    early: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            early.append(connection.recv(1, socket.MSG_DONTWAIT))
        looked.set()
        take_one(connection)

    def gate() -> None:
        assert looked.wait(5)

    with in_a_thread(serve) as url:
        async with mitto.Client(url, 5.0) as client:
            result = await client.send(ACCOUNT, ITEMS[:1], gate)
    assert result.outcome is Outcome.ACCEPTED
    assert early == []


# --- one message by its id -------------------------------------------------------------------
MESSAGE = {
    "messageId": "01JABC",
    "text": "Γεια",
    "sender": "Shop",
    "conversation": {"id": "c1", "participants": ["+306900000001", "Shop"]},
    "createdAt": "2026-11-20T12:00:00.1234567Z",
    "updatedAt": "2026-11-20T12:00:09Z",
    "trafficAccountId": "TA-77",
    "deliveryStatus": "Delivered",
    "description": None,
    "messageParts": 1,
    "reference": "ours-101",
}


async def fetch(answer: bytes, provider_id: str = "01JABC") -> tuple[mitto.Fetched, Provider]:
    async with provider(answering(answer)) as there, mitto.Client(there.url, 2.0) as client:
        return await client.fetch(ACCOUNT, provider_id), there


async def test_a_message_is_fetched_by_its_id() -> None:
    fetched, there = await fetch(http(200, orjson.dumps(MESSAGE), {"Date": http_date(0)}))
    [request] = there.requests
    assert (request.method, request.path) == ("GET", "/api/v1.1/Messages/01JABC")
    assert request.headers["x-mitto-api-key"] == KEY
    assert fetched.date_skew_seconds is not None
    assert fetched == mitto.Fetched(
        outcome=FetchOutcome.FOUND,
        status=200,
        date_skew_seconds=fetched.date_skew_seconds,
        provider_id="01JABC",
        traffic_account_id="TA-77",
        word="Delivered",
        state=MessageState.DELIVERED,
        destination=306900000001,
        sender="Shop",
        text="Γεια",
        created_at=datetime(2026, 11, 20, 12, 0, 0, 123456, tzinfo=UTC),
        reference="ours-101",
        arrived_by=fetched.arrived_by,
    )
    assert fetched.found
    assert fetched.arrived_by is not None
    assert fetched.arrived_by <= mitto.clock()


async def test_text_and_sender_may_stand_in_the_request_info() -> None:
    info = {"messageId": "01JABC", "requestInfo": {"sms": {"sender": "Shop", "text": "Hi"}}}
    fetched, _ = await fetch(http(200, orjson.dumps(info)))
    assert (fetched.sender, fetched.text, fetched.word) == ("Shop", "Hi", "")
    assert (fetched.state, fetched.destination, fetched.created_at) == (None, None, None)


@pytest.mark.parametrize(
    ("more", "destination"),
    [
        ({"destination": "+491700000003"}, 491700000003),
        ({"conversation": {"participants": ["00306900000001"]}}, 306900000001),
        (
            {"conversation": {"participants": ["306900000001", "4917000"]}, "sender": "+4917000"},
            306900000001,
        ),
        ({"conversation": {"participants": ["+306900000001", "+306900000002"]}}, None),
        ({"conversation": {"participants": [{"a": 1}, None]}}, None),
        ({"conversation": "none"}, None),
    ],
)
async def test_a_destination_is_told_if_only_one_can_be_meant(
    more: dict[str, object], destination: int | None
) -> None:
    told = {name: v for name, v in MESSAGE.items() if name != "conversation"} | more
    fetched, _ = await fetch(http(200, orjson.dumps(told)))
    assert fetched.destination == destination


@pytest.mark.parametrize(
    ("answer", "outcome", "retry_after_seconds"),
    [
        (http(404, OWN), FetchOutcome.NOT_FOUND, None),
        (http(429, OWN), FetchOutcome.THROTTLED, None),
        (http(429, OWN, {"Retry-After": "7"}), FetchOutcome.THROTTLED, 7.0),
        (http(503, HTML, {"Retry-After": "7"}), FetchOutcome.THROTTLED, 7.0),
        (http(503, HTML), FetchOutcome.FAILED, None),
        (http(401, OWN), FetchOutcome.FAILED, None),
        (http(302, b"", {"Location": "/login"}), FetchOutcome.FAILED, None),
        (http(200, HTML), FetchOutcome.FAILED, None),
        (http(200, b"[]"), FetchOutcome.FAILED, None),
        (http(200, orjson.dumps(MESSAGE | {"messageId": "01JXYZ"})), FetchOutcome.FAILED, None),
        (http(200, orjson.dumps(MESSAGE))[:-9], FetchOutcome.FAILED, None),
    ],
)
async def test_what_is_no_message_is_not_found_throttled_or_failed(
    answer: bytes, outcome: FetchOutcome, retry_after_seconds: float | None
) -> None:
    async with provider(answering(answer)) as there, mitto.Client(there.url, 1.5) as client:
        fetched = await client.fetch(ACCOUNT, "01JABC")
    assert (fetched.outcome, fetched.found) == (outcome, False)
    assert fetched.retry_after_seconds == retry_after_seconds
    assert len(there.requests) == 1


async def test_a_fetch_without_an_answer_has_failed() -> None:
    async with mitto.Client("http://127.0.0.1:1", 2.0) as client:
        fetched = await client.fetch(ACCOUNT, "01JABC")
    assert (fetched.outcome, fetched.status) == (FetchOutcome.FAILED, None)
    assert "ClientConnectorError" in fetched.detail


async def test_an_id_cannot_lead_a_fetch_to_another_path() -> None:
    _, there = await fetch(http(404), provider_id="a/../../Webhooks?x=1#y")
    assert there.requests[0].path == "/api/v1.1/Messages/a%2F..%2F..%2FWebhooks%3Fx=1%23y"


# --- receipts --------------------------------------------------------------------------------
WORDS = {
    MessageState.DELIVERED: ["Delivered", "DELIVRD", "completed", "ok", "Read", " delivered "],
    MessageState.DELIVERY_FAILED: [
        *["Failure", "failed", "Undelivered", "UNDELIV", "expired"],
        *["rejected", "REJECTD", "deleted", "error"],
    ],
    MessageState.ENROUTE: [
        *["Queued", "Sent", "Pending", "accepted", "submitted", "ENROUTE", "buffered"]
    ],
    None: ["Scrubbed", "", "deliveredd", "7"],
}


@pytest.mark.parametrize(
    ("word", "state"), [(word, state) for state, words in WORDS.items() for word in words]
)
def test_a_word_means_a_state_in_any_case(word: str, state: MessageState | None) -> None:
    body = orjson.dumps({"messageId": "A", "deliveryStatus": word})
    [receipt] = mitto.parse_dlr(body).receipts
    assert (receipt.state, receipt.word) == (state, word)
    assert mitto.state_of(word.upper()) is state


@pytest.mark.parametrize("id_name", ["messageId", "id", "MessageId", "MESSAGEID"])
@pytest.mark.parametrize(
    "word_name", ["deliveryStatus", "status", "Status", "delivery_status", "DeliveryStatus"]
)
@pytest.mark.parametrize(
    ("time_name", "reason_name"),
    [
        ("updatedAt", "description"),
        ("doneAt", "error"),
        ("timestamp", "Error"),
        ("Timestamp", "errorMessage"),
        ("createdAt", "Description"),
    ],
)
def test_every_spelling_of_the_keys_is_read(
    id_name: str, word_name: str, time_name: str, reason_name: str
) -> None:
    element = {id_name: "A1", word_name: "Failure", time_name: 1795176000, reason_name: "absent"}
    assert mitto.parse_dlr(orjson.dumps(element)) == mitto.Dlr(
        [
            mitto.Receipt(
                "A1",
                MessageState.DELIVERY_FAILED,
                "Failure",
                datetime(2026, 11, 20, 12, tzinfo=UTC),
                "absent",
            )
        ],
        [],
    )


def test_a_blank_key_does_not_hide_a_better_one() -> None:
    body = (
        b'{"messageId": "", "MessageId": null, "id": "A", "deliveryStatus": "", "status": "Sent"}'
    )
    [receipt] = mitto.parse_dlr(body).receipts
    assert receipt == mitto.Receipt("A", MessageState.ENROUTE, "Sent", None, None)


def test_good_receipts_count_beside_bad_ones() -> None:
    elements = [
        {"messageId": "A", "status": "Delivered"},
        "nonsense",
        {"status": "Delivered"},
        {"messageId": "x" * 65},
        {"id": 12345, "status": "Failure"},
        {"id": True},
        {"id": 1.5},
        None,
    ]
    dlr = mitto.parse_dlr(orjson.dumps(elements))
    assert [receipt.provider_id for receipt in dlr.receipts] == ["A", "12345"]
    rejected = [elements[n] for n in (1, 2, 3, 5, 6, 7)]
    assert [element for element, _ in dlr.rejected] == rejected
    assert {why for _, why in dlr.rejected} == {
        "not an object",
        "no messageId or id of 1 to 64 characters",
    }


@pytest.mark.parametrize(
    ("said", "at"),
    [
        ("2026-11-20T12:00:00Z", NOW),
        ("2026-11-20T12:00:00.0000000Z", NOW),
        ("2026-11-20T14:00:00+02:00", NOW),
        ("2026-11-20 12:00:00", NOW),
        (" 2026-11-20T12:00:00 ", NOW),
        (1795176000, NOW),
        (1795176000.0, NOW),
        (1795176000000, NOW),
        ("1795176000", NOW),
        ("1795176000000", NOW),
        ("0001-01-01T00:00:00", None),
        ("0001-01-01T00:00:00+14:00", None),
        ("9999-12-31T23:59:59-14:00", None),
        ("tomorrow", None),
        (True, None),
        (-5, None),
        (2**63, None),
        (1e300, None),
        ({"at": 1}, None),
    ],
)
def test_a_time_is_read_in_every_form(said: object, at: datetime | None) -> None:
    body = orjson.dumps({"id": "A", "status": "Sent", "updatedAt": said})
    assert mitto.parse_dlr(body).receipts[0].at == at


def test_what_postgres_cannot_hold_is_left_out_and_long_texts_are_cut() -> None:
    element = {"id": "A", "status": "w\x00" + "w" * 99, "description": {"why": "d\x00" * 400}}
    [receipt] = mitto.parse_dlr(orjson.dumps(element)).receipts
    assert receipt.word == "w" * 64
    assert receipt.description is not None
    assert receipt.description.startswith('{"why":"d')
    assert len(receipt.description) == 300


@pytest.mark.parametrize("body", [b"", b"DELIVRD", b"3", b'"A"', b"null", b"\xff", b"[" * 9999])
def test_a_body_that_is_no_receipt_is_refused(body: bytes) -> None:
    with pytest.raises(mitto.BadDlr, match="the body"):
        mitto.parse_dlr(body)


def test_an_empty_array_is_no_receipt_and_no_error() -> None:
    assert mitto.parse_dlr(b"[]") == mitto.Dlr([], [])


receipt_objects = st.dictionaries(
    st.sampled_from(["messageId", "id", "Status", "deliveryStatus", "updatedAt", "error", "x"]),
    json_values | st.floats(allow_nan=False) | st.datetimes().map(str),
    max_size=5,
)


@given(
    st.binary(max_size=80)
    | json_values.map(orjson.dumps)
    | st.lists(receipt_objects, max_size=4).map(orjson.dumps)
)
def test_nothing_but_bad_dlr_comes_out_of_any_bytes(body: bytes) -> None:
    try:
        dlr = mitto.parse_dlr(body)
    except mitto.BadDlr:
        return
    document = orjson.loads(body)
    count = len(document) if isinstance(document, list) else 1
    assert len(dlr.receipts) + len(dlr.rejected) == count
    for receipt in dlr.receipts:
        assert 1 <= len(receipt.provider_id) <= 64
        assert "\x00" not in receipt.provider_id + receipt.word + (receipt.description or "")
        assert receipt.at is None or receipt.at.tzinfo is UTC


# --- redaction -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("+306912345678", "***78"),
        ("to=306912345678;", "to=***78;"),
        ("+30 691 234-5678 called", "***78 called"),
        ("+1 (212) 555-0123.", "***23."),
        ("%2B306912345678", "%2B***78"),
        ("at 12:30 on 2026-11-20, code 1234567", "at 12:30 on 2026-11-20, code 1234567"),
        ("Authorization: Bearer a.b-c/d==, next", "Authorization: Bearer ***, next"),
        ('{"apiKey":"s3cret","x":1}', '{"apiKey":"***","x":1}'),
        ("X-Mitto-API-Key: s3cret", "X-Mitto-API-Key: ***"),
        ("the key is tr4ffic", "the key is ***"),
        ("", ""),
    ],
)
def test_phones_keys_and_tokens_are_masked(text: str, redacted: str) -> None:
    assert mitto.redact(text, "tr4ffic", "") == redacted
