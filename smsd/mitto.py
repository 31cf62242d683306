"""The room that knows the provider: requests, answers, the outcome table, receipts, redaction.

What a POST came to is decided here and nowhere else. Two facts decide it: whether the first byte
was handed to the connection (nothing before that can have been accepted, anything after it may
have been), and the row of `TABLE` that an answer falls into. In doubt it is UNKNOWN: an unknown
message costs a look, one posted twice costs money and trust.
"""

import asyncio
import hashlib
import math
import re
import select
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from itertools import repeat
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import aiohttp
import orjson
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection
from aiohttp.http import StreamWriter

from smsd import arrival, faults
from smsd.arrival import clock as clock
from smsd.model import (
    API_KEY_HEADER,
    BULK_PATH,
    MESSAGE_PATH,
    SEND_PATH,
    MessageState,
    Outcome,
    rows,
)

CONNECT_SECONDS = 5.0
KEEPALIVE_SECONDS = 15.0
RETRY_AFTER_SECONDS_MAX = 600.0
ANSWER_BYTES_MAX = 8 * 1024 * 1024
ID_CHARACTERS_MAX = 64
DETAIL_CHARACTERS = 500
ITEM_DETAIL_CHARACTERS = 300


# --- what goes in and what comes out ---------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Account:
    """What the client needs of a traffic account."""

    id: int
    provider_id: str
    api_key: str
    server_error_means: str  # "refused" | "unknown": what a 500 with Mitto's own error body is


class Item(NamedTuple):
    """One message to post; `phone` is the E.164 number's digits."""

    message_id: int
    phone: int
    text: str
    sender: str
    reference: str | None = None


class ItemResult(NamedTuple):
    """What the answer says of one posted item: ACCEPTED, REFUSED or UNKNOWN."""

    message_id: int
    state: MessageState
    provider_id: str | None
    detail: str | None  # the provider's error, redacted, at most 300 characters


@dataclass(frozen=True, slots=True)
class Result:
    """What one POST came to. `items` is filled for ACCEPTED only, in the order posted."""

    outcome: Outcome
    status: int | None = None  # None when there was no answer
    detail: str = ""  # for a person: error class or the provider's body, redacted, at most 500
    refusal_hash: str | None = None  # REFUSED: equal for equal complaints, see `_refusal_hash`
    retry_after_seconds: float | None = None  # THROTTLED: at most 600, None when not said
    bulk_id: str | None = None
    shape: str | None = None  # "list" | "flat": how a 2xx laid out its results
    items: tuple[ItemResult, ...] = ()
    left_at: float | None = None  # `clock()` when the gate was passed, None if no byte left
    arrived_by: float | None = None  # `clock()` by which it had arrived, None if not known
    answered_at: float | None = None  # `clock()` when the whole answer was read
    date_skew_seconds: float | None = None  # the provider's Date minus our wall clock


class FetchOutcome(StrEnum):
    FOUND = "found"
    NOT_FOUND = "not_found"
    THROTTLED = "throttled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Fetched:
    """What `GET /Messages/{id}` said. All from `provider_id` on only where it was FOUND."""

    outcome: FetchOutcome
    status: int | None = None
    detail: str = ""
    retry_after_seconds: float | None = None
    date_skew_seconds: float | None = None
    provider_id: str | None = None
    traffic_account_id: str | None = None
    word: str = ""  # the state as the provider spells it
    state: MessageState | None = None
    destination: int | None = None  # digits; None unless exactly one number can be meant
    sender: str | None = None
    text: str | None = None
    created_at: datetime | None = None
    reference: str | None = None
    description: str | None = None
    arrived_by: float | None = (
        None  # `clock()` by which the question had arrived, None if it never left
    )

    @property
    def found(self) -> bool:
        return self.outcome is FetchOutcome.FOUND


