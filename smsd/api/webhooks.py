"""What Mitto calls: delivery receipts. Answered only when they are durable, so that Mitto sends again what is not."""

import hashlib
import time
from collections.abc import Iterator

import orjson

from smsd import mitto, tenants
from smsd.api.endpoint import Endpoint, Model, Request, read_body
from smsd.api.errors import ApiError
from smsd.model import WEBHOOK_SECRET_HEADER
from smsd.queue import RawReceipt, ReceiptRow
from smsd.receipts import Full, unknown_word

BODY_LIMIT = 16 << 20
"""An array of 10,000 receipts has about 2 MB."""
SECRETS_SECONDS = 1.0
"""For so long they are not read again."""


class Received(Model):
    """How many receipts came, and how many messages they moved."""

    ok: bool
    received: int
    updated: int


async def dlr(req: Request) -> dict[str, object]:
    account_id = await _caller(req)
    body = await read_body(req.raw, BODY_LIMIT)
    try:
        read = mitto.parse_dlr(body)
    except mitto.BadDlr as bad:
        raise ApiError(400, "VALIDATION_ERROR", str(bad)) from None
    rows = [
        ReceiptRow(account_id, r.provider_id, r.state, r.at, r.description)
        for r in read.receipts
        if r.state is not None
    ]
    # A word that nobody knows yet changes nothing, and is kept with what could not be read at all.
    odd = list(read.rejected)
    if len(rows) < len(read.receipts):
        odd += _unknown_words(body)
    raw = [RawReceipt(account_id, _as_it_came(element, body), why) for element, why in odd]
    try:
        updated = await req.ctx.receipts.put(rows, raw)
    except Full as full:
        raise ApiError(503, "QUEUE_UNAVAILABLE", str(full)) from None
    # As `Received` says, without the model: this is the one request that comes by the thousand.
    received = len(read.receipts) + len(read.rejected)
    return {"ok": True, "received": received, "updated": updated}


def _unknown_words(body: bytes) -> Iterator[tuple[object, str]]:
    document = orjson.loads(body)
    for element in document if isinstance(document, list) else [document]:
        if isinstance(element, dict):
            for receipt in mitto.parse_dlr(orjson.dumps(element)).receipts:
                if receipt.state is None:
                    yield element, unknown_word(receipt)


def _as_it_came(element: object, body: bytes) -> str:
    try:
        return orjson.dumps(element).decode()
    except TypeError:  # nested too deeply to be written
        return body.decode()


async def _caller(req: Request) -> int | None:
    """The account whose secret was shown; None where the secret is everybody's, or none is set. 401 otherwise."""
    known = req.ctx.webhook_secrets
    if time.monotonic() - known.read_at >= SECRETS_SECONDS:
        async with known.reading:  # once for all that come meanwhile
            if time.monotonic() - known.read_at >= SECRETS_SECONDS:
                await _read_secrets(req)
    if not known.accounts:
        return None
    shown = req.raw.headers.get(WEBHOOK_SECRET_HEADER, "").encode(errors="replace")
    try:
        return known.accounts[hashlib.sha256(shown).digest()]
    except KeyError:
        raise ApiError(
            401,
            "UNAUTHORIZED",
            f"takes the registered secret in the header {WEBHOOK_SECRET_HEADER}",
        ) from None


async def _read_secrets(req: Request) -> None:
    ctx, known = req.ctx, req.ctx.webhook_secrets
    accounts: dict[bytes, int | None] = {
        hashlib.sha256(secret.encode()).digest(): account_id
        for account_id, secret in await tenants.webhook_secrets(ctx.pool)
    }
    if ctx.settings.webhook_secret is not None:
        shared = ctx.settings.webhook_secret.get_secret_value().encode()
        accounts.setdefault(hashlib.sha256(shared).digest(), None)
    known.read_at, known.accounts = time.monotonic(), accounts


DLR = Endpoint(
    "POST", "/webhooks/mitto/dlr", dlr, "public", "Takes delivery receipts from Mitto", Received,
    status=202, raw_body=True, errors=((401, "UNAUTHORIZED"), (503, "QUEUE_UNAVAILABLE")),
)  # fmt: skip
ENDPOINTS = (DLR,)
