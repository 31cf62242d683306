"""What every benchmark is made of: a Postgres, a Mitto and daemons as processes of their own, and how runs are judged.

One run decides nothing, so that every figure is the median of alternating runs, its reference among them, on the
same Postgres and the same simulator; between two runs the database is dropped and vacuum and checkpoint have ended.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import asyncpg
import orjson

from smsd import credits, daemon, database, embedded, tenants

CHECKOUT = Path(__file__).resolve().parent.parent
DATABASE_VARIABLE = "SMSD_BENCH_DATABASE_URL"
ADMIN_TOKEN = "token-of-the-operator"
PUBLIC_URL = "https://sms.example"
MITTO_KEY = "key"
FIRST_PHONE = 306_900_000_000
NO_LIMIT = 1_000_000
"""Requests a second that nothing here reaches."""
START_SECONDS = 60.0
WAL_MEGABYTES = 960
"""A little less than the least that the embedded Postgres keeps."""
SMSD = (sys.executable, "-m", "smsd")
TICKS = os.sysconf("SC_CLK_TCK")

Variant = Callable[[], Awaitable[dict[str, float]]]
Results = dict[str, dict[str, list[float]]]
"""Of each variant and figure all values, in the order of the runs."""


@dataclass(frozen=True)
class Options:
    """How a benchmark is run: how often, at a size for a smoke test or the real one, where its files go, and how one
    asks for the same again."""

    runs: int = 5
    quick: bool = False
    out: Path = CHECKOUT / "docs" / "performance"
    command: str = ""
    messages: tuple[int, ...] = ()
    """Sizes in place of a benchmark's own."""
    minutes: float | None = None
    """How long the soak and bloat take, in place of their half an hour."""


# --------------------------------------------------------------------------------------- processes


class Process:
    """A program that runs beside us; its output goes to a file, so that nobody has to read it while it is measured."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}-{uuid.uuid4().hex[:6]}.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        with self.log.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                cwd=CHECKOUT,
                env=None if environment is None else dict(environment),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def said(self, word: str, seconds: float = START_SECONDS, look: float = 0.01) -> str:
        """The first line of its output that has this word, once it is there."""
        assert self._process is not None
        read = 0
        deadline = time.monotonic() + seconds
        while True:
            ended = self._process.returncode is not None
            with self.log.open("rb") as output:
                output.seek(read)
                for line in output:
                    if not line.endswith(b"\n"):
                        break
                    read += len(line)
                    if word.encode() in line:
                        return line.decode(errors="replace")
            if ended or time.monotonic() > deadline:
                why = "ended" if ended else f"did not say it in {seconds:g} s"
                raise RuntimeError(
                    f"{self.name} {why}, waited for {word!r}:\n{self.log.read_text()[-4000:]}"
                )
            await asyncio.sleep(look)

    async def tell(self, line: str) -> None:
        """A line to its standard input."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        await self._process.stdin.drain()

    def cpu_seconds(self) -> float:
        """What it has used so far, in user and kernel mode."""
        return cpu_of(self.pid)

    def resident_bytes(self) -> int:
        """Memory in use, as the kernel counts it."""
        return memory_of(self.pid, "VmRSS")

    def peak_bytes(self) -> int:
        """The most memory that was in use since the start, or `forget_peak`."""
        return memory_of(self.pid, "VmHWM")

    def forget_peak(self) -> None:
        forget_peak(self.pid)

    async def stop(self, seconds: float = 40.0) -> None:
        """An orderly end; a kill where that takes too long."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), seconds)
        except TimeoutError:
            process.kill()
            await process.wait()


def cpu_of(pid: int, *, with_dead_children: bool = False) -> float:
    """CPU seconds of a process; with those of its children that ended, if wanted."""
    fields = _stat(pid)
    return sum(int(value) for value in fields[11 : 15 if with_dead_children else 13]) / TICKS


def memory_of(pid: int, name: str) -> int:
    """Bytes of a process, by their name in proc(5): VmRSS is what it has now, VmHWM the most it had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def forget_peak(pid: int) -> None:
    """From now on VmHWM counts anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _stat(pid: int) -> list[str]:
    """What /proc/PID/stat says after the name, which may have any character; the first is field 3 of proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


# ---------------------------------------------------------------------------------------- Postgres


