"""Segments, merge tags, phone numbers and unsubscribe tokens against independent models."""

import base64
import csv
import re
import string
from importlib.resources import files

import phonenumbers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smsd import text
from smsd.text import InvalidPhone, MissingValue, Template, TextError

# --- segments ------------------------------------------------------------------------------

# The default alphabet as ASCII without nine signs, and what it has beyond ASCII.
BASIC = (
    set(map(chr, range(0x20, 0x7F))) - set("`^{}[]\\~|")
    | set("\n\r£¥¤§¿¡ÄÅÆÇÉÑÖØÜßàäåæèéìñòöøùü")
    | {chr(code) for code in (0x393, 0x394, 0x398, 0x39B, 0x39E, 0x3A0, 0x3A3, 0x3A6, 0x3A8, 0x3A9)}
)
EXTENSION = set("^{}[]~\\|€\f")


def brute_force(content: str) -> tuple[str, int, int]:
    """Fill one part after another, character by character, as a handset's encoder does."""
    if set(content) <= BASIC | EXTENSION:
        encoding, single, part = "GSM-7", 160, 153
        costs = [2 if character in EXTENSION else 1 for character in content]
    else:
        encoding, single, part = "UCS-2", 70, 67
        costs = [2 if ord(character) > 0xFFFF else 1 for character in content]
    if sum(costs) <= single:
        return encoding, min(len(costs), 1), sum(costs)
    parts: list[list[int]] = [[]]
    for cost in costs:
        if sum(parts[-1]) + cost > part:
            parts.append([])
        parts[-1].append(cost)
    return encoding, len(parts), sum(costs)


PIECES = ["a", "€", "[", "\f", "\n", "Ç", "a" * 65, "a" * 66, "a" * 151, "b" * 152, "€" * 80]
UNICODE_PIECES = ["ç", "🎉", "日", "α" * 66, "🎉" * 34, "\u200d"]


def test_the_default_alphabet_has_its_127_characters() -> None:
    assert len(BASIC) == 127
    assert set(text.GSM7_BASIC) == BASIC
    assert set(text.GSM7_EXTENSION) == EXTENSION


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_gsm_texts_are_counted_as_if_the_parts_were_built(content: str) -> None:
    assert text.segments(content) == brute_force(content)


@given(st.lists(st.sampled_from(PIECES + UNICODE_PIECES), max_size=8).map("".join))
def test_unicode_texts_are_counted_as_if_the_parts_were_built(content: str) -> None:
    assert text.segments(content) == brute_force(content)


@given(st.text(max_size=300))
def test_any_text_is_counted_as_if_the_parts_were_built(content: str) -> None:
    assert text.segments(content) == brute_force(content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", ("GSM-7", 0, 0)),
        ("a" * 160, ("GSM-7", 1, 160)),
        ("a" * 161, ("GSM-7", 2, 161)),
        ("a" * 306, ("GSM-7", 2, 306)),
        ("a" * 307, ("GSM-7", 3, 307)),
        ("€" * 80, ("GSM-7", 1, 160)),
        ("€" * 80 + "a", ("GSM-7", 2, 161)),
        ("α" * 70, ("UCS-2", 1, 70)),
        ("α" * 71, ("UCS-2", 2, 71)),
        ("α" * 134, ("UCS-2", 2, 134)),
        ("α" * 135, ("UCS-2", 3, 135)),
        ("🎉" * 35, ("UCS-2", 1, 70)),
    ],
)
def test_the_limits_of_parts_are_exact(content: str, expected: tuple[str, int, int]) -> None:
    assert text.segments(content) == expected


def test_an_extension_character_at_the_edge_moves_whole_into_the_next_part() -> None:
    assert text.segments("a" * 152 + "€" + "a" * 152) == ("GSM-7", 3, 306)
    assert text.segments("a" * 151 + "€" + "a" * 153) == ("GSM-7", 2, 306)


def test_a_surrogate_pair_at_the_edge_moves_whole_into_the_next_part() -> None:
    for pair in ("\U00010000", "🎉", "\U0010ffff"):
        assert text.segments("α" * 66 + pair + "α" * 66) == ("UCS-2", 3, 134)
        assert text.segments("α" * 65 + pair + "α" * 67) == ("UCS-2", 2, 134)


