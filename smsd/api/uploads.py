"""Import of contacts: a CSV kept as it arrives, then read by the importer.

No connection is held while the client sends: each piece is written by itself, and only what is complete is queued.
"""

import contextlib
from codecs import lookup
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Literal

import aiohttp
from aiohttp import web

from smsd import contacts, csvfile, database, imports
from smsd.api.endpoint import Answer, Endpoint, Model, Request
from smsd.api.errors import ApiError, invalid, not_found
from smsd.api.models import Id

LARGEST_UPLOAD = 500_000_000
PIECE_BYTES = 1 << 20
_CSV_TYPES = ("text/csv", "application/csv", "text/plain", "application/vnd.ms-excel")


class ImportQuery(Model):
    """Where the contacts go."""

    list_id: Id | None = None


class ImportAccepted(Model):
    """The bytes are safe; ask for the job."""

    job_id: int
    status: Literal["queued"]


class ImportProgress(Model):
    """Records; `total` is an estimate until the job is done."""

    processed: int
    total: int


class SkippedRecord(Model):
    """A record that could not be taken: the line where it starts, counted from 1."""

    line: int
    value: str
    message: str


class ImportResults(Model):
    """What came of the records; `errors` has the first 1,000."""

    created: int
    updated: int
    skipped: int
    errors: list[SkippedRecord]


class ImportAnswer(Model):
    """How far an import is."""

    job_id: int
    status: Literal["queued", "running", "completed", "failed"]
    progress: ImportProgress
    results: ImportResults
    created_at: datetime
    finished_at: datetime | None


async def import_contacts(req: Request) -> Answer:
    list_id = req.query.list_id
    if list_id is not None and await contacts.get_list(req.db, req.me.id, list_id) is None:
        raise not_found(f"list {list_id}")
    if (req.raw.content_length or 0) > LARGEST_UPLOAD:
        raise _too_large()
    charset, chunks = await _file(req)
    job_id = await imports.begin_upload(req.db, req.me.id, list_id, charset)
    queued = False
    try:
        records = await _keep(req, job_id, chunks)

        async def queue() -> ImportAccepted:
            nonlocal queued
            await imports.finish_upload(req.connection, job_id, records)
            queued = True
            return ImportAccepted(job_id=job_id, status="queued")

        answer = await req.once(queue)
    except imports.UploadGone:
        raise ApiError(
            400, "BAD_REQUEST", "the upload stood still for an hour; send it anew"
        ) from None
    finally:
        if not queued:
            with contextlib.suppress(*database.AWAY):
                await imports.drop_upload(req.ctx.pool, job_id)
    req.after_commit.append(lambda: req.ctx.nudge("importer"))
    return answer


async def get_import(req: Request) -> ImportAnswer:
    job = await imports.get(req.db, req.me.id, req.number("jobId"))
    if job is None:
        raise not_found(f"import {req.number('jobId')}")
    return ImportAnswer(
        job_id=job.id,
        status=job.status,  # type: ignore[arg-type]  # the table takes no other, and shows no upload
        progress=ImportProgress(processed=job.processed, total=job.total),
        results=ImportResults(
            created=job.created,
            updated=job.updated,
            skipped=job.skipped,
            errors=[SkippedRecord(**error) for error in job.errors],
        ),
        created_at=job.created_at,
        finished_at=job.finished_at,
    )


# ------------------------------------------------------------------------------------------- bytes


async def _keep(req: Request, job_id: int, chunks: AsyncIterator[bytes]) -> int:
    """Writes the file in pieces; returns about how many records it has. 400 if it is empty or breaks off, 413 if it
    is too large."""
    piece, start, lines, returns = bytearray(), 0, 0, 0
    try:
        async for chunk in chunks:
            piece += chunk
            lines += chunk.count(b"\n")
            returns += chunk.count(b"\r")
            if start + len(piece) > LARGEST_UPLOAD:
                raise _too_large()
            while len(piece) >= PIECE_BYTES:
                await imports.add_piece(req.ctx.pool, job_id, start, bytes(piece[:PIECE_BYTES]))
                start += PIECE_BYTES
                del piece[:PIECE_BYTES]
    except (aiohttp.ClientPayloadError, aiohttp.http.HttpProcessingError, ValueError) as error:
        raise ApiError(400, "BAD_REQUEST", f"the body cannot be read: {error}") from None
    if piece:
        await imports.add_piece(req.ctx.pool, job_id, start, bytes(piece))
    if not start and not piece:
        raise invalid("file", "", "a CSV with a header; this is empty")
    unended = not piece.endswith((b"\n", b"\r"))
    return max((lines or returns) + unended - 1, 0)


def _too_large() -> ApiError:
    return ApiError(
        413,
        "PAYLOAD_TOO_LARGE",
        f"the file is larger than {LARGEST_UPLOAD} bytes, the most taken; send it in parts",
    )


async def _file(req: Request) -> tuple[str, AsyncIterator[bytes]]:
    """The charset and the bytes of the file: the body, or the first file of a form."""
    if req.raw.content_type == "multipart/form-data":
        part = await _first_file(req.raw)
        return _charset(part.get_charset("utf-8")), _part_chunks(req, part)
    if req.raw.content_type not in _CSV_TYPES:
        raise ApiError(
            415,
            "UNSUPPORTED_MEDIA_TYPE",
            f"Content-Type: got {req.raw.content_type}; takes text/csv, or multipart/form-data with a part `file`",
        )
    return _charset(req.raw.charset or "utf-8"), req.chunks()


def _charset(name: str) -> str:
    try:
        if csvfile.CHARSETS.fullmatch(name):
            return lookup(name).name
    except LookupError:
        pass
    raise invalid("charset", name, "utf-8, or one of iso-8859-1 … and windows-1250 …")


async def _first_file(raw: web.Request) -> aiohttp.BodyPartReader:
    try:
        form = await raw.multipart()
        while (part := await form.next()) is not None:
            if isinstance(part, aiohttp.BodyPartReader) and (part.filename or part.name == "file"):
                return part
    except (
        ValueError,
        AssertionError,
        aiohttp.ClientPayloadError,
        aiohttp.http.HttpProcessingError,
    ) as error:
        raise ApiError(400, "BAD_REQUEST", f"the form cannot be read: {error}") from None
    raise invalid("file", None, "a part named `file` with a CSV; there is none in the form")


async def _part_chunks(req: Request, part: aiohttp.BodyPartReader) -> AsyncIterator[bytes]:
    while chunk := await part.read_chunk(1 << 16):
        req.seen(chunk)
        yield chunk


ENDPOINTS = (
    Endpoint("POST", "/api/contacts/import", import_contacts, "tenant",
             "Import contacts from a CSV, as the body or as a form's part `file`", ImportAccepted, 202,
             query=ImportQuery, raw_body=True, transaction=True, idempotent=True,
             errors=((400, "BAD_REQUEST"), (404, "NOT_FOUND"), (413, "PAYLOAD_TOO_LARGE"),
                     (415, "UNSUPPORTED_MEDIA_TYPE"))),
    Endpoint("GET", "/api/contacts/import/{jobId}", get_import, "tenant", "How far an import is", ImportAnswer),
)  # fmt: skip
