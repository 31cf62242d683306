"""The operator's side: traffic accounts, tenants, their keys and their credits."""

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from smsd import credits as money
from smsd import tenants
from smsd.api import credits
from smsd.api.endpoint import Endpoint, Listing, Model, Page, Request
from smsd.api.errors import ApiError, invalid, not_found
from smsd.api.models import Amount, Country, Id, Name, PerSecond, Secret, SenderId, TimeZone
from smsd.model import SEGMENTS_MOST

UNCHANGED: Any = None
"""The default of a field that a PATCH leaves as it is; only fields that were sent are looked at."""

ProviderId = Annotated[
    str,
    Field(
        min_length=1, max_length=200, pattern=r"^[!-~]+$", description="Mitto's id of the account"
    ),
]
InFlight = Annotated[int, Field(ge=1, le=10_000)]
ServerErrorMeans = Literal["refused", "unknown"]
LimitUnit = Literal["messages", "segments"]
Weight = Annotated[
    float, Field(gt=0, le=1000, description="Share of the account when it is contended")
]
BatchSize = Annotated[int, Field(ge=1, le=500)]
Subscription = Literal["active", "inactive"]


# ------------------------------------------------------------------------------- traffic accounts


class NewTrafficAccount(Model):
    """A Mitto account to send through."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"name": "Main", "trafficAccountId": "1b4e28ba-2fa1", "requestsPerSecond": 100}
            ]
        }
    )
    name: Name
    traffic_account_id: ProviderId
    api_key: Secret | None = Field(None, description="None: SMSD_MITTO_API_KEY")
    requests_per_second: PerSecond = 100
    messages_per_second: PerSecond | None = None
    max_in_flight: InFlight | None = None
    webhook_secret: Secret | None = Field(None, description="Names this account in receipts")
    limit_unit: LimitUnit = Field(
        "messages", description="What messagesPerSecond counts, also of tenants"
    )
    server_error_means: ServerErrorMeans = Field(
        "refused", description="What a 500 or 503 with Mitto's own error body says of the batch"
    )


class TrafficAccountChange(Model):
    """What is to be different; the rest stays. null takes an optional setting away. A new apiKey, or
    `paused: false`, lets a paused account send again."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"requestsPerSecond": 50}]})
    name: Name = UNCHANGED
    traffic_account_id: ProviderId = UNCHANGED
    api_key: Secret | None = None
    requests_per_second: PerSecond = UNCHANGED
    messages_per_second: PerSecond | None = None
    max_in_flight: InFlight | None = None
    webhook_secret: Secret | None = None
    limit_unit: LimitUnit = UNCHANGED
    server_error_means: ServerErrorMeans = UNCHANGED
    paused: bool = UNCHANGED


class TrafficAccount(Model):
    """A Mitto account, without its secrets."""

    id: int
    name: str
    traffic_account_id: str
    has_api_key: bool
    has_webhook_secret: bool
    requests_per_second: int
    messages_per_second: int | None
    max_in_flight: int | None
    limit_unit: LimitUnit
    ceiling: int | None = Field(
        description="Requests a second, learned from Mitto's 429; it climbs back to requestsPerSecond"
    )
    server_error_means: ServerErrorMeans
    largest_request: int = Field(description="Messages in one request, at most: learned from Mitto")
    paused: bool
    paused_reason: str | None
    paused_detail: str | None
    blocked_until: datetime | None
    capabilities: dict[str, Any] = Field(description="What `smsd probe` found out, by question")
    created_at: datetime
    updated_at: datetime


def _account(account: tenants.TrafficAccount) -> TrafficAccount:
    values = asdict(account)
    return TrafficAccount(
        traffic_account_id=values.pop("provider_id"),
        has_api_key=values.pop("api_key") is not None,
        has_webhook_secret=values.pop("webhook_secret") is not None,
        paused=account.paused_reason is not None,
        **values,
    )


def _taken(error: tenants.Taken) -> ApiError:
    if error.field == "webhook_secret":
        return ApiError(
            409, "WEBHOOK_SECRET_IN_USE", "webhookSecret: another account has it; take another"
        )
    return ApiError(
        409,
        "TRAFFIC_ACCOUNT_EXISTS",
        "trafficAccountId: there is an account with it; change that one",
    )


def _too_low(error: tenants.TooLow) -> ApiError:
    takes = f"at least {SEGMENTS_MOST} where limitUnit is segments, for a message can have as many"
    return invalid("messagesPerSecond", error.messages_per_second, takes)


