"""What Mitto calls: who may, what is taken, and that nothing is answered 202 that is not in the database."""

import asyncio
import io
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Api, Reply, open_api
from pydantic import SecretStr
from shop import ACCEPTED, LOCK_MESSAGE, Shop, shop_of, until_somebody_waits
from structlog.testing import capture_logs
from support import Relay, assert_sound

from smsd import config, database, queue, receipts
from smsd.api import webhooks
from smsd.mitto import ItemResult
from smsd.model import WEBHOOK_SECRET_HEADER, MessageState

DLR = "/webhooks/mitto/dlr"
SECRET = "secret-of-the-main-account"
SHARED = "secret-of-everybody"


async def receive(api: Api, body: object, secret: str | None = None, **options: Any) -> Reply:
    headers = {WEBHOOK_SECRET_HEADER: secret} if secret else {}
    return await api.public.post(DLR, body, headers=headers | options.pop("headers", {}), **options)


def receipt(message_id: str, status: str = "Delivered", **fields: object) -> dict[str, object]:
    return {"messageId": message_id, "deliveryStatus": status, **fields}


async def selling(api: Api, n: int, **account: Any) -> tuple[Shop, list[str]]:
    """A shop on an account of its own with a campaign that Mitto has accepted, and the messages' ids there."""
    account_id = await api.new_account(requestsPerSecond=5_000, **account)
    tenant = await api.new_tenant(account_id=account_id, credits=20_000, requestsPerSecond=5_000)
    shop = await shop_of(api, tenant)
    shop.provider_ids = tenant.id * 1_000_000
    shop.phones += tenant.id * 1_000_000
    campaign_id = await shop.sending(n, batch_size=500)
    await shop.send_all(ACCEPTED)
    rows = await shop.pool.fetch(
        "select provider_id from message_shown where campaign_id = $1 order by id", campaign_id
    )
    return shop, [row["provider_id"] for row in rows]


async def states(pool: database.Pool) -> dict[str, int]:
    rows = await pool.fetch(
        "select provider_id, own_state as state from message_shown where provider_id is not null"
    )
    return {row["provider_id"]: row["state"] for row in rows}


def answered(received: int, updated: int) -> tuple[int, dict[str, object]]:
    return 202, {"ok": True, "received": received, "updated": updated}


# ------------------------------------------------------------------------------------- what is taken


async def test_one_receipt_and_an_array_of_them_are_taken(api: Api) -> None:
    shop, (one, two, three) = await selling(api, 3)
    assert (await receive(api, receipt(one)))[:2] == answered(1, 1)
    both = [receipt(two, "Failure", description="absent"), receipt(three, "Queued")]
    assert (await receive(api, both))[:2] == answered(2, 2)
    assert (await receive(api, both))[:2] == answered(2, 0)
    assert await states(shop.pool) == {one: 30, two: 20, three: 11}
    assert await shop.pool.fetchval("select detail from message where state = 20") == "absent"
    await assert_sound(shop.pool)


@pytest.mark.parametrize("body", [[receipt("one")], {}, [receipt("one"), {}], "no JSON"])
async def test_the_application_s_own_route_answers_as_the_door_before_it(
    api: Api, body: object
) -> None:
    """A path with a query, and whoever asks before it sends its body, are left to the application."""
    by_door = await receive(api, body)
    by_query = await api.public.post(f"{DLR}?from=mitto", body)
    asking = await receive(api, body, expect100=True)
    assert by_door[:2] == by_query[:2] == asking[:2]
    names = {name for name in by_door.headers if name != "Date"}
    for reply in (by_door, by_query, asking):
        assert reply.headers["X-Request-Id"]
        assert {name for name in reply.headers if name != "Date"} == names
        assert reply.headers["Server"] == "smsd"


@pytest.mark.parametrize("last", [b"1\r\nConnection: close", b"0\r\nX: y"])
async def test_a_connection_is_kept_or_closed_as_its_caller_wants(api: Api, last: bytes) -> None:
    request = b"POST " + DLR.encode() + b" HTTP/1.%s\r\nHost: here\r\nContent-Length: 2\r\n\r\n[]"
    reader, writer = await asyncio.open_connection(api.client.host, api.client.port)
    writer.write(request % b"1" + request % b"1" + request % last)
    async with asyncio.timeout(10):
        said = (await reader.read()).split(b"HTTP/1.")[1:]  # until it is closed
    writer.close()
    assert [one[:15] for one in said] == [b"1 202 Accepted\r"] * 2 + [last[:1] + b" 202 Accepted\r"]
    assert [b"Connection: close" in one for one in said] == [False, False, b"close" in last]
    for one in said:
        head, _, body = one.partition(b"\r\n\r\n")
        assert b"Content-Length: %d\r\n" % len(body) in head
        assert orjson.loads(body) == {"ok": True, "received": 0, "updated": 0}


