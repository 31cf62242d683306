"""The certificate: its sums, its hash as a stranger recomputes it, and the same over HTTP and on the command line."""

import asyncio
import contextlib
import csv
import hashlib
import io
import os
import random
import re
import shutil
import socket
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
from conftest import Api, TenantCaller
from shop import ACCEPTED, PHONE, REFUSED, Shop, check_the_account, new_shop, shop_of
from support import new_account, open_shop, sending
from system.harness import SMSD, Installation
from test_cli import typed
from test_messages import one_of_each

from smsd import campaigns, certificates, database, evidence, expansions, queue
from smsd.api import certificates as certificates_api
from smsd.campaigns import Totals, WrongStatus
from smsd.certificates import Certificate
from smsd.expansions import Chunk, Skipped
from smsd.messages import Line
from smsd.model import Reason
from smsd.simulator import Simulator, Switches


async def issue(shop: Shop, campaign_id: int) -> tuple[Certificate, bytes]:
    """A campaign's certificate and its lines."""
    async with shop.pool.acquire() as db, certificates.snapshot(db):
        with io.BytesIO() as file:
            found = await certificates.issue(db, shop.id, campaign_id, file)
            assert found is not None
            return found, file.getvalue()


def read(lines: bytes) -> list[dict[str, str]]:
    """The lines as a stranger's CSV reader has them."""
    return list(csv.DictReader(io.StringIO((certificates.HEADER + lines).decode(), newline="")))


def recount(lines: bytes) -> Totals:
    """The parts, counted as docs/certificate.md tells."""
    rows = read(lines)
    found = Counter(
        (row["status"], row["reason"] == "delivery_failed") if row["status"] == "failed" else row["status"]
        for row in rows
    )  # fmt: skip
    return Totals(
        queued=found["queued"], processing=found["processing"], pending=found["accepted"],
        delivered=found["delivered"], delivery_failed=found["failed", True],
        refused=found["failed", False], unknown=found["unknown"], cancelled=found["cancelled"],
        skipped=found["skipped"], spent=sum(int(row["credits"]) for row in rows),
    )  # fmt: skip


@pytest.fixture
async def shop(pool: database.Pool) -> Shop:
    return await new_shop(pool)


async def add_refused_numbers(shop: Shop, *details: str) -> int:
    """A campaign of recipients whose numbers could not be read; its id."""
    campaign_id = await shop.begin(len(details))
    expansion = await expansions.claim(shop.pool, shop.replica_id)
    assert expansion is not None
    skipped = [Skipped(None, Reason.INVALID_NUMBER, one) for one in details]
    chunk = Chunk(cursor=1, read=len(details), last=True, rendered=[], skipped=skipped)
    assert await expansions.commit(shop.pool, expansion, chunk, shop.replica_id) is not None
    return campaign_id


# --------------------------------------------------------------------------------------- the account


async def test_every_part_is_counted_with_its_reasons_segments_and_credits(shop: Shop) -> None:
    campaign_id, expected = await one_of_each(shop)
    found, lines = await issue(shop, campaign_id)
    sums = found.totals
    assert (sums.delivered, sums.pending, sums.delivery_failed, sums.refused) == (1, 1, 1, 1)
    assert (sums.unknown, sums.cancelled, sums.skipped) == (6, 0, 2)
    assert (sums.queued, sums.processing) == (10, 10)
    assert sums.total == sum(map(len, expected.values())) == len(read(lines))
    assert found.reasons == {
        "pending": {},
        "skipped": {"opted_out": 2},
        "refused": {"refused_by_provider": 1},
        "unknown": {"no_answer": 5, "unreadable_answer": 1},
    }
    assert found.segments == 30
    assert found.credits == (32, 3, 2 + 1, 26, 6, 0)
    assert not found.final
    assert sums == (await shop.progress(campaign_id)).totals == recount(lines)


async def test_a_campaign_that_is_over_is_final_whichever_way_it_ended(shop: Shop) -> None:
    sent = await shop.sending(3)
    await shop.send_all(ACCEPTED)
    assert not (await issue(shop, sent))[0].final
    await campaigns.finish(shop.pool)
    assert (await issue(shop, sent))[0].final
    refused = await shop.sending(2)
    await shop.send_all(REFUSED)
    await campaigns.finish(shop.pool)
    found, _ = await issue(shop, refused)
    assert (found.campaign.status, found.final, found.credits) == (
        "failed",
        True,
        (2, 0, 2, 0, 0, 0),
    )


