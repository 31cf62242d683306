"""The sender: per traffic account one claiming loop, and a coroutine for each batch on its way.

A batch's way: claim (slot and lease) → wait → intent (durable) → wait for the slot → gate → POST → settle. No
connection to Postgres is held while Mitto has the request. What happened is written even while we are told to stop;
what has not left when we stop is given back.
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import asyncpg
import structlog

from smsd import database, faults, mitto, queue
from smsd.config import Settings
from smsd.database import Pool
from smsd.model import Outcome

log = structlog.get_logger()

PRIORITY_PLACES = 2
"""Places of an account kept for single messages."""
REPLICA_IN_FLIGHT = 256
"""Requests in flight of the whole process; no account takes more than half, so that one that hangs stops no other."""
MESSAGES_IN_FLIGHT = 20_000
"""Messages in memory per account; bounds what a very high limit would claim ahead."""
SLOW_LOOK_SECONDS = 1.0
LEAD_SECONDS_LEAST, LEAD_SECONDS_MOST = 0.004, 0.06
BREAKER_AFTER = 3
BREAKER_SECONDS_MOST = 30.0
THROTTLE_SECONDS, THROTTLE_SECONDS_MOST = 1.0, 60.0


class Recent:
    """The last measurements of something, and their percentiles."""

    def __init__(self, first: float, size: int = 200) -> None:
        self._values: deque[float] = deque([first], maxlen=size)

    def add(self, value: float) -> None:
        self._values.append(value)

    def percentile(self, share: float) -> float:
        """The value below which `share` (0 to 1) of the recent ones lie."""
        ordered = sorted(self._values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Sender:
    """Sends for every traffic account that has a lane."""

    def __init__(
        self,
        pool: Pool,
        client: mitto.Client,
        standing: queue.Standing,
        settings: Settings,
        on_settled: Callable[[], None],
    ) -> None:
        self._pool, self._client, self._standing, self._settings = pool, client, standing, settings
        self._on_settled = on_settled
        self._clock = queue.DatabaseClock()
        self._intent_seconds = Recent(0.01)
        self._accounts: dict[int, _Account] = {}
        self._loops: dict[int, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()
        self._look = asyncio.Event()

    def wake(self, account_id: int | None) -> None:
        """News: a lane of this account became non-empty. None: anything may have happened."""
        account = self._accounts.get(account_id) if account_id is not None else None
        if account is not None:
            account.news.set()
            return
        self._look.set()
        if account_id is None:
            for each in self._accounts.values():
                each.news.set()

    async def run(self) -> None:
        """Keeps a claiming loop per account until `stop`."""
        while not self._stopping.is_set():
            self._look.clear()
            try:
                await self._read_accounts()
            except database.AWAY as error:
                log.warning("accounts.read_failed", error=repr(error))
            for account_id, loop in list(self._loops.items()):
                if loop.done():
                    del self._loops[account_id]
                    loop.result()
            await _first_of(SLOW_LOOK_SECONDS, self._look, self._stopping)

    async def _read_accounts(self) -> None:
        for row in await queue.accounts(self._pool):
            self._meet(row)

    def _meet(self, row: queue.AccountRow) -> None:
        account = self._accounts.get(row.id)
        if account is None:
            account = self._accounts[row.id] = _Account(row, self._settings)
        account.row = row
        if row.id not in self._loops:
            self._loops[row.id] = asyncio.create_task(
                self._claim_for(account), name=f"account {row.id}"
            )

    async def stop(self) -> None:
        """Claims nothing more, gives back what has not left, and returns when all that left is written."""
        self._stopping.set()
        await asyncio.gather(*self._loops.values(), return_exceptions=True)
        for account in self._accounts.values():
            while account.sending:
                await asyncio.wait(account.sending)

    # ---------------------------------------------------------------------------------------- claim

    async def _claim_for(self, account: "_Account") -> None:
        while not self._stopping.is_set():
            account.news.clear()
            want, priority_only = account.room()
            if not want or not self._standing.replica_id:
                await _first_of(account.closed_seconds(), account.news, self._stopping)
                continue
            pause = SLOW_LOOK_SECONDS
            try:
                pause = await self._claim_once(account, want, priority_only)
            except database.AWAY as error:
                log.warning("claim.failed", account=account.row.id, error=repr(error))
            if pause > 0:
                await _first_of(pause, account.news, self._stopping)

    async def _claim_once(self, account: "_Account", want: int, priority_only: bool) -> float:
        """One claim; returns how long to wait for news before the next."""
        faults.point("claim.asking")
        before = mitto.clock()
        claim = await queue.claim(
            self._pool,
            account.row.id,
            self._standing.replica_id,
            want,
            lead_us=int(self._lead_seconds() * 1e6),
            all_limit=self._settings.requests_per_second,
            priority_only=priority_only,
        )
        after = mitto.clock()
        self._clock.observe(before, after, claim.now_us)
        if claim.grants:
            faults.point("claim.granted")
        for grant in claim.grants:
            account.start(grant, self._send(account, grant))
        if claim.grants:
            return 0.0
        if claim.waits_for == "replica_gone":
            self._standing.replica_id = 0
        if claim.back_us is None:
            return SLOW_LOOK_SECONDS
        return min(SLOW_LOOK_SECONDS, max(0.001, self._clock.surely_at(claim.back_us) - after))

    def _lead_seconds(self) -> float:
        recent = self._intent_seconds.percentile(0.99) * 1.2
        return min(LEAD_SECONDS_MOST, max(LEAD_SECONDS_LEAST, recent))

    # ----------------------------------------------------------------------------------------- send

    async def _send(self, account: "_Account", grant: queue.Grant) -> None:
        """One batch from its grant to its settled outcome."""
        bound = log.bind(
            account=account.row.id,
            tenant=grant.tenant_id,
            campaign=grant.campaign_id,
            batch=grant.batch_id,
        )
        intent = None
        try:
            intent = await self._intend(grant)
            if intent is None:
                return
            bound = bound.bind(attempt=intent.attempt)
            credentials = self._credentials(account.row)
            try:
                result = await self._post(credentials, grant, intent)
            except mitto.Withdrawn as withdrawn:
                account.missed_slot(grant)
                await self._withdraw(grant, withdrawn.reason)
                return
            account.answered(grant, result)
            await self._settle(account, credentials, grant, intent, result, bound)
        except Exception:
            # A fault of ours must not leave a batch behind that nobody will touch again.
            bound.exception("batch.failed")
            await self._give_up(grant, intent)
        finally:
            account.release(grant)
            self._on_settled()

    async def _intend(self, grant: queue.Grant) -> queue.Intent | None:
        """Writes the intent shortly before the slot. None: not to be posted, and the batch is back in its place."""
        await _first_of(
            self._clock.maybe_at(grant.slot_us) - self._lead_seconds() - mitto.clock(),
            self._stopping,
        )
        why = "stopping" if self._stopping.is_set() else None
        if why is None:
            started = mitto.clock()
            faults.point("intent.writing")
            try:
                intent = await queue.intent(self._pool, grant, self._standing.replica_id)
            except database.AWAY as error:
                why = f"intent not acknowledged: {error!r}"
            else:
                faults.point("intent.written")
                self._intent_seconds.add(mitto.clock() - started)
                return intent if intent.verdict == "post" else None
        await self._withdraw(grant, why)
        return None

    async def _withdraw(self, grant: queue.Grant, why: str) -> None:
        log.info("batch.withdrawn", batch=grant.batch_id, campaign=grant.campaign_id, reason=why)
        await database.until_written(lambda: queue.withdraw(self._pool, grant, why))

    async def _give_up(self, grant: queue.Grant, intent: queue.Intent | None) -> None:
        if intent is None:
            await self._withdraw(grant, "a fault of smsd")
            return
        detail = "a fault of smsd: see its log"
        await database.until_written(
            lambda: queue.settle_batch(
                self._pool, grant.batch_id, intent.attempt, "unknown", "unknown", detail=detail
            )
        )

    async def _post(
        self, credentials: mitto.Account, grant: queue.Grant, intent: queue.Intent
    ) -> mitto.Result:
        """Waits for the slot and posts. Raises Withdrawn when it must not leave any more."""
        starts_at = self._clock.surely_at(grant.slot_us)
        latest = self._clock.maybe_at(grant.slot_us + queue.GUARD_US // 2)

        def gate() -> None:
            now = mitto.clock()
            if now > latest:
                raise mitto.Withdrawn(f"{(now - latest) * 1000:.0f} ms past its slot")
            if not self._standing.holds(now):
                raise mitto.Withdrawn("no heartbeat was acknowledged for most of a lease")

        items = [
            mitto.Item(message_id, phone, text, intent.sender)
            for message_id, phone, text in zip(intent.ids, intent.phones, intent.texts, strict=True)
        ]
        wait = starts_at - mitto.clock()
        if wait > 10e-6 * queue.HORIZON_US:
            raise mitto.Withdrawn("the database's clock stepped back")
        if wait > 0:
            await asyncio.sleep(wait)
        return await self._client.send(credentials, items, gate)

    def _credentials(self, row: queue.AccountRow) -> mitto.Account:
        default = self._settings.mitto_api_key
        api_key = row.api_key or (default.get_secret_value() if default else "")
        return mitto.Account(row.id, row.provider_id, api_key, row.server_error_means)

    # --------------------------------------------------------------------------------------- settle

    async def _settle(
        self,
        account: "_Account",
        credentials: mitto.Account,
        grant: queue.Grant,
        intent: queue.Intent,
        result: mitto.Result,
        bound: structlog.stdlib.BoundLogger,
    ) -> None:
        """Writes what came of a POST, however long that takes: once Mitto has it, it must not be forgotten."""
        faults.point("settle.writing")
        if result.outcome is Outcome.ACCEPTED:
            became = await self._settle_items(grant, intent, result, bound)
        else:
            await database.until_written(
                lambda: self._act_on(account, credentials, grant, intent, result)
            )
            became = await database.until_written(
                lambda: self._settle_whole(account, grant, intent, result)
            )
        faults.point("settle.written")
        if account.arrived_late(result):
            await database.until_written(
                lambda: queue.arrived_late(self._pool, account.row.id, grant)
            )
        bound.info(
            "batch.settled", n=len(intent.ids), outcome=str(result.outcome), became=became,
            status=result.status, detail=result.detail or None,
        )  # fmt: skip

    async def _settle_items(
        self,
        grant: queue.Grant,
        intent: queue.Intent,
        result: mitto.Result,
        bound: structlog.stdlib.BoundLogger,
    ) -> str:
        try:
            written = await database.until_written(
                lambda: queue.settle_items(
                    self._pool,
                    grant.batch_id,
                    intent.attempt,
                    result.items,
                    result.bulk_id,
                    result.status,
                )
            )
        except asyncpg.PostgresError:
            # An answer that cannot be written as it is must still not be lost: its receipts can speak for it.
            bound.exception("answer.not_written")
            return await database.until_written(
                lambda: queue.settle_batch(
                    self._pool, grant.batch_id, intent.attempt, "unknown", "unknown", status=result.status,
                    detail="the answer could not be written",
                )
            )  # fmt: skip
        # A receipt may have missed our result, as we may have missed it: look again in a new snapshot.
        ids = [item.provider_id for item in result.items if item.provider_id is not None]
        await database.until_written(lambda: queue.rejoin_receipts(self._pool, ids))
        return "done" if written else "duplicate"

    async def _act_on(
        self,
        account: "_Account",
        credentials: mitto.Account,
        grant: queue.Grant,
        intent: queue.Intent,
        result: mitto.Result,
    ) -> None:
        """What an outcome means beyond its batch: the account waits, the account stops, the campaign stops."""
        account_id, detail = credentials.id, result.detail
        match result.outcome:
            case Outcome.THROTTLED:
                seconds = account.throttle_seconds(result)
                await queue.block_account(self._pool, account_id, seconds)
            case Outcome.ACCOUNT_BROKEN:
                await self._pause(credentials, "UNAUTHORIZED", detail)
            case Outcome.MISDIRECTED:
                await self._pause(credentials, "MISDIRECTED", detail)
            case Outcome.TOO_LARGE if len(intent.ids) > 1:
                await queue.lower_largest_request(self._pool, account_id, len(intent.ids))
            case Outcome.LANE_BROKEN if grant.campaign_id:
                reason = "FORBIDDEN_BY_PROVIDER"
                _, others = await queue.pause_campaign_of(
                    self._pool, grant.batch_id, reason, detail
                )
                if others:
                    await self._pause(credentials, reason, detail)

    async def _pause(self, credentials: mitto.Account, reason: str, detail: str) -> None:
        api_key = credentials.api_key
        if not await queue.pause_account(self._pool, credentials.id, reason, detail, api_key):
            await self._read_accounts()  # the key may be another by now

    async def _settle_whole(
        self, account: "_Account", grant: queue.Grant, intent: queue.Intent, result: mitto.Result
    ) -> str:
        match result.outcome:
            case Outcome.RETRY:
                action = "again"
            case Outcome.REFUSED:
                action = "refused"
            case Outcome.TOO_LARGE:
                action = "back" if len(intent.ids) > 1 else "refused"
            case Outcome.LANE_BROKEN:
                action = "back" if grant.campaign_id else "refused"
            case Outcome.UNKNOWN:
                action = "unknown"
            case _:  # never left, throttled, a broken account, misdirected
                action = "back"
        return await queue.settle_batch(
            self._pool,
            grant.batch_id,
            intent.attempt,
            action,
            str(result.outcome),
            status=result.status,
            detail=result.detail or None,
            # Waits differ by up to a fifth, or all that failed together would come back together.
            delay_seconds=self._settings.backoff_seconds * random.uniform(1.0, 1.2)  # noqa: S311
            if action == "again"
            else 0.0,
            most=self._settings.max_attempts,
            refusal=result.refusal_hash or str(result.outcome),
        )


class _Account:
    """What one replica knows of a traffic account: what is in flight, how long answers take, whether it is there."""

    def __init__(self, row: queue.AccountRow, settings: Settings) -> None:
        self.row = row
        self.news = asyncio.Event()
        self.sending: set[asyncio.Task[None]] = set()
        self._least = settings.worker_concurrency
        self._window = float(settings.worker_concurrency)
        # When each was claimed. By grant, not by batch: one that was given back may be here again already.
        self._places: dict[queue.Grant, float] = {}
        self._messages = 0
        self._seconds = Recent(0.05)
        self._fastest = math.inf
        self._missed = 0
        self._open_until = 0.0
        self._halved_at = -math.inf
        self._throttled = 0

    def room(self) -> tuple[int, bool]:
        """(how many batches to claim, whether only of the priority class)."""
        if mitto.clock() < self._open_until:
            return 0, False
        if self._missed >= BREAKER_AFTER:
            return (0, False) if self._places else (1, False)  # one batch probes
        needed = math.ceil(self.row.requests_per_second * self._seconds.percentile(0.95)) + 1
        places = min(max(self._least, needed), REPLICA_IN_FLIGHT // 2, int(self._window))
        if self.row.max_in_flight is not None:
            places = min(places, self.row.max_in_flight)
        # Written slower than sent: wait for Postgres rather than pile up answers.
        if len(self.sending) >= 3 * places:
            return 0, False
        free = places - len(self._places)
        if free > 0 and self._messages < MESSAGES_IN_FLIGHT:
            return min(free, 8), False
        spare = free + PRIORITY_PLACES if self.row.max_in_flight is None else 0
        return max(0, spare), True

    def closed_seconds(self) -> float:
        """How long to wait for a place, at most."""
        closed = self._open_until - mitto.clock()
        return min(closed, SLOW_LOOK_SECONDS) if closed > 0 else SLOW_LOOK_SECONDS

    def missed_slot(self, grant: queue.Grant) -> None:
        """This process was too slow for a slot: fewer at once from now on (as TCP does when a packet is lost, and like
        it once for all that were on their way together)."""
        if self._places[grant] > self._halved_at:
            self._halved_at = mitto.clock()
            self._window = max(float(self._least), self._window / 2)

    def start(self, grant: queue.Grant, send: Coroutine[Any, Any, None]) -> None:
        self._places[grant] = mitto.clock()
        self._messages += grant.n
        task = asyncio.create_task(send, name=f"batch {grant.batch_id}")
        self.sending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.sending.discard(task)
        self.news.set()

    def answered(self, grant: queue.Grant, result: mitto.Result) -> None:
        """The request is over: its place is free, and the breaker hears of it."""
        claimed_at = self._places.pop(grant)
        self.news.set()
        # Then it was on its way by that time and tells nothing new: a wait grows by what comes after it.
        closed_already = mitto.clock() < self._open_until
        if result.outcome is Outcome.NEVER_LEFT:
            # A kept connection that the other side closed says nothing.
            if not closed_already and "gone stale" not in result.detail:
                self._missed_provider(result)
            return
        self._missed = 0
        if result.outcome is Outcome.THROTTLED:
            self._throttled += not closed_already or not self._throttled
            # Here at once; on other replicas as soon as it is written.
            until = mitto.clock() + self.throttle_seconds(result)
            self._open_until = max(self._open_until, until)
        else:
            self._throttled = 0
        self._seconds.add(mitto.clock() - claimed_at)
        self._window = min(self._window + 1.0, REPLICA_IN_FLIGHT / 2)

    def _missed_provider(self, result: mitto.Result) -> None:
        self._missed += 1
        if self._missed >= BREAKER_AFTER:
            wait = _doubled(1.0, self._missed - BREAKER_AFTER, BREAKER_SECONDS_MOST)
            self._open_until = mitto.clock() + wait
            log.warning("breaker.opened", account=self.row.id, seconds=wait, detail=result.detail)

    def throttle_seconds(self, result: mitto.Result) -> float:
        """How long to wait: as Mitto says, or a second, doubled while it goes on."""
        if result.retry_after_seconds:
            return result.retry_after_seconds
        return _doubled(THROTTLE_SECONDS, max(0, self._throttled - 1), THROTTLE_SECONDS_MOST)

    def arrived_late(self, result: mitto.Result) -> bool:
        """Whether the answer took so much longer than the fastest that the request may have arrived late."""
        if result.left_at is None or result.answered_at is None:
            return result.left_at is not None
        took = result.answered_at - result.left_at
        self._fastest = min(self._fastest, took)
        return took - self._fastest > queue.GUARD_US / 2e6

    def release(self, grant: queue.Grant) -> None:
        """The batch is settled or given back."""
        self._places.pop(grant, None)
        self._messages -= grant.n
        self.news.set()


def _doubled(seconds: float, times: int, most: float) -> float:
    return min(
        most, seconds * 2.0 ** min(times, 10)
    )  # a float ends at 2 ** 1024, an outage does not


async def _first_of(seconds: float, *events: asyncio.Event) -> None:
    """Waits for the first of: one of the events, the time."""
    if seconds <= 0 or any(event.is_set() for event in events):
        return
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