async def test_an_empty_array_is_taken(api: Api) -> None:
    assert (await receive(api, []))[:2] == answered(0, 0)


async def test_an_array_of_ten_thousand_is_taken(api: Api) -> None:
    shop, ids = await selling(api, 1_000)
    body = [receipt(one) for one in ids] + [receipt(f"unknown-{i}") for i in range(9_000)]
    assert (await receive(api, body))[:2] == answered(10_000, 1_000)
    assert set((await states(shop.pool)).values()) == {MessageState.DELIVERED}
    assert await shop.pool.fetchval("select count(*) from early_receipt") == 9_000


async def test_an_id_that_is_not_known_yet_is_kept_until_it_is(api: Api) -> None:
    shop, _ = await selling(api, 1)
    await shop.sending(1)
    ((grant, intent),) = await shop.post()
    assert (await receive(api, receipt("early")))[:2] == answered(1, 0)
    assert await shop.pool.fetchval("select provider_id from early_receipt") == "early"
    items = [ItemResult(intent.ids[0], ACCEPTED, "early", None)]
    await queue.settle_items(
        shop.pool, grant.batch_id, intent.attempt, queue.Answer.of(items, None, 200)
    )
    await queue.rejoin_receipts(shop.pool, None)
    assert (await states(shop.pool))["early"] == MessageState.DELIVERED


async def test_what_cannot_be_read_is_kept_raw_and_counted_and_the_rest_is_applied(
    api: Api,
) -> None:
    shop, (one, two) = await selling(api, 2, webhookSecret=SECRET)
    body = [
        receipt(one, "Teleported", description="nul \0"),
        {"status": "Delivered"},
        7,
        receipt(two),
    ]
    assert (await receive(api, body, SECRET))[:2] == answered(4, 1)
    assert await states(shop.pool) == {one: MessageState.ACCEPTED, two: MessageState.DELIVERED}
    rows = await shop.pool.fetch("select account_id, body, why from raw_receipt order by why")
    assert {row["account_id"] for row in rows} == {shop.account_id}
    assert [orjson.loads(row["body"]) for row in rows] == [body[1], body[2], body[0]]
    assert [row["why"] for row in rows] == [
        "no messageId or id of 1 to 64 characters", "not an object", "unknown state 'Teleported'",
    ]  # fmt: skip


async def test_nul_in_what_cannot_be_read_is_kept_as_it_came(api: Api) -> None:
    odd = {"messageId": "\0", "why": "a\0b\\u0000c"}
    assert (await receive(api, [odd]))[:2] == answered(1, 0)
    assert orjson.loads(await api.ctx.pool.fetchval("select body from raw_receipt")) == odd


async def test_a_body_that_is_no_receipt_is_400_and_says_why(api: Api) -> None:
    half_a_character = b'{"messageId": "\\ud800"}'
    for body in (
        *(b"", b"{", b"hello", b'"text"', b"7", b"null", b"\xff\xfe", half_a_character),
        b"[" * 2_000,
    ):
        reply = await receive(api, None, data=body)
        assert (reply.status, reply.body["code"]) == (400, "VALIDATION_ERROR"), body
        assert "the body" in reply.body["message"]


async def test_a_receipt_is_read_whatever_its_content_type_says(api: Api) -> None:
    body = orjson.dumps(receipt("one"))
    for kind in ("application/json; charset=utf-8", "text/plain", "x/y", ""):
        reply = await receive(api, None, data=body, headers={"Content-Type": kind})
        assert reply[:2] == answered(1, 0), kind


async def test_a_body_beyond_the_limit_is_413_whether_or_not_its_length_is_told(api: Api) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(17):
            yield b" " * (1 << 20)

    assert webhooks.BODY_LIMIT < 17 << 20
    told = await receive(api, None, data=io.BytesIO(b" " * (webhooks.BODY_LIMIT + 1)))
    assert (told.status, told.body["code"]) == (413, "PAYLOAD_TOO_LARGE")
    untold = await receive(api, None, data=pieces())
    assert (untold.status, untold.body["code"]) == (413, "PAYLOAD_TOO_LARGE")
    within = io.BytesIO(b" " * (webhooks.BODY_LIMIT - 2) + b"[]")
    assert (await receive(api, None, data=within))[:2] == answered(0, 0)


