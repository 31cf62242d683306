"""Types of fields that several endpoints share: what each takes, said once."""

import re
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import phonenumbers
from pydantic import AfterValidator, Field, StringConstraints

LARGEST_ID = 2**63 - 1

_SENDER = re.compile(r"[A-Za-z0-9]{1,11}|[0-9]{1,16}")
_ZONE = re.compile(r"[A-Za-z0-9_+/-]{1,64}")


def _sender(value: str) -> str:
    if not _SENDER.fullmatch(value):
        raise ValueError("takes 1 to 11 letters and digits, or 1 to 16 digits")
    return value


def _time_zone(value: str) -> str:
    try:
        if _ZONE.fullmatch(value) and ZoneInfo(value):
            return value
    except (ZoneInfoNotFoundError, ValueError, OSError):  # OSError: "Europe" is a folder
        pass
    raise ValueError("takes a time zone of the IANA database, such as Europe/Athens")


def _country(value: str) -> str:
    if value not in phonenumbers.SUPPORTED_REGIONS:
        raise ValueError("takes a country in two capital letters, such as GR")
    return value


Id = Annotated[int, Field(ge=1, le=LARGEST_ID)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
SenderId = Annotated[
    str,
    AfterValidator(_sender),
    Field(
        description="What the handset shows: 1 to 11 letters and digits, or 1 to 16 digits",
        json_schema_extra={"pattern": f"^({_SENDER.pattern})$"},
        examples=["MyShop"],
    ),
]
TimeZone = Annotated[
    str,
    AfterValidator(_time_zone),
    Field(description="A time zone of the IANA database", examples=["Europe/Athens"]),
]
Country = Annotated[
    str,
    AfterValidator(_country),
    Field(
        description="ISO 3166 code; numbers without a calling code are read as this country's",
        json_schema_extra={"pattern": "^[A-Z]{2}$"},
        examples=["GR"],
    ),
]
Secret = Annotated[
    str,
    StringConstraints(min_length=1, max_length=500, pattern=r"^[!-~]+$"),
    Field(description="Printable ASCII without spaces; never shown again"),
]
PerSecond = Annotated[int, Field(ge=1, le=100_000)]
Amount = Annotated[int, Field(ge=1, le=10**12, description="Credits; one credit is one segment")]
