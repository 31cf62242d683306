"""A real HTTP server that looks like Mitto's Messaging API, with every fault that may befall it.

What happens to a POST of messages, in this order: body, key, account, the account's limit, the
fault that strikes it, a provider's checks, acceptance (ledger, and what becomes of each message),
receipts that overtake the answer, latency, answer. The methods stand in the same order.
"""

import asyncio
import contextlib
import signal
import sys
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable
from email.utils import formatdate
from random import Random
from typing import Any, Literal, Self, cast

import orjson
from aiohttp import web

from smsd.model import API_KEY_HEADER, BULK_PATH, MESSAGE_PATH, SEND_PATH, WEBHOOK_SECRET_HEADER
from smsd.simulator import control, wire
from smsd.simulator.ledger import Accepted, Draft, Ledger, Report, Request, ulid
from smsd.simulator.receipts import Receipts
from smsd.simulator.switches import (
    AFTER_ACCEPTANCE,
    MAGIC_FAULTS,
    Fault,
    ItemFault,
    Switches,
    magic_of,
)
from smsd.simulator.wire import Refusal

WEBHOOKS_PATH = "/api/v1/Webhooks"
REDIRECTED_PATH = "/redirected"  # where `redirect` points; whoever comes is counted
_MESSAGES_PREFIX = MESSAGE_PATH.removesuffix("{message_id}")
_RETRY_DATE_SECONDS = 2  # how far ahead retry_after="date" points
_ITEM_REFUSED = "Destination is not allowed"

