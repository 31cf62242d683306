"""Who may use the daemon, and within which limits: traffic accounts, tenants, their keys, and signing keys.

Also what an `Idempotency-Key` remembers, per tenant and route. Secrets are kept out of every repr; of a tenant's key
only the hash is kept.
"""

import asyncio
import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg

from smsd import database
from smsd.database import Connection, Executor
from smsd.model import SEGMENTS_MOST

SQL = database.queries("tenants")

KEY_PREFIX = "sk_"
_SHOWN = 8  # characters of a key that lists show
_REQUESTS, _MESSAGES, _TENANT_REQUESTS, _TENANT_MESSAGES = 1, 2, 3, 4  # scopes of limiter rows


class Taken(Exception):  # noqa: N818 - reads as what it says
    """Another traffic account has this value already; `field` is provider_id or webhook_secret."""

    def __init__(self, column: str) -> None:
        super().__init__(f"another traffic account has this {column}")
        self.field = column


class TooLow(Exception):  # noqa: N818 - likewise
    """A limit in segments that a message of the longest text would never fit."""

    def __init__(self, messages_per_second: int) -> None:
        super().__init__(
            f"{messages_per_second} segments a second are less than one message can have"
        )
        self.messages_per_second = messages_per_second


class NoSuchAccount(Exception):  # noqa: N818 - likewise
    """The traffic account that a tenant was to be bound to does not exist."""


class AccountInUse(Exception):  # noqa: N818 - likewise
    """The tenant has campaigns or messages on their way, which are bound to its present account."""


@dataclass(frozen=True, slots=True)
class TrafficAccount:
    """One account at Mitto: the unit of pacing."""

    id: int
    name: str
    provider_id: str
    api_key: str | None = field(repr=False)
    requests_per_second: int
    messages_per_second: int | None
    max_in_flight: int | None
    webhook_secret: str | None = field(repr=False)
    server_error_means: str
    largest_request: int
    limit_unit: str
    ceiling: int | None
    blocked_until: datetime | None
    paused_reason: str | None
    paused_detail: str | None
    capabilities: dict[str, Any]
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whom a key belongs to, with what is the same for all of its campaigns."""

    id: int
    name: str
    account_id: int
    sender: str | None
    requests_per_second: int
    messages_per_second: int | None
    weight: float
    batch_size: int | None
    subscription: str
    timezone: str
    default_country: str
    created_at: datetime
    updated_at: datetime

    @property
    def active(self) -> bool:
        """Whether it may send."""
        return self.subscription == "active"


class Key(NamedTuple):
    """A tenant's key as lists show it."""

    id: int
    prefix: str
    created_at: datetime
    revoked_at: datetime | None


# ------------------------------------------------------------------------------- traffic accounts


async def create_account(
    db: Connection,
    *,
    name: str,
    provider_id: str,
    api_key: str | None,
    requests_per_second: int,
    messages_per_second: int | None,
    max_in_flight: int | None,
    webhook_secret: str | None,
    server_error_means: str,
    limit_unit: str = "messages",
) -> TrafficAccount:
    """A new account, its limiter open. Raises Taken, TooLow."""
    _check_unit(limit_unit, messages_per_second)
    try:
        row = await db.fetchrow(
            SQL["insert_account"],
            name, provider_id, api_key, requests_per_second, messages_per_second, max_in_flight,
            webhook_secret, server_error_means, limit_unit,
        )  # fmt: skip
    except asyncpg.UniqueViolationError as error:
        raise _taken(error) from None
    assert row is not None
    account = TrafficAccount(**row)
    scopes = [_REQUESTS] if messages_per_second is None else [_REQUESTS, _MESSAGES]
    await db.execute(SQL["open_rate"], scopes, account.id)
    return account


async def get_account(db: Executor, account_id: int) -> TrafficAccount | None:
    """The account, or None."""
    row = await db.fetchrow(SQL["get_account"], account_id)
    return TrafficAccount(**row) if row else None


async def list_accounts(db: Executor, limit: int, offset: int) -> tuple[list[TrafficAccount], int]:
    """A page of accounts, and how many there are in all."""
    rows = await db.fetch(SQL["list_accounts"], limit, offset)
    return [TrafficAccount(**row) for row in rows], await db.fetchval(SQL["count_accounts"])


