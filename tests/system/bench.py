"""The fault bench: daemons that are killed, stopped and started again while they send, and the verdict on what came of it.

A `Scenario` says who sends how much and what befalls them; `play` plays it on an empty database and checks the
invariants against the simulator's ledger. The oracle knows nothing of the daemons but their answers and their tables.
"""

import asyncio
import contextlib
import random
import signal
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import asyncpg

from smsd import credits, database, embedded, tenants
from smsd.simulator import Simulator
from system import judge, proxy
from system.harness import ADMIN_TOKEN, FIRST_PHONE, Campaign, Daemon, Installation, Shop

LEASE_SECONDS = 1.5
SETTINGS: dict[str, Any] = {
    "lease_seconds": LEASE_SECONDS, "mitto_timeout": 3, "shutdown_seconds": 8, "backoff_seconds": 0.2,
}  # fmt: skip
GRANTED = 1_000_000
AWAY: tuple[type[BaseException], ...] = (OSError, *database.AWAY)


@dataclass(frozen=True)
class Tenant:
    """A tenant of a scenario. `account`: tenants with the same number share a traffic account and its limits."""

    messages: int
    batch_size: int
    account: int = 0
    account_requests: int = 50
    account_messages: int | None = None
    requests: int = 10_000
    weight: float = 1.0


@dataclass(frozen=True)
class Scenario:
    """What one run of the bench plays; a name of a fault is one of `chaos.FAULTS`."""

    seed: int
    tenants: tuple[Tenant, ...]
    faults: tuple[str, ...] = ()
    replicas: int = 2
    switches: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 12.0
    """How long faults go on at most."""
    away_seconds: float = 3.0
    armed_lives: int = 1_000
    """How many lives of replicas begin with a named point ahead."""
    most_strikes: int = 1_000
    pause_seconds: tuple[float, float] = (0.1, 0.8)
    """Least and most between two strikes."""
    singles: bool = True
    quiet_seconds: float = 6.0
    """How long unknown messages may rest before they count as what stays unknown."""

    def dice(self, what: str) -> random.Random:
        """Dice of their own for each part, so that one does not disturb another."""
        return random.Random(f"{self.seed} {what}")


@dataclass
class Verdict:
    """What a run came to."""

    scenario: Scenario
    seconds: float = 0.0
    deaths: int = 0
    struck: Counter[str] = field(default_factory=Counter)
    messages: int = 0
    accepted: int = 0
    duplicates: int = 0
    lost: int = 0
    contradictions: int = 0
    receipts_lost: int = 0
    unknown: int = 0
    resolvable: int = 0
    resolved: int = 0
    worst: float = 0.0
    use: float | None = None
    judged: int = 0
    """Seconds (windows that begin with a request) whose requests were counted against a limit."""
    unjudged: int = 0
    """Those in which our own proxy kept a request, or a zombie was at large."""
    breaches: list[str] = field(default_factory=list)

    def check(self, holds: bool, breach: str) -> None:
        if not holds:
            self.breaches.append(breach)


# ------------------------------------------------------------------------------------------ stock


async def stock(
    dsn: str, plans: tuple[Tenant, ...], installation: Installation, server_error_means: str
) -> list[Shop]:
    """The tenants of a scenario with credits and contacts, made without a daemon."""
    connection = await database.connect(dsn)
    accounts: dict[int, tenants.TrafficAccount] = {}
    shops = []
    try:
        for number, plan in enumerate(plans, 1):
            if plan.account not in accounts:
                accounts[plan.account] = await tenants.create_account(
                    connection, name="Main", provider_id=f"mitto-{plan.account}-{uuid.uuid4().hex[:6]}", api_key="key",
                    requests_per_second=plan.account_requests, messages_per_second=plan.account_messages,
                    max_in_flight=None, webhook_secret=None, server_error_means=server_error_means,
                )  # fmt: skip
            account = accounts[plan.account]
            tenant = await tenants.create_tenant(
                connection, name="Shop", account_id=account.id, sender=f"Shop{number}",
                requests_per_second=plan.requests, messages_per_second=None, weight=plan.weight,
                batch_size=plan.batch_size, subscription="active", timezone="UTC", default_country="GR",
            )  # fmt: skip
            await credits.grant(connection, tenant.id, GRANTED, "bench")
            _, key = await tenants.create_key(connection, tenant.id)
            await connection.execute(
                "insert into contact (tenant_id, phone, first_name) "
                "select $1, $2::bigint + i, 'Name' || i % 97 from generate_series(0, $3::int - 1) i",
                tenant.id, FIRST_PHONE + number * 1_000_000, plan.messages,
            )  # fmt: skip
            shops.append(Shop(installation, tenant.id, key, account.provider_id, account.id))
        await connection.execute("analyze contact")
    finally:
        await connection.close()
    return shops