_GATEWAY = "<html><body><h1>502 Bad Gateway</h1></body></html>"
# status, and a message for Mitto's JSON body or a page of HTML
_REFUSALS: dict[Fault, tuple[int, str]] = {
    Fault.FAIL_400: (400, "Bad request"),
    Fault.FAIL_401: (401, "Unauthorized"),
    Fault.FAIL_403: (403, "Forbidden"),
    Fault.FAIL_404: (404, "Not found"),
    Fault.FAIL_429: (429, "Too many requests"),
    Fault.FAIL_500: (500, "Internal server error"),
    Fault.FAIL_500_HTML: (500, "<html><body><h1>Server Error</h1></body></html>"),
    Fault.FAIL_502: (502, _GATEWAY),
    Fault.FAIL_503: (503, "Service unavailable"),
    Fault.FAIL_503_RETRY_AFTER: (503, "Service unavailable"),
    Fault.ACCEPT_THEN_500: (500, "Internal server error"),
    Fault.ACCEPT_THEN_502: (502, _GATEWAY),
}


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
        self.ledger = Ledger()
        self._switches = switches if switches is not None else Switches()
        self._random = Random(self._switches.seed)  # noqa: S311 - repeatable, not secret
        self.receipts = Receipts(self.ledger, self._switches, self._changed)
        if webhook_url is not None:
            headers = {WEBHOOK_SECRET_HEADER: webhook_secret} if webhook_secret else {}
            self.receipts.register(webhook_url, headers, frozenset())
        self._allowed: defaultdict[str | None, deque[float]] = defaultdict(deque)
        self._watchers: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._runner: web.ServerRunner | None = None
        self._stopping = asyncio.Event()

    # --- life -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, and post the receipts that are due."""
        self._stopping.clear()
        self._runner = web.ServerRunner(wire.Server(self._handle), shutdown_timeout=1.0)
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
        self._changed()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """The base of every address, once started."""
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
        """Wait until so many messages were accepted."""
        await self.until(lambda: self.ledger.accepted_count >= count)

    async def requests_reached(self, count: int) -> None:
        """Wait until so many requests came in."""
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

    def _changed(self) -> None:
        for holds, woken in self._watchers:
            if not woken.done() and holds():
                woken.set_result(None)

    # --- every request ----------------------------------------------------------------------

    async def _handle(self, http: web.BaseRequest) -> web.StreamResponse:
        connection = cast("wire.Connection", http.protocol)
        arrived = connection.first_byte or (time.time(), time.monotonic())
        try:
            return await self._route(http, arrived)
        except Refusal as refusal:
            return self.answer(
                refusal.status, {self._switches.error_key: refusal.message}, refusal.headers
            )
        except web.RequestPayloadError:
            return self.answer(400, {self._switches.error_key: "The body cannot be read"})
        finally:
            connection.first_byte = None

    async def _route(
        self, http: web.BaseRequest, arrived: tuple[float, float]
    ) -> web.StreamResponse:
        method, path = http.method, http.path
        if (method, path) == ("POST", BULK_PATH):
            return await self._post(http, "bulk", arrived)
        if (method, path) == ("POST", SEND_PATH):
            return await self._post(http, "send", arrived)
        if method == "GET" and path.startswith(_MESSAGES_PREFIX):
            return await self._get(http, arrived)
        if (method, path) == ("POST", WEBHOOKS_PATH):
            return await self._register(http)
        if path.startswith(control.PREFIX):
            return await control.respond(self, http)
        await http.read()
        if path == REDIRECTED_PATH:
            self.ledger.redirects_followed += 1
        raise Refusal(404, f"There is no {method} {path}")

    def answer(
        self, status: int, content: Any, headers: dict[str, str] | None = None
    ) -> web.Response:
        """JSON, dated by this provider's clock; a str is an HTML page, bytes are taken as JSON."""
        dated = dict(headers or {})
        if self._switches.clock_skew_seconds:
            dated["Date"] = formatdate(self._now(), usegmt=True)
        if isinstance(content, str):
            return web.Response(
                status=status, text=content, content_type="text/html", headers=dated
            )
        body = content if isinstance(content, bytes) else orjson.dumps(content)
        return web.Response(
            status=status, body=body, content_type="application/json", headers=dated
        )

    def _now(self) -> float:
        return time.time() + self._switches.clock_skew_seconds

    def _check_key(self, http: web.BaseRequest) -> None:
        key = http.headers.get(API_KEY_HEADER)
        if not key or (self.api_keys is not None and key not in self.api_keys):
            raise Refusal(401, f"{API_KEY_HEADER} is missing or unknown")

    def _check_limit(self, request: Request) -> None:
        limit = self._switches.limit_of(request.account)
        if limit is None:
            return
        allowed = self._allowed[request.account]
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

    async def _latency(self, request: Request) -> None:
        switches = self._switches
        seconds = switches.latency_seconds + self._random.random() * switches.latency_jitter_seconds
        if seconds > 0 and switches.strike(request.account):
            await asyncio.sleep(seconds)

    # --- a POST of messages -----------------------------------------------------------------

    async def _post(
        self, http: web.BaseRequest, kind: Literal["bulk", "send"], arrived: tuple[float, float]
    ) -> web.StreamResponse:
        ledger = self.ledger
        request = ledger.open_request(kind, *arrived)
        try:
            response = await self._outcome(http, request, ledger)
            if response is None:
                wire.reset(http)
                return web.Response()  # goes nowhere
            request.status = response.status
            return response
        except Refusal as refusal:
            request.status = refusal.status
            raise
        finally:
            ledger.close_request(request, time.monotonic())
            self._changed()

    async def _outcome(
        self, http: web.BaseRequest, request: Request, ledger: Ledger
    ) -> web.StreamResponse | None:
        """The answer, or None for a connection that is to be cut."""
        switches = self._switches
        cut_unread = switches.reset_before_reading > 0 and not switches.only_accounts
        if cut_unread:
            request.fault = self._draw_fault(None)
            if request.fault == Fault.RESET_BEFORE_READING:
                return None
        body = await http.read()
        self._check_key(http)
        items = wire.read_items(body, cast("Literal['bulk', 'send']", request.kind))
        request.messages, request.account = len(items), wire.read_account(items)
        self._check_limit(request)
        drafts = [wire.read_draft(item) for item in items]
        request.fault = self._magic_fault(drafts) or (
            request.fault if cut_unread else self._draw_fault(request.account)
        )
        self._changed()
        if request.fault is not None and request.fault not in AFTER_ACCEPTANCE:
            return await self._refuse(request, request.fault)
        if ledger is not self.ledger:
            return None  # reset meanwhile
        elements, early = self._accept(request, items, drafts)
        self._changed()
        await self.receipts.post_early(early)
        await self._latency(request)
        return await self._answer_accepted(http, request, elements)

    def _draw_fault(self, account: str | None) -> Fault | None:
        switches = self._switches
        if not switches.strike(account):
            return None
        fault = switches.draw_fault(self._random)
        if fault is not None and switches.faults_left is not None:
            switches.faults_left -= 1
        return fault

    def _magic_fault(self, drafts: list[Draft | str]) -> Fault | None:
        if not self._switches.magic_numbers:
            return None
        magics = [magic_of(one.destination) for one in drafts if isinstance(one, Draft)]
        return next((MAGIC_FAULTS[magic] for magic in magics if magic in MAGIC_FAULTS), None)

    async def _refuse(self, request: Request, fault: Fault) -> web.StreamResponse | None:
        if fault == Fault.HANG_BEFORE_ACCEPT:
            return await self._hang()
        if fault in (Fault.RESET_AFTER_READING, Fault.RESET_BEFORE_READING):
            return None
        await self._latency(request)
        if fault == Fault.REDIRECT:
            return self.answer(307, {}, {"Location": self.url + REDIRECTED_PATH})
        return self._refusal(fault)

    async def _hang(self) -> web.StreamResponse | None:
        await self._stopping.wait()  # the client's leaving cancels us
        return None

    def _refusal(self, fault: Fault) -> web.Response:
        status, text = _REFUSALS.get(fault, (self._switches.fail_other_status, "Refused"))
        if text.startswith("<"):
            return self.answer(status, text)
        headers: dict[str, str] = {}
        if fault in (Fault.FAIL_429, Fault.FAIL_503_RETRY_AFTER):
            headers = self._retry_after()
        if fault == Fault.FAIL_503_RETRY_AFTER and not headers:
            headers = {"Retry-After": "1"}
        return self.answer(status, {self._switches.error_key: text}, headers)

    # --- acceptance -------------------------------------------------------------------------

    def _accept(
        self, request: Request, items: list[Any], drafts: list[Draft | str]
    ) -> tuple[list[dict[str, Any]], dict[int, list[int]]]:
        """Accept what is fit; the elements of the answer, and the receipts to post before it."""
        largest = self._switches.largest_request
        if largest is not None and len(items) > largest:
            raise Refusal(413, f"At most {largest} messages a request, got {len(items)}")
        referring = [one for one in items if isinstance(one, dict) and "reference" in one]
        if self._switches.refuse_reference and referring:
            raise Refusal(400, "reference: unknown field")
        elements: list[dict[str, Any]] = []
        fit: list[Draft] = []
        named: list[dict[str, Any]] = []  # the elements that take the ids of the fit, in order
        safe, draw = self._switches.items_are_safe(), self._switches.draw_item_fault
        for index, draft in enumerate(drafts):
            if isinstance(draft, str):
                elements.append(self._bad_element(index, items[index], draft))
                continue
            element: dict[str, Any] = {"trafficAccountId": draft.account}
            elements.append(element)
            fault = None if safe else draw(draft.destination, request.account, self._random)
            if fault in (ItemFault.REFUSE_ITEMS, ItemFault.ID_AND_ERROR):
                element["error"] = _ITEM_REFUSED
            if fault != ItemFault.REFUSE_ITEMS:
                fit.append(draft)
                named.append({} if fault == ItemFault.ITEMS_WITHOUT_ID else element)
        ids = self._keep(request, fit)
        for element, message_id in zip(named, ids, strict=True):
            element["messageId"] = message_id
        return elements, self.receipts.decide(request, self._random)

    def _keep(self, request: Request, fit: list[Draft]) -> list[str]:
        if not self._switches.keep_reference:
            fit = [draft._replace(reference=None) if draft.reference else draft for draft in fit]
        if request.kind == "bulk":
            request.bulk_id = str(uuid.uuid4())
        skew = self._switches.clock_skew_seconds
        return self.ledger.accept(request, fit, time.time(), time.monotonic(), skew)

    def _bad_element(self, index: int, item: Any, complaint: str) -> dict[str, Any]:
        if self._switches.bad_item == "whole_4xx":
            raise Refusal(400, f"messages[{index}]: {complaint}")
        account = item.get("trafficAccountId") if isinstance(item, dict) else None
        if self._switches.bad_item == "item_without_id":
            return {"trafficAccountId": account}
        return {"trafficAccountId": account, "error": complaint}

    # --- the answer to what was accepted ----------------------------------------------------

    async def _answer_accepted(
        self, http: web.BaseRequest, request: Request, elements: list[dict[str, Any]]
    ) -> web.StreamResponse | None:
        match request.fault:
            case Fault.ACCEPT_THEN_HANG:
                return await self._hang()
            case Fault.ACCEPT_THEN_RESET:
                return None
            case Fault.ACCEPT_THEN_500 | Fault.ACCEPT_THEN_502:
                return self._refusal(request.fault)
            case Fault.IDS_IN_4XX:
                content = {self._switches.error_key: "Some were refused", "messages": elements}
                return self.answer(400, content)
        if request.fault is not None:
            extra = ulid(self.ledger.take_ids(1, self._now()))
            elements = wire.bend(elements, request.fault, extra, self._random)
        body = orjson.dumps(self._shape(request, elements))
        match request.fault:
            case Fault.BROKEN_ANSWER:
                return self.answer(200, body[: len(body) // 2])
            case Fault.HALF_ANSWER:
                return await wire.send_half(http, body)
            case Fault.SLOW_DRIP:
                return await wire.drip(http, body, self._switches.slow_drip_seconds)
        return self.answer(200, body)

    def _shape(self, request: Request, elements: list[dict[str, Any]]) -> dict[str, Any]:
        if request.kind == "bulk":
            return {"bulkId": request.bulk_id, "messages": elements}
        if self._switches.send_shape == "flat":
            return elements[0] if elements else {}
        return {"messages": elements}

    # --- the other endpoints ----------------------------------------------------------------

    async def _get(self, http: web.BaseRequest, arrived: tuple[float, float]) -> web.StreamResponse:
        ledger = self.ledger
        request = ledger.open_request("get", *arrived)
        try:
            await http.read()
            self._check_key(http)
            message = ledger.find(http.path.removeprefix(_MESSAGES_PREFIX))
            request.account = None if message is None else message.account
            self._check_limit(request)
            await self._latency(request)
            if message is None or self._hides(message):
                raise Refusal(404, "There is no message with this id")
            request.status = 200
            skew = self._switches.clock_skew_seconds
            return self.answer(200, wire.show_message(message, self._report(message), skew))
        except Refusal as refusal:
            request.status = refusal.status
            raise
        finally:
            ledger.close_request(request, time.monotonic())
            self._changed()

    def _hides(self, message: Accepted) -> bool:
        return time.time() < message.accepted_at + self._switches.seconds_to_be_found

    def _report(self, message: Accepted) -> Report:
        """Where the message stands now, whether or not a receipt told so."""
        now = time.time()
        if now >= message.due_at:
            return message.final
        half_time = (message.accepted_at + message.due_at) / 2
        return (
            Report.SENT if self._switches.dlr_intermediate and now >= half_time else Report.QUEUED
        )

    async def _register(self, http: web.BaseRequest) -> web.StreamResponse:
        body = await http.read()
        self._check_key(http)
        url, headers, accounts, triggers = wire.read_webhook(body)
        webhook = self.receipts.register(url, headers, frozenset(accounts))
        shown = {"id": webhook.id, "url": url, "triggers": triggers, "trafficAccountIds": accounts}
        return self.answer(201, shown)


async def run(
    host: str,
    port: int,
    webhook_url: str | None = None,
    webhook_secret: str | None = None,
    switches: Switches | None = None,
) -> None:
    """Serve until cancelled or told to stop by SIGINT or SIGTERM; say once where it listens."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    simulator = Simulator(
        switches, host=host, port=port, webhook_url=webhook_url, webhook_secret=webhook_secret
    )
    async with simulator, contextlib.AsyncExitStack() as handlers:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
            handlers.callback(loop.remove_signal_handler, number)
        sys.stdout.write(
            f"The Mitto simulator listens on {simulator.url}, "
            f"its switches and ledger are under {simulator.url}{control.PREFIX}\n"
        )
        sys.stdout.flush()
        await stop.wait()