class Machine:
    """The Postgres of all runs: an embedded one as `smsd demo` starts it, with fsync, or that of DATABASE_VARIABLE."""

    folder: Path
    version = ""

    async def __aenter__(self) -> Self:
        self._stack = contextlib.AsyncExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory("smsd-bench")))
        try:
            if given := os.environ.get(DATABASE_VARIABLE):
                self._server = given
            else:
                server = embedded.Postgres(self.folder / "data")
                self._server = (await self._stack.enter_async_context(server)).dsn
            self._admin = await asyncpg.connect(self._server)
            self._stack.push_async_callback(self._admin.close)
            if not given:
                await self._work_in()
            self.version = await self._admin.fetchval("show server_version")
            self._postmaster = self._find_postmaster(self._admin.get_server_pid())
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _work_in(self) -> None:
        """A server that has worked for a day has WAL files to use again; a new one makes each, and commits wait."""
        write = "select pg_logical_emit_message(false, '', repeat('x', 1 << 20)) from generate_series(1, $1)"
        await self._admin.execute(write, WAL_MEGABYTES)
        await self._admin.execute("checkpoint")

    @contextlib.asynccontextmanager
    async def database(self, *, migrated: bool = True) -> AsyncIterator[str]:
        """The URL of a fresh database, with smsd's schema unless told; dropped afterwards."""
        name = f"smsd_bench_{uuid.uuid4().hex[:10]}"
        await self._admin.execute(f"create database {name}")
        dsn = urlunsplit(urlsplit(self._server)._replace(path=f"/{name}"))
        try:
            if migrated:
                await daemon.migrate(dsn)
            yield dsn
        finally:
            await self._admin.execute(f"drop database {name} with (force)")

    async def settle(self) -> None:
        """Returns when nothing of an earlier run is left to be written or vacuumed."""
        await self._admin.execute("checkpoint")
        while await self._admin.fetchval(
            "select exists (select from pg_stat_activity where backend_type = 'autovacuum worker')"
        ):
            await asyncio.sleep(0.1)

    def cpu_seconds(self) -> float:
        """Of all of Postgres' processes, those that ended included; nan where it is not on this machine."""
        if self._postmaster is None:
            return float("nan")
        # A process that ends in between is counted once all the same: its parent has reaped it by then, or not.
        children = Path(f"/proc/{self._postmaster}/task/{self._postmaster}/children").read_text()
        total = cpu_of(self._postmaster, with_dead_children=True)
        for pid in children.split():
            with contextlib.suppress(OSError):
                total += cpu_of(int(pid))
        return total

    @staticmethod
    def _find_postmaster(backend: int) -> int | None:
        try:
            name = Path(f"/proc/{backend}/comm").read_text().strip()
            return int(_stat(backend)[1]) if name.startswith("postgres") else None
        except OSError:
            return None

    def facts(self) -> dict[str, Any]:
        """What figures depend on."""
        cpu = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
        memory = next(line for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
        return {
            "cores": len(os.sched_getaffinity(0)),
            "cpu": cpu[0].partition(":")[2].strip() if cpu else os.uname().machine,
            "memory_bytes": int(memory.split()[1]) * 1024,
            "postgres": self.version,
            "python": sys.version.split()[0],
            "kernel": os.uname().release,
        }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


# ------------------------------------------------------------------------------------------- Mitto


class Mitto(Process):
    """The simulator as a process of its own. Receipts are off and nothing fails, unless switched otherwise."""

    url = ""
    QUIET: Mapping[str, Any] = {"dlr": False}

    def __init__(self, folder: Path) -> None:
        super().__init__("mitto", folder)

    async def __aenter__(self) -> Self:
        await self.start((*SMSD, "simulator", "--port", "0"))
        line = await self.said("listens on")
        self.url = line.partition("listens on ")[2].partition(",")[0]
        self._http = aiohttp.ClientSession()
        await self.switch()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()
        await self.stop()

    async def switch(self, **switches: Any) -> None:
        """Sets these switches (smsd/simulator/switches.py); all others are as in QUIET."""
        await self.control("PUT", "switches", {**self.QUIET, **switches})

    async def register(self, url: str, secret: str | None = None) -> None:
        """Receipts of all accounts go to this URL from now on."""
        headers = {"X-Webhook-Secret": secret} if secret else {}
        body = {"url": url, "headers": headers, "trafficAccountIds": [], "triggers": []}
        await self._ask("POST", f"{self.url}/api/v1/Webhooks", body)

    async def reset(self) -> None:
        """Empties its ledger."""
        await self.control("POST", "reset")

    async def accepted(self) -> int:
        """Messages accepted since the last reset."""
        return int((await self.control("GET", "ledger"))["accepted"])

    async def control(self, method: str, path: str, body: Any = None) -> Any:
        """A request to its control surface (smsd/simulator/control.py)."""
        return await self._ask(method, f"{self.url}/_simulator/{path}", body)

    async def _ask(self, method: str, url: str, body: Any) -> Any:
        data = None if body is None else orjson.dumps(body)
        async with self._http.request(
            method, url, data=data, headers={"X-Mitto-API-Key": MITTO_KEY}
        ) as response:
            content = await response.read()
            if response.status >= 300:
                raise RuntimeError(f"{method} {url}: {response.status} {content[:300]!r}")
            return orjson.loads(content) if content else None


# ------------------------------------------------------------------------------------------ daemon


class Daemon(Process):
    """A `smsd serve` with the settings that it has in production, but for those that are given."""

    url = ""

    def __init__(self, dsn: str, mitto: Mitto, folder: Path, **settings: object) -> None:
        """settings: names of smsd/config.py, such as batch_size=100."""
        super().__init__("daemon", folder)
        given: dict[str, object] = {
            "database_url": dsn,
            "data_dir": folder / "daemon",
            "port": 0,
            "admin_token": ADMIN_TOKEN,
            "public_url": PUBLIC_URL,
            "mitto_base_url": mitto.url,
            **settings,
        }
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SMSD_")},
            **{f"SMSD_{name.upper()}": str(value) for name, value in given.items()},
        }

    async def __aenter__(self) -> Self:
        await self.start((*SMSD, "serve"), self._environment)
        try:
            self.url = orjson.loads(await self.said('"daemon.started"'))["url"]
        except BaseException:
            await self.stop()
            raise
        self._http = aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(60))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()
        await self.stop()

    async def ask(self, method: str, path: str, key: str, body: Any = None) -> Any:
        """One request to its API; what it answered, RuntimeError unless that was a 2xx."""
        headers = {"Authorization": f"Bearer {key}"}
        data = None
        if body is not None:
            data, headers["Content-Type"] = orjson.dumps(body), "application/json"
        async with self._http.request(method, path, data=data, headers=headers) as response:
            content = await response.read()
            if response.status >= 300:
                raise RuntimeError(f"{method} {path}: {response.status} {content[:300]!r}")
            return orjson.loads(content) if content else None


