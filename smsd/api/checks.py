"""What several handlers check, and how they refuse."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from pydantic import Field

from smsd import campaigns, text
from smsd import credits as money
from smsd.api.endpoint import Request
from smsd.api.errors import ApiError, not_found, shown
from smsd.campaigns import Campaign

Phone = Annotated[
    str,
    Field(min_length=3, max_length=40, description="E.164, or national of the default country"),
]


async def campaign_of(req: Request) -> Campaign:
    """The campaign of the path's {id}; 404 if the tenant has none of that id."""
    campaign = await campaigns.get(req.db, req.me.id, req.id)
    if campaign is None:
        raise not_found(f"campaign {req.id}")
    return campaign


async def locked(req: Request) -> Campaign:
    """The same, and nobody else decides about it before this transaction ends."""
    campaign = await campaigns.lock(req.connection, req.me.id, req.id)
    if campaign is None:
        raise not_found(f"campaign {req.id}")
    return campaign


@contextmanager
def kept() -> Iterator[None]:
    """Turns MessagesRemoved into 410 MESSAGES_REMOVED."""
    try:
        yield
    except campaigns.MessagesRemoved as error:
        raise ApiError(
            410,
            "MESSAGES_REMOVED",
            f"{error}; the campaign's totals and its certificate are still there",
            {"removedAt": error.removed_at},
        ) from None


def with_messages(campaign: Campaign) -> Campaign:
    """The campaign; 410 if its messages are removed."""
    with kept():
        if campaign.removed_at is not None:
            raise campaigns.MessagesRemoved(campaign.removed_at)
    return campaign


@contextmanager
def refused(done: str) -> Iterator[None]:
    """Turns WrongStatus into 409 INVALID_STATUS."""
    try:
        yield
    except campaigns.WrongStatus as error:
        raise ApiError(
            409, "INVALID_STATUS", f"{error}: it cannot be {done} now", currentStatus=error.status
        ) from None


def read_phone(req: Request, value: str) -> int:
    """A phone number of the caller's as E.164 digits; 400 if it is none."""
    try:
        return text.normalise_phone(value, req.me.default_country)
    except text.InvalidPhone as error:
        details = _detail("phone", value, error)
        raise ApiError(400, "VALIDATION_ERROR", f"phone: {error}", details) from None


def bad_text(field: str, value: str, error: text.TextError) -> ApiError:
    """400 for a text that cannot be stored or sent."""
    return ApiError(400, "VALIDATION_ERROR", f"{field}: {error}", _detail(field, value, error))


def _detail(field: str, value: str, error: Exception) -> list[dict[str, object]]:
    return [{"field": field, "value": shown(value), "takes": str(error)}]


def inactive() -> ApiError:
    """403: the tenant may not send."""
    return ApiError(
        403,
        "INACTIVE_SUBSCRIPTION",
        "the subscription is inactive; nothing can be sent until it is active",
    )


def no_sender() -> ApiError:
    """400: nobody said whom the message is from."""
    return ApiError(400, "NO_SENDER", "there is no sender: give one here, or set the tenant's")


async def insufficient(req: Request, required: int) -> ApiError:
    """402, with what is needed and what there is."""
    state = await money.balance(req.db, req.me.id)
    return ApiError(
        402,
        "INSUFFICIENT_CREDITS",
        f"this needs {required} credits and {state.available} are available; top up and try again",
        {"required": required, "available": state.available},
    )
