"""How long callers wait with 1,000,000 contacts in the tenant: alone, and beside a campaign to all of them that drains.

Enqueue (small campaigns, and some to everybody, cancelled at once), status of the one that drains, and from the request
that asks for a single message until Mitto has the request with it (by the clock of this machine, which the simulator
shares). Open loop: each request has its time, whether or not the ones before it are answered, and its latency counts
from then, so that a wait is not hidden by asking later.

The campaign drains at a pace that leaves the machine room, under a limit of its account that it uses up; or as fast as
the machine can, without a limit.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from bench import campaigns
from bench.campaigns import Campaigns
from bench.common import FIRST_PHONE, NO_LIMIT, Machine, Mitto, Options, Variant, alternate, report

CONTACTS, QUICK_CONTACTS = 1_000_000, 20_000
SECONDS, QUICK_SECONDS = 60.0, 2.0
RATES = {"status": 20.0, "single": 10.0, "enqueue": 2.0}
"""Requests a second: 1,200 looks, 600 messages, 120 campaigns and 6 to everybody in a run."""
LARGE_EVERY = 20
"""One enqueue in so many is to all contacts."""
SMALL = 100
"""Contacts of a small campaign."""
BATCH, PACE = 200, 50
"""Messages of a request, and requests a second for the traffic account: 10,000 messages a second, about half of what
this class of machine can do, and room for all single messages several times over."""
SINGLE_PHONES = FIRST_PHONE + 50_000_000
ARRIVE_SECONDS = 30.0
SENT = (
    "select phone, provider_id from message_shown where campaign_id = 0 and provider_id is not null"
)


@dataclass
class Watch:
    """Latencies in seconds, by what was asked; and when each single message was due to be asked for."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    singles: dict[int, float] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)

    def figures(self) -> dict[str, float]:
        """Percentiles in ms."""
        figures = {}
        for name, values in sorted(self.seconds.items()):
            values.sort()
            figures[f"{name} p50"] = values[len(values) // 2] * 1000
            figures[f"{name} p99"] = values[len(values) * 99 // 100] * 1000
            figures[f"{name} max"] = values[-1] * 1000
        return figures


class Latency:
    """The variants on one Postgres and one simulator."""

    def __init__(self, machine: Machine, mitto: Mitto, contacts: int, seconds: float) -> None:
        self._machine, self._mitto = machine, mitto
        self._contacts, self._seconds = contacts, seconds

    def beside(self, draining: int, pace: int = NO_LIMIT) -> Variant:
        """Beside so many campaigns that drain, at most at so many requests a second together."""
        return lambda: self._measure(draining, pace)

    async def _measure(self, draining: int, pace: int) -> dict[str, float]:
        prepare = (
            f"update traffic_account set requests_per_second = {pace};"
            f"update tenant set batch_size = {BATCH}"
        )
        async with campaigns.installation(
            self._machine, self._mitto, self._contacts, prepare=prepare
        ) as sent:
            ids = [await sent.draft() for _ in range(max(1, draining))]
            callers = _Callers(sent, ids[-1])
            await callers.prepare(self._seconds)
            for campaign_id in ids[:draining]:
                await sent.enqueue(campaign_id)
            if draining:
                await sent.until(ids[-1], lambda status: status["metrics"]["accepted"] > 0)
            await callers.call(self._seconds)
            if draining and self._seconds == SECONDS:
                await callers.check_drains()
            await self._arrivals(sent, callers.watch)
            return callers.watch.figures()

    async def _arrivals(self, sent: Campaigns, watch: Watch) -> None:
        """From when a single message was due to when the simulator saw its request; all of them must be there."""
        deadline = time.monotonic() + ARRIVE_SECONDS
        while len(rows := await sent.db.fetch(SENT)) < len(watch.singles):
            if time.monotonic() > deadline:
                raise campaigns.Wrong(f"{len(rows)} of {len(watch.singles)} single messages left")
            await asyncio.sleep(0.1)
        page = await self._mitto.control("GET", "requests?limit=100000")
        arrived = {row["firstId"]: row["arrivedMonotonic"] for row in page["rows"]}
        for row in rows:
            watch.add("single", arrived[row["provider_id"]] - watch.singles[row["phone"]])


class _Callers:
    """Those who ask, each at a rate of its own."""

    def __init__(self, sent: Campaigns, main_id: int) -> None:
        self._sent, self.main_id = sent, main_id
        self.watch = Watch()
        self._drafts: list[int] = []

    async def prepare(self, seconds: float) -> None:
        """Drafts of all campaigns that will be enqueued, and the list of the small ones."""
        list_id = await self._sent.db.fetchval(
            "with l as (insert into contact_list (tenant_id, name) values ($1, 'Few') returning id),"
            " m as (insert into contact_list_member (list_id, contact_id)"
            "       select l.id, c.id from l, (select id from contact order by id limit $2) c)"
            " select id from l",
            self._sent.shop.id, SMALL,
        )  # fmt: skip
        body = {"name": "Few", "messageText": campaigns.TEXT, "listIds": [list_id]}
        for number in range(int(seconds * RATES["enqueue"])):
            if number % LARGE_EVERY == LARGE_EVERY // 2:
                self._drafts.append(await self._sent.draft())
            else:
                self._drafts.append((await self._ask("POST", "", body))["id"])

    async def call(self, seconds: float) -> None:
        """Everything at once, for so long."""
        calls = {"status": self._status, "single": self._single, "enqueue": self._enqueue}
        await asyncio.gather(
            *(_open_loop(RATES[name], seconds, call) for name, call in calls.items())
        )

    async def check_drains(self) -> None:
        """Raises Wrong unless the campaign was still on its way: beside nothing, figures say nothing."""
        status = await self._ask("GET", f"/{self.main_id}/status")
        if status["campaign"]["status"] != "sending":
            raise campaigns.Wrong(
                "the campaign ended before the measurement did: take more contacts"
            )

    async def _status(self, _: int, due_at: float) -> None:
        await self._ask("GET", f"/{self.main_id}/status")
        self.watch.add("status", time.monotonic() - due_at)

    async def _single(self, number: int, due_at: float) -> None:
        phone = SINGLE_PHONES + number
        self.watch.singles[phone] = due_at
        body = {"phone": f"+{phone}", "text": f"Your code is {number:06d}"}
        await self._sent.daemon.ask("POST", "/api/messages", self._sent.shop.key, body)
        self.watch.add("single, answered", time.monotonic() - due_at)

    async def _enqueue(self, number: int, due_at: float) -> None:
        campaign_id = self._drafts[number]
        answer = await self._ask("POST", f"/{campaign_id}/enqueue")
        large = answer["queued"] > SMALL
        self.watch.add("enqueue of all" if large else "enqueue", time.monotonic() - due_at)
        if large:
            await self._ask("POST", f"/{campaign_id}/cancel")

    async def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return await self._sent.daemon.ask(
            method, f"/api/campaigns{path}", self._sent.shop.key, body
        )


async def _open_loop(
    rate: float, seconds: float, call: Callable[[int, float], Awaitable[None]]
) -> None:
    """Calls at the times of a clock, `rate` a second; `call` gets its number and when it was due."""
    begun = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            due_at = begun + number / rate
            await asyncio.sleep(due_at - time.monotonic())
            group.create_task(_awaited(call(number, due_at)))


async def _awaited(call: Awaitable[None]) -> None:
    await call


async def run(machine: Machine, options: Options) -> None:
    """The benchmark."""
    quick = options.quick
    contacts = options.messages[0] if options.messages else QUICK_CONTACTS if quick else CONTACTS
    seconds = QUICK_SECONDS if quick else SECONDS
    async with Mitto(machine.folder) as mitto:
        latency = Latency(machine, mitto, contacts, seconds)
        variants = {
            "alone": latency.beside(0),
            "beside a campaign at its limit": latency.beside(1, PACE),
            "beside campaigns without limit": latency.beside(1 if quick else 3),
        }
        results = await alternate(variants, options.runs, machine.settle)
    report(
        "latency", results, machine, options, reference="alone", figure="single p99",
        title=f"ms with {contacts:,} contacts, open loop", settings={
            "contacts": contacts, "seconds": seconds, "rates": RATES, "batch": BATCH,
            "pace": PACE,
        },
    )  # fmt: skip