async def test_a_cancelled_campaign_is_final_once_what_was_being_posted_has_ended(
    shop: Shop,
) -> None:
    campaign_id = await shop.begin(40)
    await shop.expand(10, last=False)
    ((grant, intent),) = await shop.post()
    await shop.act(campaign_id, campaigns.cancel)
    found, _ = await issue(shop, campaign_id)
    assert (found.totals.processing, found.totals.cancelled, found.final) == (5, 5, False)
    await shop.answer(grant, intent, ACCEPTED)
    found, lines = await issue(shop, campaign_id)
    assert (found.totals.pending, found.totals.cancelled, found.final) == (5, 5, True)
    assert (found.progress.read, found.progress.of) == (10, 40)
    assert found.credits == (40, 5, 35, 0, 0, 0)
    assert "ended with about 30 recipients unread" in certificates.describe(found)
    finished = {row["finishedAt"] != "" for row in read(lines) if row["status"] == "cancelled"}
    assert finished == {True}


async def test_what_a_person_said_is_told_and_what_mitto_had_all_the_same_is_overdue(
    pool: database.Pool,
) -> None:
    shop = await new_shop(pool, granted=6)
    campaign_id = await shop.sending(6, batch_size=6)
    ((grant, intent),) = await shop.post()
    await queue.settle_batch(pool, grant.batch_id, intent.attempt, "unknown", "unknown")

    async def say(verdict: evidence.Verdict, ids: Sequence[int]) -> None:
        which = evidence.Selection(message_ids=ids)
        await shop.act(
            campaign_id, lambda db, c: evidence.give_verdict(db, c.id, verdict, which, 0)
        )

    await say("sent", intent.ids[:2])
    await say("failed", intent.ids[2:5])
    found, lines = await issue(shop, campaign_id)
    assert found.reasons == {
        "pending": {"verdict_sent": 2}, "refused": {"verdict_failed": 3}, "unknown": {"no_answer": 1},
        "skipped": {},
    }  # fmt: skip
    assert found.credits == (6, 2, 3, 1, 1, 0)
    await shop.begin(3)  # takes what is left
    for one in intent.ids[2:4]:
        match = evidence.Candidate(grant.batch_id, one, "open", "Shop", "Hi")
        assert await evidence.accept(pool, match, f"late-{one}")
    found, lines = await issue(shop, campaign_id)
    assert found.totals == (await shop.progress(campaign_id)).totals == recount(lines)
    assert (found.totals.pending, found.totals.refused) == (4, 1)
    assert found.credits == (6, 4, 3, 1, 1, 2)


async def test_a_campaign_that_was_not_enqueued_has_no_certificate(shop: Shop) -> None:
    draft = await shop.draft()
    with pytest.raises(WrongStatus):
        await issue(shop, draft.id)
    async with shop.pool.acquire() as db, certificates.snapshot(db):
        assert await certificates.issue(db, shop.id + 1, draft.id) is None
        assert await certificates.issue(db, shop.id, draft.id + 1) is None


async def test_a_message_that_nobody_speaks_for_is_told_and_not_left_out(shop: Shop) -> None:
    campaign_id = await shop.sending(3)
    await shop.pool.execute("delete from batch")
    with pytest.raises(certificates.Unaccounted, match="smsd audit"):
        await issue(shop, campaign_id)


async def test_sums_and_hash_are_of_the_moment_at_which_the_snapshot_began(shop: Shop) -> None:
    campaign_id = await shop.sending(20)
    await shop.send_all(ACCEPTED)
    before, lines = await issue(shop, campaign_id)
    async with shop.pool.acquire() as db, certificates.snapshot(db):
        assert await certificates.owner(db, campaign_id) == shop.id
        await shop.receive(M1=30, M2=20)
        meanwhile = await certificates.issue(db, shop.id, campaign_id)
    assert meanwhile is not None
    assert (meanwhile.sha256, meanwhile.totals) == (before.sha256, before.totals)
    after, _ = await issue(shop, campaign_id)
    assert after.sha256 != before.sha256 == hashlib.sha256(lines).hexdigest()


