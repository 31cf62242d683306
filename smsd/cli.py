"""The commands. Each is a few lines: what it does stands in the rooms below."""

import asyncio
import gc
import importlib
import os
import re
import shutil
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import asyncpg
import orjson
import typer
import uvloop

from smsd import (
    __version__,
    audit,
    campaigns,
    certificates,
    config,
    daemon,
    database,
    demo,
    embedded,
    mitto,
    probe,
    receipts,
    recovery,
    simulator,
    telemetry,
    text,
)
from smsd.api import certificates as certificates_api

app = typer.Typer(
    help="Sends bulk SMS campaigns through Mitto, with Postgres as its queue.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

WIDE = 110  # columns of the longest line of the audit
EX_CONFIG = 78  # sysexits: what systemd is told not to restart for


def main() -> None:
    """Entry point: an expected failure is one line on stderr, not a traceback."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except config.ConfigError as error:
        _fail(str(error), EX_CONFIG)
    except (
        database.SchemaError,
        daemon.ListenError,
        embedded.EmbeddedError,
        certificates.NoRoom,
        certificates.Unaccounted,
        probe.ProbeError,
        recovery.AtWork,
    ) as error:
        _fail(str(error))
    except BrokenPipeError:  # whoever read our output has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except database.UNUSABLE_DSN as error:
        _fail(f"SMSD_DATABASE_URL cannot be used: {error}", EX_CONFIG)
    except asyncpg.PostgresError as error:
        _fail(f"Postgres refuses: {error}")
    except database.AWAY as error:
        _fail(f"the database does not answer ({error}): check SMSD_DATABASE_URL")


def _fail(message: str, code: int = 1) -> NoReturn:
    for line in message.splitlines():
        print(f"smsd: {line}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


def _run(main: Any) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def _settings() -> config.Settings:
    settings = config.load()
    telemetry.configure_logging(settings.log_level, settings.log_format)
    return settings


@app.command()
def serve() -> None:
    """The daemon: API, queue, senders and receipts in one process."""
    # What is imported by now stays, and a batch is thousands of objects that die by themselves: looked through for
    # cycles at Python's own pace they cost a seventh of the daemon's time.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    _run(daemon.serve(_settings()))


@app.command()
def migrate() -> None:
    """Brings the schema up to date, then exits. Safe with many at once."""

    async def run() -> None:
        async with daemon.postgres(_settings(), beside=True) as dsn:
            ran = await daemon.migrate(dsn)
        print("\n".join(f"ran {name}" for name in ran) or "the schema is up to date")  # noqa: T201

    _run(run())


@app.command("audit")
def audit_(json: Annotated[bool, typer.Option("--json", help="for programs")] = False) -> None:
    """Checks the invariants that a database can show; exit 1 if one is broken."""

    async def run() -> list[audit.Check]:
        async with daemon.postgres(_settings(), beside=True) as dsn:
            connection = await database.connect(dsn)
            try:
                await database.check_schema(connection)
                return await audit.run(connection)
            finally:
                await connection.close()

    checks = _run(run())
    if json:
        sys.stdout.buffer.write(orjson.dumps([asdict(check) for check in checks]) + b"\n")
    else:
        _print_checks(checks)
    sys.exit(any(check.broken for check in checks))


def _print_checks(checks: list[audit.Check]) -> None:
    """A line a check; on a terminal that would break it, what is promised stands below."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE
    for check in checks:
        verdict = "ok" if not check.broken else f"BROKEN {check.broken:,}"
        if width >= WIDE:
            print(f"{check.name:8} {verdict:>12}  of {check.checked:>11,}  {check.promise}")  # noqa: T201
            below = [f"{'':24}{check.example}"] if check.example else []
        else:
            print(f"{check.name:8} {verdict} of {check.checked:,}")  # noqa: T201
            texts = filter(None, (check.promise, check.example))
            below = [textwrap.indent(textwrap.fill(one, width - 2), "  ") for one in texts]
        for line in below:
            print(line)  # noqa: T201


@app.command("certificate")
def certificate_(
    campaign: Annotated[int, typer.Argument(help="the campaign's id", min=1, max=2**63 - 1)],
    json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    lines: Annotated[
        bool, typer.Option("--lines", help="the lines that the hash is over, one a recipient")
    ] = False,
    check: Annotated[
        str | None, typer.Option(help="exit 1 unless this is the hash", metavar="SHA256")
    ] = None,
) -> None:
    """The account of a campaign, recomputed from its rows, with a hash over its lines."""
    if json and lines:
        raise typer.BadParameter("takes --json or --lines, not both")
    if check is not None and not re.fullmatch("[0-9a-fA-F]{64}", check):
        raise typer.BadParameter("takes the 64 hex digits of a SHA-256", param_hint="--check")
    found = _run(_certify(campaign, lines))
    if json:
        answer = certificates_api.shape(found).model_dump_json(by_alias=True)
        sys.stdout.buffer.write(answer.encode() + b"\n")
    elif not lines:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(certificates.describe(found, width)))  # noqa: T201
    if check is not None and check.lower() != found.sha256:
        sys.stdout.flush()
        _fail(f"campaign {campaign} has another hash now: {found.sha256}")