class Withdrawn(Exception):  # noqa: N818 - not an error: the gate's answer
    """Raised by a gate: the POST is given up before its first byte."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# --- text for people -------------------------------------------------------------------------
_BLANK = re.compile(r"[\s\x00-\x1f\x7f]+")
_PHONE = re.compile(r"\+\d(?:[ ().-]{0,2}\d){6,14}|\d{8,}")
_TOKEN = re.compile(r"\b(bearer|basic)\s+[^\s\"',;]+", re.IGNORECASE)
_KEY = re.compile(r"(api[-_ ]?key[\"']?\s*[:=]\s*[\"']?)[^\s\"',;}]+", re.IGNORECASE)


def redact(text: str, *secrets: str) -> str:
    """`text` without the given secrets, tokens, API keys, and phones but for two digits."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    text = _KEY.sub(r"\1***", _TOKEN.sub(r"\1 ***", text))
    return _PHONE.sub(lambda match: f"***{match[0][-2:].lstrip(' ().-')}", text)


def _readable(value: object, limit: int, *secrets: str) -> str:
    """A JSON value or bytes as one redacted line of at most `limit` characters."""
    match value:
        case str():
            text = value
        case bytes():
            text = value[: 16 * limit].decode(errors="replace")
        case _:
            text = orjson.dumps(value).decode()
    # Cut twice: megabytes are not searched, and nothing is cut in half before it is redacted.
    return redact(_BLANK.sub(" ", text[: 16 * limit]).strip(), *secrets)[:limit]


# --- reading loose JSON ----------------------------------------------------------------------
def _document(body: bytes) -> object:
    """The body's JSON; None for anything unreadable (NaN, bad UTF-8, nested too deep, cut off)."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _fields(value: object) -> dict[str, Any]:
    """An object's fields under lower-case names, blank ones left out; {} for anything else."""
    if not isinstance(value, dict):
        return {}
    fields: dict[str, Any] = {}
    for name, field in value.items():
        if field is not None and field != "":
            fields.setdefault(name.lower(), field)
    return fields


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in fields:
            return fields[name]
    return None


def _identifier(value: object) -> str | None:
    """A provider's id, or None for what cannot be one (blank, not text, over 64 characters)."""
    if not isinstance(value, str):
        return None
    text = value.strip()
    return text if text and len(text) <= ID_CHARACTERS_MAX and text.isprintable() else None


_ERROR_NAMES = ("error", "errors", "errormessage")


def _message_id(element: object) -> str | None:
    if isinstance(element, dict) and (found := _identifier(element.get("messageId"))):
        return found
    fields = _fields(element)
    return _identifier(fields.get("messageid")) or _identifier(fields.get("id"))


