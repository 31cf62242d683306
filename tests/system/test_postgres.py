"""A Postgres that loses connections, runs full, or takes its time, in the midst of a campaign."""

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from smsd import embedded
from smsd.simulator import Simulator
from system.harness import Campaign, Installation

N = 2_000
ROOM_BYTES = 64 << 20


async def sending(installation: Installation, mitto: Simulator, rate: int) -> Campaign:
    mitto.switches.latency_seconds = 0.05
    campaign = await (
        await (await installation.shop(requestsPerSecond=rate)).with_contacts(N)
    ).send()
    campaign.only_forward = False
    return campaign


async def all_sent_once(installation: Installation, campaign: Campaign, mitto: Simulator) -> None:
    figures = (await campaign.received(90))["metrics"]
    assert figures["accepted"] == figures["total"] == mitto.ledger.accepted_count == N
    assert not mitto.ledger.duplicates("destination")
    await installation.audit()


async def test_connections_that_are_ended_at_any_moment_cost_nothing(
    installation: Installation, mitto: Simulator
) -> None:
    dice = random.Random(1)
    await installation.migrate()
    await installation.serve()
    campaign = await sending(installation, mitto, 10)
    assert installation.dsn is not None
    killer = await asyncpg.connect(installation.dsn)
    ended = 0
    while mitto.ledger.accepted_count < N:
        pids = await killer.fetch(
            "select pid from pg_stat_activity where application_name = 'smsd' and datname = current_database()"
        )
        if pids:
            await killer.execute("select pg_terminate_backend($1)", dice.choice(pids)["pid"])
            ended += 1
        await asyncio.sleep(0.05)
    await killer.close()
    assert ended > 20
    figures = (await campaign.ended())["metrics"]
    # An intent whose acknowledgement got lost is withdrawn, and an answer is written however often it takes.
    assert figures["accepted"] == figures["total"] == mitto.ledger.accepted_count == N
    assert not mitto.ledger.duplicates("destination")
    await installation.audit()


@pytest.fixture
def small_room() -> Iterator[Path]:
    """A file system of 64 MB, which only root may make."""
    folder = Path(tempfile.mkdtemp(prefix="smsd-"))
    folder.chmod(0o755)
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM_BYTES},mode=0777", "none", folder],
        check=False, capture_output=True,
    ).returncode == 0  # fmt: skip
    if not mounted:
        folder.rmdir()
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
    folder.rmdir()


async def test_a_disk_that_runs_full_holds_everything_up_and_loses_nothing(
    installation: Installation, mitto: Simulator, small_room: Path, tmp_path: Path
) -> None:
    room = small_room / "tables"
    room.mkdir()
    room.chmod(0o777)
    async with embedded.Postgres(tmp_path / "data", settings={"fsync": "off"}) as server:
        owner = (server.cluster).stat()
        os.chown(room, owner.st_uid, owner.st_gid)
        room.chmod(0o700)
        connection = await asyncpg.connect(server.dsn)
        await connection.execute(f"create tablespace small location '{room}'")
        await connection.execute("create database sms tablespace small")
        await connection.close()
        installation.dsn = server.dsn.replace("/smsd?", "/sms?")
        await installation.migrate()
        daemon = await installation.serve()
        campaign = await sending(installation, mitto, 10)
        await mitto.accepted_reached(N // 4)
        filler = small_room / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:  # Postgres takes of what is left meanwhile
                file.write(bytes(65_536))
        full = 0
        async with asyncio.timeout(30):
            while not full:
                await asyncio.sleep(0.1)
                full = sum("DiskFull" in line for line in daemon.lines)
        filler.unlink()
        await all_sent_once(installation, campaign, mitto)