async def create_account(req: Request) -> TrafficAccount:
    values = req.body.model_dump()
    values["provider_id"] = values.pop("traffic_account_id")
    try:
        return _account(await tenants.create_account(req.connection, **values))
    except tenants.Taken as error:
        raise _taken(error) from None
    except tenants.TooLow as error:
        raise _too_low(error) from None


async def list_accounts(req: Request) -> Listing[TrafficAccount]:
    page: Page = req.query
    found, total = await tenants.list_accounts(req.db, page.page_size, page.offset)
    return Listing[TrafficAccount](
        items=[_account(account) for account in found],
        total=total, page=page.page, page_size=page.page_size,
    )  # fmt: skip


async def get_account(req: Request) -> TrafficAccount:
    account = await tenants.get_account(req.db, req.id)
    if account is None:
        raise not_found(f"traffic account {req.id}")
    return _account(account)


async def change_account(req: Request) -> TrafficAccount:
    changes = req.body.model_dump(exclude_unset=True)
    paused = changes.pop("paused", None)
    if "traffic_account_id" in changes:
        changes["provider_id"] = changes.pop("traffic_account_id")
    try:
        account = await tenants.change_account(req.connection, req.id, changes, paused)
    except tenants.Taken as error:
        raise _taken(error) from None
    except tenants.TooLow as error:
        raise _too_low(error) from None
    if account is None:
        raise not_found(f"traffic account {req.id}")
    return _account(account)


# --------------------------------------------------------------------------------------- tenants


class NewTenant(Model):
    """Somebody who sends, through one traffic account."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "Shop", "accountId": 1, "sender": "MyShop"}]}
    )
    name: Name
    account_id: Id
    sender: SenderId | None = None
    requests_per_second: PerSecond = 50
    messages_per_second: PerSecond | None = None
    weight: Weight = 1.0
    batch_size: BatchSize | None = None
    subscription: Subscription = "active"
    timezone: TimeZone = "UTC"
    default_country: Country = "GR"


class TenantChange(Model):
    """What is to be different; the rest stays. null takes an optional setting away. Inactive pauses what is sending
    (INACTIVE_SUBSCRIPTION); active again lets just that go on."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"subscription": "inactive"}]})
    name: Name = UNCHANGED
    account_id: Id = UNCHANGED
    sender: SenderId | None = None
    requests_per_second: PerSecond = UNCHANGED
    messages_per_second: PerSecond | None = None
    weight: Weight = UNCHANGED
    batch_size: BatchSize | None = None
    subscription: Subscription = UNCHANGED
    timezone: TimeZone = UNCHANGED
    default_country: Country = UNCHANGED


class Tenant(Model):
    """Somebody who sends."""

    id: int
    name: str
    account_id: int
    sender: str | None
    requests_per_second: int
    messages_per_second: int | None
    weight: float
    batch_size: int | None
    subscription: Subscription
    timezone: str
    default_country: str
    created_at: datetime
    updated_at: datetime


class CreatedTenant(Tenant):
    """A new tenant with its first key, which is shown this once."""

    api_key: str


def _no_account(account_id: int) -> ApiError:
    return invalid("accountId", account_id, "the id of a traffic account; there is none with this")


async def create_tenant(req: Request) -> CreatedTenant:
    try:
        tenant = await tenants.create_tenant(req.connection, **req.body.model_dump())
    except tenants.NoSuchAccount:
        raise _no_account(req.body.account_id) from None
    except tenants.TooLow as error:
        raise _too_low(error) from None
    _, api_key = await tenants.create_key(req.db, tenant.id)
    return CreatedTenant(api_key=api_key, **asdict(tenant))


async def list_tenants(req: Request) -> Listing[Tenant]:
    page: Page = req.query
    found, total = await tenants.list_tenants(req.db, page.page_size, page.offset)
    items = [Tenant(**asdict(tenant)) for tenant in found]
    return Listing[Tenant](items=items, total=total, page=page.page, page_size=page.page_size)


async def get_tenant(req: Request) -> Tenant:
    return Tenant(**asdict(await _tenant(req)))


