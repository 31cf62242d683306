"""How a daemon starts, what it tells systemd, and in which words it refuses."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from smsd import database, embedded
from system.harness import Done, Installation

EX_CONFIG = 78


class Systemd:
    """The socket to which a service speaks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(path))

    def close(self) -> None:
        self._socket.close()

    @property
    def environment(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self.path), "WATCHDOG_USEC": "300000"}

    async def hears(self, message: str, times: int = 1) -> None:
        """Returns once the message came so many times from now on."""
        async with asyncio.timeout(20):
            while times:
                data = await asyncio.get_running_loop().sock_recv(self._socket, 1024)
                self.heard.append(data.decode())
                times -= self.heard[-1] == message


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    manager = Systemd(tmp_path / "notify")
    yield manager
    manager.close()


@pytest.fixture
async def absent_postgres(tmp_path: Path) -> AsyncIterator[embedded.Postgres]:
    """A server that has a database with a schema, and does not run."""
    server = embedded.Postgres(tmp_path / "server", settings={"fsync": "off"})
    await server.start()
    await database.migrate(server.dsn)
    await server.stop()
    yield server
    await server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def complaints(done: Done) -> list[str]:
    """The lines in which a command said why it would not."""
    assert "Traceback" not in done.err, done.err
    lines = done.err.splitlines()
    return [line.removeprefix("smsd: ") for line in lines if line.startswith("smsd: ")]


# ------------------------------------------------------------------------------------------ starts


async def test_a_daemon_waits_for_an_absent_postgres_and_says_so(
    installation: Installation, absent_postgres: embedded.Postgres, systemd: Systemd
) -> None:
    installation.dsn = absent_postgres.dsn
    daemon = await installation.launch(extra=systemd.environment, signing_key="k" * 16)
    daemon.url = (await daemon.logged("http.listening"))["url"]
    await daemon.logged("database.awaited")

    # systemd must not restart what only waits.
    await systemd.hears("READY=1")
    await systemd.hears("WATCHDOG=1", times=3)
    alive = await installation.ask("GET", "/healthz", "")
    ready = await installation.ask("GET", "/readyz", "")
    campaigns = await installation.ask("GET", "/api/campaigns", "sk_whatever")
    assert alive.status == 200
    assert (ready.status, ready.body["code"]) == (503, "NOT_READY")
    assert (campaigns.status, campaigns.body["code"]) == (503, "QUEUE_UNAVAILABLE")

    await absent_postgres.start()
    await daemon.started()
    ready = await installation.ask("GET", "/readyz", "")
    assert ready.status == 200
    daemon.signal(signal.SIGTERM)
    await systemd.hears("STOPPING=1")
    assert await daemon.ended() == 0


async def test_a_daemon_that_still_waits_for_postgres_stops_when_told(
    installation: Installation, absent_postgres: embedded.Postgres
) -> None:
    installation.dsn = absent_postgres.dsn
    daemon = await installation.launch()
    await daemon.logged("database.awaited")
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended(5) == 0


async def test_a_rehearsal_that_fails_is_told_and_the_start_goes_on(
    installation: Installation,
) -> None:
    await installation.migrate()
    assert installation.dsn is not None
    connection = await database.connect(installation.dsn)
    await connection.execute("alter function settle_accepted rename to settled_otherwise")
    await connection.close()
    daemon = await installation.serve()
    told = await daemon.logged("rehearsal.failed")
    assert "settle_accepted" in told["error"]


# ----------------------------------------------------------------------------------------- refuses


async def test_every_wrong_setting_has_a_line_of_its_own(installation: Installation) -> None:
    done = await installation.command("serve", port="high", mitto_timeout=0, log_level="loud")
    lines = complaints(done)
    assert done.code == EX_CONFIG
    assert len(lines) == len(done.err.splitlines()) == 3
    for name, value in (("PORT", "high"), ("MITTO_TIMEOUT", "0"), ("LOG_LEVEL", "loud")):
        assert any(line.startswith(f"SMSD_{name}: got '{value}'") for line in lines), lines


