"""The commands. Each is a few lines: what it does stands in the rooms below."""

import asyncio
import os
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

from smsd import __version__, audit, config, daemon, database, demo, embedded, simulator, telemetry

app = typer.Typer(
    help="Sends bulk SMS campaigns through Mitto, with Postgres as its queue.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
    except (database.SchemaError, daemon.ListenError, embedded.EmbeddedError) as error:
        _fail(str(error))
    except BrokenPipeError:  # whoever read our output has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
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
    """A line a check where that fits or nobody looks; what a narrow terminal would break stands below."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000
    for check in checks:
        verdict = "ok" if not check.broken else f"BROKEN {check.broken:,}"
        line = f"{check.name:8} {verdict:>12}  of {check.checked:>11,}"
        below = [check.example] if check.example else []
        if len(line) + 2 + len(check.promise) <= width:
            line = f"{line}  {check.promise}"
        else:
            line = f"{check.name:8} {verdict} of {check.checked:,}"
            below.insert(0, check.promise)
        print(line)  # noqa: T201
        for text in below:
            indent = "  " if width < len(f"{check.name:8} {verdict}") + 60 else " " * 24
            print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent))  # noqa: T201


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


@app.command()
def version() -> None:
    """The version."""
    print(f"smsd {__version__}")  # noqa: T201
