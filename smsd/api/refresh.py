"""Asking Mitto again about accepted messages: one GET each, paced so that sending is not held up."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

from aiolimiter import AsyncLimiter

from smsd import messages, mitto, queue, tenants
from smsd.api.endpoint import Context
from smsd.mitto import FetchOutcome
from smsd.pace import Questions, TooLate
from smsd.queue import ReceiptRow

SECONDS_MOST = 10.0
SHARE = 0.2
"""Of an account's requests per second, what this process asks for at most."""
_AT_ONCE = 8
_THROTTLED_SECONDS = 1.0

_LIMITERS: WeakKeyDictionary[mitto.Client, dict[tuple[int, int], AsyncLimiter]] = (
    WeakKeyDictionary()
)


class Refreshed(NamedTuple):
    """`refreshed`: messages that Mitto told of; `updated`: those whose state moved."""

    refreshed: int
    updated: int


async def ask(ctx: Context, provider_ids: Sequence[str]) -> Refreshed:
    """Asks about each message, for SECONDS_MOST at most, and writes what is news. Holds no connection meanwhile."""
    deadline = mitto.clock() + SECONDS_MOST
    refreshed, rows = 0, list[ReceiptRow]()
    for account_id, ids in (await messages.by_account(ctx.pool, provider_ids)).items():
        asking = await _asking(ctx, account_id, ids, deadline)
        ended = await asyncio.gather(
            *(asking.work() for _ in range(min(_AT_ONCE, len(ids)))), return_exceptions=True
        )
        for error in ended:
            if error is not None:
                raise error
        refreshed += asking.found
        rows += asking.rows
    updated, _ = await queue.apply_receipts(ctx.pool, rows) if rows else (0, 0)
    return Refreshed(refreshed, updated)


@dataclass
class _Asking:
    """One call's questions about the messages of one account."""

    ctx: Context
    account: mitto.Account
    limiter: AsyncLimiter
    questions: Questions
    left: Iterator[str]
    deadline: float
    found: int = 0
    rows: list[ReceiptRow] = field(default_factory=list)

    async def work(self) -> None:
        """Asks about one after the other, until nothing or no time is left; several of these share a call."""
        for provider_id in self.left:
            if not await self._in_turn():
                return
            try:
                fetched = await self.questions.ask(self.account, provider_id, self.deadline)
            except TooLate:
                return
            if fetched.outcome is FetchOutcome.THROTTLED:
                self.deadline = 0
                seconds = fetched.retry_after_seconds or _THROTTLED_SECONDS
                await queue.block_account(self.ctx.pool, self.account.id, seconds)
            self.found += fetched.found
            if fetched.state is not None:
                self.rows.append(
                    ReceiptRow(
                        self.account.id, provider_id, int(fetched.state), None, fetched.description
                    )
                )

    async def _in_turn(self) -> bool:
        """Waits until this process may ask once more; False when that would be too late."""
        left_seconds = self.deadline - mitto.clock()
        if left_seconds <= 0:
            return False
        try:
            async with asyncio.timeout(left_seconds):
                await self.limiter.acquire()
        except TimeoutError:
            return False
        return True


async def _asking(
    ctx: Context, account_id: int, provider_ids: Sequence[str], deadline: float
) -> _Asking:
    row = await tenants.get_account(ctx.pool, account_id)
    assert row is not None
    shared_key = ctx.settings.mitto_api_key
    api_key = row.api_key or (shared_key.get_secret_value() if shared_key else "")
    return _Asking(
        ctx=ctx,
        account=mitto.Account(row.id, row.provider_id, api_key, row.server_error_means),
        limiter=_limiter(ctx, row.id, row.requests_per_second),
        questions=Questions(ctx.pool, ctx.mitto, ctx.settings.requests_per_second),
        left=iter(provider_ids),
        deadline=deadline,
    )


def _limiter(ctx: Context, account_id: int, requests_per_second: int) -> AsyncLimiter:
    """One a process and account; of one request at a time, so that none of them come in a burst."""
    limiters = _LIMITERS.setdefault(ctx.mitto, {})
    key = (account_id, requests_per_second)
    if key not in limiters:
        limiters[key] = AsyncLimiter(1, 1 / (SHARE * requests_per_second))
    return limiters[key]
