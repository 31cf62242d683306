"""`smsd serve` without SMSD_DATABASE_URL: a Postgres of its own, which keeps what was committed."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from smsd.simulator import Simulator
from system.harness import Installation
from system.test_start import complaints


def server_pid(folder: Path) -> int:
    return int((folder / "data" / "postgres" / "postmaster.pid").read_text().split()[0])


@pytest.fixture
async def alone(mitto: Simulator, tmp_path: Path) -> AsyncIterator[Installation]:
    """An installation without a database; a Postgres that a killed daemon left behind ends with the test."""
    async with Installation(None, mitto, tmp_path) as installation:
        yield installation
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(server_pid(tmp_path), signal.SIGINT)


async def test_data_survives_a_stop_and_a_kill(
    alone: Installation, mitto: Simulator, tmp_path: Path
) -> None:
    daemon = await alone.serve()
    shop = await (await alone.shop(requestsPerSecond=20)).with_contacts(2_000)
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended() == 0
    assert not (tmp_path / "data" / "postgres" / "postmaster.pid").exists()

    daemon = await alone.serve()
    campaign = await shop.send()
    await mitto.accepted_reached(400)
    await daemon.kill()
    await alone.serve()
    figures = (await campaign.ended())["metrics"]

    assert figures["total"] == figures["accepted"] + figures["unknown"] == 2_000
    assert not mitto.ledger.duplicates("destination")
    await alone.audit()


@pytest.mark.parametrize("event", ["postgres.started", "http.listening", "schema.migrated"])
async def test_a_daemon_told_to_stop_while_it_starts_does_so(
    alone: Installation, tmp_path: Path, event: str
) -> None:
    daemon = await alone.launch()
    await daemon.logged(event)
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended() == 0
    assert "Traceback" not in daemon.stderr, daemon.stderr
    assert not (tmp_path / "data" / "postgres" / "postmaster.pid").exists()


async def test_beside_a_daemon_there_is_room_for_audit_and_migrate_and_not_for_another_daemon(
    alone: Installation,
) -> None:
    daemon = await alone.serve()
    beside, migrated, second = await asyncio.gather(
        alone.command("audit", "--json"), alone.command("migrate"), alone.command("serve")
    )
    lines = complaints(second)
    assert second.code == 1
    assert len(lines) == 1, second.err
    assert f"pid {daemon.pid}" in lines[0]
    assert "SMSD_DATABASE_URL" in lines[0]
    assert (await alone.ask("GET", "/readyz", "")).status == 200
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended() == 0
    after = await alone.command("audit", "--json")

    assert beside.code == after.code == 0
    assert orjson.loads(beside.out) == orjson.loads(after.out)
    assert migrated == (0, "the schema is up to date\n", migrated.err)


async def test_a_postgres_that_dies_is_started_again_by_its_daemon(
    alone: Installation, mitto: Simulator, tmp_path: Path
) -> None:
    daemon = await alone.serve()
    shop = await (await alone.shop(requestsPerSecond=20)).with_contacts(2_000)
    campaign = await shop.send()
    await mitto.accepted_reached(400)

    os.kill(server_pid(tmp_path), signal.SIGQUIT)
    await daemon.logged("postgres.died")

    figures = (await campaign.ended())["metrics"]
    assert figures["accepted"] == figures["total"] == mitto.ledger.accepted_count == 2_000
    assert daemon.lives
    await alone.audit()