def _http_date(value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, 0 to 600; a date counts from the answer's own Date, else from our clock."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", value):
        seconds = float(value)
    elif until := _http_date(value):
        now = _http_date(headers.get("Date")) or datetime.now(UTC)
        seconds = (until - now).total_seconds()
    else:
        return None
    return min(max(seconds, 0.0), RETRY_AFTER_SECONDS_MAX)


def _date_skew(headers: Mapping[str, str]) -> float | None:
    date = _http_date(headers.get("Date"))
    return date.timestamp() - time.time() if date else None


# --- the outcome table -----------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Answer:
    """What the table looks at."""

    status: int
    results: list[object] | None  # 2xx: one element per posted item, None if it is not that
    carries_id: bool  # not 2xx: a message id stands in the body
    own_error: bool  # the body is an object with Mitto's `message` or `error`
    retry_after_seconds: float | None
    server_error_means: str


# Top down, the first row that fits.
TABLE: tuple[tuple[Callable[[_Answer], bool], Outcome], ...] = (
    # An id in an answer that refuses, whatever its status: something may have been accepted.
    (lambda a: a.carries_id, Outcome.UNKNOWN),
    # One result for each message: decided item by item. Any other 2xx says too little.
    (lambda a: a.results is not None, Outcome.ACCEPTED),
    (lambda a: 200 <= a.status <= 299, Outcome.UNKNOWN),
    # Never followed: a POST that is redirected would go to somebody else.
    (lambda a: 300 <= a.status <= 399, Outcome.MISDIRECTED),
    # Not now.
    (lambda a: a.status == 429, Outcome.THROTTLED),
    (lambda a: a.status == 503 and a.retry_after_seconds is not None, Outcome.THROTTLED),
    # Not us, or not this tenant's traffic.
    (lambda a: a.status == 401, Outcome.ACCOUNT_BROKEN),
    (lambda a: a.status == 403, Outcome.LANE_BROKEN),
    # Time-out, conflict, too early: a proxy may say so after it passed the request on.
    (lambda a: a.status in (408, 409, 425), Outcome.UNKNOWN),
    # Refused for what was posted.
    (lambda a: a.status == 413, Outcome.TOO_LARGE),
    (lambda a: 400 <= a.status <= 499, Outcome.REFUSED),
    # Mitto's own error body shows that Mitto, not a proxy before it, gave up on the request.
    (
        lambda a: a.status in (500, 503) and a.own_error and a.server_error_means == "refused",
        Outcome.RETRY,
    ),
    # Other 5xx, an account that takes a server error as unknown, anything unheard of.
    (lambda _: True, Outcome.UNKNOWN),
)

# Backslashes: a gateway may have put the whole answer into a string.
_ID_IN_BODY = re.compile(rb'"message_?id\\*"\s*:\s*(?:\\*"\s*[^"\\\s]|\d)', re.IGNORECASE)


def _results(document: object, count: int) -> list[object] | None:
    """The elements of a 2xx body if there are `count`; one message may stand at top level."""
    fields = _fields(document)
    if not fields:
        return None
    if count == 1 and "messages" not in fields:
        return [document]
    messages = fields.get("messages")
    return messages if isinstance(messages, list) and len(messages) == count else None


def _carries_id(body: bytes, document: object) -> bool:
    messages = _fields(document).get("messages")
    listed = isinstance(messages, list) and any(map(_message_id, messages))
    # The raw bytes too: ids count in a body that is nested differently or is not even JSON.
    return listed or _ID_IN_BODY.search(body) is not None


def _item_results(
    items: Sequence[Item], results: Sequence[object], api_key: str
) -> tuple[ItemResult, ...]:
    """An id = accepted, whatever else stands there; an error without id = refused; else unknown."""
    accepted = MessageState.ACCEPTED
    if plain := _plain_ids(results):
        n, posted = len(items), [item.message_id for item in items]
        return tuple(rows(ItemResult, posted, repeat(accepted, n), plain, repeat(None, n)))
    ids = [_message_id(element) for element in results]
    seen = Counter(ids)
    return tuple(
        ItemResult(item.message_id, accepted, provider_id, None)
        if provider_id is not None and seen[provider_id] == 1
        else _undecided(item, provider_id, element, api_key)
        for item, provider_id, element in zip(items, ids, results, strict=True)
    )


def _plain_ids(results: Sequence[object]) -> list[str] | None:
    """The ids of results that all have one of their own, under its usual name, as nearly always; None: look at each."""
    try:
        ids: list[str] = [element["messageId"] for element in results]  # type: ignore[index]
        joined = "".join(ids)
    except (KeyError, TypeError):
        return None
    # What is printable and no space has no white space; and each is there once.
    if not joined.isprintable() or " " in joined or len(set(ids)) < len(ids):
        return None
    lengths = [len(one) for one in ids]
    return ids if min(lengths) > 0 and max(lengths) <= ID_CHARACTERS_MAX else None


def _undecided(item: Item, provider_id: str | None, element: object, api_key: str) -> ItemResult:
    state, detail = MessageState.UNKNOWN, "the answer has neither id nor error for this message"
    if provider_id is not None:
        detail = f"the answer has the id {provider_id} more than once"
    elif error := _first(_fields(element), _ERROR_NAMES):
        state, detail = MessageState.REFUSED, _readable(error, ITEM_DETAIL_CHARACTERS, api_key)
    return ItemResult(item.message_id, state, None, detail)


# What differs between two answers to the same complaint.
_VOLATILE = frozenset({"traceid", "requestid", "correlationid", "timestamp", "instance"})


def _refusal_hash(body: bytes, document: object) -> str:
    """16 hex digits, equal for equal error bodies, request ids and times apart."""
    fields = {name: value for name, value in _fields(document).items() if name not in _VOLATILE}
    kept = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS) if fields else body.strip()
    return hashlib.sha256(kept).hexdigest()[:16]


