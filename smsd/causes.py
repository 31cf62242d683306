"""Why work waits: what follows from the facts, strongest cause first, each with who can lift it and how.

Plain code: the facts are read by `explain`. Numbers and texts of messages are not among them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

NEARLY = 0.9
"""A limit of which so much was used in the last second is what work waits for."""


class Code(StrEnum):
    """Why work waits; what stands first is strongest: it holds even when all that follows is lifted."""

    DRAFT = "DRAFT"
    SCHEDULED = "SCHEDULED"
    CAMPAIGN_PAUSED = "CAMPAIGN_PAUSED"
    ACCOUNT_PAUSED = "ACCOUNT_PAUSED"
    RECOVERING = "RECOVERING"
    NO_REPLICA = "NO_REPLICA"
    BREAKER_OPEN = "BREAKER_OPEN"
    ACCOUNT_THROTTLED = "ACCOUNT_THROTTLED"
    LIMITER_CLOSED = "LIMITER_CLOSED"
    TENANT_LIMIT = "TENANT_LIMIT"
    INSTALLATION_LIMIT = "INSTALLATION_LIMIT"
    ACCOUNT_LIMIT = "ACCOUNT_LIMIT"
    IN_FLIGHT_LIMIT = "IN_FLIGHT_LIMIT"
    SHARED = "SHARED"
    SPLIT_BUDGET = "SPLIT_BUDGET"
    RETRY = "RETRY"
    EXPANSION = "EXPANSION"
    UNKNOWN = "UNKNOWN"
    ON_ITS_WAY = "ON_ITS_WAY"
    NEXT = "NEXT"
    AWAITING_RECEIPTS = "AWAITING_RECEIPTS"
    NOTHING_WAITS = "NOTHING_WAITS"


class Lift(StrEnum):
    """Who can make an end of it."""

    TENANT = "tenant"
    OPERATOR = "operator"
    MITTO = "mitto"
    TIME = "time"
    NOBODY = "nobody needed"


class Cause(NamedTuple):
    """One reason why work waits. `reason`: the word of what was paused. `since`: where nobody wrote that down, since
    when the oldest batch waits that it holds; None where neither is known."""

    code: Code
    message: str
    can_be_lifted_by: Lift
    how: str
    since: datetime | None = None
    until: datetime | None = None
    reason: str | None = None


# -------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, slots=True)
class Installation:
    """What all lanes have in common. Not `kept`: this is another database than the one that was kept (a failover, a
    restore) since `found_at`, and nobody claims until the replicas `awaited` have said what they had posted there."""

    now: datetime
    replicas: int
    last_beat_at: datetime | None
    requests_used: int
    requests_per_second: int | None
    unknown_after: timedelta
    kept: bool
    found_at: datetime | None
    awaited: list[int]


@dataclass(frozen=True, slots=True)
class Account:
    """A traffic account, its limiter at this moment, and the replicas that cannot reach Mitto for it.

    `limit_now`: requests a second that hold at this moment, since `ceiling_at` perhaps fewer than are set.
    `requests_used`, `messages_used`: in the window of the last second, the latter in `limit_unit`s; None where the
    limiter's state was lost. `slot_at`: the earliest time at which one more request may leave."""

    id: int
    name: str
    paused_reason: str | None
    paused_detail: str | None
    updated_at: datetime
    requests_per_second: int
    messages_per_second: int | None
    limit_unit: str
    max_in_flight: int | None
    limit_now: int
    ceiling_at: datetime | None
    blocked_until: datetime | None
    requests_used: int | None
    messages_used: int | None
    closed_until: datetime | None
    slot_at: datetime | None
    tenants_awake: int
    weight_awake: float
    in_flight: int
    breakers: int
    breaker_since: datetime | None
    breaker_until: datetime | None
    breaker_detail: str | None

    @property
    def learned(self) -> bool:
        """Whether Mitto taught us to stay below the limit that is set."""
        return self.limit_now < self.requests_per_second


