"""The route table: every endpoint, by the file that has its handler, and what is promised but not there yet."""

from typing import Literal, NoReturn

from smsd.api import (
    admin,
    campaigns,
    certificates,
    contacts,
    credits,
    explain,
    messages,
    public,
    sending,
    system,
    unknown,
    uploads,
    webhooks,
)
from smsd.api.endpoint import Endpoint, Request
from smsd.api.errors import ApiError

ENDPOINTS: tuple[Endpoint, ...] = (
    *admin.ENDPOINTS,
    *contacts.ENDPOINTS,
    *uploads.ENDPOINTS,
    *campaigns.ENDPOINTS,
    *sending.ENDPOINTS,
    *unknown.ENDPOINTS,
    *messages.ENDPOINTS,
    *certificates.ENDPOINTS,
    *credits.ENDPOINTS,
    *explain.ENDPOINTS,
    *webhooks.ENDPOINTS,
    *public.ENDPOINTS,
    *system.ENDPOINTS,
)


async def _not_implemented(req: Request) -> NoReturn:
    raise ApiError(
        501, "NOT_IMPLEMENTED", f"{req.raw.method} {req.raw.path} is not part of this version yet"
    )


_Promise = tuple[str, str, Literal["tenant", "admin", "public"]]
_PROMISED: tuple[_Promise, ...] = (
    ("POST", "/api/templates", "tenant"),
    ("GET", "/api/templates", "tenant"),
    ("GET", "/api/templates/{id}", "tenant"),
    ("PUT", "/api/templates/{id}", "tenant"),
    ("DELETE", "/api/templates/{id}", "tenant"),
    ("POST", "/api/campaigns/{id}/schedule", "tenant"),
    ("POST", "/api/campaigns/{id}/unschedule", "tenant"),
    ("GET", "/api/campaigns/{id}/stats", "tenant"),
    ("GET", "/api/campaigns/{id}/events", "tenant"),
    ("POST", "/webhooks/mitto/inbound", "public"),
    ("GET", "/o/{trackingId}", "public"),
    ("GET", "/docs", "public"),
    ("GET", "/console", "public"),
)
NOT_IMPLEMENTED: tuple[Endpoint, ...] = tuple(
    Endpoint(
        method, path, _not_implemented, auth, "Not part of this version yet", None, raw_body=True
    )
    for method, path, auth in _PROMISED
)
