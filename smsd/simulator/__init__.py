"""A Mitto look-alike: a real server with a switch for every unknown and fault, and a ledger.

It is the oracle of the system tests, so it shares nothing with the client but the wire's constants
in `smsd.model`. In a test's own process: `async with Simulator(Switches(fail_500=0.1)) as mitto`.
From another one: the control surface (`control.py`).
"""

from smsd.simulator.ledger import Accepted, Duplicate, Ledger, Report, Request
from smsd.simulator.server import Simulator, run
from smsd.simulator.switches import Fault, Magic, Switches

__all__ = [
    "Accepted",
    "Duplicate",
    "Fault",
    "Ledger",
    "Magic",
    "Report",
    "Request",
    "Simulator",
    "Switches",
    "run",
]
