"""Drafts over HTTP: what is taken, what is refused and how, and recipients of one campaign."""

import io
from collections.abc import AsyncIterator
from typing import Any

import pytest
from conftest import Api, TenantCaller
from shop import PHONE

from smsd import contacts, text
from smsd.api import campaigns as handlers


@pytest.fixture
async def me(api: Api) -> TenantCaller:
    return await api.new_tenant(credits=1_000)


async def draft(caller: TenantCaller, **fields: Any) -> int:
    """A new campaign; its id."""
    reply = await caller.post("/api/campaigns", {"name": "Sale", "messageText": "Hi"} | fields)
    assert reply.status == 201, reply.text
    return int(reply.body["id"])


# -------------------------------------------------------------------------------------------- drafts


async def test_a_campaign_comes_back_as_it_was_given(api: Api, me: TenantCaller) -> None:
    lists = [(await contacts.create_list(api.ctx.pool, me.id, name)).id for name in "ab"]
    given = {
        "name": "Sale",
        "messageText": "Γεια {{firstName|σου}} {{link}}",
        "sender": "Shop",
        "messageType": "service",
        "linkUrl": "https://shop.example/?a=1",
        "listIds": lists[:1],
        "excludeListIds": lists[1:],
        "filterGender": "female",
        "filterAgeGroup": "25_39",
    }
    reply = await me.post("/api/campaigns", given)
    assert reply.status == 201
    assert {name: reply.body[name] for name in given} == given
    assert reply.body["status"] == "draft"
    assert reply.body["stats"] == {"sent": 0, "delivered": 0, "failed": 0, "pendingDelivery": 0}
    for name in ("startedAt", "finishedAt", "scheduledAt", "pausedReason"):
        assert reply.body[name] is None
    assert reply.body["createdAt"].endswith("Z")
    assert (await me.get(f"/api/campaigns/{reply.body['id']}")).body == reply.body


async def test_a_name_is_enough(me: TenantCaller) -> None:
    reply = await me.post("/api/campaigns", {"name": "Sale"})
    assert reply.status == 201
    assert reply.body["messageText"] is None
    assert reply.body["messageType"] == "marketing"
    assert reply.body["listIds"] == []


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, "name"),
    ({"name": "  "}, "name"),
    ({"name": "x" * 201}, "name"),
    ({"name": None}, "name"),
    ({"name": 7}, "name"),
    ({"name": "a\0b"}, "name"),
    ({"messageText": 5}, "messageText"),
    ({"messageText": "x" * 10_001}, "messageText"),
    ({"messageText": "x" * 9_990}, "messageText"),  # no room for the unsubscribe link
    ({"messageText": "a\x07b"}, "messageText"),
    ({"messageText": "a\0b"}, "messageText"),
    ({"sender": "Has space"}, "sender"),
    ({"sender": "TwelveLetter"}, "sender"),
    ({"sender": "12345678901234567"}, "sender"),
    ({"sender": ""}, "sender"),
    ({"messageType": "other"}, "messageType"),
    ({"linkUrl": "shop.example"}, "linkUrl"),
    ({"linkUrl": "javascript:alert(1)"}, "linkUrl"),
    ({"linkUrl": "https://a b"}, "linkUrl"),
    ({"listIds": [0]}, "listIds.0"),
    ({"listIds": ["1"]}, "listIds.0"),
    ({"listIds": 1}, "listIds"),
    ({"listIds": None}, "listIds"),
    ({"listIds": [999]}, "listIds"),
    ({"listIds": [2**63]}, "listIds.0"),
    ({"excludeListIds": [999]}, "excludeListIds"),
    ({"filterGender": "x"}, "filterGender"),
    ({"filterAgeGroup": "18-24"}, "filterAgeGroup"),
    ({"surprise": 1}, "surprise"),
]


async def test_a_field_that_cannot_be_taken_is_named_when_made_and_when_changed(
    me: TenantCaller,
) -> None:
    campaign_id = await draft(me)
    for fields, named in BAD_FIELDS:
        for reply in (
            await me.post("/api/campaigns", {"name": "Sale"} | fields),
            await me.put(f"/api/campaigns/{campaign_id}", fields),
        ):
            assert (reply.status, reply.body["code"]) == (400, "VALIDATION_ERROR"), fields
            assert reply.body["details"][0]["field"] == named, fields
            assert named.split(".")[0] in reply.body["message"], fields
    assert (await me.get("/api/campaigns")).body["total"] == 1


async def test_what_this_version_cannot_do_is_said_by_name(me: TenantCaller) -> None:
    campaign_id = await draft(me)
    for field in ("scheduledAt", "scheduledDate", "scheduledTime", "templateId"):
        value = 1 if field == "templateId" else "2027-01-01"
        for reply in (
            await me.post("/api/campaigns", {"name": "Sale", field: value}),
            await me.put(f"/api/campaigns/{campaign_id}", {field: value}),
        ):
            assert (reply.status, reply.body["code"]) == (501, "NOT_IMPLEMENTED")
            assert field in reply.body["message"]
        assert (await me.post("/api/campaigns", {"name": "Sale", field: None})).status == 201


