"""The sender: per traffic account one claiming loop, and a coroutine for each batch on its way.

A batch's way: claim (slot and lease) → wait → intent (durable) → wait for the slot → gate → POST → settle. No
connection to Postgres is held while Mitto has the request. What happened is written even while we are told to stop;
what has not left when we stop is given back.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import repeat

import asyncpg
import structlog

from smsd import database, evidence, explain, faults, metrics, mitto, pace, queue
from smsd.config import Settings
from smsd.database import Pool, Share
from smsd.loops import first_of as _first_of
from smsd.model import Outcome, rows
from smsd.pace import Pace, Place, Recent
from smsd.recovery import Memory

log = structlog.get_logger()

LEAD_SECONDS_LEAST, LEAD_SECONDS_FIRST, LEAD_SECONDS_MOST = 0.004, 0.03, 0.06
RETAKES_MOST = 3
"""How often a batch that missed its slot takes another one before it is given back."""
LEAST_ANSWERS = 2
"""A fifth of the connections, and no fewer than this, write answers."""
SECOND_US = 1_000_000
CLOSED_SECONDS = (SECOND_US + queue.GUARD_US + 2 * queue.HORIZON_US) / 1e6
"""After the database's clock stepped ahead: its limiters have forgotten what left within the last second."""


OrderCheck = Callable[
    [mitto.Account, bool | None, Sequence[int], Sequence[mitto.ItemResult]], Awaitable[bool]
]
"""Whether an answer's ids stand in the order of the numbers that were posted: (account, what is known, numbers, ids)."""