async def test_pages_follow_each_other_without_gap_or_repeat(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign_id, expected = await one_of_each(shop)
    whole, lines = await issue(shop, campaign_id)
    monkeypatch.setattr(certificates, "PAGE", 3)
    assert (await issue(shop, campaign_id))[1] == lines
    assert [int(row["id"]) for row in read(lines)] == sorted(chain(*expected.values()))
    assert hashlib.sha256(lines).hexdigest() == whole.sha256


@pytest.mark.timeout(90)
async def test_at_any_moment_of_a_campaign_lines_sums_and_counters_are_one(
    pool: database.Pool,
) -> None:
    """A sender at work against a provider with faults, receipts in any order, one campaign cancelled in the middle."""
    dice = random.Random(7)
    account_id = await new_account(pool)
    shop = await open_shop(pool, account_id, await queue.register(pool, "test", "0"))
    switches = Switches(
        seed=7, dlr=False, fail_500=0.1, broken_answer=0.1, accept_then_reset=0.1, refuse_items=0.1,
        items_without_id=0.05,
    )  # fmt: skip
    looks = 0
    async with Simulator(switches) as mitto:
        first, second = await shop.begin(900, batch_size=20), await shop.begin(300, batch_size=20)
        async with sending(pool, shop.replica_id, mitto.url) as at_work:
            work = asyncio.gather(
                expand(shop, dice), receive(shop, dice), cancel(shop, second), decide(shop, first)
            )
            while not work.done() or await pool.fetchval("select min(state) < 10 from batch"):
                for campaign_id in (first, second):
                    await look(shop, campaign_id)
                    looks += 1
                await campaigns.finish(pool)
            await work
            await at_work.until_done()
    await campaigns.finish(pool)
    assert looks > 10
    for campaign_id in (first, second):
        found = await look(shop, campaign_id)
        assert found.final
        await check_the_account(shop, campaign_id)


async def expand(shop: Shop, dice: random.Random) -> None:
    for _ in range(24):
        await shop.expand(50, skipped=dice.randrange(10), last=False, segments=dice.choice([1, 2]))
    while await shop.expand(0):
        pass


async def receive(shop: Shop, dice: random.Random) -> None:
    for _ in range(60):
        rows = await shop.pool.fetch("select provider_id from provider_message")
        told = {row[0]: dice.choice([11, 20, 30]) for row in dice.sample(rows, len(rows) // 4)}
        await shop.receive(**told)


async def cancel(shop: Shop, campaign_id: int) -> None:
    while not await shop.pool.fetchval(
        "select sum(pending) > 20 from campaign_counter where campaign_id = $1", campaign_id
    ):
        await asyncio.sleep(0.01)
    await shop.act(campaign_id, campaigns.cancel)


async def decide(shop: Shop, campaign_id: int) -> None:
    """A person's word, now and then, on what is unknown by then."""
    for verdict in cast("list[evidence.Verdict]", ["sent", "failed", "sent"]):
        while not await shop.pool.fetchval(
            "select unknown > 0 from campaign_totals where campaign_id = $1", campaign_id
        ):
            await asyncio.sleep(0.01)

        async def say(
            db: database.Connection, _: campaigns.Campaign, v: evidence.Verdict = verdict
        ) -> None:
            which = evidence.Selection(older_than=datetime(2100, 1, 1, tzinfo=UTC))
            await evidence.give_verdict(db, campaign_id, v, which, 0)

        await shop.act(campaign_id, say)


async def look(shop: Shop, campaign_id: int) -> Certificate:
    """The certificate of this moment, held against its own lines and the status' counters of the same snapshot."""
    async with shop.pool.acquire() as db, certificates.snapshot(db):
        with io.BytesIO() as file:
            found = await certificates.issue(db, shop.id, campaign_id, file)
            lines = file.getvalue()
        progress = await campaigns.totals(db, shop.id, campaign_id)
        audience = await db.fetchval(
            "select held from expansion where campaign_id = $1", campaign_id
        )
    assert found is not None
    assert progress is not None
    assert found.totals == progress.totals == recount(lines)
    assert found.sha256 == hashlib.sha256(lines).hexdigest()
    said = {part: sum(reasons.values()) for part, reasons in found.reasons.items()}
    assert said.pop("pending") <= found.totals.pending
    assert said == {part: getattr(found.totals, part) for part in said}
    money = found.credits
    assert money.held + money.overdue == money.spent + money.released + money.reserved
    assert money.overdue == 0
    waiting = sum(
        int(row["segments"]) for row in read(lines) if row["status"] in ("queued", "processing", "unknown")
    )  # fmt: skip
    assert money.reserved == waiting + audience
    return found


# ------------------------------------------------------------------------------------------ lines


LINE = Line(7, PHONE, "delivered", 30, None, None, 2, "M1",
            datetime(2026, 3, 1, 9, 30, 0, 120000, UTC), datetime(2026, 3, 1, 9, 30, 5, 0, UTC))  # fmt: skip


def test_a_line_is_plain_csv() -> None:
    assert certificates.HEADER == (
        b"id,to,status,reason,detail,segments,credits,providerMessageId,acceptedAt,finishedAt\n"
    )
    assert certificates.encode([LINE]) == (
        b"7,+306900000000,delivered,,,2,2,M1,2026-03-01T09:30:00.120000Z,2026-03-01T09:30:05Z\n"
    )


@pytest.mark.parametrize(
    ("detail", "cell"),
    [
        ('=HYPERLINK("http://evil","x")', '\'=HYPERLINK("http://evil","x")'),
        ("+1 555", "'+1 555"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1+1", "'=1+1"),
        ("\r\n =1", "'=1"),
        ("＝1+1", "'＝1+1"),
        ("\u200e=1", "'=1"),
        ("two\nlines, \x1b[31mred", "two lines,  [31mred"),
        ("Ελένη 🎉", "Ελένη 🎉"),
        ("", ""),
    ],
)
def test_what_strangers_wrote_is_one_cell_and_no_formula(detail: str, cell: str) -> None:
    line = LINE._replace(phone=None, status="skipped", own_state=50, detail=detail)
    data = certificates.encode([line, LINE])
    first, second = read(data)
    assert (first["detail"], first["to"], first["credits"]) == (cell, "", "0")
    assert second["id"] == "7"
    assert data.count(b"\n") == 2


async def test_lines_that_find_no_room_on_disk_are_a_plain_refusal(shop: Shop) -> None:
    campaign_id = await shop.sending(3)
    with open("/dev/full", "wb", buffering=0) as full:  # noqa: ASYNC230, PTH123
        async with shop.pool.acquire() as db, certificates.snapshot(db):
            with pytest.raises(certificates.NoRoom, match="No space left"):
                await certificates.issue(db, shop.id, campaign_id, full)


# ------------------------------------------------------------------------------------------- HTTP


@pytest.fixture
async def me(api: Api) -> TenantCaller:
    return await api.new_tenant(credits=100_000)


@pytest.fixture
async def mine(api: Api, me: TenantCaller) -> Shop:
    return await shop_of(api, me)


async def test_the_certificate_adds_up_and_its_hash_is_that_of_the_file(
    me: TenantCaller, mine: Shop
) -> None:
    campaign_id, _ = await one_of_each(mine)
    path = f"/api/campaigns/{campaign_id}"
    answer = (await me.get(f"{path}/certificate")).body
    assert answer["recipients"] == answer["lines"] == 32
    parts = ("delivered", "pending", "deliveryFailed", "refused", "unknown", "cancelled", "skipped")
    assert sum(answer[part] for part in (*parts, "queued", "processing")) == 32
    metrics = (await me.get(f"{path}/status")).body["metrics"]
    for part in (
        "delivered",
        "deliveryFailed",
        "unknown",
        "cancelled",
        "skipped",
        "queued",
        "processing",
    ):
        assert answer[part] == metrics[part], part
    assert answer["pending"] == metrics["pendingDelivery"]
    assert answer["refused"] + answer["deliveryFailed"] == metrics["failed"]
    assert answer["final"] is False
    assert answer["credits"] == {
        "held": 32, "spent": 3, "released": 3, "reserved": 26, "reservedForUnknown": 6, "overdue": 0,
    }  # fmt: skip
    assert answer["campaign"]["textSha256"] == hashlib.sha256(b"Hi").hexdigest()
    assert (answer["algorithm"], answer["format"]) == ("SHA-256", "smsd-lines-1")
    reply = await me.get(f"{path}/messages.csv", headers={"X-Request-Id": "mine"})
    assert reply.status == 200
    assert reply.headers["Content-Type"].startswith("text/csv; charset=utf-8")
    named = f'attachment; filename="campaign-{campaign_id}-messages.csv"'
    assert reply.headers["Content-Disposition"] == named
    assert reply.headers["X-Request-Id"] == "mine"
    header, _, lines = reply.text.partition("\n")
    assert header == ",".join(certificates.COLUMNS)
    assert hashlib.sha256(lines.encode()).hexdigest() == answer["sha256"]
    assert reply.headers["X-Lines-SHA256"] == answer["sha256"]


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
async def test_a_stranger_gets_hash_and_counts_with_standard_tools(
    me: TenantCaller, mine: Shop, tmp_path: Path
) -> None:
    campaign_id, _ = await one_of_each(mine)
    await add_refused_numbers(mine, "=1+1", "two\nlines")
    for one in (campaign_id, campaign_id + 1):
        path = f"/api/campaigns/{one}"
        answer = (await me.get(f"{path}/certificate")).body
        fetch = (
            f"curl -sf -H 'Authorization: Bearer {me.key}' {me.client.make_url(path)}/messages.csv"
        )
        tools = f"{fetch} | tail -n +2 | tee lines | sha256sum; wc -l < lines; cut -d, -f3 lines | sort | uniq -c"
        process = await asyncio.create_subprocess_shell(
            tools, stdout=asyncio.subprocess.PIPE, cwd=tmp_path
        )
        out, _ = await process.communicate()
        digest, lines, *counts = out.decode().splitlines()
        assert digest.split() == [answer["sha256"], "-"]
        assert int(lines) == answer["lines"]
        shown = {status: int(n) for n, status in (row.split() for row in counts)}
        assert shown.get("skipped", 0) == answer["skipped"]
        assert sum(shown.values()) == answer["recipients"]


async def test_a_line_says_what_the_message_itself_says(me: TenantCaller, mine: Shop) -> None:
    campaign_id, _ = await one_of_each(mine)
    await mine.act(campaign_id, campaigns.cancel)
    path = f"/api/campaigns/{campaign_id}"
    lines = read((await me.get(f"{path}/messages.csv")).text.partition("\n")[2].encode())
    items = (await me.get(f"{path}/messages", params={"pageSize": 100})).body["items"]
    assert {item["status"] for item in items} > {"delivered", "failed", "unknown", "cancelled"}
    for line, item in zip(lines, items, strict=True):
        del line["credits"]
        assert line == {name: "" if item[name] is None else str(item[name]) for name in line}


@pytest.mark.parametrize("status", ["failed", "unknown", "queued", "cancelled"])
async def test_lines_of_one_status_are_those_that_the_list_has(
    me: TenantCaller, mine: Shop, status: str
) -> None:
    campaign_id, expected = await one_of_each(mine)
    reply = await me.get(f"/api/campaigns/{campaign_id}/messages.csv", params={"status": status})
    assert [int(row["id"]) for row in read(reply.text.partition("\n")[2].encode())] == expected[
        status
    ]
    assert "X-Lines-SHA256" not in reply.headers
    for query in ({"status": "gone"}, {"page": "1"}):
        wrong = await me.get(f"/api/campaigns/{campaign_id}/messages.csv", params=query)
        assert (wrong.status, wrong.body["code"]) == (400, "VALIDATION_ERROR")


async def test_what_was_not_enqueued_is_a_409_and_what_is_not_ones_own_a_404(
    api: Api, me: TenantCaller, mine: Shop
) -> None:
    draft, sent = await mine.draft(), await mine.sending(3)
    reply = await me.get(f"/api/campaigns/{draft.id}/certificate")
    assert (reply.status, reply.body["code"]) == (409, "INVALID_STATUS")
    assert reply.body["currentStatus"] == "draft"
    empty = await me.get(f"/api/campaigns/{draft.id}/messages.csv")
    assert (empty.status, empty.text.encode()) == (200, certificates.HEADER)
    other = await api.new_tenant()
    for what in ("certificate", "messages.csv"):
        for caller, campaign_id, status in (
            (other, sent, 404), (me, sent + 99, 404), (api.public, sent, 401), (me, sent, 200),
        ):  # fmt: skip
            reply = await caller.get(f"/api/campaigns/{campaign_id}/{what}")
            assert reply.status == status, (what, campaign_id)


async def test_asking_for_the_head_alone_gets_it(me: TenantCaller, mine: Shop) -> None:
    campaign_id = await mine.sending(3)
    path = f"/api/campaigns/{campaign_id}/messages.csv"
    head, whole = await me("HEAD", path), await me.get(path)
    assert (head.status, head.text) == (200, "")
    assert head.headers["Content-Length"] == str(len(whole.text))


@contextlib.asynccontextmanager
async def slow_reader(
    me: TenantCaller, path: str
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Somebody who asks for a file, reads the head of the answer, and then sleeps."""
    taps = socket.socket()
    taps.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    taps.setblocking(False)
    url = me.client.make_url(path)
    assert url.host
    assert url.port
    await asyncio.get_running_loop().sock_connect(taps, (url.host, url.port))
    reader, writer = await asyncio.open_connection(sock=taps, limit=4096)
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {me.key}\r\n\r\n"
    writer.write(head.encode())
    assert b" 200 " in await reader.readline()
    while (await reader.readline()).strip():
        pass
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def fill(shop: Shop, n: int) -> int:
    """A campaign of so many delivered messages, written straight into the tables; its id."""
    campaign_id = (await shop.draft()).id
    await shop.pool.execute(
        "with c as (update campaign set status = 'completed', started_at = now() where id = $1)"
        " insert into message (campaign_id, id, phone, segments, state, settled_at, finished_at, provider_id)"
        " select $1, i, $2::bigint + i, 1, 30, now(), now(), 'filler-' || i from generate_series(1, $3::int) i",
        campaign_id, PHONE, n,
    )  # fmt: skip
    return campaign_id


OTHERS_IN_A_TRANSACTION = (
    "select count(*) from pg_stat_activity"
    " where datname = current_database() and xact_start is not null and pid <> pg_backend_pid()"
    " and backend_type <> 'autovacuum worker'"
)


async def test_a_reader_that_sleeps_holds_no_snapshot_and_gets_the_file_of_its_moment(
    api: Api, me: TenantCaller, mine: Shop
) -> None:
    campaign_id = await fill(mine, 60_000)
    path = f"/api/campaigns/{campaign_id}/messages.csv"
    expected = (await me.get(f"/api/campaigns/{campaign_id}/certificate")).body["sha256"]
    async with slow_reader(me, path) as (reader, _):
        assert api.client.app[certificates_api.DESK]._present == {me.id: 1}
        assert await mine.pool.fetchval(OTHERS_IN_A_TRANSACTION) == 0
        await mine.pool.execute(
            "update message set state = 20, finished_at = now() where id % 2 = 0"
        )
        content = bytearray()
        while piece := await reader.read(1 << 16):
            content += piece
    assert hashlib.sha256(content.partition(b"\n")[2]).hexdigest() == expected


async def test_a_reader_that_takes_nothing_any_more_is_let_go(
    api: Api, me: TenantCaller, mine: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates_api, "STALL_SECONDS", 0.2)
    campaign_id = await fill(mine, 60_000)
    desk = api.client.app[certificates_api.DESK]
    async with slow_reader(me, f"/api/campaigns/{campaign_id}/messages.csv"):
        async with asyncio.timeout(20):
            while desk._present:
                await asyncio.sleep(0.05)
    assert (await me.get(f"/api/campaigns/{campaign_id}/certificate")).status == 200


async def test_a_tenant_with_too_many_downloads_waits_and_the_others_do_not(
    api: Api, me: TenantCaller, mine: Shop
) -> None:
    campaign_id = await mine.sending(3)
    other = await api.new_tenant(credits=100)
    others = await (await shop_of(api, other)).sending(3)
    desk = api.client.app[certificates_api.DESK]
    with contextlib.ExitStack() as taken:
        for _ in range(certificates_api.SEATS):
            taken.enter_context(desk.seat(me.id))
        for what in ("certificate", "messages.csv"):
            reply = await me.get(f"/api/campaigns/{campaign_id}/{what}")
            assert (reply.status, reply.body["code"]) == (429, "TOO_MANY_DOWNLOADS")
            assert (await other.get(f"/api/campaigns/{others}/{what}")).status == 200
    assert (await me.get(f"/api/campaigns/{campaign_id}/certificate")).status == 200
    assert desk._present == {}


# -------------------------------------------------------------------------------------- commands


@pytest.fixture
async def shell(dsn: str, tmp_path: Path) -> AsyncIterator[Installation]:
    async with Installation(dsn, Simulator(), tmp_path) as installation:
        yield installation


async def test_the_command_says_what_the_api_says_and_prints_the_lines(
    api: Api, me: TenantCaller, mine: Shop, shell: Installation
) -> None:
    campaign_id, _ = await one_of_each(mine)
    ours = (await me.get(f"/api/campaigns/{campaign_id}/certificate")).body
    number = str(campaign_id)
    people, programs, lines = await asyncio.gather(
        shell.command("certificate", number),
        shell.command("certificate", number, "--json"),
        shell.command("certificate", number, "--lines"),
    )
    assert (people.code, programs.code, lines.code) == (0, 0, 0), people.err
    assert without_time(orjson.loads(programs.out)) == without_time(ours)
    assert hashlib.sha256(lines.out.encode()).hexdigest() == ours["sha256"]
    rows = {
        row[0].strip(): row[1]
        for line in people.out.splitlines()
        if len(row := line.rsplit(maxsplit=1)) == 2
    }
    assert (rows["recipients"], rows["delivered"], rows["opted_out"], rows["still held"]) == (
        "32",
        "1",
        "2",
        "26",
    )
    assert ours["sha256"] in people.out


def without_time(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "at"}


async def test_a_hash_that_is_checked_exits_0_or_1(shop: Shop, shell: Installation) -> None:
    number = str(await shop.sending(3))
    right = (await issue(shop, int(number)))[0].sha256
    good, bad, odd = await asyncio.gather(
        shell.command("certificate", number, "--check", right.upper()),
        shell.command("certificate", number, "--check", "0" * 64),
        shell.command("certificate", number, "--check", "0" * 63),
    )
    assert (good.code, bad.code, odd.code) == (0, 1, 2)
    assert right in bad.err
    assert "64 hex digits" in odd.err


async def test_a_campaign_without_an_account_is_one_line_on_stderr(
    shop: Shop, shell: Installation
) -> None:
    draft = await shop.draft()
    unsent, none, both = await asyncio.gather(
        shell.command("certificate", str(draft.id)),
        shell.command("certificate", "999"),
        shell.command("certificate", "1", "--json", "--lines"),
    )
    assert (unsent.code, none.code, both.code) == (1, 1, 2)
    assert unsent.err.startswith(f"smsd: campaign {draft.id}: the campaign is draft")
    assert none.err == "smsd: campaign 999 does not exist\n"


@pytest.mark.parametrize("columns", [36, 80])
async def test_the_account_fits_the_terminal(shop: Shop, shell: Installation, columns: int) -> None:
    campaign_id, _ = await one_of_each(shop)
    await shop.pool.execute("update campaign set name = repeat('Summer ', 9) || E'\\x1b[31m'")
    code, output = await typed(shell.environment(), columns, "certificate", str(campaign_id))
    lines = output.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= columns
    assert "\x1b" not in output
    digest = (await issue(shop, campaign_id))[0].sha256
    assert digest in re.sub(r"\s", "", output)


async def test_lines_whose_reader_has_left_end_quietly(shop: Shop, shell: Installation) -> None:
    campaign_id = await fill(shop, 5_000)
    reading, writing = os.pipe()
    os.close(reading)
    process = await asyncio.create_subprocess_exec(
        *SMSD, "certificate", str(campaign_id), "--lines",
        env=shell.environment(), stdout=writing, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    os.close(writing)
    _, err = await process.communicate()
    assert (process.returncode, err) == (1, b"")


def test_the_document_describes_the_lines_as_they_are() -> None:
    described = (Path(__file__).parents[1] / "docs" / "certificate.md").read_text()
    assert certificates.HEADER.decode() in described
    assert certificates.FORMAT in described
    for column in certificates.COLUMNS:
        assert f"| `{column}` |" in described
