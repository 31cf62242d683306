"""The frame of the API: what every endpoint does alike, and that the document of it is true."""

import asyncio
import contextlib
import gzip
import io
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from conftest import Api, Caller, Reply, TenantCaller, open_api
from pydantic import BaseModel
from structlog.testing import capture_logs

from smsd import config, database, embedded, tenants
from smsd.api import endpoint, errors, openapi, routes
from smsd.api.endpoint import Context, Endpoint, Model, Page, Request

ACCOUNTS = "/api/admin/traffic-accounts"
TENANTS = "/api/admin/tenants"


@contextlib.asynccontextmanager
async def served(ctx: Context, *endpoints: Endpoint) -> AsyncIterator[Caller]:
    """Endpoints of a test's own, framed as all are."""
    app = web.Application(middlewares=[endpoint.frame], client_max_size=0)
    app.on_response_prepare.append(endpoint.add_headers)
    for one in endpoints:
        app.router.add_route(one.method, one.pattern, endpoint.serve(ctx, one))
    async with TestClient(TestServer(app, host="127.0.0.1")) as client:
        yield Caller(client, None)


def problems(reply: Reply) -> list[tuple[str, object]]:
    """The fields that a refusal names, with the values it got."""
    assert (reply.status, reply.body["code"]) == (400, "VALIDATION_ERROR"), reply.text
    assert all(detail["takes"] for detail in reply.body["details"])
    return [(detail["field"], detail["value"]) for detail in reply.body["details"]]


# What is taken


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "name"),
        (b"{}", "name"),
        (b"no json", "body"),
        (b'{"name": "Shop",', "body"),
        (b"[]", "body"),
        (b"null", "body"),
        (b'"text"', "body"),
        (b"\xff\xfe", "body"),
        (b"[" * 100_000, "body"),
        (b'{"a":' * 100_000, "body"),
        (b'{"name": "\xff", "trafficAccountId": "m"}', "body"),
        (b'{"name": "\\ud800", "trafficAccountId": "m"}', "body"),
        (b'{"name": "a\\u0000b", "trafficAccountId": "m"}', "name"),
        (b'{"name": 5, "trafficAccountId": "m"}', "name"),
        (b'{"name": ["Shop"], "trafficAccountId": "m"}', "name"),
        (b'{"name": "Shop", "trafficAccountId": "two words"}', "trafficAccountId"),
        (b'{"name": "Shop", "trafficAccountId": "m", "traffic_account_id": "n"}', "traffic_account_id"),
        (b'{"name": "Shop", "trafficAccountId": "m", "colour": "red"}', "colour"),
        (b'{"name": "Shop", "trafficAccountId": "m", "apiKey": "a\\r\\nHost: b"}', "apiKey"),
        (b'{"name": "Shop", "trafficAccountId": "m", "requestsPerSecond": NaN}', "requestsPerSecond"),
        (b'{"name": "Shop", "trafficAccountId": "m", "requestsPerSecond": 1e400}', "requestsPerSecond"),
        (b'{"name": "Shop", "trafficAccountId": "m", "maxInFlight": ' + b"9" * 5000 + b"}", "body"),
    ],
)  # fmt: skip
async def test_a_bad_body_is_refused_by_the_name_of_the_field(
    api: Api, body: bytes, field: str
) -> None:
    reply = await api.admin.post(ACCOUNTS, data=body)
    assert problems(reply)[0][0] == field
    assert len(reply.text) < 2000
    assert (await api.admin.get(ACCOUNTS)).body["total"] == 0


async def test_all_that_is_wrong_is_told_at_once_and_long_values_are_cut(api: Api) -> None:
    given = {"name": "x" * 5000, "trafficAccountId": "m", "requestsPerSecond": 0, "more": [1]}
    reply = await api.admin.post(ACCOUNTS, given)
    assert problems(reply) == [
        ("name", "x" * 100 + "…"),
        ("requestsPerSecond", 0),
        ("more", "[1]"),
    ]
    assert reply.body["message"].startswith('name: got "xxx')
    assert "2 more" in reply.body["message"]
    assert "trafficAccountId" in reply.body["details"][2]["takes"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("page=0", "page"),
        ("page=-1", "page"),
        ("page=two", "page"),
        ("page=99999999999999999999", "page"),
        ("page=", "page"),
        ("pageSize=101", "pageSize"),
        ("page_size=5", "page_size"),
        ("page=1&page=2", "page"),
        ("sort=name", "sort"),
        ("page=%00", "page"),
        ("page=%ED%A0%80", "page"),
    ],
)
async def test_a_bad_query_is_refused_by_the_name_of_the_parameter(
    api: Api, query: str, field: str
) -> None:
    assert problems(await api.admin.get(f"{ACCOUNTS}?{query}"))[0][0] == field


