"""The importer: makes contacts of uploaded files, block by block.

One block at a time, of the job that was moved least recently, so that a small file does not wait for a large one.
Cells are read and numbers parsed in a worker thread, which lets go of the interpreter after every few rows: the event
loop has sends and receipts to see to.
"""

import asyncio
import time
from collections.abc import Callable

import asyncpg
import structlog

from smsd import csvfile, database, imports, telemetry
from smsd.csvfile import CellError, Columns, Header, HeaderError, Reader
from smsd.database import Pool
from smsd.imports import Block, Job
from smsd.loops import first_of

log = structlog.get_logger()

BLOCK_RECORDS = 2_500
READ_BYTES = 1 << 18
SLOW_LOOK_SECONDS = 1.0
_ROWS_BETWEEN_YIELDS = 20
# Nothing of the block was written, or all of it: either way it is read again from where the job stands.
_INTERRUPTED: tuple[type[BaseException], ...] = (*database.AWAY, asyncpg.TransactionRollbackError)


class Importer:
    """The loop of the daemon that reads what was uploaded."""

    def __init__(self, pool: Pool, get_replica_id: Callable[[], int | None]) -> None:
        self._pool, self._get_replica_id = pool, get_replica_id
        self._news = asyncio.Event()

    def wake(self) -> None:
        """News: a file was uploaded."""
        self._news.set()

    async def run(self) -> None:
        """Imports block after block until cancelled."""
        while True:
            self._news.clear()
            try:
                replica_id = self._get_replica_id()
                if replica_id and await self.import_block(replica_id):
                    continue
            except _INTERRUPTED as error:
                log.warning("import.interrupted", error=repr(error))
            except (
                Exception
            ) as error:  # of the look at what waits: a file's own fault fails its job
                log.error(
                    "import.broken", error=type(error).__name__, stack=telemetry.stack_of(error)
                )
            await first_of(SLOW_LOOK_SECONDS, self._news)

    async def import_block(self, replica_id: int) -> bool:
        """Imports the next block of the job whose turn it is. False: there is none."""
        job = await imports.claim(self._pool, replica_id)
        if job is None:
            return False
        bound = log.bind(tenant=job.tenant_id, job=job.id)
        try:
            block = await self._read(job)
            arrays = await asyncio.to_thread(block.arrays)
            written = await imports.write(self._pool, job, replica_id, block, arrays)
        except HeaderError as error:
            bound.info("import.failed", reason=str(error))
            await imports.fail(
                self._pool, job, replica_id, imports.problem(1, error.value, str(error))
            )
        except _INTERRUPTED:
            raise
        except Exception as error:
            # Only a hole in the checks before can come to this; the job must not be tried for ever.
            fault = type(error).__name__
            bound.error("import.failed", reason=fault, stack=telemetry.stack_of(error))
            message = f"the file cannot be read on from here ({fault}); the log has more"
            await imports.fail(self._pool, job, replica_id, imports.problem(job.line, "", message))
        else:
            bound.info(
                "import.block_written" if written else "import.moved_on",
                taken=block.taken, skipped=block.skipped, cursor=block.cursor, size=job.size,
            )  # fmt: skip
        return True

    async def _read(self, job: Job) -> Block:
        """The next BLOCK_RECORDS records of a job, or its last ones. Raises HeaderError."""
        if "names" in job.header:
            header, fed = Header(**job.header), job.cursor
            reader = Reader(header.delimiter, header.charset, job.cursor, job.line)
        else:
            head = await self._head(job)
            header, reader = csvfile.read_header(head, job.header["charset"], len(head) >= job.size)
            fed = len(head)
        take = _Take(reader, Columns(header.names), job.default_country, Block(header._asdict()))
        data = b""
        while not await asyncio.to_thread(take, data) and fed < job.size:
            data = await self._bytes(job, fed)
            fed += len(data)
            if fed >= job.size:
                await asyncio.to_thread(take, data, last=True)
                break
        block = take.block
        block.cursor, block.line = reader.offset, reader.line
        return block

    async def _head(self, job: Job) -> bytes:
        head = b""
        while len(head) < min(csvfile.RECORD_BYTES, job.size):
            head += await self._bytes(job, len(head))
        return head

    async def _bytes(self, job: Job, offset: int) -> bytes:
        data = await imports.read(self._pool, job, offset, READ_BYTES)
        if not data:
            raise HeaderError(
                f"the upload ends at byte {offset} of {job.size}; upload it again", ""
            )
        return data


class _Take:
    """Takes records out of what has been read and into a block. Runs in a worker thread, one call at a time."""

    def __init__(self, reader: Reader, columns: Columns, country: str, block: Block) -> None:
        self.block = block
        self._reader, self._columns, self._country = reader, columns, country

    def __call__(self, data: bytes, *, last: bool = False) -> bool:
        """True: the block is full. False: it takes more of the file, and of this nothing is left."""
        self._reader.feed(data)
        if last:
            self._reader.end()
        while (wanted := BLOCK_RECORDS - self.block.taken - self.block.skipped) > 0:
            records = self._reader.read(min(wanted, _ROWS_BETWEEN_YIELDS))
            for record in records:
                self._add(record)
            if not records:
                return False
            time.sleep(0)
        return True

    def _add(self, record: csvfile.Record) -> None:
        if record.problem:
            self.block.skip(record.line, record.cells[0], record.problem)
            return
        try:
            self.block.add(self._columns.contact(record.cells, self._country))
        except CellError as error:
            self.block.skip(record.line, error.value, str(error))
