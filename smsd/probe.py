"""Asks a Mitto account what Mitto's documentation leaves open: `smsd probe`.

Some questions cost messages, all of them to one number that its owner gave; every request waits for a grant of the
account's limit, like a batch. What was posted may have been accepted, so after an answer that does not say what
became of it nothing more is posted. A question without a clear answer stays open, and what an earlier probe knew of
it stays known. These messages belong to no campaign and are not counted in credits.
"""

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from smsd import mitto, queue, tenants
from smsd.database import Pool
from smsd.mitto import Fetched, FetchOutcome, Item, Result
from smsd.model import MessageState, Outcome
from smsd.pace import Questions, TooLate

SENDER = re.compile(r"[A-Za-z0-9]{1,11}|[0-9]{1,16}")
"""What Mitto takes as a sender id."""
TEXTS = 5
"""Messages in the request that asks for the order: by chance alone, one shuffled answer in 120 is in order."""
SECONDS_MOST = 120.0
"""How long requests are made; the last of them may take the client's time-out more."""
_LEAD_SECONDS = 0.05
LOOKS_SECONDS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Waits before each look for a message that has just been accepted."""
_TRIES = 5
_AT_ONCE = 16
_NO_NUMBER = 1  # "+1": no provider takes it for a destination
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


class ProbeError(Exception):
    """Nothing can be learned now, and nothing was stored; the message says why and what to do."""


class _Open(Exception):  # noqa: N818 - not a failure: the question stays open
    """No clear answer came; says why."""


class Finding(NamedTuple):
    """What became of one question; `value` is None where it is open. `note` is for a person."""

    name: str
    value: Any
    note: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to ask, and of whom. `phone`: digits of E.164; the last two questions are only asked if wanted."""

    account_id: int
    phone: int
    sender: str
    largest: int | None = None  # messages in the largest request to try
    throttle: int | None = None  # GETs in a burst

    @property
    def messages(self) -> int:
        """How many messages are sent at most, beside the one to no number."""
        return 1 + TEXTS + 1 + (self.largest or 0)


class Report(NamedTuple):
    """The findings of a probe, and all that is known of the account by now."""

    findings: list[Finding]
    capabilities: dict[str, Any]


async def find_account(pool: Pool, account_id: int) -> tenants.TrafficAccount:
    """The account to probe. Raises ProbeError."""
    account = await tenants.get_account(pool, account_id)
    if account is None:
        raise ProbeError(
            f"there is no traffic account {account_id}: see GET /api/admin/traffic-accounts"
        )
    return account


async def run(
    pool: Pool,
    client: mitto.Client,
    wanted: Wanted,
    *,
    shared_key: str = "",
    all_limit: int | None = None,
) -> Report:
    """Asks, and stores what was answered: all of it or, with ProbeError, nothing. `shared_key` is for an account
    without a key of its own, `all_limit` the requests per second over all accounts."""
    row = await find_account(pool, wanted.account_id)
    key = row.api_key or shared_key
    account = mitto.Account(row.id, row.provider_id, key, row.server_error_means)
    questions = Questions(pool, client, all_limit)
    probe = _Probe(pool, client, questions, account, wanted, row.largest_request)
    findings = await probe.ask_everything()
    found = {finding.name: finding.value for finding in findings if finding.value is not None}
    found["probedAt"] = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    async with pool.acquire() as connection, connection.transaction():
        if probe.refused_n is not None:
            await queue.lower_largest_request(connection, row.id, probe.refused_n)
        return Report(findings, await tenants.learn(connection, row.id, found))


