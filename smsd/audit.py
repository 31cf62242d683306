"""The audit: the invariants that a database can show, checked on a live one in one snapshot."""

from dataclasses import dataclass

from smsd import database
from smsd.database import Connection

SQL = database.queries("audit")

PROMISES = {
    "once": "no recipient twice in a campaign, no id on two messages",
    "lost": "every message is spoken for, no campaign sends with nothing to do",
    "totals": "counters equal a count over the messages",
    "money": "ledger, balances and holds add up",
    "orphans": "ids and messages name each other, no known receipt waits",
    "leases": "every lease has a living owner, every open batch a lane that is awake",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant: how much was checked, how much is broken, and one example of that."""

    name: str
    promise: str
    checked: int
    broken: int
    example: str | None


async def run(connection: Connection) -> list[Check]:
    """Checks everything in one read-only snapshot. Reads whole tables: minutes where there are many millions."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        rows = {name: await connection.fetchrow(SQL[name]) for name in PROMISES}
    return [
        Check(name, promise, row["checked"], row["broken"], row["example"])
        for name, promise in PROMISES.items()
        if (row := rows[name]) is not None
    ]
