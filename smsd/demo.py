"""The demo: Postgres, a Mitto look-alike and the daemon on this machine, and one campaign from a CSV to its receipts.

It uses the daemon as a frontend would, over HTTP, and asks the look-alike what it has seen.
"""

import asyncio
import secrets
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from smsd import audit, config, daemon, database, telemetry
from smsd.embedded import dsn_of
from smsd.simulator import Simulator, Switches

SAMPLE = Path(__file__).parent / "data" / "contacts.csv"
TEXT = "Hi {{first_name|there}}, 20% off in {{city|town}} until Sunday. Show this text at the till."
MESSAGES_PER_SECOND = 1_000
"""Mitto's limit in the sample campaign, so that there is something to watch; none with --messages."""
OPT_OUTS = 5
RECEIPTS_SECONDS = 60.0
LOOK_SECONDS = 0.25
PLAIN_LINE_SECONDS = 2.0


class Failed(Exception):  # noqa: N818 - what the demo says last
    """The demo could not show what it is for."""


async def run(csv: Path | None, messages: int | None, *, keep: bool) -> int:
    """Runs the demo; returns the process' exit code: 0 if everything adds up."""
    console = Console()
    telemetry.configure_logging("error", "console")
    source = csv or SAMPLE
    if not source.is_file():
        console.print(f"{source} is not a file: --csv takes a CSV with a column phone")
        return 2
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="smsd-demo-")))
        limit = None if messages else MESSAGES_PER_SECOND
        mitto = await stack.enter_async_context(
            Simulator(Switches(dlr_delay_seconds=(0.3, 3.0), dlr_batch=100, dlr_failed=0.03))
        )
        port, admin = _free_port(), secrets.token_urlsafe(24)
        settings = config.load(
            {
                "SMSD_DATA_DIR": str(folder),
                "SMSD_PORT": str(port),
                "SMSD_ADMIN_TOKEN": admin,
                "SMSD_MITTO_BASE_URL": mitto.url,
                "SMSD_MITTO_API_KEY": "demo",
            }
        )
        mitto.receipts.register(f"http://127.0.0.1:{port}/webhooks/mitto/dlr", {}, frozenset())
        stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(daemon.serve(settings, on_ready=ready.set_result, stop=stop))
        try:
            await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                await serving
                return 1
            session = await stack.enter_async_context(aiohttp.ClientSession(ready.result()))
            show = _Demo(console, session, admin, mitto, settings)
            work = asyncio.create_task(show.campaign(source, messages, limit))
            await asyncio.wait({serving, work}, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():  # Ctrl-C, or the daemon died and has said why
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                return 1
            ok = work.result()
            show.how_to_go_on(ready.result(), keep=keep)
            if keep:
                await serving
            return 0 if ok else 1
        except Failed as failed:
            console.print(f"[red]{failed}[/red]")
            return 1
        finally:
            stop.set()
            await serving


def _free_port() -> int:
    with socket.socket() as probe:
        for port in (8080, 0):
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise Failed("no free port on 127.0.0.1")


class _Demo:
    """One campaign, step by step, and what it came to."""

    def __init__(
        self, console: Console, session: aiohttp.ClientSession, admin: str, mitto: Simulator,
        settings: config.Settings,
    ) -> None:  # fmt: skip
        self._console, self._session, self._mitto, self._settings = (
            console,
            session,
            mitto,
            settings,
        )
        self._admin, self._key = admin, ""

    async def _call(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        key = self._admin if path.startswith("/api/admin") else self._key
        headers = {"Authorization": f"Bearer {key}", **options.pop("headers", {})}
        if body is not None:
            options["json"] = body
        async with self._session.request(method, path, headers=headers, **options) as response:
            answer = await response.json()
            if response.status >= 400:
                raise Failed(f"{method} {path} → {response.status} {answer.get('message')}")
            return answer

    async def campaign(self, source: Path, messages: int | None, limit: int | None) -> bool:
        """The whole of it; True if every figure agrees."""
        await self._tenant(limit, messages)
        list_id = (await self._call("POST", "/api/lists", {"name": "Everybody"}))["id"]
        await self._import(source, messages, list_id)
        await self._opt_out(list_id)
        campaign = await self._call(
            "POST", "/api/campaigns",
            {"name": "20% off", "messageText": TEXT, "listIds": [list_id]},
        )  # fmt: skip
        path = f"/api/campaigns/{campaign['id']}"
        await self._preview(path)
        started = time.monotonic()
        answer = await self._call("POST", f"{path}/enqueue")
        self._say(
            f"enqueued: {answer['queued']:,} messages in about {answer['enqueuedJobs']:,} batches, "
            f"answered in {(time.monotonic() - started) * 1000:.0f} ms"
        )
        await self._watch(path)
        seconds = time.monotonic() - started
        return await self._account(path, seconds, limit)

    # ------------------------------------------------------------------------------------ before

    async def _tenant(self, limit: int | None, messages: int | None) -> None:
        account = await self._call(
            "POST", "/api/admin/traffic-accounts",
            {"name": "Demo", "trafficAccountId": "demo", "requestsPerSecond": 100 if limit else 1000,
             "messagesPerSecond": limit},
        )  # fmt: skip
        tenant = await self._call(
            "POST", "/api/admin/tenants",
            {"name": "Corner shop", "accountId": account["id"], "sender": "CornerShop",
             "requestsPerSecond": 50 if limit else 1000},
        )  # fmt: skip
        self._key = tenant["apiKey"]
        amount = 20_000 if messages is None else 2 * messages + 1000
        credits = await self._call(
            "POST",
            f"/api/admin/tenants/{tenant['id']}/credits",
            {"amount": amount, "reason": "demo"},
        )
        self._say(f"tenant “Corner shop” with {credits['available']:,} credits")

    async def _import(self, source: Path, messages: int | None, list_id: int) -> None:
        data: Any = source.open("rb") if messages is None else _made_up(messages)
        job = await self._call(
            "POST", f"/api/contacts/import?listId={list_id}", data=data,
            headers={"Content-Type": "text/csv; charset=utf-8"},
        )  # fmt: skip
        while True:
            state = await self._call("GET", f"/api/contacts/import/{job['jobId']}")
            if state["status"] in ("completed", "failed"):
                break
            await asyncio.sleep(LOOK_SECONDS)
        results = state["results"]
        if state["status"] == "failed":
            raise Failed(f"the import failed: {results['errors']}")
        name = source.name if messages is None else "made-up contacts"
        self._say(
            f"imported {name}: {results['created']:,} contacts, {results['updated']:,} repeats of a number, "
            f"{results['skipped']:,} lines refused"
        )
        for error in results["errors"][:12]:
            value = str(error["value"])
            why = error["message"].partition(";")[0].removeprefix(f"{value!r} ")
            self._say(f"  line {error['line']:>5}  {value[:30]:30}  {why}")

    async def _opt_out(self, list_id: int) -> None:
        page = await self._call("GET", f"/api/contacts?listId={list_id}&pageSize={OPT_OUTS}")
        for contact in page["items"]:
            await self._call("PUT", f"/api/contacts/{contact['id']}", {"isSubscribed": False})
        self._say(f"{len(page['items'])} of them unsubscribed meanwhile")

    async def _preview(self, path: str) -> None:
        preview = await self._call("GET", f"{path}/preview")
        credits = preview["credits"]
        self._say(
            f"preview: {preview['count']:,} recipients, {credits['required']:,} credits needed, "
            f"{credits['available']:,} available"
        )
        for sample in preview["sample"][:2]:
            text = sample["text"].replace("\n", " ")
            self._say(f"  {sample['to']}  {text}")

    # ------------------------------------------------------------------------------------- during

    async def _watch(self, path: str) -> None:
        """Until everything is decided, then until every receipt is in."""
        with Progress(
            TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>9}"), TimeRemainingColumn(compact=True),
            console=self._console, disable=not self._console.is_terminal,
        ) as progress:  # fmt: skip
            sending = progress.add_task("sending", total=None, rate="")
            receipts = progress.add_task("receipts", total=None, rate="")
            last_line, deadline, started = 0.0, None, time.monotonic()
            while True:
                status = await self._call("GET", f"{path}/status")
                figures, total = status["metrics"], status["campaign"]["total"]
                final = figures["delivered"] + figures["deliveryFailed"]
                rate = figures["processed"] / max(time.monotonic() - started, 0.001)
                progress.update(
                    sending, total=total, completed=figures["processed"], rate=f"{rate:,.0f}/s"
                )
                progress.update(receipts, total=figures["accepted"] or None, completed=final)
                if (
                    not self._console.is_terminal
                    and time.monotonic() - last_line > PLAIN_LINE_SECONDS
                ):
                    last_line = time.monotonic()
                    eta = f", ETA {(total - figures['processed']) / rate:.0f} s" if rate else ""
                    self._say(
                        f"sent {figures['processed']:,} of {total:,} ({rate:,.0f}/s{eta}), receipts {final:,}"
                    )
                if status["campaign"]["status"] in ("completed", "failed", "paused"):
                    deadline = deadline or time.monotonic() + RECEIPTS_SECONDS
                    if not figures["pendingDelivery"] or time.monotonic() > deadline:
                        return
                await asyncio.sleep(LOOK_SECONDS)

    # -------------------------------------------------------------------------------------- after

    async def _account(self, path: str, seconds: float, limit: int | None) -> bool:
        status = await self._call("GET", f"{path}/status")
        figures = status["metrics"]
        skipped = await self._call("GET", f"{path}/messages?status=skipped&pageSize=100")
        reasons: dict[str, int] = {}
        for message in skipped["items"]:
            reasons[message["reason"]] = reasons.get(message["reason"], 0) + 1
        credits = await self._call("GET", "/api/credits")
        ledger = self._mitto.ledger
        twice = ledger.duplicates("destination")
        rows = [
            ("recipients", figures["total"], ""),
            (
                "accepted by Mitto",
                figures["accepted"],
                f"the simulator counts {ledger.accepted_count:,}",
            ),
            ("  delivered", figures["delivered"], ""),
            ("  failed on the way", figures["deliveryFailed"], ""),
            ("  no receipt yet", figures["pendingDelivery"], ""),
            ("refused", figures["failed"] - figures["deliveryFailed"], ""),
            ("unknown", figures["unknown"], ""),
            ("skipped", figures["skipped"], ", ".join(f"{n} {why}" for why, n in reasons.items())),
            ("credits left", credits["balance"], f"{credits['reserved']:,} of them held"),
            ("numbers that got two", len(twice), "by the simulator's ledger"),
        ]
        if limit:
            worst = ledger.worst_second("demo", "messages")
            rows.append(("worst second", worst, f"messages; the limit is {limit:,}"))
        self._say(f"the account of the campaign, after {seconds:.1f} s:")
        for name, figure, note in rows:
            self._say(f"  {name:20} {figure:>9,}  {note}".rstrip())
        parts = ("queued", "processing", "success", "failed", "unknown", "cancelled", "skipped")
        checks = await self._audit()
        broken = [check.name for check in checks if check.broken]
        self._say(
            f"audit: {len(checks)} invariants checked, "
            + (f"BROKEN: {broken}" if broken else "all hold")
        )
        return (
            not twice
            and not broken
            and status["campaign"]["status"] == "completed"
            and figures["accepted"] == ledger.accepted_count
            and figures["pendingDelivery"] == 0
            and figures["total"] == sum(figures[part] for part in parts)
        )

    async def _audit(self) -> list[audit.Check]:
        connection = await database.connect(dsn_of(self._settings.data_dir))
        try:
            return await audit.run(connection)
        finally:
            await connection.close()

    def how_to_go_on(self, url: str, *, keep: bool) -> None:
        """Where to look next."""
        if not keep:
            self._say("run it again with --keep to leave all this running and try the API")
            return
        self._say(
            f"still running; Ctrl-C stops it. The API is at {url}, described by {url}/openapi.json"
        )
        for line in (
            f"curl -H 'Authorization: Bearer {self._key}' {url}/api/campaigns",
            f"curl -H 'Authorization: Bearer {self._key}' {url}/api/campaigns/1/status",
            f"curl {self._mitto.url}/_simulator/ledger",
        ):
            # Not broken by us: it is there to be copied.
            self._console.print(f"  {line}", markup=False, soft_wrap=True)

    def _say(self, line: str) -> None:
        """A line; a terminal gets it broken between words."""
        terminal = self._console.is_terminal
        self._console.print(line, markup=False, highlight=False, soft_wrap=not terminal)


async def _made_up(n: int) -> AsyncIterator[bytes]:
    """A CSV of n contacts, in pieces. Their numbers are made up and go nowhere but to the simulator."""
    yield b"phone,firstName,city\n"
    for start in range(0, n, 10_000):
        lines = [
            f"+30690{i:07d},Name{i % 997},Athens" for i in range(start, min(start + 10_000, n))
        ]
        yield ("\n".join(lines) + "\n").encode()