@dataclass(frozen=True, slots=True)
class Lane:
    """A lane: what is open in it, what its campaign, its tenant's limits and its place in the order are.

    `ready` and the like count batches, `…_messages` their messages.
    `position`: 1 is claimed next; None where it is not in line. `retries`: those of `waiting` that were refused for
    now."""

    id: int
    account_id: int
    tenant_id: int
    campaign_id: int
    priority: bool
    paused: bool
    stepped_over_until: datetime | None
    splits_until: datetime | None
    paused_reason: str | None
    paused_detail: str | None
    updated_at: datetime | None
    expansion: str | None
    read: int | None
    of: int | None
    started_at: datetime | None
    weight: float
    requests_per_second: int
    messages_per_second: int | None
    requests_used: int | None
    messages_used: int | None
    closed_until: datetime | None
    position: int | None
    ready: int
    ready_messages: int
    waiting: int
    waiting_messages: int
    leased: int
    leased_messages: int
    sending: int
    sending_messages: int
    oldest_at: datetime | None
    ready_since: datetime | None
    retries: int
    retries_messages: int
    retry_at: datetime | None
    tries: int
    unknown: int
    unknown_messages: int
    unknown_since: datetime | None
    retry_status: int | None
    retry_outcome: str | None
    retry_detail: str | None
    retry_since: datetime | None

    @property
    def expanding(self) -> bool:
        """Whether some of the audience is still to become messages."""
        return self.expansion in ("running", "paused")

    @property
    def waits(self) -> bool:
        """Whether anything of it has yet to leave."""
        return bool(self.ready or self.waiting or self.expanding)


@dataclass(frozen=True, slots=True)
class Campaign:
    """A campaign with its parts, in messages; `available`: its tenant's credits that are not held."""

    id: int
    status: str
    created_at: datetime
    updated_at: datetime
    scheduled_at: datetime | None
    subscription: str
    available: int
    queued: int
    processing: int
    unknown: int
    pending: int


class Depth(NamedTuple):
    """What is open in an account, of one kind: ready | waiting | leased | sending | unknown."""

    account_id: int
    kind: str
    batches: int
    messages: int
    oldest_at: datetime


# -------------------------------------------------------------------------------------------- causes


_CAMPAIGN = "/api/campaigns/{id}"
_ACCOUNT = "/api/admin/traffic-accounts/{id}"
_TENANT = "/api/admin/tenants/{id}"

