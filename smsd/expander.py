"""The expander: turns the audience of an enqueued campaign into messages and batches.

One chunk at a time, of the tenant least recently served, so that a campaign of a million does not stand before a
campaign of ten. Texts are rendered here, once; no transaction is open while they are.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import cast

import orjson
import structlog

from smsd import contacts, database, expansions, faults, metrics, mitto, queue, telemetry, text
from smsd.database import Pool, Record, Share
from smsd.expansions import Chunk, Expansion, Rendered, Skipped
from smsd.loops import first_of
from smsd.model import SEGMENTS_MOST as SEGMENTS_MOST
from smsd.model import Reason, rows

log = structlog.get_logger()

CHUNK, SMALL_CHUNK = 10_000, 1_000
"""Recipients: a small one where nothing waits for the rest, at the begin and well ahead of the sender."""
ROWS_BETWEEN_YIELDS = 100
SLOW_LOOK_SECONDS = 1.0
REST = 2.0
"""How many times as long as a chunk took it rests after it, where more than enough waits to be sent already: what is
being sent, and whoever asks meanwhile, has the machine then."""
_LINK, _UNSUBSCRIBE = text.tag_key(text.LINK_TAG), text.tag_key(text.UNSUBSCRIBE_TAG)
_PHONE = "phone"
_OWN = {_LINK, _UNSUBSCRIBE, _PHONE}
_phone_of, _opted_out = itemgetter(_PHONE), itemgetter("opted_out")


class Renderer:
    """Renders one campaign's text for its recipients."""

    def __init__(
        self,
        template: text.Template,
        *,
        keys: Sequence[bytes],
        link_base: str,
        tenant_id: int,
        campaign_id: int,
        link_url: str | None,
    ) -> None:
        self._template, self._link_url = template, link_url
        tags = set(template.tags)
        self._wants_phone = _PHONE in tags
        self._link_begin, self._sign = f"{link_base}/u/", None
        if _UNSUBSCRIBE in tags:  # who sends no link needs no key
            self._sign = text.unsubscribe_signer(keys[0], tenant_id, campaign_id)
        self._columns = [(key, column) for key, column in contacts.COLUMNS.items() if key in tags]
        self._of_contacts = tags - _OWN
        self._wants_attributes = not self._of_contacts <= contacts.COLUMNS.keys()

    def render(self, recipient: Record | Mapping[str, object]) -> Rendered | Skipped:
        """The recipient's text, or why there is none. Takes a row of an audience or recipient page."""
        phone = recipient["phone"]
        if phone is None:
            return Skipped(None, Reason.INVALID_NUMBER, str(recipient["raw"])[:200])
        assert isinstance(phone, int)
        if recipient["opted_out"]:
            return Skipped(phone, Reason.OPTED_OUT, None)
        try:
            rendered = self._template.render(self.values(recipient, phone))
        except text.MissingValue as missing:
            return Skipped(phone, Reason.MISSING_VALUE, f"no value for {{{{{missing.tag}}}}}")
        segments = text.segments(rendered).count
        if segments > SEGMENTS_MOST:
            return Skipped(
                phone, Reason.TEXT_TOO_LONG, f"{segments} segments, {SEGMENTS_MOST} at most"
            )
        if not segments:
            return Skipped(phone, Reason.MISSING_VALUE, "the text is empty for this recipient")
        return Rendered(phone, rendered, segments)

    def render_usual(
        self, recipients: Sequence[Record | Mapping[str, object]]
    ) -> list[Rendered] | None:
        """What `render` says of each, column by column in half the time. None where one of them is out of the ordinary:
        skipped, without a value in its column, or with values beside the columns."""
        n = len(recipients)
        phones = list(map(_phone_of, recipients))
        if self._wants_attributes or None in phones or any(map(_opted_out, recipients)):
            return None
        columns: dict[str, Sequence[str]] = {}
        for key, column in self._columns:
            if column not in recipients[0] or None in (
                values := list(map(itemgetter(column), recipients))
            ):
                return None
            columns[key] = list(map(str, values))
        if _LINK in self._template.tags:
            columns[_LINK] = [self._link_url or ""] * n
        if any("" in column or any(map(str.isspace, column)) for column in columns.values()):
            return None
        if self._wants_phone:
            columns[_PHONE] = list(map(text.plus, phones))
        if self._sign is not None:
            begin, sign = self._link_begin, self._sign
            columns[_UNSUBSCRIBE] = [begin + sign(phone) for phone in phones]
        texts = self._template.render_many(columns, n)
        counts = text.segment_counts(texts)
        if min(counts) < 1 or max(counts) > SEGMENTS_MOST:
            return None
        return rows(Rendered, phones, texts, counts)

    def values(self, recipient: Record | Mapping[str, object], phone: int) -> dict[str, str | None]:
        """What the template's merge tags stand for, by `text.tag_key`; a column of the contact wins over an attribute. A
        tag that is not there has no value at all."""
        values: dict[str, str | None] = {_LINK: self._link_url}
        lacks_one = self._wants_attributes
        for key, column in self._columns:
            if (value := recipient.get(column)) is None:
                lacks_one = True
            else:
                values[key] = str(value)
        if lacks_one:
            values = self._attributes(recipient) | values
        if self._wants_phone:
            values[_PHONE] = text.plus(phone)
        if self._sign is not None:
            values[_UNSUBSCRIBE] = self._link_begin + self._sign(phone)
        return values

    def _attributes(self, recipient: Record | Mapping[str, object]) -> dict[str, str | None]:
        """Values of the tags that the contact's attributes have. Read only here, as many a text needs none of them."""
        attributes = orjson.loads(cast("str", recipient["attributes"]))
        assert isinstance(attributes, dict)
        return {
            key: None if value is None else str(value)
            for name, value in attributes.items()
            if (key := text.tag_key(name)) in self._of_contacts
        }


