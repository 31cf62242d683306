"""The HTTP API: `routes` is the page that lists it, `endpoint` the wrapper around every handler."""

import contextlib
import socket
from collections.abc import AsyncIterator

from aiohttp import web

from smsd.api import certificates, endpoint, openapi, routes, system, webhooks


def build(ctx: endpoint.Context) -> web.Application:
    """The application that serves every route."""
    # Bodies are limited in the wrapper; those that a handler streams have no limit.
    app = web.Application(middlewares=[endpoint.frame], client_max_size=0)
    app[certificates.DESK] = certificates.Desk()
    app[system.FIGURES] = system.Figures(ctx.pool)
    app[openapi.DOCUMENT] = openapi.encode(routes.ENDPOINTS)
    for route in (*routes.ENDPOINTS, *routes.NOT_IMPLEMENTED):
        handler = endpoint.serve(ctx, route)
        app.router.add_route(route.method, route.pattern, handler)
        if route.method == "GET":
            app.router.add_route("HEAD", route.pattern, handler)
    app.on_response_prepare.append(endpoint.add_headers)
    return app


@contextlib.asynccontextmanager
async def serving(ctx: endpoint.Context, listener: socket.socket) -> AsyncIterator[None]:
    """Answers on this listener until the block ends."""
    runner = web.AppRunner(build(ctx), access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        open_door(ctx, runner)
        await web.SockSite(runner, listener, backlog=1024).start()
        yield
    finally:
        await runner.cleanup()


def open_door(ctx: endpoint.Context, runner: web.BaseRunner) -> None:
    """Receipts are answered before the application looks for their route. Before the first connection."""
    server = runner.server
    assert server is not None
    server.request_handler = endpoint.door(ctx, webhooks.DLR, server.request_handler)