async def test_a_body_beyond_the_limit_is_413_whether_or_not_its_length_is_told(api: Api) -> None:
    body = orjson.dumps({"name": "x" * (1 << 20), "trafficAccountId": "m"})

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    packed = gzip.compress(body)
    for data, headers in (
        (io.BytesIO(body), {}),
        (pieces(), {}),
        (packed, {"Content-Encoding": "gzip"}),
    ):
        reply = await api.admin.post(ACCOUNTS, data=data, headers=headers)
        assert (reply.status, reply.body["code"]) == (413, "PAYLOAD_TOO_LARGE")


async def test_a_body_that_is_not_packed_as_it_says_is_400(api: Api) -> None:
    reply = await api.admin.post(ACCOUNTS, data=b"{}", headers={"Content-Encoding": "gzip"})
    assert (reply.status, reply.body["code"]) == (400, "BAD_REQUEST")


class Deep(Model):
    """A body with values inside values."""

    inner: dict[str, Any]
    many: list[int] | None = None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"inner": {"a": {"b": ["x", "y\\u0000"]}}}', "inner.a.b.1"),
        (b'{"inner": {"k\\u0000": 1}}', "inner.k\0"),
        (b'{"inner": {"a": NaN}}', "inner.a"),
        (b'{"inner": {"a": -1e999}}', "inner.a"),
        (b'{"inner": {"a": 9223372036854775808}}', "inner.a"),
        (b'{"inner": {}, "many": [1, 18446744073709551616]}', "many.1"),
    ],
)
async def test_what_cannot_be_stored_is_refused_however_deep_it_is(
    api: Api, body: bytes, field: str
) -> None:
    async def handler(_req: Request) -> None: ...

    async with served(
        api.ctx, Endpoint("POST", "/x", handler, "public", "", None, body=Deep)
    ) as caller:
        assert [name for name, _ in problems(await caller.post("/x", data=body))] == [field]
        good = b'{"inner": {"a": [1.5, "e\xcc\x81\xf0\x9f\x98\x80", -9223372036854775807]}}'
        assert (await caller.post("/x", data=good)).status == 204


async def test_a_value_that_postgres_refuses_is_not_a_server_error(api: Api) -> None:
    async def handler(req: Request) -> None:
        await req.db.execute("select $1::int", 2**40)

    async with served(api.ctx, Endpoint("GET", "/x", handler, "public", "", None)) as caller:
        reply = await caller.get("/x")
        assert (reply.status, reply.body["code"]) == (400, "VALIDATION_ERROR")


