"""What an endpoint is, and the one wrapper around every handler.

The wrapper finds out who asks, parses and checks path, query and body, opens the transaction, honours
`Idempotency-Key`, and turns whatever comes out of the handler into an answer: a model into JSON, `ApiError` into its
status, an absent database into 503, a surprise into a logged 503. Handlers only see what is already checked.
"""

import hashlib
import itertools
import math
import re
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from hmac import compare_digest
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self, TypeVar, cast

import aiohttp
import asyncpg
import orjson
import structlog
from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import InitErrorDetails, PydanticCustomError

from smsd import database, metrics, telemetry, tenants
from smsd.api.errors import ApiError, from_validation, invalid, not_found
from smsd.api.models import LARGEST_ID
from smsd.config import Settings
from smsd.database import Connection, Executor, Pool

if TYPE_CHECKING:
    from smsd.mitto import Client
    from smsd.receipts import Inbox

log = structlog.get_logger()

BODY_LIMIT = 1 << 20
ACQUIRE_SECONDS = 5.0
_REQUEST_ID_CHARACTERS = re.compile(r"[^A-Za-z0-9._:/+=@-]")
_IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")
_PATH_PARAMETER = re.compile(r"\{(\w+)\}")
_REQUEST_ID = web.RequestKey("request_id", str)
_TENANT = web.RequestKey("tenant", int)
_QUIET = {"/healthz", "/readyz", "/metrics", "/webhooks/mitto/dlr"}
"""Routes that are called all the time: metrics count them, and the log has at its usual level what was refused."""
_PROCESS, _NUMBERS = secrets.token_hex(12), itertools.count()
"""What request ids are made of: a random number each would cost more than reading a receipt does."""

# What Postgres says where the schema is missing or another one.
_NO_SCHEMA = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
)

# What Postgres says when somebody else holds a lock for too long, or two stood in each other's way.
_BUSY = (asyncpg.LockNotAvailableError, asyncpg.TransactionRollbackError)

# What aiohttp says of a body that is not chunked or packed as announced.
_UNREADABLE = (
    web.RequestPayloadError,
    aiohttp.ClientPayloadError,
    aiohttp.http.HttpProcessingError,
)


# ------------------------------------------------------------------------------------------ models


class Model(BaseModel):
    """Base of all bodies, queries and answers: camelCase outside, nothing unknown, nothing converted by guess, and
    nothing that Postgres cannot store (NUL, half a character, an integer beyond 64 bits, infinity)."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="after")
    def _storable(self) -> Self:
        fields = type(self).model_fields
        problems = [
            InitErrorDetails(type=PydanticCustomError("unstorable", takes), loc=loc, input=value)
            for name, content in self.__dict__.items()
            for loc, value, takes in _unstorable(content, (fields[name].alias or name,))
        ]
        if problems:
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self


def _unstorable(
    value: object, loc: tuple[int | str, ...]
) -> Iterator[tuple[tuple[int | str, ...], object, str]]:
    if isinstance(value, str):
        if "\0" in value:
            yield loc, value, "takes text without the character NUL"
        elif not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            yield loc, value, "takes text without half characters (lone surrogates)"
    elif isinstance(value, int):
        if not -LARGEST_ID <= value <= LARGEST_ID:
            yield loc, value, "takes an integer of at most 64 bits"
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield loc, str(value), "takes a finite number"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _unstorable(key, (*loc, str(key)))
            yield from _unstorable(inner, (*loc, str(key)))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _unstorable(inner, (*loc, index))


class Page(Model):
    """The query of a list. Subclass it to add filters."""

    page: int = Field(1, ge=1, le=10**9, description="counted from 1")
    page_size: int = Field(20, ge=1, le=100, description="items on a page")

    @property
    def offset(self) -> int:
        """Items before this page."""
        return (self.page - 1) * self.page_size


Item = TypeVar("Item", bound=Model)


class Listing(Model, Generic[Item]):
    """The answer of a list; `total` counts all pages."""

    items: list[Item]
    total: int
    page: int
    page_size: int


# --------------------------------------------------------------------------------------- endpoints


class PatientPool:
    """The daemon's pool as requests see it: whoever waits for a connection longer than ACQUIRE_SECONDS hears
    TimeoutError, and so the caller 503, however long Postgres keeps everybody else waiting."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def acquire(self) -> Any:
        """As asyncpg.Pool.acquire."""
        return self._pool.acquire(timeout=ACQUIRE_SECONDS)

    async def execute(self, query: str, *args: Any) -> str:
        async with self.acquire() as connection:
            return str(await connection.execute(query, *args))

    async def fetch(self, query: str, *args: Any) -> list[database.Record]:
        async with self.acquire() as connection:
            return list(await connection.fetch(query, *args))

    async def fetchrow(self, query: str, *args: Any) -> database.Record | None:
        async with self.acquire() as connection:
            row: database.Record | None = await connection.fetchrow(query, *args)
            return row

    async def fetchval(self, query: str, *args: Any) -> Any:
        async with self.acquire() as connection:
            return await connection.fetchval(query, *args)


