"""The simulator's switches: one for each thing that is unknown about Mitto, one for each fault.

A *fraction* is the share of requests, items or receipts that it strikes, drawn from one generator
seeded by `seed`. The faults of a request exclude each other (one draw), so their fractions add up
to 1 at most, and so do the three fractions of an item.
"""

from collections.abc import Iterable
from enum import IntEnum, StrEnum
from random import Random
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
Limit = Annotated[int, Field(ge=1)]


class Fault(StrEnum):
    """What may befall one POST of messages. Each value is the name of its switch."""

    # nothing accepted, an answer that says so
    FAIL_400 = "fail_400"
    FAIL_401 = "fail_401"
    FAIL_403 = "fail_403"
    FAIL_404 = "fail_404"
    FAIL_429 = "fail_429"
    FAIL_500 = "fail_500"
    FAIL_500_HTML = "fail_500_html"
    FAIL_502 = "fail_502"
    FAIL_503 = "fail_503"
    FAIL_503_RETRY_AFTER = "fail_503_retry_after"
    FAIL_OTHER = "fail_other"
    REDIRECT = "redirect"
    # nothing accepted, no answer
    HANG_BEFORE_ACCEPT = "hang_before_accept"
    RESET_BEFORE_READING = "reset_before_reading"
    RESET_AFTER_READING = "reset_after_reading"
    # everything accepted, no answer or one that does not say so
    ACCEPT_THEN_HANG = "accept_then_hang"
    ACCEPT_THEN_RESET = "accept_then_reset"
    ACCEPT_THEN_500 = "accept_then_500"
    ACCEPT_THEN_502 = "accept_then_502"
    IDS_IN_4XX = "ids_in_4xx"
    BROKEN_ANSWER = "broken_answer"
    HALF_ANSWER = "half_answer"
    # everything accepted, an answer whose list is not what was asked
    SHORT_ANSWER = "short_answer"
    LONG_ANSWER = "long_answer"
    SHUFFLED_ANSWER = "shuffled_answer"
    REPEATED_ID_ANSWER = "repeated_id_answer"
    # everything accepted, a right answer, slowly
    SLOW_DRIP = "slow_drip"


_IN_ORDER = tuple(Fault)
AFTER_ACCEPTANCE = frozenset(_IN_ORDER[_IN_ORDER.index(Fault.ACCEPT_THEN_HANG) :])


class ItemFault(StrEnum):
    """What may befall one item of an accepted request. Each value is the name of its switch."""

    REFUSE_ITEMS = "refuse_items"
    ID_AND_ERROR = "id_and_error"
    ITEMS_WITHOUT_ID = "items_without_id"


_Kind = TypeVar("_Kind", Fault, ItemFault)
# beside their names as plain strings: drawing is on every request's path
_FAULTS = tuple((fault.value, fault) for fault in Fault)
_ITEM_FAULTS = tuple((fault.value, fault) for fault in ItemFault)


class Magic(IntEnum):
    """What a destination brings about by its last four digits, while `magic_numbers` is on."""

    DELIVERY_FAILED = 1  # …0001: accepted, its receipt says Failure
    ITEM_REFUSED = 2  # …0002: its element carries an error and no id
    ACCEPT_THEN_HANG = 3  # …0003: the whole request is accepted and never answered
    NO_RECEIPT = 4  # …0004: accepted, no receipt ever
    HANG_BEFORE_ACCEPT = 5  # …0005: the whole request is neither accepted nor answered
    RECEIPT_BEFORE_ANSWER = 6  # …0006: its receipt is posted before the request is answered
    RECEIPT_DOUBLED = 7  # …0007: its final receipt comes twice
    FAIL_500 = 8  # …0008: the whole request is answered 500, nothing accepted


MAGIC_FAULTS = {
    Magic.ACCEPT_THEN_HANG: Fault.ACCEPT_THEN_HANG,
    Magic.HANG_BEFORE_ACCEPT: Fault.HANG_BEFORE_ACCEPT,
    Magic.FAIL_500: Fault.FAIL_500,
}
_MAGIC = {int(magic): magic for magic in Magic}


def magic_of(destination: int) -> Magic | None:
    """What the last four digits of a destination stand for."""
    return _MAGIC.get(destination % 10_000)