# -------------------------------------------------------------------------------------------- shop


class Shop(NamedTuple):
    """A tenant with contacts, that can send."""

    id: int
    key: str
    account_id: int
    account: str
    """Its traffic account, as Mitto calls it."""


async def shop(
    dsn: str, contacts: int = 0, *, requests_per_second: int = NO_LIMIT,
    messages_per_second: int | None = None, first_phone: int = FIRST_PHONE,
) -> Shop:  # fmt: skip
    """A traffic account and a tenant, without limits unless given, with credits for all that may come, and contacts
    of the names Name0, Name1, … with phones from `first_phone` on."""
    connection = await database.connect(dsn)
    try:
        provider_id = f"mitto-{uuid.uuid4().hex[:8]}"
        async with connection.transaction():
            account = await tenants.create_account(
                connection, name="Bench", provider_id=provider_id, api_key=MITTO_KEY,
                requests_per_second=requests_per_second, messages_per_second=messages_per_second,
                max_in_flight=None, webhook_secret=None, server_error_means="refused",
            )  # fmt: skip
            tenant = await tenants.create_tenant(
                connection, name="Shop", account_id=account.id, sender="Shop",
                requests_per_second=requests_per_second, messages_per_second=messages_per_second,
                weight=1, batch_size=None, subscription="active", timezone="UTC",
                default_country="GR",
            )  # fmt: skip
            _, key = await tenants.create_key(connection, tenant.id)
            await credits.grant(connection, tenant.id, 10**9, "bench")
        await connection.execute(
            "insert into contact (tenant_id, phone, first_name, attributes)"
            " select $1, $2 + g, 'Name' || g, jsonb_build_object('city', 'Athens')"
            " from generate_series(0, $3::bigint - 1) g",
            tenant.id, first_phone, contacts,
        )  # fmt: skip
        await connection.execute("vacuum (analyze) contact")
        return Shop(tenant.id, key, account.id, provider_id)
    finally:
        await connection.close()


