"""What the simulator has seen and accepted: the truth that the system tests compare with.

A message costs some thirty bytes in columns beside its text; what its request says of all of its
messages (times, bulk id, first id) is kept once. The ids of one request are consecutive and grow
from request to request, so that an id leads back to its row without an index.
"""

import re
import secrets
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Literal, NamedTuple

from smsd.simulator.switches import Fault

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]
_TO_PYTHON_DIGITS = str.maketrans(_ALPHABET, "0123456789abcdefghijklmnopqrstuv")
_ULID = re.compile(f"[0-7][{_ALPHABET}]{{25}}")


def ulid(value: int) -> str:
    """The 26 characters of a 128-bit ULID."""
    return "".join([_PAIRS[value >> shift & 1023] for shift in range(120, -1, -10)])


def ulids(first: int, count: int) -> list[str]:
    """`count` consecutive ULIDs from `first` on, encoded two characters a message."""
    encoded: list[str] = []
    while count > 0:
        low = first & 1023
        pairs = _PAIRS[low : low + count]
        prefix = ulid(first)[:-2]
        encoded += [prefix + pair for pair in pairs]
        first += len(pairs)
        count -= len(pairs)
    return encoded


def parse_ulid(text: str) -> int | None:
    """The value of 26 characters, or None if they are no ULID."""
    if not _ULID.fullmatch(text):
        return None
    return int(text.translate(_TO_PYTHON_DIGITS), 32)


def iso(at: float) -> str:
    """Seconds since 1970 as ISO 8601 UTC with milliseconds and Z."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def largest_window(arrivals: Sequence[float], weights: Iterable[int]) -> int:
    """The largest weight in any window [t, t + 1) over the arrivals, in seconds.

    Some window that starts with an arrival holds the most, so two pointers over the sorted
    arrivals find it exactly.
    """
    ordered = sorted(zip(arrivals, weights, strict=True))
    largest = inside = oldest = 0
    for arrival, weight in ordered:
        inside += weight
        while arrival >= ordered[oldest][0] + 1.0:
            inside -= ordered[oldest][1]
            oldest += 1
        largest = max(largest, inside)
    return largest


class Report(IntEnum):
    """The states of a message that Mitto reports, in the order in which they come."""

    QUEUED = 0
    SENT = 1
    PENDING = 2
    DELIVERED = 3
    FAILED = 4
    UNKNOWN_WORD = 5

    @property
    def word(self) -> str:
        """As the API spells it."""
        return ("Queued", "Sent", "Pending", "Delivered", "Failure", "Teleported")[self]


class Draft(NamedTuple):
    """One message of a request that is fit to be accepted; the destination as digits."""

    account: str
    destination: int
    sender: str
    text: str
    reference: str | None


@dataclass(slots=True)
class Request:
    """One request, from its first byte on. Times are seconds: since 1970, and monotonic."""

    number: int
    kind: Literal["bulk", "send", "get"]
    arrived_at: float
    arrived_monotonic: float
    account: str | None = None  # of its first message; None until the body is read
    messages: int = 0
    fault: Fault | None = None
    status: int | None = None  # as answered; None while open, and for good if never answered
    finished_monotonic: float | None = None
    accepted: int = 0
    accepted_at: float = 0.0
    accepted_monotonic: float = 0.0
    first_row: int = 0
    first_id: int = 0
    bulk_id: str | None = None


class Accepted(NamedTuple):
    """One accepted message. `receipt` is the final state that a receipt told and a 2xx took."""

    row: int
    message_id: str
    account: str
    destination: int
    sender: str
    text: str
    reference: str | None
    accepted_at: float
    accepted_monotonic: float
    bulk_id: str | None
    request: int
    final: Report
    due_at: float
    receipt: Report | None


class Duplicate(NamedTuple):
    """A recipient accepted more than once. `text` is None if the texts were not compared."""

    destination: int
    text: str | None
    times: int


class _Names:
    """Strings that repeat, each kept once."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self._numbers: dict[str, int] = {}

    def numbers(self, words: list[str]) -> list[int]:
        for word in set(words) - self._numbers.keys():
            self._numbers[word] = len(self.words)
            self.words.append(word)
        return [self._numbers[word] for word in words]


