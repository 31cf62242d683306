"""The unsubscribe page: what a recipient sees, and that only a POST does anything."""

import re
from html.parser import HTMLParser

import pytest
from conftest import Api, TenantCaller

from smsd import text
from smsd.database import Pool

PHONE = 306944123456


@pytest.fixture
async def shop(api: Api) -> TenantCaller:
    return await api.new_tenant(name="<Shop> & Sons")


def link(api: Api, tenant_id: int, campaign_id: int = 7, phone: int = PHONE) -> str:
    return "/u/" + text.sign_unsubscribe(api.ctx.keys[0], tenant_id, campaign_id, phone)


async def opt_outs(pool: Pool) -> list[tuple[object, ...]]:
    rows = await pool.fetch("select tenant_id, phone, source, campaign_id from opt_out")
    return [tuple(row) for row in rows]


class Page(HTMLParser):
    """Checks that tags are balanced; collects them and the text."""

    VOID = ("meta",)

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


async def test_looking_changes_nothing_and_the_button_does(api: Api, shop: TenantCaller) -> None:
    url = link(api, shop.id)
    for method in ("GET", "HEAD", "GET"):
        shown = await api.public(method, url)
        assert shown.status == 200
    assert await opt_outs(api.ctx.pool) == []
    page = Page(shown.text)
    assert page.all("form") == [{"method": "post"}]
    assert page.all("button") == [{"type": "submit"}]
    assert "Stop messages from <Shop> & Sons?" in page.words
    assert "ending in 456" in page.words

    for _ in range(2):
        done = await api.public.post(url)
        assert done.status == 200
        assert "You are unsubscribed" in Page(done.text).words
    assert await opt_outs(api.ctx.pool) == [(shop.id, PHONE, "link", 7)]
    again = Page((await api.public.get(url)).text)
    assert "You are unsubscribed" in again.words
    assert again.all("form") == []


async def test_one_click_of_a_mail_program_opts_out(api: Api, shop: TenantCaller) -> None:
    form = {"List-Unsubscribe": "One-Click"}
    done = await api.public.post(link(api, shop.id, campaign_id=0), data=form)
    assert done.status == 200
    assert await opt_outs(api.ctx.pool) == [(shop.id, PHONE, "link", None)]


async def test_the_number_is_not_shown(api: Api, shop: TenantCaller) -> None:
    shown = await api.public.get(link(api, shop.id))
    assert "306944" not in shown.text
    assert "4123" not in shown.text


async def test_the_page_can_be_read_by_everybody_and_runs_nothing(
    api: Api, shop: TenantCaller
) -> None:
    shown = await api.public.get(link(api, shop.id))
    assert shown.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = shown.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "script-src" not in policy
    assert shown.headers["Referrer-Policy"] == "no-referrer"
    assert shown.headers["Cache-Control"] == "no-store"
    page = Page(shown.text)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
        "meta"
    )
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("title")) == 1
    assert page.all("script") == []
    assert not re.search(r"https?://|src=|style=", shown.text)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_link_that_was_not_signed_here_is_a_page_that_says_so(
    api: Api, shop: TenantCaller, method: str
) -> None:
    good = link(api, shop.id)
    forged = "/u/" + text.sign_unsubscribe(b"another key of theirs", shop.id, 7, PHONE)
    nobody = link(api, 999_999)
    for url in (good[:-1], good[:-1] + "_", good + "A", "/u/x", "/u/%00", forged, nobody):
        refused = await api.public(method, url)
        assert refused.status == 404, url
        assert "This link is not valid" in Page(refused.text).words
    assert await opt_outs(api.ctx.pool) == []


async def test_an_older_key_still_opens(api: Api, shop: TenantCaller) -> None:
    url = link(api, shop.id)
    api.ctx.keys.insert(0, b"a newer key that signs from now on")
    assert (await api.public.post(url)).status == 200
    assert await opt_outs(api.ctx.pool) == [(shop.id, PHONE, "link", 7)]


async def test_while_the_database_is_away_the_page_says_so(api: Api, shop: TenantCaller) -> None:
    url = link(api, shop.id)
    await api.ctx.pool.close()
    for method in ("GET", "POST"):
        away = await api.public(method, url)
        assert away.status == 503
        assert "Nothing was changed" in Page(away.text).words
