"""Messages: single ones, those of a campaign, and asking Mitto again about those without a final receipt."""

from dataclasses import asdict
from datetime import datetime
from typing import Any, Literal, cast

from pydantic import ConfigDict, Field

from smsd import contacts, messages, queue, text
from smsd.api import refresh
from smsd.api.checks import (
    Phone,
    bad_text,
    campaign_of,
    inactive,
    insufficient,
    no_sender,
    read_phone,
    with_messages,
)
from smsd.api.endpoint import Endpoint, Listing, Model, Page, Request
from smsd.api.errors import invalid, not_found
from smsd.api.models import Id, SenderId
from smsd.model import Reason

TEXT_MOST = 1_600

MessageStatus = Literal[
    "queued", "processing", "accepted", "delivered", "failed", "unknown", "cancelled", "skipped"
]
# ------------------------------------------------------------------------------------------ shapes


class Attempt(Model):
    """One request to Mitto that the message was in. `outcome` is null while it is under way."""

    n: int
    at: datetime
    outcome: str | None
    detail: str | None


class Message(Model):
    """One message. `to` is null where the recipient's number could not be read; `detail` has it then. It is `erased`
    where the person was erased."""

    id: int
    campaign_id: int | None = Field(description="null for single messages")
    to: str | None
    text: str | None
    segments: int
    status: MessageStatus
    reason: str | None = Field(description="One of: " + ", ".join(Reason))
    detail: str | None
    provider_message_id: str | None
    bulk_id: str | None
    reference: str | None
    attempts: list[Attempt]
    created_at: datetime
    accepted_at: datetime | None
    finished_at: datetime | None


class Batch(Model):
    """One request's worth of messages. `n`: how many; `open`: how many of them have no outcome yet."""

    id: int
    status: Literal["queued", "waiting", "processing", "done", "unknown", "cancelled"]
    n: int
    open: int
    first_id: int
    last_id: int
    bulk_id: str | None
    attempts: int
    not_before: datetime | None = Field(description="When a waiting batch is tried again")
    created_at: datetime
    done_at: datetime | None


def shape(message: messages.Message) -> Message:
    """The answer of a message; not validated again, since a page has many."""
    return Message.model_construct(
        id=message.id,
        campaign_id=message.campaign_id or None,
        to=messages.addressee(message),
        text=message.text,
        segments=message.segments,
        status=cast("MessageStatus", message.status),
        reason=message.reason,
        detail=message.detail,
        provider_message_id=message.provider_id,
        bulk_id=message.bulk_id,
        reference=message.reference,
        attempts=[
            Attempt.model_construct(n=one.n, at=one.at, outcome=one.outcome, detail=one.detail)
            for one in message.attempts
        ],
        created_at=message.created_at,
        accepted_at=message.accepted_at,
        finished_at=message.finished_at,
    )


# ------------------------------------------------------------------------------- of a campaign


class MessagesQuery(Model):
    """Which of a campaign's messages; pages follow each other by `cursor`."""

    status: MessageStatus | None = None
    phone: Phone | None = None
    cursor: int = Field(0, ge=0, le=2**63 - 1, description="The nextCursor of the page before")
    page_size: int = Field(20, ge=1, le=100)


class MessagesPage(Model):
    """Messages by id. `nextCursor` is null on the last page."""

    items: list[Message]
    next_cursor: int | None


async def list_messages(req: Request) -> MessagesPage:
    query: MessagesQuery = req.query
    with_messages(await campaign_of(req))
    phone = None if query.phone is None else read_phone(req, query.phone)
    found = await messages.page(
        req.db, req.id, query.status, phone, query.cursor, query.page_size + 1
    )
    page = found[: query.page_size]
    more = len(found) > len(page)
    return MessagesPage(
        items=[shape(one) for one in page], next_cursor=page[-1].id if more else None
    )


async def list_batches(req: Request) -> Listing[Batch]:
    page: Page = req.query
    with_messages(await campaign_of(req))
    found, total = await messages.batches(req.db, req.id, page.page_size, page.offset)
    items = [Batch(n=one.size, **_without_size(one)) for one in found]
    return Listing[Batch](items=items, total=total, page=page.page, page_size=page.page_size)