LIFTED: dict[Code, tuple[Lift, str]] = {
    Code.DRAFT: (Lift.TENANT, f"POST {_CAMPAIGN}/enqueue"),
    Code.SCHEDULED: (Lift.TENANT, f"wait, or send it now: POST {_CAMPAIGN}/enqueue"),
    Code.CAMPAIGN_PAUSED: (Lift.TENANT, f"POST {_CAMPAIGN}/resume"),
    Code.ACCOUNT_PAUSED: (Lift.OPERATOR, f'PATCH {_ACCOUNT} with {{"paused": false}}'),
    Code.RECOVERING: (
        Lift.OPERATOR, "let the processes that were at work reach the database; if one cannot come back: smsd recover",
    ),
    Code.NO_REPLICA: (
        Lift.OPERATOR, "start smsd serve on this database, or see in its log why it does not reach it",
    ),
    Code.BREAKER_OPEN: (
        Lift.MITTO, "one batch at a time tries again; if it goes on, look at the network between smsd and Mitto",
    ),
    Code.ACCOUNT_THROTTLED: (
        Lift.TIME, "wait; if it happens often, set the account's requestsPerSecond to what Mitto grants",
    ),
    Code.LIMITER_CLOSED: (Lift.TIME, "wait: it takes about a second"),
    Code.TENANT_LIMIT: (Lift.OPERATOR, f"wait, or raise requestsPerSecond: PATCH {_TENANT}"),
    Code.INSTALLATION_LIMIT: (
        Lift.OPERATOR, "SMSD_REQUESTS_PER_SECOND is that limit; raise it on every replica, or wait",
    ),
    Code.ACCOUNT_LIMIT: (Lift.OPERATOR, f"wait, or raise requestsPerSecond: PATCH {_ACCOUNT}"),
    Code.IN_FLIGHT_LIMIT: (Lift.OPERATOR, f"wait for Mitto's answers, or raise maxInFlight: PATCH {_ACCOUNT}"),
    Code.SHARED: (Lift.OPERATOR, f"wait, or raise the tenant's weight: PATCH {_TENANT}"),
    Code.SPLIT_BUDGET: (
        Lift.TIME, f"wait, or cancel the campaign and correct what is refused: GET {_CAMPAIGN}/batches",
    ),
    Code.RETRY: (
        Lift.TIME, f"wait; what fails SMSD_MAX_ATTEMPTS times can be sent again: POST {_CAMPAIGN}/retry-failed",
    ),
    Code.EXPANSION: (Lift.NOBODY, "what is read is sent meanwhile"),
    Code.UNKNOWN: (
        Lift.TENANT, f"a receipt decides, or Mitto's answer; or you: POST {_CAMPAIGN}/unknown as sent, failed or resend",
    ),
    Code.ON_ITS_WAY: (Lift.NOBODY, "wait for Mitto's answer"),
    Code.NEXT: (Lift.NOBODY, "the next claim takes them"),
    Code.AWAITING_RECEIPTS: (
        Lift.MITTO, f"wait for the receipts, or ask for them: POST {_CAMPAIGN}/refresh-status",
    ),
    Code.NOTHING_WAITS: (Lift.NOBODY, "there is nothing to do"),
}  # fmt: skip
"""Who can lift a cause, and how, where it does not depend on more than its code."""

_CAMPAIGN_PAUSES: dict[str, tuple[str, Lift, str]] = {
    "PAUSED_BY_USER": ("a person paused the campaign", *LIFTED[Code.CAMPAIGN_PAUSED]),
    "INACTIVE_SUBSCRIPTION": (
        "the tenant's subscription is inactive", Lift.OPERATOR,
        f'PATCH {_TENANT} with {{"subscription": "active"}}: the campaign then goes on by itself',
    ),
    "INSUFFICIENT_CREDITS": (
        "the credits did not reach for the whole audience", Lift.OPERATOR,
        f"POST {_TENANT}/credits: the campaign then goes on by itself",
    ),
    "REFUSED_BY_PROVIDER": (
        "Mitto refused two halves of a batch with the same words, so it is not one bad message", Lift.TENANT,
        f"correct what the words name (sender, text), then POST {_CAMPAIGN}/resume; or cancel",
    ),
    "FORBIDDEN_BY_PROVIDER": (
        "Mitto answered 403: this may not be sent through this account", Lift.TENANT,
        f"have Mitto allow it (often the sender id), then POST {_CAMPAIGN}/resume",
    ),
    "EXPANSION_FAILED": (
        "the audience could not be read", Lift.OPERATOR,
        f"see smsd's log; then POST {_CAMPAIGN}/resume goes on where it stopped",
    ),
    "RESTORED": (
        "the database was restored from a backup, so it may have been sent further than is known here", Lift.TENANT,
        f"compare with the receipts; then POST {_CAMPAIGN}/resume sends to the rest of its audience, or cancel",
    ),
}  # fmt: skip
_ACCOUNT_PAUSES = {
    "UNAUTHORIZED": f"give it a key that Mitto takes: PATCH {_ACCOUNT} with an apiKey",
    "MISDIRECTED": "Mitto answered with a redirect: check SMSD_MITTO_BASE_URL, then ",
    "FORBIDDEN_BY_PROVIDER": "ask Mitto what it forbids this account, then ",
}


def _cause(
    code: Code, message: str, since: datetime | None = None, until: datetime | None = None
) -> Cause:
    return Cause(code, message, *LIFTED[code], since, until)


