"""What the tests of the queue and of the loops around it share: more than one shop, a clock that is moved by hand,
and the audit as their oracle."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from shop import Shop

from smsd import audit, credits, database, tenants

GUARD_US = 35_000
SECOND_US = 1_000_000


async def new_account(pool: database.Pool, provider_id: str = "main", **fields: Any) -> int:
    """A traffic account, unlimited for a test's purposes; its id."""
    given: dict[str, Any] = {
        "name": provider_id, "api_key": "key", "requests_per_second": 50_000, "messages_per_second": None,
        "max_in_flight": None, "webhook_secret": None, "server_error_means": "refused",
    }  # fmt: skip
    async with pool.acquire() as connection, connection.transaction():
        account = await tenants.create_account(
            connection, provider_id=provider_id, **(given | fields)
        )
    return account.id


async def open_shop(
    pool: database.Pool, account_id: int, replica_id: int, granted: int = 10_000, **fields: Any
) -> Shop:
    """One more tenant on an account, whose messages get ids and numbers that no other shop has."""
    given: dict[str, Any] = {
        "name": "Shop", "sender": "Shop", "requests_per_second": 50_000, "messages_per_second": None, "weight": 1.0,
        "batch_size": None, "subscription": "active", "timezone": "UTC", "default_country": "GR",
    }  # fmt: skip
    async with pool.acquire() as connection, connection.transaction():
        tenant = await tenants.create_tenant(connection, account_id=account_id, **(given | fields))
        await credits.grant(connection, tenant.id, granted, "test")
    shop = Shop(pool, tenant.id, account_id, replica_id)
    shop.provider_ids = tenant.id * 1_000_000
    shop.phones += tenant.id * 1_000_000
    return shop


async def broken(pool: database.Pool) -> dict[str, str | None]:
    """The promises that the audit finds broken, each with its example."""
    async with pool.acquire() as connection:
        return {check.name: check.example for check in await audit.run(connection) if check.broken}


async def assert_sound(pool: database.Pool) -> None:
    """The audit finds nothing."""
    assert await broken(pool) == {}


async def eventually(
    news: asyncio.Event, holds: Callable[[], Awaitable[object]], seconds: float = 20
) -> None:
    """Returns once something holds; looks whenever `news` comes."""
    async with asyncio.timeout(seconds):
        while True:
            news.clear()
            if await holds():
                return
            await news.wait()


class Clock:
    """The limiter's clock of one database, moved by hand."""

    def __init__(self, pool: database.Pool, now_us: int) -> None:
        self.pool, self.now_us = pool, now_us

    async def move(self, us: int) -> None:
        """Goes on by so many microseconds, or back."""
        self.now_us += us
        await self.pool.execute("update hand_clock set us = $1", self.now_us)


async def take_the_clock(pool: database.Pool) -> Clock:
    """From now on the limiters of this database go by our clock, which starts at the present."""
    now_us = await pool.fetchval("select clock_us()")
    await pool.execute(
        f"create table hand_clock as select {now_us}::bigint as us;"
        "create or replace function clock_us() returns bigint language sql volatile as"
        " $$ select us from hand_clock $$"
    )
    return Clock(pool, now_us)


def largest_window(costs: list[tuple[int, int]], width_us: int) -> int:
    """The most cost that any window [t, t + width) over (time, cost) holds."""
    ordered = sorted(costs)
    largest = inside = oldest = 0
    for at, cost in ordered:
        inside += cost
        while at >= ordered[oldest][0] + width_us:
            inside -= ordered[oldest][1]
            oldest += 1
        largest = max(largest, inside)
    return largest