class Replica(Protocol):
    """This process' registration; `id` is None while it has none."""

    @property
    def id(self) -> int | None: ...


class Sending(Protocol):
    """What the sender of this process says of itself."""

    @property
    def counts(self) -> Mapping[str, int]: ...

    @property
    def in_flight(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Context:
    """What every handler may use; built once, by the daemon."""

    pool: Pool
    settings: Settings
    keys: list[bytes]
    """Signing keys, the one that signs first."""
    nudge: Callable[[str], None]
    """Wakes a loop of this process: expander | importer | housekeeping."""
    receipts: "Inbox"
    mitto: "Client"
    replica: Replica
    sending: Sending | None = None
    webhook_secrets: tenants.WebhookSecrets = field(default_factory=tenants.WebhookSecrets)


@dataclass(slots=True)
class Request:
    """One request, checked. `db` is a connection where the endpoint has a transaction or is idempotent, else the
    pool."""

    ctx: Context
    db: Executor
    raw: web.Request
    endpoint: "Endpoint"
    tenant: tenants.Tenant | None = None
    path: dict[str, int | str] = field(default_factory=dict)
    body: Any = None
    query: Any = None
    after_commit: list[Callable[[], None]] = field(default_factory=list)
    _seen: Any = None  # a SHA-256, once there are bytes

    @property
    def me(self) -> tenants.Tenant:
        """The tenant whose key was shown."""
        assert self.tenant is not None
        return self.tenant

    @property
    def connection(self) -> Connection:
        """`db` where it is one."""
        assert not isinstance(self.db, asyncpg.Pool | database.Share)
        return self.db

    @property
    def id(self) -> int:
        """The path's {id}."""
        return self.number("id")

    def number(self, name: str) -> int:
        """An integer of the path, by its name."""
        value = self.path[name]
        assert isinstance(value, int)
        return value

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in pieces as they arrive, without a limit. For raw_body."""
        async for chunk in self.raw.content.iter_any():
            self.seen(chunk)
            yield chunk

    def seen(self, data: bytes) -> None:
        """Bytes of the body that were read otherwise than by `chunks`: what makes two requests the same."""
        if self._seen is None:
            self._seen = hashlib.sha256()
        self._seen.update(data)

    async def once(self, work: Callable[[], Awaitable["Answer"]]) -> web.StreamResponse:
        """Runs `work` with a connection as `db` and returns its answer, in a transaction where the endpoint has one or
        the caller gave an Idempotency-Key; where that key took effect before, returns that answer instead. The wrapper
        does this around a handler, except with raw_body: there the handler does, once it has read the body by
        `chunks`."""
        key = _idempotency_key(self.raw) if self.endpoint.idempotent else None
        several = self.endpoint.transaction or key is not None
        async with (
            self.ctx.pool.acquire() as connection,
            connection.transaction() if several else nullcontext(),
        ):
            self.db = connection
            if key is None:
                return _respond(self.endpoint, await work())
            owner = self.tenant.id if self.tenant else 0
            slot = tenants.IdempotencySlot(owner, f"{self.endpoint.method} {self.raw.path}", key)
            body_hash = self._body_hash()
            stored = await tenants.claim_slot(connection, slot)
            if stored is not None:
                return _replay(stored, body_hash)
            response = _respond(self.endpoint, await work())
            if isinstance(response, web.Response) and 200 <= response.status < 300:
                content = response.body if isinstance(response.body, bytes) else b""
                await tenants.fill_slot(connection, slot, body_hash, response.status, content)
            return response

    def _body_hash(self) -> bytes:
        digest = hashlib.sha256() if self._seen is None else self._seen.copy()
        digest.update(b"\0" + self.raw.query_string.encode())
        return bytes(digest.digest())


Answer = Model | Mapping[str, Any] | web.StreamResponse | None
Handler = Callable[[Request], Awaitable[Answer]]


@dataclass(frozen=True)
class Endpoint:
    """One row of the route table.

    Path parameters named `id` or `…Id` (other than trackingId) are integers; what is none is 404. `errors` are the
    refusals beyond those that every endpoint has: (status, code). With `transaction` a handler's statements count
    together or not at all; a single one needs none, and is answered two round trips sooner. `idempotent` handlers have
    one under a key. With `raw_body` the handler reads the body, by `Request.chunks`, and opens the transaction, if it
    is to have one, by `Request.once`. `media_type` is what a handler answers that makes its answers itself.
    """

    method: str
    path: str
    handler: Handler
    auth: Literal["tenant", "admin", "public"]
    summary: str
    answer: type[Model] | None
    status: int = 200
    body: type[Model] | None = None
    query: type[Model] | None = None
    transaction: bool = False
    idempotent: bool = False
    errors: tuple[tuple[int, str], ...] = ()
    raw_body: bool = False
    body_limit: int = BODY_LIMIT
    media_type: str = "application/json"

    @cached_property
    def numbers(self) -> frozenset[str]:
        """The path parameters that are integers."""
        return frozenset(name for name in self.parameters if _is_number(name))

    @cached_property
    def parameters(self) -> list[str]:
        """The path parameters in order."""
        return _PATH_PARAMETER.findall(self.path)

    @property
    def pattern(self) -> str:
        """The path as the router takes it: integers match digits alone, so that a literal sibling wins."""
        return _PATH_PARAMETER.sub(
            lambda found: f"{{{found[1]}:[0-9]+}}" if _is_number(found[1]) else found[0], self.path
        )


def _is_number(name: str) -> bool:
    return name == "id" or (name.endswith("Id") and name != "trackingId")


# ----------------------------------------------------------------------------------------- wrapper


def _patient(ctx: Context) -> Context:
    """As handlers see it."""
    return replace(ctx, pool=cast("Pool", PatientPool(ctx.pool)))


def serve(
    ctx: Context, endpoint: Endpoint
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The aiohttp handler of an endpoint."""
    ctx = _patient(ctx)

    async def handle(raw: web.Request) -> web.StreamResponse:
        request = Request(ctx, ctx.pool, raw, endpoint)
        await _authenticate(request, endpoint)
        if endpoint.parameters:
            request.path = _path(raw, endpoint)
        if endpoint.query is not None:
            request.query = _query(raw, endpoint.query)
        if not endpoint.raw_body:
            body = await read_body(raw, endpoint.body_limit)
            request.seen(body)
            request.body = _parse(body, endpoint.body) if endpoint.body else None
        if (endpoint.transaction or endpoint.idempotent) and not endpoint.raw_body:
            response = await request.once(lambda: endpoint.handler(request))
        else:
            response = _respond(endpoint, await endpoint.handler(request))
        for action in request.after_commit:
            action()
        return response

    return handle


async def _authenticate(request: Request, endpoint: Endpoint) -> None:
    if endpoint.auth == "public":
        return
    scheme, _, key = request.raw.headers.get("Authorization", "").partition(" ")
    key = key.strip() if scheme.lower() == "bearer" else ""
    if endpoint.auth == "admin":
        token = request.ctx.settings.admin_token
        if token is None:
            raise ApiError(
                403, "ADMIN_DISABLED", "set SMSD_ADMIN_TOKEN and start anew to open /api/admin"
            )
        if not compare_digest(key.encode(errors="replace"), token.get_secret_value().encode()):
            raise ApiError(401, "UNAUTHORIZED", "takes Authorization: Bearer <SMSD_ADMIN_TOKEN>")
        return
    request.tenant = await tenants.authenticate(request.ctx.pool, key) if key else None
    if request.tenant is None:
        raise ApiError(
            401,
            "UNAUTHORIZED",
            "takes Authorization: Bearer <a tenant's key>; this is none, or revoked",
        )
    request.raw[_TENANT] = request.tenant.id


def _path(raw: web.Request, endpoint: Endpoint) -> dict[str, int | str]:
    values: dict[str, int | str] = dict(raw.match_info)
    for name in endpoint.numbers:
        digits = raw.match_info[name]
        if len(digits) > 19 or not 1 <= int(digits) <= LARGEST_ID:
            raise not_found(raw.path)
        values[name] = int(digits)
    return values


def _query(raw: web.Request, model: type[Model]) -> Model:
    values: dict[str, object] = {}
    lists = {info.alias for info in model.model_fields.values() if "list[" in str(info.annotation)}
    for name in raw.query:
        found = raw.query.getall(name)
        if len(found) > 1 and name not in lists:
            raise invalid(name, ", ".join(found), "one value; it is there more than once")
        values[name] = found if name in lists else found[0]
    try:
        return model.model_validate(values, strict=False, by_alias=True, by_name=False)
    except ValidationError as error:
        raise from_validation(error, _fields(model)) from None


async def read_body(raw: web.Request, limit: int) -> bytes:
    """The body, or 413 as soon as it is known to be too large."""
    if raw.content.is_eof():  # as nearly always: it came with its headers
        whole = raw.content.read_nowait()
        if len(whole) <= limit:
            return whole
    elif (raw.content_length or 0) <= limit:
        body = bytearray()
        async for chunk in raw.content.iter_any():
            body += chunk
            if len(body) > limit:
                break
        else:
            return bytes(body)
    raise ApiError(
        413, "PAYLOAD_TOO_LARGE", f"the body is larger than {limit} bytes, the most taken"
    )


def _parse(body: bytes, model: type[Model]) -> Model:
    try:
        return model.model_validate_json(body or b"{}", by_alias=True, by_name=False)
    except ValidationError as error:
        raise from_validation(error, _fields(model)) from None


def _fields(model: type[Model]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def _idempotency_key(raw: web.Request) -> str | None:
    key = raw.headers.get("Idempotency-Key")
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise invalid("Idempotency-Key", key, "1 to 255 printable ASCII characters without spaces")
    return key


def _replay(stored: tenants.StoredAnswer, body_hash: bytes) -> web.Response:
    if stored.body_hash != body_hash:
        raise ApiError(
            422,
            "IDEMPOTENCY_MISMATCH",
            "this Idempotency-Key was used here with another body; take a new key for a new request",
        )
    return _json(stored.answer, stored.status, {"Idempotency-Replayed": "true"})


def _respond(endpoint: Endpoint, answer: Answer) -> web.StreamResponse:
    if isinstance(answer, web.StreamResponse):
        return answer
    if answer is None:
        return web.Response(status=204 if endpoint.status == 200 else endpoint.status)
    if isinstance(answer, BaseModel):
        return _json(answer.model_dump_json(by_alias=True).encode(), endpoint.status)
    return _json(orjson.dumps(answer, option=orjson.OPT_UTC_Z), endpoint.status)


_CONTENT_TYPE = "application/json; charset=utf-8"
_JSON = {"Content-Type": _CONTENT_TYPE}


def _json(body: bytes, status: int, headers: Mapping[str, str] | None = None) -> web.Response:
    if not body:
        return web.Response(status=status, headers=headers)
    return web.Response(body=body, status=status, headers={**_JSON, **(headers or {})})


# -------------------------------------------------------------------------------------- every answer


@web.middleware
async def frame(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Around every request: its id, its errors, its line in the log."""
    started = time.perf_counter()
    # Not undone: the next request of this connection's task has its own.
    structlog.contextvars.bind_contextvars(request_id=_name(request))
    try:
        response = await handler(request)
    except Exception as error:
        response = _refusal(request, error)
    resource = request.match_info.route.resource
    _tell(request, resource.canonical if resource else None, response.status, started)
    return response


class _Written(web.StreamResponse):
    """JSON for a connection that stays open, as the bytes that leave: aiohttp's own way to the same is a fifth of all
    that answering a receipt takes."""

    def __init__(self, request_id: str, status: int, body: bytes) -> None:
        super().__init__(status=status)
        self._keep_alive = True
        self._bytes = (
            f"HTTP/1.1 {status} {self._reason}\r\nContent-Type: {_CONTENT_TYPE}\r\n"
            f"Content-Length: {len(body)}\r\nX-Request-Id: {request_id}\r\nServer: smsd\r\n"
            f"Date: {rfc822_formatted_time()}\r\n\r\n{body.decode()}"
        ).encode()

    async def prepare(self, request: web.BaseRequest) -> None:
        if request.transport is not None:  # else the caller is gone
            request.transport.write(self._bytes)
            await request.writer.drain()  # who does not read is not answered without end

    async def write_eof(self, data: bytes = b"") -> None:
        """All is written already."""


def door(
    ctx: Context,
    endpoint: Endpoint,
    otherwise: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    """What a server asks instead of the application (`otherwise`): requests of this one endpoint, which come by the
    thousand, are answered as `frame` and `serve` would, before aiohttp has looked for a route. For an endpoint that is
    public and reads its body itself."""
    assert endpoint.auth == "public"
    assert endpoint.raw_body
    ctx = _patient(ctx)

    async def answer(raw: web.BaseRequest) -> web.StreamResponse:
        hot = raw.raw_path == endpoint.path and raw.method == endpoint.method
        if not hot or "Expect" in raw.headers:  # that is for the router to answer
            return await otherwise(raw)
        request = cast("web.Request", raw)  # the application makes them
        started = time.perf_counter()
        request_id = _name(request)
        try:
            found = await endpoint.handler(Request(ctx, ctx.pool, request, endpoint))
            if raw.keep_alive and raw.version == aiohttp.HttpVersion11 and isinstance(found, dict):
                _tell(request, endpoint.path, endpoint.status, started)
                return _Written(request_id, endpoint.status, orjson.dumps(found))
            response = _respond(endpoint, found)
        except Exception as error:
            structlog.contextvars.bind_contextvars(request_id=request_id)
            response = _refusal(request, error)
        _tell(request, endpoint.path, response.status, started)
        await add_headers(request, response)  # no signal is sent where no route was looked for
        return response

    return answer


def _name(request: web.Request) -> str:
    """The request's id: what the caller gave, or one of ours."""
    given = request.headers.get("X-Request-Id")
    request_id = _REQUEST_ID_CHARACTERS.sub("", given)[:128] if given else ""
    request_id = request_id or f"{_PROCESS}{next(_NUMBERS):08x}"
    request[_REQUEST_ID] = request_id
    return request_id


def _tell(request: web.Request, route: str | None, status: int, started: float) -> None:
    """The metric and the line in the log; `route`: None where there is none."""
    took = time.perf_counter() - started
    method = request.method if route else "(any)"
    metrics.request_answered(method, route or "(unknown)", status, took)
    quiet = route in _QUIET and status < 400
    if not quiet or telemetry.says_debug():
        say = log.debug if quiet else log.info
        say(
            "request.answered",
            method=request.method,
            route=route or "(unknown)",
            status=status,
            ms=round(took * 1000, 1),
            tenant=request.get(_TENANT),
        )


async def add_headers(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """What every answer says of itself, streams included; called before the headers leave."""
    response.headers["X-Request-Id"] = request.get(_REQUEST_ID, "")
    response.headers["Server"] = "smsd"


def _refusal(raw: web.Request, error: Exception) -> web.Response:
    if isinstance(error, web.HTTPException):
        return _refuse(raw, _from_http(raw, error))
    return _refuse(raw, error if isinstance(error, ApiError) else _from_surprise(error))


def _refuse(raw: web.Request, error: ApiError) -> web.Response:
    response = _json(error.body(), error.status)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.status == 503:
        response.headers["Retry-After"] = "1"
    if error.status == 405:
        response.headers["Allow"] = ", ".join(sorted(raw.match_info.http_exception.allowed_methods))  # type: ignore[union-attr]
    return response


def _from_http(raw: web.Request, error: web.HTTPException) -> ApiError:
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return ApiError(
            405, "METHOD_NOT_ALLOWED", f"{raw.path} does not take {raw.method}; it takes {allowed}"
        )
    if error.status == 404:
        return not_found(raw.path)
    code = re.sub(r"\W+", "_", error.reason).upper()
    return ApiError(error.status, code, error.text or error.reason)


def _from_surprise(error: Exception) -> ApiError:
    if isinstance(error, _UNREADABLE):
        return ApiError(400, "BAD_REQUEST", "the body is not encoded as its headers say")
    if isinstance(error, (*database.AWAY, *_BUSY)):
        log.warning("database.away", error=type(error).__name__)
        return ApiError(503, "QUEUE_UNAVAILABLE", "the database does not answer; try again")
    if isinstance(error, _NO_SCHEMA):  # we listen while a first start still migrates
        log.warning("schema.behind", error=type(error).__name__)
        why = "the database's schema is not this version's: see /readyz, and try again"
        return ApiError(503, "QUEUE_UNAVAILABLE", why)
    # Without its words: those of Postgres and pydantic quote rows, that is numbers and texts.
    log.error(
        "request.failed",
        error=type(error).__name__,
        stack="".join(traceback.format_tb(error.__traceback__)),
    )
    if isinstance(error, asyncpg.DataError):
        return ApiError(400, "VALIDATION_ERROR", "a value is larger than what can be stored", [])
    return ApiError(
        503, "INTERNAL", "something unexpected happened; the log has it under this X-Request-Id"
    )