def _messages(n: int) -> str:
    return f"{n} message" if n == 1 else f"{n} messages"


def _sorted(found: Iterable[Cause]) -> list[Cause]:
    order = list(Code)
    first = {cause.code: cause for cause in reversed(list(found))}
    return sorted(first.values(), key=lambda cause: order.index(cause.code))


def of_campaign(
    house: Installation, account: Account | None, lane: Lane | None, campaign: Campaign
) -> list[Cause]:
    """Why a campaign's work waits, strongest first; never empty."""
    found = list(_of_beginning(campaign))
    if lane is not None:
        found += of_lane(house, account, lane, campaign)
    if campaign.pending:
        n = _messages(campaign.pending)
        message = f"Mitto accepted {n}, and has not said yet whether they were delivered"
        found.append(_cause(Code.AWAITING_RECEIPTS, message))
    if not found:
        message = f"the campaign is {campaign.status}, and every message has its final state"
        found.append(_cause(Code.NOTHING_WAITS, message))
    return _sorted(found)


def of_lane(
    house: Installation, account: Account | None, lane: Lane, campaign: Campaign | None = None
) -> list[Cause]:
    """Why a lane's work waits, strongest first; empty where there is none."""
    found: list[Cause] = []
    if lane.paused and lane.paused_reason is not None:
        found.append(_campaign_pause(lane, campaign))
    if account is not None:
        work = _Work(lane.waits, bool(lane.ready) and not lane.paused, lane.ready_since)
        found += _of_account(house, account, work)
    if not lane.paused:
        found += _of_tenant(lane, account.limit_unit if account else "messages")
        found += _of_share(account, lane, found)
    if lane.ready and not found:
        message = f"{_messages(lane.ready_messages)} are ready, and nothing stands before them"
        found.append(_cause(Code.NEXT, message, lane.ready_since))
    if not lane.paused:
        found += _of_batches(lane)
    found += _of_unknown(house, lane)
    if lane.leased or lane.sending:
        at_work = _messages(lane.leased_messages + lane.sending_messages)
        found.append(_cause(Code.ON_ITS_WAY, f"{at_work} are being sent"))
    return _sorted(found)


def of_account(house: Installation, account: Account, open_: Sequence[Depth]) -> list[Cause]:
    """Why the work of a whole account waits, strongest first; empty where nothing holds it up."""
    ready = [depth.oldest_at for depth in open_ if depth.kind == "ready"]
    waits = any(depth.kind in ("ready", "waiting") for depth in open_)
    work = _Work(waits, bool(ready), min(ready, default=None))
    return _sorted(_of_account(house, account, work))


# ----------------------------------------------------------------------------------- of a campaign


def _of_beginning(campaign: Campaign) -> Iterator[Cause]:
    """What stands before a campaign that was not sent yet."""
    if campaign.status == "draft":
        message = "the campaign is a draft: nobody has sent it yet"
        yield _cause(Code.DRAFT, message, since=campaign.created_at)
    elif campaign.status == "scheduled":
        message = "the campaign is to be sent at its time"
        yield _cause(Code.SCHEDULED, message, until=campaign.scheduled_at)
    else:
        return
    if campaign.subscription != "active":
        reason = "INACTIVE_SUBSCRIPTION"
        yield Cause(Code.CAMPAIGN_PAUSED, *_CAMPAIGN_PAUSES[reason], reason=reason)


def _campaign_pause(lane: Lane, campaign: Campaign | None) -> Cause:
    reason = lane.paused_reason or ""
    other = ("the campaign is paused", *LIFTED[Code.CAMPAIGN_PAUSED])
    message, lift, how = _CAMPAIGN_PAUSES.get(reason, other)
    if reason == "INSUFFICIENT_CREDITS" and campaign is not None:
        message += f"; {campaign.available} are available"
    if lane.paused_detail:
        message += f": {lane.paused_detail}"
    return Cause(Code.CAMPAIGN_PAUSED, message, lift, how, since=lane.updated_at, reason=reason)