def classify(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    items: Sequence[Item],
    account: Account,
) -> Result:
    """What an answer says of the posted items; never raises.

    `headers` are looked up as `Date`, `Location`, `Retry-After`.
    """
    document = _document(body)
    good = 200 <= status <= 299
    answer = _Answer(
        status=status,
        results=_results(document, len(items)) if good else None,
        carries_id=not good and _carries_id(body, document),
        own_error=bool(_first(_fields(document), ("message", "error"))),
        retry_after_seconds=_retry_after(headers),
        server_error_means=account.server_error_means,
    )
    outcome = next(outcome for fits, outcome in TABLE if fits(answer))
    detail, results = "", answer.results
    if results is None:
        detail = _readable(body, DETAIL_CHARACTERS, account.api_key)
        detail = detail or f"HTTP {status} without a body"
    if outcome is Outcome.MISDIRECTED:
        target = headers.get("Location", "nowhere")
        detail = _readable(f"redirected to {target}", DETAIL_CHARACTERS, account.api_key)
    return Result(
        outcome=outcome,
        status=status,
        detail=detail,
        refusal_hash=_refusal_hash(body, document) if outcome is Outcome.REFUSED else None,
        retry_after_seconds=answer.retry_after_seconds if outcome is Outcome.THROTTLED else None,
        bulk_id=_identifier(_fields(document).get("bulkid")) if results else None,
        shape=("list" if "messages" in _fields(document) else "flat") if results else None,
        items=_item_results(items, results, account.api_key) if results else (),
        date_skew_seconds=_date_skew(headers),
    )


# --- the gate --------------------------------------------------------------------------------
class _Body(aiohttp.Payload):
    """The bytes of one POST, its gate, and whether they were handed to the connection."""

    def __init__(
        self,
        value: bytes,
        gate: Callable[[], None],
        starts_at: float = 0.0,
        watch: arrival.Watch | None = None,
    ) -> None:
        super().__init__(value, content_type="application/json")
        self._gate, self._starts_at, self.watch = gate, starts_at, watch or arrival.Watch()
        self.passed_at: float | None = None
        self.left = False
        self.withheld: BaseException | None = None  # what the gate raised

    @property
    def size(self) -> int:
        return len(self._value)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return str(self._value, encoding, errors)

    async def wait_for_start(self) -> None:
        """Returns when the POST may start. With the connection in hand: opening one takes longer than a slot lasts."""
        wait = self._starts_at - clock()
        if wait > 0:
            await asyncio.sleep(wait)

    def pass_gate(self) -> None:
        try:
            self._gate()
        except BaseException as raised:
            self.withheld = raised
            raise
        self.passed_at = clock()
        faults.point("gate.passed")

    async def write(self, writer: AbstractStreamWriter) -> None:
        assert isinstance(writer, StreamWriter)
        if self.passed_at is None:  # an aiohttp that no longer calls `_GatedRequest.send`
            self.pass_gate()
        self.left = True
        # Watched before the connection has taken all of it: that may take long.
        await writer.write(self._value, drain=False)
        self.watch.written()
        await writer.drain()
        faults.point("body.sent")


class _Question:
    """One GET: leaves once, if its gate lets it. aiohttp would repeat it by itself, without a grant."""

    def __init__(self, gate: Callable[[], None], watch: arrival.Watch) -> None:
        self._gate, self.watch = gate, watch
        self.left = False
        self.withheld: BaseException | None = None

    def pass_gate(self) -> None:
        if self.left:
            raise aiohttp.ClientConnectionError("the connection was closed under the question")
        try:
            self._gate()
        except BaseException as raised:
            self.withheld = raised
            raise
        self.left = True


_QUESTION: ContextVar[_Question | None] = ContextVar("question", default=None)


class _GatedRequest(aiohttp.ClientRequest):
    """Puts the gate between the connection in hand and the first byte.

    aiohttp holds the head of a request back until its body is written (at once; on Python 3.11 one
    turn of the loop later), so nothing leaves before the gate. Raising in a trace signal instead
    would lose the connection without closing it. Closing it would be no better: where connecting
    takes longer than a slot lasts, every POST would come late on a new connection, for ever. So a
    withdrawn POST gives its connection back.
    """

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        body = self.body
        if isinstance(body, _Body):
            await body.wait_for_start()
        if _is_stale(conn):
            # The class that makes aiohttp try a GET on another connection, and never a POST.
            raise aiohttp.ServerDisconnectedError("the pooled connection had gone stale")
        gated = body if isinstance(body, _Body) else _QUESTION.get()
        if gated is None:
            return await super().send(conn)
        gated.watch.begin(conn.transport)
        try:
            gated.pass_gate()
        except BaseException:
            conn.release()
            raise
        response = await super().send(conn)
        if isinstance(gated, _Question):
            gated.watch.written()
        return response


