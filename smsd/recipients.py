"""Recipients uploaded for one campaign: CSV or NDJSON as it arrives, in blocks, constant memory.

Pure, like `csvfile`. A line that cannot be read is told and left out; a number that cannot be read is told and kept
as it is spelled, so that the campaign shows that recipient as skipped.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson

from smsd import csvfile, text
from smsd.csvfile import CellError, HeaderError, Recipient

BLOCK = 2_000
"""Recipients that are handed over at once, at most (and a slice)."""
LINE_BYTES = csvfile.RECORD_BYTES
_ROWS_BETWEEN_YIELDS = 250


class BadLine(NamedTuple):
    """A line with something that cannot be taken: its number from 1, the value, and what is taken."""

    line: int
    value: str
    message: str


@dataclass(slots=True)
class Block:
    """What the next lines came to."""

    recipients: list[Recipient] = field(default_factory=list)
    errors: list[BadLine] = field(default_factory=list)


async def parse(
    chunks: AsyncIterable[bytes], content_type: str, charset: str, country: str
) -> AsyncIterator[Block]:
    """Blocks of recipients while their bytes arrive; other tasks run in between. content_type: one of FORMATS;
    national numbers are those of `country`. Raises HeaderError for a CSV that cannot be read at all."""
    reader = FORMATS[content_type](charset, country)
    block = Block()
    async for chunk in _and_end(chunks):
        if chunk is None:
            reader.end()
        else:
            reader.feed(chunk)
        while lines := reader.read(_ROWS_BETWEEN_YIELDS):
            _add(block, lines, country)
            if len(block.recipients) + len(block.errors) >= BLOCK:
                yield block
                block = Block()
            await asyncio.sleep(0)
    if block.recipients or block.errors:
        yield block


async def _and_end(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes | None]:
    async for chunk in chunks:
        yield chunk
    yield None


def _add(block: Block, lines: list[tuple[int, Recipient | BadLine]], country: str) -> None:
    for line, one in lines:
        if isinstance(one, BadLine):
            block.errors.append(one)
            continue
        block.recipients.append(one)
        if one.raw is not None:
            message = str(text.InvalidPhone(one.raw, country))
            block.errors.append(BadLine(line, one.raw, message))


class _Csv:
    def __init__(self, charset: str, country: str) -> None:
        self._charset, self._country = charset, country
        self._head = b""
        self._reader: csvfile.Reader | None = None

    def feed(self, data: bytes) -> None:
        if self._reader:
            self._reader.feed(data)
            return
        self._head += data
        if len(self._head) >= LINE_BYTES:
            self._begin(ended=False)

    def end(self) -> None:
        if self._reader:
            self._reader.end()
        else:
            self._begin(ended=True)

    def _begin(self, *, ended: bool) -> None:
        header, self._reader = csvfile.read_header(self._head, self._charset, ended)
        self._columns = csvfile.Columns(header.names)

    def read(self, most: int) -> list[tuple[int, Recipient | BadLine]]:
        records = self._reader.read(most) if self._reader else ()
        return [(record.line, self._one(record)) for record in records]

    def _one(self, record: csvfile.Record) -> Recipient | BadLine:
        if record.problem:
            shown = record.cells[0][: csvfile.NAME_CHARACTERS]
            return BadLine(record.line, shown, record.problem)
        try:
            return self._columns.recipient(record.cells, self._country)
        except CellError as error:
            return BadLine(record.line, error.value, str(error))


class _Json:
    def __init__(self, charset: str, country: str) -> None:
        self._country = country
        self._lines: deque[bytes] = deque()
        self._tail = b""
        self._line = 0

    def feed(self, data: bytes) -> None:
        *lines, self._tail = (self._tail + data).split(b"\n")
        self._lines.extend(lines)
        if len(self._tail) > LINE_BYTES:
            raise HeaderError(
                f"line {self._line + len(self._lines) + 1} has more than {LINE_BYTES} bytes; takes one JSON object a "
                "line: {phone, …values}",
                self._tail[: csvfile.NAME_CHARACTERS].decode(errors="replace"),
            )

    def end(self) -> None:
        self._lines.append(self._tail)
        self._tail = b""

    def read(self, most: int) -> list[tuple[int, Recipient | BadLine]]:
        found: list[tuple[int, Recipient | BadLine]] = []
        while self._lines and len(found) < most:
            self._line += 1
            if line := self._lines.popleft().strip():
                found.append((self._line, self._one(line)))
        return found

    def _one(self, line: bytes) -> Recipient | BadLine:
        try:
            phone, values = _fields(line)
        except CellError as error:
            return BadLine(self._line, error.value, str(error))
        return csvfile.recipient(phone, values, self._country)


def _fields(line: bytes) -> tuple[str, dict[str, str]]:
    """The number as it is spelled, and the values of a JSON line. Raises CellError."""
    try:
        given = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise CellError(f"takes one JSON object a line: {error}", _shown(line)) from None
    if not isinstance(given, dict):
        raise CellError("takes one JSON object a line: {phone, …values}", _shown(line))
    if len(given) > csvfile.COLUMNS:
        raise CellError(f"has {len(given)} fields; takes {csvfile.COLUMNS} at most", _shown(line))
    phone, values = None, {}
    for name, value in given.items():
        spelled = _text(name, value)
        if csvfile.is_phone(name):
            phone = spelled
        elif spelled:
            values[name] = spelled
    if phone is None:
        raise CellError("has no phone; takes {phone, …values}", _shown(line))
    return phone, values


def _text(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float):
        raise CellError(f"{name[:100]}: takes a text, a number, true, false or null", str(value))
    spelled = str(value).strip()
    try:
        text.check_text(name + spelled)
    except text.TextError:
        raise CellError(f"{name[:100]!a}: takes text without control characters", spelled) from None
    if len(name) > csvfile.NAME_CHARACTERS:
        raise CellError(f"takes names of {csvfile.NAME_CHARACTERS} characters at most", name)
    if len(spelled) > csvfile.CELL_CHARACTERS:
        raise CellError(f"{name}: takes {csvfile.CELL_CHARACTERS} characters at most", spelled)
    return spelled


def _shown(line: bytes) -> str:
    return line[: 4 * csvfile.NAME_CHARACTERS].decode(errors="replace")


FORMATS: Mapping[str, type[_Csv | _Json]] = {
    "text/csv": _Csv,
    "application/csv": _Csv,
    "application/x-ndjson": _Json,
    "application/ndjson": _Json,
    "application/jsonl": _Json,
    "application/json": _Json,
}
"""The content types that can be read."""
