"""Contacts, their lists, who opted out, and the audiences that are made of them.

Whether a number may be texted stands in one place, by tenant and number (`opt_out`); a contact only shows it, and a
contact that is deleted or imported again does not forget it. Sizes of lists are kept by triggers.

In a transaction: opt-outs before contacts before lists, so that two of them never wait for each other.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import Any, NamedTuple

import asyncpg
import orjson
import phonenumbers

from smsd import database, text
from smsd.csvfile import Recipient
from smsd.database import Connection, Executor, Record

SQL = database.queries("contacts")

COLUMNS = {
    text.tag_key(column): column
    for column in ("first_name", "last_name", "email", "gender", "birthday")
}
"""What merge tags can say of a contact beside its attributes: `text.tag_key` → column."""
AGES: Mapping[str, tuple[int, int | None]] = {
    "18_24": (18, 24),
    "25_39": (25, 39),
    "40_plus": (40, None),
}
"""Age groups: youngest and oldest, both included."""
EXACT_UP_TO = 200_000
"""Contacts of a tenant whose audiences are never estimated."""

_LONGEST_PHONE = 15
_PHONE = re.compile(r"(\+|00|)([0-9]+)")
_SEPARATORS = re.compile(r"[\s./()-]+")
_LIKE = re.compile(r"([\\%_])")
_ESCAPED = r"\\\1"


class PhoneTaken(Exception):  # noqa: N818 - a fact, not a fault
    """The tenant has another contact with this number; its id, unless it came this moment."""

    def __init__(self, contact_id: int | None) -> None:
        super().__init__(f"contact {contact_id} has this number")
        self.contact_id = contact_id


class NameTaken(Exception):  # noqa: N818 - likewise
    """The tenant has another list of this name."""


class Unknown(Exception):  # noqa: N818 - likewise
    """Ids that this tenant does not have."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(", ".join(map(str, ids)))
        self.ids = ids


class ListInUse(Exception):  # noqa: N818 - likewise
    """Campaigns that are yet to be sent, or on their way, name the list."""

    def __init__(self, campaign_ids: Sequence[int]) -> None:
        super().__init__(", ".join(map(str, campaign_ids)))
        self.campaign_ids = campaign_ids


@dataclass(frozen=True, slots=True)
class Contact:
    """Somebody whom a tenant knows."""

    id: int
    phone: int
    first_name: str | None
    last_name: str | None
    email: str | None
    gender: str | None
    birthday: date | None
    attributes: dict[str, Any]
    list_ids: list[int]
    is_subscribed: bool
    created_at: datetime
    updated_at: datetime


class ContactList(NamedTuple):
    """A list, and how many contacts are on it."""

    id: int
    name: str
    contacts: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Filters:
    """Which contacts a listing shows. `q`: the beginning of a number, else a part of a name."""

    q: str | None = None
    list_id: int | None = None
    is_subscribed: bool | None = None


# ---------------------------------------------------------------------------------------- contacts


async def get(db: Executor, tenant_id: int, contact_id: int) -> Contact | None:
    """The contact, or None."""
    found = await _show(db, tenant_id, [contact_id])
    return found[0] if found else None


async def find(
    db: Executor, tenant_id: int, filters: Filters, country: str, limit: int, offset: int
) -> tuple[list[Contact], int]:
    """A page of the contacts that the filters take, newest first, and how many they are. `country`: whose national
    numbers `q` may begin like."""
    prefixes = _phone_prefixes(filters.q, country) if filters.q else None
    low, high = (None, None) if prefixes is None else _ranges(prefixes)
    name = f"%{_LIKE.sub(_ESCAPED, filters.q)}%" if filters.q and prefixes is None else None
    row = await db.fetchrow(
        SQL["find_contacts"],
        tenant_id, filters.list_id, filters.is_subscribed, low, high, name, limit, offset,
    )  # fmt: skip
    assert row is not None
    return await _show(db, tenant_id, row["ids"]), row["total"]


