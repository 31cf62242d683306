"""What Mitto calls: delivery receipts. Answered only when they are durable, so that Mitto sends again what is not."""

import hashlib
import time
from dataclasses import dataclass, field

import orjson
from aiohttp import web

from smsd import mitto, queue, tenants
from smsd.api.endpoint import Endpoint, Model, Request, read_body
from smsd.api.errors import ApiError
from smsd.model import WEBHOOK_SECRET_HEADER
from smsd.queue import ReceiptRow
from smsd.receipts import Full

BODY_LIMIT = 16 << 20
"""An array of 10,000 receipts has about 2 MB."""
SECRETS_SECONDS = 1.0


class Received(Model):
    """How many receipts came, and how many messages they moved."""

    ok: bool
    received: int
    updated: int


@dataclass(slots=True)
class Secrets:
    """Who may call, read at most once a second: hash of the secret → account (None: any)."""

    read_at: float = -SECRETS_SECONDS
    accounts: dict[bytes, int | None] = field(default_factory=dict)


SECRETS = web.AppKey("webhook_secrets", Secrets)


async def dlr(req: Request) -> Received:
    account_id = await _caller(req)
    try:
        read = mitto.parse_dlr(await read_body(req.raw, BODY_LIMIT))
    except mitto.BadDlr as bad:
        raise ApiError(400, "VALIDATION_ERROR", str(bad)) from None
    rows = [
        ReceiptRow(account_id, r.provider_id, int(r.state), r.at, r.description)
        for r in read.receipts
        if r.state is not None
    ]
    # A word that nobody knows yet changes nothing, and is kept with what could not be read at all.
    raw = [(r._asdict(), f"unknown state {r.word!r}") for r in read.receipts if r.state is None]
    odd = [*raw, *read.rejected]
    if odd:
        bodies = [orjson.dumps(body, default=str).decode() for body, _ in odd]
        await queue.keep_raw_receipts(req.ctx.pool, account_id, bodies, [why for _, why in odd])
    try:
        updated = await req.ctx.receipts.put(rows)
    except Full as full:
        raise ApiError(503, "QUEUE_UNAVAILABLE", str(full)) from None
    return Received(ok=True, received=len(read.receipts) + len(read.rejected), updated=updated)


async def _caller(req: Request) -> int | None:
    """The account whose secret was shown; None where the secret is everybody's, or none is set. 401 otherwise."""
    secrets = await _secrets(req)
    if not secrets:
        return None
    shown = req.raw.headers.get(WEBHOOK_SECRET_HEADER, "").encode(errors="replace")
    try:
        return secrets[hashlib.sha256(shown).digest()]
    except KeyError:
        raise ApiError(
            401,
            "UNAUTHORIZED",
            f"takes the registered secret in the header {WEBHOOK_SECRET_HEADER}",
        ) from None


async def _secrets(req: Request) -> dict[bytes, int | None]:
    ctx, known = req.ctx, req.raw.app[SECRETS]
    if time.monotonic() - known.read_at < SECRETS_SECONDS:
        return known.accounts
    accounts: dict[bytes, int | None] = {
        hashlib.sha256(secret.encode()).digest(): account_id
        for account_id, secret in await tenants.webhook_secrets(ctx.pool)
    }
    if ctx.settings.webhook_secret is not None:
        shared = ctx.settings.webhook_secret.get_secret_value().encode()
        accounts.setdefault(hashlib.sha256(shared).digest(), None)
    known.read_at, known.accounts = time.monotonic(), accounts
    return accounts


ENDPOINTS = (
    Endpoint("POST", "/webhooks/mitto/dlr", dlr, "public", "Takes delivery receipts from Mitto", Received,
             status=202, raw_body=True, errors=((401, "UNAUTHORIZED"), (503, "QUEUE_UNAVAILABLE"))),
)  # fmt: skip
