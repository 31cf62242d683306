"""What sending a campaign would come to: its size counted, its cost and its flaws told from the first recipients.

Preview shows a quote, enqueue holds its credits; the expander later moves the hold to the exact figure.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Literal
from zoneinfo import ZoneInfo

from smsd import campaigns, contacts, text
from smsd.api.endpoint import Request
from smsd.campaigns import Campaign
from smsd.database import Record
from smsd.expander import SEGMENTS_MOST, Renderer
from smsd.expansions import Rendered, Skipped
from smsd.model import Reason

SAMPLE = 100
_CHARACTERS_SHOWN = 5
_ALPHABET = frozenset(text.GSM7_BASIC + text.GSM7_EXTENSION)
_OWN_TAGS = {text.tag_key(tag) for tag in ("phone", text.LINK_TAG, text.UNSUBSCRIBE_TAG)}

Row = Record | Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Recipients:
    """Whom a campaign would go to. `source`: contacts | recipients; `sample`: the first of them by id."""

    source: str
    as_of: date
    highest_id: int
    count: int
    sample: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Quote:
    """`required`: credits for `count` recipients; `rendered`: the texts of the sample, without the skipped."""

    count: int
    required: int
    encoding: Literal["GSM-7", "UCS-2"]
    rendered: list[Rendered]
    problems: list[str]


async def recipients_of(req: Request, campaign: Campaign) -> Recipients:
    """Counts a campaign's recipients and reads the first; uploaded ones go before stored contacts."""
    as_of = datetime.now(ZoneInfo(req.me.timezone)).date()
    highest_id = await campaigns.highest_recipient(req.db, campaign.id)
    if highest_id:
        count = await contacts.recipient_count(req.db, campaign.id)
        sample = await contacts.recipient_page(req.db, campaign.id, 0, SAMPLE)
        return Recipients("recipients", as_of, highest_id, count, sample)
    audience = contacts.Audience(
        list_ids=campaign.list_ids,
        exclude_list_ids=campaign.exclude_list_ids,
        gender=campaign.filter_gender,
        age_group=campaign.filter_age_group,
    )
    highest_id = await contacts.highest_id(req.db, req.me.id)
    count = await contacts.audience_estimate(req.db, req.me.id, audience, as_of)
    sample = await contacts.audience_page(req.db, req.me.id, audience, as_of, 0, highest_id, SAMPLE)
    known = sum(not row["opted_out"] for row in sample)
    # An estimate knows nothing of a handful among a million; these are then all there are.
    count = known if len(sample) < SAMPLE else max(count, known)
    return Recipients("contacts", as_of, highest_id, count, sample)


def template_of(campaign: Campaign) -> text.Template:
    """The text as it will be sent: a marketing text has a way to unsubscribe."""
    source = campaign.text or ""
    if campaign.message_type == "marketing" and source.strip():
        source = text.with_unsubscribe(source)
    return text.Template(source)


def renderer_of(req: Request, campaign: Campaign, template: text.Template) -> Renderer:
    """Renders a campaign's text just as the expander will."""
    return Renderer(
        template,
        keys=req.ctx.keys,
        link_base=req.ctx.settings.link_base,
        tenant_id=campaign.tenant_id,
        campaign_id=campaign.id,
        link_url=campaign.link_url,
    )


def quote(template: text.Template, renderer: Renderer, recipients: Recipients) -> Quote:
    """The cost of all as the mean of the sample, rounded up, at least a credit for each; and what is odd."""
    outcomes = [renderer.render(row) for row in recipients.sample]
    rendered = [one for one in outcomes if isinstance(one, Rendered)]
    skipped = [one for one in outcomes if isinstance(one, Skipped)]
    segments = sum(one.segments for one in rendered)
    mean_up = -(-recipients.count * segments // len(rendered)) if rendered else 0
    encodings = {text.segments(one.text).encoding for one in rendered}
    if not rendered:
        encodings = {text.segments(template.source).encoding}
    return Quote(
        count=recipients.count,
        required=max(recipients.count, mean_up),
        encoding="UCS-2" if "UCS-2" in encodings else "GSM-7",
        rendered=rendered,
        problems=[
            *template.problems,
            *_unknown_tags(template, renderer, recipients),
            *_skips(skipped, len(outcomes)),
            *_costs(rendered),
        ],
    )


def sample_text(
    template: text.Template, renderer: Renderer, recipients: Recipients, phone: int
) -> str:
    """The text for a test, with the values of the first recipient who has all of them; what nobody has is shown by
    its name."""
    usable = (row for row in recipients.sample if isinstance(renderer.render(row), Rendered))
    row = dict(next(usable, {"attributes": "{}"}))
    values = {tag: tag for tag in template.tags}
    return template.render(values | {k: v for k, v in renderer.values(row, phone).items() if v})


def _unknown_tags(
    template: text.Template, renderer: Renderer, recipients: Recipients
) -> Iterator[str]:
    rows = [row for row in recipients.sample if isinstance(row["phone"], int)]
    if not rows:
        return
    known = set(_OWN_TAGS)
    if recipients.source == "contacts":
        known |= contacts.COLUMNS.keys()
    for row in rows:
        phone = row["phone"]
        assert isinstance(phone, int)
        known |= renderer.values(row, phone).keys()
    for tag in template.tags:
        if tag not in known:
            yield f"no recipient among the first {len(rows)} has a field {tag!r}, as in {{{{{tag}}}}}"


def _skips(skipped: Sequence[Skipped], of: int) -> Iterator[str]:
    for (reason, detail), n in Counter(map(_why_skipped, skipped)).most_common():
        why = {
            Reason.MISSING_VALUE: f"{detail}; a default avoids that: {{{{name|default}}}}",
            Reason.TEXT_TOO_LONG: f"the text takes more than {SEGMENTS_MOST} segments",
            Reason.INVALID_NUMBER: "the phone number cannot be read",
            Reason.OPTED_OUT: "the number has opted out",
        }.get(reason, reason)
        yield f"{n} of the first {of} recipients would be skipped ({reason}): {why}"


def _why_skipped(one: Skipped) -> tuple[Reason, str | None]:
    return one.reason, one.detail if one.reason is Reason.MISSING_VALUE else None


def _costs(rendered: Sequence[Rendered]) -> Iterator[str]:
    wide = [one for one in rendered if not _ALPHABET.issuperset(one.text)]
    if wide:
        odd = dict.fromkeys(c for one in wide for c in one.text if c not in _ALPHABET)
        shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in list(odd)[:_CHARACTERS_SHOWN])
        more = f" and {len(odd) - _CHARACTERS_SHOWN} more" if len(odd) > _CHARACTERS_SHOWN else ""
        yield (
            f"{len(wide)} of {len(rendered)} texts are sent as UCS-2, 70 characters a segment instead of 160, "
            f"because of {shown}{more}"
        )
    most = max((one.segments for one in rendered), default=0)
    if most > 1:
        mean = sum(one.segments for one in rendered) / len(rendered)
        yield f"texts take up to {most} segments, {mean:.1f} on average; each is a credit"
