"""A tenant's credits: what it has, and the ledger that explains it."""

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict, Field

from smsd import credits as money
from smsd.api.endpoint import Endpoint, Listing, Model, Page, Request


class Credits(Model):
    """One credit is one segment. balance = granted - spent; available = balance - reserved."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"balance": 1000, "reserved": 120, "available": 880}]}
    )
    balance: int
    reserved: int
    available: int


class LedgerEntry(Model):
    """One movement, with balance and reserved as they were after it."""

    id: int
    at: datetime
    kind: Literal["grant", "hold", "spend", "release"]
    amount: int
    campaign_id: int | None = Field(description="None for single messages and grants")
    batch_id: int | None
    reason: str | None
    balance_after: int
    reserved_after: int


def shape(state: money.Credits) -> Credits:
    """The answer of a balance."""
    return Credits(balance=state.balance, reserved=state.reserved, available=state.available)


async def get_credits(req: Request) -> Credits:
    return shape(await money.balance(req.db, req.me.id))


async def get_ledger(req: Request) -> Listing[LedgerEntry]:
    page: Page = req.query
    entries, total = await money.ledger(req.db, req.me.id, page.page_size, page.offset)
    items = [LedgerEntry(**entry._asdict()) for entry in entries]
    return Listing[LedgerEntry](items=items, total=total, page=page.page, page_size=page.page_size)


ENDPOINTS = (
    Endpoint("GET", "/api/credits", get_credits, "tenant", "Balance", Credits),
    Endpoint(
        "GET", "/api/credits/ledger", get_ledger, "tenant", "Every movement of credits, newest first",
        Listing[LedgerEntry], query=Page,
    ),
)  # fmt: skip
