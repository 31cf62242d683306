"""Contacts and lists of a tenant."""

from datetime import date, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints

from smsd import contacts, csvfile, text
from smsd.api.checks import Phone, read_phone
from smsd.api.endpoint import Endpoint, Listing, Model, Page, Request
from smsd.api.errors import ApiError, invalid, not_found
from smsd.api.models import Id, Name

UNCHANGED: Any = None
"""The default of a field that a PUT leaves as it is."""

Value = Annotated[str, StringConstraints(strip_whitespace=True, max_length=csvfile.CELL_CHARACTERS)]
Email = Annotated[
    str,
    StringConstraints(strip_whitespace=True, max_length=254),
    AfterValidator(lambda value: csvfile.read_email(value) if value else value),
]
Birthday = Annotated[date, AfterValidator(csvfile.check_birthday)]
Gender = Literal["male", "female", "other", "prefer_not_to_say"]
AttributeName = Annotated[str, Field(min_length=1, max_length=csvfile.NAME_CHARACTERS)]
Attributes = Annotated[
    dict[AttributeName, Value | int | float | bool | None],
    Field(max_length=csvfile.COLUMNS, description="Further values for merge tags"),
]
Lists = Annotated[list[Id], Field(max_length=100, description="Ids of the lists it is on")]


# ---------------------------------------------------------------------------------------- contacts


class _Person(Model):
    first_name: Value | None = None
    last_name: Value | None = None
    email: Email | None = None
    gender: Gender | None = None
    birthday: Birthday | None = None
    attributes: Attributes = Field(default={})
    lists: Lists = Field(default=[])


class NewContact(_Person):
    """Somebody to be texted. Where the number opted out, only `isSubscribed: true` takes that back."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"phone": "+306944123456", "firstName": "Maria", "lists": []}]
        }
    )
    phone: Phone
    is_subscribed: bool | None = None


class ContactChange(_Person):
    """What is to be different; the rest stays. null takes a value away; `attributes` and `lists` are given whole."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"isSubscribed": False}]})
    phone: Phone = UNCHANGED
    attributes: Attributes = UNCHANGED
    lists: Lists = UNCHANGED
    is_subscribed: bool = UNCHANGED


class ContactAnswer(Model):
    """Somebody whom a tenant knows."""

    id: int
    phone: str
    first_name: str | None
    last_name: str | None
    email: str | None
    gender: Gender | None
    birthday: date | None
    attributes: dict[str, Any]
    lists: list[int]
    is_subscribed: bool
    created_at: datetime
    updated_at: datetime


class ContactsQuery(Page):
    """Filters of the list of contacts."""

    q: str | None = Field(
        None, min_length=1, max_length=100, description="Beginning of a number, or part of a name"
    )
    list_id: Id | None = None
    is_subscribed: bool | None = None


def _contact(contact: contacts.Contact) -> ContactAnswer:
    return ContactAnswer(
        id=contact.id,
        phone=text.plus(contact.phone),
        first_name=contact.first_name,
        last_name=contact.last_name,
        email=contact.email,
        gender=contact.gender,  # type: ignore[arg-type]  # the table takes no other
        birthday=contact.birthday,
        attributes=contact.attributes,
        lists=contact.list_ids,
        is_subscribed=contact.is_subscribed,
        created_at=contact.created_at,
        updated_at=contact.updated_at,
    )


def _values(req: Request) -> dict[str, Any]:
    """What was sent, by column; an empty text is none."""
    sent: dict[str, Any] = req.body.model_dump(
        exclude_unset=True, exclude={"lists", "is_subscribed"}
    )
    values: dict[str, Any] = {name: None if value == "" else value for name, value in sent.items()}
    if "phone" in values:
        values["phone"] = read_phone(req, values["phone"])
    if "attributes" in values:
        given = values["attributes"].items()
        values["attributes"] = {name: value for name, value in given if value is not None}
    return values


def _phone_taken(error: contacts.PhoneTaken) -> ApiError:
    return ApiError(
        409,
        "CONTACT_EXISTS",
        "phone: another contact has this number; change that one",
        {"id": error.contact_id},
    )