# ----------------------------------------------------------------------------------------- who may


async def test_where_no_secret_is_set_anybody_may(api: Api) -> None:
    _, (one,) = await selling(api, 1)
    assert (await receive(api, receipt(one), "whatever"))[:2] == answered(1, 1)


async def test_an_account_s_secret_names_it_and_others_are_refused(api: Api) -> None:
    shop, (mine,) = await selling(api, 1, webhookSecret=SECRET)
    _, (theirs,) = await selling(api, 1, webhookSecret="secret-of-another-account")
    for wrong in (None, "wrong", SECRET[:-1], SECRET + " x", SECRET.upper()):
        reply = await receive(api, receipt(mine), wrong)
        assert (reply.status, reply.body["code"]) == (401, "UNAUTHORIZED")
        assert WEBHOOK_SECRET_HEADER in reply.body["message"]
    assert await api.ctx.pool.fetchval("select count(*) from early_receipt") == 0
    reply = await receive(api, [receipt(mine), receipt(theirs)], SECRET)
    assert reply[:2] == answered(2, 1)
    assert await states(shop.pool) == {mine: MessageState.DELIVERED, theirs: MessageState.ACCEPTED}
    early = await shop.pool.fetchrow("select provider_id, account_id from early_receipt")
    assert early is not None
    assert tuple(early) == (theirs, shop.account_id)


async def test_the_secret_of_everybody_names_nobody_and_stands_beside_those_of_accounts(
    pool: database.Pool, settings: config.Settings
) -> None:
    given = settings.model_copy(update={"webhook_secret": SecretStr(SHARED)})
    async with open_api(pool, given) as api:
        _, (mine, other) = await selling(api, 2, webhookSecret=SECRET)
        _, (theirs,) = await selling(api, 1)
        assert (await receive(api, receipt(mine))).status == 401
        reply = await receive(api, [receipt(mine), receipt(theirs)], SHARED)
        assert reply[:2] == answered(2, 2)
        assert (await receive(api, receipt(other), SECRET))[:2] == answered(1, 1)
        assert set((await states(pool)).values()) == {MessageState.DELIVERED}


async def test_a_secret_that_is_an_account_s_and_everybody_s_names_the_account(
    pool: database.Pool, settings: config.Settings
) -> None:
    given = settings.model_copy(update={"webhook_secret": SecretStr(SECRET)})
    async with open_api(pool, given) as api:
        await selling(api, 1, webhookSecret=SECRET)
        _, (theirs,) = await selling(api, 1)
        assert (await receive(api, receipt(theirs), SECRET))[:2] == answered(1, 0)


async def test_a_secret_that_was_changed_binds_within_a_second(api: Api) -> None:
    shop, _ = await selling(api, 1, webhookSecret=SECRET)
    assert (await receive(api, [], SECRET)).status == 202
    changed = {"webhookSecret": "the-new-secret-of-it"}
    path = f"/api/admin/traffic-accounts/{shop.account_id}"
    assert (await api.admin.patch(path, changed)).status == 200
    async with asyncio.timeout(webhooks.SECRETS_SECONDS + 2):
        while (await receive(api, [], SECRET)).status != 401:
            await asyncio.sleep(0.05)
    assert (await receive(api, [], "the-new-secret-of-it")).status == 202


async def test_a_header_of_any_bytes_is_a_wrong_secret(api: Api) -> None:
    await selling(api, 1, webhookSecret=SECRET)
    assert (await receive(api, [], "café ✓ \U0001f511")).status == 401


