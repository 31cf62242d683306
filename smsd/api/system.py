"""What machines ask: is the process there, may it have traffic, what does the API look like."""

import asyncio

from aiohttp import web

from smsd import database
from smsd.api import openapi
from smsd.api.endpoint import Endpoint, Model, Request
from smsd.api.errors import ApiError

READY_SECONDS = 1.0


class Alive(Model):
    """The process answers."""

    ok: bool


class Ready(Model):
    """The database answers, the schema suits, and this replica is registered."""

    ok: bool
    replica: int


async def healthz(_req: Request) -> Alive:
    return Alive(ok=True)


async def readyz(req: Request) -> Ready:
    replica = req.ctx.replica.id
    try:
        async with asyncio.timeout(READY_SECONDS):
            await database.check_schema(req.ctx.pool)
    except database.SchemaError as error:
        raise _not_ready(str(error)) from None
    except TimeoutError:
        raise _not_ready(f"the database did not answer within {READY_SECONDS:g} s") from None
    except database.AWAY as error:
        raise _not_ready(f"the database cannot be reached ({type(error).__name__})") from None
    if replica is None:
        raise _not_ready("this replica is not registered (yet, or it was declared dead)")
    return Ready(ok=True, replica=replica)


def _not_ready(why: str) -> ApiError:
    return ApiError(503, "NOT_READY", why, ok=False)


async def openapi_json(req: Request) -> web.Response:
    return web.Response(
        body=req.raw.app[openapi.DOCUMENT], content_type="application/json", charset="utf-8"
    )


ENDPOINTS = (
    Endpoint("GET", "/healthz", healthz, "public", "Whether the process answers", Alive),
    Endpoint("GET", "/readyz", readyz, "public", "Whether it may have traffic", Ready,
             errors=((503, "NOT_READY"),)),
    Endpoint("GET", "/openapi.json", openapi_json, "public", "This document", None),
)  # fmt: skip