def _unknown(field: str, error: contacts.Unknown) -> ApiError:
    what = "lists" if field == "lists" else "contacts"
    return invalid(field, list(error.ids), f"ids of your {what}; these are unknown")


async def create_contact(req: Request) -> ContactAnswer:
    values = _values(req)
    try:
        contact = await contacts.create(
            req.connection,
            req.me.id,
            values.pop("phone"),
            values,
            list_ids=req.body.lists,
            is_subscribed=req.body.is_subscribed,
        )
    except contacts.PhoneTaken as error:
        raise _phone_taken(error) from None
    except contacts.Unknown as error:
        raise _unknown("lists", error) from None
    return _contact(contact)


async def list_contacts(req: Request) -> Listing[ContactAnswer]:
    query: ContactsQuery = req.query
    if query.list_id is not None:
        await _list(req, query.list_id)
    filters = contacts.Filters(query.q, query.list_id, query.is_subscribed)
    found, total = await contacts.find(
        req.db, req.me.id, filters, req.me.default_country, query.page_size, query.offset
    )
    items = [_contact(contact) for contact in found]
    return Listing[ContactAnswer](
        items=items, total=total, page=query.page, page_size=query.page_size
    )


async def get_contact(req: Request) -> ContactAnswer:
    contact = await contacts.get(req.db, req.me.id, req.id)
    if contact is None:
        raise not_found(f"contact {req.id}")
    return _contact(contact)


async def change_contact(req: Request) -> ContactAnswer:
    sent = req.body.model_fields_set
    try:
        contact = await contacts.change(
            req.connection,
            req.me.id,
            req.id,
            _values(req),
            list_ids=req.body.lists if "lists" in sent else None,
            is_subscribed=req.body.is_subscribed if "is_subscribed" in sent else None,
        )
    except contacts.PhoneTaken as error:
        raise _phone_taken(error) from None
    except contacts.Unknown as error:
        raise _unknown("lists", error) from None
    if contact is None:
        raise not_found(f"contact {req.id}")
    return _contact(contact)


class DeleteQuery(Model):
    """How thoroughly."""

    erase: bool = Field(
        False,
        description="Forget the person: number and text of messages too; what waits is not sent",
    )


_NOT_NOW = {
    "importing": "an import is under way, and its file may name this person; erase again when it has ended",
    "in_flight": "a message to this person is being sent at this moment; erase again in some seconds",
}


async def delete_contact(req: Request) -> None:
    if not req.query.erase:
        found = await contacts.delete(req.connection, req.me.id, req.id)
    else:
        try:
            found = await contacts.erase(req.connection, req.me.id, req.id) is not None
        except contacts.NotNow as error:
            raise ApiError(409, "ERASE_LATER", _NOT_NOW[error.why], {"reason": error.why}) from None
        req.after_commit.append(lambda: req.ctx.nudge("housekeeping"))
    if not found:
        raise not_found(f"contact {req.id}")


# ------------------------------------------------------------------------------------------- lists


