"""A short, deterministic part of the fault bench: every named point by kill -9, and one run of every other family."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from smsd import daemon, embedded
from system import befall
from system.bench import Scenario, Tenant, Verdict

pytestmark = pytest.mark.timeout(360)  # what is unknown may be asked about for four minutes
SMALL = (Tenant(messages=1_500, batch_size=30, account_requests=80),)
LONG = (Tenant(messages=1_500, batch_size=30, account_requests=10),)
"""Sends for five seconds: two strikes, each after a pause of less than one, find it sending."""


def scenario(*names: str, **fields: Any) -> Scenario:
    """A small run under these faults."""
    given: dict[str, Any] = {
        "seed": 7, "tenants": SMALL, "armed_lives": 1, "singles": False, "replicas": 1, "quiet_seconds": 1.0,
        "switches": {"latency_seconds": 0.1, "latency_jitter_seconds": 0.1, "dlr_batch": 20},
    }  # fmt: skip
    return Scenario(faults=names, **(given | fields))


async def sound(
    scenario: Scenario, dsn: str, folder: Path, postgres: embedded.Postgres | None = None
) -> Verdict:
    verdict, bench = await befall.run(scenario, dsn, folder, postgres)
    said = "\n".join(line for one in bench.installation.daemons for line in one.lines[-100:])
    assert not verdict.breaches, "\n".join([*verdict.breaches, said])
    for name in scenario.faults:
        assert verdict.struck[name], f"{name} never struck: {verdict.struck}"
    return verdict


def groups() -> dict[str, list[str]]:
    """The named points by what happens there: those of one group strike one life after the other."""
    found: dict[str, list[str]] = {}
    for point in befall.POINTS:
        group = point.partition(".")[0]
        found.setdefault("post" if group in ("gate", "body", "answer") else group, []).append(point)
    return found


@pytest.mark.parametrize("points", groups().values(), ids=groups().keys())
async def test_a_daemon_killed_at_a_named_point_neither_loses_nor_repeats(
    dsn: str, tmp_path: Path, points: list[str]
) -> None:
    names = [f"kill@{point}" for point in points]
    verdict = await sound(scenario(*names, armed_lives=len(names)), dsn, tmp_path)
    assert verdict.deaths == len(points)


@pytest.mark.parametrize(
    "points", [("claim.granted", "gate.passed"), ("intent.written", "settle.writing")]
)
async def test_a_daemon_stopped_at_a_named_point_wakes_up_and_repeats_nothing(
    dsn: str, tmp_path: Path, points: tuple[str, ...]
) -> None:
    """At gate.passed its POST leaves after somebody else has called it unknown: late for the limiter, never twice."""
    names = [f"stop@{point}" for point in points]
    await sound(scenario(*names, replicas=2, armed_lives=2), dsn, tmp_path)


async def test_daemons_killed_and_told_to_stop_at_random_keep_the_limit(
    dsn: str, tmp_path: Path
) -> None:
    verdict = await sound(scenario("kill", "term", replicas=3, most_strikes=5, tenants=(
        Tenant(messages=1_500, batch_size=10, account_requests=40),
        Tenant(messages=800, batch_size=10, account_requests=40, requests=15),
    )), dsn, tmp_path)  # fmt: skip
    assert verdict.worst <= 1


@pytest.mark.parametrize("name", ["postgres.terminate", "postgres.clock"])
async def test_what_postgres_does_to_its_connections_and_its_clock(
    dsn: str, tmp_path: Path, name: str
) -> None:
    await sound(scenario(name, tenants=LONG), dsn, tmp_path)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[embedded.Postgres]:
    """A Postgres of a test's own, with the schema."""
    async with embedded.Postgres(tmp_path / "server", settings={"fsync": "off"}) as started:
        await daemon.migrate(started.dsn)
        yield started


async def test_postgres_crashes_and_stays_away(server: embedded.Postgres, tmp_path: Path) -> None:
    names = ("postgres.crash", "postgres.away", "receipts.dlr_doubled")
    await sound(
        scenario(*names, away_seconds=1.0, most_strikes=2, tenants=LONG),
        server.dsn,
        tmp_path,
        server,
    )


@pytest.mark.parametrize("family", ["mitto", "postgres"])
async def test_a_network_that_fails_in_every_way(dsn: str, tmp_path: Path, family: str) -> None:
    names = [name for name in befall.STRIKES if name.startswith(f"net.{family}.")]
    assert len(names) >= 6
    verdict, _ = await befall.run(scenario(*names, most_strikes=len(names), tenants=(
        Tenant(messages=2_000, batch_size=10, account_requests=30),
    )), dsn, tmp_path)  # fmt: skip
    assert not verdict.breaches, verdict.breaches
    assert sum(bool(verdict.struck[name]) for name in names) > len(names) // 2


async def test_every_answer_and_silence_of_mitto_at_once(dsn: str, tmp_path: Path) -> None:
    names = (*befall.OF_MITTO, *befall.OF_ITEMS, "receipts.dlr_before_answer")
    shares = {f"{name.partition('.')[2]}": 0.02 for name in names}
    verdict, _ = await befall.run(scenario(*names, replicas=2, switches=shares), dsn, tmp_path)
    assert not verdict.breaches, verdict.breaches


async def test_a_provider_that_goes_away_and_one_that_takes_less_than_it_said(
    dsn: str, tmp_path: Path
) -> None:
    tenants = (Tenant(messages=4_000, batch_size=20, account_requests=40),)
    names = ("mitto.outage", "mitto.ceiling")
    await sound(scenario(*names, most_strikes=2, tenants=tenants), dsn, tmp_path)


async def test_a_replica_whose_clock_is_wrong_and_one_that_finds_no_name(
    dsn: str, tmp_path: Path
) -> None:
    names = ("clock.wall", "net.mitto.no name", "mitto.accept_then_reset")
    await sound(scenario(*names, replicas=2), dsn, tmp_path)
