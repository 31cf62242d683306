"""Two replicas of different versions on one database: a rolling upgrade over a migration."""

import shutil
from pathlib import Path

import pytest

from smsd import database
from smsd.simulator import Simulator
from system.bench import Tenant, stock
from system.harness import Installation

ROOT = Path(__file__).parents[2]
NEWEST = database.migrations()[-1].number


def next_version(folder: Path, oldest_code: int) -> dict[str, str]:
    """A copy of this code with one more migration; what runs it instead of this one."""
    shutil.copytree(ROOT / "smsd", folder / "smsd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "sql", folder / "sql")
    migration = folder / "sql" / "migrations" / "9999_next.sql"
    migration.write_text(
        f"-- oldest code: {oldest_code}\nalter table campaign add column next_idea text;\n"
    )
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


async def test_old_and_new_replicas_send_side_by_side_over_a_migration(
    dsn: str, mitto: Simulator, tmp_path: Path
) -> None:
    new_code = next_version(tmp_path / "next", NEWEST)
    mitto.switches.latency_seconds = 0.1
    async with Installation(dsn, mitto, tmp_path) as installation:
        old = await installation.serve()
        [shop] = await stock(
            dsn, (Tenant(20_000, 20, account_requests=20),), installation, "refused"
        )
        campaign = await shop.send()
        await mitto.accepted_reached(1_000)

        done = await installation.command("migrate", extra=new_code)
        assert done.code == 0, done.err
        new = await installation.serve(extra=new_code)
        seen_old, seen_new = len(old.events), len(new.events)
        await old.logged("batch.settled", after=seen_old)
        await new.logged("batch.settled", after=seen_new)
        assert (await installation.ask("GET", "/readyz", "", via=old)).status == 200
        assert (await installation.ask("GET", "/readyz", "", via=new)).status == 200

        await campaign.act("cancel")
        status = await campaign.received()
        assert status["metrics"]["accepted"] == mitto.ledger.accepted_count
        assert status["metrics"]["accepted"] + status["metrics"]["cancelled"] == 20_000
        assert not mitto.ledger.duplicates("destination")
        await installation.audit()


@pytest.mark.parametrize("command", ["serve", "audit"])
async def test_a_migration_that_needs_newer_code_refuses_the_old_one_in_one_line(
    dsn: str, mitto: Simulator, tmp_path: Path, command: str
) -> None:
    new_code = next_version(tmp_path / "next", 9999)
    async with Installation(dsn, mitto, tmp_path) as installation:
        old = await installation.serve()
        assert (await installation.command("migrate", extra=new_code)).code == 0

        ready = await installation.ask("GET", "/readyz", "", via=old)
        assert (ready.status, ready.body["code"]) == (503, "NOT_READY")
        assert "upgrade smsd" in ready.body["message"]
        done = await installation.command(command)
        lines = [line for line in done.err.splitlines() if line.startswith("smsd: ")]
        assert done.code == 1
        assert len(lines) == 1, done.err
        assert "9999_next" in lines[0]
        await installation.serve(extra=new_code)
