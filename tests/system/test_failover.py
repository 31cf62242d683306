"""A primary that dies before its standby, with and without what it had committed last; and a restored backup."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import orjson
import pytest

from smsd import database, embedded
from smsd.simulator import Simulator
from system.harness import Campaign, Installation, Shop

SETTINGS = {"fsync": "off", "shared_buffers": "16MB"}
N = 4_000


def socket_of(folder: Path) -> str:
    """Where the server of a data directory listens."""
    return parse_qs(urlsplit(embedded.dsn_of(folder)).query)["host"][0]


def two_hosts(*folders: Path) -> str:
    """The URL of whichever of these servers is the primary."""
    hosts = ",".join(socket_of(folder) for folder in folders)
    return f"postgresql://smsd@/smsd?host={hosts}&sslmode=disable"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place that the user of a Postgres can walk to, and short enough for a socket."""
    made = Path(tempfile.mkdtemp(prefix="smsd-"))
    made.chmod(0o755)
    for name in ("one", "two"):
        (made / name).mkdir(mode=0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
async def primary(folder: Path) -> AsyncIterator[embedded.Postgres]:
    """A server that others can stream from."""
    async with embedded.Postgres(folder / "one", settings=SETTINGS) as server:
        yield server


async def copy_of(primary: embedded.Postgres, folder: Path, *options: str) -> None:
    """A base backup of a running server."""
    program = embedded.find_binaries() / "pg_basebackup"
    where = ("-D", folder / "postgres", "-h", socket_of(primary.data_dir), "-U", "smsd")
    process = await asyncio.create_subprocess_exec(
        program, *where, "-c", "fast", "--no-sync", *options, stderr=subprocess.PIPE
    )
    _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    (folder / "postgres" / f"{embedded.SOCKET_NAME}.lock").unlink()  # it stands among the files


@contextlib.asynccontextmanager
async def standby_of(
    primary: embedded.Postgres, folder: Path, *, synchronous: bool
) -> AsyncIterator[embedded.Postgres]:
    """A streaming standby; synchronous: no commit is acknowledged before it stands there too."""
    await copy_of(primary, folder, "-R")
    connection = await database.connect(primary.dsn)
    async with embedded.Postgres(folder, settings=SETTINGS) as server:
        await until(lambda: connection.fetchval("select count(*) from pg_stat_replication"))
        if synchronous:
            await connection.execute("alter system set synchronous_standby_names = '*'")
            await connection.execute("select pg_reload_conf()")
            await until(
                lambda: connection.fetchval("select sync_state <> 'async' from pg_stat_replication")
            )
        await connection.close()
        yield server


async def until(holds: Callable[[], Awaitable[object]], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():
            await asyncio.sleep(0.05)


def destroy(server: embedded.Postgres) -> None:
    """SIGKILL; its processes, each in a group of its own, see that and end unless they are stopped."""
    assert server.pid is not None
    os.killpg(server.pid, signal.SIGKILL)


async def promote(server: embedded.Postgres) -> None:
    """The standby becomes a primary."""
    connection = await asyncpg.connect(server.dsn)
    assert await connection.fetchval("select pg_promote()")
    await connection.close()


async def sending(installation: Installation, mitto: Simulator) -> Campaign:
    """A campaign in the midst of which something may happen: a request in a sixth of a second."""
    mitto.switches.latency_seconds, mitto.switches.latency_jitter_seconds = 0.1, 0.1
    shop: Shop = await (await installation.shop(requestsPerSecond=5)).with_contacts(N)
    campaign = await shop.send()
    campaign.only_forward = False
    return campaign


async def hold_back_the_standby(primary: embedded.Postgres) -> int:
    """From now on what the primary commits does not reach its standby; the process that would send it, stopped."""
    connection = await database.connect(primary.dsn)
    pid = int(await connection.fetchval("select pid from pg_stat_replication"))
    os.kill(pid, signal.SIGSTOP)
    await connection.close()
    return pid


# ---------------------------------------------------------------------------------------- failover


async def test_a_campaign_goes_on_at_the_synchronous_standby_and_nobody_gets_it_twice(
    installation: Installation, mitto: Simulator, primary: embedded.Postgres, folder: Path
) -> None:
    async with standby_of(primary, folder / "two", synchronous=True) as standby:
        installation.dsn = two_hosts(primary.data_dir, standby.data_dir)
        await installation.migrate()
        await installation.serve()
        daemon = await installation.serve()
        campaign = await sending(installation, mitto)
        await mitto.accepted_reached(N // 4)
        destroy(primary)
        await promote(standby)
        await daemon.logged("database.changed")
        figures = (await campaign.ended())["metrics"]
        assert figures["accepted"] == figures["total"] == mitto.ledger.accepted_count == N
        assert not mitto.ledger.duplicates("destination")
        await installation.audit()


async def test_what_the_standby_had_not_got_is_said_again_and_nobody_gets_it_twice(
    installation: Installation, mitto: Simulator, primary: embedded.Postgres, folder: Path
) -> None:
    async with standby_of(primary, folder / "two", synchronous=False) as standby:
        installation.dsn = two_hosts(primary.data_dir, standby.data_dir)
        await installation.migrate()
        await installation.serve()
        await installation.serve()
        campaign = await sending(installation, mitto)
        await mitto.accepted_reached(N // 4)
        sender = await hold_back_the_standby(primary)
        await mitto.accepted_reached(N // 2)
        destroy(primary)
        os.kill(sender, signal.SIGKILL)
        await promote(standby)
        figures = (await campaign.ended())["metrics"]
        assert figures["accepted"] == figures["total"] == mitto.ledger.accepted_count == N
        assert not mitto.ledger.duplicates("destination")
        await installation.audit()
        asserted = [await one.logged("postings.asserted") for one in installation.daemons]
        assert sum(line["restored"] for line in asserted)


# ----------------------------------------------------------------------------------------- restore


async def test_after_a_restore_nothing_is_sent_until_a_person_says_what_became_of_it(
    installation: Installation, mitto: Simulator, primary: embedded.Postgres, folder: Path
) -> None:
    installation.dsn = primary.dsn
    await installation.migrate()
    first = await installation.serve()
    campaign = await sending(installation, mitto)
    await mitto.accepted_reached(N // 8)
    await copy_of(primary, folder / "two")
    copied = mitto.ledger.accepted_count
    await mitto.accepted_reached(copied + 500)
    first.signal(signal.SIGTERM)
    await first.ended()
    destroy(primary)
    sent = mitto.ledger.accepted_count
    (folder / "two/postgres/recovery.signal").touch()
    restored = embedded.Postgres(
        folder / "two", settings={**SETTINGS, "restore_command": "false", "archive_mode": "off"}
    )
    async with restored:
        installation.dsn = restored.dsn
        daemon = await installation.serve()
        await daemon.logged("replica.buried")
        done = await installation.command("recover", "--json")
        assert done.code == 1, done.err
        waiting = orjson.loads(done.out)["waiting"]
        assert (len(waiting["gone"]), waiting["awaited"], waiting["asserted"]) == (1, [], [])
        assert mitto.ledger.accepted_count == sent
        decided = await installation.command("recover", "--as-unknown")
        assert decided.code == 0, decided.err
        figures = (await campaign.ended())["metrics"]
        assert figures["accepted"] + figures["unknown"] == figures["total"] == N
        assert figures["unknown"] >= sent - copied
        assert mitto.ledger.accepted_count == sent
        await installation.audit()