_HUNG_UP = getattr(select, "POLLRDHUP", 0)  # Linux; a full hang-up is reported without asking


def _is_stale(conn: Connection) -> bool:
    """Whether a POST on this connection would be lost, or answered by an answer to nothing.

    The pool only knows what the event loop has got round to reading; the kernel knows of a
    hang-up that waits in the socket. `should_close` is true for an answer that came unasked.
    """
    protocol, transport = conn.protocol, conn.transport
    if protocol is None or protocol.should_close or transport is None or transport.is_closing():
        return True
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), _HUNG_UP)
    return bool(poll.poll(0))


# --- the client ------------------------------------------------------------------------------
def encode(account: Account, items: Sequence[Item]) -> bytes:
    """The body of a POST: the element itself for one item, `{"messages": […]}` for more."""
    if not items:
        raise ValueError("there is nothing to post")
    provider_id = account.provider_id
    elements: list[dict[str, object]] = [
        {
            "trafficAccountId": provider_id,
            "destination": f"+{phone}",
            "sms": {"text": text, "sender": sender},
        }
        for _, phone, text, sender, _ in items
    ]
    for element, item in zip(elements, items, strict=True):
        if item.reference is not None:
            element["reference"] = item.reference
    return orjson.dumps(elements[0] if len(elements) == 1 else {"messages": elements})


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > ANSWER_BYTES_MAX:
            raise ValueError(f"the answer is larger than {ANSWER_BYTES_MAX} bytes")
    return bytes(body)


class Client:
    """One session to Mitto. It bounds neither rate nor requests in flight: the sender does."""

    _session: aiohttp.ClientSession

    def __init__(self, base_url: str, timeout_seconds: float) -> None:
        self._base_url = base_url.rstrip("/")
        self._timeout_seconds = timeout_seconds

    async def __aenter__(self) -> Self:
        connect_seconds = min(CONNECT_SECONDS, self._timeout_seconds)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "smsd"},
            request_class=_GatedRequest,
            # The total is asyncio.timeout's: aiohttp rounds one of 5 s or more up to a full second.
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_seconds),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(
        self,
        account: Account,
        items: Sequence[Item],
        gate: Callable[[], None],
        starts_at: float = 0.0,
        on_unseen: Callable[[], None] | None = None,
        late_from: float = math.inf,
    ) -> Result:
        """Post `items` once, not before `starts_at` (`clock()`), and say what came of it.

        `gate` is called once, with the connection in hand, before the first byte; what it raises
        (`Withdrawn`) comes out of here and nothing has left. `on_unseen`, `late_from`: see
        `arrival.Watch`.
        Every failure of network or provider is a Result. Cancelling raises CancelledError and
        leaves the POST as good as unknown once the gate was passed: shield the call to keep what
        it answers.
        """
        watch = arrival.Watch(on_unseen, late_from)
        body = _Body(encode(account, items), gate, starts_at, watch)
        path = SEND_PATH if len(items) == 1 else BULK_PATH
        status = None
        try:
            async with (
                asyncio.timeout(self._timeout_seconds + max(0.0, starts_at - clock())),
                self._session.post(
                    self._base_url + path,
                    data=body,
                    headers={API_KEY_HEADER: account.api_key},
                    allow_redirects=False,
                ) as response,
            ):
                status, headers = response.status, response.headers
                answer = await _read(response)
            faults.point("answer.read")
        # Everything: once a byte has left no class of error may turn into "not sent".
        except Exception as problem:
            arrived_by = watch.end(None)
            if body.withheld is not None:
                raise body.withheld from None
            return Result(
                outcome=Outcome.UNKNOWN if body.left else Outcome.NEVER_LEFT,
                status=status,
                detail=self._explain(problem, account),
                left_at=body.passed_at if body.left else None,
                arrived_by=arrived_by,
            )
        answered_at = clock()
        arrived_by = watch.end(answered_at)
        result = classify(status, headers, answer, items, account)
        return replace(
            result, left_at=body.passed_at, arrived_by=arrived_by, answered_at=answered_at
        )

    async def fetch(
        self,
        account: Account,
        provider_id: str,
        gate: Callable[[], None] = lambda: None,
        on_unseen: Callable[[], None] | None = None,
        late_from: float = math.inf,
    ) -> Fetched:
        """Ask once for one message by the provider's id. `gate`, `on_unseen`, `late_from` as in `send`."""
        question = _Question(gate, arrival.Watch(on_unseen, late_from))
        _QUESTION.set(question)
        path = MESSAGE_PATH.format(message_id=quote(provider_id, safe=""))
        try:
            async with (
                asyncio.timeout(self._timeout_seconds),
                self._session.get(
                    self._base_url + path,
                    headers={API_KEY_HEADER: account.api_key},
                    allow_redirects=False,
                ) as response,
            ):
                status, headers = response.status, response.headers
                answer = await _read(response)
        except Exception as problem:
            arrived_by = question.watch.end(None) or clock()
            if question.withheld is not None:
                raise question.withheld from None
            return Fetched(
                FetchOutcome.FAILED,
                detail=self._explain(problem, account),
                arrived_by=arrived_by if question.left else None,
            )
        finally:
            _QUESTION.set(None)
        fetched = _fetched(status, headers, answer, provider_id, account)
        return replace(fetched, arrived_by=question.watch.end(clock()))

    def _explain(self, problem: Exception, account: Account) -> str:
        what = str(problem) or f"no answer within {self._timeout_seconds:g} s"
        return _readable(f"{type(problem).__name__}: {what}", DETAIL_CHARACTERS, account.api_key)