class Expander:
    """The loop of the daemon that expands what was enqueued."""

    def __init__(
        self, pool: Pool | Share, standing: queue.Standing, keys: Sequence[bytes], link_base: str
    ) -> None:
        self._pool, self._standing, self._keys, self._base = pool, standing, keys, link_base
        self._news = asyncio.Event()
        self._served = 0
        self._rest_seconds = 0.0
        self._ahead: tuple[Expansion, asyncio.Task[Chunk]] | None = None

    def wake(self) -> None:
        """News: a campaign was enqueued or resumed."""
        self._news.set()

    async def run(self) -> None:
        """Writes chunk after chunk until cancelled."""
        try:
            while True:
                self._news.clear()
                if await self._expand_some():
                    await first_of(self._rest_seconds, self._news)
                else:
                    self._drop_ahead()
                    await first_of(SLOW_LOOK_SECONDS, self._news)
        finally:
            self._drop_ahead()

    async def _expand_some(self) -> bool:
        try:
            return bool(self._standing.replica_id) and await self.expand_one()
        except database.AWAY as error:
            log.warning("expansion.failed", error=repr(error))
        except Exception as error:  # of the look at what runs: a campaign's own fault pauses it
            stack = telemetry.stack_of(error)
            log.error("expansion.failed", error=type(error).__name__, stack=stack)
        return False

    async def expand_one(self) -> bool:
        """Writes one chunk of the expansion whose turn it is. False: nothing runs."""
        replica_id = self._standing.replica_id
        began_at, self._rest_seconds = mitto.clock(), 0.0
        expansion = await expansions.claim(self._pool, replica_id)
        if expansion is None:
            return False
        bound = log.bind(tenant=expansion.tenant_id, campaign=expansion.campaign_id)
        try:
            chunk = await self._next(expansion)
            faults.point("chunk.writing")
            self._read_ahead(expansion, chunk)
            first_id = await expansions.commit(self._pool, expansion, chunk, replica_id)
        except expansions.OutOfCredits as short:
            bound.warning("expansion.out_of_credits", detail=str(short))
            await expansions.let_go(self._pool, expansion, replica_id)
            await expansions.pause_for_credits(self._pool, expansion, short)
            return True
        except database.AWAY:
            raise
        except Exception as error:  # it must stand in nobody else's way
            fault = type(error).__name__
            bound.error("expansion.broken", error=fault, stack=telemetry.stack_of(error))
            await expansions.let_go(self._pool, expansion, replica_id)
            detail = f"{fault} at the recipients after {expansion.cursor}; the log has more"
            await expansions.pause_as_failed(self._pool, expansion, detail)
            return True
        faults.point("chunk.written")
        if first_id is None:
            bound.info("expansion.moved_on")
            return True
        metrics.expanded(len(chunk.rendered), len(chunk.skipped))
        if expansion.well_ahead:
            self._rest_seconds = REST * (mitto.clock() - began_at)
        if first_id:
            await queue.wake_lane(self._pool, expansion.lane_id, first_id)
        bound.info(
            "chunk.written", read=chunk.read, messages=len(chunk.rendered), skipped=len(chunk.skipped),
            last=chunk.last,
        )  # fmt: skip
        return True

    async def _next(self, expansion: Expansion) -> Chunk:
        """The chunk at the expansion's cursor, which may have been read ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0].place == expansion.place:
            return await ahead[1]
        if ahead is not None:
            ahead[1].cancel()
        return await self._read(expansion)

    def _read_ahead(self, expansion: Expansion, chunk: Chunk) -> None:
        """Reads the next chunk while this one is written; not where expansions take turns, as it would be dropped."""
        if not chunk.last and expansion.campaign_id == self._served:
            next_ = replace(expansion, cursor=chunk.cursor, read=expansion.read + chunk.read)
            task = asyncio.create_task(self._read(next_), name="chunk ahead")
            task.add_done_callback(
                lambda done: done.cancelled() or done.exception()
            )  # even if dropped
            self._ahead = next_, task
        self._served = expansion.campaign_id

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None

    async def _read(self, expansion: Expansion) -> Chunk:
        small = not expansion.read or expansion.well_ahead
        limit = SMALL_CHUNK if small else CHUNK
        recipients = await self._page(expansion, limit)
        renderer = Renderer(
            text.Template(expansion.template),
            keys=self._keys,
            link_base=self._base,
            tenant_id=expansion.tenant_id,
            campaign_id=expansion.campaign_id,
            link_url=expansion.link_url,
        )
        last = len(recipients) < limit
        cursor = recipients[-1]["id"] if recipients else expansion.cursor
        chunk = Chunk(cursor, len(recipients), last, [], [])
        for start in range(0, len(recipients), ROWS_BETWEEN_YIELDS):
            some = recipients[start : start + ROWS_BETWEEN_YIELDS]
            if (usual := renderer.render_usual(some)) is not None:
                chunk.rendered += usual
            else:
                for one in map(renderer.render, some):
                    if isinstance(one, Rendered):
                        chunk.rendered.append(one)
                    else:
                        chunk.skipped.append(one)
            await asyncio.sleep(0)  # the API answers between two slices
        return chunk

    async def _page(self, expansion: Expansion, limit: int) -> Sequence[Record]:
        if expansion.source == "recipients":
            return await contacts.recipient_page(
                self._pool, expansion.campaign_id, expansion.cursor, limit
            )
        audience = contacts.Audience(
            list_ids=expansion.list_ids,
            exclude_list_ids=expansion.exclude_list_ids,
            gender=expansion.filter_gender,
            age_group=expansion.filter_age_group,
        )
        return await contacts.audience_page(
            self._pool, expansion.tenant_id, audience, expansion.as_of, expansion.cursor,
            expansion.highest_id, limit,
        )  # fmt: skip
