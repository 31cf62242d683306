"""The account of a whole campaign: its certificate, and the lines that the certificate's hash is over."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from typing import BinaryIO, Literal

from aiohttp import web
from pydantic import Field

from smsd import certificates
from smsd.api.checks import campaign_of, kept, refused
from smsd.api.endpoint import Endpoint, Model, Request
from smsd.api.errors import ApiError, not_found
from smsd.api.messages import MessageStatus
from smsd.api.sending import ExpansionAnswer
from smsd.certificates import Certificate
from smsd.database import Connection, Pool
from smsd.model import CampaignStatus

READERS = 2
"""Whole campaigns read at once in this process; each takes a connection of the pool meanwhile."""
SEATS = 4
"""Whole campaigns that a tenant may be reading or downloading at once."""
PIECE_BYTES = 1 << 18
STALL_SECONDS = 60.0
"""A reader that takes nothing for so long is let go."""


class Desk:
    """Where whole campaigns are read: few at a time, and no tenant takes all the room."""

    def __init__(self) -> None:
        self._reading = asyncio.Semaphore(READERS)
        self._present: Counter[int] = Counter()

    @contextmanager
    def seat(self, tenant_id: int) -> Iterator[None]:
        """A place for one request of a tenant's; 429 where it has too many."""
        if self._present[tenant_id] >= SEATS:
            raise ApiError(
                429,
                "TOO_MANY_DOWNLOADS",
                f"{SEATS} certificates or downloads are under way, the most at once; wait for one to end",
            )
        self._present[tenant_id] += 1
        try:
            yield
        finally:
            self._present[tenant_id] -= 1
            self._present += Counter()  # forgets those at zero

    @asynccontextmanager
    async def snapshot(self, pool: Pool) -> AsyncIterator[Connection]:
        """A connection on which everything read is of one moment."""
        async with self._reading, pool.acquire() as db, certificates.snapshot(db):
            yield db


DESK = web.AppKey("desk", Desk)


# ------------------------------------------------------------------------------------------- shapes


class CertifiedCampaign(Model):
    """The campaign that is certified. `startedAt`: when it was enqueued."""

    id: int
    name: str
    status: CampaignStatus
    text_sha256: str = Field(
        alias="textSha256", description="SHA-256 of messageText in UTF-8, in hex"
    )
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class CertifiedReasons(Model):
    """Why, in messages by reason. `pending`: those that a person said Mitto took."""

    pending: dict[str, int]
    refused: dict[str, int]
    unknown: dict[str, int]
    skipped: dict[str, int]


class CertifiedCredits(Model):
    """held + overdue = spent + released + reserved. `reservedForUnknown` is a part of `reserved`."""

    held: int
    spent: int
    released: int
    reserved: int
    reserved_for_unknown: int
    overdue: int = Field(
        description="Spent with nothing held for it: Mitto had taken what a person said had failed"
    )


class CertificateAnswer(Model):
    """The account of a campaign at one moment: recipients = delivered + pending + deliveryFailed + refused + unknown +
    cancelled + skipped + queued + processing."""

    campaign: CertifiedCampaign
    final: bool = Field(
        description="It is over: nothing is queued or processing. What is pending or unknown may still move"
    )
    at: datetime = Field(description="The moment that all of this is of")
    recipients: int
    delivered: int
    pending: int = Field(description="Accepted by Mitto, no final receipt yet")
    delivery_failed: int
    refused: int
    unknown: int
    cancelled: int
    skipped: int
    queued: int
    processing: int
    reasons: CertifiedReasons
    segments: int
    credits: CertifiedCredits
    expansion: ExpansionAnswer
    lines: int = Field(description="Lines of messages.csv after the header: one a recipient")
    erased: int = Field(
        description="Lines whose recipient was erased: they say `erased` where the number stood"
    )
    messages_removed_at: datetime | None = Field(
        description="Since when there are no lines any more; the hash is of what they were"
    )
    sha256: str = Field(description="Of exactly the bytes of those lines, in hex")
    algorithm: Literal["SHA-256"]
    format: str = Field(description="Version of the format of the lines; see docs/certificate.md")


