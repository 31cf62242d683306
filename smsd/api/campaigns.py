"""Campaigns before they are sent: drafts, and recipients uploaded for one of them."""

from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field

from smsd import campaigns, contacts, csvfile, recipients, text
from smsd.api.checks import bad_text, campaign_of, locked, refused
from smsd.api.endpoint import Answer, Endpoint, Listing, Model, Page, Request
from smsd.api.errors import ApiError, invalid, not_found
from smsd.api.models import Id, Name, SenderId
from smsd.campaigns import Campaign
from smsd.database import Connection
from smsd.model import CampaignStatus

ERRORS_MOST = 100
UPLOAD_BYTES = 50_000_000
PIECE_BYTES = 1 << 16
UNCHANGED: Any = None
"""The default of a field that a PUT leaves as it is."""


def _url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or any(c <= " " for c in value):
        raise ValueError("takes a link, http:// or https://")
    return value


Link = Annotated[str, Field(max_length=2000), AfterValidator(_url)]
Lists = Annotated[list[Id], Field(max_length=100)]
Gender = Literal["male", "female", "other", "prefer_not_to_say"]
AgeGroup = Literal["18_24", "25_39", "40_plus"]


# ------------------------------------------------------------------------------------------ shapes


class _Content(Model):
    """What a person sets of a campaign."""

    message_text: str | None = Field(
        None,
        max_length=text.SOURCE_LIMIT,
        description="With merge tags: {{firstName}}, {{attribute}}, {{name|default}}, {{link}}, {{unsubscribeUrl}}",
    )
    sender: SenderId | None = Field(None, description="null: the tenant's")
    message_type: Literal["marketing", "service"] = Field(
        "marketing", description="A marketing text gets the unsubscribe link appended"
    )
    link_url: Link | None = Field(None, description="What {{link}} stands for")
    list_ids: Lists = Field([], description="Contacts of these lists; empty: all subscribed")
    exclude_list_ids: Lists = Field([], description="But not of these")
    filter_gender: Gender | None = None
    filter_age_group: AgeGroup | None = None
    template_id: Id | None = Field(None, description="Not part of this version yet")
    scheduled_at: str | None = Field(None, description="Not part of this version yet")
    scheduled_date: str | None = Field(None, description="Not part of this version yet")
    scheduled_time: str | None = Field(None, description="Not part of this version yet")


class NewCampaign(_Content):
    """A draft. Without lists and filters it is for all subscribed contacts."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "Spring sale", "messageText": "Hi {{firstName|there}}, 20% off!"}]
        }
    )
    name: Name


class CampaignChange(_Content):
    """What is to be different; the rest stays."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "Summer sale"}]})
    name: Name = UNCHANGED
    message_type: Literal["marketing", "service"] = UNCHANGED
    list_ids: Lists = UNCHANGED
    exclude_list_ids: Lists = UNCHANGED


class Stats(Model):
    """Messages by what became of them. `sent`: accepted by Mitto and not known to have failed."""

    sent: int
    delivered: int
    failed: int
    pending_delivery: int


class CampaignAnswer(Model):
    """A campaign."""

    id: int
    name: str
    message_text: str | None
    sender: str | None
    message_type: Literal["marketing", "service"]
    link_url: str | None
    list_ids: list[int]
    exclude_list_ids: list[int]
    filter_gender: Gender | None
    filter_age_group: AgeGroup | None
    status: CampaignStatus
    paused_reason: str | None
    paused_detail: str | None
    created_at: datetime
    updated_at: datetime
    scheduled_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    messages_removed_at: datetime | None = Field(
        description="Since when only totals and certificate are left of its messages"
    )
    stats: Stats


def _shape(campaign: Campaign, stats: campaigns.Stats) -> CampaignAnswer:
    values = asdict(campaign)
    del values["tenant_id"]
    return CampaignAnswer(
        message_text=values.pop("text"), messages_removed_at=values.pop("removed_at"),
        stats=Stats(**stats._asdict()), **values,
    )  # fmt: skip


_LATER = ("template_id", "scheduled_at", "scheduled_date", "scheduled_time")


# ------------------------------------------------------------------------------------------ drafts


async def create(req: Request) -> CampaignAnswer:
    content = await _content(req, req.body.model_dump())
    campaign = await campaigns.create(req.db, req.me.id, content.pop("name"), content)
    return _shape(campaign, await campaigns.stats(req.db, campaign.id))


async def list_campaigns(req: Request) -> Listing[CampaignAnswer]:
    query: CampaignsQuery = req.query
    found, total = await campaigns.list_page(
        req.db, req.me.id, query.q or None, query.status, query.page_size, query.offset
    )
    items = [_shape(campaign, stats) for campaign, stats in found]
    return Listing[CampaignAnswer](
        items=items, total=total, page=query.page, page_size=query.page_size
    )


async def get(req: Request) -> CampaignAnswer:
    campaign = await campaign_of(req)
    return _shape(campaign, await campaigns.stats(req.db, campaign.id))


async def change(req: Request) -> CampaignAnswer:
    campaign = await locked(req)
    with refused("changed"):
        if not campaign.unsent:
            raise campaigns.WrongStatus(campaign.status)
    changes = await _content(req, req.body.model_dump(exclude_unset=True))
    campaign = await campaigns.update(req.connection, campaign, changes)
    return _shape(campaign, await campaigns.stats(req.db, campaign.id))


async def delete(req: Request) -> None:
    campaign = await locked(req)
    with refused("deleted"):
        await campaigns.delete(req.connection, campaign)


class CampaignsQuery(Page):
    """Which campaigns: `q` is a part of the name."""

    q: str | None = Field(None, max_length=200)
    status: Literal[
        "draft", "scheduled", "sending", "paused", "completed", "failed", "cancelled"
    ] | None = None  # fmt: skip