def test_one_small_c_cedilla_makes_a_text_ucs2_and_a_capital_one_does_not() -> None:
    assert text.segments("ça va").encoding == "UCS-2"
    assert text.segments("Ça va").encoding == "GSM-7"


@pytest.mark.parametrize("content", ["\ud83d", "\ude00" * 80, "α" * 66 + "\ud83d" + "α" * 80])
def test_a_lone_surrogate_is_counted_and_not_an_exception(content: str) -> None:
    assert text.segments(content).units == len(content)


# --- what a text may hold ------------------------------------------------------------------


@pytest.mark.parametrize("code", [0x00, 0x07, 0x0B, 0x1B, 0x1F, 0xD800, 0xDFFF])
def test_what_cannot_be_sent_is_refused_with_its_place(code: int) -> None:
    bad = f"Hello{chr(code)} {{{{firstName}}}}"
    with pytest.raises(TextError, match=rf"U\+{code:04X}, at position 6"):
        text.check_text(bad)
    with pytest.raises(TextError):
        Template(bad)


def test_line_breaks_tabs_emoji_and_every_script_are_taken() -> None:
    text.check_text("a\r\n\tb 🎉 Γειά σου 你好 مرحبا\x7f\xa0")


def test_a_source_of_ten_thousand_characters_is_taken_and_one_more_is_not() -> None:
    assert Template("a" * text.SOURCE_LIMIT).tags == ()
    with pytest.raises(TextError, match="10001 characters; at most 10000"):
        Template("a" * (text.SOURCE_LIMIT + 1))


# --- merge tags ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    ["firstName", "first_name", "First Name", "FIRST-NAME", " first\xa0name ", "FirstName"],
)
def test_all_spellings_of_a_name_are_one_key(spelling: str) -> None:
    template = Template(f"Hi {{{{{spelling}}}}}!")
    assert template.tags == ("firstname",)
    assert template.render({text.tag_key("firstName"): "Anna"}) == "Hi Anna!"


def test_names_in_any_script_are_one_key_in_any_case_and_composition() -> None:
    assert text.tag_key("GRÖSSE") == text.tag_key("Größe")
    assert text.tag_key("ΠΌΝΤΟΣ") == text.tag_key("πόντος") == text.tag_key("πο\u0301ντος")
    template = Template("{{πόντος}} {{हिन्दी}}")
    assert template.problems == ()
    assert template.render({text.tag_key("Πόντος"): "7", text.tag_key("हिन्दी"): "x"}) == "7 x"


def test_tags_are_listed_once_in_order_of_appearance() -> None:
    template = Template("{{loyalty points}} {{link}} {{loyaltyPoints}} {{first_name|you}}")
    assert template.tags == ("loyaltypoints", "link", "firstname")


@pytest.mark.parametrize(
    "values", [{}, {"firstname": None}, {"firstname": ""}, {"firstname": " \t"}]
)
def test_a_missing_value_gives_way_to_the_default_or_is_named(
    values: dict[str, str | None],
) -> None:
    assert Template("Hi {{firstName|dear friend}}!").render(values) == "Hi dear friend!"
    assert Template("Hi {{ firstName | friend }}!").render(values) == "Hi friend!"
    assert Template("Hi {{firstName|}}!").render(values) == "Hi !"
    with pytest.raises(MissingValue) as missing:
        Template("Hi {{firstName}}!").render(values)
    assert missing.value.tag == "firstname"


def test_a_value_beats_the_default_and_is_inserted_as_it_is() -> None:
    template = Template("{{a|x}}{{b}}")
    assert template.render({"a": " {{b}} ", "b": "{{a}} \\1 %s {0}"}) == " {{b}} {{a}} \\1 %s {0}"


def test_a_template_renders_each_recipient_afresh() -> None:
    template = Template("Hi {{a|you}}")
    assert [template.render(v) for v in ({"a": "A"}, {}, {"a": "B"})] == ["Hi A", "Hi you", "Hi B"]


literals = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="{}"))
names = st.sampled_from(["firstName", "last_name", "loyalty points", "Πόλη"])
wild = st.text(st.sampled_from("ab{}|"), min_size=1)


