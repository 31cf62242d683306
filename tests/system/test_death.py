"""Daemons that are told to stop, killed, or left without their Postgres, in the middle of a campaign."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from smsd import database, embedded
from smsd.model import BatchState
from smsd.simulator import Simulator, Switches
from system.harness import Campaign, Installation, Shop

SHUTDOWN: dict[str, Any] = {"mitto_timeout": 5, "shutdown_seconds": 10}
IN_DOUBT = [BatchState.LEASED, BatchState.SENDING, BatchState.UNKNOWN]


async def count_batches(installation: Installation, states: list[BatchState]) -> int:
    assert installation.dsn is not None
    connection = await database.connect(installation.dsn)
    try:
        sql = "select count(*) from batch where state = any ($1::smallint[])"
        return int(await connection.fetchval(sql, states))
    finally:
        await connection.close()


async def slow_shop(installation: Installation, mitto: Simulator, n: int) -> Shop:
    """A shop with n contacts whose requests stay at Mitto for a while, so that some are always on their way."""
    mitto.switches.latency_seconds, mitto.switches.latency_jitter_seconds = 0.2, 0.2
    return await (await installation.shop(requestsPerSecond=25)).with_contacts(n)


async def nothing_twice(campaign: Campaign, mitto: Simulator, n: int) -> int:
    """The campaign ended with every message spoken for, and none was sent twice; how many are unknown."""
    figures = (await campaign.ended())["metrics"]
    assert figures["total"] == figures["accepted"] + figures["unknown"] == n
    assert figures["accepted"] <= mitto.ledger.accepted_count <= n
    assert not mitto.ledger.duplicates("destination")
    await campaign.shop.installation.audit()
    return int(figures["unknown"])


# ----------------------------------------------------------------------------------------- told to


async def test_a_daemon_told_to_stop_leaves_nothing_in_doubt(
    installation: Installation, mitto: Simulator
) -> None:
    await installation.migrate()
    daemon = await installation.serve(**SHUTDOWN)
    shop = await slow_shop(installation, mitto, 4_000)
    campaign = await shop.send()
    await mitto.accepted_reached(1_000)
    assert mitto.ledger.in_flight

    told_at = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended() == 0

    assert time.monotonic() - told_at < SHUTDOWN["shutdown_seconds"]
    assert await count_batches(installation, IN_DOUBT) == 0
    await installation.audit()
    left = mitto.ledger.accepted_count
    await installation.serve()
    assert (await campaign.status())["metrics"]["accepted"] >= left
    assert await nothing_twice(campaign, mitto, 4_000) == 0
    assert (await campaign.received())["metrics"]["delivered"] == 4_000


async def test_a_second_signal_ends_the_daemon_at_once(
    installation: Installation, mitto: Simulator
) -> None:
    await installation.migrate()
    daemon = await installation.serve(**SHUTDOWN)
    shop = await (await installation.shop()).with_contacts(1_000)
    mitto.switches.accept_then_hang = 1.0
    await shop.send()
    await mitto.accepted_reached(100)

    daemon.signal(signal.SIGTERM)
    await daemon.logged("daemon.stopping")
    told_again_at = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended() == 1
    assert time.monotonic() - told_again_at < 1


# ------------------------------------------------------------------------------------------ killed


@pytest.mark.parametrize("seed", range(2))
async def test_a_killed_daemon_is_started_again_and_nothing_is_sent_twice(
    installation: Installation, mitto: Simulator, seed: int
) -> None:
    n, chance = 5_000, random.Random(seed)
    mitto.switches.dlr = False  # a receipt would be evidence, and end the doubt
    await installation.migrate()
    await installation.serve()
    shop = await slow_shop(installation, mitto, n)
    campaign = await shop.send()
    doubtful = 0
    for share in sorted(chance.sample(range(5, 75), 2)):
        await mitto.accepted_reached(n * share // 100)
        # Not only just after an acceptance, which is when the simulator wakes us.
        await mitto.requests_reached(len(mitto.ledger.requests) + chance.randrange(3))
        await installation.newest.kill()
        doubtful += await count_batches(installation, [BatchState.LEASED, BatchState.SENDING])
        await installation.serve()

    unknown = await nothing_twice(campaign, mitto, n)
    assert 0 < unknown <= doubtful * n // 20
    # What was in doubt stays so: it is never sent again on its own.
    requests = len(mitto.ledger.requests)
    await (await (await installation.shop()).with_contacts(100)).send()
    await mitto.requests_reached(requests + 1)
    assert mitto.ledger.requests_by_account()[shop.account] == requests


async def test_a_surviving_replica_takes_over_from_a_killed_one(
    installation: Installation, mitto: Simulator
) -> None:
    await installation.migrate()
    victim, survivor = await installation.serve(), await installation.serve()
    shop = await slow_shop(installation, mitto, 4_000)
    campaign = await shop.send()
    await mitto.accepted_reached(1_000)
    await victim.kill()

    await nothing_twice(campaign, mitto, 4_000)
    assert survivor.lives


async def test_an_import_and_an_expansion_go_on_where_a_killed_daemon_left_them(
    installation: Installation, mitto: Simulator
) -> None:
    n = 15_000
    await installation.migrate()
    daemon = await installation.serve()
    shop = await installation.shop(requestsPerSecond=50)
    job = await shop.upload(n)
    await daemon.logged("import.block_written")
    await daemon.kill()
    daemon = await installation.serve()
    results = await shop.imported(job)
    assert (results["created"], results["updated"], results["skipped"]) == (n, 0, 0)

    campaign = await shop.send()
    await daemon.logged("chunk.written")
    await daemon.kill()
    await installation.serve()
    await nothing_twice(campaign, mitto, n)


# ------------------------------------------------------------------------------- without Postgres


async def test_a_daemon_outlives_a_crash_of_postgres_and_finishes(
    installation: Installation, mitto: Simulator, tmp_path: Path
) -> None:
    async with embedded.Postgres(tmp_path / "server", settings={"fsync": "off"}) as postgres:
        installation.dsn = postgres.dsn
        await installation.migrate()
        daemon = await installation.serve()
        shop = await slow_shop(installation, mitto, 4_000)
        campaign = await shop.send()
        await mitto.accepted_reached(1_000)

        assert postgres.pid is not None
        os.kill(postgres.pid, signal.SIGQUIT)
        await postgres.wait_exit()
        await daemon.logged("heartbeat.failed")
        await postgres.start()

        assert await nothing_twice(campaign, mitto, 4_000) == 0
        assert daemon.lives
        await campaign.received()
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0


async def test_two_replicas_survive_a_restart_of_mitto(
    installation: Installation, mitto: Simulator
) -> None:
    """Not a process of ours, but it goes away just as often."""
    await installation.migrate()
    await installation.serve()
    await installation.serve()
    shop = await slow_shop(installation, mitto, 4_000)
    campaign = await shop.send()
    await mitto.accepted_reached(1_000)
    await mitto.stop()
    mitto.switches = Switches(dlr_batch=100)
    await mitto.start()
    await nothing_twice(campaign, mitto, 4_000)
