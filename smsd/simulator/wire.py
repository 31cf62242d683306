"""How requests are read and messages shown, and how connections and answers are made to fail."""

import asyncio
import re
import socket
import struct
import time
import uuid
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, Literal

import orjson
from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage

from smsd import arrival
from smsd.simulator.ledger import Accepted, Draft, Report, iso
from smsd.simulator.receipts import FAILURE
from smsd.simulator.switches import Fault

_E164 = re.compile(r"\+[1-9][0-9]{6,14}")
_LONGEST_SENDER = 16
_DRIPS = 20
_NO_LINGER = struct.pack("ii", 1, 0)
# Of Linux's struct tcp_info: milliseconds since the last byte came in, counted in ticks (4 ms where HZ is 250).
_LAST_DATA_RECEIVED, _SIZE = 52, 56
_TWO_TICKS_MS = 8


class Refusal(Exception):  # noqa: N818 - an answer, not a failure of ours
    """Answer this status with this message, and accept nothing."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body; Refusal 400 for anything else."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"The body is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise Refusal(400, "The body is not a JSON object")
    return content


def read_items(body: bytes, kind: Literal["bulk", "send"]) -> list[Any]:
    """The messages of a POST, unchecked and at least one; Refusal 400 if there is no such list."""
    content = read_object(body)
    if kind == "send":
        return [content]
    items = content.get("messages")
    if not isinstance(items, list) or not items:
        raise Refusal(400, "messages must be a list of at least one message")
    return items


def read_account(items: list[Any]) -> str | None:
    """The account of the first message that names one: what limits and faults go by."""
    for item in items:
        account = item.get("trafficAccountId") if isinstance(item, dict) else None
        if account and isinstance(account, str):
            return account
    return None


def read_draft(item: Any) -> Draft | str:
    """One message as a provider checks it, or what is wrong with it."""
    if not isinstance(item, dict):
        return "a message must be an object"
    account, destination, sms = (
        item.get("trafficAccountId"),
        item.get("destination"),
        item.get("sms"),
    )
    if not account or not isinstance(account, str):
        return "trafficAccountId is missing"
    if not isinstance(destination, str) or not _E164.fullmatch(destination):
        return f"destination must be + and 7 to 15 digits, got {destination!r}"
    if not isinstance(sms, dict):
        return "sms must be an object with text and sender"
    text, sender, reference = sms.get("text"), sms.get("sender"), item.get("reference")
    if not isinstance(text, str) or not text:
        return "sms.text is missing or empty"
    if not isinstance(sender, str) or not 0 < len(sender) <= _LONGEST_SENDER:
        return f"sms.sender must have 1 to {_LONGEST_SENDER} characters, got {sender!r}"
    return Draft(
        account,
        int(destination[1:]),
        sender,
        text,
        reference if isinstance(reference, str) else None,
    )


def read_webhook(body: bytes) -> tuple[str, dict[str, str], list[str], list[str]]:
    """Url, static headers, accounts and triggers of a registration; Refusal 400 if unfit."""
    content = read_object(body)
    url, headers = content.get("url"), content.get("headers", {})
    accounts, triggers = content.get("trafficAccountIds", []), content.get("triggers", [])
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise Refusal(400, f"url must be an http address, got {url!r}")
    if not isinstance(headers, dict) or not all(isinstance(v, str) for v in headers.values()):
        raise Refusal(400, "headers must be an object of strings")
    for name, value in (("trafficAccountIds", accounts), ("triggers", triggers)):
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise Refusal(400, f"{name} must be a list of strings")
    return url, headers, accounts, triggers


def show_message(message: Accepted, report: Report, skew: float) -> dict[str, Any]:
    """The documented model of a message, its times on a clock that is `skew` seconds ahead."""
    destination = f"+{message.destination}"
    updated_at = message.due_at if report >= Report.DELIVERED else message.accepted_at
    return {
        "messageId": message.message_id,
        "trafficAccountId": message.account,
        "text": message.text,
        "sender": message.sender,
        "conversation": {
            "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{message.sender} {destination}")),
            "participants": [destination, message.sender],
        },
        "createdAt": iso(message.accepted_at + skew),
        "updatedAt": iso(updated_at + skew),
        "deliveryStatus": report.word,
        "description": FAILURE if report == Report.FAILED else None,
        "messageParts": _rough_parts(message.text),
        "requestInfo": {"sms": {"sender": message.sender, "text": message.text}},
        "reference": message.reference,
    }


def _rough_parts(text: str) -> int:
    """Good enough to look at; nothing of ours is checked against it."""
    single, part = (160, 153) if text.isascii() else (70, 67)
    return 1 if len(text) <= single else -(-len(text) // part)


def bend(
    elements: list[dict[str, Any]], fault: Fault, extra_id: str, random: Random
) -> list[dict[str, Any]]:
    """The list of an answer as this fault leaves it; where it is bent is drawn."""
    place = random.randrange(len(elements))
    match fault:
        case Fault.SHORT_ANSWER:
            return elements[:place] + elements[place + 1 :]
        case Fault.LONG_ANSWER:
            extra = {"trafficAccountId": elements[0]["trafficAccountId"], "messageId": extra_id}
            return [*elements[:place], extra, *elements[place:]]
        case Fault.SHUFFLED_ANSWER if len(elements) > 1:
            # a rotation by at least one: no element stays where it was
            turn = random.randrange(1, len(elements))
            return elements[turn:] + elements[:turn]
        case Fault.REPEATED_ID_ANSWER:
            # Not an error in its place: that would say of what was accepted that it was refused.
            with_id = next((one for one in elements if "messageId" in one), elements[-1])
            return [*elements[:-1], with_id]
    return elements


def lay_seconds(transport: asyncio.BaseTransport | None) -> float:
    """For how long what has just been read had lain in the kernel, as this process had other things to do: 0.0 where it
    was less than two ticks of the kernel, or the system cannot tell."""
    if transport is None or (info := arrival.tcp_info(transport, _SIZE)) is None:
        return 0.0
    (milliseconds,) = struct.unpack_from("=I", info, _LAST_DATA_RECEIVED)
    return milliseconds / 1000 if milliseconds > _TWO_TICKS_MS else 0.0


class Connection(web.RequestHandler):
    """Notes when the first byte of a request came in: when the kernel had it, before anything is parsed."""

    __slots__ = ("first_byte",)

    def __init__(self, manager: web.Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(manager, loop=loop, access_log=None)  # type: ignore[arg-type]
        self.first_byte: tuple[float, float] | None = None

    def data_received(self, data: bytes) -> None:
        if self.first_byte is None and data:
            lay = lay_seconds(self.transport)
            self.first_byte = (time.time() - lay, time.monotonic() - lay)
        super().data_received(data)


class Server(web.Server):
    """Makes such connections, takes bodies of any size, cancels the handler of who has left."""

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> None:
        super().__init__(handler, request_factory=_unlimited_request, handler_cancellation=True)

    def __call__(self) -> Connection:
        return Connection(self, asyncio.get_running_loop())


def _unlimited_request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: web.RequestHandler,
    writer: AbstractStreamWriter,
    task: "asyncio.Task[None]",
) -> web.BaseRequest:
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=0)


def reset(http: web.BaseRequest) -> None:
    """Cut the connection with a reset, whatever it was doing."""
    transport = http.transport
    if transport is not None:
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER
        )
        transport.abort()


async def send_half(http: web.BaseRequest, body: bytes) -> web.StreamResponse:
    """Promise the whole body, send half of it and close."""
    response = await _begin(http, len(body))
    await response.write(body[: len(body) // 2])
    if http.transport is not None:
        http.transport.close()
    return response


async def drip(http: web.BaseRequest, body: bytes, seconds: float) -> web.StreamResponse:
    """Send the whole body in small pieces over so many seconds."""
    response = await _begin(http, len(body))
    size = -(-len(body) // _DRIPS)
    for start in range(0, len(body), size):
        await asyncio.sleep(seconds / _DRIPS)
        await response.write(body[start : start + size])
    return response


async def _begin(http: web.BaseRequest, length: int) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.content_length = length
    await response.prepare(http)
    return response