# ---------------------------------------------------------------------- of the house and the account


class _Work(NamedTuple):
    """What a cause of an account may hold up: anything at all, something that could leave now, since when it waits."""

    waits: bool
    ready: bool
    since: datetime | None


def _of_account(house: Installation, account: Account, work: _Work) -> Iterator[Cause]:
    """What stops or slows everything of an account, as far as there is work that it holds up."""
    if not work.waits:
        return
    if account.paused_reason is not None:
        yield _account_pause(account)
    if not house.kept:
        yield _recovering(house)
    if not house.replicas:
        yield _cause(Code.NO_REPLICA, "no process of smsd is alive", since=house.last_beat_at)
    if work.ready:
        yield from _of_provider(house, account)
        yield from _of_state(account)
        yield from _of_limits(house, account, work)


def _account_pause(account: Account) -> Cause:
    reason = account.paused_reason or ""
    lift, how = LIFTED[Code.ACCOUNT_PAUSED]
    first = _ACCOUNT_PAUSES.get(reason, "")
    message = f"the traffic account is paused ({reason})"
    if account.paused_detail:
        message += f": {account.paused_detail}"
    how = first if reason == "UNAUTHORIZED" else first + how
    return Cause(Code.ACCOUNT_PAUSED, message, lift, how, since=account.updated_at, reason=reason)


def _recovering(house: Installation) -> Cause:
    message = "the database was failed over or restored, and may have forgotten what was posted"
    if house.awaited:
        ids = ", ".join(map(str, house.awaited))
        message += f": replicas {ids} have not said yet what they posted (GET /api/admin/replicas)"
    return _cause(Code.RECOVERING, message, since=house.found_at)


def _of_provider(house: Installation, account: Account) -> Iterator[Cause]:
    if account.breakers:
        message = f"{account.breakers} of {house.replicas} replicas cannot reach Mitto: {account.breaker_detail}"
        yield _cause(
            Code.BREAKER_OPEN, message, since=account.breaker_since, until=account.breaker_until
        )
    if account.blocked_until is not None:
        message = "Mitto asked this account to wait (429, or 503 with Retry-After)"
        yield _cause(
            Code.ACCOUNT_THROTTLED, message, since=account.ceiling_at, until=account.blocked_until
        )


def _of_state(limiter: Account | Lane) -> Iterator[Cause]:
    """Whether the limiter of an account, or of a lane's tenant, knows what was sent in the last second."""
    lost = limiter.requests_used is None or (
        limiter.messages_per_second is not None and limiter.messages_used is None
    )
    if lost or limiter.closed_until is not None:
        message = (
            "it is not known what was sent in the last second (a new limit, a database that was restarted, or whose "
            "clock stepped back): nothing leaves until that cannot matter"
        )
        yield _cause(Code.LIMITER_CLOSED, message, until=limiter.closed_until)


def _of_limits(house: Installation, account: Account, work: _Work) -> Iterator[Cause]:
    if _full(house.requests_used, house.requests_per_second):
        message = f"all accounts together are at {house.requests_per_second} requests a second"
        yield _cause(Code.INSTALLATION_LIMIT, message, work.since)
    if _full(account.requests_used, account.limit_now):
        yield _account_limit(account, work)
    elif _full(account.messages_used, account.messages_per_second):
        limit = f"{account.messages_per_second} {account.limit_unit} a second"
        message = f"the traffic account is at its limit of {limit}"
        how = f"wait, or raise messagesPerSecond: PATCH {_ACCOUNT}"
        yield _cause(Code.ACCOUNT_LIMIT, message, work.since)._replace(how=how)
    most = account.max_in_flight
    if most is not None and account.in_flight >= most - (most > 1):  # one is for single messages
        message = f"{account.in_flight} requests are on their way, of {most} that may be at once"
        yield _cause(Code.IN_FLIGHT_LIMIT, message, work.since)


