"""CSV: what people's files look like, read whole, in crumbs, and from the middle."""

import codecs
import csv
import io
import tracemalloc
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smsd import csvfile
from smsd.csvfile import CellError, Columns, ContactRow, Header, HeaderError, Reader, Record


def read(data: bytes, charset: str = "utf-8", crumb: int = 1 << 20) -> tuple[Header, list[Record]]:
    """The header and all records of a file that arrives in crumbs."""
    header, first = csvfile.read_header(data, charset, ended=True)
    reader = Reader(header.delimiter, header.charset, first.offset, first.line)
    records = []
    for start in range(first.offset, len(data), crumb):
        reader.feed(data[start : start + crumb])
        records += reader.read(1_000_000)
    reader.end()
    records += reader.read(1_000_000)
    assert reader.offset == len(data)
    return header, records


def cells(data: bytes, **options: Any) -> list[list[str]]:
    _, records = read(data, **options)
    assert [record.problem for record in records] == [None] * len(records)
    return [record.cells for record in records]


# ----------------------------------------------------------------------------------------- records

TWO = [["1", "Α, Β"], ["2", "b"]]
FILES: dict[str, tuple[bytes, list[list[str]]]] = {
    "unix": ('phone,name\n1,"Α, Β"\n2,b\n'.encode(), TWO),
    "windows": ('phone,name\r\n1,"Α, Β"\r\n2,b\r\n'.encode(), TWO),
    "old mac": ('phone,name\r1,"Α, Β"\r2,b\r'.encode(), TWO),
    "no end of line": ('phone,name\n1,"Α, Β"\n2,b'.encode(), TWO),
    "mark of UTF-8": (codecs.BOM_UTF8 + '"phone","name"\n1,"Α, Β"\n2,b\n'.encode(), TWO),
    "semicolons": ('phone;"a,b,c";name\n1;x;"Α, Β"\n'.encode(), [["1", "x", "Α, Β"]]),
    "tabs": ("phone\tname\n1\tΑ, Β\n2\tb\n".encode(), TWO),
    "blank lines": ('\n\nphone,name\n\n1,"Α, Β"\n , \n2,b\n,\n\n'.encode(), TWO),
    "a line break in a cell": (b'phone,name\n1,"a\nb"\n2,c\n', [["1", "a\nb"], ["2", "c"]]),
    "CR LF in a cell": (b'phone,name\r\n1,"a\r\nb"\r\n', [["1", "a\r\nb"]]),
    "doubled quotes": (b'phone,name\n1,"""Old"" Town"\n', [["1", '"Old" Town']]),
    "a quote inside": (b'phone,name\n1,5" pipe\n', [["1", '5" pipe']]),
    "one column": (b"phone\n1\n2\n", [["1"], ["2"]]),
    "separators of Unicode": ("phone,name\n1,a\u2028b\x85c\n".encode(), [["1", "a\u2028b\x85c"]]),
}


@pytest.mark.parametrize("crumb", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("name", FILES)
def test_files_of_all_makers_are_read_however_they_arrive(name: str, crumb: int) -> None:
    data, expected = FILES[name]
    assert cells(data, crumb=crumb) == expected


@pytest.mark.parametrize("charset", ["iso-8859-7", "windows-1253"])
def test_a_declared_charset_is_honoured(charset: str) -> None:
    data = "phone,name\n1,Γιάννης\n".encode(charset)
    assert cells(data, charset=charset) == [["1", "Γιάννης"]]


def test_the_mark_of_utf_8_goes_before_a_declared_charset() -> None:
    data = codecs.BOM_UTF8 + "phone,name\n1,Γιάννης\n".encode()
    assert cells(data, charset="iso-8859-7") == [["1", "Γιάννης"]]


LONG = b"x" * (csvfile.RECORD_BYTES + 1)
BAD: dict[str, tuple[bytes, str]] = {
    "not UTF-8": ("2,Γιάννης".encode("iso-8859-7"), "is not UTF-8"),
    "NUL": (b"2,a\0b", "control character, U+0000"),
    "a bell": (b"2,a\x07b", "control character, U+0007"),
    "a quote in a quoted cell": (b'2,"a "b" c"', "written twice"),
    "a quote that is never closed": (b'2,"a', "closing quote"),
    "a line without end": (b"2," + LONG, "more than 65536 bytes"),
}


@pytest.mark.parametrize("crumb", [1000, 70_001])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_told_and_spoils_no_other(name: str, crumb: int) -> None:
    line, says = BAD[name]
    _, records = read(b"phone,name\n1,a\n" + line + b'\n3,"c"\n4,"d\ne"\n5,f\n', crumb=crumb)
    good = [(record.line, record.cells) for record in records if record.problem is None]
    assert good == [(2, ["1", "a"]), (4, ["3", "c"]), (5, ["4", "d\ne"]), (7, ["5", "f"])]
    [bad] = [record for record in records if record.problem is not None]
    assert bad.line == 3
    assert says in str(bad.problem)


def test_a_quote_left_open_at_the_end_of_the_file_costs_its_own_line_alone() -> None:
    _, records = read(b'phone,name\n1,"a\n2,b\n3,c\n')
    assert [record.problem for record in records] == [
        "a quote that opens a cell is never closed",
        None,
        None,
    ]
    assert [record.line for record in records] == [2, 3, 4]
    assert records[0].cells == ['1,"a']


def test_a_quote_left_open_before_a_long_file_costs_its_own_line_alone() -> None:
    rest = b"".join(b"%d,name\n" % n for n in range(50_000))
    _, records = read(b'phone,name\n1,"a\n' + rest, crumb=1 << 16)
    assert len(records) == 50_001
    assert "never closed" in str(records[0].problem)
    assert all(record.problem is None for record in records[1:])


def test_a_line_of_a_hundred_megabytes_is_not_held() -> None:
    reader = Reader(",")
    tracemalloc.start()
    for _ in range(1600):
        reader.feed(b"x" * (1 << 16))
        assert reader.read(10) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    reader.feed(b"\n1,a\n")
    bad, good = reader.read(10)
    assert peak < 1 << 20
    assert (bad.line, good.line, good.cells) == (1, 2, ["1", "a"])
    assert reader.offset == 1600 * (1 << 16) + 5


CONTROLS = [chr(code) for code in (*range(9), 11, 12, *range(14, 32), 0xFEFF)]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=CONTROLS), max_size=8)