# Who asks


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer sk_" + "a" * 43,
        "Basic sk_x",
        "sk_x",
        "Bearer \xe9\xff",
    ],
)
async def test_without_a_tenants_key_it_is_401(api: Api, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for path in ("/api/credits", "/api/credits/ledger", "/api/campaigns"):
        reply = await api.public.get(path, headers=headers)
        assert (reply.status, reply.body["code"]) == (401, "UNAUTHORIZED")
        assert reply.headers["WWW-Authenticate"] == "Bearer"


async def test_keys_of_tenants_and_of_the_operator_do_not_open_each_others_doors(api: Api) -> None:
    tenant = await api.new_tenant()
    assert (await tenant.get(ACCOUNTS)).status == 401
    assert (await api.public.get(ACCOUNTS)).status == 401
    assert (await api.admin.get("/api/credits")).status == 401
    near = Caller(api.client, "token-of-the-operato")
    assert (await near.get(ACCOUNTS)).body["code"] == "UNAUTHORIZED"


async def test_the_word_bearer_is_taken_in_any_case(api: Api) -> None:
    tenant = await api.new_tenant()
    headers = {"Authorization": f"bearer  {tenant.key}"}
    assert (await api.public.get("/api/credits", headers=headers)).status == 200


async def test_without_an_operators_token_the_admin_api_says_how_to_open_it(
    pool: database.Pool,
) -> None:
    async with open_api(pool, config.load({})) as api:
        reply = await api.admin.get(ACCOUNTS)
        assert (reply.status, reply.body["code"]) == (403, "ADMIN_DISABLED")
        assert "SMSD_ADMIN_TOKEN" in reply.body["message"]


async def test_a_refusal_of_the_key_comes_before_a_look_at_the_body(api: Api) -> None:
    reply = await api.public.post(ACCOUNTS, data=b"no json")
    assert reply.status == 401


# Paths and methods


@pytest.mark.parametrize(
    "path", ["/", "/nope", "/api", "/api/nope", "/api/credits/", "/api/%00", f"{TENANTS}/abc"]
)
async def test_an_unknown_path_is_404_in_json(api: Api, path: str) -> None:
    reply = await api.admin.get(path)
    assert (reply.status, reply.body["code"]) == (404, "NOT_FOUND")
    assert set(reply.body) == {"message", "code", "details"}


@pytest.mark.parametrize("number", ["0", "-1", "1.0", "+1", "9" * 19, "9" * 400, "٣", "1%00"])
async def test_an_id_that_is_none_is_404(api: Api, number: str) -> None:
    reply = await api.admin.get(f"{TENANTS}/{number}")
    assert (reply.status, reply.body["code"]) == (404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/api/credits", {"GET", "HEAD"}),
        ("POST", "/healthz", {"GET", "HEAD"}),
        ("PUT", f"{TENANTS}/1", {"GET", "HEAD", "PATCH"}),
        ("OPTIONS", ACCOUNTS, {"GET", "HEAD", "POST"}),
    ],
)
async def test_a_wrong_method_is_405_and_says_what_is_allowed(
    api: Api, method: str, path: str, allowed: set[str]
) -> None:
    reply = await api.admin(method, path)
    assert (reply.status, reply.body["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert set(reply.headers["Allow"].split(", ")) == allowed


async def test_head_answers_as_get_without_the_body(api: Api) -> None:
    reply = await api.public("HEAD", "/openapi.json")
    assert (reply.status, reply.text) == (200, "")


async def test_a_literal_path_wins_over_an_id(api: Api) -> None:
    async def one(_req: Request) -> dict[str, str]:
        return {"path": "one"}

    async def literal(_req: Request) -> dict[str, str]:
        return {"path": "import"}

    async with served(
        api.ctx,
        Endpoint("GET", "/x/{id}", one, "public", "", None),
        Endpoint("POST", "/x/import", literal, "public", "", None),
        Endpoint("GET", "/x/import/{jobId}", literal, "public", "", None),
    ) as caller:
        assert (await caller.get("/x/7")).body == {"path": "one"}
        assert (await caller.post("/x/import")).body == {"path": "import"}
        assert (await caller.get("/x/import/3")).body == {"path": "import"}
        assert (await caller.get("/x/import")).status == 405


@pytest.mark.parametrize("route", routes.NOT_IMPLEMENTED, ids=lambda r: f"{r.method} {r.path}")
async def test_what_is_promised_but_not_there_says_so(api: Api, route: Endpoint) -> None:
    callers = {"admin": api.admin, "public": api.public, "tenant": await api.new_tenant()}
    path = route.path.replace("{id}", "1").replace("{trackingId}", "x")
    reply = await callers[route.auth](route.method, path)
    assert (reply.status, reply.body["code"]) == (501, "NOT_IMPLEMENTED")


# Request ids and the log


async def test_the_callers_request_id_is_kept_without_what_does_not_belong_there(api: Api) -> None:
    for given, kept in (
        ("abc-1.2_3:4/5", "abc-1.2_3:4/5"),
        ("a b\t{c}", "abc"),
        ("x" * 300, "x" * 128),
    ):
        reply = await api.public.get("/healthz", headers={"X-Request-Id": given})
        assert reply.headers["X-Request-Id"] == kept


async def test_a_request_without_an_id_gets_one_of_its_own(api: Api) -> None:
    replies = [await api.public.get(path) for path in ("/healthz", "/nope", "/api/credits")]
    replies.append(await api.public.get("/healthz", headers={"X-Request-Id": "{}"}))
    ids = {reply.headers["X-Request-Id"] for reply in replies}
    assert len(ids) == 4
    assert all(len(one) == 32 for one in ids)


async def test_every_answer_has_a_line_in_the_log_and_no_secret_is_in_it(api: Api) -> None:
    tenant = await api.new_tenant()
    with capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        await tenant.get("/api/credits?page=1", headers={"X-Request-Id": "r-1"})
        await api.admin.get(f"{TENANTS}/{tenant.id}", headers={"X-Request-Id": "r-2"})
        await api.public.get("/u/secret-token", headers={"X-Request-Id": "r-3"})
    answered = [line for line in lines if line["event"] == "request.answered"]
    assert [
        (line["request_id"], line["method"], line["route"], line["status"], line["tenant"])
        for line in answered
    ][:2] == [
        ("r-1", "GET", "/api/credits", 200, tenant.id),
        ("r-2", "GET", f"{TENANTS}/{{id}}", 200, None),
    ]
    assert all(line["ms"] >= 0 for line in answered)
    assert len(answered) == 3
    assert "sk_" not in str(lines)
    assert "secret-token" not in str(lines)


async def test_probes_are_logged_below_the_usual_level(api: Api) -> None:
    with capture_logs() as lines:
        await api.public.get("/healthz")
        await api.public.get("/readyz")
    assert [line["log_level"] for line in lines] == ["debug", "debug"]


# Surprises


PHONE = "+" + "306900" + "000000"  # never whole in a line that a stack shows


class Secretive(BaseModel):
    phone: int


@pytest.mark.parametrize(
    "surprise",
    [
        lambda: 1 / 0,
        lambda: dict[str, int]()[PHONE],
        lambda: Secretive.model_validate({"phone": f"tel:{PHONE}"}),
    ],
)
async def test_a_surprise_is_logged_without_its_words_and_answered_with_503(
    api: Api, surprise: Callable[[], object]
) -> None:
    async def handler(_req: Request) -> None:
        surprise()

    with capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        async with served(api.ctx, Endpoint("GET", "/x", handler, "public", "", None)) as caller:
            reply = await caller.get("/x", headers={"X-Request-Id": "r-1"})
    assert (reply.status, reply.body["code"]) == (503, "INTERNAL")
    assert "Error" not in reply.text
    failed = next(line for line in lines if line["event"] == "request.failed")
    assert (failed["log_level"], failed["request_id"]) == ("error", "r-1")
    assert "surprise()" in failed["stack"]
    assert PHONE not in str(lines)


async def test_who_waits_for_a_connection_that_nobody_gives_back_hears_of_it_in_bounded_time(
    api: Api, tenant: TenantCaller
) -> None:
    """As when Postgres has become a black hole: every connection hangs in somebody's statement."""
    pool = api.ctx.pool
    async with contextlib.AsyncExitStack() as hanging:
        for _ in range(pool.get_max_size()):
            await hanging.enter_async_context(pool.acquire())
        draft = {"name": "Sale", "messageText": "Hi"}
        async with asyncio.timeout(endpoint.ACQUIRE_SECONDS + 5):
            replies = await asyncio.gather(
                tenant.get("/api/credits"),
                tenant.post("/api/campaigns", draft),
                api.admin.get(TENANTS),
                api.admin.post(TENANTS, {"name": "Shop", "accountId": tenant.account_id}),
                api.public.post("/webhooks/mitto/dlr", []),
                *(tenant.get("/api/campaigns") for _ in range(20)),
            )
    assert {reply.status for reply in replies} == {503}
    assert {reply.body["code"] for reply in replies} == {"QUEUE_UNAVAILABLE"}
    assert all(int(reply.headers["Retry-After"]) > 0 for reply in replies)
    assert (await tenant.post("/api/campaigns", draft)).status == 201
    assert (await tenant.get("/api/credits")).status == 200


async def test_who_asks_before_the_schema_is_there_hears_that_it_is_not(api: Api) -> None:
    await api.ctx.pool.execute("drop table traffic_account cascade")
    reply = await api.admin.get("/api/admin/traffic-accounts/1")
    assert (reply.status, reply.body["code"]) == (503, "QUEUE_UNAVAILABLE")
    assert "/readyz" in reply.body["message"]
    assert int(reply.headers["Retry-After"]) > 0


async def test_a_lock_held_for_too_long_is_answered_with_503_to_be_tried_again(api: Api) -> None:
    async def handler(req: Request) -> None:
        await req.db.execute("set local lock_timeout = '10ms'")
        await req.db.execute("lock table tenant")

    async with (
        api.ctx.pool.acquire() as other,
        served(
            api.ctx, Endpoint("POST", "/x", handler, "public", "", None, transaction=True)
        ) as caller,
    ):
        async with other.transaction():
            await other.execute("lock table tenant")
            reply = await caller.post("/x")
        assert (reply.status, reply.body["code"]) == (503, "QUEUE_UNAVAILABLE")
        assert reply.headers["Retry-After"] == "1"
        assert (await caller.post("/x")).status == 204


async def test_without_postgres_the_process_lives_is_not_ready_and_comes_back(
    tmp_path: Path, settings: config.Settings
) -> None:
    async with embedded.Postgres(tmp_path / "data", settings={"fsync": "off"}) as server:
        await database.migrate(server.dsn)
        pool = await database.open_pool(server.dsn, 4)
        async with open_api(pool, settings) as api:
            tenant = await api.new_tenant(credits=3)
            assert (await api.public.get("/readyz")).body == {"ok": True, "replica": 1}
            await server.stop()
            assert (await api.public.get("/healthz")).body == {"ok": True}
            for caller, path in ((tenant, "/api/credits"), (api.admin, ACCOUNTS)):
                reply = await caller.get(path)
                assert (reply.status, reply.body["code"]) == (503, "QUEUE_UNAVAILABLE")
            ready = await api.public.get("/readyz")
            assert (ready.status, ready.body["ok"], ready.body["code"]) == (503, False, "NOT_READY")
            assert "database" in ready.body["message"]
            await server.start()
            assert (await api.public.get("/readyz")).status == 200
            assert (await tenant.get("/api/credits")).body["balance"] == 3
        await pool.close()


async def test_readyz_says_in_one_line_what_is_missing(api: Api, connection: Any) -> None:
    async def message() -> str:
        reply = await api.public.get("/readyz")
        assert (reply.status, reply.body["code"]) == (503, "NOT_READY")
        assert "\n" not in reply.body["message"]
        return str(reply.body["message"])

    api.ctx.replica.id = None  # type: ignore[misc]  # a test's own class, which can be set
    assert "not registered" in await message()
    await connection.execute("delete from schema_migration where number > 1")
    assert "run `smsd migrate`" in await message()
    await connection.execute("begin; lock table schema_migration")
    assert "did not answer within 1 s" in await message()
    await connection.execute("rollback")


# Idempotency


@pytest.fixture
async def tenant(api: Api) -> TenantCaller:
    return await api.new_tenant()


async def grant(api: Api, tenant_id: int, amount: int, key: str) -> Reply:
    return await api.admin.post(
        f"{TENANTS}/{tenant_id}/credits",
        {"amount": amount, "reason": "r"},
        headers={"Idempotency-Key": key},
    )


async def balance(tenant: TenantCaller) -> int:
    return int((await tenant.get("/api/credits")).body["balance"])


async def test_the_same_key_and_body_spend_once_and_get_the_same_answer(
    api: Api, tenant: TenantCaller
) -> None:
    first = await grant(api, tenant.id, 5, "k")
    await grant(api, tenant.id, 7, "other")
    again = await grant(api, tenant.id, 5, "k")
    assert (first.status, first.text) == (again.status, again.text)
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.headers["Content-Type"] == first.headers["Content-Type"]
    assert again.headers["X-Request-Id"] != first.headers["X-Request-Id"]
    assert await balance(tenant) == 12


async def test_the_same_key_shows_a_new_tenants_key_again(api: Api) -> None:
    account_id = await api.new_account()
    given = {"name": "Shop", "accountId": account_id}
    first, again = [
        await api.admin.post(TENANTS, given, headers={"Idempotency-Key": "k"}) for _ in range(2)
    ]
    assert (first.status, again.status) == (201, 201)
    assert first.text == again.text
    assert (await api.admin.get(TENANTS)).body["total"] == 1


async def test_the_same_key_with_another_body_is_422(api: Api, tenant: TenantCaller) -> None:
    await grant(api, tenant.id, 5, "k")
    reply = await grant(api, tenant.id, 6, "k")
    assert (reply.status, reply.body["code"]) == (422, "IDEMPOTENCY_MISMATCH")
    assert await balance(tenant) == 5


async def test_at_once_under_the_same_key_one_takes_effect_and_all_get_its_answer(
    api: Api, tenant: TenantCaller
) -> None:
    replies = await asyncio.gather(*(grant(api, tenant.id, 5, "k") for _ in range(12)))
    assert {(reply.status, reply.text) for reply in replies} == {
        (200, '{"balance":5,"reserved":0,"available":5}')
    }
    assert sum("Idempotency-Replayed" in reply.headers for reply in replies) == 11
    assert await balance(tenant) == 5


async def test_a_second_request_waits_for_the_first_and_for_its_refusal_too(api: Api) -> None:
    entered: asyncio.Queue[None] = asyncio.Queue()
    go_on = asyncio.Event()
    calls = 0

    async def handler(_req: Request) -> dict[str, int]:
        nonlocal calls
        calls += 1
        call = calls
        entered.put_nowait(None)
        await go_on.wait()
        if call == 1:
            raise errors.ApiError(409, "NO", "not this time")
        return {"call": call}

    slow = Endpoint("POST", "/x", handler, "admin", "", None, idempotent=True)
    async with served(api.ctx, slow) as caller:
        caller.key = api.admin.key
        headers = {"Idempotency-Key": "k"}
        first = asyncio.create_task(caller.post("/x", headers=headers))
        await entered.get()
        others = [asyncio.create_task(caller.post("/x", headers=headers)) for _ in range(2)]
        while await api.ctx.pool.fetchval(
            "select count(*) from pg_locks l join pg_database d on d.oid = l.database "
            "where l.locktype = 'advisory' and not l.granted and d.datname = current_database()"
        ) < len(others):
            pass
        assert calls == 1
        assert not any(task.done() for task in (first, *others))
        go_on.set()
        assert (await first).status == 409
        assert [(await task).body for task in others] == [{"call": 2}, {"call": 2}]
    assert calls == 2


async def test_a_refusal_leaves_no_trace(api: Api, tenant: TenantCaller) -> None:
    async def handler(req: Request) -> None:
        await req.db.execute("update tenant set name = 'touched'")
        raise errors.invalid("x", 1, "nothing")

    async with served(
        api.ctx, Endpoint("POST", "/x", handler, "admin", "", None, idempotent=True)
    ) as caller:
        caller.key = api.admin.key
        assert (await caller.post("/x", headers={"Idempotency-Key": "k"})).status == 400
    assert await api.ctx.pool.fetchval("select count(*) from tenant where name = 'touched'") == 0

    account_id = await api.new_account()
    for status, given in ((400, 99), (201, account_id)):
        reply = await api.admin.post(
            TENANTS, {"name": "Shop", "accountId": given}, headers={"Idempotency-Key": "k2"}
        )
        assert reply.status == status


async def test_keys_are_apart_by_tenant_and_by_path(api: Api, tenant: TenantCaller) -> None:
    other = await api.new_tenant()
    for one in (tenant, other):
        assert (await grant(api, one.id, 5, "k")).status == 200
    assert [await balance(one) for one in (tenant, other)] == [5, 5]

    async def handler(req: Request) -> dict[str, int]:
        return {"tenant": req.me.id}

    async with served(
        api.ctx, Endpoint("POST", "/x", handler, "tenant", "", None, idempotent=True)
    ) as caller:
        for one in (tenant, other, tenant):
            caller.key = one.key
            reply = await caller.post("/x", headers={"Idempotency-Key": "k"})
            assert reply.body == {"tenant": one.id}


async def test_the_query_belongs_to_what_has_to_be_the_same(api: Api) -> None:
    async def handler(_req: Request) -> dict[str, bool]:
        return {"ok": True}

    async with served(
        api.ctx, Endpoint("POST", "/x", handler, "admin", "", None, query=Page, idempotent=True)
    ) as caller:
        caller.key = api.admin.key
        headers = {"Idempotency-Key": "k"}
        statuses = [
            (await caller.post(f"/x?page={page}", headers=headers)).status for page in (1, 2, 1)
        ]
        assert statuses == [200, 422, 200]


async def test_a_body_that_is_streamed_is_remembered_as_well(api: Api) -> None:
    sizes: list[int] = []

    async def handler(req: Request) -> web.StreamResponse:
        size = sum([len(chunk) async for chunk in req.chunks()])

        async def work() -> dict[str, int]:
            sizes.append(size)
            await req.connection.execute("select 1")
            return {"size": size}

        return await req.once(work)

    async with served(
        api.ctx, Endpoint("POST", "/x", handler, "admin", "", None, raw_body=True, idempotent=True)
    ) as caller:
        caller.key = api.admin.key
        headers = {"Idempotency-Key": "k"}
        replies = [
            await caller.post("/x", data=io.BytesIO(letter * 3_000_000), headers=headers)
            for letter in (b"a", b"a", b"b")
        ]
    assert [reply.status for reply in replies] == [200, 200, 422]
    assert replies[0].text == replies[1].text == '{"size":3000000}'
    assert sizes == [3_000_000]


async def test_recipients_uploaded_twice_under_one_key_are_answered_alike(
    api: Api, tenant: TenantCaller
) -> None:
    made = await tenant.post("/api/campaigns", {"name": "c", "messageText": "Hi"})
    headers = {"Idempotency-Key": "k", "Content-Type": "application/x-ndjson"}
    replies = [
        await tenant.post(
            f"/api/campaigns/{made.body['id']}/recipients", data=data, headers=headers
        )
        for data in (b'{"phone": "+306900000001"}', b'{"phone": "+306900000001"}', b"")
    ]
    assert [reply.status for reply in replies] == [200, 200, 422]
    assert replies[0].text == replies[1].text
    assert (replies[0].body["added"], replies[0].body["duplicates"]) == (1, 0)


@pytest.mark.parametrize("key", ["", "two words", "x" * 256, "é"])
async def test_an_idempotency_key_that_is_none_is_refused(
    api: Api, tenant: TenantCaller, key: str
) -> None:
    assert problems(await grant(api, tenant.id, 5, key))[0][0] == "Idempotency-Key"
    assert await balance(tenant) == 0


async def test_an_answer_is_kept_for_a_day_and_not_for_ever(api: Api, tenant: TenantCaller) -> None:
    age = "update idempotency set created_at = created_at - make_interval(hours => $1)"
    await grant(api, tenant.id, 5, "k")
    for hours, replayed in ((25, True), (24, False)):
        await api.ctx.pool.execute(age, hours)
        await tenants.forget_answers(api.ctx.pool)
        reply = await grant(api, tenant.id, 5, "k")
        assert ("Idempotency-Replayed" in reply.headers) is replayed


async def test_neither_key_nor_answer_can_be_read_from_the_database(
    api: Api, tenant: TenantCaller
) -> None:
    await grant(api, tenant.id, 5, "4f9c0a52-7a1e-4a39-8f4e-7d0c3a0f8f11")
    row = await api.ctx.pool.fetchrow("select * from idempotency")
    assert row is not None
    assert "4f9c0a52" not in str(dict(row))
    assert b"balance" not in row["answer"]


async def test_nudges_come_after_the_commit_and_not_at_all_after_a_refusal(api: Api) -> None:
    seen: list[object] = []

    async def handler(req: Request) -> None:
        await req.db.execute("insert into signing_key (key) values ('x')")

        def look() -> None:
            seen.append(
                asyncio.ensure_future(req.ctx.pool.fetchval("select count(*) from signing_key"))
            )

        req.after_commit.append(look)
        if req.query.page == 2:
            raise errors.not_found("it")

    async with served(
        api.ctx,
        Endpoint("POST", "/x", handler, "public", "", None, query=Page, transaction=True),
    ) as caller:
        assert (await caller.post("/x?page=2")).status == 404
        assert (await caller.post("/x")).status == 204
    assert [await one for one in seen] == [2]  # type: ignore[misc]  # they are futures


# The document

BODIES = [one.body for one in routes.ENDPOINTS if one.body]


def references(node: object) -> set[str]:
    if isinstance(node, list):
        return set().union(*map(references, node))
    if isinstance(node, dict):
        found = set().union(*map(references, node.values()))
        return found | {node["$ref"]} if isinstance(node.get("$ref"), str) else found
    return set()


async def test_the_document_has_every_route_and_nothing_else(api: Api) -> None:
    document = (await api.public.get("/openapi.json")).body
    assert document["openapi"].startswith("3.1")
    assert document == openapi.document(routes.ENDPOINTS)
    described = {
        (method.upper(), path) for path, item in document["paths"].items() for method in item
    }
    assert described == {(one.method, one.path) for one in routes.ENDPOINTS}
    served_routes = {
        (route.method, route.resource.canonical)
        for route in api.client.app.router.routes()
        if route.resource and route.method != "HEAD"
    }
    absent = {(one.method, one.path) for one in routes.NOT_IMPLEMENTED}
    assert described | absent == served_routes
    assert not described & absent


async def test_the_document_holds_together(api: Api) -> None:
    document = (await api.public.get("/openapi.json")).body
    schemas = document["components"]["schemas"]
    assert {ref.rsplit("/", 1)[1] for ref in references(document)} == set(schemas)
    operations = [op for item in document["paths"].values() for op in item.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids)
    tags = {tag["name"] for tag in document["tags"]}
    for operation in operations:
        assert operation["summary"]
        assert set(operation["tags"]) <= tags
        schemes = {name for need in operation["security"] for name in need}
        assert schemes <= set(document["components"]["securitySchemes"])
        assert "503" in operation["responses"]
    for path, item in document["paths"].items():
        for operation in item.values():
            named = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
            assert named == {part[1:-1] for part in path.split("/") if part.startswith("{")}


@pytest.mark.parametrize("model", BODIES, ids=[model.__name__ for model in BODIES])
def test_the_examples_of_a_body_are_taken_by_it(model: type[Model]) -> None:
    examples = model.model_json_schema().get("examples", [])
    for example in examples:
        model.model_validate_json(orjson.dumps(example), by_alias=True, by_name=False)


@pytest.mark.timeout(180)
async def test_what_schemathesis_makes_up_from_the_document_gets_documented_answers(
    api: Api, tmp_path: Path
) -> None:
    tenant = await api.new_tenant(credits=1000)
    for path, given in (
        ("/api/lists", {"name": "List"}),
        ("/api/contacts", {"phone": "+306900000001", "lists": [1]}),
        ("/api/campaigns", {"name": "Sale", "messageText": "Hi", "listIds": [1]}),
    ):
        assert (await tenant.post(path, given)).status == 201
    settings = tmp_path / "schemathesis.toml"
    settings.write_text("[checks]\nnot_a_server_error.expected-statuses = ['2xx', '4xx', 501]\n")
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance,negative_data_rejection,ignored_auth"
    )
    # In this order: in the second the operator will revoke the tenant's key sooner or later.
    runs = ((tenant.key, "^/(?!api/admin)"), (api.admin.key, "^/api/admin"))
    for key, paths in runs:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "schemathesis.cli", f"--config-file={settings}", "run",
            str(api.client.make_url("/openapi.json")),
            "--max-examples=10", "--phases=examples,coverage,fuzzing", f"--checks={checks}",
            f"--header=Authorization: Bearer {key}", f"--include-path-regex={paths}",
            "--seed=1", "--generation-database=none", "--no-color", "--continue-on-failure",
            cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        with capture_logs():  # thousands of lines
            output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        assert b"Authentication failed" not in output, output.decode()