class Sender:
    """Sends for every traffic account that has a lane."""

    def __init__(
        self,
        pool: Pool,
        client: mitto.Client,
        standing: queue.Standing,
        settings: Settings,
        on_settled: Callable[[], None],
        order_holds: OrderCheck | None = None,
        memory: Memory | None = None,
        share: Share | None = None,
    ) -> None:
        self._pool, self._client, self._standing, self._settings = pool, client, standing, settings
        # New work waits for its turn behind no answer, and answers behind no new work.
        self._share = share or pool
        self._answers = Share(pool, max(LEAST_ANSWERS, settings.pool_size // 5))
        self._on_settled, self._order_holds = on_settled, order_holds
        self._memory = memory or Memory()
        self.counts: Counter[str] = Counter()
        self._clock = queue.DatabaseClock()
        self._closed_until = 0.0
        # Of batches, and of single messages: those are written in a fraction of the time.
        self._intent_seconds = {
            False: Recent(LEAD_SECONDS_FIRST),
            True: Recent(2 * LEAD_SECONDS_LEAST),
        }
        self._accounts: dict[int, Pace] = {}
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
            await _first_of(pace.SLOW_LOOK_SECONDS, self._look, self._stopping)

    async def _read_accounts(self) -> None:
        for row in await queue.accounts(self._pool):
            self._meet(row)

    def _meet(self, row: queue.AccountRow) -> None:
        account = self._accounts.get(row.id)
        if account is None:
            account = self._accounts[row.id] = Pace(row, self._settings)
        account.row = row
        if row.id not in self._loops:
            self._loops[row.id] = asyncio.create_task(
                self._claim_for(account), name=f"account {row.id}"
            )

    @property
    def in_flight(self) -> int:
        """Batches between their claim and their settled outcome."""
        return sum(len(account.sending) for account in self._accounts.values())

    async def stop(self) -> None:
        """Claims nothing more, gives back what has not left, and returns when all that left is written."""
        self._stopping.set()
        await asyncio.gather(*self._loops.values(), return_exceptions=True)
        for account in self._accounts.values():
            while account.sending:
                await asyncio.wait(account.sending)

    # ---------------------------------------------------------------------------------------- claim

    async def _claim_for(self, account: Pace) -> None:
        no_work_until = 0.0
        while not self._stopping.is_set():
            if account.news.is_set():
                no_work_until = 0.0
            account.news.clear()
            account.freed.clear()
            want, priority_only = account.room()
            if priority_only and mitto.clock() < no_work_until:  # then no single message either
                want = 0
            closed = self._closed_until - mitto.clock()
            if not want or not self._standing.replica_id or closed > 0:
                wait = max(account.closed_seconds(), closed)
                await _first_of(wait, account.news, account.freed, self._stopping)
                continue
            pause, waits_for = pace.SLOW_LOOK_SECONDS, None
            try:
                pause, waits_for = await self._claim_once(account, want, priority_only)
            except database.AWAY as error:
                log.warning("claim.failed", account=account.row.id, error=repr(error))
            if waits_for == "work":
                no_work_until = mitto.clock() + pause
            # A claim locks the limit, and a single message waits behind it: none before there is a slot to be had.
            freed = () if waits_for and not priority_only else (account.freed,)
            await _first_of(pause, account.news, *freed, self._stopping)

    async def _claim_once(
        self, account: Pace, want: int, priority_only: bool
    ) -> tuple[float, str | None]:
        """One claim; how many seconds to wait for news before the next, and whether for a `slot` or for `work`, so that
        room for more of a campaign helps nothing."""
        self._stepped_ahead(await self._clock.learn(self._pool))
        faults.point("claim.asking")
        before = mitto.clock()
        claim = await queue.claim(
            self._share,
            account.row.id,
            self._standing.replica_id,
            want,
            lead_us=int(self._lead_seconds(single=False) * 1e6),
            single_lead_us=int(self._lead_seconds(single=True) * 1e6),
            all_limit=self._settings.requests_per_second,
            priority_only=priority_only,
        )
        after = mitto.clock()
        self._stepped_ahead(self._clock.observe(before, after, claim.now_us))
        if claim.grants:
            faults.point("claim.granted")
            self.counts["granted"] += len(claim.grants)
        for grant in claim.grants:
            account.start(grant, self._send(account, grant))
        if claim.grants:
            wait = (
                self._next_slot_seconds(account, claim.grants) if len(claim.grants) < want else 0.0
            )
            return wait, "slot"
        if claim.waits_for == "replica_gone":
            self._standing.replica_id = 0
        if account.looks_for_missed() and await queue.take_back_missed(self._pool, account.row.id):
            return 0.0, None
        if claim.back_us is None:
            return pace.SLOW_LOOK_SECONDS, "work" if claim.waits_for == "work" else None
        wait = self._clock.surely_at(claim.back_us) - mitto.clock()
        limited = claim.waits_for in ("account_limit", "tenant_limit")
        return min(pace.SLOW_LOOK_SECONDS, max(0.001, wait)), "slot" if limited else None

    def _next_slot_seconds(self, account: Pace, grants: Sequence[queue.Grant]) -> float:
        """How long until a claim may have the slot after these."""
        spread_us = (SECOND_US + queue.GUARD_US) // account.row.requests_per_second
        next_us = max(grant.slot_us for grant in grants) + spread_us
        return max(0.0, self._clock.surely_at(next_us - queue.HORIZON_US) - mitto.clock())

    def _stepped_ahead(self, seconds: float) -> None:
        if seconds > 0:
            self._closed_until = mitto.clock() + CLOSED_SECONDS
            log.warning("clock.stepped_ahead", seconds=seconds)

    def _lead_seconds(self, *, single: bool) -> float:
        # Not the slowest: who is late takes another slot, and what has its intent makes way for nobody.
        recent = 1.2 * self._intent_seconds[single].percentile(0.9 if single else 0.95)
        return min(LEAD_SECONDS_MOST, max(LEAD_SECONDS_LEAST, recent))

    # ----------------------------------------------------------------------------------------- send

    async def _send(self, account: Pace, grant: queue.Grant) -> None:
        """One batch from its grant to its settled outcome."""
        bound = log.bind(
            account=account.row.id,
            tenant=grant.tenant_id,
            campaign=grant.campaign_id,
            batch=grant.batch_id,
        )
        intent = None
        self._memory.begin(account.row.id, self._standing.replica_id, grant)
        try:
            intent = await self._intend(account, grant)
            if intent is None:
                return
            self._memory.posted(grant, intent)
            bound = bound.bind(attempt=intent.attempt)
            credentials = self._credentials(account.row)
            place = Place(self._pool, self._clock, account.row.id, grant)
            try:
                result = await self._post(account, credentials, place, intent)
            except mitto.Withdrawn as withdrawn:
                await self._withdraw(grant, withdrawn.reason)
                return
            account.answered(grant, result)
            self.counts["throttled"] += result.outcome is Outcome.THROTTLED
            late = await place.count_late(account.arrived_by(result))
            self.counts["late"] += late
            await self._settle(account, credentials, place.grant, intent, result, bound)
            await self._tell_breaker(account, result.detail)
        except Exception:
            # A fault of ours must not leave a batch behind that nobody will touch again.
            bound.exception("batch.failed")
            await self._give_up(grant, intent)
        finally:
            self._memory.end(grant)
            account.release(grant)
            self._on_settled()

    async def _intend(self, account: Pace, grant: queue.Grant) -> queue.Intent | None:
        """Writes the intent shortly before the slot. None: not to be posted, and the batch is back in its place."""
        single = grant.is_single
        await _first_of(
            self._clock.maybe_at(grant.slot_us) - self._lead_seconds(single=single) - mitto.clock(),
            self._stopping,
        )
        why = "stopping" if self._stopping.is_set() else None
        if mitto.clock() < self._closed_until:
            why = "the database's clock stepped ahead"
        if why is None:
            started = mitto.clock()
            faults.point("intent.writing")
            try:
                db = self._pool if single else self._share
                with account.intending(grant):
                    intent = await queue.intent(db, grant, self._standing.replica_id)
            except database.AWAY as error:
                why = f"intent not acknowledged: {error!r}"
            else:
                faults.point("intent.written")
                self._intent_seconds[single].add(mitto.clock() - started)
                if intent.verdict == "post":
                    return intent
                late = mitto.clock() > self._clock.surely_at(grant.slot_us)
                if intent.verdict == "lost" and late:  # somebody took it back
                    account.missed_slot(grant)
                return None
        await self._withdraw(grant, why)
        return None

    async def _withdraw(self, grant: queue.Grant, why: str) -> None:
        log.info("batch.withdrawn", batch=grant.batch_id, campaign=grant.campaign_id, reason=why)
        self.counts["withdrawn"] += 1
        self._memory.withdrew(grant, lambda: queue.withdraw(self._pool, grant, why))
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
        self,
        account: Pace,
        credentials: mitto.Account,
        place: Place,
        intent: queue.Intent,
    ) -> mitto.Result:
        """Waits for the slot and posts; takes another slot if it was missed. Raises Withdrawn when it must not leave."""
        referenced = account.row.capabilities.get("referenceKept") is True
        n = len(intent.ids)
        references = [
            evidence.reference(one, intent.attempt) if referenced else None for one in intent.ids
        ]
        items = rows(
            mitto.Item,
            intent.ids,
            intent.phones,
            intent.texts,
            repeat(intent.sender, n),
            references,
        )
        retakes = 0
        while True:
            if not self._clock.is_known():
                raise mitto.Withdrawn("the database's clock stepped, and is not known yet")
            starts_at = self._clock.surely_at(place.grant.slot_us)
            if starts_at - mitto.clock() > 10e-6 * queue.HORIZON_US:
                raise mitto.Withdrawn("the database's clock stepped back")
            try:
                return await self._client.send(
                    credentials,
                    items,
                    self._gate(account, place.grant),
                    starts_at,
                    place.keep,
                    place.late_from(),
                )
            except _Missed as missed:
                retakes += 1
                self.counts["retaken"] += 1
                moved = await self._retake(place.grant) if retakes <= RETAKES_MOST else None
                if moved is None:
                    account.missed_slot(place.claimed)
                    raise mitto.Withdrawn(missed.reason) from None
                place.grant = moved

    def _gate(self, account: Pace, grant: queue.Grant) -> Callable[[], None]:
        """What is asked right before the first byte."""
        latest = self._clock.maybe_at(grant.slot_us + queue.GATE_US)

        def gate() -> None:
            now = mitto.clock()
            if not self._standing.holds(now):
                raise mitto.Withdrawn("no heartbeat was acknowledged for most of a lease")
            if account.is_closed() or now < self._closed_until:
                raise mitto.Withdrawn("the account waits")
            if now > latest:
                raise _Missed(f"{(now - latest) * 1000:.0f} ms past its slot")
            account.made_slot()

        return gate

    async def _retake(self, grant: queue.Grant) -> queue.Grant | None:
        single = grant.is_single
        lead_us = int(self._lead_seconds(single=single) * 1e6)
        all_limit = self._settings.requests_per_second
        before = mitto.clock()
        try:
            moved = await queue.retake_slot(self._pool, grant, lead_us=lead_us, all_limit=all_limit)
        except database.AWAY:
            return None
        self._intent_seconds[single].add(mitto.clock() - before)
        return moved

    async def _tell_breaker(self, account: Pace, detail: str) -> None:
        """Writes that this replica's breaker opened or closed, for whoever asks why work waits."""
        told, account.told = account.told, account.breaker()
        if told == account.told:
            return
        self.counts["breaker_opened"] += told[0] == 0
        missed, seconds = account.told
        where = (self._pool, self._standing.replica_id, account.row.id)
        try:
            if missed:
                await explain.open_breaker(*where, missed, detail, seconds)
            else:
                await explain.close_breaker(*where)
        except database.AWAY:
            account.told = told

    def _credentials(self, row: queue.AccountRow) -> mitto.Account:
        default = self._settings.mitto_api_key
        api_key = row.api_key or (default.get_secret_value() if default else "")
        return mitto.Account(row.id, row.provider_id, api_key, row.server_error_means)

    # --------------------------------------------------------------------------------------- settle

    async def _settle(
        self,
        account: Pace,
        credentials: mitto.Account,
        grant: queue.Grant,
        intent: queue.Intent,
        result: mitto.Result,
        bound: structlog.stdlib.BoundLogger,
    ) -> None:
        """Writes what came of a POST, however long that takes: once Mitto has it, it must not be forgotten."""
        faults.point("settle.writing")
        if result.outcome is Outcome.ACCEPTED:
            became = await self._settle_items(account, credentials, grant, intent, result, bound)
        else:
            sent = result.outcome is Outcome.UNKNOWN
            n = len(intent.ids)
            whole = partial(self._settle_whole, account, grant, intent.attempt, n, result)
            self._memory.settling(grant, whole, sent=sent)
            await database.until_written(
                lambda: self._act_on(account, credentials, grant, intent, result)
            )
            became = await database.until_written(whole)
        states = [item.state for item in result.items] if became == "done" else []
        metrics.batch_settled(str(result.outcome), became, len(intent.ids), states)
        faults.point("settle.written")
        bound.info(
            "batch.settled", n=len(intent.ids), outcome=str(result.outcome), became=became,
            status=result.status, detail=result.detail or None,
        )  # fmt: skip

    async def _settle_items(
        self,
        account: Pace,
        credentials: mitto.Account,
        grant: queue.Grant,
        intent: queue.Intent,
        result: mitto.Result,
        bound: structlog.stdlib.BoundLogger,
    ) -> str:
        answer = queue.Answer.of(result.items, result.bulk_id, result.status)
        write = partial(self._write_answer, grant, intent.attempt, answer, bound)
        in_order = partial(self._is_in_order, account, credentials, intent.phones, result.items)

        async def write_in_order() -> str:
            return await write(mapped=await in_order())

        self._memory.settling(grant, write_in_order, sent=True)
        mapped = await in_order()
        # From here on the answer alone is remembered, and not all that it was read from.
        self._memory.settling(grant, partial(write, mapped=mapped), sent=True)
        # Who writes it again may do so to another database, in which the mark says nothing.
        return await write(mapped=mapped, early_mark=intent.early_mark)

    async def _is_in_order(
        self,
        account: Pace,
        credentials: mitto.Account,
        phones: Sequence[int],
        items: Sequence[mitto.ItemResult],
    ) -> bool:
        if self._order_holds is None:
            return True
        known = account.row.capabilities.get("orderKept")
        return await self._order_holds(credentials, known, phones, items)

    async def _write_answer(
        self,
        grant: queue.Grant,
        attempt: int,
        answer: queue.Answer,
        bound: structlog.stdlib.BoundLogger,
        *,
        mapped: bool,
        early_mark: int | None = None,
    ) -> str:
        batch_id = grant.batch_id
        try:
            written = await database.until_written(
                lambda: queue.settle(self._answers, batch_id, attempt, answer, mapped=mapped)
            )
        except (asyncpg.PostgresError, ValueError):
            # An answer that cannot be written as it is must still not be lost: its receipts can speak for it.
            bound.exception("answer.not_written")
            return await database.until_written(
                lambda: queue.settle_batch(
                    self._pool, batch_id, attempt, "unknown", "unknown", status=answer.status,
                    detail="the answer could not be written",
                )
            )  # fmt: skip
        # A receipt may have missed our result, as we may have missed it: look again in a new snapshot, unless none came
        # since the intent. Whichever comes from now on looks when the result is committed already; for what came right
        # between the two, housekeeping looks.
        if written.early_mark != early_mark:
            await database.until_written(
                lambda: queue.rejoin_receipts(self._pool, answer.given_ids())
            )
        return "done" if written.written else "duplicate"

    async def _act_on(
        self,
        account: Pace,
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
                await queue.throttle_account(self._pool, account_id, seconds, grant.slot_us)
            case Outcome.ACCOUNT_BROKEN:
                await self._pause(credentials, "UNAUTHORIZED", detail)
            case Outcome.MISDIRECTED:
                await self._pause(credentials, "MISDIRECTED", detail)
            case Outcome.TOO_LARGE if len(intent.ids) > 1:
                await queue.lower_largest_request(self._pool, account_id, len(intent.ids))
            case Outcome.LANE_BROKEN if not grant.is_single:
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
        self, account: Pace, grant: queue.Grant, attempt: int, n: int, result: mitto.Result
    ) -> str:
        match result.outcome:
            case Outcome.RETRY:
                action = "again"
            case Outcome.REFUSED:
                action = "refused"
            case Outcome.TOO_LARGE:
                action = "back" if n > 1 else "refused"
            case Outcome.LANE_BROKEN:
                action = "refused" if grant.is_single else "back"
            case Outcome.UNKNOWN:
                action = "unknown"
            case _:  # never left, throttled, a broken account, misdirected
                action = "back"
        return await queue.settle_batch(
            self._pool,
            grant.batch_id,
            attempt,
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


class _Missed(mitto.Withdrawn):
    """This process was too slow for the slot."""
