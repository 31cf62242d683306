"""What recipients open: the page behind the unsubscribe link of a text.

GET changes nothing, since handsets and mail programs look at links by themselves; POST opts out, whether it comes
from the page's button or as the one click of RFC 8058.
"""

import base64
import hashlib
from html import escape
from typing import NamedTuple

from aiohttp import web

from smsd import contacts, database, text
from smsd.api.endpoint import Endpoint, Request

_STYLE = """
body{font:1.125rem/1.5 system-ui,sans-serif;max-width:32rem;margin:0 auto;padding:2rem 1rem;color:#1b1b1b;background:#fff}
h1{font-size:1.5rem;line-height:1.25}
button{font:inherit;font-weight:600;width:100%;padding:.8rem 1rem;border:0;border-radius:.4rem;color:#fff;background:#0b5cad}
button:focus-visible{outline:3px solid #1b1b1b;outline-offset:3px}
@media(prefers-color-scheme:dark){body{color:#eee;background:#1b1b1b}button:focus-visible{outline-color:#eee}}
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{content}
</main>
</body>
</html>
"""


class _Link(NamedTuple):
    tenant_id: int
    campaign_id: int
    phone: int
    name: str
    opted_out: bool

    @property
    def ending(self) -> str:
        return f"the number ending in {str(self.phone)[-3:]}"


async def show_unsubscribe(req: Request) -> web.Response:
    try:
        link = await _read(req)
    except database.AWAY:
        return _away()
    if link is None:
        return _unknown()
    if link.opted_out:
        return _done(link)
    return _page(
        200,
        f"Stop messages from {link.name}?",
        f"<p>{escape(link.name)} will not text {escape(link.ending)} any more.</p>\n"
        '<form method="post"><button type="submit">Unsubscribe</button></form>',
    )


async def unsubscribe(req: Request) -> web.Response:
    try:
        link = await _read(req)
        if link is None:
            return _unknown()
        await contacts.opt_out(
            req.ctx.pool, link.tenant_id, link.phone, "link", link.campaign_id or None
        )
    except database.AWAY:
        return _away()
    return _done(link)


async def _read(req: Request) -> _Link | None:
    token = text.read_unsubscribe(req.ctx.keys, str(req.path["token"]))
    if token is None:
        return None
    tenant_id, campaign_id, phone = token
    sender = await contacts.sender_to(req.ctx.pool, tenant_id, phone)
    return sender and _Link(tenant_id, campaign_id, phone, *sender)


def _done(link: _Link) -> web.Response:
    return _page(
        200,
        "You are unsubscribed",
        f"<p>{escape(link.name)} does not text {escape(link.ending)} any more.</p>",
    )


def _unknown() -> web.Response:
    return _page(
        404,
        "This link is not valid",
        "<p>Open it again from the message, whole, to the last character.</p>",
    )


def _away() -> web.Response:
    page = _page(503, "Please try again", "<p>Nothing was changed. Try again in a minute.</p>")
    page.headers["Retry-After"] = "60"
    return page


def _page(status: int, title: str, content: str) -> web.Response:
    return web.Response(
        status=status,
        text=_PAGE.format(title=escape(title), style=_STYLE, content=content),
        content_type="text/html",
        charset="utf-8",
        headers=_HEADERS,
    )


ENDPOINTS = (
    Endpoint("GET", "/u/{token}", show_unsubscribe, "public", "The unsubscribe page; changes nothing", None,
             raw_body=True, media_type="text/html", errors=((404, "NOT_FOUND"),)),
    Endpoint("POST", "/u/{token}", unsubscribe, "public", "Opts the recipient out", None, raw_body=True,
             media_type="text/html", errors=((404, "NOT_FOUND"),)),
)  # fmt: skip
