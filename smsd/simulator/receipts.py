"""Delivery receipts: decided at acceptance, due after a delay, posted until a 2xx takes them.

A receipt is one integer (row and report). Those due within the same few milliseconds share a
bucket, one timer releases the bucket that is due next, and at most `POSTS_AT_ONCE` posts per
webhook carry what is ready: neither a task nor a timer per message.
"""

import asyncio
import functools
import heapq
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import aiohttp
import orjson

from smsd.simulator.ledger import Ledger, Report, Request, iso
from smsd.simulator.switches import Magic, Switches, magic_of

FAILURE = "Absent subscriber"  # the description of every Failure
POSTS_AT_ONCE = 16
POST_TIMEOUT_SECONDS = 10.0
_BUCKET_SECONDS = 0.005
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 1.0
_AFTERTHOUGHT_SECONDS = 0.05  # from the final receipt to whatever comes after it
_REPORTS = 8  # row * 8 + report
_REPORT = tuple(Report)


class Style(NamedTuple):
    """One spelling of a receipt: its keys, and its words for Sent, Delivered and Failure."""

    id_key: str
    state_key: str
    time_key: str
    reason_key: str
    words: dict[Report, str]


def _words(sent: str, delivered: str, failed: str) -> dict[Report, str]:
    return {Report.SENT: sent, Report.DELIVERED: delivered, Report.FAILED: failed}


STYLES = {
    "v1": Style(
        "messageId",
        "deliveryStatus",
        "updatedAt",
        "description",
        _words("Sent", "Delivered", "Failure"),
    ),
    "v2": Style("id", "status", "timestamp", "error", _words("submitted", "delivered", "failed")),
    "v3": Style(
        "MessageId", "Status", "Timestamp", "Error", _words("ENROUTE", "DELIVRD", "UNDELIV")
    ),
    "v4": Style(
        "messageId",
        "delivery_status",
        "doneAt",
        "errorMessage",
        _words("Accepted", "completed", "Rejected"),
    ),
}
_MIXED = tuple(STYLES.values())


@dataclass(slots=True)
class Webhook:
    """Where the receipts of some accounts go (of all without one of their own, if none named)."""

    id: int
    url: str
    headers: dict[str, str]
    accounts: frozenset[str]
    ready: deque[int] = field(default_factory=deque)
    posting: int = 0


