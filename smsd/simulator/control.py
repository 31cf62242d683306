"""The control surface under /_simulator/: switches, ledger and waits for tests in other processes.

| request | answer |
|---|---|
| `GET switches` | every switch |
| `PUT switches` | these switches, all others at their defaults |
| `PATCH switches` | these switches changed |
| `GET ledger` | figures |
| `GET accepted?after=&limit=` | accepted messages, by row |
| `GET requests?after=&limit=` | requests, by number |
| `GET duplicates?key=destination_text or destination` | recipients accepted more than once |
| `GET worst-second?account=&unit=requests, posts or messages` | the most in any one second |
| `GET max-in-flight?account=` | the most POSTs of messages that were open at once |
| `GET wait?accepted=&requests=&in_flight=&receipts_settled=1&timeout=` | once all of it holds |
| `POST reset` | the ledger emptied, receipts forgotten |
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from aiohttp import web
from pydantic import ValidationError

from smsd.simulator.ledger import Accepted, Request, iso, ulid
from smsd.simulator.switches import Switches
from smsd.simulator.wire import Refusal, read_object

if TYPE_CHECKING:
    from smsd.simulator.server import Simulator

PREFIX = "/_simulator/"
_Key = Literal["destination_text", "destination"]
_Unit = Literal["requests", "posts", "messages"]
_MOST_ROWS = 100_000
_Handler = Callable[["Simulator", web.BaseRequest], Awaitable[Any]]


async def respond(simulator: "Simulator", http: web.BaseRequest) -> web.StreamResponse:
    """Answer a request to the control surface; Refusal 400 or 404 for what it does not know."""
    name = http.path.removeprefix(PREFIX)
    handler = _HANDLERS.get((http.method, name))
    if handler is None:
        known = ", ".join(f"{method} {known}" for method, known in _HANDLERS)
        raise Refusal(404, f"There is no {http.method} {name} here; there is {known}")
    return simulator.answer(200, await handler(simulator, http))


async def _show_switches(simulator: "Simulator", http: web.BaseRequest) -> Any:
    await http.read()
    return simulator.switches.model_dump(mode="json")


async def _set_switches(simulator: "Simulator", http: web.BaseRequest) -> Any:
    given = read_object(await http.read())
    kept = simulator.switches.model_dump() if http.method == "PATCH" else {}
    try:
        simulator.switches = Switches.model_validate({**kept, **given})
    except ValidationError as error:
        raise Refusal(400, "; ".join(_complaint(one) for one in error.errors())) from None
    return simulator.switches.model_dump(mode="json")


def _complaint(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown switch {name!r}; there are {', '.join(Switches.model_fields)}"
    return f"{name or 'switches'}: {error['msg']}, got {error['input']!r:.100}"


async def _show_ledger(simulator: "Simulator", _: web.BaseRequest) -> Any:
    ledger, receipts = simulator.ledger, simulator.receipts
    return {
        "accepted": ledger.accepted_count,
        "acceptedByAccount": ledger.accepted_by_account(),
        "requests": len(ledger.requests),
        "requestsByAccount": ledger.requests_by_account(),
        "answers": ledger.answers(),
        "inFlight": ledger.in_flight,
        "redirectsFollowed": ledger.redirects_followed,
        "finalReceipts": ledger.final_receipts(),
        "receipts": {
            "outstanding": receipts.outstanding,
            "answered": receipts.answered,
            "posts": receipts.posts,
            "failedPosts": receipts.failed_posts,
        },
    }


async def _list_accepted(simulator: "Simulator", http: web.BaseRequest) -> Any:
    after, limit = _page(http)
    rows = [_show_accepted(one) for one in simulator.ledger.messages(after, limit)]
    return {"rows": rows, "next": after + len(rows), "total": simulator.ledger.accepted_count}


def _show_accepted(message: Accepted) -> dict[str, Any]:
    return {
        "row": message.row,
        "messageId": message.message_id,
        "trafficAccountId": message.account,
        "destination": f"+{message.destination}",
        "sender": message.sender,
        "text": message.text,
        "reference": message.reference,
        "acceptedAt": iso(message.accepted_at),
        "acceptedMonotonic": message.accepted_monotonic,
        "bulkId": message.bulk_id,
        "request": message.request,
        "final": message.final.word,
        "receipt": None if message.receipt is None else message.receipt.word,
    }


async def _list_requests(simulator: "Simulator", http: web.BaseRequest) -> Any:
    after, limit = _page(http)
    requests = simulator.ledger.requests
    rows = [_show_request(one) for one in requests[after : after + limit]]
    return {"rows": rows, "next": after + len(rows), "total": len(requests)}


def _show_request(request: Request) -> dict[str, Any]:
    return {
        "number": request.number,
        "kind": request.kind,
        "trafficAccountId": request.account,
        "messages": request.messages,
        "accepted": request.accepted,
        "firstId": ulid(request.first_id) if request.accepted else None,
        "bulkId": request.bulk_id,
        "fault": request.fault,
        "status": request.status,
        "arrivedAt": iso(request.arrived_at),
        "arrivedMonotonic": request.arrived_monotonic,
        "finishedMonotonic": request.finished_monotonic,
    }


async def _list_duplicates(simulator: "Simulator", http: web.BaseRequest) -> Any:
    key = cast("_Key", _choice(http, "key", get_args(_Key)))
    found = simulator.ledger.duplicates(key)
    rows = [
        {"destination": f"+{one.destination}", "text": one.text, "times": one.times}
        for one in found[:_MOST_ROWS]
    ]
    return {"duplicates": rows, "total": len(found)}


async def _show_worst_second(simulator: "Simulator", http: web.BaseRequest) -> Any:
    account = http.query.get("account")
    unit = cast("_Unit", _choice(http, "unit", get_args(_Unit)))
    worst = simulator.ledger.worst_second(account, unit)
    return {"account": account, "unit": unit, "worstSecond": worst}


async def _show_max_in_flight(simulator: "Simulator", http: web.BaseRequest) -> Any:
    account = http.query.get("account")
    return {"account": account, "maxInFlight": simulator.ledger.max_in_flight(account)}


async def _wait(simulator: "Simulator", http: web.BaseRequest) -> Any:
    accepted, requests = _number(http, "accepted", 0), _number(http, "requests", 0)
    in_flight, settled = _number(http, "in_flight", 0), _number(http, "receipts_settled", 0)

    def holds() -> bool:
        ledger = simulator.ledger
        return (
            ledger.accepted_count >= accepted
            and len(ledger.requests) >= requests
            and ledger.in_flight >= in_flight
            and (not settled or simulator.receipts.outstanding == 0)
        )

    try:
        async with asyncio.timeout(_number(http, "timeout", 30)):
            await simulator.until(holds)
    except TimeoutError:
        return {"reached": False}
    return {"reached": True}


async def _reset(simulator: "Simulator", http: web.BaseRequest) -> Any:
    await http.read()
    await simulator.reset()
    return {"ok": True}


def _number(http: web.BaseRequest, name: str, default: int) -> int:
    given = http.query.get(name, str(default))
    if not (given.isascii() and given.isdigit()):
        raise Refusal(400, f"{name} must be a whole number, got {given!r:.100}")
    return int(given)


def _page(http: web.BaseRequest) -> tuple[int, int]:
    return _number(http, "after", 0), min(_number(http, "limit", 1000), _MOST_ROWS)


def _choice(http: web.BaseRequest, name: str, choices: tuple[str, ...]) -> str:
    given = http.query.get(name, choices[0])
    if given not in choices:
        raise Refusal(400, f"{name} must be one of {', '.join(choices)}, got {given!r:.100}")
    return given


_HANDLERS: dict[tuple[str, str], _Handler] = {
    ("GET", "switches"): _show_switches,
    ("PUT", "switches"): _set_switches,
    ("PATCH", "switches"): _set_switches,
    ("GET", "ledger"): _show_ledger,
    ("GET", "accepted"): _list_accepted,
    ("GET", "requests"): _list_requests,
    ("GET", "duplicates"): _list_duplicates,
    ("GET", "worst-second"): _show_worst_second,
    ("GET", "max-in-flight"): _show_max_in_flight,
    ("GET", "wait"): _wait,
    ("POST", "reset"): _reset,
}
