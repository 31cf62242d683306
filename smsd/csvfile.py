"""CSV as people's spreadsheets write it: bytes in, records and contacts out.

Pure, and made to be broken off: after each record the place of the next one is known, as byte and as line, and only
what is not read yet is held, whatever the size of the file. A record that cannot be read is told by its line and does
not spoil the next one, not even where a quote was never closed.
"""

import codecs
import csv
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from typing import NamedTuple, TypeVar

from smsd import text

RECORD_BYTES = 1 << 16
CELL_CHARACTERS = 1_000
COLUMNS = 200
NAME_CHARACTERS = 100

CHARSETS = re.compile(r"utf-8|us-ascii|iso-8859-\d+|windows-125\d", re.IGNORECASE)
"""Declared encodings that are taken: those in which a line break is one byte that is nothing else."""

_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_MARKS = {
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"PK\x03\x04": "an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
}
_SAID = {
    "unexpected end of data": "a quote that opens a cell is never closed",
    "expected after": "a quoted cell goes on after its closing quote; a quote inside it is written twice",
}


class HeaderError(ValueError):
    """The file cannot be read at all. The message says what it has and what is taken; `value` is its first line."""

    def __init__(self, message: str, value: str) -> None:
        super().__init__(message)
        self.value = value[:CELL_CHARACTERS]


class CellError(ValueError):
    """One record cannot be taken: `value` is the cell that is wrong."""

    def __init__(self, message: str, value: str) -> None:
        super().__init__(message)
        self.value = value[:NAME_CHARACTERS]


class Record(NamedTuple):
    """One record; `line` is where it starts, counted from 1. With a `problem`, `cells` is its first line as text."""

    line: int
    cells: list[str]
    problem: str | None


# ----------------------------------------------------------------------------------------- records


class _MoreNeeded(Exception):  # noqa: N818 - not an error
    pass


class _Cut(bytes):
    """The beginning of a line that is too long to be held; `size` is its length in the file."""

    size: int


class Reader:
    """Cuts what it is fed into records. `offset` and `line` tell where the next record starts."""

    def __init__(
        self, delimiter: str, charset: str = "utf-8", offset: int = 0, line: int = 1
    ) -> None:
        self.offset, self.line = offset, line
        self.delimiter, self.charset = delimiter, charset
        self._lines: deque[bytes] = deque()
        self._tail = b""  # the line whose end was not fed yet
        self._beyond = 0  # bytes of that line that were not kept
        self._ended = False
        self._taken: list[bytes] = []
        self._size = 0
        self._problem: str | None = None
        self._records = self._start()

    def feed(self, data: bytes) -> None:
        """More of the file."""
        lines = (self._tail + data).splitlines(keepends=True)
        # A "\r" at the end may be half of a "\r\n".
        self._tail = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        if lines and self._beyond:
            lines[0] = self._cut(lines[0])
        self._lines.extend(lines)
        if len(self._tail) > RECORD_BYTES:
            self._beyond += len(self._tail) - RECORD_BYTES
            self._tail = self._tail[: RECORD_BYTES - 1] + self._tail[-1:]

    def end(self) -> None:
        """That was all of the file."""
        if self._tail:
            self._lines.append(self._cut(self._tail) if self._beyond else self._tail)
        self._tail = b""
        self._ended = True

    def read(self, most: int) -> list[Record]:
        """Up to `most` records, blank ones left out. Fewer: feed more, or the file is read."""
        records: list[Record] = []
        while len(records) < most:
            try:
                cells = next(self._records)
            except (_MoreNeeded, StopIteration):
                self._give_back(0)
                break
            except csv.Error as error:
                self._problem = _said(str(error))
                # What a stray quote swallowed are records of their own.
                self._give_back(1)
            problem, line = self._problem, self.line
            if problem is not None:
                cells = [self._taken[0].decode(self.charset, "replace").rstrip("\r\n")]
            self.offset += self._size
            self.line += len(self._taken)
            self._taken, self._size, self._problem = [], 0, None
            if problem is not None or any(map(str.strip, cells)):
                records.append(Record(line, cells, problem))
        return records

    def _start(self) -> Iterator[list[str]]:
        return csv.reader(iter(self._next_line, None), delimiter=self.delimiter, strict=True)

    def _next_line(self) -> str | None:
        if not self._lines:
            if self._ended:
                return None
            raise _MoreNeeded
        raw = self._lines.popleft()
        self._taken.append(raw)
        self._size += _size(raw)
        if self._size > RECORD_BYTES:
            raise csv.Error("too long")
        if self.offset == 0 and len(self._taken) == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if found := _CONTROL.search(raw):
            self._problem = f"has a control character, U+{found[0][0]:04X}; remove it"
        try:
            return raw.decode(self.charset)
        except UnicodeDecodeError:
            self._problem = (
                f"is not {self.charset.upper()}; save the file as CSV UTF-8, or send its encoding, such as "
                "Content-Type: text/csv; charset=iso-8859-7"
            )
            return raw.decode(self.charset, "replace")

    def _give_back(self, keep: int) -> None:
        self._lines.extendleft(reversed(self._taken[keep:]))
        del self._taken[keep:]
        self._size = sum(map(_size, self._taken))
        self._records = self._start()

    def _cut(self, line: bytes) -> bytes:
        cut = _Cut(line)
        cut.size = len(line) + self._beyond
        self._beyond = 0
        return cut


