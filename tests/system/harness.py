"""An installation of smsd for one test: its daemons as processes, its shop over HTTP, its audit by the command line.

Nothing here looks into a daemon: a test sees what an operator and a frontend see, and what the simulator has seen.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import aiohttp
import orjson

from smsd import daemon
from smsd.simulator import Simulator

ADMIN_TOKEN = "token-of-the-operator"
SMSD = (sys.executable, "-m", "smsd")
FIRST_PHONE = 306_900_000_000
START_SECONDS = 30.0
LOOK_SECONDS = 0.05
PARTS = ("queued", "processing", "success", "failed", "unknown", "cancelled", "skipped")


class Done(NamedTuple):
    """A command that ended."""

    code: int
    out: str
    err: str


class Process:
    """A command that runs; what it writes to stderr is kept, and its JSON lines can be waited for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: list[str] = []
        self.events: list[dict[str, Any]] = []
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    async def start(self, command: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *command,
            env=dict(environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        async for data in self._process.stderr:
            line = data.decode(errors="replace").rstrip("\n")
            self.lines.append(line)
            with contextlib.suppress(orjson.JSONDecodeError):
                event = orjson.loads(line)
                self.events.append(event if isinstance(event, dict) else {})
            self._tell()
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def lives(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def stopped(self) -> bool:
        """Whether it was stopped by SIGSTOP and lies there."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return self.lives and stat.rpartition(")")[2].split()[0] == "T"

    @property
    def stderr(self) -> str:
        return "\n".join(self.lines)

    async def logged(
        self, event: str, *, after: int = 0, seconds: float = START_SECONDS
    ) -> dict[str, Any]:
        """The first log line of this event among those from number `after` on, once it is there."""
        async with asyncio.timeout(seconds):
            while True:
                news = self._news
                for line in self.events[after:]:
                    if line.get("event") == event:
                        return line
                assert self._reading is not None
                if self._reading.done():
                    raise AssertionError(f"{self.name} ended without {event}:\n{self.stderr}")
                await news.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self, seconds: float = START_SECONDS) -> int:
        """Its exit code, once it ended and all it said is read."""
        assert self._process is not None
        assert self._reading is not None
        async with asyncio.timeout(seconds):
            code = await self._process.wait()
            await self._reading
        return code

    async def kill(self) -> None:
        """SIGKILL, as the kernel does it."""
        if self.lives:
            self.signal(signal.SIGKILL)
        await self.ended()


class Daemon(Process):
    """A `smsd serve`."""

    url = ""

    async def started(self, seconds: float = START_SECONDS) -> None:
        """Returns once it can send campaigns."""
        line = await self.logged("daemon.started", seconds=seconds)
        self.url = line["url"]

    def resident_bytes(self) -> int:
        """Memory in use, as the kernel counts it."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024


class Reply(NamedTuple):
    """An answer, read to its end."""

    status: int
    body: Any
    seconds: float


@dataclass
class Installation:
    """One database, one simulator, and the daemons that a test starts on them."""

    dsn: str | None
    mitto: Simulator
    folder: Path
    daemons: list[Daemon] = field(default_factory=list)
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    async def __aenter__(self) -> Self:
        self.http = await self._stack.enter_async_context(aiohttp.ClientSession())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        for one in self.daemons:
            if one.lives:
                one.signal(signal.SIGTERM)
                one.signal(signal.SIGCONT)
        for one in self.daemons:
            try:
                await one.ended(10)
            except TimeoutError:
                await one.kill()

    def environment(self, **settings: object) -> dict[str, str]:
        """What a process of this installation is started with; settings are names without SMSD_, None leaves one out."""
        given: dict[str, object] = {
            "database_url": self.dsn,
            "data_dir": self.folder / "data",
            "port": 0,
            "admin_token": ADMIN_TOKEN,
            "public_url": "https://sms.example",
            "mitto_base_url": self.mitto.url,
            "mitto_api_key": "key",
            "lease_seconds": 2,
            **settings,
        }
        clean = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        return {
            **clean,
            "HOME": str(self.folder),
            **{f"SMSD_{name.upper()}": str(v) for name, v in given.items() if v is not None},
        }

    # ----------------------------------------------------------------------------------- processes

    async def launch(self, *, extra: Mapping[str, str] = {}, **settings: object) -> Daemon:
        """A `smsd serve` that has only just been started."""
        launched = Daemon(f"daemon {len(self.daemons) + 1}")
        self.daemons.append(launched)
        await launched.start((*SMSD, "serve"), {**self.environment(**settings), **extra})
        return launched

    async def serve(self, *, extra: Mapping[str, str] = {}, **settings: object) -> Daemon:
        """A `smsd serve` that can send; receipts go to it from now on."""
        launched = await self.launch(extra=extra, **settings)
        await launched.started()
        self.mitto.receipts.register(f"{launched.url}/webhooks/mitto/dlr", {}, frozenset())
        return launched

    async def command(
        self,
        *arguments: str,
        seconds: float = 60,
        extra: Mapping[str, str] = {},
        **settings: object,
    ) -> Done:
        """A command of smsd, run to its end."""
        process = await asyncio.create_subprocess_exec(
            *SMSD,
            *arguments,
            env={**self.environment(**settings), **extra},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(seconds):
                out, err = await process.communicate()
        except TimeoutError:
            process.kill()
            out, err = await process.communicate()
            raise AssertionError(f"smsd {arguments} did not end: {out!r} {err!r}") from None
        return Done(process.returncode or 0, out.decode(), err.decode())

    async def migrate(self) -> None:
        """What `smsd migrate` does, without the second that a process takes."""
        assert self.dsn is not None
        await daemon.migrate(self.dsn)

    async def audit(self) -> None:
        """Every invariant that the database can show holds."""
        done = await self.command("audit", "--json")
        checks = orjson.loads(done.out) if done.out else []
        broken = [check for check in checks if check["broken"]]
        assert not broken, broken
        assert done.code == 0, done.err
        assert {"once", "lost", "totals", "money"} <= {check["name"] for check in checks}

    # ------------------------------------------------------------------------------------------ HTTP

    @property
    def newest(self) -> Daemon:
        """The newest daemon that lives and can be asked; aiohttp.ClientError where there is none."""
        for one in reversed(self.daemons):
            if one.lives and one.url and not one.stopped:
                return one
        raise aiohttp.ClientConnectionError("no daemon is there to be asked")

    async def ask(
        self, method: str, path: str, key: str, json: object = None, *, via: Daemon | None = None,
        headers: Mapping[str, str] = {}, data: object = None, seconds: float = 60.0,
    ) -> Reply:  # fmt: skip
        """One request to a daemon, the newest unless told; aiohttp.ClientError when it gives no answer."""
        url = (via or self.newest).url + path
        given = {"Authorization": f"Bearer {key}", **headers}
        if json is not None:
            data, given["Content-Type"] = orjson.dumps(json), "application/json"
        started_at = time.monotonic()
        limit = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self.http.request(
                method, url, data=data, headers=given, timeout=limit
            ) as response:
                content = await response.read()
        except TimeoutError as error:
            raise aiohttp.ServerTimeoutError(f"{method} {path} in {seconds:g} s") from error
        return Reply(response.status, orjson.loads(content), time.monotonic() - started_at)

    async def shop(self, *, credits: int = 10_000_000, **limits: Any) -> "Shop":
        """A tenant on a traffic account of its own; limits are the account's and, if lower, the tenant's too."""
        per_second = limits.get("requestsPerSecond", 1000)
        account = await self._made("traffic-accounts", {
            "name": "Main", "trafficAccountId": f"mitto-{uuid.uuid4().hex[:8]}",
            "requestsPerSecond": per_second, **limits,
        })  # fmt: skip
        tenant = await self._made("tenants", {
            "name": "Shop", "accountId": account["id"], "sender": "Shop",
            "requestsPerSecond": per_second,
        })  # fmt: skip
        shop = Shop(
            self, tenant["id"], tenant["apiKey"], account["trafficAccountId"], account["id"]
        )
        await shop.top_up(credits)
        return shop

    async def _made(self, what: str, fields: Mapping[str, Any]) -> Any:
        reply = await self.ask("POST", f"/api/admin/{what}", ADMIN_TOKEN, fields)
        assert reply.status == 201, reply.body
        return reply.body


@dataclass
class Shop:
    """A tenant that sends campaigns, by the daemon that it is told to use or the newest."""

    installation: Installation
    id: int
    key: str
    account: str
    account_id: int = 0

    async def ask(self, method: str, path: str, json: object = None, **options: Any) -> Reply:
        return await self.installation.ask(method, path, self.key, json, **options)

    async def top_up(self, amount: int) -> None:
        if amount:
            path = f"/api/admin/tenants/{self.id}/credits"
            body = {"amount": amount, "reason": "test"}
            reply = await self.installation.ask("POST", path, ADMIN_TOKEN, body)
            assert reply.status == 200, reply.body

    async def credits(self) -> dict[str, int]:
        reply = await self.ask("GET", "/api/credits")
        assert reply.status == 200, reply.body
        return dict(reply.body)

    async def upload(self, n: int, first: int = FIRST_PHONE) -> int:
        """Uploads a CSV of n contacts; returns the import's id once the daemon has the bytes."""
        headers = {"Content-Type": "text/csv"}
        reply = await self.ask("POST", "/api/contacts/import", headers=headers, data=_csv(n, first))
        assert reply.status == 202, reply.body
        return int(reply.body["jobId"])

    async def imported(self, job_id: int, seconds: float = 120) -> dict[str, Any]:
        """The import's results, once it is done."""
        async with asyncio.timeout(seconds):
            while True:
                reply = await self.ask("GET", f"/api/contacts/import/{job_id}")
                assert reply.status == 200, reply.body
                assert reply.body["status"] != "failed", reply.body
                if reply.body["status"] == "completed":
                    return dict(reply.body["results"])
                await asyncio.sleep(LOOK_SECONDS)

    async def with_contacts(self, n: int) -> Self:
        """Itself, with n contacts that can be sent to."""
        results = await self.imported(await self.upload(n))
        assert results["created"] == n, results
        return self

    async def draft(self, text: str = "Hi {{firstName}}, 20% off until Sunday.") -> "Campaign":
        fields = {"name": "Sale", "messageText": text, "messageType": "service"}
        reply = await self.ask("POST", "/api/campaigns", fields)
        assert reply.status == 201, reply.body
        return Campaign(self, reply.body["id"])

    async def send(self) -> "Campaign":
        """A campaign to every contact, on its way."""
        campaign = await self.draft()
        reply = await campaign.enqueue()
        assert reply.status == 202, reply.body
        return campaign


async def _csv(n: int, first: int) -> AsyncIterator[bytes]:
    yield b"phone,firstName,city\n"
    for start in range(0, n, 5_000):
        rows = range(start, min(start + 5_000, n))
        yield "".join([f"+{first + row},Name{row % 997},Athens\n" for row in rows]).encode()


@dataclass
class Campaign:
    """A campaign that is watched: its sums are checked at every look, and its bar never runs backwards."""

    shop: Shop
    id: int
    looks: int = 0
    only_forward: bool = True
    """Off where a replica is stopped: what it takes back as not sent was processed already, as unknown."""
    most_unknown: int = 0
    _processed: int = 0

    async def ask(self, method: str, action: str, **options: Any) -> Reply:
        return await self.shop.ask(method, f"/api/campaigns/{self.id}/{action}", **options)

    async def enqueue(self, key: str | None = None, via: Daemon | None = None) -> Reply:
        headers = {"Idempotency-Key": key} if key else {}
        return await self.ask("POST", "enqueue", headers=headers, via=via)

    async def act(self, action: str, via: Daemon | None = None) -> Any:
        """pause, resume or cancel; the status right after it."""
        reply = await self.ask("POST", action, via=via)
        assert reply.status == 200, reply.body
        return self._checked(reply.body)

    async def status(self, via: Daemon | None = None) -> Any:
        status = await self._look(via)
        assert status is not None, "the database is away"
        return status

    async def _look(self, via: Daemon | None = None) -> Any:
        """The status, None while the database is away."""
        reply = await self.ask("GET", "status", via=via, seconds=10)
        if reply.status == 503:
            return None
        assert reply.status == 200, reply.body
        self.looks += 1
        return self._checked(reply.body)

    def _checked(self, status: Any) -> Any:
        figures, shown = status["metrics"], status["campaign"]
        assert figures["total"] == sum(figures[part] for part in PARTS), figures
        assert min(figures.values()) >= 0, figures
        received = figures["delivered"] + figures["deliveryFailed"]
        assert figures["accepted"] == received + figures["pendingDelivery"], figures
        assert figures["success"] == figures["accepted"] - figures["deliveryFailed"], figures
        waiting = figures["queued"] + figures["processing"]
        assert figures["processed"] == figures["total"] - waiting, figures
        assert figures["processed"] == shown["processed"] <= shown["total"], status
        if self.only_forward:
            assert figures["processed"] >= self._processed, (self._processed, figures)
        self._processed = figures["processed"]
        self.most_unknown = max(self.most_unknown, figures["unknown"])
        return status

    async def until(self, holds: Callable[[Any], bool], seconds: float = 60) -> Any:
        """Its status, once something holds of it. A daemon that is dying or without its database may not tell."""
        status: Any = None
        try:
            async with asyncio.timeout(seconds):
                while True:
                    with contextlib.suppress(aiohttp.ClientError):
                        status = await self._look()
                        if status is not None and holds(status):
                            return status
                    await asyncio.sleep(LOOK_SECONDS)
        except TimeoutError:
            raise AssertionError(f"not in {seconds} s: {status}") from None

    async def ended(self, seconds: float = 60) -> Any:
        """Its status, once nothing is left to send."""
        return await self.until(
            lambda status: status["campaign"]["status"] not in ("sending", "paused"), seconds
        )

    async def received(self, seconds: float = 60) -> Any:
        """Its status, once it ended, nothing of it is on its way, and every receipt is in."""
        await self.ended(seconds)

        def is_quiet(status: Any) -> bool:
            figures = status["metrics"]
            return not figures["pendingDelivery"] and not figures["processing"]

        return await self.until(is_quiet, seconds)