async def _certify(campaign_id: int, lines: bool) -> certificates.Certificate:
    """The certificate; with `lines`, these go to stdout once the database is let go."""
    async with daemon.postgres(_settings(), beside=True) as dsn, certificates.scratch() as file:
        connection = await database.connect(dsn)
        try:
            await database.check_schema(connection)
            async with certificates.snapshot(connection):
                tenant_id = await certificates.owner(connection, campaign_id)
                found = tenant_id and await certificates.issue(
                    connection, tenant_id, campaign_id, file if lines else None
                )
        except campaigns.WrongStatus as error:
            _fail(f"campaign {campaign_id}: {error}; there is an account of it once it is enqueued")
        except campaigns.MessagesRemoved as error:
            _fail(f"campaign {campaign_id}: {error}; leave out --lines")
        finally:
            await connection.close()
        if not found:
            _fail(f"campaign {campaign_id} does not exist")
        file.seek(0)
        shutil.copyfileobj(file, sys.stdout.buffer)
    return found


@app.command("probe")
def probe_(
    account: Annotated[
        int, typer.Option(help="the id that smsd gave to the traffic account", min=1, max=2**63 - 1)
    ],
    to: Annotated[str, typer.Option(help="your own phone, +30…: it gets the messages")],
    sender: Annotated[str, typer.Option(help="what the phone shows")],
    largest: Annotated[
        int | None,
        typer.Option(help="try a request of so many messages; costs them", min=2, max=5000),
    ] = None,
    throttle: Annotated[
        int | None, typer.Option(help="try so many GETs in a burst; costs nothing", min=1, max=5000)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask whether to send")] = False,
    json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Asks Mitto what its documentation leaves open, and keeps the answers as the account's capabilities."""
    wanted = probe.Wanted(account, _phone(to), _sender(sender), largest, throttle)
    settings = _settings()
    shared = settings.mitto_api_key

    async def run() -> probe.Report:
        async with (
            daemon.postgres(settings, beside=True) as dsn,
            await database.open_pool(dsn, 4) as pool,
            mitto.Client(settings.mitto_base_url, settings.mitto_timeout) as client,
        ):
            await database.check_schema(pool)
            found = await probe.find_account(pool, account)
            if not yes:
                _agree_to_send(wanted, found.name)
            return await probe.run(
                pool, client, wanted, shared_key=shared.get_secret_value() if shared else "",
                all_limit=settings.requests_per_second,
            )  # fmt: skip

    report = _run(run())
    if json:
        findings = [finding._asdict() for finding in report.findings]
        answer = {"account": account, "findings": findings, "capabilities": report.capabilities}
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
    else:
        _print_findings(report.findings)


def _phone(given: str) -> int:
    try:
        if given.strip().startswith(("+", "00")):
            return text.normalise_phone(given)
    except text.InvalidPhone:
        pass
    _fail(
        f"--to: {given!r:.60} is no phone number; takes + and 8 to 15 digits, such as +306900000000"
    )


def _sender(given: str) -> str:
    if not probe.SENDER.fullmatch(given):
        _fail(f"--sender: {given!r:.60}; takes 1 to 11 letters and digits, or 1 to 16 digits")
    return given


def _agree_to_send(wanted: probe.Wanted, name: str) -> None:
    if not sys.stdin.isatty():
        raise probe.ProbeError(
            "this sends messages that Mitto bills: say --yes where nobody can be asked"
        )
    typer.echo(
        f"{wanted.messages} messages of one segment each go to {text.plus(wanted.phone)} from"
        f" {wanted.sender}, through the traffic account {name!r}. Mitto bills them; they are not"
        " counted in credits. One more goes to no number, to see it refused.",
        err=True,
    )
    typer.confirm("Send them?", abort=True, err=True)


def _print_findings(findings: list[probe.Finding]) -> None:
    """A line a question; on a terminal that would break it, what was seen stands below."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for name, value, note in findings:
        line = f"{name:16} {_shown(value):16}"
        if not width or len(line) + 1 + len(note) <= width:
            print(f"{line} {note}")  # noqa: T201
        else:
            print(line.rstrip())  # noqa: T201
            print(textwrap.indent(textwrap.fill(note, width - 2), "  "))  # noqa: T201


def _shown(value: Any) -> str:
    match value:
        case None:
            return "unknown"
        case bool():
            return "yes" if value else "no"
        case {"status": status}:
            return f"HTTP {status}"
    return str(value)


receipts_app = typer.Typer(help="Delivery receipts that could not be read or matched.")
app.add_typer(receipts_app, name="receipts", no_args_is_help=True)


@receipts_app.command("replay")
def replay(json: Annotated[bool, typer.Option("--json", help="for programs")] = False) -> None:
    """Reads them again, and applies those that are understood by now. Safe with many at once, and again."""

    async def run() -> receipts.Replay:
        async with daemon.postgres(_settings(), beside=True) as dsn:
            pool = await database.open_pool(dsn, 2)
            try:
                await database.check_schema(pool)
                return await receipts.replay(pool)
            finally:
                await pool.close()

    done = _run(run())
    if json:
        sys.stdout.buffer.write(orjson.dumps(asdict(done)) + b"\n")
        return
    print(  # noqa: T201
        f"replayed {done.replayed:,} ({done.updated:,} messages moved), still unreadable {done.unreadable:,}"
    )
    for why, n in sorted(done.reasons.items()):
        print(f"{n:>11,}  {why}")  # noqa: T201


@app.command()
def recover(
    go_on: Annotated[
        bool, typer.Option("--continue", help="what is queued here is sent as it is")
    ] = False,
    as_unknown: Annotated[
        bool,
        typer.Option(help="what is queued here may have been sent already: it becomes unknown"),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """After a failover or a restore: what the queue waits for (exit 1 while it does), or a decision to go on."""
    if go_on and as_unknown:
        raise typer.BadParameter("takes --continue or --as-unknown, not both")

    async def run() -> recovery.Report:
        async with daemon.postgres(_settings(), beside=True) as dsn:
            connection = await database.connect(dsn)
            try:
                await database.check_schema(connection)
                return await recovery.recover(
                    connection, decide=go_on or as_unknown, as_unknown=as_unknown
                )
            finally:
                await connection.close()

    report = _run(run())
    if json:
        sys.stdout.buffer.write(orjson.dumps(asdict(report)) + b"\n")
    else:
        print("\n".join(recovery.describe(report)))  # noqa: T201
    sys.exit(report.waiting is not None)


@app.command("simulator")
def simulator_(
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8090,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    webhook_url: Annotated[str | None, typer.Option(help="where receipts go")] = None,
    webhook_secret: Annotated[str | None, typer.Option(envvar="SMSD_WEBHOOK_SECRET")] = None,
) -> None:
    """A Mitto look-alike alone, with its switches and its ledger of accepted messages."""
    _run(simulator.run(host, port, webhook_url, webhook_secret))


@app.command("demo")
def demo_(
    csv: Annotated[Path | None, typer.Option(help="contacts to send to; else a sample")] = None,
    messages: Annotated[
        int | None, typer.Option(help="so many made-up contacts instead", min=1)
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="go on running afterwards")] = False,
) -> None:
    """A whole campaign on this machine: Postgres, a Mitto simulator, the daemon, and its account."""
    sys.exit(_run(demo.run(csv, messages, keep=keep)))


@app.command(
    "bench",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def bench_(context: typer.Context) -> None:
    """The benchmarks of the checkout that smsd is installed from; takes what `python -m bench` takes."""
    checkout = database.sql_folder().parent
    if not (checkout / "bench" / "__main__.py").is_file():
        _fail("bench: smsd is not installed from a checkout; clone one, and `make bench` there")
    sys.path.insert(0, str(checkout))
    importlib.import_module("bench.__main__").main(context.args)


@app.command()
def version() -> None:
    """The version."""
    print(f"smsd {__version__}")  # noqa: T201
