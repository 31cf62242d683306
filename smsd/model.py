"""The vocabulary: states, outcomes, reasons and the constants of Mitto's wire.

Numbers are what the database stores; words are what people and programs read. Both live here, once.
"""

from collections.abc import Iterable
from enum import IntEnum, StrEnum
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

Row = TypeVar("Row", bound=NamedTuple)


def rows(kind: type[Row], *columns: Iterable[Any]) -> list[Row]:
    """Named tuples of columns, all equally long: as `_make` of each, which is Python code and takes twice as long."""
    return list(map(tuple.__new__, repeat(kind), zip(*columns, strict=True)))


class BatchState(IntEnum):
    """Where a batch stands. States below DONE are open; only open batches keep a campaign busy."""

    READY = 0
    WAITING = 1  # refused for now: to be tried again at not_before
    LEASED = 2  # claimed, no intent yet: certainly not sent
    SENDING = 3  # intent written, result not known yet
    DONE = 10  # every message has a state of its own
    UNKNOWN = 11  # may have been accepted; never posted again on its own
    CANCELLED = 12
    ACCEPTED = 13  # Mitto took all of it; speaks for its messages until their receipts come


class MessageState(IntEnum):
    """A message's own state, set by settle and by receipts; null while its batch speaks for it.

    The order of ACCEPTED..DELIVERED is the algebra of receipts: the state is the largest one seen.
    """

    UNKNOWN = 5
    ACCEPTED = 10
    ENROUTE = 11  # accepted, and the network reports progress
    DELIVERY_FAILED = 20
    DELIVERED = 30
    REFUSED = 40
    SKIPPED = 50


class CampaignStatus(StrEnum):
    DRAFT = "draft"
    SCHEDULED = "scheduled"
    SENDING = "sending"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Outcome(StrEnum):
    """What one POST came to: the classes of the outcome table (`mitto.py`)."""

    NEVER_LEFT = "never_left"  # no byte left: nothing counted
    THROTTLED = "throttled"  # the account waits, the batch keeps its place
    RETRY = "retry"  # refused for now
    REFUSED = "refused"  # refused for good: the batch is split, or its one message refused
    TOO_LARGE = "too_large"  # 413: the account's largest request is lowered
    ACCOUNT_BROKEN = "account_broken"  # 401
    LANE_BROKEN = "lane_broken"  # 403
    MISDIRECTED = "misdirected"  # 3xx, never followed
    ACCEPTED = "accepted"  # decided item by item
    UNKNOWN = "unknown"  # may have been accepted
    WITHDRAWN = "withdrawn"  # given up before the first byte


class Reason(StrEnum):
    """Why a message was skipped, refused, cancelled or is unknown; the documented list."""

    OPTED_OUT = "opted_out"
    INVALID_NUMBER = "invalid_number"
    MISSING_VALUE = "missing_value"
    TEXT_TOO_LONG = "text_too_long"
    REFUSED_BY_PROVIDER = "refused_by_provider"
    SERVER_ERROR = "server_error"
    NO_ANSWER = "no_answer"
    UNREADABLE_ANSWER = "unreadable_answer"
    REPLICA_DIED = "replica_died"
    VERDICT_SENT = "verdict_sent"  # a person said that Mitto took it
    VERDICT_FAILED = "verdict_failed"  # a person said that Mitto did not
    DELIVERY_FAILED = "delivery_failed"
    CAMPAIGN_CANCELLED = "campaign_cancelled"
    ERASED = "erased"  # the person asked to be forgotten before it was sent


SEGMENTS_MOST = 10
"""The longest text that is sent."""

# --- the wire of Mitto's Messaging API -------------------------------------------------------
BULK_PATH = "/api/v1.1/Messages/sendmessagesbulk"
SEND_PATH = "/api/v1.1/Messages/send"
MESSAGE_PATH = "/api/v1.1/Messages/{message_id}"
API_KEY_HEADER = "X-Mitto-API-Key"
WEBHOOK_SECRET_HEADER = "X-Webhook-Secret"  # noqa: S105 - the header's name, not a secret
