"""Evidence: what tells later whether Mitto took a message of which nobody knows, and a person's word where nothing does.

An id that came with a receipt is asked about (`mitto.Client.fetch`); `decide` says whose it is, if that can be said at
all. Evidence outranks a verdict: what it names becomes accepted, whatever was thought of it.
"""

import re
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from smsd import database
from smsd.database import Connection, Executor
from smsd.mitto import Fetched

SQL = database.queries("evidence")

SLACK_SECONDS = 5.0
"""How far outside its attempt's window a message may seem to have been created: Mitto's Date has whole seconds."""
GRACE_SECONDS = 60.0
"""Beyond time-out and lease, how long an attempt must have been over before a person may have it sent again."""

Verdict = Literal["sent", "failed", "resend"]


class Account(NamedTuple):
    """A traffic account as one asks it; `unresolved`: something of it may have been accepted, and nobody knows."""

    id: int
    provider_id: str
    api_key: str | None
    server_error_means: str
    capabilities: dict[str, Any]
    unresolved: bool


class Question(NamedTuple):
    """An id to ask about for the `asked`-th time; account_id where the receipt named it."""

    provider_id: str
    account_id: int | None
    asked: int


class Candidate(NamedTuple):
    """A message that an id may belong to. situation: open (would take it) | sending (an attempt is not over) | taken (it
    has an id or is sent again, and another attempt of it may have brought this one)."""

    batch_id: int
    message_id: int
    situation: str
    sender: str
    text: str


class Decision(NamedTuple):
    """Whose an id is: `match`, or why nobody's. word: match | no_candidate | sending | taken | several."""

    word: str
    match: Candidate | None
    candidates: tuple[int, ...] = ()

    @property
    def final(self) -> bool:
        """Whether asking again would tell nothing new."""
        return self.word in ("taken", "several")


class Exposed(NamedTuple):
    """`n` messages of a campaign (0: single ones) wait for a person from now on."""

    campaign_id: int
    tenant_id: int
    n: int


@dataclass(frozen=True, slots=True)
class Selection:
    """Unknown messages of one campaign: exactly one of these is given."""

    message_ids: Sequence[int] | None = None
    batch_id: int | None = None
    older_than: datetime | None = None


class TooEarly(Exception):  # noqa: N818 - a fact: the attempt may still be under way
    """An attempt is so young that what was posted may still arrive."""

    def __init__(self, until: datetime) -> None:
        super().__init__(f"its attempt may still be under way until {until.isoformat()}")
        self.until = until


# ------------------------------------------------------------------------------------------- asking


async def accounts(db: Executor) -> list[Account]:
    """Every traffic account."""
    return [Account(**row) for row in await db.fetch(SQL["accounts"])]


async def take_questions(
    db: Executor, most: int, patience_seconds: float, asks_most: int
) -> list[Question]:
    """Ids of receipts that nobody knows, to be asked about by us: none younger than the patience, which is also the
    first wait between two times; each at most `asks_most` times."""
    rows = await db.fetch(SQL["take_questions"], most, patience_seconds, asks_most)
    return [*{row["provider_id"]: Question(**row) for row in rows}.values()]


async def take_unmapped(
    db: Executor, most: int, patience_seconds: float, asks_most: int
) -> list[Question]:
    """Ids from answers out of order, to be asked about by us."""
    rows = await db.fetch(SQL["take_unmapped"], most, patience_seconds, asks_most)
    return [Question(**row) for row in rows]


async def postpone(db: Executor, provider_id: str, seconds: float) -> None:
    """An id could not be asked about just now; that time is not counted."""
    await db.execute(SQL["postpone"], provider_id, seconds)


async def conclude(
    db: Executor, provider_id: str, word: str, candidates: Sequence[int] = (), *, final: bool
) -> None:
    """Keeps what came of asking, with the messages that it may have been."""
    await db.execute(SQL["conclude"], provider_id, word, list(candidates), final)


# ---------------------------------------------------------------------------------------- resolving

_REFERENCE = re.compile(r"smsd-([0-9]{1,18})-([0-9]{1,9})")


def reference(message_id: int, attempt: int) -> str:
    """What an attempt's message carries where Mitto keeps references."""
    return f"smsd-{message_id}-{attempt}"