@given(
    st.lists(st.tuples(literals, names)),
    literals,
    st.fixed_dictionaries(
        {text.tag_key(n): wild for n in ["firstName", "last_name", "loyalty points", "Πόλη"]}
    ),
)
def test_rendering_puts_values_between_literals_and_scans_nothing_twice(
    pairs: list[tuple[str, str]], tail: str, values: dict[str, str]
) -> None:
    source = "".join(f"{literal}{{{{{name}}}}}" for literal, name in pairs) + tail
    expected = "".join(literal + values[text.tag_key(name)] for literal, name in pairs) + tail
    template = Template(source)
    assert template.render(values) == expected
    assert template.problems == ()


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_a_text_without_tags_renders_as_itself(source: str) -> None:
    template = Template(source)
    if not template.tags:
        assert template.render({}) == source


@given(st.lists(st.sampled_from(["{{", "}}", "{", "}", "|", "a", "_", " ", "{{a}}"])).map("".join))
def test_an_author_is_told_whenever_braces_would_reach_a_handset(source: str) -> None:
    template = Template(source)
    rendered = template.render(dict.fromkeys(template.tags, "v"))
    assert bool(template.problems) == ("{{" in rendered or "}}" in rendered)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("Hi {{firstName, bye", '"{{" begins no tag at "{{firstName, bye"'),
        ("Hi {{firstName}, bye", '"{{" begins no tag at "{{firstName}, bye"'),
        ("Hi firstName}}, bye", '"}}" ends no tag at "Hi firstName}}"'),
        ("Hi {{name}}, bye}} now", '"}}" ends no tag at ", bye}}"'),
        ("Hi {{}}", "the tag {{}} has no name"),
        ("Hi {{ |x}}", "the tag {{ }} has no name"),
        ("Hi {{name ?? x}}", "the tag {{name ?? x}} has '?' in its name"),
        ("Hi {{na\u200bme}}", r"has '\u200b' in its name"),
    ],
)
def test_what_only_looks_like_a_tag_is_told_to_the_author(source: str, told: str) -> None:
    (problem,) = Template(source).problems
    assert told in problem


def test_what_is_no_tag_stays_in_the_text() -> None:
    source = "{{}} {{ }} {{|x}} {{a {b}} }} {{"
    assert Template(source).render({}) == source


def test_a_marketing_text_gets_the_unsubscribe_tag_once() -> None:
    once = text.with_unsubscribe("Sale!")
    assert once == "Sale!\n{{unsubscribeUrl}}"
    assert text.with_unsubscribe(once) == once


@pytest.mark.parametrize(
    "tag", ["unsubscribe_url", "UnsubscribeURL", " unsubscribe url ", "unsubscribeUrl|"]
)
def test_an_unsubscribe_tag_in_any_spelling_is_enough(tag: str) -> None:
    source = f"Stop: {{{{{tag}}}}} Sale!"
    assert text.with_unsubscribe(source) == source


def test_no_second_space_is_put_before_the_unsubscribe_tag() -> None:
    assert text.with_unsubscribe("Stop: ") == "Stop: {{unsubscribeUrl}}"
    assert text.with_unsubscribe("") == "{{unsubscribeUrl}}"


# --- phone numbers -------------------------------------------------------------------------


def sample_rows() -> list[dict[str, str]]:
    content = (files("smsd") / "data" / "contacts.csv").read_text("utf-8-sig")
    return list(csv.DictReader(content.splitlines()))


def test_the_sample_file_has_exactly_9500_numbers_and_seven_that_are_none() -> None:
    numbers: list[int] = []
    refused: set[str] = set()
    for row in sample_rows():
        try:
            numbers.append(text.normalise_phone(row["phone"]))
        except InvalidPhone as invalid:
            refused.add(invalid.value)
    assert refused == {
        "+336399800001234567",
        "+33639980001,+33639980002",
        "12345",
        "+33",
        "+999123456789",
        "not a phone",
        "",
    }
    # 260 repeats, and three good numbers in lines whose columns, gender or birthday are wrong.
    assert (len(set(numbers)), len(numbers)) == (9500, 9500 + 260 + 3)