async def test_settings_that_cannot_work_stop_the_start_in_one_line(
    installation: Installation,
) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mitto_timeout": 20, "shutdown_seconds": 20}, "SMSD_SHUTDOWN_SECONDS"),
        ({"host": "0.0.0.0"}, "SMSD_WEBHOOK_SECRET"),
        ({"database_url": "mysql://here"}, "SMSD_DATABASE_URL"),
        ({"database_url": "postgresql://u:hush-hush@here:port/x"}, "SMSD_DATABASE_URL"),
        ({"admin_token": None, "admin_token_file": "/nowhere"}, "SMSD_ADMIN_TOKEN_FILE"),
    ]
    starts = [installation.command("serve", **settings) for settings, _ in wrong]
    for done, (_, names) in zip(await asyncio.gather(*starts), wrong, strict=True):
        lines = complaints(done)
        assert done.code == EX_CONFIG
        assert len(lines) == len(done.err.splitlines()) == 1
        assert names in lines[0]
        assert "hush-hush" not in done.err


async def _execute(dsn: str | None, statement: str) -> None:
    assert dsn is not None
    connection = await asyncpg.connect(dsn)
    await connection.execute(statement)
    await connection.close()


async def _refuses(
    installation: Installation, commands: list[str], *said: str, **settings: Any
) -> None:
    """Each command ends with one line that says all of this."""
    for done in await asyncio.gather(
        *[installation.command(command, **settings) for command in commands]
    ):
        lines = complaints(done)
        assert done.code == 1
        assert len(lines) == 1, done.err
        assert all(part in lines[0] for part in said), lines


async def test_a_database_without_a_schema_is_refused(installation: Installation) -> None:
    await _refuses(installation, ["serve", "audit"], "no schema", "smsd migrate")


async def test_a_schema_that_is_behind_is_refused(installation: Installation) -> None:
    await installation.migrate()
    behind = (
        "delete from schema_migration where number = (select max(number) from schema_migration)"
    )
    await _execute(installation.dsn, behind)
    await _refuses(installation, ["serve", "audit"], "behind", "smsd migrate")


async def test_a_schema_of_the_future_is_refused(installation: Installation) -> None:
    await installation.migrate()
    future = "insert into schema_migration values (9999, '9999_future', 'x', 9999, now())"
    await _execute(installation.dsn, future)
    await _refuses(installation, ["serve", "audit", "migrate"], "9999_future", "upgrade smsd")


async def test_a_schema_of_the_future_that_suits_this_code_is_taken(
    installation: Installation,
) -> None:
    await installation.migrate()
    future = "insert into schema_migration values (9999, '9999_future', 'x', 1, now())"
    await _execute(installation.dsn, future)
    await installation.serve()
    await installation.audit()


async def test_a_port_in_use_is_refused(installation: Installation) -> None:
    await installation.migrate()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        await _refuses(installation, ["serve"], f"127.0.0.1:{port}", "SMSD_PORT", port=port)


async def test_a_database_that_postgres_does_not_have_is_named(
    installation: Installation, empty_dsn: str
) -> None:
    dsn = empty_dsn.replace("/smsd_test_", "/no_smsd_test_")
    commands = ["serve", "migrate", "audit"]
    await _refuses(installation, commands, "no_smsd_test_", database_url=dsn)


async def test_commands_say_that_postgres_is_away(
    installation: Installation, absent_postgres: embedded.Postgres
) -> None:
    commands = ["migrate", "audit"]
    dsn = absent_postgres.dsn
    await _refuses(installation, commands, "SMSD_DATABASE_URL", database_url=dsn)


async def test_ctrl_c_is_as_good_as_sigterm(installation: Installation) -> None:
    await installation.migrate()
    daemon = await installation.serve()
    daemon.signal(signal.SIGINT)
    assert await daemon.ended() == 0
    assert "Traceback" not in daemon.stderr