def named(fetched: Fetched) -> int | None:
    """The message that a reference of ours names."""
    found = _REFERENCE.fullmatch(fetched.reference or "")
    return int(found[1]) if found else None


async def candidates(db: Executor, account_id: int, fetched: Fetched) -> list[Candidate]:
    """Messages of the account that it may be by number and time of creation, or by number the one that its reference
    names. A message that does not tell these is nobody's."""
    message_id = named(fetched)
    if fetched.destination is None or (fetched.created_at is None and message_id is None):
        return []
    age_seconds = 0.0
    if fetched.created_at is not None:
        # By Mitto's own clock, and from there by the database's: neither that clock nor ours need be right.
        mittos_now = time.time() + (fetched.date_skew_seconds or 0.0)
        age_seconds = mittos_now - fetched.created_at.timestamp()
    rows = await db.fetch(
        SQL["candidates"],
        account_id,
        fetched.destination,
        message_id,
        age_seconds,
        SLACK_SECONDS,
    )
    return [Candidate(*row.values()) for row in rows]


def decide(fetched: Fetched, found: Sequence[Candidate]) -> Decision:
    """Exactly one message, or nothing. Text and sender have to agree, unless a reference names the message."""
    if named(fetched) is None:
        text, sender = folded(fetched.text or ""), fetched.sender
        found = [one for one in found if folded(one.text) == text and one.sender == sender]
    ids = tuple(sorted({one.message_id for one in found}))
    situations = {one.situation for one in found}
    if not ids:
        return Decision("no_candidate", None)
    if "sending" in situations:
        return Decision("sending", None, ids)
    if len(ids) > 1:
        return Decision("several", None, ids)
    if "open" not in situations:
        return Decision("taken", None, ids)
    return Decision("match", next(one for one in found if one.situation == "open"), ids)


def folded(text: str) -> str:
    """A text as it is compared: composed characters, one kind of line end."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))


async def accept(db: Executor, match: Candidate, provider_id: str) -> bool:
    """Mitto has that message under this id: accepted and spent. False: it was resolved meanwhile."""
    return bool(await db.fetchval(SQL["accept"], match.batch_id, match.message_id, provider_id))


# --------------------------------------------------------------------------------- answers out of order


async def map_id(db: Executor, provider_id: str, destination: int) -> bool:
    """Gives an id to the message of its batch that went to this number. False: there is none without an id."""
    return bool(await db.fetchval(SQL["map_id"], provider_id, destination))


# ----------------------------------------------------------------------------------------- verdicts


async def resend_asked(db: Executor, attempts_most: int, backoff_seconds: float) -> int:
    """Unknown single messages whose caller asked for it wait to be sent again, within the attempts; how many."""
    return int(await db.fetchval(SQL["resend_asked"], attempts_most, backoff_seconds))


async def expose_old(db: Executor, seconds: float, batches_most: int) -> list[Exposed]:
    """What has been unknown for so long waits for a person; each batch is told of once."""
    told: Counter[tuple[int, int]] = Counter()
    for row in await db.fetch(SQL["expose_old"], seconds, batches_most):
        told[row["campaign_id"], row["tenant_id"]] += row["n"]
    return [Exposed(*whose, n) for whose, n in told.items()]


async def give_verdict(
    db: Connection, campaign_id: int, verdict: Verdict, which: Selection, wait_seconds: float
) -> int:
    """A person's word on unknown messages of a campaign that is locked; how many it was about. wait_seconds: from
    intent until nothing can arrive any more. Raises TooEarly for "resend"; the caller rolls back."""
    row = await db.fetchrow(
        SQL["give_verdict"],
        campaign_id,
        verdict,
        which.message_ids,
        which.batch_id,
        which.older_than,
        wait_seconds,
    )
    assert row is not None
    if row["early"] is not None:
        raise TooEarly(row["early"])
    return int(row["resolved"])


class Undecided(NamedTuple):
    """An id that may belong to several messages, or to one that has an id."""

    provider_id: str
    verdict: str
    candidates: list[int]
    received_at: datetime


async def undecided(db: Executor, campaign_id: int, most: int) -> list[Undecided]:
    """Ids of which a message of the campaign is a candidate."""
    rows = await db.fetch(SQL["undecided"], campaign_id, most)
    return [Undecided(*row.values()) for row in rows]
