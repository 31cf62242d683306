"""The resolver: asks Mitto about ids that nobody knows, while there are messages of which nobody knows.

Each question is one GET with a grant of the account's limit, a few at a time, and no connection to Postgres is held
meanwhile. It also sends again what its caller wanted sent again, and tells a person of what stays unknown.
"""

import asyncio
import contextlib
from collections.abc import Sequence

import structlog

from smsd import database, evidence, mitto, queue, tenants
from smsd.config import Settings
from smsd.database import Pool
from smsd.evidence import Question
from smsd.mitto import Fetched, FetchOutcome, ItemResult
from smsd.pace import Questions, TooLate

log = structlog.get_logger()

ROUND_SECONDS = 0.5
PATIENCE_SECONDS = 2.0
"""How old a receipt must be before its id counts as unknown: our own result may just be on its way."""
ASKS_MOST = 10
AT_ONCE = 8
CLAIM = 64
PAUSE_SECONDS = 60.0
"""How long an account is not asked after it refused us."""
AWAY_SECONDS = 5.0
ORDER_SECONDS = 3.0
ORDER_ONE_IN = 50
TOLD_AT_ONCE = 50


class Resolver:
    """One loop of the daemon, and the check of an answer's order for the sender."""

    def __init__(
        self,
        pool: Pool,
        client: mitto.Client,
        settings: Settings,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._pool, self._client, self._settings = pool, client, settings
        self._patience_seconds = patience_seconds
        self._questions = Questions(pool, client, settings.requests_per_second)
        self._places = asyncio.Semaphore(AT_ONCE)
        self._not_before: dict[int, float] = {}
        self._away_until = 0.0
        self._orders: dict[int, _Order] = {}
        self._swept_at = 0.0

    async def run(self) -> None:
        """Rounds until cancelled."""
        while True:
            asked = 0
            try:
                asked = await self.round()
            except database.AWAY as error:
                log.warning("resolver.failed", error=repr(error))
            if not asked:
                await asyncio.sleep(ROUND_SECONDS)

    async def round(self) -> int:
        """Everything that is due; returns how many ids were asked about."""
        settings = self._settings
        if resent := await evidence.resend_asked(
            self._pool, settings.max_attempts, settings.backoff_seconds
        ):
            log.warning("messages.resent", n=resent, reason="the caller asked for it")
        await self._tell()
        if mitto.clock() < self._away_until:
            return 0  # another replica may reach Mitto: these are not taken away from it
        bounds = (1 if self._away_until else CLAIM, self._patience_seconds, ASKS_MOST)
        questions = await evidence.take_questions(self._pool, *bounds)
        unmapped = await evidence.take_unmapped(self._pool, *bounds)
        if not questions and not unmapped:
            return 0
        accounts = {account.id: account for account in await evidence.accounts(self._pool)}
        results = await asyncio.gather(
            *(self._resolve(question, accounts) for question in questions),
            *(self._map(question, accounts) for question in unmapped),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return len(results)

    async def _tell(self) -> None:
        """What was unknown for too long, once a while."""
        now, after = mitto.clock(), self._settings.unknown_after
        if now < self._swept_at + min(15.0, after / 20):
            return
        self._swept_at = now
        for exposed in await evidence.expose_old(self._pool, after, TOLD_AT_ONCE):
            log.warning(
                "messages.unknown", campaign=exposed.campaign_id or None, tenant=exposed.tenant_id, n=exposed.n,
                detail="nobody knows whether Mitto took them: a person decides (POST …/unknown)",
            )  # fmt: skip

    # ------------------------------------------------------------------------------------- one id

    async def _resolve(self, question: Question, accounts: dict[int, evidence.Account]) -> None:
        """Asks about an id that a receipt brought, and gives it to the message that it must be."""
        hosts = [one for one in accounts.values() if one.unresolved]
        if question.account_id is not None:
            hosts = [one for one in hosts if one.id == question.account_id]
        if not hosts:
            return
        account = hosts[question.asked % len(hosts)]
        fetched = await self._ask(question, account)
        if fetched is None:
            return
        owner = _owner(account, fetched, accounts)
        if owner is None or question.account_id not in (None, owner.id):
            await evidence.conclude(self._pool, question.provider_id, "wrong_account", final=True)
            return
        found = await evidence.candidates(self._pool, owner.id, fetched)
        decision = evidence.decide(fetched, found)
        if decision.match is not None:
            match = decision.match
            if await database.until_written(
                lambda: evidence.accept(self._pool, match, question.provider_id)
            ):
                log.info(
                    "message.resolved", account=owner.id, batch=match.batch_id,
                    message=match.message_id, provider_id=question.provider_id,
                )  # fmt: skip
            # In a new snapshot, as after every settle.
            await queue.rejoin_receipts(self._pool, [question.provider_id])
            return
        await evidence.conclude(
            self._pool, question.provider_id, decision.word, decision.candidates, final=decision.final
        )  # fmt: skip
        if decision.final:
            log.warning(
                "message.undecided", account=owner.id, provider_id=question.provider_id, reason=decision.word,
                candidates=decision.candidates,
            )  # fmt: skip

    async def _map(self, question: Question, accounts: dict[int, evidence.Account]) -> None:
        """Asks about an id of an answer out of order, and gives it to the message to that number."""
        assert question.account_id is not None
        fetched = await self._ask(question, accounts[question.account_id])
        if fetched is None:
            return
        if fetched.destination is not None and await evidence.map_id(
            self._pool, question.provider_id, fetched.destination
        ):
            await queue.rejoin_receipts(self._pool, [question.provider_id])
            return
        await evidence.conclude(self._pool, question.provider_id, "no_candidate", final=False)

    async def _ask(self, question: Question, account: evidence.Account) -> Fetched | None:
        """One GET in its turn; None where it told nothing."""
        async with self._places:
            away = mitto.clock() < self._away_until
            pause = 0.0 if away else self._not_before.get(account.id, 0.0) - mitto.clock()
            deadline = mitto.clock() + self._settings.mitto_timeout
            fetched = None
            if pause <= 0 and not away:
                credentials = self._credentials(account)
                with contextlib.suppress(TooLate):
                    fetched = await self._questions.ask(credentials, question.provider_id, deadline)
            if fetched is None:
                await evidence.postpone(self._pool, question.provider_id, max(pause, 1.0))
                return None
        self._away_until = 0.0
        if fetched.found:
            return fetched
        refused = fetched.status in (401, 403)
        if fetched.status is None:  # nobody there for us: the others may have better luck
            self._away_until = mitto.clock() + AWAY_SECONDS
            await evidence.postpone(self._pool, question.provider_id, 1.0)
            return None
        if refused or fetched.outcome is FetchOutcome.THROTTLED:
            seconds = PAUSE_SECONDS if refused else fetched.retry_after_seconds or 1.0
            self._not_before[account.id] = mitto.clock() + seconds
            log.warning(
                "questions.paused", account=account.id, seconds=seconds, status=fetched.status
            )
            if not refused:
                await queue.block_account(self._pool, account.id, seconds)
            await evidence.postpone(self._pool, question.provider_id, seconds)
            return None
        await evidence.conclude(self._pool, question.provider_id, str(fetched.outcome), final=False)
        return None

    def _credentials(self, account: evidence.Account) -> mitto.Account:
        default = self._settings.mitto_api_key
        api_key = account.api_key or (default.get_secret_value() if default else "")
        return mitto.Account(account.id, account.provider_id, api_key, account.server_error_means)

    # -------------------------------------------------------------------------------------- order

    async def order_holds(
        self,
        account: mitto.Account,
        known: bool | None,
        phones: Sequence[int],
        items: Sequence[ItemResult],
    ) -> bool:
        """Whether an answer's ids may be taken for those of the messages at the same places. `known`: what the account's
        capabilities say. Looks at the first and the last id of some answers, for ORDER_SECONDS at most."""
        if known is True or len(items) < 2:
            return True
        order = self._orders.setdefault(account.id, _Order())
        if known is False or order.broken:
            return False
        order.answers += 1
        # What the first look finds is true of those that came meanwhile; later ones do not wait for each other.
        if order.looking is not None and not order.seen:
            return await asyncio.shield(order.looking)
        if order.looking is not None or order.answers < order.next_look:
            return True
        asked = {
            item.provider_id: phone
            for item, phone in zip(items, phones, strict=True)
            if item.provider_id is not None
        }
        if not asked:
            return True
        ends = {one: asked[one] for one in (next(iter(asked)), next(reversed(asked)))}
        order.looking = asyncio.ensure_future(self._look(account, order, ends))
        return await asyncio.shield(order.looking)

    async def _look(self, account: mitto.Account, order: "_Order", ends: dict[str, int]) -> bool:
        """Compares the numbers of these ids. One that tells nothing is made up for soon, and more seldom each time."""
        seen: list[tuple[int | None, int]] = []
        began = order.answers
        try:
            async with asyncio.timeout(ORDER_SECONDS):
                for provider_id, phone in ends.items():
                    seen.append((await self._destination(account, provider_id), phone))
        except Exception as error:  # an answer that nobody could look at is an answer all the same
            if not isinstance(error, database.AWAY):  # a TimeoutError is
                log.exception("order.look_failed", account=account.id)
        finally:
            order.looking = None
        if any(found not in (None, phone) for found, phone in seen):
            await self._break(account, order)
            return False
        if len(seen) == len(ends) and all(found for found, _ in seen):
            order.seen, order.missed = True, 0
            order.next_look = began + ORDER_ONE_IN
        else:
            order.missed += 1
            order.next_look = order.answers + min(ORDER_ONE_IN, 2 ** min(order.missed - 1, 10))
        return True

    async def _destination(self, account: mitto.Account, provider_id: str) -> int | None:
        deadline = mitto.clock() + ORDER_SECONDS
        with contextlib.suppress(TooLate):
            return (await self._questions.ask(account, provider_id, deadline)).destination
        return None

    async def _break(self, account: mitto.Account, order: "_Order") -> None:
        order.broken = True
        log.error(
            "account.order_broken", account=account.id,
            detail="answers do not list messages in the order of the request: from now on each id is asked about",
        )  # fmt: skip
        await database.until_written(
            lambda: tenants.learn(self._pool, account.id, {"orderKept": False})
        )


class _Order:
    """What this process knows of the order of an account's answers."""

    def __init__(self) -> None:
        self.answers = 0
        self.next_look = 1
        self.missed = 0  # looks in a row that told nothing
        self.seen = False
        self.broken = False
        self.looking: asyncio.Future[bool] | None = None


def _owner(
    asked: evidence.Account, fetched: Fetched, accounts: dict[int, evidence.Account]
) -> evidence.Account | None:
    """The account that the message is of: the one that Mitto names; where it names none, the one asked."""
    if fetched.traffic_account_id is None:
        return asked
    names = {account.provider_id: account for account in accounts.values()}
    return names.get(fetched.traffic_account_id)