class Ledger:
    """Every request and every accepted message of one simulator."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.in_flight = 0  # POSTs that are open now
        self.redirects_followed = 0
        self._accepting: list[Request] = []  # those that accepted something, by row and by id
        self._first_rows = array("q")  # of each of them
        self._last_id = 0
        self._accounts, self._senders = _Names(), _Names()
        self._account = array("I")
        self._destination = array("q")
        self._sender = array("I")
        self._text: list[str] = []
        self._references: dict[int, str] = {}
        self._final = array("B")
        self._due_at = array("d")
        self._receipt = array("B")

    # --- what happens -----------------------------------------------------------------------

    def open_request(
        self, kind: Literal["bulk", "send", "get"], at: float, monotonic: float
    ) -> Request:
        """A request whose first byte came at these times."""
        request = Request(len(self.requests), kind, at, monotonic)
        self.requests.append(request)
        self.in_flight += kind != "get"
        return request

    def close_request(self, request: Request, monotonic: float) -> None:
        """It is about to be answered, or never will be."""
        request.finished_monotonic = monotonic
        self.in_flight -= request.kind != "get"

    def accept(
        self, request: Request, drafts: list[Draft], at: float, monotonic: float, skew: float = 0.0
    ) -> list[str]:
        """Keep the messages; their ids, in order. `skew` moves only the time within the ids."""
        request.accepted = len(drafts)
        request.accepted_at, request.accepted_monotonic = at, monotonic
        request.first_row = len(self._text)
        request.first_id = self.take_ids(len(drafts), at + skew)
        if drafts:
            self._accepting.append(request)
            self._first_rows.append(request.first_row)
        self._account.extend(self._accounts.numbers([draft.account for draft in drafts]))
        self._destination.extend([draft.destination for draft in drafts])
        self._sender.extend(self._senders.numbers([draft.sender for draft in drafts]))
        self._text.extend([draft.text for draft in drafts])
        for row, draft in enumerate(drafts, request.first_row):
            if draft.reference is not None:
                self._references[row] = draft.reference
        self._final.extend([Report.DELIVERED] * len(drafts))
        self._due_at.extend([at] * len(drafts))
        self._receipt.extend(bytes(len(drafts)))
        return ulids(request.first_id, len(drafts))

    def take_ids(self, count: int, at: float) -> int:
        """The first of `count` consecutive ids, larger than every id before."""
        first = int(at * 1000) << 80 | secrets.randbits(79)
        if first <= self._last_id:
            # the same millisecond, or a clock that went back
            first = self._last_id + 1 + secrets.randbits(16)
        self._last_id = first + count - 1
        return first

    def decide(self, row: int, final: Report, due_at: float) -> None:
        """What becomes of an accepted message, and when."""
        self._final[row] = final
        self._due_at[row] = due_at

    def receipt_answered(self, row: int, report: Report) -> None:
        """A receipt was taken with a 2xx. Of two final ones, Delivered is kept."""
        if report == Report.DELIVERED or (report == Report.FAILED and not self._receipt[row]):
            self._receipt[row] = report

    # --- one message ------------------------------------------------------------------------

    @property
    def accepted_count(self) -> int:
        return len(self._text)

    def destination_of(self, row: int) -> int:
        return self._destination[row]

    def account_of(self, row: int) -> str:
        return self._accounts.words[self._account[row]]

    def receipt_of(self, row: int) -> tuple[str, float, float]:
        """What every receipt of a message tells: its id, when it was accepted, when it is final."""
        request = self._request_of(row)
        message_id = ulid(request.first_id + row - request.first_row)
        return message_id, request.accepted_at, self._due_at[row]

    def find(self, message_id: str) -> Accepted | None:
        """The message of this id, if it was accepted here."""
        value = parse_ulid(message_id)
        place = bisect_right(self._accepting, value or 0, key=lambda one: one.first_id) - 1
        if value is None or place < 0:
            return None
        request = self._accepting[place]
        offset = value - request.first_id
        return self.message(request.first_row + offset) if offset < request.accepted else None

    def message(self, row: int) -> Accepted:
        """The accepted message of this row; rows count from 0 in the order of acceptance."""
        request = self._request_of(row)
        return Accepted(
            row=row,
            message_id=ulid(request.first_id + row - request.first_row),
            account=self.account_of(row),
            destination=self._destination[row],
            sender=self._senders.words[self._sender[row]],
            text=self._text[row],
            reference=self._references.get(row),
            accepted_at=request.accepted_at,
            accepted_monotonic=request.accepted_monotonic,
            bulk_id=request.bulk_id,
            request=request.number,
            final=Report(self._final[row]),
            due_at=self._due_at[row],
            receipt=Report(self._receipt[row]) if self._receipt[row] else None,
        )

    def messages(self, after: int = 0, limit: int | None = None) -> Iterator[Accepted]:
        """Accepted messages from row `after` on."""
        end = self.accepted_count if limit is None else min(after + limit, self.accepted_count)
        return (self.message(row) for row in range(after, end))

    def _request_of(self, row: int) -> Request:
        return self._accepting[bisect_right(self._first_rows, row) - 1]

    # --- questions --------------------------------------------------------------------------

    def duplicates(
        self, key: Literal["destination_text", "destination"] = "destination_text"
    ) -> list[Duplicate]:
        """Recipients accepted more than once, by destination alone or with the same text."""
        repeated = {number: n for number, n in Counter(self._destination).items() if n > 1}
        if key == "destination":
            return [Duplicate(number, None, n) for number, n in repeated.items()]
        pairs = Counter(
            (number, text)
            for number, text in zip(self._destination, self._text, strict=True)
            if number in repeated
        )
        return [Duplicate(number, text, n) for (number, text), n in pairs.items() if n > 1]

    def worst_second(
        self,
        account: str | None = None,
        unit: Literal["requests", "posts", "messages"] = "requests",
    ) -> int:
        """The most that arrived within any second [t, t + 1), of one account or of all.

        Requests are POSTs of messages and GETs of one; posts and messages leave GETs out. A
        request that was cut before its body was read has no account, and counts only for None.
        """
        counted = [
            request
            for request in self.requests
            if account in (None, request.account) and (unit == "requests" or request.kind != "get")
        ]
        return largest_window(
            [request.arrived_monotonic for request in counted],
            [request.messages if unit == "messages" else 1 for request in counted],
        )

    def max_in_flight(self, account: str | None = None) -> int:
        """The most POSTs of messages that were open at once."""
        moves: list[tuple[float, int]] = []
        for request in self.requests:
            if request.kind != "get" and account in (None, request.account):
                moves.append((request.arrived_monotonic, 1))
                if request.finished_monotonic is not None:
                    moves.append((request.finished_monotonic, -1))
        most = now_open = 0
        for _, move in sorted(moves):
            now_open += move
            most = max(most, now_open)
        return most

    def accepted_by_account(self) -> dict[str, int]:
        """Accepted messages of each account."""
        return {self._accounts.words[number]: n for number, n in Counter(self._account).items()}

    def requests_by_account(self) -> dict[str, int]:
        """Requests of each account; those cut before their body was read are left out."""
        return dict(Counter(one.account for one in self.requests if one.account is not None))

    def answers(self) -> dict[str, int]:
        """Requests by the status answered; "none" for those without an answer."""
        return dict(Counter(str(one.status or "none") for one in self.requests))

    def final_receipts(self) -> dict[str, int]:
        """Accepted messages by the final state that a receipt told; "none" for no receipt yet."""
        delivered = self._receipt.count(Report.DELIVERED)
        failed = self._receipt.count(Report.FAILED)
        none = self.accepted_count - delivered - failed
        return {"Delivered": delivered, "Failure": failed, "none": none}