def test_the_sample_file_reads_as_the_library_reads_it() -> None:
    for row in sample_rows():
        try:
            phone = text.normalise_phone(row["phone"])
        except InvalidPhone:
            continue
        number = phonenumbers.parse(row["phone"], "GR")
        assert text.plus(phone) == phonenumbers.format_number(
            number, phonenumbers.PhoneNumberFormat.E164
        )


@pytest.mark.parametrize(
    "spelling",
    [
        "+306944123456",
        "00306944123456",
        "0030 694 412 3456",
        "+30 694-412-3456",
        "+30.694.412.3456",
        "(+30) 694/412 3456",
        "+30 (0) 694 412 3456",
        "+30 0694 412 3456",
        "\t+30\xa0694\u202f412\u20093456\r\n",
        "+30 694‐412‑34–5—6",  # hyphen, unbreakable hyphen, en and em dash
        "+30 694−412−3456",  # minus sign
        "\ufeff\u202a+306944123456\u202c",
        "\u200e+30 694\u200b4123456\u200f",
        "＋３０（６９４）４１２／３４５６",
        "+٣٠ ٦٩٤٤١٢٣٤٥٦",
        "+۳۰ ۶۹۴۴۱۲۳۴۵۶",
        "6944123456",
        "694 412 3456",
        "06944123456",
        "٦٩٤٤١٢٣٤٥٦",
        "306944123456",
    ],
)
def test_every_spelling_of_a_number_is_the_same_recipient(spelling: str) -> None:
    assert text.normalise_phone(spelling) == 306944123456


@pytest.mark.parametrize(
    ("raw", "country", "phone"),
    [
        ("07911 123456", "GB", 447911123456),
        ("+44 (0)7911 123456", "GR", 447911123456),
        ("+44 07911 123456", "GR", 447911123456),
        ("(702) 555-0109", "US", 17025550109),
        ("011 44 7911 123456", "US", 447911123456),
        ("8 912 345-67-89", "RU", 79123456789),
        ("06 1234 5678", "IT", 390612345678),
        ("+39 06 1234 5678", "GR", 390612345678),
        ("+225 07 01 02 03 04", "GR", 2250701020304),
    ],
)
def test_trunk_zeros_go_and_zeros_of_the_number_stay(raw: str, country: str, phone: int) -> None:
    assert text.normalise_phone(raw, country) == phone


def test_a_foreign_number_without_its_plus_is_not_given_the_own_country_code() -> None:
    assert text.normalise_phone("447911123456", "GR") == 447911123456


def test_a_well_shaped_number_that_the_library_does_not_know_is_taken() -> None:
    unknown = "+30 111 222 3333"
    assert not phonenumbers.is_valid_number(phonenumbers.parse(unknown))
    assert text.normalise_phone(unknown) == 301112223333


@pytest.mark.parametrize(
    "raw",
    [
        *("", " ", "+", "00", "0", "-", "+-()", "not a phone", "12345", "112"),
        *("+1234567", "+1234567890123456", "0000000000", "00+306944123456", "++306944123456"),
        *("+0306944123456", "+999123456789", "6944123456,6944123457", "6944123456 6944123457"),
        *("+306944123456 +306944123457", "6944123456 ext 5", "694-FLOWERS", "+30694412345six"),
        *("+30694412345⁶", "6944\x00123456", "\ud83d", "1" * 100_000, "694412345"),
    ],
)
def test_what_is_no_number_is_refused_with_its_value(raw: str) -> None:
    with pytest.raises(InvalidPhone) as invalid:
        text.normalise_phone(raw)
    assert invalid.value.value == raw
    assert repr(raw[:40])[:-1] in str(invalid.value)
    assert len(str(invalid.value)) < 300


def test_a_local_number_without_its_area_code_is_refused() -> None:
    with pytest.raises(InvalidPhone, match="national ones of US"):
        text.normalise_phone("555-0109", "US")


def test_a_national_number_longer_than_e164_allows_is_refused() -> None:
    with pytest.raises(InvalidPhone):
        text.normalise_phone("123456789012345", "DE")