def _account_limit(account: Account, work: _Work) -> Cause:
    message = f"the traffic account is at its limit of {account.limit_now} requests a second"
    cause = _cause(Code.ACCOUNT_LIMIT, message, work.since, account.slot_at)
    if not account.learned:
        return cause
    return cause._replace(
        message=f"{message}; {account.requests_per_second} are set, and Mitto throttled that",
        can_be_lifted_by=Lift.TIME,
        how="wait: it climbs back by itself while Mitto does not throttle",
    )


def _full(used: int | None, limit: int | None) -> bool:
    """Whether hardly anything of a limit is left."""
    return limit is not None and used is not None and used >= NEARLY * limit


# --------------------------------------------------------------------------------------- of the lane


def _of_tenant(lane: Lane, unit: str) -> Iterator[Cause]:
    if not lane.ready:
        return
    yield from _of_state(lane)
    requests = _full(lane.requests_used, lane.requests_per_second)
    messages = _full(lane.messages_used, lane.messages_per_second)
    if not (requests or messages or lane.stepped_over_until):
        return
    limit = f"{lane.requests_per_second} requests"
    if messages and not requests:
        limit = f"{lane.messages_per_second} {unit}"
    cause = _cause(
        Code.TENANT_LIMIT,
        f"the tenant is at its limit of {limit} a second",
        lane.ready_since,
        lane.stepped_over_until,
    )
    if messages and not requests:
        cause = cause._replace(how=cause.how.replace("requestsPerSecond", "messagesPerSecond"))
    yield cause


def _of_share(account: Account | None, lane: Lane, found: Sequence[Cause]) -> Iterator[Cause]:
    """The others on an account that is at a limit."""
    contended = any(c.code in (Code.ACCOUNT_LIMIT, Code.INSTALLATION_LIMIT) for c in found)
    if account is None or not contended or account.tenants_awake < 2 or not account.weight_awake:
        return
    share = f"{lane.weight / account.weight_awake:.0%}"
    message = f"others send through this account too: about {share} of its limit is this tenant's, by weight"
    yield _cause(Code.SHARED, message, lane.ready_since)


def _of_batches(lane: Lane) -> Iterator[Cause]:
    split = lane.waiting - lane.retries
    if split and lane.splits_until is not None:
        n = _messages(lane.waiting_messages - lane.retries_messages)
        message = f"{n} of refused batches wait: the search for what Mitto refuses takes 20 splits a minute"
        yield _cause(Code.SPLIT_BUDGET, message, until=lane.splits_until)
    if lane.retries:
        yield _retry(lane)
    if lane.expanding:
        message = f"the audience is being read: {lane.read} of {lane.of} recipients so far"
        yield _cause(Code.EXPANSION, message, since=lane.started_at)


def _retry(lane: Lane) -> Cause:
    answer = f"HTTP {lane.retry_status}" if lane.retry_status else lane.retry_outcome or "none"
    if lane.retry_detail:
        answer += f": {lane.retry_detail}"
    n, times = _messages(lane.retries_messages), f"{lane.tries} time{'s' * (lane.tries != 1)}"
    message = f"{n} were refused for now, up to {times}, and are tried again; the last answer was {answer}"
    return _cause(Code.RETRY, message, lane.retry_since, lane.retry_at)


def _of_unknown(house: Installation, lane: Lane) -> Iterator[Cause]:
    if not lane.unknown_messages:
        return
    n, since = _messages(lane.unknown_messages), lane.unknown_since
    message = f"{n} may or may not have been accepted by Mitto, and are not sent again unasked"
    cause = _cause(Code.UNKNOWN, message, since)
    until = since + house.unknown_after if since else None
    if until is not None and house.now < until:  # evidence may still come
        cause = cause._replace(can_be_lifted_by=Lift.MITTO, until=until)
    yield cause
