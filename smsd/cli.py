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
            below = [textwrap.indent(textwrap.fill(text, width - 2), "  ") for text in texts]
        for text in below:
            print(text)  # noqa: T201


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