def _size(line: bytes) -> int:
    return line.size if type(line) is _Cut else len(line)


def _said(error: str) -> str:
    for words, said in _SAID.items():
        if words in error:
            return said
    return f"has more than {RECORD_BYTES} bytes; is there a quote that is never closed?"


# ------------------------------------------------------------------------------------ header, rows


class Header(NamedTuple):
    """How a file is to be read on, from its first record."""

    charset: str
    delimiter: str
    names: list[str]


class ContactRow(NamedTuple):
    """A contact as a record gives it; None is a blank cell. `subscribed` is what isSubscribed says."""

    phone: int
    first_name: str | None
    last_name: str | None
    email: str | None
    gender: str | None
    birthday: date | None
    attributes: dict[str, str]
    subscribed: bool | None


class Recipient(NamedTuple):
    """Somebody to be sent to by one campaign. A number that cannot be read is None, and its spelling in `raw`."""

    phone: int | None
    raw: str | None
    attributes: dict[str, str]


def read_header(data: bytes, charset: str, ended: bool) -> tuple[Header, Reader]:
    """The header of a file that begins with `data` (all of it if `ended`, else at least RECORD_BYTES), and a reader
    that goes on after it. Raises HeaderError. The separator is the one that the header has most of: , ; or tab."""
    for mark, what in _MARKS.items():
        if data.startswith(mark):
            raise HeaderError(f"the file is {what}; save it as CSV UTF-8", "")
    if data.startswith(codecs.BOM_UTF8):
        charset = "utf-8"
    first = data.removeprefix(codecs.BOM_UTF8).lstrip(b"\r\n")[:RECORD_BYTES].splitlines() or [b""]
    unquoted = re.sub(r'"[^"]*"', "", first[0].decode(charset, "replace"))
    reader = Reader(max(",;\t", key=unquoted.count), charset)
    reader.feed(data)
    if ended:
        reader.end()
    records = reader.read(1)
    if not records:
        raise HeaderError(
            "the file has no header; its first line takes phone and names of columns", ""
        )
    if problem := records[0].problem:
        raise HeaderError(f"the header {problem}", records[0].cells[0])
    names = [name.strip() for name in records[0].cells]
    return Header(charset, reader.delimiter, names), reader


class Columns:
    """What the columns of a file stand for. Names are compared as merge tags are; blank ones are passed over."""

    def __init__(self, names: Sequence[str]) -> None:
        """Raises HeaderError if there is no phone column, or two columns are the same."""
        shown = ", ".join(names)
        if len(names) > COLUMNS:
            raise HeaderError(
                f"the header has {len(names)} columns; at most {COLUMNS} are taken", shown
            )
        seen: dict[str, str] = {}
        for name in filter(None, names):
            if len(name) > NAME_CHARACTERS:
                raise HeaderError(
                    f"the header has a name of {len(name)} characters; at most {NAME_CHARACTERS} are taken",
                    shown,
                )
            key = _FIELDS.get(text.tag_key(name), text.tag_key(name))
            if key in seen:
                raise HeaderError(
                    f"the header has {seen[key]!r} and {name!r}, which are the same: keep one",
                    shown,
                )
            seen[key] = name
        if "phone" not in seen:
            raise HeaderError(
                f"the header has no column phone; it has {shown!r}. Taken are {TAKEN}; all others become attributes",
                shown,
            )
        self._width = len(names)
        self._phone = names.index(seen["phone"])
        self._fields: dict[str, int] = {}
        self._attributes: dict[str, int] = {}
        self._others = {name: i for i, name in enumerate(names) if name and i != self._phone}
        for name, index in self._others.items():
            if field := _FIELDS.get(text.tag_key(name)):
                self._fields[field] = index
            else:
                self._attributes[name] = index

    def contact(self, cells: Sequence[str], country: str) -> ContactRow:
        """The contact of a record; national numbers are those of `country`. Raises CellError."""
        cells = self._cells(cells)
        spelled = cells[self._phone]
        try:
            phone = text.normalise_phone(spelled, country)
        except text.InvalidPhone as error:
            raise CellError(str(error), spelled) from None
        given = {field: cells[i] for field, i in self._fields.items() if cells[i]}
        return ContactRow(
            phone,
            given.get("first_name"),
            given.get("last_name"),
            _read("email", given, read_email),
            _read("gender", given, read_gender),
            _read("birthday", given, read_birthday),
            {name: cells[i] for name, i in self._attributes.items() if cells[i]},
            _read("isSubscribed", given, _yes_or_no),
        )

    def recipient(self, cells: Sequence[str], country: str) -> Recipient:
        """The recipient of a record: every column but phone is a value for merge tags. Raises CellError."""
        cells = self._cells(cells)
        return recipient(
            cells[self._phone], {n: cells[i] for n, i in self._others.items() if cells[i]}, country
        )

    def _cells(self, cells: Sequence[str]) -> list[str]:
        if len(cells) != self._width:
            raise CellError(
                f"has {len(cells)} cells; the header has {self._width}", ", ".join(cells)
            )
        if max(map(len, cells)) > CELL_CHARACTERS:
            longest = max(cells, key=len)
            raise CellError(
                f"has a cell of {len(longest)} characters; at most {CELL_CHARACTERS} are taken",
                longest,
            )
        return [cell.strip() for cell in cells]