# --- a message as the provider tells it ------------------------------------------------------
_WORDS = {
    MessageState.DELIVERED: ("delivered", "delivrd", "completed", "ok", "read"),
    MessageState.DELIVERY_FAILED: (
        *("failure", "failed", "undelivered", "undeliv", "expired"),
        *("rejected", "rejectd", "deleted", "error"),
    ),
    MessageState.ENROUTE: (
        *("accepted", "acceptd", "queued", "sent", "pending"),
        *("submitted", "enroute", "buffered"),
    ),
}
_STATES = {word: state for state, words in _WORDS.items() for word in words}


def state_of(word: str) -> MessageState | None:
    """DELIVERED, DELIVERY_FAILED, ENROUTE; None for a word that we don't know."""
    return _STATES.get(word.strip().lower())


_EPOCH = re.compile(r"[0-9]{9,14}(\.[0-9]{1,9})?")
_MILLISECONDS_FROM = 1e11  # as seconds that is the year 5138


def _moment(value: object) -> datetime | None:
    """ISO 8601 (UTC where no zone is given), epoch seconds or milliseconds; 2000 to 2099."""
    try:
        match value:
            case bool():
                return None
            case str() if not _EPOCH.fullmatch(value.strip()):
                moment = datetime.fromisoformat(value.strip())
            case str() | int() | float():
                seconds = float(value)
                seconds = seconds / 1000 if seconds >= _MILLISECONDS_FROM else seconds
                moment = datetime.fromtimestamp(seconds, UTC)
            case _:
                return None
    except (ValueError, OverflowError, OSError):
        return None
    # Beyond these years it is a default value ("0001-01-01") or nonsense.
    if not 2000 <= moment.year < 2100:
        return None
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def _string(value: object, limit: int | None = None) -> str | None:
    """A string but for NUL (Postgres takes none), other JSON spelled out; None stays None."""
    if value is None:
        return None
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return text.replace("\x00", "")[:limit]


def _destination(fields: Mapping[str, Any], sender: str | None) -> int | None:
    named = fields.get("destination") or _fields(fields.get("conversation")).get("participants")
    sender_digits = re.sub(r"[^0-9]", "", sender or "")
    phones = {
        int(found[1])
        for value in (named if isinstance(named, list) else [named])
        if (found := re.fullmatch(r"(?:\+|00)?([1-9][0-9]{6,14})", str(value).strip()))
        and found[1] != sender_digits
    }
    return phones.pop() if len(phones) == 1 else None