def _without_size(batch: messages.Batch) -> dict[str, Any]:
    values = asdict(batch)
    del values["size"]
    return values


# ------------------------------------------------------------------------------------- single ones


class NewMessage(Model):
    """One message of the priority class, to a number or to a contact."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"phone": "+306944123456", "text": "Your code is 4711"}]}
    )
    phone: Phone | None = None
    contact_id: Id | None = None
    text: str = Field(min_length=1, max_length=TEXT_MOST)
    sender: SenderId | None = Field(None, description="null: the tenant's")
    reference: str | None = Field(None, min_length=1, max_length=200)
    on_unknown: Literal["hold", "resend"] = Field(
        "hold",
        description="Where nobody knows whether Mitto took it: wait for evidence, or risk sending it twice",
    )


class Queued(Model):
    """The message is on its way."""

    id: int
    status: Literal["queued"]


async def send_message(req: Request) -> Queued:
    body: NewMessage = req.body
    if (body.phone is None) == (body.contact_id is None):
        raise invalid("phone", body.phone, "a number, unless contactId is given: one of the two")
    try:
        text.check_text(body.text)
    except text.TextError as error:
        raise bad_text("text", body.text, error) from None
    phone = await _contacts_phone(req) if body.phone is None else read_phone(req, body.phone)
    message_id = await send_one(
        req, phone, body.text, body.sender, reference=body.reference, on_unknown=body.on_unknown
    )
    return Queued(id=message_id, status="queued")


async def get_message(req: Request) -> Message:
    return shape(await _message(req))


async def refresh_message(req: Request) -> Message:
    message = await _message(req)
    if message.provider_id is None or message.status != "accepted":
        return shape(message)
    await refresh.ask(req.ctx, [message.provider_id])
    return shape(await _message(req))


async def send_one(
    req: Request,
    phone: int,
    content: str,
    sender: str | None,
    *,
    reference: str | None = None,
    on_unknown: str = "hold",
) -> int:
    """Queues one message of the priority class with its hold, in one statement; returns its id. Raises 403, NO_SENDER
    and 402."""
    me = req.me
    if not me.active:
        raise inactive()
    sender = sender or me.sender
    if sender is None:
        raise no_sender()
    segments = text.segments(content).count
    message_id = await queue.add_message(
        req.connection,
        me.id,
        me.account_id,
        phone,
        content,
        sender,
        segments,
        reference=reference,
        on_unknown=on_unknown,
    )
    if message_id is None:
        raise await insufficient(req, segments)
    return message_id


async def _message(req: Request) -> messages.Message:
    message = await messages.get(req.db, req.me.id, req.id)
    if message is None:
        raise not_found(f"message {req.id}")
    return message


async def _contacts_phone(req: Request) -> int:
    contact_id = req.body.contact_id
    contact = await contacts.get(req.db, req.me.id, contact_id)
    if contact is None:
        raise invalid("contactId", contact_id, "the id of a contact; there is none with this")
    return contact.phone


_REMOVED = ((410, "MESSAGES_REMOVED"),)
ENDPOINTS = (
    Endpoint("GET", "/api/campaigns/{id}/messages", list_messages, "tenant", "Messages of a campaign",
             MessagesPage, query=MessagesQuery, errors=_REMOVED),
    Endpoint("GET", "/api/campaigns/{id}/batches", list_batches, "tenant", "Batches of a campaign",
             Listing[Batch], query=Page, errors=_REMOVED),
    Endpoint("POST", "/api/messages", send_message, "tenant", "Send one message", Queued, 202,
             body=NewMessage, idempotent=True,
             errors=((400, "NO_SENDER"), (402, "INSUFFICIENT_CREDITS"), (403, "INACTIVE_SUBSCRIPTION"))),
    Endpoint("GET", "/api/messages/{id}", get_message, "tenant", "One message", Message),
    Endpoint("POST", "/api/messages/{id}/refresh", refresh_message, "tenant",
             "Ask Mitto about one message", Message),
)  # fmt: skip
