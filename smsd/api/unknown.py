"""A person's word on messages of which nobody knows whether Mitto took them.

Evidence outranks it: what turns out later to be at Mitto becomes accepted and is paid, whatever was said here.
"""

from datetime import datetime
from typing import Literal, cast

from pydantic import AwareDatetime, ConfigDict, Field

from smsd import evidence
from smsd.api.checks import campaign_of, locked, with_messages
from smsd.api.endpoint import Endpoint, Model, Request
from smsd.api.errors import ApiError, invalid
from smsd.api.models import Id
from smsd.model import CampaignStatus

Outcome = Literal["several", "taken", "sending"]
MESSAGES_MOST = 10_000
LISTED_MOST = 100


class Verdict(Model):
    """What to take unknown messages for, and which: by their ids, of one batch, or of attempts that ended before a
    time."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"as": "failed", "olderThan": "2026-11-20T09:00:00Z"}]}
    )
    as_: Literal["sent", "failed", "resend"] = Field(
        alias="as",
        description="sent: accepted and paid; failed: refused, its credits come back; resend: posted once more, even if "
        "Mitto has it already",
    )
    message_ids: list[Id] | None = Field(None, min_length=1, max_length=MESSAGES_MOST)
    batch_id: Id | None = None
    older_than: AwareDatetime | None = None


class Resolved(Model):
    """How many messages it was about; those that are not unknown stay as they are."""

    resolved: int


class Undecided(Model):
    """An id of Mitto's that a receipt brought, and the messages that it may belong to."""

    provider_message_id: str
    verdict: Outcome = Field(
        description="several: more than one fits; taken: the one that fits has another id, or is sent again; sending: an "
        "attempt is still under way"
    )
    candidates: list[int]
    received_at: datetime


class UndecidedList(Model):
    """What evidence could not tell apart, at most 100 ids."""

    items: list[Undecided]


async def resolve(req: Request) -> Resolved:
    body: Verdict = req.body
    which = _selection(body)
    campaign = with_messages(await locked(req))
    if body.as_ == "resend" and campaign.status is CampaignStatus.CANCELLED:
        raise ApiError(
            409,
            "INVALID_STATUS",
            "the campaign is cancelled: nothing of it is sent again; take sent or failed",
            currentStatus=campaign.status,
        )
    settings = req.ctx.settings
    wait_seconds = settings.mitto_timeout + settings.lease_seconds + evidence.GRACE_SECONDS
    try:
        resolved = await evidence.give_verdict(
            req.connection, campaign.id, body.as_, which, wait_seconds
        )
    except evidence.TooEarly as error:
        raise ApiError(
            409,
            "TOO_EARLY",
            f"{error}: send it again after that, or it might arrive twice for certain",
            {"notBefore": error.until},
        ) from None
    req.after_commit.append(lambda: req.ctx.nudge("housekeeping"))
    return Resolved(resolved=resolved)


async def list_undecided(req: Request) -> UndecidedList:
    campaign = with_messages(await campaign_of(req))
    found = await evidence.undecided(req.db, campaign.id, LISTED_MOST)
    return UndecidedList(
        items=[
            Undecided.model_construct(
                provider_message_id=one.provider_id,
                verdict=cast("Outcome", one.verdict),
                candidates=one.candidates,
                received_at=one.received_at,
            )
            for one in found
        ]
    )


def _selection(body: Verdict) -> evidence.Selection:
    given = [
        name
        for name, value in (
            ("messageIds", body.message_ids),
            ("batchId", body.batch_id),
            ("olderThan", body.older_than),
        )
        if value is not None
    ]
    if len(given) != 1:
        takes = "a value, unless batchId or olderThan is given: exactly one of the three"
        raise invalid("messageIds", body.message_ids, takes)
    return evidence.Selection(body.message_ids, body.batch_id, body.older_than)


_UNKNOWN = "/api/campaigns/{id}/unknown"
ENDPOINTS = (
    Endpoint("POST", _UNKNOWN, resolve, "tenant", "Decide what became of unknown messages", Resolved,
             body=Verdict, transaction=True, idempotent=True, errors=((409, "INVALID_STATUS"), (409, "TOO_EARLY"), (410, "MESSAGES_REMOVED"))),
    Endpoint("GET", _UNKNOWN, list_undecided, "tenant", "Ids of Mitto's that may belong to several messages",
             UndecidedList, errors=((410, "MESSAGES_REMOVED"),)),
)  # fmt: skip
