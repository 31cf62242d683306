"""What `/metrics` counts: names, labels and help of every metric, and the words with which the loops report.

Counters belong to this process and are moved once a batch, a group of receipts, a chunk or a request, never once a
message. Gauges are made at each scrape of what stands at that moment (`gauge`), so that what is gone leaves no label
behind. Labels are ids, states and routes: few, and never a number or a text.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from smsd.model import MessageState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry(auto_describe=False)
ProcessCollector(registry=REGISTRY)

BATCHES = Counter(
    "smsd_batches", "Requests to Mitto that left, or tried to, by outcome", ["outcome"],
    registry=REGISTRY,
)  # fmt: skip
MESSAGES = Counter(
    "smsd_messages", "Messages by what Mitto's answer made of them: accepted, refused, unknown",
    ["result"], registry=REGISTRY,
)  # fmt: skip
RECEIPTS = Counter(
    "smsd_receipts",
    "Receipts written: received, applied (moved a message), early (id not known yet), raw (not readable)",
    ["what"], registry=REGISTRY,
)  # fmt: skip
EXPANDED = Counter(
    "smsd_expanded_recipients", "Recipients that were read: message or skipped", ["became"],
    registry=REGISTRY,
)  # fmt: skip
HTTP = Histogram(
    "smsd_http_request_seconds", "Time that requests to the API took, by route and status",
    ["method", "route", "status"], registry=REGISTRY,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)  # fmt: skip
LOOP_LAG = Histogram(
    "smsd_loop_lag_seconds", "How much later than asked the event loop came back to a sleeper",
    registry=REGISTRY, buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)  # fmt: skip

_COUNTS = {
    "granted": ("smsd_grants", "Slots granted under the limits, one a batch"),
    "withdrawn": ("smsd_grants_returned", "Grants given back since their slot was missed or we stopped"),
    "late": ("smsd_late_arrivals", "Requests kept counted, as they may have arrived after their slot"),
    "throttled": ("smsd_throttled", "Answers by which Mitto asked an account to wait"),
    "breaker_opened": ("smsd_breakers_opened", "Times that an account's circuit breaker opened"),
}  # fmt: skip

_observers: dict[tuple[str, str, int], Histogram] = {}


def batch_settled(
    outcome: str, became: str, n: int, states: list[MessageState] | None = None
) -> None:
    """One request to Mitto is over. `became`: what settle said of the batch; `states`: of its messages, where Mitto
    decided item by item; `n`: how many they are."""
    BATCHES.labels(outcome).inc()
    if states:
        accepted = states.count(MessageState.ACCEPTED)
        refused = states.count(MessageState.REFUSED)
        MESSAGES.labels("accepted").inc(accepted)
        MESSAGES.labels("refused").inc(refused)
        MESSAGES.labels("unknown").inc(len(states) - accepted - refused)
    elif became in ("failed", "unknown"):
        MESSAGES.labels("refused" if became == "failed" else "unknown").inc(n)


def receipts(*, received: int = 0, applied: int = 0, early: int = 0, raw: int = 0) -> None:
    """A group of receipts is written."""
    counts = {"received": received, "applied": applied, "early": early, "raw": raw}
    for what, n in counts.items():
        if n:
            RECEIPTS.labels(what).inc(n)


def expanded(messages: int, skipped: int) -> None:
    """A chunk of an audience was read."""
    EXPANDED.labels("message").inc(messages)
    EXPANDED.labels("skipped").inc(skipped)


def request_answered(method: str, route: str, status: int, seconds: float) -> None:
    """One request to the API was answered. `route`: its template, never the path itself, which anybody may make up."""
    key = (method, route, status)
    observer = _observers.get(key)
    if observer is None:
        observer = _observers[key] = HTTP.labels(method, route, str(status))
    observer.observe(seconds)


class Sleeper:
    """Measures the loop's lag: `slept(seconds)` right after a sleep that was to take so long."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def slept(self, seconds: float) -> None:
        now = time.monotonic()
        LOOP_LAG.observe(max(0.0, now - self._since - seconds))
        self._since = now


# ----------------------------------------------------------------------------------------- a scrape


def gauge(
    name: str,
    text: str,
    values: float | Mapping[Sequence[str] | str, float],
    labels: Sequence[str] = (),
) -> GaugeMetricFamily:
    """What stands at this moment: one value, or values by their labels."""
    if not isinstance(values, Mapping):
        return GaugeMetricFamily(name, text, value=values)
    family = GaugeMetricFamily(name, text, labels=labels)
    for label, value in values.items():
        family.add_metric([label] if isinstance(label, str) else list(label), value)
    return family


def sender_counts(counts: Mapping[str, int]) -> Iterator[Metric]:
    """What the sender counts by itself."""
    for key, (name, text) in _COUNTS.items():
        yield CounterMetricFamily(name, text, value=counts.get(key, 0))


class _Scrape:
    """The registry's metrics with those of this moment."""

    def __init__(self, moment: Iterable[Metric]) -> None:
        self._moment = moment

    def collect(self) -> Iterator[Metric]:
        yield from REGISTRY.collect()
        yield from self._moment


def exposition(moment: Iterable[Metric]) -> bytes:
    """All metrics in Prometheus' text format 0.0.4; `moment` are those made for this scrape."""
    return prometheus_client.generate_latest(_Scrape(moment))