async def test_the_list_of_another_tenant_is_no_list(api: Api, me: TenantCaller) -> None:
    other = await api.new_tenant()
    theirs = await contacts.create_list(api.ctx.pool, other.id, "theirs")
    reply = await me.post("/api/campaigns", {"name": "Sale", "listIds": [theirs.id]})
    assert (reply.status, reply.body["details"][0]["field"]) == (400, "listIds")


async def test_a_change_leaves_what_it_does_not_name(me: TenantCaller) -> None:
    campaign_id = await draft(me, sender="Shop", filterGender="male")
    reply = await me.put(f"/api/campaigns/{campaign_id}", {"name": "Other", "sender": None})
    assert reply.status == 200
    assert (reply.body["name"], reply.body["sender"]) == ("Other", None)
    assert (reply.body["messageText"], reply.body["filterGender"]) == ("Hi", "male")
    assert (await me.get(f"/api/campaigns/{campaign_id}")).body == reply.body


async def test_a_deleted_draft_is_gone(me: TenantCaller) -> None:
    campaign_id = await draft(me)
    assert (await me.delete(f"/api/campaigns/{campaign_id}")).status == 204
    for reply in (
        await me.get(f"/api/campaigns/{campaign_id}"),
        await me.delete(f"/api/campaigns/{campaign_id}"),
    ):
        assert (reply.status, reply.body["code"]) == (404, "NOT_FOUND")


async def test_what_was_sent_is_neither_changed_nor_deleted_nor_given_recipients(
    api: Api, me: TenantCaller
) -> None:
    campaign_id = await draft(me)
    path = f"/api/campaigns/{campaign_id}"
    for status in ("sending", "paused", "completed", "failed", "cancelled"):
        await api.ctx.pool.execute("update campaign set status = $1", status)
        for reply in (
            await me.put(path, {"name": "x"}),
            await me.delete(path),
            await upload(me, campaign_id, b"phone\n+306900000000\n"),
        ):
            assert (reply.status, reply.body["code"]) == (409, "INVALID_STATUS")
            assert reply.body["currentStatus"] == status
    assert (await me.get(path)).body["name"] == "Sale"
    assert await api.ctx.pool.fetchval("select count(*) from recipient") == 0


async def test_campaigns_are_listed_and_searched(me: TenantCaller) -> None:
    ids = [await draft(me, name=name) for name in ("Spring", "Summer", "spring 2")]
    reply = await me.get("/api/campaigns", params={"pageSize": "2"})
    assert [item["id"] for item in reply.body["items"]] == ids[:0:-1]
    assert (reply.body["total"], reply.body["page"], reply.body["pageSize"]) == (3, 1, 2)
    reply = await me.get("/api/campaigns", params={"q": "SPRING", "status": "draft"})
    assert [item["id"] for item in reply.body["items"]] == [ids[2], ids[0]]
    assert (await me.get("/api/campaigns", params={"status": "sending"})).body["items"] == []
    assert (await me.get("/api/campaigns", params={"status": "odd"})).status == 400


ROUTES = [
    ("GET", ""), ("PUT", ""), ("DELETE", ""), ("GET", "/preview"), ("POST", "/enqueue"), ("GET", "/status"),
    ("POST", "/pause"), ("POST", "/resume"), ("POST", "/cancel"), ("POST", "/retry-failed"), ("POST", "/test"),
    ("POST", "/refresh-status"), ("GET", "/messages"), ("GET", "/batches"), ("POST", "/recipients"),
]  # fmt: skip


async def test_another_tenants_campaign_does_not_exist(api: Api, me: TenantCaller) -> None:
    campaign_id = await draft(me)
    before = await api.ctx.pool.fetch("select * from campaign")
    other = await api.new_tenant(credits=10)
    bodies: dict[str, dict[str, Any]] = {
        "/recipients": {"data": b"phone\n+306900000000\n", "headers": {"Content-Type": "text/csv"}},
        "/test": {"json": {"phone": "+306900000000"}},
    }
    for method, path in ROUTES:
        options = bodies.get(path, {})
        for one in (campaign_id, campaign_id + 1_000, 2**63 - 1, 2**63, 0):
            reply = await other(method, f"/api/campaigns/{one}{path}", **options)
            assert (reply.status, reply.body["code"]) == (404, "NOT_FOUND"), (method, path, one)
        reply = await api.public(method, f"/api/campaigns/{campaign_id}{path}", **options)
        assert reply.status == 401, (method, path)
    assert await api.ctx.pool.fetch("select * from campaign") == before


async def test_a_campaign_made_twice_under_one_key_is_one(me: TenantCaller) -> None:
    headers = {"Idempotency-Key": "one"}
    first = await me.post("/api/campaigns", {"name": "Sale"}, headers=headers)
    again = await me.post("/api/campaigns", {"name": "Sale"}, headers=headers)
    other = await me.post("/api/campaigns", {"name": "Other"}, headers=headers)
    assert (first.status, again.status, again.body) == (201, 201, first.body)
    assert (other.status, other.body["code"]) == (422, "IDEMPOTENCY_MISMATCH")
    assert (await me.get("/api/campaigns")).body["total"] == 1