class Receipts:
    """The receipts of one simulator, and the webhooks that take them."""

    def __init__(self, ledger: Ledger, switches: Switches, changed: Callable[[], None]) -> None:
        """`changed` is called whenever receipts were taken or refused."""
        self.webhooks: list[Webhook] = []
        self.outstanding = 0  # scheduled, not yet answered 2xx
        self.answered = self.posts = self.failed_posts = 0
        self._ledger = ledger
        self._switches = switches
        self._changed = changed
        self._webhook_by_account: dict[str, Webhook | None] = {}
        self._buckets: dict[int, array[int]] = {}
        self._due: list[int] = []  # heap of the buckets' numbers
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    def start(self) -> None:
        """Begin, or go on, posting."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=POST_TIMEOUT_SECONDS),
        )
        self._release()

    async def stop(self) -> None:
        """End all posts; what was not taken waits for the next start."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        session, self._session = self._session, None
        await self._cancel_posts()
        if session is not None:
            await session.close()

    async def reset(self, ledger: Ledger) -> None:
        """Forget every receipt, and go on with an empty ledger. Webhooks stay."""
        self._ledger = ledger
        for webhook in self.webhooks:
            webhook.ready.clear()
        self._buckets.clear()
        self._due.clear()
        self.outstanding = self.answered = self.posts = self.failed_posts = 0
        await self._cancel_posts()

    def register(self, url: str, headers: dict[str, str], accounts: frozenset[str]) -> Webhook:
        """A webhook for these accounts, or for all; in place of the one that they had."""
        for webhook in self.webhooks:
            if webhook.accounts == accounts:
                webhook.url, webhook.headers = url, headers
                return webhook
        webhook = Webhook(len(self.webhooks) + 1, url, headers, accounts)
        self.webhooks.append(webhook)
        self._webhook_by_account.clear()
        return webhook

    # --- at acceptance ----------------------------------------------------------------------

    def decide(self, request: Request, random: Random) -> dict[int, list[int]]:
        """Decide what becomes of the request's messages and schedule their receipts.

        Returns the receipts to be posted before the request is answered, by webhook id.
        """
        early: dict[int, list[int]] = {}
        plain = self._switches.receipts_are_plain()
        for row in range(request.first_row, request.first_row + request.accepted):
            if plain:
                self._decide_plain(row, request, random)
            else:
                self._decide_row(row, request, random, early)
        self._arm()
        return early

    def _decide_plain(self, row: int, request: Request, random: Random) -> None:
        switches = self._switches
        delay = random.uniform(*switches.dlr_delay_seconds)
        self._ledger.decide(row, Report.DELIVERED, request.accepted_at + delay)
        if switches.dlr and self._webhook_of(row) is not None:
            self._put(row * _REPORTS + Report.DELIVERED, request.accepted_monotonic + delay)

    def _decide_row(
        self, row: int, request: Request, random: Random, early: dict[int, list[int]]
    ) -> None:
        switches, destination = self._switches, self._ledger.destination_of(row)
        magic = magic_of(destination) if switches.magic_numbers else None
        failed = magic == Magic.DELIVERY_FAILED or _happens(switches.dlr_failed, random)
        final = Report.FAILED if failed else Report.DELIVERED
        at_once = magic == Magic.RECEIPT_BEFORE_ANSWER or _happens(
            switches.dlr_before_answer, random
        )
        delay = 0.0 if at_once else random.uniform(*switches.dlr_delay_seconds)
        self._ledger.decide(row, final, request.accepted_at + delay)
        webhook = self._webhook_of(row)
        if not switches.dlr or webhook is None or magic == Magic.NO_RECEIPT:
            return
        if _happens(switches.dlr_never, random):
            return
        for report, after in _plan(switches, magic, final, delay, random):
            code = row * _REPORTS + report
            if at_once:
                self.outstanding += 1
                early.setdefault(webhook.id, []).append(code)
            else:
                self._put(code, request.accepted_monotonic + after)

    async def post_early(self, early: dict[int, list[int]]) -> None:
        """Post these now, each once; what is not taken is retried like any other receipt."""
        ledger, size = self._ledger, self._switches.dlr_batch
        waiting = [
            (self.webhooks[number - 1], codes[start : start + size])
            for number, codes in early.items()
            for start in range(0, len(codes), size)
        ]
        refused: list[tuple[Webhook, list[int]]] = []
        try:
            while waiting and self._ledger is ledger:
                webhook, codes = waiting[0]
                taken = await self._post(webhook, self._render(codes))
                waiting.pop(0)
                if not taken:
                    refused.append((webhook, codes))
                elif self._ledger is ledger:
                    self._taken(codes)
        finally:
            # also when the client left meanwhile, which cancels us
            self._put_back([*refused, *waiting], ledger)

    def _put_back(self, posts: list[tuple[Webhook, list[int]]], ledger: Ledger) -> None:
        if self._ledger is not ledger:
            return  # reset meanwhile: these rows are of another ledger
        for webhook, codes in posts:
            webhook.ready.extendleft(reversed(codes))
            self._fill(webhook)

    # --- when due ---------------------------------------------------------------------------

    def _put(self, code: int, due: float) -> None:
        bucket = int(due / _BUCKET_SECONDS)
        codes = self._buckets.get(bucket)
        if codes is None:
            codes = self._buckets[bucket] = array("q")
            heapq.heappush(self._due, bucket)
        codes.append(code)
        self.outstanding += 1

    def _arm(self) -> None:
        if not self._due or self._session is None:
            return
        # a bucket is due when its last receipt is: none is posted too early
        due = (self._due[0] + 1) * _BUCKET_SECONDS
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(
            max(0.0, due - time.monotonic()), self._release
        )

    def _release(self) -> None:
        now = int(time.monotonic() / _BUCKET_SECONDS)
        while self._due and self._due[0] < now:
            for code in self._buckets.pop(heapq.heappop(self._due)):
                webhook = self._webhook_of(code // _REPORTS)
                if webhook is not None:  # webhooks never go
                    webhook.ready.append(code)
        for webhook in self.webhooks:
            self._fill(webhook)
        self._arm()

    def _fill(self, webhook: Webhook) -> None:
        posts = -(-len(webhook.ready) // self._switches.dlr_batch)
        while self._session is not None and webhook.posting < min(posts, POSTS_AT_ONCE):
            webhook.posting += 1
            task = asyncio.create_task(self._drain(webhook))
            self._tasks.add(task)
            task.add_done_callback(functools.partial(self._drained, webhook))

    def _drained(self, webhook: Webhook, task: asyncio.Task[None]) -> None:
        webhook.posting -= 1
        self._tasks.discard(task)
        self._fill(webhook)  # what became ready since its last look

    async def _drain(self, webhook: Webhook) -> None:
        ledger = self._ledger
        while webhook.ready:
            size = min(self._switches.dlr_batch, len(webhook.ready))
            codes = [webhook.ready.popleft() for _ in range(size)]
            try:
                await self._deliver(webhook, codes)
            except asyncio.CancelledError:
                self._put_back([(webhook, codes)], ledger)
                raise
            self._taken(codes)

    async def _deliver(self, webhook: Webhook, codes: list[int]) -> None:
        body = self._render(codes)
        pause = _FIRST_PAUSE_SECONDS
        while not await self._post(webhook, body):
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    async def _post(self, webhook: Webhook, body: bytes) -> bool:
        """One attempt; whether it was answered 2xx."""
        assert self._session is not None
        headers = {"Content-Type": "application/json", **webhook.headers}
        self.posts += 1
        try:
            async with self._session.post(
                webhook.url, data=body, headers=headers, allow_redirects=False
            ) as answer:
                await answer.read()
                if 200 <= answer.status < 300:
                    return True
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass  # as good as a refusal: it will be posted again
        self.failed_posts += 1
        self._changed()
        return False

    def _taken(self, codes: list[int]) -> None:
        self.outstanding -= len(codes)
        self.answered += len(codes)
        for code in codes:
            self._ledger.receipt_answered(code // _REPORTS, _REPORT[code % _REPORTS])
        self._changed()

    def _render(self, codes: list[int]) -> bytes:
        receipts = [self._receipt(code // _REPORTS, _REPORT[code % _REPORTS]) for code in codes]
        single = self._switches.dlr_batch == 1 and len(receipts) == 1
        return orjson.dumps(receipts[0] if single else receipts)

    def _receipt(self, row: int, report: Report) -> dict[str, Any]:
        chosen = self._switches.dlr_style
        style = _MIXED[row % len(_MIXED)] if chosen == "mixed" else STYLES[chosen]
        message_id, accepted_at, at = self._ledger.receipt_of(row)
        if report == Report.SENT:
            at = (accepted_at + at) / 2
        receipt = {
            style.id_key: message_id,
            style.state_key: style.words.get(report, report.word),
            style.time_key: iso(at + self._switches.clock_skew_seconds),
        }
        if report == Report.FAILED:
            receipt[style.reason_key] = FAILURE
        return receipt

    def _webhook_of(self, row: int) -> Webhook | None:
        account = self._ledger.account_of(row)
        if account not in self._webhook_by_account:
            own = [webhook for webhook in self.webhooks if account in webhook.accounts]
            for_all = [webhook for webhook in self.webhooks if not webhook.accounts]
            self._webhook_by_account[account] = next(iter([*own, *for_all]), None)
        return self._webhook_by_account[account]

    async def _cancel_posts(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _happens(fraction: float, random: Random) -> bool:
    return fraction > 0 and random.random() < fraction


def _plan(
    switches: Switches, magic: Magic | None, final: Report, delay: float, random: Random
) -> list[tuple[Report, float]]:
    """The receipts of one message, each with its delay; in this order when they are due at once."""
    later = delay + _AFTERTHOUGHT_SECONDS
    plan = [(final, delay)]
    if _happens(switches.dlr_out_of_order, random):
        plan.append((Report.SENT, later))
    elif switches.dlr_intermediate:
        plan.insert(0, (Report.SENT, delay / 2))
    if _happens(switches.dlr_unknown_word, random):
        plan.insert(0, (Report.UNKNOWN_WORD, delay / 2))
    if magic == Magic.RECEIPT_DOUBLED or _happens(switches.dlr_doubled, random):
        plan.append((final, later))
    if final == Report.DELIVERED and _happens(switches.dlr_contradicting, random):
        plan.append((Report.FAILED, later))
    return plan