async def _content(req: Request, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a body by their names in the room, checked as far as a draft must be right."""
    for field in _LATER:
        if values.pop(field, None) is not None:
            name = type(req.body).model_fields[field].alias
            raise ApiError(
                501, "NOT_IMPLEMENTED", f"{name} is not part of this version yet", {"field": name}
            )
    for field in ("list_ids", "exclude_list_ids"):
        if unknown := await campaigns.unknown_lists(
            req.connection, req.me.id, values.get(field, [])
        ):
            name = type(req.body).model_fields[field].alias
            raise invalid(str(name), unknown[0], "ids of lists; there is none with this")
    if "message_text" in values:
        values["text"] = values.pop("message_text")
        if values["text"] is not None:
            _check_template(values["text"])
    return values


def _check_template(source: str) -> None:
    """400 for a text that cannot be stored or sent, with the link that may be appended."""
    try:
        text.Template(text.with_unsubscribe(source))
    except text.TextError as error:
        raise bad_text("messageText", source, error) from None


# ------------------------------------------------------------------------------------------ recipients


class BadRecipient(Model):
    """A line that could not be read."""

    line: int
    value: str
    message: str


class Added(Model):
    """What an upload of recipients came to; `errors` has the first 100."""

    added: int
    duplicates: int
    invalid: int
    errors: list[BadRecipient]


async def add_recipients(req: Request) -> Answer:
    await campaign_of(req)
    content_type, charset = _format(req)
    # Whole, before the transaction: one must not wait for a slow upload.
    body = await _upload(req)

    async def add() -> Added:
        campaign = await campaigns.lock(req.connection, req.me.id, req.id)
        if campaign is None:
            raise not_found(f"campaign {req.id}")
        _check_draft(campaign)
        added = Added(added=0, duplicates=0, invalid=0, errors=[])
        blocks = recipients.parse(_pieces(body), content_type, charset, req.me.default_country)
        try:
            async for block in blocks:
                await _add_block(req.connection, campaign, block, added)
        except csvfile.HeaderError as error:
            details = [{"field": "body", "value": error.value, "takes": str(error)}]
            raise ApiError(400, "VALIDATION_ERROR", str(error), details) from None
        return added

    return await req.once(add)


async def _add_block(
    db: Connection, campaign: Campaign, block: recipients.Block, added: Added
) -> None:
    part = await contacts.add_recipients(db, campaign.id, block.recipients)
    kept = sum(one.phone is None for one in block.recipients)
    added.added += part.added
    added.duplicates += part.duplicates
    added.invalid += part.invalid + len(block.errors) - kept
    room = ERRORS_MOST - len(added.errors)
    added.errors += [BadRecipient(**one._asdict()) for one in block.errors[:room]]


def _check_draft(campaign: Campaign) -> None:
    with refused("given more recipients"):
        if not campaign.unsent:
            raise campaigns.WrongStatus(campaign.status)


def _format(req: Request) -> tuple[str, str]:
    """The content type and charset of an upload; 415 where they are not taken."""
    content_type, charset = req.raw.content_type, req.raw.charset or "utf-8"
    if content_type not in recipients.FORMATS:
        taken = ", ".join(recipients.FORMATS)
        raise ApiError(
            415, "UNSUPPORTED_MEDIA_TYPE", f"Content-Type: got {content_type}; taken are {taken}"
        )
    if not csvfile.CHARSETS.fullmatch(charset):
        raise ApiError(
            415,
            "UNSUPPORTED_MEDIA_TYPE",
            f"charset: got {charset}; taken are utf-8, iso-8859-7 and the like",
        )
    return content_type, charset


async def _upload(req: Request) -> bytes:
    too_large = ApiError(
        413, "PAYLOAD_TOO_LARGE", f"the body is larger than {UPLOAD_BYTES} bytes; send it in parts"
    )
    if (req.raw.content_length or 0) > UPLOAD_BYTES:
        raise too_large
    body = bytearray()
    async for chunk in req.chunks():
        body += chunk
        if len(body) > UPLOAD_BYTES:
            raise too_large
    return bytes(body)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]


_ONE = "/api/campaigns/{id}"
_STATUS = ((409, "INVALID_STATUS"),)
_LATER_ERRORS = ((501, "NOT_IMPLEMENTED"),)

ENDPOINTS = (
    Endpoint("POST", "/api/campaigns", create, "tenant", "New campaign, a draft", CampaignAnswer, 201,
             body=NewCampaign, transaction=True, idempotent=True, errors=_LATER_ERRORS),
    Endpoint("GET", "/api/campaigns", list_campaigns, "tenant", "Campaigns, newest first",
             Listing[CampaignAnswer], query=CampaignsQuery),
    Endpoint("GET", _ONE, get, "tenant", "One campaign", CampaignAnswer),
    Endpoint("PUT", _ONE, change, "tenant", "Change a campaign that was not sent yet", CampaignAnswer,
             body=CampaignChange, transaction=True, errors=(*_STATUS, *_LATER_ERRORS)),
    Endpoint("DELETE", _ONE, delete, "tenant", "Delete a campaign that was not sent yet", None, 204,
             transaction=True, errors=_STATUS),
    Endpoint("POST", _ONE + "/recipients", add_recipients, "tenant",
             "Recipients of this campaign alone, as NDJSON or CSV, instead of stored contacts", Added,
             raw_body=True, transaction=True, idempotent=True, errors=(*_STATUS, (413, "PAYLOAD_TOO_LARGE"), (415, "UNSUPPORTED_MEDIA_TYPE"))),
)  # fmt: skip