async def change_account(
    db: Connection, account_id: int, changes: Mapping[str, Any], paused: bool | None = None
) -> TrafficAccount | None:
    """Sets fields by their names here. A new API key, or paused=False, lifts whatever stopped the account. None: no
    such account. Raises Taken, TooLow. Dispatchers of all replicas look again once this commits."""
    await db.execute(SQL["lock_account"], account_id)
    before = await get_account(db, account_id)
    if before is None:
        return None
    account = replace(before, **changes)
    _check_unit(account.limit_unit, account.messages_per_second)
    if account.limit_unit == "segments" != before.limit_unit:
        _check_unit("segments", await db.fetchval(SQL["lowest_tenant_limit"], account_id))
    try:
        await db.execute(
            SQL["update_account"],
            account_id, account.name, account.provider_id, account.api_key, account.requests_per_second,
            account.messages_per_second, account.max_in_flight, account.webhook_secret,
            account.server_error_means, account.limit_unit,
        )  # fmt: skip
    except asyncpg.UniqueViolationError as error:
        raise _taken(error) from None
    if paused:
        await db.execute(SQL["pause_account"], account_id)
    elif paused is False or "api_key" in changes:
        await db.execute(SQL["resume_account"], account_id)
    await db.execute(SQL["wake_account"], account_id)
    return await get_account(db, account_id)