def shape(certificate: Certificate) -> CertificateAnswer:
    """The answer of a certificate."""
    campaign, sums, progress = certificate.campaign, certificate.totals, certificate.progress
    money = certificate.credits
    return CertificateAnswer(
        campaign=CertifiedCampaign(
            id=campaign.id, name=campaign.name, status=campaign.status,
            text_sha256=certificate.text_sha256, created_at=campaign.created_at,
            started_at=campaign.started_at, finished_at=campaign.finished_at,
        ),
        final=certificate.final,
        at=progress.now,
        recipients=sums.total, delivered=sums.delivered, pending=sums.pending,
        delivery_failed=sums.delivery_failed, refused=sums.refused, unknown=sums.unknown,
        cancelled=sums.cancelled, skipped=sums.skipped, queued=sums.queued, processing=sums.processing,
        reasons=CertifiedReasons(**certificate.reasons),
        segments=certificate.segments,
        credits=CertifiedCredits(
            held=money.held, spent=money.spent, released=money.released, reserved=money.reserved,
            reserved_for_unknown=money.unknown, overdue=money.overdue,
        ),
        expansion=ExpansionAnswer(done=progress.expanded, read=progress.read, of=progress.of),
        lines=sums.total,
        erased=certificate.erased,
        messages_removed_at=campaign.removed_at,
        sha256=certificate.sha256,
        algorithm="SHA-256",
        format=certificates.FORMAT,
    )  # fmt: skip


class LinesQuery(Model):
    """Which lines; the certificate's hash is over all of them."""

    status: MessageStatus | None = None


# ----------------------------------------------------------------------------------------- handlers


async def get_certificate(req: Request) -> CertificateAnswer:
    desk = req.raw.app[DESK]
    await campaign_of(req)
    with desk.seat(req.me.id), refused("certified"):
        async with desk.snapshot(req.ctx.pool) as db:
            certificate = await certificates.issue(db, req.me.id, req.id)
    if certificate is None:
        raise not_found(f"campaign {req.id}")
    return shape(certificate)


async def messages_csv(req: Request) -> web.StreamResponse:
    desk, status = req.raw.app[DESK], req.query.status
    await campaign_of(req)
    with desk.seat(req.me.id), kept():
        try:
            async with certificates.scratch() as file:
                file.write(certificates.HEADER)
                async with desk.snapshot(req.ctx.pool) as db:
                    digest = await certificates.spool(db, req.id, file, status)
                return await _send(req, file, digest if status is None else None)
        except certificates.NoRoom as error:
            raise ApiError(503, "NO_ROOM", f"the lines find no room on disk ({error})") from None


async def _send(req: Request, file: BinaryIO, digest: str | None) -> web.StreamResponse:
    """Streams what was written, at the reader's pace: the database is let go by now."""
    response = web.StreamResponse(
        headers={
            "Content-Disposition": f'attachment; filename="campaign-{req.id}-messages.csv"',
            "Content-Type": "text/csv; charset=utf-8; header=present",
            "Cache-Control": "no-store",
        }
        | ({"X-Lines-SHA256": digest} if digest else {})
    )
    response.content_length = file.tell()
    file.seek(0)
    try:
        await response.prepare(req.raw)
        while req.raw.method != "HEAD" and (
            piece := await asyncio.to_thread(file.read, PIECE_BYTES)
        ):
            async with asyncio.timeout(STALL_SECONDS):
                await response.write(piece)
    except (ConnectionError, TimeoutError):  # the reader left, or sleeps
        if req.raw.transport is not None:
            req.raw.transport.abort()
    return response


_ONE = "/api/campaigns/{id}"

ENDPOINTS = (
    Endpoint("GET", _ONE + "/certificate", get_certificate, "tenant",
             "The account of a campaign with a hash over its lines", CertificateAnswer,
             errors=((409, "INVALID_STATUS"), (429, "TOO_MANY_DOWNLOADS"))),
    Endpoint("GET", _ONE + "/messages.csv", messages_csv, "tenant",
             "The lines of a campaign, one a recipient, by id", None, query=LinesQuery,
             errors=((410, "MESSAGES_REMOVED"), (429, "TOO_MANY_DOWNLOADS"), (503, "NO_ROOM")),
             media_type="text/csv"),
)  # fmt: skip
