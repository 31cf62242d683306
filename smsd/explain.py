"""The facts behind why work waits, read in one snapshot by a few set-based queries; `causes` says what follows.

Whether a replica is alive is told from the database's clock: good enough for an explanation, and never used to
decide anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from smsd import causes, database
from smsd.causes import Account, Campaign, Cause, Depth, Installation, Lane
from smsd.config import Settings
from smsd.database import Connection, Executor, Pool

SQL = database.queries("explain")

ACCOUNTS_MOST = 500


@dataclass(frozen=True, slots=True)
class Replica:
    """A registration of a process. `leased`: batches that it holds and that have not left, `sending`: at Mitto."""

    id: int
    name: str
    version: str
    started_at: datetime
    beat_at: datetime
    gone_at: datetime | None
    gone_reason: str | None
    alive: bool
    leased: int
    sending: int


class Figures(NamedTuple):
    """The database at one moment, in figures that have no tenant."""

    now: datetime
    replicas: int
    oldest_snapshot_seconds: float
    depths: list[Depth]


class Explanation(NamedTuple):
    campaign: Campaign
    causes: list[Cause]


class Queue(NamedTuple):
    """Every account with its depths and causes, and a page of lanes with theirs; `total` lanes in all."""

    now: datetime
    accounts: list[tuple[Account, list[Depth], list[Cause]]]
    lanes: list[tuple[Lane, list[Cause]]]
    total: int


# ------------------------------------------------------------------------------------------- reading


async def campaign(
    pool: Pool, settings: Settings, tenant_id: int, campaign_id: int
) -> Explanation | None:
    """A tenant's campaign and why its work waits; None where the tenant has none of this id."""
    async with pool.acquire() as db, db.transaction(isolation="repeatable_read", readonly=True):
        row = await db.fetchrow(SQL["campaign"], campaign_id, tenant_id)
        if row is None:
            return None
        found = Campaign(**row)
        house = await _installation(db, settings)
        lanes = await _lanes(db, campaign_id, None, 1, 0)
        accounts = await _accounts(db, settings, [lane.account_id for lane in lanes])
    lane = lanes[0] if lanes else None
    account = accounts[lane.account_id] if lane else None
    return Explanation(found, causes.of_campaign(house, account, lane, found))


async def queue(
    pool: Pool, settings: Settings, account_id: int | None, limit: int, offset: int
) -> Queue:
    """What is open, of one account or of all, and why it waits; a page of its lanes."""
    wanted = None if account_id is None else [account_id]
    async with pool.acquire() as db, db.transaction(isolation="repeatable_read", readonly=True):
        house = await _installation(db, settings)
        accounts = await _accounts(db, settings, wanted)
        lanes = await _lanes(db, None, account_id, limit, offset)
        total = await db.fetchval(SQL["count_lanes"], account_id)
        found = await depths(db)
    by_account = {
        account.id: [depth for depth in found if depth.account_id == account.id]
        for account in accounts.values()
    }
    return Queue(
        house.now,
        [
            (
                account,
                by_account[account.id],
                causes.of_account(house, account, by_account[account.id]),
            )
            for account in accounts.values()
        ],
        [(lane, causes.of_lane(house, accounts.get(lane.account_id), lane)) for lane in lanes],
        total,
    )


async def depths(db: Executor) -> list[Depth]:
    """How much is open in each account, by kind."""
    return [Depth(**row) for row in await db.fetch(SQL["depths"])]


async def replicas(
    pool: Pool, settings: Settings, alive: bool | None, limit: int, offset: int
) -> tuple[list[Replica], int]:
    """A page of registrations, newest first, and how many there are; `alive` None: all."""
    lease = settings.lease_seconds
    rows = await pool.fetch(SQL["replicas"], alive, lease, limit, offset)
    total = await pool.fetchval(SQL["count_replicas"], alive, lease)
    return [Replica(**row) for row in rows], total


async def figures(pool: Pool, settings: Settings) -> Figures:
    """What stands in the database at this moment."""
    async with pool.acquire() as db:
        row = await db.fetchrow(SQL["figures"], settings.lease_seconds)
        assert row is not None
        return Figures(row["now"], row["replicas"], row["oldest_snapshot"], await depths(db))


async def open_breaker(
    db: Executor, replica_id: int, account_id: int, missed: int, detail: str, seconds: float
) -> None:
    """This replica could not reach Mitto `missed` times in a row, and tries the account again in so many seconds."""
    await db.execute(SQL["open_breaker"], replica_id, account_id, missed, detail, seconds)


async def close_breaker(db: Executor, replica_id: int, account_id: int) -> None:
    """This replica reaches Mitto again."""
    await db.execute(SQL["close_breaker"], replica_id, account_id)


async def _installation(db: Connection, settings: Settings) -> Installation:
    row = await db.fetchrow(SQL["installation"], settings.lease_seconds)
    assert row is not None
    return Installation(
        **row,
        requests_per_second=settings.requests_per_second,
        unknown_after=timedelta(seconds=settings.unknown_after),
    )


async def _accounts(
    db: Connection, settings: Settings, ids: Sequence[int] | None
) -> dict[int, Account]:
    rows = await db.fetch(SQL["accounts"], ids, settings.lease_seconds, ACCOUNTS_MOST)
    return {row["id"]: Account(**row) for row in rows}


async def _lanes(
    db: Connection, campaign_id: int | None, account_id: int | None, limit: int, offset: int
) -> list[Lane]:
    rows = await db.fetch(SQL["lanes"], campaign_id, account_id, limit, offset)
    return [Lane(**row) for row in rows]