class ListName(Model):
    """A list by its name."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "Regulars"}]})
    name: Name


class ListAnswer(Model):
    """A list, and how many contacts are on it."""

    id: int
    name: str
    contact_count: int
    created_at: datetime


class Additions(Model):
    """Contacts to be put on a list."""

    contact_ids: Annotated[list[Id], Field(min_length=1, max_length=1000)]


class Added(Model):
    """How many of them were not on it before."""

    added: int


def _shape(found: contacts.ContactList) -> ListAnswer:
    return ListAnswer(
        id=found.id, name=found.name, contact_count=found.contacts, created_at=found.created_at
    )


def _name_taken() -> ApiError:
    return ApiError(409, "LIST_EXISTS", "name: another list has it; take another")


async def _list(req: Request, list_id: int) -> contacts.ContactList:
    found = await contacts.get_list(req.db, req.me.id, list_id)
    if found is None:
        raise not_found(f"list {list_id}")
    return found


async def create_list(req: Request) -> ListAnswer:
    try:
        return _shape(await contacts.create_list(req.db, req.me.id, req.body.name))
    except contacts.NameTaken:
        raise _name_taken() from None


async def list_lists(req: Request) -> Listing[ListAnswer]:
    page: Page = req.query
    found, total = await contacts.lists(req.db, req.me.id, page.page_size, page.offset)
    items = [_shape(one) for one in found]
    return Listing[ListAnswer](items=items, total=total, page=page.page, page_size=page.page_size)


async def get_list(req: Request) -> ListAnswer:
    return _shape(await _list(req, req.id))


async def rename_list(req: Request) -> ListAnswer:
    try:
        found = await contacts.rename_list(req.db, req.me.id, req.id, req.body.name)
    except contacts.NameTaken:
        raise _name_taken() from None
    if found is None:
        raise not_found(f"list {req.id}")
    return _shape(found)


async def delete_list(req: Request) -> None:
    try:
        deleted = await contacts.delete_list(req.connection, req.me.id, req.id)
    except contacts.ListInUse as error:
        raise ApiError(
            409,
            "LIST_IN_USE",
            f"campaigns that are not over name this list: {error}; change or delete them first",
            {"campaignIds": list(error.campaign_ids)},
        ) from None
    if not deleted:
        raise not_found(f"list {req.id}")


async def add_to_list(req: Request) -> Added:
    try:
        added = await contacts.add_to_list(req.connection, req.me.id, req.id, req.body.contact_ids)
    except contacts.Unknown as error:
        raise _unknown("contactIds", error) from None
    if added is None:
        raise not_found(f"list {req.id}")
    return Added(added=added)


async def remove_from_list(req: Request) -> None:
    contact_id = req.number("contactId")
    if not await contacts.remove_from_list(req.db, req.me.id, req.id, contact_id):
        raise not_found(f"contact {contact_id} on list {req.id}")


_CONTACT, _LIST = "/api/contacts/{id}", "/api/lists/{id}"
_EXISTS, _LIST_EXISTS = ((409, "CONTACT_EXISTS"),), ((409, "LIST_EXISTS"),)

ENDPOINTS = (
    Endpoint("POST", "/api/contacts", create_contact, "tenant", "New contact", ContactAnswer, 201,
             body=NewContact, transaction=True, idempotent=True, errors=_EXISTS),
    Endpoint("GET", "/api/contacts", list_contacts, "tenant", "Contacts, newest first", Listing[ContactAnswer],
             query=ContactsQuery, errors=((404, "NOT_FOUND"),)),
    Endpoint("GET", _CONTACT, get_contact, "tenant", "One contact", ContactAnswer),
    Endpoint("PUT", _CONTACT, change_contact, "tenant", "Change what is sent of a contact", ContactAnswer,
             body=ContactChange, transaction=True, errors=_EXISTS),
    Endpoint("PATCH", _CONTACT, change_contact, "tenant", "Change what is sent of a contact", ContactAnswer,
             body=ContactChange, transaction=True, errors=_EXISTS),
    Endpoint("DELETE", _CONTACT, delete_contact, "tenant", "Delete a contact; an opt-out of its number stays", None,
             204, query=DeleteQuery, transaction=True, errors=((409, "ERASE_LATER"),)),
    Endpoint("POST", "/api/lists", create_list, "tenant", "New list", ListAnswer, 201, body=ListName,
             transaction=True, idempotent=True, errors=_LIST_EXISTS),
    Endpoint("GET", "/api/lists", list_lists, "tenant", "Lists by name", Listing[ListAnswer], query=Page),
    Endpoint("GET", _LIST, get_list, "tenant", "One list", ListAnswer),
    Endpoint("PUT", _LIST, rename_list, "tenant", "Rename a list", ListAnswer, body=ListName, transaction=True,
             errors=_LIST_EXISTS),
    Endpoint("DELETE", _LIST, delete_list, "tenant", "Delete a list, not its contacts", None, 204, transaction=True,
             errors=((409, "LIST_IN_USE"),)),
    Endpoint("POST", _LIST + "/contacts", add_to_list, "tenant", "Put contacts on a list", Added, body=Additions,
             transaction=True, idempotent=True),
    Endpoint("DELETE", _LIST + "/contacts/{contactId}", remove_from_list, "tenant", "Take a contact off a list", None,
             204),
)  # fmt: skip