def next_record(reader: Reader, data: bytes, crumb: int) -> Record | None:
    for start in range(reader.offset, len(data), crumb):
        reader.feed(data[start : start + crumb])
        if records := reader.read(1):
            return records[0]
    reader.end()
    records = reader.read(1)
    return records[0] if records else None


@given(
    table=st.integers(2, 4).flatmap(
        lambda n: st.lists(st.lists(TEXT, min_size=n, max_size=n), max_size=8)
    ),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    crumb=st.integers(1, 40),
)
def test_what_a_csv_writer_wrote_is_read_back_by_a_new_reader_for_each_record(
    table: list[list[str]], delimiter: str, end: str, crumb: int
) -> None:
    out = io.StringIO(newline="")
    breaks = any("\n" in cell or "\r" in cell for row in table for cell in row)
    quoting: Literal[0, 1] = csv.QUOTE_ALL if breaks else csv.QUOTE_MINIMAL
    csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(table)
    data = out.getvalue().encode()
    lines = data.splitlines(keepends=True)

    reader, found = Reader(delimiter), []
    while record := next_record(reader, data, crumb):
        assert record.problem is None
        found.append(record.cells)
        assert sum(map(len, lines[: reader.line - 1])) == reader.offset
        reader = Reader(delimiter, "utf-8", reader.offset, reader.line)
    assert found == [row for row in table if any(map(str.strip, row))]
    assert reader.offset == len(data)


@given(data=st.binary(max_size=300), crumb=st.integers(1, 50))
def test_no_bytes_make_it_fail_or_stand_still(data: bytes, crumb: int) -> None:
    noise = data.replace(b"x", b'"').replace(b"y", b",").replace(b"z", b"\n")
    reader, line = Reader(","), 0
    for start in range(0, len(noise), crumb):
        reader.feed(noise[start : start + crumb])
        for record in reader.read(100):
            assert record.line > line
            line = record.line
    reader.end()
    for record in reader.read(10_000):
        assert record.line > line
        line = record.line
    assert reader.offset == len(noise)


# ------------------------------------------------------------------------------------------ header


def columns(header: bytes) -> Columns:
    return Columns(csvfile.read_header(header + b"\n", "utf-8", ended=True)[0].names)


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has no header"),
    "only blank lines": (b"\n\r\n\n", "has no header"),
    "UTF-16, little end": ("phone,name\n".encode("utf-16"), "UTF-16; save it as CSV UTF-8"),
    "UTF-16, big end": (codecs.BOM_UTF16_BE + "phone\n".encode("utf-16-be"), "is UTF-16"),
    "a workbook": (b"PK\x03\x04\x14\x00", "an Excel workbook"),
    "not UTF-8": ("phone,Πόλη\n".encode("iso-8859-7"), "header is not UTF-8"),
    "no phone": (b"name,city\n", "'name, city'. Taken are phone, firstName"),
    "phone twice": (b"phone,Phone number\n", "'phone' and 'Phone number', which are the same"),
    "an attribute twice": ("phone,πόλη,Πόλη\n".encode(), "'πόλη' and 'Πόλη'"),
    "a name too long": (b"phone," + b"x" * 101, "a name of 101 characters; at most 100"),
    "too many columns": (b"phone" + b",x" * 200, "201 columns; at most 200"),
    "a quote left open": (b'"phone,name\n1,2\n', "header a quote that opens a cell"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_cannot_be_read_is_refused_with_what_is_taken(name: str) -> None:
    data, says = HEADERS[name]
    with pytest.raises(HeaderError) as refused:
        Columns(csvfile.read_header(data, "utf-8", ended=True)[0].names)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "header",
    [b"phone,firstName,lastName,email,gender,birthday,isSubscribed",
     b"Phone number,First name,Last Name,E-mail,GENDER,Birth date,is_subscribed",
     b" PHONE , first_name ,last-name,Email,Gender,dateOfBirth,IsSubscribed"],
)  # fmt: skip
def test_columns_are_known_in_the_usual_spellings(header: bytes) -> None:
    row = columns(header).contact(
        ["+306944123456", "Α", "Β", "a@b.gr", "f", "2.1.1990", "No"], "GR"
    )
    assert row == ContactRow(
        306944123456, "Α", "Β", "a@b.gr", "female", date(1990, 1, 2), {}, False
    )


