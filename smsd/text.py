"""Pure functions on text: segments, merge tags, phone numbers, unsubscribe tokens.

Nothing here waits, reads or remembers, and most of it runs once per recipient, so each question
has a short road for the usual case and a longer one for the rest.
"""

import base64
import re
import unicodedata
from binascii import b2a_base64
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from hmac import compare_digest
from itertools import repeat
from typing import NamedTuple

import phonenumbers
from phonenumbers import PhoneNumber, PhoneNumberFormat, ValidationResult

# --- what a text may hold --------------------------------------------------------------------
SOURCE_LIMIT = 10_000  # characters; some 65 parts, far above any text that is paid for on purpose

_UNSENDABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")


class TextError(ValueError):
    """The text cannot be stored or sent."""


def check_text(text: str) -> None:
    """Raise TextError for a NUL, another control character (but \\n, \\r, \\t), half an emoji."""
    if found := _UNSENDABLE.search(text):
        code = ord(found[0])
        what = "a lone surrogate (half a character)" if code >= 0xD800 else "a control character"
        raise TextError(
            f"the text has {what}, U+{code:04X}, at position {found.start() + 1}; "
            "remove it (line breaks and tabs are taken)"
        )


# --- segments --------------------------------------------------------------------------------
# 3GPP TS 23.038, 6.2.1: the default alphabet and its extension table. Ç is there, ç is not.
GSM7_BASIC = (
    "@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞÆæßÉ !\"#¤%&'()*+,-./0123456789:;<=>?"
    "¡ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÑÜ§¿abcdefghijklmnopqrstuvwxyzäöñüà"
)
GSM7_EXTENSION = "\f^{}\\[~]|€"

_BASIC = re.compile(f"[{re.escape(GSM7_BASIC)}]*")
_BASIC_ASCII = "".join(filter(str.isascii, GSM7_BASIC)).encode()
_EXTENDED = re.compile(f"[{re.escape(GSM7_BASIC + GSM7_EXTENSION)}]*")
_EXTENSION = re.compile(f"[{re.escape(GSM7_EXTENSION)}]")
_ESCAPE = frozenset("\x1b")
_HIGH_SURROGATE = frozenset(range(0xD8, 0xDC))  # by the upper byte of a UTF-16 unit


class Segments(NamedTuple):
    """How a text travels: "GSM-7" or "UCS-2", parts billed, septets or UTF-16 units in all."""

    encoding: str
    count: int  # type: ignore[assignment]  # the tuple's method of that name is of no use here
    units: int


def segments(text: str) -> Segments:
    """Count the parts that a text is billed as; an empty text has none.

    One part holds 160 septets or 70 UTF-16 units, each of several 153 or 67 (3GPP TS 23.040).
    What takes two units, an extension character or a surrogate pair, is not divided between two
    parts, so a part may end one short and the sum can exceed the plain division.
    """
    if _is_basic_ascii(text) or _BASIC.fullmatch(text):
        return _basic(len(text))
    if _EXTENDED.fullmatch(text):
        septets = len(text) + sum(map(text.count, GSM7_EXTENSION))
        if septets <= 160:
            return Segments("GSM-7", 1, septets)
        escaped = _EXTENSION.sub("\x1b\\g<0>", text)
        return Segments("GSM-7", _parts(escaped, 153, _ESCAPE), septets)
    upper_bytes = text.encode("utf-16-le", "surrogatepass")[1::2]
    units = len(upper_bytes)
    return Segments("UCS-2", 1 if units <= 70 else _parts(upper_bytes, 67, _HIGH_SURROGATE), units)


def segment_counts(texts: Sequence[str]) -> list[int]:
    """`segments(text).count` of each, by one look at all of them where they are usual."""
    if _is_basic_ascii("".join(texts)):
        return [_basic(len(text)).count for text in texts]
    return [segments(text).count for text in texts]


def _is_basic_ascii(text: str) -> bool:
    """Of ASCII, as most texts are, what is left without the alphabet's characters is found in half the time."""
    return text.isascii() and not text.encode().translate(None, _BASIC_ASCII)


