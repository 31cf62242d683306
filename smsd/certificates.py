"""Certificates: the account of a campaign as its rows give it, a line a recipient, and a hash over the lines.

Counts, lines and hash are of one snapshot, so they agree whatever is going on meanwhile. It is read in pages, and
kept in a file where somebody wants the lines: a snapshot never waits for a reader. The format is described in
docs/certificate.md; a stranger must be able to get the same hash with standard tools.
"""

import asyncio
import contextlib
import csv
import hashlib
import io
import tempfile
import textwrap
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from typing import Any, BinaryIO, NamedTuple

from smsd import campaigns, database, messages
from smsd.campaigns import Campaign, Progress, Totals
from smsd.database import Connection
from smsd.messages import Line
from smsd.model import CampaignStatus, MessageState

SQL = database.queries("certificates")

FORMAT = "smsd-lines-1"
COLUMNS = (
    "id", "to", "status", "reason", "detail", "segments", "credits", "providerMessageId",
    "acceptedAt", "finishedAt",
)  # fmt: skip
HEADER = (",".join(COLUMNS) + "\n").encode()

EXPLAINED = ("pending", "refused", "unknown", "skipped")
"""Parts whose reasons are counted; accepted messages have one where a person said that they are."""

PAGE = 500
"""Lines read, encoded and hashed between two yields."""

_OVER = (CampaignStatus.COMPLETED, CampaignStatus.FAILED, CampaignStatus.CANCELLED)
_OPEN = ("queued", "processing")
# What a spreadsheet takes for the beginning of a formula, full-width forms included.
_FORMULA = tuple("=+-@＝＋－＠")


class Unaccounted(Exception):  # noqa: N818 - a fact, not a fault
    """A message has neither a state nor a batch that speaks for it: `smsd audit` tells more."""


class NoRoom(Exception):  # noqa: N818 - a fact, not a fault
    """The lines found no room in the temporary folder."""


class Credits(NamedTuple):
    """A campaign's credits: held + overdue = spent + released + reserved. `unknown`: what is reserved for unknown
    messages; `overdue`: what was spent with nothing held for it, on messages that were thought to have failed."""

    held: int
    spent: int
    released: int
    reserved: int
    unknown: int
    overdue: int


@dataclass(frozen=True, slots=True)
class Certificate:
    """The account of a campaign at one moment. `final`: it is over, so nothing is queued or processing; what is
    pending or unknown may still move. `reasons`: part → reason → messages. `erased`: lines of persons who had
    themselves forgotten. `sha256`: of all lines, in hex."""

    progress: Progress
    final: bool
    totals: Totals
    reasons: dict[str, dict[str, int]]
    segments: int
    credits: Credits
    erased: int
    sha256: str

    @property
    def campaign(self) -> Campaign:
        """The campaign as it stood."""
        return self.progress.campaign

    @property
    def text_sha256(self) -> str:
        """The hash of the campaign's text as it was written."""
        return hashlib.sha256((self.campaign.text or "").encode()).hexdigest()


# ------------------------------------------------------------------------------------------- reading


@contextlib.asynccontextmanager
async def snapshot(db: Connection) -> AsyncIterator[None]:
    """All that is read inside is of one moment. Not to be held while somebody else is waited for."""
    async with db.transaction(isolation="repeatable_read", readonly=True):
        await db.execute(SQL["look_up"])
        yield


@contextlib.asynccontextmanager
async def scratch() -> AsyncIterator[BinaryIO]:
    """A file for lines that is gone afterwards, whatever happens. Raises NoRoom."""
    try:
        file = tempfile.TemporaryFile(prefix="smsd-")  # noqa: SIM115 - closed below, aside
    except OSError as error:
        raise NoRoom(str(error)) from error
    try:
        yield file
    finally:
        # Giving back 100 MB takes the disk a while. Not awaited: it is done even if we are being cancelled.
        asyncio.get_running_loop().run_in_executor(None, file.close)


async def owner(db: Connection, campaign_id: int) -> int | None:
    """The tenant of a campaign; None where there is no such campaign."""
    tenant_id = await db.fetchval(SQL["owner"], campaign_id)
    return None if tenant_id is None else int(tenant_id)