async def learn(db: Executor, account_id: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps what a probe found out about an account; what it did not find out stays. All that is known then."""
    known = await db.fetchval(SQL["learn_capabilities"], account_id, found)
    return dict(known or {})


def _check_unit(unit: str, messages_per_second: int | None) -> None:
    if unit == "segments" and messages_per_second and messages_per_second < SEGMENTS_MOST:
        raise TooLow(messages_per_second)


def _taken(error: asyncpg.UniqueViolationError) -> Taken:
    return Taken(
        "webhook_secret" if "webhook_secret" in str(error.constraint_name) else "provider_id"
    )


# --------------------------------------------------------------------------------------- tenants


async def create_tenant(
    db: Connection,
    *,
    name: str,
    account_id: int,
    sender: str | None,
    requests_per_second: int,
    messages_per_second: int | None,
    weight: float,
    batch_size: int | None,
    subscription: str,
    timezone: str,
    default_country: str,
) -> Tenant:
    """A new tenant with its money, its priority lane and open limiters. Raises NoSuchAccount, TooLow."""
    _check_unit(await _unit_of(db, account_id), messages_per_second)
    try:
        row = await db.fetchrow(
            SQL["insert_tenant"],
            name, account_id, sender, requests_per_second, messages_per_second, weight, batch_size,
            subscription, timezone, default_country,
        )  # fmt: skip
    except asyncpg.ForeignKeyViolationError:
        raise NoSuchAccount from None
    assert row is not None
    tenant = Tenant(**row)
    await db.execute(SQL["insert_credit"], tenant.id)
    await db.execute(SQL["insert_priority_lane"], account_id, tenant.id)
    scopes = [_TENANT_REQUESTS]
    if messages_per_second is not None:
        scopes.append(_TENANT_MESSAGES)
    await db.execute(SQL["open_rate"], scopes, tenant.id)
    return tenant


async def get_tenant(db: Executor, tenant_id: int) -> Tenant | None:
    """The tenant, or None."""
    row = await db.fetchrow(SQL["get_tenant"], tenant_id)
    return Tenant(**row) if row else None


async def list_tenants(db: Executor, limit: int, offset: int) -> tuple[list[Tenant], int]:
    """A page of tenants, and how many there are in all."""
    rows = await db.fetch(SQL["list_tenants"], limit, offset)
    return [Tenant(**row) for row in rows], await db.fetchval(SQL["count_tenants"])


async def change_tenant(
    db: Connection, tenant_id: int, changes: Mapping[str, Any]
) -> Tenant | None:
    """Sets fields by their names here. Inactive pauses what is sending, active again resumes just that. None: no such
    tenant. Raises NoSuchAccount, TooLow, and AccountInUse for a new account while something is on its way."""
    await db.execute(SQL["lock_tenant"], tenant_id)
    if "subscription" in changes:
        await db.execute(SQL["lock_campaigns"], tenant_id)
        await db.execute(SQL["lock_expansions"], tenant_id)
    before = await get_tenant(db, tenant_id)
    if before is None:
        return None
    tenant = replace(before, **changes)
    if tenant.account_id != before.account_id:
        await _move(db, tenant)
    _check_unit(await _unit_of(db, tenant.account_id), tenant.messages_per_second)
    await db.execute(
        SQL["update_tenant"],
        tenant_id, tenant.name, tenant.account_id, tenant.sender, tenant.requests_per_second,
        tenant.messages_per_second, tenant.weight, tenant.batch_size, tenant.subscription,
        tenant.timezone, tenant.default_country,
    )  # fmt: skip
    if before.active and not tenant.active:
        await db.execute(SQL["pause_campaigns"], tenant_id)
    elif tenant.active and not before.active:
        await db.execute(SQL["resume_campaigns"], tenant_id)
    await db.execute(SQL["wake_account"], tenant.account_id)
    return await get_tenant(db, tenant_id)


async def _unit_of(db: Connection, account_id: int) -> str:
    account = await get_account(db, account_id)
    if account is None:
        raise NoSuchAccount
    return account.limit_unit


async def _move(db: Connection, tenant: Tenant) -> None:
    if await get_account(db, tenant.account_id) is None:
        raise NoSuchAccount
    if await db.fetchval(SQL["has_open_work"], tenant.id):
        raise AccountInUse
    await db.execute(SQL["insert_priority_lane"], tenant.account_id, tenant.id)


# ------------------------------------------------------------------------------------------ keys


async def create_key(db: Executor, tenant_id: int) -> tuple[Key, str]:
    """A new key: as lists show it, and itself, for the only time. The tenant must exist."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    row = await db.fetchrow(SQL["insert_key"], tenant_id, _hash(key), key[:_SHOWN])
    assert row is not None
    return Key(**row), key


async def list_keys(db: Executor, tenant_id: int, limit: int, offset: int) -> tuple[list[Key], int]:
    """A page of a tenant's keys, revoked ones included, and how many there are in all."""
    rows = await db.fetch(SQL["list_keys"], tenant_id, limit, offset)
    return [Key(**row) for row in rows], await db.fetchval(SQL["count_keys"], tenant_id)


async def revoke_key(db: Executor, tenant_id: int, key_id: int) -> bool:
    """From now on the key opens nothing. False: the tenant has no such key."""
    return await db.fetchval(SQL["revoke_key"], tenant_id, key_id) is not None


async def authenticate(db: Executor, key: str) -> Tenant | None:
    """The tenant that this key belongs to, if it is one and not revoked. Asked anew each time (0.2 ms), so that
    revoking a key, or a tenant's new settings, bind at once on every replica."""
    if not key.startswith(KEY_PREFIX):
        return None
    row = await db.fetchrow(SQL["authenticate"], _hash(key))
    return Tenant(**row) if row else None


def _hash(key: str) -> bytes:
    # A key has 256 bits of chance: nothing that a slow hash would have to protect.
    return hashlib.sha256(key.encode(errors="replace")).digest()


# ----------------------------------------------------------------------------------- idempotency


class IdempotencySlot(NamedTuple):
    """Where an answer is kept: the caller (0: the operator), the method and path, the caller's key."""

    tenant_id: int
    route: str
    key: str


class StoredAnswer(NamedTuple):
    """What a request was answered, and the hash of its body."""

    body_hash: bytes
    status: int
    answer: bytes


async def claim_slot(db: Connection, slot: IdempotencySlot) -> StoredAnswer | None:
    """Waits for whoever is in this slot, holds it until the transaction ends, and returns what is stored in it."""
    tenant_id, route, key = slot
    await db.execute(SQL["lock_slot"], f"{tenant_id} {route} {_name(key)}")
    row = await db.fetchrow(SQL["stored_answer"], tenant_id, route, _name(key))
    if row is None:
        return None
    return StoredAnswer(row["body_hash"], row["status"], _veil(row["answer"], slot))


async def fill_slot(
    db: Connection, slot: IdempotencySlot, body_hash: bytes, status: int, answer: bytes
) -> None:
    """Stores an answer in a claimed, empty slot."""
    await db.execute(
        SQL["store_answer"],
        slot.tenant_id, slot.route, _name(slot.key), body_hash, status, _veil(answer, slot),
    )  # fmt: skip


async def forget_answers(db: Executor) -> None:
    """Deletes answers that are older than two days, up to 5,000 of them."""
    await db.execute(SQL["forget_answers"])


def _name(key: str) -> str:
    return hashlib.sha256(b"name" + key.encode()).hexdigest()


def _veil(answer: bytes, slot: IdempotencySlot) -> bytes:
    """The answer under a one-time pad made of the caller's key, of which only a hash is stored; its own inverse.
    Answers hold texts, and once a tenant's new key: a copy of the table must not give them away."""
    pad = hashlib.shake_256(f"{slot.tenant_id} {slot.route} {slot.key}".encode()).digest(
        len(answer)
    )
    veiled = int.from_bytes(answer, "big") ^ int.from_bytes(pad, "big")
    return veiled.to_bytes(len(answer), "big")


# ---------------------------------------------------------------------------------- signing keys


async def ensure_signing_key(db: Connection) -> None:
    """Makes the first signing key if there is none. Safe with many at once."""
    async with db.transaction():
        await db.execute(SQL["lock_signing_keys"])
        await db.execute(SQL["insert_signing_key"], secrets.token_bytes(32))


async def signing_keys(db: Executor) -> list[bytes]:
    """The keys in use, at most two, newest first: that one signs, both verify."""
    return [row["key"] for row in await db.fetch(SQL["signing_keys"])]


@dataclass(slots=True)
class WebhookSecrets:
    """Who may bring receipts, as it was read: hash of the secret → account (None: any). `reading`: held by who reads."""

    read_at: float = -math.inf
    accounts: dict[bytes, int | None] = field(default_factory=dict)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)


async def webhook_secrets(db: Executor) -> list[tuple[int, str]]:
    """The secrets that traffic accounts' webhooks were registered with: (account, secret)."""
    rows = await db.fetch(SQL["webhook_secrets"])
    return [(row["id"], row["webhook_secret"]) for row in rows]