async def change_tenant(req: Request) -> Tenant:
    changes = req.body.model_dump(exclude_unset=True)
    try:
        tenant = await tenants.change_tenant(req.connection, req.id, changes)
    except tenants.NoSuchAccount:
        raise _no_account(changes["account_id"]) from None
    except tenants.TooLow as error:
        raise _too_low(error) from None
    except tenants.AccountInUse:
        raise ApiError(
            409,
            "ACCOUNT_IN_USE",
            "accountId: the tenant has campaigns or messages on their way through its present account; "
            "let them end, or cancel them, first",
        ) from None
    if tenant is None:
        raise not_found(f"tenant {req.id}")
    return Tenant(**asdict(tenant))


async def _tenant(req: Request) -> tenants.Tenant:
    tenant = await tenants.get_tenant(req.db, req.id)
    if tenant is None:
        raise not_found(f"tenant {req.id}")
    return tenant


# ---------------------------------------------------------------------------------- keys, credits


class Key(Model):
    """A key as it can be shown: its first characters."""

    id: int
    prefix: str
    created_at: datetime
    revoked_at: datetime | None


class CreatedKey(Model):
    """A new key, shown this once."""

    id: int
    api_key: str


class Grant(Model):
    """Credits to add."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"amount": 1000, "reason": "invoice 17"}]}
    )
    amount: Amount
    reason: Annotated[str, Field(min_length=1, max_length=500)]


async def create_key(req: Request) -> CreatedKey:
    tenant = await _tenant(req)
    key, api_key = await tenants.create_key(req.db, tenant.id)
    return CreatedKey(id=key.id, api_key=api_key)


async def list_keys(req: Request) -> Listing[Key]:
    page: Page = req.query
    tenant = await _tenant(req)
    found, total = await tenants.list_keys(req.db, tenant.id, page.page_size, page.offset)
    items = [Key(**key._asdict()) for key in found]
    return Listing[Key](items=items, total=total, page=page.page, page_size=page.page_size)


async def revoke_key(req: Request) -> None:
    if not await tenants.revoke_key(req.db, req.id, req.number("keyId")):
        raise not_found(f"key {req.number('keyId')} of tenant {req.id}")


async def grant_credits(req: Request) -> credits.Credits:
    granted = await money.grant(req.connection, req.id, req.body.amount, req.body.reason)
    if granted is None:
        raise not_found(f"tenant {req.id}")
    return credits.shape(granted)


_TAKEN = ((409, "TRAFFIC_ACCOUNT_EXISTS"), (409, "WEBHOOK_SECRET_IN_USE"))
_ACCOUNTS = "/api/admin/traffic-accounts"
_TENANTS = "/api/admin/tenants"

ENDPOINTS = (
    Endpoint("POST", _ACCOUNTS, create_account, "admin", "New traffic account", TrafficAccount, 201,
             body=NewTrafficAccount, transaction=True, idempotent=True, errors=_TAKEN),
    Endpoint("GET", _ACCOUNTS, list_accounts, "admin", "Traffic accounts", Listing[TrafficAccount],
             query=Page),
    Endpoint("GET", _ACCOUNTS + "/{id}", get_account, "admin", "One traffic account", TrafficAccount),
    Endpoint("PATCH", _ACCOUNTS + "/{id}", change_account, "admin", "Change a traffic account; pause or resume it",
             TrafficAccount, body=TrafficAccountChange, transaction=True, errors=_TAKEN),
    Endpoint("POST", _TENANTS, create_tenant, "admin", "New tenant, with its first key", CreatedTenant, 201,
             body=NewTenant, transaction=True, idempotent=True),
    Endpoint("GET", _TENANTS, list_tenants, "admin", "Tenants", Listing[Tenant], query=Page),
    Endpoint("GET", _TENANTS + "/{id}", get_tenant, "admin", "One tenant", Tenant),
    Endpoint("PATCH", _TENANTS + "/{id}", change_tenant, "admin", "Change a tenant", Tenant,
             body=TenantChange, transaction=True, errors=((409, "ACCOUNT_IN_USE"),)),
    Endpoint("POST", _TENANTS + "/{id}/keys", create_key, "admin", "New key of a tenant", CreatedKey, 201,
             transaction=True, idempotent=True),
    Endpoint("GET", _TENANTS + "/{id}/keys", list_keys, "admin", "Keys of a tenant", Listing[Key], query=Page),
    Endpoint("DELETE", _TENANTS + "/{id}/keys/{keyId}", revoke_key, "admin", "Revoke a key", None, 204),
    Endpoint("POST", _TENANTS + "/{id}/credits", grant_credits, "admin", "Grant credits", credits.Credits,
             body=Grant, transaction=True, idempotent=True),
)  # fmt: skip
