"""The HTTP API: `routes` is the page that lists it, `endpoint` the wrapper around every handler."""

from aiohttp import web

from smsd.api import certificates, endpoint, openapi, routes, system, webhooks


def build(ctx: endpoint.Context) -> web.Application:
    """The application that serves every route."""
    # Bodies are limited in the wrapper; those that a handler streams have no limit.
    app = web.Application(middlewares=[endpoint.frame], client_max_size=0)
    app[certificates.DESK] = certificates.Desk()
    app[webhooks.SECRETS] = webhooks.Secrets()
    app[system.FIGURES] = system.Figures(ctx.pool)
    app[openapi.DOCUMENT] = openapi.encode(routes.ENDPOINTS)
    for route in (*routes.ENDPOINTS, *routes.NOT_IMPLEMENTED):
        handler = endpoint.serve(ctx, route)
        app.router.add_route(route.method, route.pattern, handler)
        if route.method == "GET":
            app.router.add_route("HEAD", route.pattern, handler)
    app.on_response_prepare.append(endpoint.add_headers)
    return app
