"""Import jobs: an upload kept in pieces, and how far contacts have been made of it.

A block is one transaction: contacts, list, opt-outs, counts, and the cursor past what they were made of. It commits
only while its job is still owned by who read it and stands where it was read, so whoever goes on after a crash
counts nothing twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, NamedTuple

import orjson

from smsd import database
from smsd.csvfile import ContactRow
from smsd.database import Connection, Executor, Pool

SQL = database.queries("imports")

ERRORS_KEPT = 1_000


class UploadGone(Exception):  # noqa: N818 - a fact, not a fault
    """The upload that bytes were to be added to was dropped as stale."""


@dataclass(frozen=True, slots=True)
class Import:
    """A job as its tenant sees it. errors: the first ERRORS_KEPT of {line, value, message}."""

    id: int
    status: str
    processed: int
    total: int
    created: int
    updated: int
    skipped: int
    errors: list[dict[str, Any]]
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it was claimed. cursor, line: where its next record starts; kept: errors that it has already."""

    id: int
    tenant_id: int
    list_id: int | None
    size: int
    cursor: int
    line: int
    header: dict[str, Any]
    kept: int
    default_country: str


class Arrays(NamedTuple):
    """Contacts column by column, as one statement takes them. attributes: JSON."""

    phones: list[int]
    first_names: list[str | None]
    last_names: list[str | None]
    emails: list[str | None]
    genders: list[str | None]
    birthdays: list[date | None]
    attributes: list[str]
    opted_out: list[int]


@dataclass(slots=True)
class Block:
    """What the next records came to, and where the one after them starts. `taken` counts the records that are in
    `rows`, which has one row a number."""

    header: dict[str, Any]
    cursor: int = 0
    line: int = 1
    rows: dict[int, ContactRow] = field(default_factory=dict)
    taken: int = 0
    skipped: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: ContactRow) -> None:
        """One more record; a number's later values go before its earlier ones."""
        before = self.rows.get(row.phone)
        self.rows[row.phone] = row if before is None else _merged(before, row)
        self.taken += 1

    def skip(self, line: int, value: str, message: str) -> None:
        """One record that cannot be taken."""
        self.errors.append(problem(line, value, message))
        self.skipped += 1

    def arrays(self) -> Arrays:
        """The rows as a statement takes them."""
        rows = list(self.rows.values())
        return Arrays(
            phones=[row.phone for row in rows],
            first_names=[row.first_name for row in rows],
            last_names=[row.last_name for row in rows],
            emails=[row.email for row in rows],
            genders=[row.gender for row in rows],
            birthdays=[row.birthday for row in rows],
            attributes=[orjson.dumps(row.attributes).decode() for row in rows],
            opted_out=[row.phone for row in rows if row.subscribed is False],
        )


def problem(line: int, value: str, message: str) -> dict[str, Any]:
    """An error as a job keeps it."""
    return {"line": line, "value": value.replace("\0", "\ufffd"), "message": message}


def _merged(before: ContactRow, row: ContactRow) -> ContactRow:
    newest = {
        name: value if value is not None else getattr(before, name)
        for name, value in row._asdict().items()
    }
    newest["attributes"] = before.attributes | row.attributes
    if before.subscribed is False:
        newest["subscribed"] = False
    return ContactRow(**newest)


# ----------------------------------------------------------------------------------------- uploads


async def begin_upload(db: Executor, tenant_id: int, list_id: int | None, charset: str) -> int:
    """A job that nobody takes before `finish_upload`; its id."""
    return int(await db.fetchval(SQL["begin_upload"], tenant_id, list_id, {"charset": charset}))


async def add_piece(db: Executor, job_id: int, start: int, data: bytes) -> None:
    """Keeps the bytes of an upload from `start` on, which is as far as it has come. Raises UploadGone."""
    if await db.execute(SQL["add_piece"], job_id, start, data) != "INSERT 0 1":
        raise UploadGone


async def finish_upload(db: Executor, job_id: int, records: int) -> None:
    """The upload is complete, with about so many records: it may be taken. Raises UploadGone."""
    if await db.fetchval(SQL["finish_upload"], job_id, records) is None:
        raise UploadGone


async def drop_upload(db: Executor, job_id: int) -> None:
    """Forgets an upload that is not finished."""
    await db.execute(SQL["drop_upload"], job_id)


async def drop_stale_uploads(db: Executor) -> int:
    """Forgets uploads that broke off an hour ago; how many there were."""
    return len(await db.fetch(SQL["drop_stale_uploads"]))


async def get(db: Executor, tenant_id: int, job_id: int) -> Import | None:
    """The job, or None."""
    row = await db.fetchrow(SQL["show_import"], tenant_id, job_id)
    return Import(**row) if row else None


# ------------------------------------------------------------------------------------------ blocks


async def claim(db: Executor, replica_id: int) -> Job | None:
    """The job that was moved least recently, owned by this replica; None where there is nothing to do."""
    row = await db.fetchrow(SQL["claim_import"], replica_id)
    return Job(**row) if row else None


async def read(db: Executor, job: Job, offset: int, most: int) -> bytes:
    """Up to `most` bytes of the upload from `offset` on; none at its end."""
    return await db.fetchval(SQL["read_upload"], job.id, offset, most) or b""


async def write(pool: Pool, job: Job, replica_id: int, block: Block, arrays: Arrays) -> bool:
    """Writes a block and moves the job past it, to its end if that was all. False: the job moved on without us, and
    nothing was written."""
    async with pool.acquire() as connection, connection.transaction():
        if await connection.fetchval(SQL["lock_import"], job.id, replica_id, job.cursor) is None:
            return False
        created = await _import_contacts(connection, job, arrays)
        if created is None:
            gone = problem(block.line, str(job.list_id), "the list was deleted; import without it")
            await _fail(connection, job, replica_id, gone)
            return True
        last = block.cursor >= job.size
        await connection.execute(
            SQL["advance_import"],
            job.id, block.cursor, block.line, block.header, created, block.taken - created, block.skipped,
            block.errors[: max(ERRORS_KEPT - job.kept, 0)], last,
        )  # fmt: skip
        if last:
            await connection.execute(SQL["drop_pieces"], job.id)
        return True


async def fail(pool: Pool, job: Job, replica_id: int, error: dict[str, Any]) -> None:
    """The file cannot be read on; `error` is a `problem`."""
    async with pool.acquire() as connection, connection.transaction():
        await _fail(connection, job, replica_id, error)


async def _fail(connection: Connection, job: Job, replica_id: int, error: dict[str, Any]) -> None:
    if await connection.fetchval(SQL["fail_import"], job.id, replica_id, [error]) is not None:
        await connection.execute(SQL["drop_pieces"], job.id)


async def _import_contacts(connection: Connection, job: Job, arrays: Arrays) -> int | None:
    columns: Sequence[object] = arrays
    created: int | None = await connection.fetchval(
        SQL["import_contacts"], job.tenant_id, job.list_id, *columns
    )
    return created
