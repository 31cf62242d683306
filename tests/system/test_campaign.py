"""Campaigns on several replicas, from the CSV to the last receipt. SMSD_TEST_SCALE: recipients of the largest one."""

import asyncio
import os
from collections import Counter
from typing import Any

import pytest

from smsd import database
from smsd.simulator import Simulator
from system.harness import Campaign, Daemon, Installation

SCALE = int(os.environ.get("SMSD_TEST_SCALE", "20000"))
REQUESTS_PER_SECOND, MESSAGES_PER_SECOND = 20, 6_000


async def two_replicas(installation: Installation) -> tuple[Daemon, Daemon]:
    await installation.migrate()
    first, second = await asyncio.gather(installation.serve(), installation.serve())
    return first, second


def batches_of(daemon: Daemon) -> int:
    return Counter(event.get("event") for event in daemon.events)["batch.settled"]


async def intents_of(campaign: Campaign) -> int:
    """How many of its batches had an intent written."""
    dsn = campaign.shop.installation.dsn
    assert dsn is not None
    connection = await database.connect(dsn)
    try:
        sql = "select count(*) from attempt where campaign_id = $1"
        return int(await connection.fetchval(sql, campaign.id))
    finally:
        await connection.close()


async def all_sent_once(campaign: Campaign, mitto: Simulator, n: int) -> Any:
    """Everything went out once and came back as a receipt, and the books say so."""
    figures = (await campaign.received())["metrics"]
    assert figures["total"] == figures["delivered"] == mitto.ledger.accepted_count == n
    assert not mitto.ledger.duplicates("destination")
    credits = await campaign.shop.credits()
    assert credits["reserved"] == 0
    return figures


@pytest.mark.parametrize("limited", [False, True], ids=["without limits", "within limits"])
async def test_two_replicas_send_a_campaign_once(
    installation: Installation, mitto: Simulator, limited: bool
) -> None:
    migrations = [installation.command("migrate") for _ in range(2)]
    assert [done.code for done in await asyncio.gather(*migrations)] == [0, 0]
    replicas = await asyncio.gather(installation.serve(), installation.serve())
    limits = {
        "requestsPerSecond": REQUESTS_PER_SECOND,
        "messagesPerSecond": MESSAGES_PER_SECOND,
    }
    shop = await installation.shop(**(limits if limited else {}))
    await shop.with_contacts(SCALE)

    campaign = await shop.send()
    await all_sent_once(campaign, mitto, SCALE)

    assert campaign.looks > 5
    if limited:
        assert mitto.ledger.worst_second(shop.account, "requests") <= REQUESTS_PER_SECOND
        assert mitto.ledger.worst_second(shop.account, "messages") <= MESSAGES_PER_SECOND
        assert all(batches_of(replica) for replica in replicas)
    await installation.audit()


async def test_a_cancelled_campaign_sends_nothing_more_and_gives_the_credits_back(
    installation: Installation, mitto: Simulator
) -> None:
    first, second = await two_replicas(installation)
    shop = await installation.shop(credits=10_000, requestsPerSecond=10)
    await shop.with_contacts(4_000)
    campaign = await shop.send()
    await mitto.accepted_reached(600)

    await campaign.act("cancel", via=first)
    await campaign.until(lambda status: not status["metrics"]["processing"])
    left = mitto.ledger.accepted_count
    # The clock of this test: what is sent on the same account afterwards.
    later = await shop.send()
    await later.ended()
    figures = (await campaign.status(via=second))["metrics"]

    assert mitto.ledger.accepted_count == left + 4_000
    assert figures["accepted"] == left
    assert figures["cancelled"] == 4_000 - left > 0
    assert await shop.credits() == {
        "balance": 6_000 - left,
        "reserved": 0,
        "available": 6_000 - left,
    }
    await installation.audit()


async def test_a_paused_campaign_stops_on_every_replica_and_goes_on_when_resumed(
    installation: Installation, mitto: Simulator
) -> None:
    first, second = await two_replicas(installation)
    shop = await installation.shop(requestsPerSecond=10)
    clock = await (await installation.shop()).with_contacts(300)
    await shop.with_contacts(4_000)
    campaign = await shop.send()
    await mitto.accepted_reached(600)

    await campaign.act("pause", via=first)
    # What had its intent written by then may still leave: what was due within the lead, of 20 batches.
    intended = await intents_of(campaign)
    await (await clock.send()).ended()
    assert await intents_of(campaign) == intended < 15, "an intent was written after the pause"
    posts = [
        one for one in mitto.ledger.requests if one.account == shop.account and one.kind != "get"
    ]
    assert len(posts) <= intended
    assert (await campaign.status(via=second))["campaign"]["status"] == "paused"

    await campaign.act("resume", via=second)
    figures = (await campaign.received())["metrics"]
    assert figures["delivered"] == mitto.ledger.accepted_by_account()[shop.account] == 4_000
    await installation.audit()


async def test_a_refused_send_is_pressed_again_with_the_same_key_after_a_top_up(
    installation: Installation, mitto: Simulator
) -> None:
    await installation.migrate()
    await installation.serve()
    shop = await (await installation.shop(credits=100)).with_contacts(1_000)
    campaign = await shop.draft()

    refused = await campaign.enqueue(key="one-press-of-send")
    assert (refused.status, refused.body["code"]) == (402, "INSUFFICIENT_CREDITS")
    assert refused.body["details"] == {"required": 1_000, "available": 100}
    await shop.top_up(900)
    taken = await campaign.enqueue(key="one-press-of-send")
    again = await campaign.enqueue(key="one-press-of-send")

    assert (taken.status, again.status) == (202, 202)
    assert taken.body == again.body
    await all_sent_once(campaign, mitto, 1_000)
    await installation.audit()


async def test_a_campaign_enqueued_on_two_replicas_at_once_is_sent_once(
    installation: Installation, mitto: Simulator
) -> None:
    replicas = await two_replicas(installation)
    shop = await (await installation.shop()).with_contacts(500)
    tries: list[tuple[list[str | None], list[int]]] = [
        (["one-press", "one-press"], [202, 202]),
        (["a-press", "another-press"], [202, 409]),
        ([None, None], [202, 409]),
    ]
    for sent, (keys, answers) in enumerate(tries, 1):
        campaign = await shop.draft()
        replies = await asyncio.gather(
            *[campaign.enqueue(key, via) for key, via in zip(keys, replicas, strict=True)]
        )
        assert sorted(reply.status for reply in replies) == answers, keys
        assert len({str(reply.body) for reply in replies if reply.status == 202}) == 1
        figures = (await campaign.received())["metrics"]
        assert figures["total"] == figures["delivered"] == 500
        assert mitto.ledger.accepted_count == 500 * sent
    await installation.audit()