# ------------------------------------------------------------------------------------------ judging


async def alternate(
    variants: Mapping[str, Variant], runs: int, settle: Callable[[], Awaitable[None]]
) -> Results:
    """Runs all variants `runs` times, every other round backwards, so that a drift of the machine strikes all alike."""
    results: Results = {name: {} for name in variants}
    for number in range(runs):
        order = list(variants) if number % 2 == 0 else list(reversed(list(variants)))
        for name in order:
            await settle()
            figures = await variants[name]()
            for figure, value in figures.items():
                results[name].setdefault(figure, []).append(value)
            shown = ", ".join(f"{figure} {show(value)}" for figure, value in figures.items())
            print(f"  run {number + 1} of {runs}, {name}: {shown}", flush=True)
    return results


def show(value: float) -> str:
    """Three digits that matter, or all of a large number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """The median, and the least and the most."""
    return f"{show(median(values))} ({show(min(values))}–{show(max(values))})"


def ratio(results: Results, figure: str, variant: str, reference: str) -> float:
    """A variant's median in parts of the reference's."""
    return median(results[variant][figure]) / median(results[reference][figure])


def table(
    results: Results, reference: str | None = None, figure: str | None = None
) -> list[list[str]]:
    """Head and rows: of each variant and figure the median (min–max), and of `figure` the ratio to the reference; of
    all of them where none is given."""
    figures = list(dict.fromkeys(name for one in results.values() for name in one))
    rows = [["", *figures]]
    for variant, values in results.items():
        cells = [spread(values[name]) if name in values else "–" for name in figures]
        for place, name in enumerate(figures):
            compared = reference is not None and variant != reference and figure in (None, name)
            if compared and name in values and any(results[str(reference)].get(name, ())):
                cells[place] += f" ×{ratio(results, name, variant, str(reference)):.2f}"
        rows.append([variant, *cells])
    return rows


def plain(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same table for a document."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def report(
    name: str, results: Results, machine: Machine, options: Options, *, reference: str | None = None,
    figure: str | None = None, title: str = "", settings: Mapping[str, Any] = {},
    draw: Callable[[Any], None] | None = None,
) -> None:  # fmt: skip
    """Prints the table and writes `name`.json and `name`.svg.

    figure: what is compared and shown by the chart; else all are compared, and the first is shown. draw: draws on matplotlib's axes instead of those bars.
    settings: sizes and whatever else one must know to repeat it. The JSON has every raw value.
    """
    rows = table(results, reference, figure)
    compared = "" if reference is None else f", × what {reference} has"
    print(f"\n{name}: medians of {options.runs} (least–most){compared}")
    print(plain(rows), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    content = {
        "name": name,
        "command": options.command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.facts(),
        "settings": dict(settings),
        "reference": reference,
        "medians": {v: {f: median(x) for f, x in one.items()} for v, one in results.items()},
        "results": results,
        "table": markdown(rows),
    }
    target = options.out / f"{name}.json"
    target.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    figure = figure or next(iter(next(iter(results.values()))))
    chart(options.out / f"{name}.svg", title or name, results, figure, draw)


def chart(
    target: Path, title: str, results: Results, figure: str, draw: Callable[[Any], None] | None
) -> None:
    """Bars of the medians with least and most, or what `draw` draws; a line said where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no {target.name}: matplotlib is not installed (make bench installs it)")
        return
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "smsd"  # the same figures, the same file
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    if draw is not None:
        draw(axes)
    else:
        shown = {name: one[figure] for name, one in results.items() if figure in one}
        medians = [median(values) for values in shown.values()]
        below = [m - min(v) for m, v in zip(medians, shown.values(), strict=True)]
        above = [max(v) - m for m, v in zip(medians, shown.values(), strict=True)]
        bars = axes.barh(list(shown), medians, xerr=[below, above], capsize=4, color="#4878a8")
        axes.bar_label(bars, [show(m) for m in medians], padding=8)
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_xlabel(figure)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(target, metadata={"Date": None})
    plt.close(drawing)
