"""Retention by real daemons that are killed while they remove."""

import asyncio
import signal

from smsd.simulator import Simulator
from system.harness import LOOK_SECONDS, Installation

RETENTION_DAYS = 3 / 86_400
KILLS = ("retention.piece:1:kill", "retention.certified:1:kill", "retention.piece:1:kill")


async def test_who_dies_while_removing_is_gone_on_for_and_sums_and_money_stay(
    installation: Installation, mitto: Simulator
) -> None:
    await installation.migrate()
    daemon = await installation.serve(retention_days=RETENTION_DAYS, extra={"SMSD_FAULT": KILLS[0]})
    shop = await installation.shop(credits=1_000)
    await shop.with_contacts(600)
    campaign = await shop.send()
    before = (await campaign.received())["metrics"]
    money = await shop.credits()

    for next_kill in (*KILLS[1:], None):
        assert await daemon.ended(30) == -signal.SIGKILL
        await installation.audit()
        fault = {"SMSD_FAULT": next_kill} if next_kill else {}
        daemon = await installation.serve(retention_days=RETENTION_DAYS, extra=fault)
    async with asyncio.timeout(30):
        while (await shop.ask("GET", f"/api/campaigns/{campaign.id}")).body[
            "messagesRemovedAt"
        ] is None:
            await asyncio.sleep(LOOK_SECONDS)

    assert (await campaign.status())["metrics"] == before
    assert before["delivered"] == mitto.ledger.accepted_count == 600
    assert await shop.credits() == money == {"balance": 400, "reserved": 0, "available": 400}
    certificate = (await campaign.ask("GET", "certificate")).body
    assert (certificate["recipients"], certificate["delivered"]) == (600, 600)
    assert (await campaign.ask("GET", "messages")).status == 410
    await installation.audit()