# ------------------------------------------------------------------------------------------ recipients


async def upload(
    caller: TenantCaller, campaign_id: int, body: Any, content_type: str = "text/csv"
) -> Any:
    return await caller.post(
        f"/api/campaigns/{campaign_id}/recipients",
        data=body,
        headers={"Content-Type": content_type},
    )


CSV = "phone,firstName,city\n+306900000001,Μαρία,Αθήνα\n6900000002,,\nbad,,\n00306900000001,z,z\n+306900000003\n"
NDJSON = (
    '{"phone": "+306900000001", "firstName": "Μαρία", "city": "Αθήνα"}\n'
    '{"phone": "6900000002"}\n{"phone": "bad"}\n{"phone": "00306900000001"}\n{"firstName": "x"}\n'
)


@pytest.mark.parametrize(
    ("body", "content_type"), [(CSV, "text/csv; charset=utf-8"), (NDJSON, "application/x-ndjson")]
)
async def test_recipients_are_added_once_and_bad_lines_are_told(
    api: Api, me: TenantCaller, body: str, content_type: str
) -> None:
    campaign_id = await draft(me)
    reply = await upload(me, campaign_id, body.encode(), content_type)
    assert reply.status == 200, reply.text
    assert {n: reply.body[n] for n in ("added", "duplicates", "invalid")} == {
        "added": 2, "duplicates": 1, "invalid": 2,
    }  # fmt: skip
    lines = [error["line"] for error in reply.body["errors"]]
    assert lines == ([4, 6] if "csv" in content_type else [3, 5])
    again = await upload(me, campaign_id, b"phone\n+306900000001\n+306900000009\n")
    assert (again.body["added"], again.body["duplicates"], again.body["errors"]) == (1, 1, [])
    kept = await api.ctx.pool.fetch("select phone, raw, attributes from recipient order by id")
    assert [tuple(row) for row in kept] == [
        (306900000001, None, {"firstName": "Μαρία", "city": "Αθήνα"}),
        (306900000002, None, {}),
        (None, "bad", {}),
        (306900000009, None, {}),
    ]


async def test_of_many_bad_lines_the_first_hundred_are_told(me: TenantCaller) -> None:
    body = "phone\n" + "nonsense\n" * 5_000 + "".join(f"+{PHONE + i}\n" for i in range(5_000))
    reply = await upload(me, await draft(me), body.encode())
    assert (reply.body["added"], reply.body["invalid"]) == (5_000, 5_000)
    assert [error["line"] for error in reply.body["errors"]] == [*range(2, 102)]


UNREADABLE = [
    (b"", "text/csv", 400, "VALIDATION_ERROR"),
    (b"name\nx\n", "text/csv", 400, "VALIDATION_ERROR"),
    (b"phone\n+306900000000\n", "text/plain", 415, "UNSUPPORTED_MEDIA_TYPE"),
    (
        b"phone\n+306900000000\n",
        "multipart/form-data; boundary=x",
        415,
        "UNSUPPORTED_MEDIA_TYPE",
    ),
    (b"phone\n+306900000000\n", "text/csv; charset=utf-16", 415, "UNSUPPORTED_MEDIA_TYPE"),
    (b'{"phone": "' + b"x" * 100_000, "application/x-ndjson", 400, "VALIDATION_ERROR"),
]


async def test_an_upload_that_cannot_be_read_is_refused_whole(api: Api, me: TenantCaller) -> None:
    campaign_id = await draft(me)
    for body, content_type, status, code in UNREADABLE:
        reply = await upload(me, campaign_id, body, content_type)
        assert (reply.status, reply.body["code"]) == (status, code), reply.text
    assert await api.ctx.pool.fetchval("select count(*) from recipient") == 0


async def pieces() -> AsyncIterator[bytes]:
    yield b"phone\n"
    for _ in range(handlers.UPLOAD_BYTES // 140_000 + 1):
        yield b"+306900000000\n" * 10_000


@pytest.mark.parametrize("announced", [True, False])
async def test_an_upload_that_is_too_large_is_refused_whole(
    api: Api, me: TenantCaller, announced: bool
) -> None:
    campaign_id = await draft(me)
    body = io.BytesIO(b"".join([piece async for piece in pieces()])) if announced else pieces()
    reply = await upload(me, campaign_id, body)
    assert (reply.status, reply.body["code"]) == (413, "PAYLOAD_TOO_LARGE")
    assert await api.ctx.pool.fetchval("select count(*) from recipient") == 0


def test_the_longest_text_leaves_room_for_the_unsubscribe_tag() -> None:
    tag = len(text.with_unsubscribe("x")) - 1
    handlers._check_template("x" * (text.SOURCE_LIMIT - tag))