async def test_the_secret_is_in_no_line_of_the_log(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    await selling(api, 1, webhookSecret=SECRET)
    caplog.set_level(logging.DEBUG)
    with capture_logs() as lines:
        assert (await receive(api, receipt("one"), SECRET)).status == 202
        assert (await receive(api, receipt("one"), SECRET + "x")).status == 401
        assert (await receive(api, None, SECRET, data=b"{")).status == 400
        await api.ctx.pool.close()
        assert (await receive(api, receipt("one"), SECRET)).status == 503
    assert len(lines) >= 4
    assert SECRET not in repr(lines) + caplog.text


# -------------------------------------------------------------------------------------- durable first


async def test_a_receipt_is_answered_only_after_it_is_committed(
    api: Api, connection: database.Connection
) -> None:
    shop, (one,) = await selling(api, 1)
    async with connection.transaction():
        await connection.execute(LOCK_MESSAGE, one)
        asking = asyncio.create_task(receive(api, receipt(one)))
        await until_somebody_waits(shop.pool)
        assert not asking.done()
    assert (await asking)[:2] == answered(1, 1)


async def test_a_receipt_whose_write_breaks_is_503_and_lands_when_it_comes_again(
    api: Api, connection: database.Connection
) -> None:
    shop, (one,) = await selling(api, 1)
    async with connection.transaction():
        await connection.execute(LOCK_MESSAGE, one)
        asking = asyncio.create_task(receive(api, receipt(one)))
        await until_somebody_waits(shop.pool)
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and wait_event_type = 'Lock'"
        )
        reply = await asking
        assert (reply.status, reply.body["code"]) == (503, "QUEUE_UNAVAILABLE")
        assert int(reply.headers["Retry-After"]) > 0
    assert (await receive(api, receipt(one)))[:2] == answered(1, 1)


async def test_nothing_of_a_body_whose_write_breaks_is_kept_so_that_its_repeat_doubles_nothing(
    api: Api, connection: database.Connection
) -> None:
    shop, (one,) = await selling(api, 1)
    body = [receipt(one), receipt("early"), receipt(one, "Teleported"), 7]
    kept = "select (select count(*) from raw_receipt) as raw, (select count(*) from early_receipt) as early"
    async with connection.transaction():
        await connection.execute(LOCK_MESSAGE, one)
        asking = asyncio.create_task(receive(api, body))
        await until_somebody_waits(shop.pool)
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and wait_event_type = 'Lock'"
        )
        assert (await asking).status == 503
        assert dict(await connection.fetchrow(kept) or {}) == {"raw": 0, "early": 0}
    for updated in (1, 0, 0):
        assert (await receive(api, body))[:2] == answered(4, updated)
        assert dict(await connection.fetchrow(kept) or {}) == {"raw": 2, "early": 1}


async def test_a_receipt_nested_too_deeply_to_be_written_is_kept_with_its_whole_body(
    api: Api,
) -> None:
    _, (one,) = await selling(api, 1)
    deep = b"[" * 400 + b"]" * 400
    body = b'[{"messageId": "%s", "status": "ok"}, %s]' % (one.encode(), deep)
    for updated in (1, 0):
        assert (await receive(api, None, data=body))[:2] == answered(2, updated)
    rows = await api.ctx.pool.fetch("select body, why from raw_receipt")
    assert [tuple(row) for row in rows] == [(body.decode(), "not an object")]


async def test_while_postgres_is_away_receipts_are_503_and_once_it_is_back_they_land(
    api: Api, dsn: str, tmp_path: Path
) -> None:
    _, (one,) = await selling(api, 1, webhookSecret=SECRET)
    async with Relay(dsn, tmp_path, 1) as relay:
        away = await database.open_pool(relay.dsn, 2)
        async with open_api(away, api.ctx.settings) as cut_off:
            assert (await receive(cut_off, [], SECRET)).status == 202
            await relay.__aexit__()
            for body in (receipt(one), receipt(one, "Teleported"), [receipt("x"), receipt(one)]):
                reply = await receive(cut_off, body, SECRET)
                assert (reply.status, reply.body["code"]) == (503, "QUEUE_UNAVAILABLE")
            await relay.__aenter__()
            assert (await receive(cut_off, receipt(one), SECRET))[:2] == answered(1, 1)
        away.terminate()


async def test_more_receipts_than_memory_should_hold_are_503(
    api: Api, connection: database.Connection
) -> None:
    shop, (one,) = await selling(api, 1)
    async with connection.transaction():
        await connection.execute(LOCK_MESSAGE, one)
        written = []
        for n in range(1, receipts.WRITERS + 1):  # every writer has something to do
            written.append(asyncio.create_task(receive(api, receipt(one))))
            await until_somebody_waits(shop.pool, n)
        crowd = [queue.ReceiptRow(None, one, MessageState.ENROUTE, None, None)] * 100_001
        waiting = asyncio.create_task(api.ctx.receipts.put(crowd))
        await asyncio.sleep(0)
        reply = await receive(api, receipt(one))
        assert (reply.status, reply.body["code"]) == (503, "QUEUE_UNAVAILABLE")
        assert "100001 receipts" in reply.body["message"]
    assert [(await task)[:2] for task in written] == [answered(1, 1), answered(1, 0)]
    assert await waiting == 0
