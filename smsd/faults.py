"""Faults on purpose: named points at which a process kills or stops itself, so that tests can show that neither
matters. Nothing happens unless `SMSD_FAULT` names one.

`SMSD_FAULT=intent.written:3:kill` kills this process as it passes that point for the third time; `stop` in place of
`kill` stops it there, until somebody sends it SIGCONT. Several are separated by commas.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable

POINTS = (
    "claim.asking",  # nothing is leased yet
    "claim.granted",  # leased, with its grant
    "intent.writing",
    "intent.written",  # committed
    "gate.passed",  # not one byte has left
    "body.sent",  # every byte was handed to the kernel
    "answer.read",
    "settle.writing",
    "settle.written",  # committed
    "chunk.writing",
    "chunk.written",  # committed, its lane not woken yet
    "receipts.writing",
    "receipts.written",  # committed, not answered yet
    "retention.certified",  # a certificate was made and is not kept yet
    "retention.piece",  # committed
)
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def _nothing(_name: str) -> None:
    """What passing a point costs when nothing is to happen there."""


def _armed(orders: str) -> Callable[[str], None]:
    wanted: dict[tuple[str, int], signal.Signals] = {}
    for order in orders.split(","):
        name, passage, action = order.split(":")
        if name not in POINTS:
            raise ValueError(f"SMSD_FAULT={orders}: {name} is none of {', '.join(POINTS)}")
        wanted[name, int(passage)] = SIGNALS[action]
    passed: Counter[str] = Counter()

    def pass_point(name: str) -> None:
        passed[name] += 1
        if (number := wanted.get((name, passed[name]))) is not None:
            os.kill(os.getpid(), number)

    return pass_point


point: Callable[[str], None] = (
    _armed(os.environ["SMSD_FAULT"]) if os.environ.get("SMSD_FAULT") else _nothing
)
"""Passes the point of this name; one of POINTS."""