# --------------------------------------------------------------------------------------- replicas


class Replicas:
    """Keeps so many daemons running: starts again what died, wakes what was stopped once its lease is over, and
    sends the receipts to one that answers."""

    def __init__(
        self, installation: Installation, verdict: Verdict, settings: list[dict[str, Any]]
    ) -> None:
        self._installation, self._verdict = installation, verdict
        self._settings = settings
        self.places: list[Daemon | None] = [None] * len(settings)
        self.orders: Callable[[int], str | None] = lambda _place: None
        """What SMSD_FAULT says in the next life of a replica."""
        self._ordered: dict[int, str] = {}
        self._stopped_at: dict[int, float] = {}
        self._ended_badly = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> list[Daemon]:
        """Those that answer."""
        return [one for one in self.places if one and one.lives and one.url and not one.stopped]

    async def keep(self) -> None:
        """Until cancelled."""
        turn = 0
        while True:
            for place, one in enumerate(self.places):
                if one is None or not one.lives:
                    await self._replace(place, one)
                elif one.stopped:
                    self._wake(one)
            turn += 1
            if turn % 10 == 0 and (ready := self.ready):
                one = ready[turn // 10 % len(ready)]
                self._installation.mitto.receipts.register(
                    f"{one.url}/webhooks/mitto/dlr", {}, frozenset()
                )
            await asyncio.sleep(0.05)

    async def _replace(self, place: int, died: Daemon | None) -> None:
        if died is not None:
            code = await died.ended()
            self._verdict.deaths += code == -signal.SIGKILL
            self._count(died)
            last = "\n".join(died.lines[-5:])
            self._verdict.check(code in (0, -signal.SIGKILL), f"a daemon ended with {code}: {last}")
            self._ended_badly += code not in (0, -signal.SIGKILL)
            if self._ended_badly > 3:
                raise AssertionError(f"daemons end by themselves: {last}")
        given = dict(self._settings[place])
        extra = dict(given.pop("extra", {}))
        order = self.orders(place)
        if order:
            extra["SMSD_FAULT"] = order
        one = await self._installation.launch(extra=extra, **given)
        if order:
            self._ordered[one.pid] = order
        self.places[place] = one
        task = asyncio.create_task(self._meet(one))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _meet(self, one: Daemon) -> None:
        with contextlib.suppress(AssertionError, TimeoutError):
            await one.started(600)

    def _wake(self, one: Daemon) -> None:
        since = self._stopped_at.setdefault(one.pid, time.monotonic())
        if time.monotonic() - since > 1.6 * LEASE_SECONDS:
            del self._stopped_at[one.pid]
            self._count(one)
            one.signal(signal.SIGCONT)

    def _count(self, one: Daemon) -> None:
        """A named point was reached, if that is what it died or lay down of."""
        if order := self._ordered.pop(one.pid, None):
            point, _, action = order.split(":")
            self._verdict.struck[f"{action}@{point}"] += 1

    @property
    def armed(self) -> bool:
        """Whether a living one has a named point ahead."""
        return any(one and one.lives and one.pid in self._ordered for one in self.places)

    def disarm(self, one: Daemon) -> bool:
        """Whether a named point was still ahead of it; what it dies of from now on is somebody else's doing."""
        return self._ordered.pop(one.pid, None) is not None

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


# ------------------------------------------------------------------------------------------- play


class Bench:
    """One run: the installation, what befalls it, and those who watch."""

    def __init__(
        self, scenario: Scenario, installation: Installation, postgres: embedded.Postgres | None
    ) -> None:
        self.scenario, self.installation, self.postgres = scenario, installation, postgres
        self.mitto: Simulator = installation.mitto
        assert installation.dsn is not None
        self.dsn = installation.dsn
        self.verdict = Verdict(scenario)
        self.campaigns: list[Campaign] = []
        self.shops: list[Shop] = []
        self.to_mitto = proxy.to_mitto(self.mitto.url, scenario.seed)
        self.to_postgres = proxy.to_postgres(self.dsn, scenario.seed)
        self.replicas = Replicas(installation, self.verdict, [])
        self.singles: dict[str, str] = {}
        self._statuses: dict[int, Any] = {}

    # -------------------------------------------------------------------------------- what it can do

    async def execute(self, sql: str, *arguments: object) -> list[Any]:
        """A statement on the database, past every proxy; waits for Postgres if it is away."""
        while True:
            try:
                connection = await asyncpg.connect(self.dsn, timeout=5)
                try:
                    return list(await connection.fetch(sql, *arguments))
                finally:
                    await connection.close()
            except AWAY:
                await asyncio.sleep(0.1)

    async def ask_surely(self, shop: Shop, path: str, json: object = None) -> Any:
        """A POST, with one Idempotency-Key until it is answered; its body."""
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                reply = await shop.ask("POST", path, json, headers=headers, seconds=5)
                if reply.status != 503:
                    assert reply.status < 300, (path, reply)
                    return reply.body
            await asyncio.sleep(0.1)

    def over(self) -> bool:
        """Whether every campaign has ended."""
        statuses = [self._statuses.get(one.id) for one in self.campaigns]
        return all(
            one and one["campaign"]["status"] not in ("sending", "paused") for one in statuses
        )

    def unknown(self) -> int:
        return sum(one["metrics"]["unknown"] for one in self._statuses.values())

    # --------------------------------------------------------------------------------- who takes part

    async def _send(self) -> None:
        for number, shop in enumerate(self.shops, 1):
            text = f"{{{{firstName}}}}, campaign {number} of seed {self.scenario.seed}"
            fields = {"name": f"Sale {number}", "messageText": text, "messageType": "service"}
            made = await self.ask_surely(shop, "/api/campaigns", fields)
            campaign = Campaign(shop, made["id"], only_forward=False)
            await self.ask_surely(shop, f"/api/campaigns/{campaign.id}/enqueue")
            self.campaigns.append(campaign)

    async def _single(self) -> None:
        """Somebody sends single messages beside the campaigns."""
        dice = self.scenario.dice("singles")
        while True:
            await asyncio.sleep(dice.uniform(0.2, 0.8))
            shop = dice.choice(self.shops)
            number = len(self.singles)
            text = f"single {number} of seed {self.scenario.seed}"
            phone = f"+{FIRST_PHONE + 90_000_000 + number}"
            self.singles[text] = phone
            await self.ask_surely(shop, "/api/messages", {"phone": phone, "text": text})

    async def _watch(self) -> None:
        """Looks at every campaign all the time: its totals must be true at every look."""
        while True:
            for campaign in self.campaigns:
                with contextlib.suppress(aiohttp.ClientError):
                    try:
                        status = await campaign._look()
                    except AssertionError as error:
                        self.verdict.breaches.append(f"totals: {str(error)[:500]}")
                        return
                    if status is not None:
                        self._statuses[campaign.id] = status
            await asyncio.sleep(0.2)

    async def _person(self) -> None:
        """The operator: lets go on what was paused for what Mitto said."""
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                for campaign in self.campaigns:
                    if (status := self._statuses.get(campaign.id)) and status["campaign"][
                        "status"
                    ] == "paused":
                        await campaign.ask("POST", "resume", seconds=5)
                for account_id in {shop.account_id for shop in self.shops}:
                    path = f"/api/admin/traffic-accounts/{account_id}"
                    reply = await self.installation.ask("GET", path, ADMIN_TOKEN, seconds=5)
                    if reply.status == 200 and reply.body["paused"]:
                        await self.installation.ask(
                            "PATCH", path, ADMIN_TOKEN, {"paused": False}, seconds=5
                        )
            await asyncio.sleep(0.7)

    # ------------------------------------------------------------------------------------- the course

    async def play(
        self,
        befall: "Callable[[Bench], Awaitable[None]]",
        calm: "Callable[[Bench], Awaitable[None]]",
    ) -> Verdict:
        """Sends under faults, then waits in calm until all is spoken for, then checks."""
        started_at = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.replicas.stop)
            keeping = await stack.enter_async_context(_running(self.replicas.keep()))
            await self._guarded(keeping, self._send(), 60)
            await stack.enter_async_context(_running(self._watch()))
            await stack.enter_async_context(_running(self._person()))
            async with contextlib.AsyncExitStack() as beside:
                if self.scenario.singles:
                    await beside.enter_async_context(_running(self._single()))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.scenario.seconds):
                        await self._guarded(keeping, befall(self), None)
                await calm(self)
            # What is unknown is asked about under half of the account's limit.
            asked_per_second = min(one.account_requests for one in self.scenario.tenants) / 2
            seconds = 240 + self.unknown() / asked_per_second
            try:
                await self._guarded(keeping, self._rest(), seconds)
            except TimeoutError:
                self.verdict.breaches.append(
                    f"not at rest after {seconds:.0f} s: {list(self._statuses.values())}"
                )
        await judge.judge(self)
        self.verdict.seconds = time.monotonic() - started_at
        return self.verdict

    async def _guarded(self, keeping: asyncio.Task[Any], work: Any, seconds: float | None) -> None:
        """Runs work; what ends the keeper of the replicas ends us."""
        task = asyncio.ensure_future(work)
        try:
            async with asyncio.timeout(seconds):
                await asyncio.wait({task, keeping}, return_when=asyncio.FIRST_COMPLETED)
            if keeping.done():
                keeping.result()
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _rest(self) -> None:
        """Returns once every campaign ended, every receipt is in, and what is unknown stays so."""
        seen, since = -1, time.monotonic()
        while True:
            await asyncio.sleep(0.1)
            looks = [campaign.looks for campaign in self.campaigns]
            busy = (
                not self.over()
                or self.mitto.receipts.outstanding > 0
                or await self._singles_open()
                or (self.unknown() > 0 and await self._will_be_asked())
            )
            pending = sum(one["metrics"]["pendingDelivery"] for one in self._statuses.values())
            now = time.monotonic()
            if (unknown := self.unknown()) != seen or busy:
                seen, since = unknown, now
            rested = now - since
            if not busy and (
                (not unknown and not pending and rested > 0.5)
                or rested > self.scenario.quiet_seconds
            ):
                # Once more, by looks that were not on their way when it came to rest.
                async with asyncio.timeout(20):
                    while any(
                        c.looks < before + 2
                        for c, before in zip(self.campaigns, looks, strict=True)
                    ):
                        await asyncio.sleep(0.05)
                if self.over() and self.unknown() == unknown:
                    return

    async def _will_be_asked(self) -> bool:
        """Whether Mitto is about to be asked, once more or at all, about a receipt whose id nobody knows: a new one has
        no time to be asked at, it is due from its arrival on. One that is due for a minute is asked about by nobody:
        that is for the judge."""
        soon = (
            "asked < 5 and greatest(next_ask_at, received_at) between clock_timestamp() - interval '60 seconds'"
            " and clock_timestamp() + interval '40 seconds'"
        )
        rows = await self.execute(f"select exists (select from early_receipt where {soon}) as soon")
        return bool(rows[0]["soon"])

    async def _singles_open(self) -> bool:
        if not self.singles:
            return False
        rows = await self.execute(
            "select exists (select from message_shown where campaign_id = 0 and status in ('queued', 'processing')) as open"
        )
        return bool(rows[0]["open"])


@contextlib.asynccontextmanager
async def _running(loop: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """A loop beside what the block does; its fault is the block's."""
    task = asyncio.create_task(loop)
    try:
        yield task
    finally:
        task.cancel()
        ended = (await asyncio.gather(task, return_exceptions=True))[0]
    if isinstance(ended, Exception):
        raise ended