async def issue(
    db: Connection, tenant_id: int, campaign_id: int, file: BinaryIO | None = None
) -> Certificate | None:
    """The certificate of a tenant's campaign, inside a `snapshot`; its lines go to the end of `file`. The one that was
    kept, once its messages are removed. None: no such campaign. Raises WrongStatus before it was enqueued,
    MessagesRemoved where the lines are wanted, Unaccounted, NoRoom."""
    progress = await campaigns.totals(db, tenant_id, campaign_id)
    if progress is None:
        return None
    if progress.campaign.unsent:
        raise campaigns.WrongStatus(progress.campaign.status)
    if progress.campaign.removed_at is not None:
        if file is not None:
            raise campaigns.MessagesRemoved(progress.campaign.removed_at)
        stored = await db.fetchval(SQL["kept"], campaign_id, tenant_id)
        if stored is not None:
            return _as_kept(progress, stored)
    tally, digest = _Tally(), hashlib.sha256()
    async for page in _pages(db, campaign_id):
        data = encode(page)
        digest.update(data)
        tally.add(page)
        if file is not None:
            await _write(file, data)
    moved = await db.fetchrow(SQL["moved"], campaign_id)
    assert moved is not None
    totals = tally.totals()
    reserved = moved["held"] - moved["released"] - moved["spent"]
    return Certificate(
        progress=progress,
        final=progress.campaign.status in _OVER and not totals.queued and not totals.processing,
        totals=totals,
        reasons=tally.reasons(),
        segments=tally.segments.total(),
        credits=Credits(
            held=moved["held"],
            spent=totals.spent,
            released=moved["released"],
            reserved=reserved,
            unknown=tally.worth("unknown"),
            overdue=totals.spent - moved["spent"],
        ),
        erased=tally.erased,
        sha256=digest.hexdigest(),
    )


def kept(certificate: Certificate) -> dict[str, Any]:
    """What has to be stored of a final certificate when the messages go; what is held for unknown ones is released
    with them."""
    money = certificate.credits
    settled = money._replace(released=money.released + money.reserved, reserved=0, unknown=0)
    return {
        "format": FORMAT, "at": certificate.progress.now.isoformat(), "totals": asdict(certificate.totals),
        "reasons": certificate.reasons, "segments": certificate.segments, "credits": settled._asdict(),
        "erased": certificate.erased, "sha256": certificate.sha256,
    }  # fmt: skip


def _as_kept(progress: Progress, stored: Mapping[str, Any]) -> Certificate:
    return Certificate(
        progress=replace(progress, now=datetime.fromisoformat(stored["at"])),
        final=True,
        totals=Totals(**stored["totals"]),
        reasons=stored["reasons"],
        segments=stored["segments"],
        credits=Credits(**stored["credits"]),
        erased=stored["erased"],
        sha256=stored["sha256"],
    )


async def spool(db: Connection, campaign_id: int, file: BinaryIO, status: str | None = None) -> str:
    """Writes a campaign's lines to the end of `file`, or those in one status, inside a `snapshot`; returns their
    hash. Raises MessagesRemoved, NoRoom."""
    removed_at = await db.fetchval(SQL["removed_at"], campaign_id)
    if removed_at is not None:
        raise campaigns.MessagesRemoved(removed_at)
    digest = hashlib.sha256()
    async for page in _pages(db, campaign_id):
        data = encode(page if status is None else [one for one in page if one.status == status])
        digest.update(data)
        await _write(file, data)
    return digest.hexdigest()


async def _pages(db: Connection, campaign_id: int) -> AsyncIterator[list[Line]]:
    after = 0
    while page := await messages.lines(db, campaign_id, after, PAGE):
        yield page
        after = page[-1].id


async def _write(file: BinaryIO, data: bytes) -> None:
    try:
        await asyncio.to_thread(_write_through, file, data)
    except OSError as error:
        raise NoRoom(f"{tempfile.gettempdir()}: {error.strerror}") from error