def is_phone(name: str) -> bool:
    """Whether a column or field of that name holds the number."""
    return _FIELDS.get(text.tag_key(name)) == "phone"


def recipient(spelled: str, values: dict[str, str], country: str) -> Recipient:
    """A recipient with values for merge tags, its number read if it can be."""
    try:
        return Recipient(text.normalise_phone(spelled, country), None, values)
    except text.InvalidPhone:
        return Recipient(None, spelled[:NAME_CHARACTERS], values)


# -------------------------------------------------------------------------------------------- cells

_FIELDS = {
    "phone": "phone",
    "phonenumber": "phone",
    "firstname": "first_name",
    "lastname": "last_name",
    "email": "email",
    "gender": "gender",
    "birthday": "birthday",
    "birthdate": "birthday",
    "dateofbirth": "birthday",
    "issubscribed": "isSubscribed",
}
TAKEN = "phone, firstName, lastName, email, gender, birthday, isSubscribed"
_GENDERS = {
    "male": "male",
    "m": "male",
    "female": "female",
    "f": "female",
    "other": "other",
    "prefernottosay": "prefer_not_to_say",
}
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+")
_ISO_DATE = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})(?:[T ][0-9:.]+Z?)?", re.ASCII)
_DAY_FIRST = re.compile(r"(\d{1,2})([/.-])(\d{1,2})\2(\d{4})", re.ASCII)
EARLIEST_BIRTHDAY = date(1900, 1, 1)

T = TypeVar("T")


def _read(field: str, given: dict[str, str], read: Callable[[str], T]) -> T | None:
    cell = given.get(field)
    if cell is None:
        return None
    try:
        return read(cell)
    except ValueError as error:
        raise CellError(f"{field}: {error}", cell) from None


def read_email(cell: str) -> str:
    """An address as far as that can be told. Raises ValueError that says what is taken."""
    if len(cell) > 254 or not _EMAIL.fullmatch(cell):
        raise ValueError("takes an address such as maria@example.com")
    return cell


def read_gender(cell: str) -> str:
    """One of the four words for the usual spellings of them. Raises ValueError likewise."""
    gender = _GENDERS.get(text.tag_key(cell))
    if gender is None:
        raise ValueError("takes male, female, other or prefer_not_to_say (or m, f)")
    return gender


def read_birthday(cell: str) -> date:
    """A date, the day first unless the year is. Raises ValueError likewise."""
    try:
        if found := _ISO_DATE.fullmatch(cell):
            return check_birthday(date(int(found[1]), int(found[2]), int(found[3])))
        if found := _DAY_FIRST.fullmatch(cell):
            return check_birthday(date(int(found[4]), int(found[3]), int(found[1])))
    except ValueError:
        pass
    raise ValueError("takes a date from 1900 until today, as 1990-12-31, 31/12/1990 or 31.12.1990")


def check_birthday(birthday: date) -> date:
    """The date, if somebody alive may have been born then; else ValueError."""
    if not EARLIEST_BIRTHDAY <= birthday <= datetime.now(UTC).date():
        raise ValueError("takes a date from 1900-01-01 until today")
    return birthday


def _yes_or_no(cell: str) -> bool:
    answer = _WORDS.get(cell.casefold())
    if answer is None:
        raise ValueError("takes true or false (or yes, no, 1, 0)")
    return answer
