"""Money: what a tenant has, what is held for messages on their way, and the ledger that explains both.

One credit is one segment. Credits are held when a campaign is enqueued, spent when Mitto accepts, released when a
message will not be sent; claim and settle move them in the database, by the same function as here.
"""

from datetime import datetime
from typing import NamedTuple

from smsd import database
from smsd.database import Connection, Executor

SQL = database.queries("credits")


class Credits(NamedTuple):
    """balance: granted and not spent; reserved: the part of it that is held."""

    balance: int
    reserved: int

    @property
    def available(self) -> int:
        """What can still be held."""
        return self.balance - self.reserved


class Entry(NamedTuple):
    """One movement. kind: grant | hold | spend | release."""

    id: int
    at: datetime
    kind: str
    amount: int
    campaign_id: int | None
    batch_id: int | None
    reason: str | None
    balance_after: int
    reserved_after: int


async def balance(db: Executor, tenant_id: int) -> Credits:
    """A tenant's credits; nothing for a tenant that does not exist."""
    row = await db.fetchrow(SQL["balance"], tenant_id)
    return Credits(**row) if row else Credits(0, 0)


async def grant(db: Connection, tenant_id: int, amount: int, reason: str) -> Credits | None:
    """Adds credits, pays with them what is overdue, and lets campaigns go on that had stopped for want of them.
    None: no such tenant."""
    await db.execute(SQL["lock_campaigns"], tenant_id)
    await db.execute(SQL["lock_expansions"], tenant_id)
    if not await _move(db, tenant_id, "grant", amount, 0, reason):
        return None
    overdue = await db.fetchval(SQL["payable"], tenant_id)
    if overdue > 0:
        await _move(db, tenant_id, "hold", overdue, 0, "overdue")
        await _move(db, tenant_id, "spend", overdue, 0, "overdue")
        await db.execute(SQL["pay_overdue"], tenant_id, overdue)
    await db.execute(SQL["resume_campaigns"], tenant_id)
    await db.execute(SQL["leave_to_subscription"], tenant_id)
    return await balance(db, tenant_id)


async def hold(db: Executor, tenant_id: int, amount: int, campaign_id: int, reason: str) -> bool:
    """Reserves credits; False, and nothing changed, when fewer are available."""
    return await _move(db, tenant_id, "hold", amount, campaign_id, reason)


async def release(db: Executor, tenant_id: int, amount: int, campaign_id: int, reason: str) -> None:
    """Gives back credits that were held for a campaign and will not be spent."""
    await _move(db, tenant_id, "release", amount, campaign_id, reason)


async def ledger(db: Executor, tenant_id: int, limit: int, offset: int) -> tuple[list[Entry], int]:
    """A page of a tenant's ledger, newest first, and how many entries there are in all."""
    rows = await db.fetch(SQL["list_ledger"], tenant_id, limit, offset)
    return [Entry(**row) for row in rows], await db.fetchval(SQL["count_ledger"], tenant_id)


async def _move(
    db: Executor, tenant_id: int, kind: str, amount: int, campaign_id: int, reason: str
) -> bool:
    return bool(await db.fetchval(SQL["move"], tenant_id, kind, amount, campaign_id, reason))