async def create(
    db: Connection,
    tenant_id: int,
    phone: int,
    values: Mapping[str, Any],
    *,
    list_ids: Sequence[int] = (),
    is_subscribed: bool | None = None,
) -> Contact:
    """A new contact with values by column. Raises PhoneTaken, and Unknown for lists."""
    await _subscribe(db, tenant_id, phone, is_subscribed)
    contact_id = await db.fetchval(
        SQL["insert_contact"],
        tenant_id, phone, values.get("first_name"), values.get("last_name"), values.get("email"),
        values.get("gender"), values.get("birthday"), values.get("attributes") or {},
    )  # fmt: skip
    if contact_id is None:
        raise PhoneTaken(await db.fetchval(SQL["contact_of_phone"], tenant_id, phone))
    await _put_on(db, tenant_id, contact_id, list_ids)
    return await _must_get(db, tenant_id, contact_id)


async def change(
    db: Connection,
    tenant_id: int,
    contact_id: int,
    changes: Mapping[str, Any],
    *,
    list_ids: Sequence[int] | None = None,
    is_subscribed: bool | None = None,
) -> Contact | None:
    """Sets values by column; the lists are from now on `list_ids` unless that is None. None: no such contact. Raises
    PhoneTaken, and Unknown for lists."""
    before = await get(db, tenant_id, contact_id)
    if before is None:
        return None
    await _subscribe(db, tenant_id, changes.get("phone", before.phone), is_subscribed)
    await db.execute(SQL["lock_contact"], tenant_id, contact_id)
    before = await get(db, tenant_id, contact_id)
    if before is None:
        return None
    contact = replace(before, **changes)
    if contact.phone != before.phone:
        taken = await db.fetchval(SQL["contact_of_phone"], tenant_id, contact.phone)
        if taken is not None:
            raise PhoneTaken(taken)
    try:
        await db.execute(
            SQL["update_contact"],
            tenant_id, contact_id, contact.phone, contact.first_name, contact.last_name, contact.email,
            contact.gender, contact.birthday, contact.attributes,
        )  # fmt: skip
    except asyncpg.UniqueViolationError:
        raise PhoneTaken(None) from None
    if list_ids is not None:
        await _put_on(db, tenant_id, contact_id, list_ids)
        await db.execute(SQL["leave_lists"], contact_id, list(list_ids))
    return await _must_get(db, tenant_id, contact_id)


async def delete(db: Connection, tenant_id: int, contact_id: int) -> bool:
    """Forgets a contact, but not that its number opted out. False: no such contact."""
    if await db.fetchval(SQL["delete_contact"], tenant_id, contact_id) is None:
        return False
    await db.execute(SQL["leave_lists"], contact_id, [])
    return True