@dataclass(slots=True)
class _Probe:
    """One run. The questions stand in the order in which they are asked; those that cost nothing come first."""

    pool: Pool
    client: mitto.Client
    questions: Questions
    account: mitto.Account
    wanted: Wanted
    most: int  # messages that the sender puts into a request
    mark: str = field(default_factory=lambda: secrets.token_hex(3))  # in every text of this run
    ends_at: float = field(default_factory=lambda: mitto.clock() + SECONDS_MOST)
    throttled: list[tuple[int | None, float | None]] = field(default_factory=list)
    posting: bool = True
    keeps_reference: bool = False
    takes_bulk: bool = False
    refused_n: int | None = None
    findings: list[Finding] = field(default_factory=list)

    async def ask_everything(self) -> list[Finding]:
        await self._ask_for_nothing()
        await self._ask(self._ask_alone, "sendShape", "referenceKept")
        await self._ask(self._ask_order, "orderKept")
        await self._ask(self._ask_bad_item, "badItem")
        if self.wanted.largest is None:
            self._found("largestRequest", None, f"not asked; {self.most} are put into a request")
        else:
            await self._ask(self._ask_largest, "largestRequest")
        await self._ask_throttle()
        return self.findings

    def _found(self, name: str, value: Any, note: str) -> None:
        self.findings.append(Finding(name, value, note))

    async def _ask(self, question: Callable[[], Awaitable[None]], *names: str) -> None:
        """One question that posts; what it does not find stays open, with the reason."""
        why = "not asked: of what was posted before, the outcome is not certain"
        if self.posting:
            try:
                await question()
            except _Open as left_open:
                why = str(left_open)
        answered = {finding.name for finding in self.findings}
        for name in names:
            if name not in answered:
                self._found(name, None, why)

    # ------------------------------------------------------------------------------------- questions

    async def _ask_for_nothing(self) -> None:
        """What a GET of an id that nobody gave says. It costs nothing and shows whether anybody is there at all."""
        try:
            fetched = await self._fetch(_made_up_id())
        except _Open as left_open:
            raise ProbeError(f"{left_open}; nothing was asked") from None
        status = fetched.status
        if status is None:
            raise self._unreachable(fetched.detail)
        if status == 401:
            raise self._wrong_key(fetched.detail)
        if 300 <= status <= 399:
            raise ProbeError(
                f"Mitto redirects (HTTP {status}), and redirects are not followed: check SMSD_MITTO_BASE_URL"
            )
        if status < 500 and fetched.outcome is not FetchOutcome.THROTTLED:
            self._found("unknownId", status, f"HTTP {status} to a GET of an id that nobody gave")
        else:
            self._found("unknownId", None, f"HTTP {status}: {fetched.detail}".rstrip(": "))
        skew = fetched.date_skew_seconds
        if skew is None:
            self._found("dateSkewSeconds", None, "the answer has no Date")
        else:  # the header tells whole seconds, those that have begun
            skew = round(skew + 0.5)
            self._found("dateSkewSeconds", skew, f"Mitto's clock minus ours: {skew} s")

    async def _ask_alone(self) -> None:
        """One message with a reference, by itself; where that is refused, one without."""
        result = await self._post([self._item("alone", f"smsd-{self.mark}")])
        if result.outcome is Outcome.REFUSED:
            refusal = result.detail
            result = await self._post([self._item("alone")])
            self._check_taken(result, "a message")
            self._found("referenceKept", False, f"a reference is refused: {refusal}")
        self._check_taken(result, "a message with a reference")
        where = 'in a list under "messages"' if result.shape == "list" else "at the top"
        self._found("sendShape", result.shape, f"one message alone is answered {where}")
        (provider_id,) = self._ids(result)
        if not any(finding.name == "referenceKept" for finding in self.findings):
            fetched = await self._look_for(provider_id)
            self.keeps_reference = fetched.reference == f"smsd-{self.mark}"
            note = "comes back" if self.keeps_reference else "does not come back"
            self._found("referenceKept", self.keeps_reference, f"a reference {note} with a GET")

    async def _ask_order(self) -> None:
        """Several texts in one request; whether each id leads to the text at its place."""
        references = [
            f"smsd-{self.mark}-{i}" if self.keeps_reference else None for i in range(TEXTS)
        ]
        items = [self._item(f"{i + 1} of {TEXTS}", references[i]) for i in range(TEXTS)]
        result = await self._post(items)
        self._check_taken(result, f"a request of {TEXTS} messages")
        self.takes_bulk = True
        seen = [await self._look_for(provider_id) for provider_id in self._ids(result)]
        texts = [item.text for item in items]
        if sorted(one.text or "" for one in seen) != sorted(texts):
            raise _Open("a GET does not show the texts as they were sent")
        kept = [one.text for one in seen] == texts
        note = "each id leads to the text at its place" if kept else "ids lead to other texts"
        self._found("orderKept", kept, f"{TEXTS} messages in one request: {note}")
        if self.keeps_reference and {one.reference for one in seen} != set(references):
            note = "a reference comes back if sent alone, and not from a request of several"
            self._replace(Finding("referenceKept", False, note))

    def _replace(self, finding: Finding) -> None:
        self.findings = [finding if one.name == finding.name else one for one in self.findings]

    async def _ask_bad_item(self) -> None:
        """A good message beside one to a destination that is none. By states, since the order may not be kept."""
        if not self.takes_bulk:
            raise _Open("not asked: no request of several messages was taken")
        good, bad = self._item("beside a bad one"), self._item("bad")
        result = await self._post([good, Item(0, _NO_NUMBER, bad.text, bad.sender)])
        if result.outcome is Outcome.REFUSED:
            self._found("badItem", "whole_4xx", f"the request is refused: HTTP {result.status}")
            return
        self._check_taken(result, "a request with a bad destination")
        match sorted(item.state for item in result.items):
            case [MessageState.ACCEPTED, MessageState.REFUSED]:
                self._found("badItem", "item_with_error", "an error stands at its place")
            case [MessageState.UNKNOWN, MessageState.ACCEPTED]:
                self._found("badItem", "item_without_id", "neither id nor error at its place")
            case [MessageState.ACCEPTED, MessageState.ACCEPTED]:
                self._found("badItem", "item_accepted", "it is accepted like any other")
            case states:
                raise _Open(f"the answer says {', '.join(str(state.name) for state in states)}")

    async def _ask_largest(self) -> None:
        """One large request; after each 413, which costs nothing, one of half the size."""
        n = self.wanted.largest or 0
        while n > 1:
            result = await self._post([self._item(f"{i + 1} of {n}") for i in range(n)])
            if result.outcome is not Outcome.TOO_LARGE:
                self._check_taken(result, f"a request of {n} messages")
                note = f"one of {self.refused_n} was too large" if self.refused_n else "or more"
                self._found("largestRequest", n, f"{n} messages in one request are taken; {note}")
                return
            self.refused_n, n = n, n // 2
        raise _Open("two messages in one request were too large")

    async def _ask_throttle(self) -> None:
        """Many GETs at once, as fast as the account's limit lets them, until one is throttled."""
        left = list(range(self.wanted.throttle or 0))

        async def work() -> None:
            while left and not self.throttled:
                left.pop()
                await self._fetch(_made_up_id(), tries=1)

        why = f"none of {len(left)} quick GETs was throttled" if left else "not asked"
        workers = {asyncio.create_task(work()) for _ in range(_AT_ONCE)}
        pending = workers
        while pending and not self.throttled:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for one in pending:  # they would wait as long as Mitto asked for
            one.cancel()
        for ended in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(ended, _Open):
                why = str(ended)
            elif isinstance(ended, Exception):
                raise ended
        if not self.throttled:
            self._found("throttle", None, why)
            return
        status, after = self.throttled[0]
        said = "without Retry-After" if after is None else f"with Retry-After: {after:g} s"
        value = {"status": status, "retryAfter": after}
        self._found("throttle", value, f"too many requests are answered HTTP {status} {said}")

    # -------------------------------------------------------------------------------------- requests

    def _item(self, what: str, reference: str | None = None) -> Item:
        text = f"smsd probe {self.mark}: {what}"
        return Item(0, self.wanted.phone, text, self.wanted.sender, reference)

    async def _post(self, items: list[Item]) -> Result:
        """What came of one POST: accepted, refused, too large. Raises _Open, and ProbeError.

        It is repeated only where nothing can have been accepted: it never left, or it was throttled.
        """
        result = None
        for _ in range(_TRIES):
            try:
                # Made ready before its slot: who has slept until then may take longer for it than a slot lasts.
                turn = await self.questions.turn(self.account.id, self.ends_at, _LEAD_SECONDS)
            except TooLate as late:
                raise self._no_time(late) from None
            try:
                result = await self.client.send(
                    self.account,
                    items,
                    turn.gate,
                    turn.starts_at,
                    turn.place.keep,
                    turn.place.late_from(),
                )
            except mitto.Withdrawn:
                await self.questions.give_back(self.account.id, turn)
                continue
            await turn.place.count_late(result.arrived_by)
            if result.outcome is Outcome.THROTTLED:
                await self._wait_as_told(result.status, result.retry_after_seconds)
            elif result.outcome is not Outcome.NEVER_LEFT:
                break
        if result is None:
            raise _Open("this machine was too busy to keep its slot")
        match result.outcome:
            case Outcome.ACCEPTED | Outcome.REFUSED | Outcome.TOO_LARGE:
                return result
            case Outcome.NEVER_LEFT:
                raise self._unreachable(result.detail)
            case Outcome.ACCOUNT_BROKEN:
                raise self._wrong_key(result.detail)
            case Outcome.UNKNOWN:
                self.posting = False
                raise _Open(f"the outcome is not certain, nothing more is posted: {result.detail}")
        raise _Open(f"HTTP {result.status}: {result.detail}")

    def _ids(self, result: Result) -> list[str]:
        """The ids of all messages of an answer. Raises _Open if one has none."""
        bad = [item for item in result.items if item.provider_id is None]
        if bad:
            # Neither id nor error: it may have been accepted.
            self.posting = all(item.state is MessageState.REFUSED for item in bad)
            raise _Open(f"{len(bad)} of {len(result.items)} messages got no id: {bad[0].detail}")
        return [item.provider_id for item in result.items if item.provider_id is not None]

    def _check_taken(self, result: Result, what: str) -> None:
        """Raises _Open unless the request was taken."""
        if result.outcome is not Outcome.ACCEPTED:
            raise _Open(f"{what} is refused: HTTP {result.status}: {result.detail}")

    async def _look_for(self, provider_id: str) -> Fetched:
        """The message with this id, which may take a moment to be there. Raises _Open."""
        fetched = None
        for seconds in LOOKS_SECONDS:
            await asyncio.sleep(seconds)
            fetched = await self._fetch(provider_id)
            if fetched.found:
                return fetched
        assert fetched is not None
        said = fetched.detail or f"HTTP {fetched.status}"
        raise _Open(f"a message that was accepted is not there when asked for: {said}")

    async def _fetch(self, provider_id: str, tries: int = _TRIES) -> Fetched:
        for _ in range(tries):
            try:
                fetched = await self.questions.ask(self.account, provider_id, self.ends_at)
            except TooLate as late:
                raise self._no_time(late) from None
            if fetched.outcome is not FetchOutcome.THROTTLED:
                break
            await self._wait_as_told(fetched.status, fetched.retry_after_seconds)
        return fetched

    async def _wait_as_told(self, status: int | None, seconds: float | None) -> None:
        """Mitto throttles: every replica waits, and so does our next grant."""
        self.throttled.append((status, seconds))
        doubled = 2.0 ** min(len(self.throttled) - 1, 5)
        await queue.block_account(self.pool, self.account.id, seconds or doubled)

    def _no_time(self, late: TooLate) -> _Open:
        return _Open(
            f"no time was left: account {self.account.id} waits {late.seconds:.0f} s for Mitto or for its own limit"
        )

    def _unreachable(self, detail: str) -> ProbeError:
        return ProbeError(f"Mitto cannot be reached ({detail}): check SMSD_MITTO_BASE_URL")

    def _wrong_key(self, detail: str) -> ProbeError:
        return ProbeError(
            f"Mitto does not take the key of account {self.account.id} (HTTP 401: {detail}): set its apiKey"
        )


def _made_up_id() -> str:
    """A ULID as of 1970: nobody has given it to a message."""
    return "0" * 10 + "".join(secrets.choice(_CROCKFORD) for _ in range(16))