class Switches(BaseModel):
    """Everything that can be set while the simulator runs; assignments are validated."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    seed: int = 0  # taken up at start, at a reset, or when all switches are set at once
    only_accounts: tuple[str, ...] = ()  # faults and latency strike these accounts only; () = all
    faults_left: Annotated[int, Field(ge=0)] | None = None  # counts down; at 0 no fault strikes
    latency_seconds: Seconds = 0.0  # between acceptance and answer
    latency_jitter_seconds: Seconds = 0.0  # a uniform share of this on top
    magic_numbers: bool = False

    # faults of a request: see Fault
    fail_400: Fraction = 0.0
    fail_401: Fraction = 0.0
    fail_403: Fraction = 0.0
    fail_404: Fraction = 0.0
    fail_429: Fraction = 0.0
    fail_500: Fraction = 0.0  # with a JSON error body
    fail_500_html: Fraction = 0.0
    fail_502: Fraction = 0.0  # a gateway's HTML
    fail_503: Fraction = 0.0  # with a JSON error body
    fail_503_retry_after: Fraction = 0.0
    fail_other: Fraction = 0.0
    fail_other_status: Annotated[int, Field(ge=400, le=599)] = 422
    redirect: Fraction = 0.0
    hang_before_accept: Fraction = 0.0
    reset_before_reading: Fraction = 0.0  # after it, with only_accounts: the body names the account
    reset_after_reading: Fraction = 0.0
    accept_then_hang: Fraction = 0.0
    accept_then_reset: Fraction = 0.0
    accept_then_500: Fraction = 0.0
    accept_then_502: Fraction = 0.0
    ids_in_4xx: Fraction = 0.0
    broken_answer: Fraction = 0.0
    half_answer: Fraction = 0.0  # closed in the middle of what Content-Length promised
    short_answer: Fraction = 0.0
    long_answer: Fraction = 0.0
    shuffled_answer: Fraction = 0.0
    repeated_id_answer: Fraction = 0.0
    slow_drip: Fraction = 0.0
    slow_drip_seconds: Seconds = 1.0

    # of 429 and of fail_503_retry_after: none, seconds, or an HTTP date two seconds ahead
    retry_after: Seconds | Literal["date"] | None = None

    # faults of an item
    refuse_items: Fraction = 0.0  # an error and no id: not accepted
    id_and_error: Fraction = 0.0  # accepted, with an error beside its id
    items_without_id: Fraction = 0.0  # accepted, neither id nor error

    # unknowns of the API
    bad_item: Literal["whole_4xx", "item_without_id", "item_with_error"] = "whole_4xx"
    largest_request: Limit | None = None  # messages; above it 413
    send_shape: Literal["list", "flat"] = "list"
    error_key: Literal["message", "error"] = "message"
    keep_reference: bool = False
    refuse_reference: bool = False  # 400 for a request in which a message has one
    seconds_to_be_found: Seconds = 0.0  # until then a GET of an accepted message is 404
    clock_skew_seconds: float = 0.0  # of createdAt, updatedAt, ids and the Date header
    max_requests_per_second: Limit | None = None  # per account, above it 429
    limits_by_account: dict[str, Limit] = {}

    # receipts
    dlr: bool = True
    dlr_delay_seconds: tuple[Seconds, Seconds] = (0.0, 0.2)
    dlr_batch: Limit = 1  # most receipts a POST; 1 = single objects, else arrays
    dlr_style: Literal["v1", "v2", "v3", "v4", "mixed"] = "v1"
    dlr_intermediate: bool = False  # Sent at half time, then the final one
    dlr_failed: Fraction = 0.0
    dlr_never: Fraction = 0.0
    dlr_doubled: Fraction = 0.0
    dlr_out_of_order: Fraction = 0.0  # Sent after the final one
    dlr_contradicting: Fraction = 0.0  # Delivered, and a Failure after it
    dlr_unknown_word: Fraction = 0.0  # one more receipt, with a word that means nothing
    dlr_before_answer: Fraction = 0.0  # posted, and answered, before the send's own answer

    @model_validator(mode="after")
    def _fractions_fit(self) -> Self:
        faults = sum(getattr(self, fault) for fault in Fault)
        items = sum(getattr(self, fault) for fault in ItemFault)
        for what, total in (("faults of a request", faults), ("faults of an item", items)):
            if total > 1 + 1e-9:
                raise ValueError(f"the fractions of the {what} add up to {total:g}; at most 1")
        low, high = self.dlr_delay_seconds
        if low > high:
            raise ValueError(f"dlr_delay_seconds is (least, most); got ({low:g}, {high:g})")
        return self

    if not TYPE_CHECKING:  # or mypy would take any name for a switch

        def __setattr__(self, name: str, value: object) -> None:
            before = dict(self.__dict__)
            try:
                super().__setattr__(name, value)
            except ValidationError:
                self.__dict__.update(before)  # pydantic keeps what the last validator refused
                raise

    def adopt(self, other: "Switches") -> None:
        """Take every value of another, in place: whoever holds these switches sees them."""
        self.__dict__.update(other.__dict__)

    def draw_fault(self, random: Random) -> Fault | None:
        """The fault that strikes the next request, if any."""
        return None if self.faults_left == 0 else self._draw(_FAULTS, random)

    def draw_item_fault(
        self, destination: int, account: str | None, random: Random
    ) -> ItemFault | None:
        """The fault that strikes this item of a request of this account, if any."""
        if self.magic_numbers and magic_of(destination) == Magic.ITEM_REFUSED:
            return ItemFault.REFUSE_ITEMS
        return self._draw(_ITEM_FAULTS, random) if self.strike(account) else None

    def _draw(self, kinds: Iterable[tuple[str, _Kind]], random: Random) -> _Kind | None:
        drawn = random.random()
        fractions = self.__dict__
        for name, kind in kinds:
            drawn -= fractions[name]
            if drawn < 0:
                return kind
        return None

    def items_are_safe(self) -> bool:
        """Whether no fault can strike an item, so that none need be drawn."""
        return not self.magic_numbers and not any(getattr(self, fault) for fault in ItemFault)

    def receipts_are_plain(self) -> bool:
        """Whether every message gets one receipt, Delivered, so that nothing else need be drawn."""
        drawn = (
            self.dlr_failed,
            self.dlr_never,
            self.dlr_doubled,
            self.dlr_out_of_order,
            self.dlr_contradicting,
            self.dlr_unknown_word,
            self.dlr_before_answer,
        )
        return not (self.magic_numbers or self.dlr_intermediate or any(drawn))

    def strike(self, account: str | None) -> bool:
        """Whether faults and latency are meant for this account."""
        return not self.only_accounts or account in self.only_accounts

    def limit_of(self, account: str | None) -> int | None:
        """Most requests in any one second that this account may make."""
        return self.limits_by_account.get(account or "", self.max_requests_per_second)