def _fetched(
    status: int, headers: Mapping[str, str], body: bytes, asked: str, account: Account
) -> Fetched:
    skew = _date_skew(headers)
    if status == 404:
        return Fetched(FetchOutcome.NOT_FOUND, status, date_skew_seconds=skew)
    retry_after_seconds = _retry_after(headers)
    if status == 429 or (status == 503 and retry_after_seconds is not None):
        return Fetched(FetchOutcome.THROTTLED, status, "", retry_after_seconds, skew)
    fields = _fields(_document(body))
    provider_id = _message_id(fields)
    # An answer about another message must not become evidence for this one.
    if status != 200 or provider_id is None or provider_id.casefold() != asked.strip().casefold():
        detail = _readable(body, DETAIL_CHARACTERS, account.api_key) or f"HTTP {status}"
        return Fetched(FetchOutcome.FAILED, status, detail, date_skew_seconds=skew)
    sms = _fields(_fields(fields.get("requestinfo")).get("sms"))
    sender = _string(fields.get("sender") or sms.get("sender"))
    word = _string(_first(fields, _WORD_NAMES)) or ""
    return Fetched(
        FetchOutcome.FOUND,
        status,
        date_skew_seconds=skew,
        provider_id=provider_id,
        traffic_account_id=_string(fields.get("trafficaccountid")),
        word=word,
        state=state_of(word),
        destination=_destination(fields, sender),
        sender=sender,
        text=_string(fields.get("text") or sms.get("text")),
        created_at=_moment(fields.get("createdat")),
        reference=_string(fields.get("reference")),
        description=_string(fields.get("description")),
    )


# --- receipts --------------------------------------------------------------------------------
_WORD_NAMES = ("deliverystatus", "status", "delivery_status")
_TIME_NAMES = ("updatedat", "doneat", "timestamp", "createdat")
_REASON_NAMES = ("description", "error", "errormessage")
WORD_CHARACTERS = 64


class Receipt(NamedTuple):
    """One delivery receipt; `state` is None where the word is unknown (it is kept in `word`)."""

    provider_id: str
    state: MessageState | None  # DELIVERED, DELIVERY_FAILED, ENROUTE
    word: str
    at: datetime | None
    description: str | None  # at most 300 characters


class Dlr(NamedTuple):
    """A receipt callback: what could be read, and each element that could not with the reason."""

    receipts: list[Receipt]
    rejected: list[tuple[object, str]]


class BadDlr(ValueError):  # noqa: N818
    """The body is no receipt at all; says what it is."""


def parse_dlr(body: bytes) -> Dlr:
    """Read one object or an array of them; raises BadDlr for a body that is neither."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadDlr(f"the body is not JSON: {error}") from None
    if isinstance(document, dict):
        document = [document]
    elif not isinstance(document, list):
        kind = type(document).__name__
        raise BadDlr(f"the body must be a JSON object or an array of objects, not {kind}")
    receipts: list[Receipt] = []
    rejected: list[tuple[object, str]] = []
    for element in document:
        receipt = _receipt(element)
        if isinstance(receipt, str):
            rejected.append((element, receipt))
        else:
            receipts.append(receipt)
    return Dlr(receipts, rejected)


def _receipt(element: object) -> Receipt | str:
    if not isinstance(element, dict):
        return "not an object"
    fields = _fields(element)
    provider_id = _scalar_id(fields.get("messageid")) or _scalar_id(fields.get("id"))
    if provider_id is None:
        return f"no messageId or id of 1 to {ID_CHARACTERS_MAX} characters"
    word = _string(_first(fields, _WORD_NAMES), WORD_CHARACTERS) or ""
    at = _moment(_first(fields, _TIME_NAMES))
    description = _string(_first(fields, _REASON_NAMES), ITEM_DETAIL_CHARACTERS)
    return Receipt(provider_id, state_of(word), word, at, description)


def _scalar_id(value: object) -> str | None:
    """As `_identifier`, and whole numbers too: some gateways send ids so."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _identifier(value)
