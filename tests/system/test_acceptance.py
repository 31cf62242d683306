"""What is promised at full size. SMSD_TEST_SHARE=1 plays it so; the suite plays a tenth of it."""

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from smsd import daemon, embedded
from smsd.simulator import Simulator
from system import befall
from system.bench import Bench, Scenario, Tenant, Verdict, stock
from system.harness import Campaign, Installation

SHARE = float(os.environ.get("SMSD_TEST_SHARE", "0.1"))
LONG = 120 if SHARE < 1 else 1_200
pytestmark = pytest.mark.timeout(3 * LONG)


def tenants(messages: int, requests_per_second: int) -> tuple[Tenant, ...]:
    """One tenant; about 200 requests, or batches of 200 messages."""
    n = int(messages * SHARE)
    return (
        Tenant(messages=n, batch_size=min(200, n // 200), account_requests=requests_per_second),
    )


def spoken_for(verdict: Verdict) -> None:
    """Nothing twice, nothing lost, and whatever Mitto accepted is accepted here, by its receipt if need be."""
    assert not verdict.breaches, "\n".join(verdict.breaches)
    assert verdict.resolvable == 0, (
        f"{verdict.resolvable} of {verdict.unknown} unknown have a receipt"
    )


async def test_a_provider_that_fails_every_third_request_and_doubles_its_receipts(
    dsn: str, tmp_path: Path
) -> None:
    switches = {
        "fail_500": 0.08, "fail_503": 0.05, "fail_429": 0.05, "fail_502": 0.03, "broken_answer": 0.02,
        "hang_before_accept": 0.015, "accept_then_hang": 0.015,
        "reset_before_reading": 0.01, "reset_after_reading": 0.01, "accept_then_reset": 0.01,
        "dlr_doubled": 0.3, "dlr_out_of_order": 0.3, "dlr_before_answer": 0.2, "latency_seconds": 0.05,
    }  # fmt: skip
    # Many small requests: of 200, a tenth may be lost on the way by chance.
    [plan] = tenants(20_000, 200)
    plan = replace(plan, batch_size=max(2, plan.messages // 2_000))
    scenario = Scenario(1, (plan,), switches=switches, seconds=LONG / 2, singles=False)
    verdict, _ = await befall.run(scenario, dsn, tmp_path)
    spoken_for(verdict)
    assert verdict.accepted > 0.9 * verdict.messages


async def test_three_replicas_of_which_two_are_killed_about_every_second(
    dsn: str, tmp_path: Path
) -> None:
    async def kill_two(bench: Bench) -> None:
        while not bench.over():
            await asyncio.sleep(1.0)
            for one in bench.replicas.places[:2]:
                if one is not None and one.lives:
                    await one.kill()

    scenario = Scenario(
        2, tenants(60_000, 50), replicas=3, seconds=LONG / 2, singles=False,
        switches={"latency_seconds": 0.1, "latency_jitter_seconds": 0.1},
    )  # fmt: skip
    verdict, _ = await befall.run(scenario, dsn, tmp_path, doing=kill_two)
    spoken_for(verdict)
    assert verdict.deaths >= 4


async def test_postgres_stopped_at_once_twice_in_mid_campaign(tmp_path: Path) -> None:
    async def crash_twice(bench: Bench) -> None:
        for share in (0.3, 0.6):
            await bench.mitto.accepted_reached(int(share * messages))
            await befall.without_postgres(bench, seconds=2.0)
        while not bench.over():
            await asyncio.sleep(0.1)

    scenario = Scenario(
        3, tenants(20_000, 40), replicas=2, seconds=LONG / 2, singles=False,
        switches={"latency_seconds": 0.2, "dlr_delay_seconds": (0.0, 2.0)},
    )  # fmt: skip
    messages = scenario.tenants[0].messages
    async with embedded.Postgres(tmp_path / "server", settings={"fsync": "off"}) as server:
        await daemon.migrate(server.dsn)
        verdict, bench = await befall.run(scenario, server.dsn, tmp_path, server, crash_twice)
    spoken_for(verdict)
    assert len(bench.installation.daemons) == 2, "a daemon went away with its Postgres"
    assert bench.mitto.receipts.failed_posts, "no receipt came while Postgres was away"
    assert verdict.unknown == 0


@pytest.mark.alone
async def test_a_single_message_and_a_small_campaign_beside_a_large_one(
    dsn: str, mitto: Simulator, tmp_path: Path
) -> None:
    """No share of it: 60,000 and 3,000 messages, 20 requests of 100 a second for both."""
    plans = (Tenant(60_000, 100, account_requests=20), Tenant(3_000, 100))
    fair_seconds = 3_000 / (20 / 2 * 100)
    async with Installation(dsn, mitto, tmp_path) as installation:
        await installation.serve()
        large_shop, small_shop = await stock(dsn, plans, installation, "refused")
        large = await large_shop.send()
        await mitto.accepted_reached(3_000)

        started_at = time.monotonic()
        small = await small_shop.send()
        for number in range(3):
            await asyncio.sleep(0.3)
            await _leaves_within_a_second(mitto, small, number)
        await small.ended()
        last = max(
            one.accepted_monotonic for one in mitto.ledger.messages() if one.sender == "Shop2"
        )

        assert (await large.status())["metrics"]["queued"] > 10_000, (
            "the large one was over too soon"
        )
        assert last - started_at <= 1.8 * fair_seconds
        await large.act("cancel")
        await large.until(lambda status: not status["metrics"]["processing"])
        await installation.audit()


async def _leaves_within_a_second(mitto: Simulator, campaign: Campaign, number: int) -> None:
    text = f"your code is {number}"
    begun, begun_row = len(mitto.ledger.requests), mitto.ledger.accepted_count
    asked_at = time.monotonic()
    fields = {"phone": f"+30697000000{number}", "text": text}
    reply = await campaign.shop.ask("POST", "/api/messages", fields)
    assert reply.status == 202, reply.body

    def is_there() -> bool:
        return any(one.kind == "send" and one.accepted for one in mitto.ledger.requests[begun:])

    async with asyncio.timeout(5):
        await mitto.until(is_there)
    [at] = [one.accepted_monotonic for one in mitto.ledger.messages(begun_row) if one.text == text]
    assert at - asked_at < 1.0
