"""The commands as a person types them and a script reads them."""

import asyncio
import fcntl
import os
import pty
import re
import signal
import struct
import termios
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import aiohttp
import asyncpg
import orjson
import pytest
from system.harness import SMSD, Installation

from smsd import __version__
from smsd.simulator import Simulator

COMMANDS = ("serve", "migrate", "audit", "certificate", "probe", "simulator", "demo", "version")
CHECKS = ("once", "lost", "totals", "money", "orphans", "leases")


@pytest.fixture
async def shell(empty_dsn: str, tmp_path: Path) -> AsyncIterator[Installation]:
    """Where commands are typed: an empty database, no daemon."""
    async with Installation(empty_dsn, Simulator(), tmp_path) as installation:
        yield installation


async def typed(environment: Mapping[str, str], columns: int, *arguments: str) -> tuple[int, str]:
    """A command on a terminal of that many columns: its exit code and what the terminal got."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *SMSD, *arguments, env={**environment, "TERM": "xterm"},
        stdin=theirs, stdout=theirs, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs)
    output, ended = bytearray(), asyncio.get_running_loop().create_future()

    def read() -> None:
        try:
            output.extend(os.read(ours, 4096))
        except OSError:  # the other side is closed
            asyncio.get_running_loop().remove_reader(ours)
            ended.set_result(None)

    asyncio.get_running_loop().add_reader(ours, read)
    async with asyncio.timeout(30):
        code = await process.wait()
        await ended
    os.close(ours)
    return code, output.decode().replace("\r\n", "\n")


async def test_the_version_is_one_line(shell: Installation) -> None:
    assert await shell.command("version") == (0, f"smsd {__version__}\n", "")


async def test_help_names_every_command(shell: Installation) -> None:
    done = await shell.command("--help")
    assert done.code == 0
    assert [
        name for name in COMMANDS if not re.search(rf"^\W*{name} ", done.out, re.MULTILINE)
    ] == []


async def test_without_a_command_there_is_help_and_an_unknown_one_is_refused(
    shell: Installation,
) -> None:
    nothing, unknown = await asyncio.gather(shell.command(), shell.command("sned"))
    assert "Commands" in nothing.out + nothing.err
    assert unknown.code == 2
    assert "sned" in unknown.err
    assert "Traceback" not in unknown.err


async def test_migrate_says_what_ran_and_then_that_nothing_is_left(shell: Installation) -> None:
    first = await shell.command("migrate")
    second = await shell.command("migrate")
    assert (first.code, second.code) == (0, 0)
    assert first.out.splitlines()[:2] == ["ran 0001_tables", "ran 0002_functions"]
    assert second.out == "the schema is up to date\n"


async def test_audit_prints_a_line_a_check_and_json_for_programs(shell: Installation) -> None:
    await shell.migrate()
    people, programs = await asyncio.gather(
        shell.command("audit"), shell.command("audit", "--json")
    )
    lines = people.out.splitlines()
    assert people.code == programs.code == 0
    assert tuple(line.split()[0] for line in lines) == CHECKS
    assert all(line.split()[1] == "ok" for line in lines)
    checks = orjson.loads(programs.out)
    assert tuple(check["name"] for check in checks) == CHECKS
    assert all(check["broken"] == 0 for check in checks)


async def test_an_audit_that_finds_something_exits_1_and_shows_an_example(
    shell: Installation,
) -> None:
    await shell.migrate()
    assert shell.dsn is not None
    connection = await asyncpg.connect(shell.dsn)
    await connection.execute("insert into campaign (tenant_id, name) values (1, 'Sale')")
    await connection.execute("insert into message (campaign_id, id, state) values (1, 1, 10)")
    await connection.close()
    people, programs = await asyncio.gather(
        shell.command("audit"), shell.command("audit", "--json")
    )
    assert people.code == programs.code == 1
    assert re.search(r"^totals +BROKEN 1 .*\n +campaign 1: ", people.out, re.MULTILINE), people.out
    totals = next(check for check in orjson.loads(programs.out) if check["name"] == "totals")
    assert (totals["checked"], totals["broken"]) == (1, 1)


@pytest.mark.parametrize("columns", [40, 80, 120])
async def test_audit_fits_the_terminal(shell: Installation, columns: int) -> None:
    await shell.migrate()
    code, output = await typed(shell.environment(), columns, "audit")
    lines = output.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= columns
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(CHECKS)


async def test_audit_whose_reader_has_left_ends_quietly(shell: Installation) -> None:
    await shell.migrate()
    reading, writing = os.pipe()
    os.close(reading)
    process = await asyncio.create_subprocess_exec(
        *SMSD, "audit", env=shell.environment(), stdout=writing, stderr=asyncio.subprocess.PIPE
    )
    os.close(writing)
    _, err = await process.communicate()
    assert (process.returncode, err) == (1, b"")


async def test_the_simulator_says_where_it_listens_until_it_is_told_to_stop(
    shell: Installation,
) -> None:
    process = await asyncio.create_subprocess_exec(
        *SMSD, "simulator", "--port", "0", env=shell.environment(), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        line = (await process.stdout.readline()).decode()
        found = re.search(r"listens on (http://127\.0\.0\.1:\d+),", line)
        assert found, line
        async with shell.http.get(f"{found[1]}/_simulator/ledger") as response:
            assert (await response.json())["accepted"] == 0
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    with pytest.raises(aiohttp.ClientConnectionError):
        await shell.http.get(f"{found[1]}/_simulator/ledger")
