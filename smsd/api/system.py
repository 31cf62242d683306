"""What machines ask: is the process there, may it have traffic, what does it count, what does the API look like."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import asyncpg
from aiohttp import web
from prometheus_client.core import Metric

import smsd
from smsd import database, explain, metrics
from smsd.api import openapi
from smsd.api.endpoint import Context, Endpoint, Model, Request
from smsd.api.errors import ApiError
from smsd.config import Settings
from smsd.database import Pool

READY_SECONDS = 1.0
_SILENT: tuple[type[BaseException], ...] = (*database.AWAY, asyncpg.PostgresError)
"""What a scrape outlives: a database that is away, or whose schema is behind."""
FIGURES_SECONDS = 5.0
"""How old figures from the database may be in a scrape; many scrapers cost it no more than one."""


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


# ----------------------------------------------------------------------------------------- metrics


@dataclass(slots=True)
class Figures:
    """What the database said last; None: it did not answer."""

    pool: Pool
    known: explain.Figures | None = None
    read_at: float = -FIGURES_SECONDS
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


FIGURES = web.AppKey("figures", Figures)


async def show_metrics(req: Request) -> web.Response:
    last = req.raw.app[FIGURES]
    figures = await _figures(last, req.ctx.settings)
    moment = [*_of_process(req.ctx), *_of_pool(last.pool), *_of_database(figures)]
    body = metrics.exposition(moment)
    return web.Response(body=body, headers={"Content-Type": metrics.CONTENT_TYPE})


async def _figures(last: Figures, settings: Settings) -> explain.Figures | None:
    async with last.lock:
        if time.monotonic() - last.read_at >= FIGURES_SECONDS:
            try:
                async with asyncio.timeout(READY_SECONDS):
                    last.known = await explain.figures(last.pool, settings)
            except _SILENT:
                last.known = None
            last.read_at = time.monotonic()
        return last.known


def _of_process(ctx: Context) -> Iterator[Metric]:
    yield metrics.gauge(
        "smsd_build_info", "The version that runs", {smsd.__version__: 1}, ["version"]
    )
    yield metrics.gauge(
        "smsd_replica_registered", "Whether this process may claim", ctx.replica.id is not None
    )
    if ctx.sending is not None:
        yield metrics.gauge(
            "smsd_batches_in_flight",
            "Batches between their claim and their settled outcome",
            ctx.sending.in_flight,
        )
        yield from metrics.sender_counts(ctx.sending.counts)


def _of_pool(pool: Pool) -> Iterator[Metric]:
    size, idle = pool.get_size(), pool.get_idle_size()
    yield metrics.gauge(
        "smsd_pool_connections",
        "Connections to Postgres: in_use, idle",
        {"in_use": size - idle, "idle": idle},
        ["state"],
    )
    yield metrics.gauge("smsd_pool_size", "Connections that the pool may have", pool.get_max_size())
    yield metrics.gauge(
        "smsd_pool_waiting", "Tasks that wait for a connection", database.waiting(pool)
    )


def _of_database(figures: explain.Figures | None) -> Iterator[Metric]:
    yield metrics.gauge(
        "smsd_database_up", "Whether the database answered the last look", figures is not None
    )
    if figures is None:
        return
    yield metrics.gauge(
        "smsd_database_oldest_snapshot_seconds",
        "Age of the oldest snapshot that keeps vacuum from clearing rows",
        figures.oldest_snapshot_seconds,
    )
    yield metrics.gauge(
        "smsd_replicas_alive", "Processes whose heartbeat moved within a lease", figures.replicas
    )
    for what in ("batches", "messages"):
        yield metrics.gauge(
            f"smsd_queue_{what}",
            f"Open {what} by account and state: ready, waiting, leased, sending, unknown",
            {(str(one.account_id), one.kind): getattr(one, what) for one in figures.depths},
            ["account", "state"],
        )
    yield metrics.gauge(
        "smsd_queue_oldest_seconds",
        "Age of the oldest open batch by account and state",
        {
            (str(one.account_id), one.kind): max(0.0, (figures.now - one.oldest_at).total_seconds())
            for one in figures.depths
        },
        ["account", "state"],
    )


ENDPOINTS = (
    Endpoint("GET", "/healthz", healthz, "public", "Whether the process answers", Alive),
    Endpoint("GET", "/readyz", readyz, "public", "Whether it may have traffic", Ready,
             errors=((503, "NOT_READY"),)),
    Endpoint("GET", "/metrics", show_metrics, "public", "Metrics in Prometheus' text format", None,
             media_type="text/plain"),
    Endpoint("GET", "/openapi.json", openapi_json, "public", "This document", None),
)  # fmt: skip
