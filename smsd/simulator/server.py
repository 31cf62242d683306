"""A real HTTP server that looks like Mitto's Messaging API, with every fault that may befall it.

What happens to a POST of messages, in order: key, fault (drawn once), body, account, the account's
limit, the checks of a provider, acceptance (the ledger, the fate of each message), receipts that
overtake the answer, latency, answer. The order of the handlers below is that order.
"""

import asyncio
import contextlib
import re
import socket
import struct
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable
from email.utils import formatdate
from random import Random
from typing import Any, Literal, NamedTuple, Self, cast

import orjson
from aiohttp import web

from smsd.model import (
    API_KEY_HEADER,
    BULK_PATH,
    MESSAGE_PATH,
    SEND_PATH,
    WEBHOOK_SECRET_HEADER,
)
from smsd.simulator import control
from smsd.simulator.ledger import Accepted, Draft, Ledger, Report, Request, iso, ulid
from smsd.simulator.receipts import FAILURE, Receipts
from smsd.simulator.switches import MAGIC_FAULTS, Fault, Magic, Switches, magic_of

WEBHOOKS_PATH = "/api/v1/Webhooks"
REDIRECTED_PATH = "/redirected"  # where `redirect` points; whoever comes is counted
_MESSAGES_PREFIX = MESSAGE_PATH.removesuffix("{message_id}")
_E164 = re.compile(r"\+[1-9][0-9]{6,14}")
_RETRY_DATE_SECONDS = 2  # how far ahead retry_after="date" points
_DRIPS = 20

_HTML = "<html><body><h1>{0}</h1></body></html>"
# what a refusal says: status, and a body in Mitto's JSON or a gateway's HTML
_REFUSALS: dict[Fault, tuple[int, str]] = {
    Fault.FAIL_400: (400, "Bad request"),
    Fault.FAIL_401: (401, "Unauthorized"),
    Fault.FAIL_403: (403, "Forbidden"),
    Fault.FAIL_404: (404, "Not found"),
    Fault.FAIL_429: (429, "Too many requests"),
    Fault.FAIL_500: (500, "Internal server error"),
    Fault.FAIL_500_HTML: (500, _HTML.format("Server Error")),
    Fault.FAIL_502: (502, _HTML.format("502 Bad Gateway")),
    Fault.FAIL_503: (503, "Service unavailable"),
    Fault.FAIL_503_RETRY_AFTER: (503, "Service unavailable"),
    Fault.ACCEPT_THEN_500: (500, "Internal server error"),
    Fault.ACCEPT_THEN_502: (502, _HTML.format("502 Bad Gateway")),
}
_AFTER_ACCEPTANCE = frozenset(list(Fault)[list(Fault).index(Fault.ACCEPT_THEN_HANG) :])


class _Connection(web.RequestHandler):
    """Notes when the first byte of a request comes in, before anything is parsed."""

    __slots__ = ("first_byte",)

    def __init__(self, manager: web.Server, **options: Any) -> None:
        super().__init__(manager, **options)
        self.first_byte: tuple[float, float] | None = None

    def data_received(self, data: bytes) -> None:
        if self.first_byte is None and data:
            self.first_byte = (time.time(), time.monotonic())
        super().data_received(data)


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, access_log=None)

    def _make_request(self, *arguments: Any) -> web.BaseRequest:
        return web.BaseRequest(*arguments, self._loop, client_max_size=0)