def _write_through(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()


# ------------------------------------------------------------------------------------------- counting


class _Tally:
    """Lines counted by what they came to, and their segments."""

    def __init__(self) -> None:
        self.lines: Counter[tuple[str, str | None]] = Counter()
        self.segments: Counter[tuple[str, str | None]] = Counter()
        self.spent = 0
        self.erased = 0

    def add(self, page: Iterable[Line]) -> None:
        for line in page:
            key = _part(line), line.reason
            self.lines[key] += 1
            self.segments[key] += line.segments
            self.spent += line.credits
            self.erased += line.erased

    def totals(self) -> Totals:
        names = [field.name for field in fields(Totals) if field.name != "spent"]
        counted = Counter[str]()
        for (part, _), n in self.lines.items():
            counted[part] += n
        return Totals(**{name: counted[name] for name in names}, spent=self.spent)

    def reasons(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {part: {} for part in EXPLAINED}
        for (part, reason), n in sorted(self.lines.items(), key=str):
            if part in found and reason is not None:
                found[part][str(reason)] = n
        return found

    def worth(self, part: str) -> int:
        return sum(n for (one, _), n in self.segments.items() if one == part)


def _part(line: Line) -> str:
    """The field of Totals that counts this line."""
    match line.status:
        case None:
            raise Unaccounted(f"message {line.id} is spoken for by nobody; `smsd audit` tells more")
        case "accepted":
            return "pending"
        case "failed":
            failed_later = line.own_state == MessageState.DELIVERY_FAILED
            return "delivery_failed" if failed_later else "refused"
    return line.status


# ------------------------------------------------------------------------------------------- lines


def encode(page: Sequence[Line]) -> bytes:
    """The lines as CSV (RFC 4180, but for line ends of one LF), UTF-8, without a header."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(
        (
            line.id, messages.addressee(line), line.status, line.reason,
            _harmless(line.detail), line.segments, line.credits, _harmless(line.provider_id),
            _iso(line.accepted_at), _iso(line.finished_at),
        )
        for line in page
    )  # fmt: skip
    return out.getvalue().encode()


def _harmless(value: str | None) -> str | None:
    """A stranger's words on one line, and never a formula to a spreadsheet."""
    if value is None:
        return None
    if not value.isprintable():
        value = "".join(c if c.isprintable() else " " for c in value)
    value = value.strip()
    return "'" + value if value.startswith(_FORMULA) else value


def _iso(at: datetime | None) -> str | None:
    """As JSON answers have it; Postgres' times come in UTC."""
    return None if at is None else at.isoformat()[:-6] + "Z"


# ------------------------------------------------------------------------------------------- people


def describe(certificate: Certificate, width: int | None = None) -> list[str]:
    """The account for people. `width`: columns of a terminal, None where nobody counts them; at least 36."""
    campaign, progress = certificate.campaign, certificate.progress
    name = "".join(c if c.isprintable() else " " for c in campaign.name)
    out = [f"campaign {campaign.id} “{name}”: {campaign.status}"]
    if not certificate.final:
        out.append("not over: this is how it stands now")
    if progress.expanded and progress.of > progress.read:
        out.append(f"ended with about {progress.of - progress.read:,} recipients unread")
    if width is not None:
        out = [row for line in out for row in textwrap.wrap(line, width)]
    out += [f"  {label:<22}{n:>12,}" for label, n in _figures(certificate)]
    for label, at in (
        ("enqueued", campaign.started_at), ("finished", campaign.finished_at), ("as of", progress.now),
    ):  # fmt: skip
        if at is not None:
            out.append(f"  {label:<13}{at:%Y-%m-%d %H:%M:%S}Z")
    digest = certificate.sha256
    cut = len(digest) if width is None or width >= len(digest) + 2 else len(digest) // 2
    return [*out, f"  SHA-256 of {certificate.totals.total:,} lines:"] + [
        f"  {digest[start : start + cut]}" for start in range(0, len(digest), cut)
    ]


def _figures(certificate: Certificate) -> list[tuple[str, int]]:
    sums, money = certificate.totals, certificate.credits

    def why(part: str) -> list[tuple[str, int]]:
        return [(f"  {reason}", n) for reason, n in certificate.reasons[part].items()]

    waiting = [(part, getattr(sums, part)) for part in _OPEN if not certificate.final]
    return [
        ("recipients", sums.total), *waiting, ("accepted by Mitto", sums.accepted),
        ("  delivered", sums.delivered), ("  failed on the way", sums.delivery_failed),
        ("  no receipt yet", sums.pending), *why("pending"),
        ("refused", sums.refused), *why("refused"), ("unknown", sums.unknown), *why("unknown"),
        ("cancelled", sums.cancelled), ("skipped", sums.skipped), *why("skipped"),
        *([("erased", certificate.erased)] if certificate.erased else []), ("segments", certificate.segments), ("credits held", money.held), ("  spent", money.spent),
        ("  released", money.released), ("  still held", money.reserved),
        ("    for unknown", money.unknown), *([("  overdue", money.overdue)] if money.overdue else []),
    ]  # fmt: skip