@given(
    st.sampled_from(sorted(phonenumbers.COUNTRY_CODE_TO_REGION_CODE)),
    st.integers(10**7, 10**12 - 1),
    st.lists(st.sampled_from(["", " ", "-", "(", ")", ".", "/", "\xa0", "\u200e"]), min_size=15),
    st.sampled_from(["+", "00", "＋"]),
)
def test_separators_anywhere_change_nothing(
    code: int, rest: int, separators: list[str], prefix: str
) -> None:
    digits = f"{code}{rest}"
    spelled = prefix + "".join(map("".join, zip(separators, digits, strict=False)))
    spelled += digits[len(separators) :]
    assert text.normalise_phone(spelled) == int(digits)


@given(st.text(st.sampled_from("+0123456789 ()-./\u200e٣３x")) | st.text())
def test_anything_else_is_a_number_or_invalid_and_no_other_exception(raw: str) -> None:
    try:
        phone = text.normalise_phone(raw)
    except InvalidPhone:
        return
    assert re.fullmatch(r"\+[1-9][0-9]{5,14}", text.plus(phone))
    assert text.normalise_phone(text.plus(phone)) == phone


# --- unsubscribe tokens --------------------------------------------------------------------

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
ALPHABET = string.ascii_letters + string.digits + "-_"
PHONE = 306944123456
ids = st.integers(0, 2**63 - 1)
phones = st.integers(10**6, 10**15 - 1)


@given(st.binary(min_size=1, max_size=200), ids, ids, phones)
def test_a_token_gives_back_what_was_signed(
    key: bytes, tenant: int, campaign: int, phone: int
) -> None:
    token = text.sign_unsubscribe(key, tenant, campaign, phone)
    assert text.read_unsubscribe([key], token) == (tenant, campaign, phone)
    assert set(token) <= set(ALPHABET)


def test_a_token_of_a_small_tenant_has_twenty_characters() -> None:
    assert len(text.sign_unsubscribe(KEY, 7, 1234, PHONE)) == 20


def test_a_token_never_ends_in_a_hyphen_which_handsets_leave_out_of_links() -> None:
    ends = {text.sign_unsubscribe(KEY, 7, 1234, PHONE + i)[-1] for i in range(2000)}
    assert "-" not in ends
    assert len(ends) > 20


@pytest.mark.parametrize(
    "campaign", [1, 1234, 123_456]
)  # token lengths of 19, 20, 22: all paddings
def test_a_token_with_any_one_character_changed_is_refused(campaign: int) -> None:
    token = text.sign_unsubscribe(KEY, 7, campaign, PHONE)
    for place, right in enumerate(token):
        for wrong in ALPHABET.replace(right, ""):
            forged = token[:place] + wrong + token[place + 1 :]
            assert text.read_unsubscribe([KEY], forged) is None


@given(st.integers(0, 21), st.sampled_from(ALPHABET + "= \n%é"))
def test_a_token_cut_or_lengthened_is_refused(length: int, added: str) -> None:
    token = text.sign_unsubscribe(KEY, 7, 123_456, PHONE)
    assert len(token) == 22
    assert text.read_unsubscribe([KEY], token[:length]) is None
    assert text.read_unsubscribe([KEY], token[:length] + added + token[length:]) is None


def test_a_token_outlives_a_rotation_by_one_key_and_no_longer() -> None:
    token = text.sign_unsubscribe(OTHER_KEY, 7, 1234, PHONE)
    assert text.read_unsubscribe([KEY, OTHER_KEY], token) == (7, 1234, PHONE)
    assert text.read_unsubscribe([KEY], token) is None
    assert text.read_unsubscribe([], token) is None


@given(
    st.text()
    | st.text(st.sampled_from(ALPHABET), max_size=60)
    | st.binary().map(lambda raw: base64.urlsafe_b64encode(raw).decode())
)
def test_junk_is_no_token_and_no_exception(junk: str) -> None:
    assert text.read_unsubscribe([KEY, OTHER_KEY], junk) is None


def test_tokens_of_neighbouring_numbers_have_nothing_in_common_to_read() -> None:
    tokens = [text.sign_unsubscribe(KEY, 7, 1234, PHONE + i) for i in range(500)]
    for place in range(19):  # the last character has a fixed bit
        assert len({token[place] for token in tokens}) > 55
    assert not any(
        PHONE.to_bytes(5, "big")[:3] in base64.urlsafe_b64decode(token) for token in tokens
    )
