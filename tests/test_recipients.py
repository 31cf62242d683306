"""Recipients uploaded for one campaign: both formats, in crumbs, with what is wrong told by line."""

from collections.abc import AsyncIterator

import pytest

from smsd import recipients
from smsd.csvfile import HeaderError, Recipient
from smsd.recipients import BadLine, Block

CSV, JSON = "text/csv", "application/x-ndjson"
MARIA = Recipient(306944123456, None, {"firstName": "Μαρία", "code": "A1"})
NIKOS = Recipient(306944123457, None, {"firstName": "Νίκος"})


async def crumbs(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def parse(
    data: bytes, content_type: str, charset: str = "utf-8", size: int = 1 << 16
) -> Block:
    whole = Block()
    async for block in recipients.parse(crumbs(data, size), content_type, charset, "GR"):
        assert len(block.recipients) + len(block.errors) < recipients.BLOCK + 250
        whole.recipients += block.recipients
        whole.errors += block.errors
    return whole


@pytest.mark.parametrize("size", [1, 5, 1000])
async def test_both_formats_say_the_same(size: int) -> None:
    table = "phone,firstName,code\n+30 694 412 3456,Μαρία,A1\n6944123457,Νίκος,\n".encode()
    lines = (
        '{"phone": "+30 694 412 3456", "firstName": "Μαρία", "code": "A1"}\r\n'
        '\n{"firstName": "Νίκος", "Phone number": "6944123457", "code": null}'
    ).encode()
    assert await parse(table, CSV, size=size) == Block([MARIA, NIKOS])
    assert await parse(lines, JSON, size=size) == Block([MARIA, NIKOS])


async def test_a_number_that_cannot_be_read_is_kept_and_told() -> None:
    got = await parse(b'{"phone": "call me", "code": 7}\n{"phone": ""}\n', JSON)
    assert got.recipients == [
        Recipient(None, "call me", {"code": "7"}),
        Recipient(None, "", {}),
    ]
    assert [(error.line, error.value) for error in got.errors] == [(1, "call me"), (2, "")]
    assert "is not a phone number; taken are" in got.errors[0].message


async def test_numbers_and_truths_of_json_are_values_as_they_are_written() -> None:
    line = (
        b'{"phone": 306944123456, "a": 1, "b": 1.5, "c": true, "d": false, "e": " x ", "f": null}'
    )
    [one] = (await parse(line, JSON)).recipients
    assert one.phone == 306944123456
    assert one.attributes == {"a": "1", "b": "1.5", "c": "true", "d": "false", "e": "x"}


BAD_JSON: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"+306944123456", "one JSON object a line"),
    "half": (b'{"phone": "+30694', "one JSON object a line"),
    "an array": (b'[{"phone": "+306944123456"}]', "one JSON object a line: {phone"),
    "not UTF-8": (b'{"phone": "\xff"}', "one JSON object a line"),
    "half a character": (b'{"phone": "1", "a": "\\ud800"}', "one JSON object a line"),
    "no phone": (b'{"firstName": "x"}', "has no phone"),
    "nested": (b'{"phone": "1", "a": {"b": 1}}', "a: takes a text, a number, true, false or null"),
    "NUL": (b'{"phone": "1", "a": "x\\u0000"}', "takes text without control characters"),
    "NUL in a name": (b'{"phone": "1", "\\u0000": "x"}', "takes text without control characters"),
    "a long value": (b'{"phone": "1", "a": "%s"}' % (b"x" * 1001), "a: takes 1000 characters"),
    "a long name": (b'{"phone": "1", "%s": "x"}' % (b"n" * 101), "names of 100 characters"),
    "many fields": (b'{"phone": "1"%s}' % b"".join(b',"%d":1' % n for n in range(200)), "201 fields"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_JSON)
async def test_a_bad_line_of_json_is_told_and_left_out(name: str) -> None:
    line, says = BAD_JSON[name]
    good = b'{"phone": "+306944123456"}\n'
    got = await parse(good + line + b"\n" + good.replace(b"6}", b"7}"), JSON)
    [error] = got.errors
    assert error.line == 2
    assert says in error.message
    assert len(error.value) <= 400
    assert len(got.recipients) == 2


async def test_a_bad_line_of_csv_is_told_and_left_out() -> None:
    got = await parse(b"phone,a\n6944123456,x\n6944123457\n6944123458,\0\n6944123459,y\n", CSV)
    assert got.errors == [
        BadLine(3, "6944123457", "has 1 cells; the header has 2"),
        BadLine(4, "6944123458,\0", "has a control character, U+0000; remove it"),
    ]
    assert [one.phone for one in got.recipients] == [306944123456, 306944123459]


@pytest.mark.parametrize(
    ("data", "content_type"),
    [(b"", CSV), (b"name,city\nx,y\n", CSV), (b"x" * 70_000, JSON)],
)
async def test_an_upload_that_cannot_be_read_at_all_is_refused(
    data: bytes, content_type: str
) -> None:
    with pytest.raises(HeaderError):
        await parse(data, content_type)


async def test_nothing_is_an_upload_of_nobody() -> None:
    assert await parse(b"\n\n", JSON) == Block()


async def test_a_large_upload_comes_in_blocks() -> None:
    data = b"phone\n" + b"".join(b"+3069%08d\n" % n for n in range(10_000))
    got = await parse(data, CSV)
    assert [one.phone for one in got.recipients] == [306900000000 + n for n in range(10_000)]
