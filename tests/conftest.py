"""What all tests stand on: a real Postgres, a fresh migrated database per test, and the API on loopback.

One embedded Postgres serves a pytest process; SMSD_TEST_DATABASE_URL names a running one instead (its user must be
allowed to create databases).
"""

import asyncio
import contextlib
import os
import threading
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import orjson
import pytest
from aiohttp.test_utils import TestClient, TestServer
from multidict import CIMultiDictProxy

from smsd import api as http_api
from smsd import config, database, embedded, mitto, receipts, tenants
from smsd.api.endpoint import Context

ADMIN_TOKEN = "token-of-the-operator"
T = TypeVar("T")


# ---------------------------------------------------------------------------------------- Postgres


def run_aside(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine in a loop and thread of its own, so that no test's loop is involved."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(work))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def database_url(server: str, name: str) -> str:
    """The URL of another database on the same server."""
    return urlunsplit(urlsplit(server)._replace(path=f"/{name}"))


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server on which test databases are made."""
    if given := os.environ.get("SMSD_TEST_DATABASE_URL"):
        yield given
        return
    # Nothing here has to survive a power cut.
    settings = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
    server = embedded.Postgres(tmp_path_factory.mktemp("postgres"), settings=settings)
    yield run_aside(server.start())
    run_aside(server.stop())


async def _execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def template(postgres: str) -> Iterator[str]:
    """The name of a migrated database that others are copied from."""
    name = f"smsd_template_{uuid.uuid4().hex[:12]}"

    async def make() -> None:
        await _execute(postgres, f"create database {name}")
        await database.migrate(database_url(postgres, name))

    run_aside(make())
    yield name
    run_aside(_execute(postgres, f"drop database {name} with (force)"))


@pytest.fixture
async def empty_dsn(postgres: str) -> AsyncIterator[str]:
    """The URL of a database without a schema, dropped after the test."""
    name = f"smsd_test_{uuid.uuid4().hex[:12]}"
    await _execute(postgres, f"create database {name}")
    yield database_url(postgres, name)
    await _execute(postgres, f"drop database {name} with (force)")


@pytest.fixture
async def dsn(postgres: str, template: str) -> AsyncIterator[str]:
    """The URL of a fresh migrated database, dropped after the test."""
    name = f"smsd_test_{uuid.uuid4().hex[:12]}"
    await _execute(postgres, f"create database {name} template {template} strategy file_copy")
    yield database_url(postgres, name)
    await _execute(postgres, f"drop database {name} with (force)")


@pytest.fixture
async def pool(dsn: str) -> AsyncIterator[database.Pool]:
    """A pool on the test's database."""
    opened = await database.open_pool(dsn, 8)
    yield opened
    await opened.close()


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[database.Connection]:
    """One connection to the test's database, outside any pool."""
    opened = await database.connect(dsn)
    yield opened
    await opened.close()


@pytest.fixture
def settings() -> config.Settings:
    """Settings as a test daemon has them."""
    return config.load(
        {
            "SMSD_ADMIN_TOKEN": ADMIN_TOKEN,
            "SMSD_PUBLIC_URL": "https://sms.example",
            "SMSD_MITTO_BASE_URL": "http://127.0.0.1:9",  # nobody there: no test reaches Mitto
        }
    )


# --------------------------------------------------------------------------------------------- API


class Reply(NamedTuple):
    """An answer, read to its end. `body` is the JSON, or None where there is none."""

    status: int
    body: Any
    headers: CIMultiDictProxy[str]
    text: str


@dataclass
class Caller:
    """Somebody who asks the API with a key."""

    client: "TestClient[Any, Any]"
    key: str | None

    async def __call__(self, method: str, path: str, json: object = None, **options: Any) -> Reply:
        """One request. `json` becomes the body; options are aiohttp's (params, data, headers …)."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        headers |= options.pop("headers", {})
        if json is not None:
            options["data"] = orjson.dumps(json)
            headers.setdefault("Content-Type", "application/json")
        async with self.client.request(method, path, headers=headers, **options) as response:
            text = await response.text()
            is_json = text and response.content_type == "application/json"
            body = orjson.loads(text) if is_json else None
            return Reply(response.status, body, response.headers, text)

    async def get(self, path: str, **options: Any) -> Reply:
        return await self("GET", path, **options)

    async def post(self, path: str, json: object = None, **options: Any) -> Reply:
        return await self("POST", path, json, **options)

    async def put(self, path: str, json: object = None, **options: Any) -> Reply:
        return await self("PUT", path, json, **options)

    async def patch(self, path: str, json: object = None, **options: Any) -> Reply:
        return await self("PATCH", path, json, **options)

    async def delete(self, path: str, **options: Any) -> Reply:
        return await self("DELETE", path, **options)


@dataclass
class TenantCaller(Caller):
    """A tenant with its key, and what it was made with."""

    id: int = 0
    account_id: int = 0


@dataclass
class Replica:
    """A registration as the daemon has it."""

    id: int | None


@dataclass
class Api:
    """The API on loopback. `admin` asks with the operator's token, `public` without a key; `nudges` are the names of
    the loops that handlers woke."""

    client: "TestClient[Any, Any]"
    ctx: Context
    nudges: list[str]
    accounts: int = 0
    admin: Caller = field(init=False)
    public: Caller = field(init=False)

    def __post_init__(self) -> None:
        self.admin = Caller(self.client, ADMIN_TOKEN)
        self.public = Caller(self.client, None)

    async def new_account(self, **fields: Any) -> int:
        """A traffic account; its id."""
        self.accounts += 1
        given = {"name": "Main", "trafficAccountId": f"mitto-{self.accounts}"} | fields
        reply = await self.admin.post("/api/admin/traffic-accounts", given)
        assert reply.status == 201, reply.text
        return int(reply.body["id"])

    async def new_tenant(
        self, *, account_id: int | None = None, credits: int = 0, **fields: Any
    ) -> TenantCaller:
        """A tenant, on a traffic account of its own unless one is given, with so many credits."""
        account_id = account_id or await self.new_account()
        given = {"name": "Shop", "accountId": account_id, "sender": "Shop"} | fields
        reply = await self.admin.post("/api/admin/tenants", given)
        assert reply.status == 201, reply.text
        tenant_id = int(reply.body["id"])
        if credits:
            grant = {"amount": credits, "reason": "test"}
            granted = await self.admin.post(f"/api/admin/tenants/{tenant_id}/credits", grant)
            assert granted.status == 200, granted.text
        return TenantCaller(self.client, reply.body["apiKey"], tenant_id, account_id)


@contextlib.asynccontextmanager
async def open_api(pool: database.Pool, settings: config.Settings) -> AsyncIterator[Api]:
    """The API over a database, without the loops of the daemon other than that which writes receipts."""
    async with pool.acquire() as connection:
        await tenants.ensure_signing_key(connection)
    nudges: list[str] = []
    inbox = receipts.Inbox(pool)
    async with mitto.Client(settings.mitto_base_url, settings.mitto_timeout) as client:
        ctx = Context(
            pool=pool,
            settings=settings,
            keys=await tenants.signing_keys(pool),
            nudge=nudges.append,
            receipts=inbox,
            mitto=client,
            replica=Replica(1),
        )
        writing = asyncio.create_task(inbox.run())
        server = TestServer(http_api.build(ctx), host="127.0.0.1")
        async with TestClient(server) as test_client:
            assert server.runner is not None
            http_api.open_door(ctx, server.runner)
            yield Api(test_client, ctx, nudges)
        writing.cancel()


@pytest.fixture
async def api(pool: database.Pool, settings: config.Settings) -> AsyncIterator[Api]:
    """The API over the test's database."""
    async with open_api(pool, settings) as opened:
        yield opened