def test_other_columns_are_attributes_under_their_own_name_and_nameless_ones_are_passed_over() -> (
    None
):
    row = columns("phone,Loyalty points,,Πόλη".encode()).contact(
        ["6944123456", " 12 ", "x", ""], "GR"
    )
    assert row.phone == 306944123456
    assert row.attributes == {"Loyalty points": "12"}


# ------------------------------------------------------------------------------------------- cells

CELLS: dict[str, tuple[str, str, object]] = {
    "male": ("gender", "Male", "male"),
    "m": ("gender", "M", "male"),
    "f": ("gender", "f", "female"),
    "other": ("gender", "other", "other"),
    "silent": ("gender", "Prefer not to say", "prefer_not_to_say"),
    "iso": ("birthday", "1990-12-31", date(1990, 12, 31)),
    "iso with a time": ("birthday", "1990-12-31T00:00:00.000Z", date(1990, 12, 31)),
    "slashes": ("birthday", "31/12/1990", date(1990, 12, 31)),
    "the day goes first": ("birthday", "3/12/1990", date(1990, 12, 3)),
    "dots": ("birthday", "31.12.1990", date(1990, 12, 31)),
    "a leap day": ("birthday", "29/2/2000", date(2000, 2, 29)),
    "yes": ("subscribed", "YES", True),
    "0": ("subscribed", "0", False),
    "email": ("email", "maria@example.com", "maria@example.com"),
    "blank": ("email", "  ", None),
}
_FIELDS = b"phone,gender,birthday,isSubscribed,email"
_ORDER = ["phone", "gender", "birthday", "subscribed", "email"]
TOMORROW = "tomorrow"
BAD_CELLS: dict[str, tuple[str, str, str]] = {
    "no phone": ("phone", "", "is not a phone number"),
    "words": ("phone", "call me", "'call me' is not a phone number; taken are international"),
    "two numbers": ("phone", "+306944123456,+306944123457", "is not a phone number"),
    "a number as Excel shows it": ("phone", "3.06944E+11", "is not a phone number"),
    "a robot": ("gender", "robot", "gender: takes male, female, other or prefer_not_to_say"),
    "the month first": ("birthday", "12/31/1990", "birthday: takes a date from 1900"),
    "two digits of a year": ("birthday", "31/12/90", "as 1990-12-31, 31/12/1990 or 31.12.1990"),
    "no leap day": ("birthday", "29/2/1999", "birthday: takes a date"),
    "mixed signs": ("birthday", "31/12.1990", "birthday: takes a date"),
    "tomorrow": ("birthday", TOMORROW, "until today"),
    "too long ago": ("birthday", "31/12/1899", "from 1900"),
    "perhaps": ("subscribed", "perhaps", "isSubscribed: takes true or false"),
    "no address": ("email", "n/a", "email: takes an address"),
    "too long": ("email", "x" * 1001, "a cell of 1001 characters; at most 1000"),
}


def a_row(field: str, cell: str) -> list[str]:
    row = ["+306944123456", "", "", "", ""]
    row[_ORDER.index(field)] = cell
    return row


@pytest.mark.parametrize("name", CELLS)
def test_cells_are_read_in_the_usual_spellings(name: str) -> None:
    field, cell, expected = CELLS[name]
    row = columns(_FIELDS).contact(a_row(field, cell), "GR")
    assert getattr(row, field) == expected


@pytest.mark.parametrize("name", BAD_CELLS)
def test_a_cell_that_cannot_be_taken_is_told_with_its_value(name: str) -> None:
    field, cell, says = BAD_CELLS[name]
    if cell == TOMORROW:
        cell = (datetime.now(UTC).date() + timedelta(days=1)).isoformat()
    with pytest.raises(CellError) as refused:
        columns(_FIELDS).contact(a_row(field, cell), "GR")
    assert says in str(refused.value)
    assert refused.value.value == cell[:100]


@pytest.mark.parametrize("n", [4, 6])
def test_a_record_with_too_many_or_too_few_cells_is_told(n: int) -> None:
    with pytest.raises(CellError, match=f"has {n} cells; the header has 5"):
        columns(_FIELDS).contact(["+306944123456"] * n, "GR")