@lru_cache(maxsize=1024)
def _basic(septets: int) -> Segments:
    return Segments("GSM-7", 1 if 0 < septets <= 160 else -(-septets // 153), septets)


def _parts(units: Sequence[object], size: int, opening: Container[object]) -> int:
    """Cut units into parts of at most `size` without a cut right after an opening unit."""
    count = start = 0
    while start < len(units):
        end = start + size
        start = end - (end < len(units) and units[end - 1] in opening)
        count += 1
    return count


# --- merge tags ------------------------------------------------------------------------------
UNSUBSCRIBE_TAG = "unsubscribeUrl"
LINK_TAG = "link"

_TAG = re.compile(r"\{\{([^{}|]*)(?:\|([^{}]*))?\}\}")
_JOINT = re.compile(r"[\s_-]+")


class MissingValue(Exception):  # noqa: N818 - reads as what it says
    """A recipient has no value for a tag that has no default."""

    def __init__(self, tag: str) -> None:
        super().__init__(
            f"no value for {{{{{tag}}}}}; give one, or a default: {{{{{tag}|default}}}}"
        )
        self.tag = tag


@lru_cache(maxsize=4096)
def tag_key(name: str) -> str:
    """The key that all spellings of a name share: first_name, firstName and "First name".

    It is the name without underscores, hyphens and white space, case-folded, composed (NFC).
    Values for `Template.render` are keyed by it.
    """
    return unicodedata.normalize("NFC", _JOINT.sub("", name).casefold())


class Template:
    """A text with merge tags, compiled once and rendered per recipient.

    A tag is `{{name}}` or `{{name|default}}`; the name is any text without braces and "|", the
    default is taken without the white space around it and may be empty. What only looks like a
    tag stays in the text as it is and is told in `problems`.
    """

    __slots__ = ("_pieces", "_slots", "problems", "source", "tags")

    source: str
    tags: tuple[str, ...]  # keys (see tag_key), each once, in order of appearance
    problems: tuple[str, ...]  # sentences for the author; render works nevertheless

    def __init__(self, source: str) -> None:
        """Compile; TextError if `check_text` refuses the source or it exceeds SOURCE_LIMIT."""
        if len(source) > SOURCE_LIMIT:
            raise TextError(
                f"the text has {len(source)} characters; at most {SOURCE_LIMIT} are taken"
            )
        check_text(source)
        self.source = source
        self.problems = tuple(_problems(source))
        self._pieces: list[str] = []
        self._slots: list[tuple[int, str, str | None]] = []
        end = 0
        for tag in _TAG.finditer(source):
            if key := tag_key(tag[1]):
                default = None if tag[2] is None else tag[2].strip()
                self._slots.append((len(self._pieces) + 1, key, default))
                self._pieces += (source[end : tag.start()], "")
                end = tag.end()
        self._pieces.append(source[end:])
        self.tags = tuple(dict.fromkeys(key for _, key, _ in self._slots))

    def render(self, values: Mapping[str, str | None]) -> str:
        """The text for one recipient; values by `tag_key`, inserted as they are, never re-scanned.

        A value that is missing, None or blank gives way to the tag's default, and without one
        raises MissingValue.
        """
        pieces = self._pieces.copy()
        for index, key, default in self._slots:
            value = values.get(key)
            if not value or value.isspace():
                if default is None:
                    raise MissingValue(key)
                value = default
            pieces[index] = value
        return "".join(pieces)

    def render_many(self, columns: Mapping[str, Sequence[str]], n: int) -> list[str]:
        """The texts for `n` recipients whose values are all there: of each tag a column of `n`, none of them blank."""
        parts: list[Iterable[str]] = [repeat(piece, n) for piece in self._pieces]
        for index, key, _ in self._slots:
            parts[index] = columns[key]
        return list(map("".join, zip(*parts, strict=True)))


def _problems(source: str) -> Iterator[str]:
    parts = _TAG.split(source)
    for literal in parts[::3]:
        before, opening, after = literal.partition("{{")
        if opening:
            yield f'"{{{{" begins no tag at "{{{{{after[:20]}"; a tag is written {{{{name}}}}'
        before, closing, _ = literal.partition("}}")
        if closing:
            yield f'"}}}}" ends no tag at "{before[-20:]}}}}}"; a tag is written {{{{name}}}}'
    for name in parts[1::3]:
        if not tag_key(name):
            yield f"the tag {{{{{name}}}}} has no name; a tag is written {{{{name}}}}"
        elif odd := "".join(dict.fromkeys(c for c in name if not _usual_in_a_name(c))):
            yield f"the tag {{{{{name}}}}} has {odd!a} in its name; is it an attribute's name?"


def _usual_in_a_name(character: str) -> bool:
    # \w would leave out the vowel signs of Indic scripts, which are marks and not letters.
    category = unicodedata.category(character)
    return category[0] in "LMN" or category == "Zs" or character in "_-.'’"


def with_unsubscribe(source: str) -> str:
    """The source with the unsubscribe tag on a line of its own at the end, unless it has one.

    A line break costs the same single unit as a space, and no handset draws it into the link.
    """
    if any(tag_key(tag[1]) == tag_key(UNSUBSCRIBE_TAG) for tag in _TAG.finditer(source)):
        return source
    joint = "\n" if source and not source[-1].isspace() else ""
    return f"{source}{joint}{{{{{UNSUBSCRIBE_TAG}}}}}"


# --- phone numbers ---------------------------------------------------------------------------
_INTERNATIONAL = re.compile(r"(?:\+|00)([1-9][0-9]{7,14})")
_SEPARATORS = re.compile(r"[\s./()-]+")
_LOOKALIKES = {"＋": "+", "（": "(", "）": ")", "．": ".", "／": "/", "−": "-"}

# The first three digits tell the length of the calling code, for no code begins another one.
_CODE_LENGTH = {
    str(head): length
    for head in range(100, 1000)
    for length in (1, 2, 3)
    if head // 10 ** (3 - length) in phonenumbers.COUNTRY_CODE_TO_REGION_CODE
}


class InvalidPhone(ValueError):  # noqa: N818 - likewise
    """The value is no phone number that a message could be sent to."""

    def __init__(self, value: str, default_country: str) -> None:
        shown = value if len(value) <= 40 else value[:40] + "…"
        super().__init__(
            f"{shown!r} is not a phone number; taken are international numbers (+ or 00, then a "
            f"known calling code, 8 to 15 digits in all) and national ones of {default_country}"
        )
        self.value = value


def normalise_phone(raw: str, default_country: str = "GR") -> int:
    """Read a phone number in any usual spelling as E.164 digits; InvalidPhone if it is none.

    International numbers are judged by shape and calling code alone, since one that the library
    calls invalid may be new. Only national numbers, and those with a zero after the calling
    code, cost the library's time (some 30 µs).
    """
    spelled = raw if raw.isascii() else "".join(map(_ascii_character, raw))
    compact = _SEPARATORS.sub("", spelled)
    number: PhoneNumber | None = None
    if international := _INTERNATIONAL.fullmatch(compact):
        digits = international[1]
        length = _CODE_LENGTH.get(digits[:3])
        if length and digits[length] != "0":
            return int(digits)
        number = _parse(f"+{digits}", None) if length else None
    elif compact.isascii() and compact.isdigit() and not compact.startswith("00"):
        number = _national(compact, default_country)
    phone = int(phonenumbers.format_number(number, PhoneNumberFormat.E164)) if number else 0
    if not 0 < phone < 10**15:
        raise InvalidPhone(raw, default_country)
    return phone


def plus(phone: int) -> str:
    """The number as it is written outside: "+306944123456"."""
    return f"+{phone}"


def _ascii_character(character: str) -> str:
    """ASCII for digits of any script and full-width signs; nothing for dashes and format marks."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if unicodedata.category(character) in ("Cf", "Pd"):
        return ""
    return _LOOKALIKES.get(character, character)


def _national(digits: str, country: str) -> PhoneNumber | None:
    """The number of that country, or an international one that has lost its + (in a spreadsheet).

    The latter only if it is no valid number of the country and a valid one of its own.
    """
    number = _parse(digits, country)
    if number is None or not phonenumbers.is_valid_number(number):
        foreign = _parse(f"+{digits}", None)
        if foreign is not None and phonenumbers.is_valid_number(foreign):
            return foreign
    if number is None:
        return None
    reason = phonenumbers.is_possible_number_with_reason(number)
    return number if reason == ValidationResult.IS_POSSIBLE else None


def _parse(spelled: str, country: str | None) -> PhoneNumber | None:
    try:
        number = phonenumbers.parse(spelled, country)
    except phonenumbers.NumberParseException:
        return None
    if number.italian_leading_zero and not phonenumbers.is_valid_number(number):
        # The library knows trunk zeros only where a country has them; people write them anywhere.
        bare = PhoneNumber(number.country_code, number.national_number)
        return bare if phonenumbers.is_valid_number(bare) else number
    return number


# --- unsubscribe tokens ----------------------------------------------------------------------
# Layout, in base64url: masked payload, then the MAC. The payload is tenant and campaign as
# varints and the phone in as few bytes as it needs. The mask is a keyed stream that starts from
# the MAC (the idea of SIV, RFC 5297), so equal input gives an equal token without any nonce.
#
# 55 bits are enough: a guess can only be checked by asking the daemon, 2^54 requests for an even
# chance, and all that a hit does is to opt one number out, which shows and can be undone.
_MAC_BYTES = 7
_MASK_BYTES = 32  # above the longest payload: two 64-bit varints and a phone
_TOKEN = re.compile(r"[A-Za-z0-9_-]{14,48}")
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_PAYLOAD = re.compile(rb"([\x80-\xff]*[\x00-\x7f])([\x80-\xff]*[\x00-\x7f])(.+)", re.DOTALL)


@lru_cache(maxsize=16)
def _keyed(key: bytes) -> tuple[blake2b, blake2b]:
    """States to copy, for MAC and mask: much cheaper than setting up the key at each call."""
    short = blake2b(key, person=b"smsd unsubscribe").digest()
    return (
        blake2b(key=short, digest_size=_MAC_BYTES, person=b"mac"),
        blake2b(key=short, digest_size=_MASK_BYTES, person=b"mask"),
    )


@lru_cache(maxsize=64)  # a campaign's numbers come one after the other
def unsubscribe_signer(key: bytes, tenant_id: int, campaign_id: int) -> Callable[[int], str]:
    """`sign_unsubscribe` for the numbers of one campaign, with all done that is the same for each."""
    head = _varint(tenant_id) + _varint(campaign_id)
    begun = _keyed(key)[0].copy()
    begun.update(head)
    new_mac, new_mask = begun.copy, _keyed(key)[1].copy
    number = int.from_bytes

    def sign(phone: int) -> str:
        tail = phone.to_bytes((phone.bit_length() + 7) // 8, "big")
        state = new_mac()
        state.update(tail)
        # The last bit is set for the sake of the last character, which then is never a "-":
        # some handsets leave a hyphen at the end out of the link.
        mac = (number(state.digest(), "big") | 1).to_bytes(_MAC_BYTES, "big")
        token = b2a_base64(_masked(new_mask(), mac, head + tail) + mac, newline=False)
        return token.translate(_URL_SAFE, b"=").decode()

    return sign


def sign_unsubscribe(key: bytes, tenant_id: int, campaign_id: int, phone: int) -> str:
    """A token that names a recipient without showing the number: 20 characters for small ids.

    Ids are 0 to 2^63 - 1, phone is E.164 digits; all characters are basic GSM-7 and need no
    quoting in a URL. The same input gives the same token.
    """
    return unsubscribe_signer(key, tenant_id, campaign_id)(phone)


def read_unsubscribe(keys: Sequence[bytes], token: str) -> tuple[int, int, int] | None:
    """(tenant id, campaign id, phone) if one of the keys signed the token, else None."""
    if not _TOKEN.fullmatch(token) or len(token) % 4 == 1:
        return None
    data = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    masked, mac = data[:-_MAC_BYTES], data[-_MAC_BYTES:]
    for key in keys:
        read = _read_payload(_masked(_keyed(key)[1].copy(), mac, masked))
        # Signing again leaves one spelling of a token: spare bits of base64 or of a varint fail.
        if read is not None and compare_digest(sign_unsubscribe(key, *read), token):
            return read
    return None


def _masked(state: blake2b, mac: bytes, data: bytes) -> bytes:
    state.update(mac)
    stream = state.digest()[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(data), "big")


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the top bit says that more follow."""
    if value < 0x80:
        return bytes((value,))
    return bytes((value & 0x7F | 0x80,)) + _varint(value >> 7)


def _read_varint(octets: bytes) -> int:
    value = 0
    for octet in reversed(octets):
        value = value << 7 | octet & 0x7F
    return value


def _read_payload(payload: bytes) -> tuple[int, int, int] | None:
    if fields := _PAYLOAD.fullmatch(payload):
        return _read_varint(fields[1]), _read_varint(fields[2]), int.from_bytes(fields[3], "big")
    return None