class NotNow(Exception):  # noqa: N818 - a fact, not a fault
    """A contact cannot be erased at this moment. `why`: importing | in_flight."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


async def erase(db: Connection, tenant_id: int, contact_id: int) -> int | None:
    """Forgets the person: contact, lists, uploads, and number and text of all messages, which stay as sums; what waits
    is not sent. Of how many messages; None: no such contact. Raises NotNow, for the caller to roll back."""
    row = await db.fetchrow(SQL["erase_contact"], tenant_id, contact_id)
    assert row is not None
    if row["outcome"] == "absent":
        return None
    if row["outcome"] != "erased":
        raise NotNow(row["outcome"])
    return int(row["messages"])


async def _show(db: Executor, tenant_id: int, ids: Sequence[int]) -> list[Contact]:
    return [Contact(**row) for row in await db.fetch(SQL["show_contacts"], tenant_id, ids)]


async def _must_get(db: Executor, tenant_id: int, contact_id: int) -> Contact:
    contact = await get(db, tenant_id, contact_id)
    assert contact is not None
    return contact


async def _subscribe(
    db: Connection, tenant_id: int, phone: int, is_subscribed: bool | None
) -> None:
    if is_subscribed is False:
        await opt_out(db, tenant_id, phone, "api")
    elif is_subscribed:
        await opt_in(db, tenant_id, phone)


async def _put_on(db: Connection, tenant_id: int, contact_id: int, list_ids: Sequence[int]) -> None:
    if not list_ids:
        return
    kept = {row["id"] for row in await db.fetch(SQL["keep_lists"], tenant_id, list(list_ids))}
    if unknown := [one for one in list_ids if one not in kept]:
        raise Unknown(unknown)
    await db.execute(SQL["join_lists"], contact_id, list(kept))


def _phone_prefixes(q: str, country: str) -> list[str] | None:
    """What E.164 numbers begin with that `q` may be the beginning of; None if it is no number."""
    found = _PHONE.fullmatch(_SEPARATORS.sub("", q))
    if found is None:
        return None
    prefixes = [found[2]]
    if not found[1]:
        code = phonenumbers.country_code_for_region(country)
        prefixes.append(f"{code}{found[2].lstrip('0')}")
    prefixes = [p for p in prefixes if p[0] != "0" and len(p) <= _LONGEST_PHONE]
    return [p for p in prefixes if not any(p != q and p.startswith(q) for q in prefixes)]


def _ranges(prefixes: Sequence[str]) -> tuple[list[int], list[int]]:
    """The numbers that begin so, as ranges that an index can read: one for each length."""
    scales = [(int(p), 10**k) for p in prefixes for k in range(_LONGEST_PHONE - len(p) + 1)]
    return [n * scale for n, scale in scales], [(n + 1) * scale - 1 for n, scale in scales]


# ------------------------------------------------------------------------------------------- lists


async def create_list(db: Executor, tenant_id: int, name: str) -> ContactList:
    """A new list, empty. Raises NameTaken."""
    list_id = await db.fetchval(SQL["insert_list"], tenant_id, name)
    if list_id is None:
        raise NameTaken
    created = await get_list(db, tenant_id, list_id)
    assert created is not None
    return created


async def get_list(db: Executor, tenant_id: int, list_id: int) -> ContactList | None:
    """The list, or None."""
    row = await db.fetchrow(SQL["show_lists"], tenant_id, list_id, 1, 0)
    return ContactList(**row) if row else None


async def lists(
    db: Executor, tenant_id: int, limit: int, offset: int
) -> tuple[list[ContactList], int]:
    """A page of the tenant's lists by name, and how many there are."""
    rows = await db.fetch(SQL["show_lists"], tenant_id, None, limit, offset)
    return [ContactList(**row) for row in rows], await db.fetchval(SQL["count_lists"], tenant_id)


async def rename_list(db: Executor, tenant_id: int, list_id: int, name: str) -> ContactList | None:
    """Gives a list another name. None: no such list. Raises NameTaken."""
    try:
        await db.execute(SQL["rename_list"], tenant_id, list_id, name)
    except asyncpg.UniqueViolationError:
        raise NameTaken from None
    return await get_list(db, tenant_id, list_id)


async def delete_list(db: Connection, tenant_id: int, list_id: int) -> bool:
    """Deletes a list, not its contacts. False: no such list. Raises ListInUse, for the caller to roll back: a
    campaign that excludes a list would otherwise text those on it."""
    if await db.fetchval(SQL["delete_list"], tenant_id, list_id) is None:
        return False
    # Only now: whoever is writing a campaign that names the list holds it until then.
    used = await db.fetch(SQL["campaigns_of_list"], tenant_id, list_id)
    if used:
        raise ListInUse([row["id"] for row in used])
    await db.execute(SQL["empty_list"], list_id)
    return True


async def add_to_list(
    db: Connection, tenant_id: int, list_id: int, contact_ids: Sequence[int]
) -> int | None:
    """Puts contacts on a list; how many were not on it. None: no such list. Raises Unknown for contacts."""
    kept = {row["id"] for row in await db.fetch(SQL["keep_contacts"], tenant_id, list(contact_ids))}
    if not await db.fetch(SQL["keep_lists"], tenant_id, [list_id]):
        return None
    if unknown := [one for one in contact_ids if one not in kept]:
        raise Unknown(unknown)
    return len(await db.fetch(SQL["add_to_list"], list_id, list(kept)))


async def remove_from_list(db: Executor, tenant_id: int, list_id: int, contact_id: int) -> bool:
    """Takes a contact off a list. False: no such list, or not on it."""
    if await get_list(db, tenant_id, list_id) is None:
        return False
    return await db.fetchval(SQL["remove_from_list"], list_id, contact_id) is not None


# ---------------------------------------------------------------------------------------- opt-outs


async def opt_out(
    db: Executor, tenant_id: int, phone: int, source: str, campaign_id: int | None = None
) -> bool:
    """The tenant texts this number no more. source: api | import | link | sms. False: it was so already."""
    return await db.fetchval(SQL["opt_out"], tenant_id, phone, source, campaign_id) is not None


