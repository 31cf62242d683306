"""The route table: every endpoint, by the file that has its handler, and what is promised but not there yet."""

from typing import Literal, NoReturn

from smsd.api import (
    admin,
    campaigns,
    contacts,
    credits,
    messages,
    public,
    sending,
    system,
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
    *messages.ENDPOINTS,
    *credits.ENDPOINTS,
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
    ("GET", "/api/admin/replicas", "admin"),
    ("GET", "/api/admin/queue", "admin"),
    ("POST", "/api/templates", "tenant"),
    ("GET", "/api/templates", "tenant"),
    ("GET", "/api/templates/{id}", "tenant"),
    ("PUT", "/api/templates/{id}", "tenant"),
    ("DELETE", "/api/templates/{id}", "tenant"),
    ("POST", "/api/campaigns/{id}/schedule", "tenant"),
    ("POST", "/api/campaigns/{id}/unschedule", "tenant"),
    ("POST", "/api/campaigns/{id}/unknown", "tenant"),
    ("GET", "/api/campaigns/{id}/messages.csv", "tenant"),
    ("GET", "/api/campaigns/{id}/stats", "tenant"),
    ("GET", "/api/campaigns/{id}/events", "tenant"),
    ("GET", "/api/campaigns/{id}/certificate", "tenant"),
    ("GET", "/api/campaigns/{id}/explain", "tenant"),
    ("POST", "/webhooks/mitto/inbound", "public"),
    ("GET", "/o/{trackingId}", "public"),
    ("GET", "/metrics", "public"),
    ("GET", "/docs", "public"),
    ("GET", "/console", "public"),
)
NOT_IMPLEMENTED: tuple[Endpoint, ...] = tuple(
    Endpoint(
        method, path, _not_implemented, auth, "Not part of this version yet", None, raw_body=True
    )
    for method, path, auth in _PROMISED
)