class Refusal(Exception):  # noqa: N818 - an answer, not a failure of ours
    """Answer this status with this message, and accept nothing."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


class _Checked(NamedTuple):
    """A request's items: what is to be accepted, and the elements of the answer.

    `elements` has one entry per item; an entry without "refused" takes the next id.
    """

    drafts: list[Draft]
    elements: list[dict[str, Any] | None]


class Simulator:
    """The server, its switches, its ledger and its receipts."""

    def __init__(
        self,
        switches: Switches | None = None,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        api_keys: set[str] | None = None,
        webhook_url: str | None = None,
        webhook_secret: str | None = None,
    ) -> None:
        """Port 0 takes a free one at the first start and keeps it. Without `api_keys` any will do.

        `webhook_url` takes the receipts of all accounts, with `webhook_secret` as the static
        header X-Webhook-Secret.
        """
        self.host, self.port = host, port
        self.api_keys = api_keys
        self._switches = switches if switches is not None else Switches()
        self._random = Random(self._switches.seed)  # noqa: S311 - repeatable, not secret
        self.ledger = Ledger()
        self.receipts = Receipts(self.ledger, self._switches, self.changed)
        if webhook_url is not None:
            headers = {WEBHOOK_SECRET_HEADER: webhook_secret} if webhook_secret else {}
            self.receipts.register(webhook_url, headers, frozenset())
        self._allowed: defaultdict[str, deque[float]] = defaultdict(deque)
        self._watchers: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._runner: web.ServerRunner | None = None
        self._stopping = asyncio.Event()

    # --- life -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, and post the receipts that are due."""
        self._stopping.clear()
        server = _Server(self._handle, handler_cancellation=True)
        self._runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, self.port, backlog=1024).start()
        self.port = self._runner.addresses[0][1]
        self.receipts.start()

    async def stop(self) -> None:
        """Cut what hangs and stop listening. Ledger and receipts are kept for another start."""
        self._stopping.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        await self.receipts.stop()

    async def reset(self) -> None:
        """Empty the ledger, forget all receipts, seed anew. Switches and webhooks stay."""
        self.ledger = Ledger()
        self._allowed.clear()
        self._random.seed(self._switches.seed)
        await self.receipts.reset(self.ledger)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def switches(self) -> Switches:
        """May be changed at any time, one by one or as a whole."""
        return self._switches

    @switches.setter
    def switches(self, switches: Switches) -> None:
        if switches.seed != self._switches.seed:
            self._random.seed(switches.seed)
        self._switches.adopt(switches)

    # --- what tests await -------------------------------------------------------------------

    async def accepted_reached(self, count: int) -> None:
        """Wait until so many messages have been accepted."""
        await self.until(lambda: self.ledger.accepted_count >= count)

    async def requests_reached(self, count: int) -> None:
        """Wait until so many requests have come in (their account is known, if ever)."""
        await self.until(lambda: len(self.ledger.requests) >= count)

    async def receipts_settled(self) -> None:
        """Wait until every receipt, those that are not due yet too, was answered 2xx."""
        await self.until(lambda: self.receipts.outstanding == 0)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds; looked at whenever ledger or receipts change."""
        if holds():
            return
        watcher = (holds, asyncio.get_running_loop().create_future())
        self._watchers.append(watcher)
        try:
            await watcher[1]
        finally:
            self._watchers.remove(watcher)

    def changed(self) -> None:
        """Wake those whose condition holds now."""
        for holds, woken in self._watchers:
            if not woken.done() and holds():
                woken.set_result(None)

    # --- requests ---------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = cast(_Connection, request.protocol)
        arrived = connection.first_byte or (time.time(), time.monotonic())
        try:
            return await self._route(request, arrived)
        except Refusal as refusal:
            return self.answer(
                refusal.status, {self._switches.error_key: refusal.message}, refusal.headers
            )
        except web.RequestPayloadError:
            return self.answer(400, {self._switches.error_key: "The body cannot be read"})
        finally:
            connection.first_byte = None

    async def _route(
        self, request: web.BaseRequest, arrived: tuple[float, float]
    ) -> web.StreamResponse:
        match request.method, request.path:
            case "POST", path if path == BULK_PATH:
                return await self._take(request, "bulk", arrived)
            case "POST", path if path == SEND_PATH:
                return await self._take(request, "send", arrived)
            case "GET", path if path.startswith(_MESSAGES_PREFIX):
                return await self._look_up(request, arrived)
            case "POST", path if path == WEBHOOKS_PATH:
                return await self._register(request)
            case _, path if path.startswith(control.PREFIX):
                return await control.answer(self, request)
            case _, path if path == REDIRECTED_PATH:
                self.ledger.redirects_followed += 1
        await request.read()
        raise Refusal(404, f"There is no {request.method} {request.path}")

    async def _take(
        self,
        http: web.BaseRequest,
        kind: Literal["bulk", "send"],
        arrived: tuple[float, float],
    ) -> web.StreamResponse:
        ledger = self.ledger
        request = ledger.open_request(kind, *arrived)
        try:
            response = await self._answer_post(http, request, ledger)
            request.status = response.status if http.transport is not None else None
            return response
        except Refusal as refusal:
            request.status = refusal.status
            raise
        finally:
            ledger.close_request(request, time.monotonic())
            self.changed()

    async def _answer_post(
        self, http: web.BaseRequest, request: Request, ledger: Ledger
    ) -> web.StreamResponse:
        switches = self._switches
        fault = switches.draw_fault(self._random)
        if fault == Fault.RESET_BEFORE_READING and not switches.only_accounts:
            return self._cut(http, request, fault)
        body = await http.read()
        self._check_key(http)
        items = _items(body, request.kind)
        request.messages = len(items)
        request.account = _account(items)
        fault = _magic_fault(items) if switches.magic_numbers and _magic_fault(items) else fault
        if not switches.strike(request.account):
            fault = None
        if fault is not None:
            request.fault = fault
            if switches.faults_left:
                switches.faults_left -= 1
        self.changed()
        self._check_limit(request)
        if fault is not None and fault not in _AFTER_ACCEPTANCE:
            return await self._refuse(http, request, fault)
        elements = await self._accept(items, request, ledger)
        if switches.strike(request.account):
            await self._latency()
        return await self._answer_accepted(http, request, fault, elements)

    def _check_key(self, http: web.BaseRequest) -> None:
        key = http.headers.get(API_KEY_HEADER)
        if not key or (self.api_keys is not None and key not in self.api_keys):
            raise Refusal(401, f"{API_KEY_HEADER} is missing or unknown")

    def _check_limit(self, request: Request) -> None:
        limit = self._switches.limit_of(request.account or "")
        if limit is None:
            return
        allowed = self._allowed[request.account or ""]
        while allowed and allowed[0] <= request.arrived_monotonic - 1.0:
            allowed.popleft()
        if len(allowed) >= limit:
            raise Refusal(429, f"More than {limit} requests in a second", self._retry_after())
        allowed.append(request.arrived_monotonic)

    def _retry_after(self) -> dict[str, str]:
        after = self._switches.retry_after
        if after is None:
            return {}
        if after == "date":
            return {"Retry-After": formatdate(self._now() + _RETRY_DATE_SECONDS, usegmt=True)}
        return {"Retry-After": f"{after:g}"}

    async def _latency(self) -> None:
        switches = self._switches
        jitter = self._random.random() * switches.latency_jitter_seconds
        if switches.latency_seconds + jitter > 0:
            await asyncio.sleep(switches.latency_seconds + jitter)

    def _now(self) -> float:
        """The clock as this provider shows it."""
        return time.time() + self._switches.clock_skew_seconds

    # --- nothing accepted -------------------------------------------------------------------

    async def _refuse(
        self, http: web.BaseRequest, request: Request, fault: Fault
    ) -> web.StreamResponse:
        if fault == Fault.HANG_BEFORE_ACCEPT:
            return await self._hang(http)
        if fault in (Fault.RESET_AFTER_READING, Fault.RESET_BEFORE_READING):
            return self._cut(http, request, fault)
        await self._latency()
        if fault == Fault.REDIRECT:
            return self.answer(307, {}, {"Location": self.url + REDIRECTED_PATH})
        return self._refusal(fault)

    def _refusal(self, fault: Fault) -> web.StreamResponse:
        status, text = _REFUSALS.get(fault, (self._switches.fail_other_status, "Refused"))
        if text.startswith("<"):
            return web.Response(status=status, text=text, content_type="text/html")
        headers: dict[str, str] = {}
        if fault in (Fault.FAIL_429, Fault.FAIL_503_RETRY_AFTER):
            headers = self._retry_after()
        if fault == Fault.FAIL_503_RETRY_AFTER and not headers:
            headers = {"Retry-After": "1"}
        return self.answer(status, {self._switches.error_key: text}, headers)

    async def _hang(self, http: web.BaseRequest) -> web.StreamResponse:
        await self._stopping.wait()  # or until the client goes, which cancels us
        return _reset(http)

    # --- acceptance -------------------------------------------------------------------------