async def opt_in(db: Executor, tenant_id: int, phone: int) -> bool:
    """The tenant may text this number again. False: it might already."""
    return await db.fetchval(SQL["opt_in"], tenant_id, phone) is not None


async def sender_to(db: Executor, tenant_id: int, phone: int) -> tuple[str, bool] | None:
    """Who texts this number, by name, and whether it opted out of that. None: no such tenant."""
    row = await db.fetchrow(SQL["sender_to"], tenant_id, phone)
    return (row["name"], row["opted_out"]) if row else None


# --------------------------------------------------------------------------------------- audiences


@dataclass(frozen=True, slots=True)
class Audience:
    """Whom a campaign is for: contacts of the lists (of all without lists), less those of `exclude_list_ids`."""

    list_ids: Sequence[int] = ()
    exclude_list_ids: Sequence[int] = ()
    gender: str | None = None
    age_group: str | None = None

    def parameters(self, as_of: date) -> tuple[object, ...]:
        """As the functions of the database take them."""
        youngest, oldest = AGES[self.age_group] if self.age_group else (None, None)
        lists, exclude = list(self.list_ids), list(self.exclude_list_ids)
        return lists, exclude, self.gender, youngest, oldest, as_of


async def audience_count(db: Executor, tenant_id: int, audience: Audience, as_of: date) -> int:
    """Subscribed contacts of the audience, exactly; ages are those on `as_of`. Reads all of it: half a second and
    more for a list of a million."""
    return int(await db.fetchval(SQL["audience_count"], tenant_id, *audience.parameters(as_of)))


async def audience_estimate(db: Executor, tenant_id: int, audience: Audience, as_of: date) -> int:
    """The same within some 100 ms, for an enqueue: exact for tenants of up to EXACT_UP_TO contacts, for small lists,
    and where nobody of the lists is left out; else within 1 % of what the lists hold, from a sample."""
    parameters = audience.parameters(as_of)
    return int(await db.fetchval(SQL["audience_estimate"], tenant_id, *parameters, EXACT_UP_TO))


async def audience_page(
    db: Executor,
    tenant_id: int,
    audience: Audience,
    as_of: date,
    after_id: int,
    highest_id: int,
    limit: int,
) -> list[Record]:
    """The next contacts of the audience with after_id < id ≤ highest_id, by id: id, phone, the columns of a contact,
    attributes (JSON), opted_out. The opted-out are there, marked; fewer than `limit` are the last."""
    return await db.fetch(
        SQL["audience_page"], tenant_id, *audience.parameters(as_of), after_id, highest_id, limit
    )


async def highest_id(db: Executor, tenant_id: int) -> int:
    """The newest contact of the tenant; 0 if there is none."""
    return await db.fetchval(SQL["highest_id"], tenant_id) or 0


# -------------------------------------------------------------------------------------- recipients


class AddedRecipients(NamedTuple):
    """What became of recipients: new to the campaign, there already, without a number that can be read."""

    added: int
    duplicates: int
    invalid: int


async def add_recipients(
    db: Executor, campaign_id: int, recipients: Sequence[Recipient]
) -> AddedRecipients:
    """Appends recipients to a campaign, a few thousand a call; of one number the first stays."""
    rows = await db.fetch(
        SQL["add_recipients"],
        campaign_id,
        [one.phone for one in recipients],
        [one.raw for one in recipients],
        [orjson.dumps(one.attributes).decode() for one in recipients],
    )
    invalid = sum(one.phone is None for one in recipients)
    added = len(rows) - invalid
    return AddedRecipients(added, len(recipients) - len(rows), invalid)


async def recipient_count(db: Executor, campaign_id: int) -> int:
    """Uploaded recipients of the campaign that can be texted."""
    return int(await db.fetchval(SQL["recipient_count"], campaign_id))


async def recipient_page(db: Executor, campaign_id: int, after_id: int, limit: int) -> list[Record]:
    """The next uploaded recipients by id: id, phone (None where unreadable), raw, attributes (JSON), opted_out; fewer
    than `limit` are the last."""
    return await db.fetch(SQL["recipient_page"], campaign_id, after_id, limit)
