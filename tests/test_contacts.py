"""Contacts, lists, opt-outs; who is in an audience, against a plain reading of the rules."""

import asyncio
import json
import random
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import pytest
from conftest import Api, TenantCaller

from smsd import contacts
from smsd.contacts import Audience, Filters
from smsd.csvfile import Recipient
from smsd.database import Pool

MARIA: dict[str, Any] = {
    "phone": "694 412 3456",
    "firstName": "Μαρία",
    "lastName": "Παππά",
    "email": "maria@example.com",
    "gender": "female",
    "birthday": "1990-12-31",
    "attributes": {"city": "Αθήνα", "points": 12, "vip": True, "ratio": 1.5},
}
PHONE = 306944123456
AS_OF = date(2026, 6, 15)


@pytest.fixture
async def shop(api: Api) -> TenantCaller:
    return await api.new_tenant()


@pytest.fixture
async def other(api: Api) -> TenantCaller:
    return await api.new_tenant(name="Other")


async def new_list(shop: TenantCaller, name: str = "Regulars") -> int:
    made = await shop.post("/api/lists", {"name": name})
    assert made.status == 201, made.text
    return int(made.body["id"])


async def new_contact(shop: TenantCaller, phone: int = PHONE, **fields: Any) -> int:
    made = await shop.post("/api/contacts", {"phone": f"+{phone}", **fields})
    assert made.status == 201, made.text
    return int(made.body["id"])


# -------------------------------------------------------------------------------------- one contact


async def test_a_contact_is_shown_as_it_was_given(shop: TenantCaller) -> None:
    list_id = await new_list(shop)
    made = await shop.post("/api/contacts", {**MARIA, "lists": [list_id]})
    assert made.status == 201
    assert made.body == {
        **MARIA,
        "id": made.body["id"],
        "phone": "+306944123456",
        "lists": [list_id],
        "isSubscribed": True,
        "createdAt": made.body["createdAt"],
        "updatedAt": made.body["updatedAt"],
    }
    assert (await shop.get(f"/api/contacts/{made.body['id']}")).body == made.body
    assert (await shop.get("/api/contacts")).body["items"] == [made.body]


async def test_a_number_is_one_contact_in_whatever_spelling(shop: TenantCaller) -> None:
    first = await new_contact(shop)
    for spelling in ("6944123456", "00306944123456", "+30 694-412.3456"):
        again = await shop.post("/api/contacts", {"phone": spelling})
        assert (again.status, again.body["code"]) == (409, "CONTACT_EXISTS")
        assert again.body["details"] == {"id": first}


async def test_tenants_have_the_same_number_each_for_itself(
    shop: TenantCaller, other: TenantCaller
) -> None:
    mine, theirs = await new_contact(shop), await new_contact(other)
    assert (await other.get(f"/api/contacts/{mine}")).status == 404
    assert (await other.put(f"/api/contacts/{mine}", {"firstName": "x"})).status == 404
    assert (await other.delete(f"/api/contacts/{mine}")).status == 404
    assert [c["id"] for c in (await other.get("/api/contacts")).body["items"]] == [theirs]
    await shop.put(f"/api/contacts/{mine}", {"isSubscribed": False})
    assert (await other.get(f"/api/contacts/{theirs}")).body["isSubscribed"] is True


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_a_change_leaves_alone_what_is_not_sent(shop: TenantCaller, method: str) -> None:
    made = await shop.post("/api/contacts", MARIA)
    path = f"/api/contacts/{made.body['id']}"
    changed = await shop(method, path, {"firstName": "Μαίρη", "email": None, "lastName": ""})
    assert changed.status == 200
    expected = {**made.body, "firstName": "Μαίρη", "email": None, "lastName": None}
    assert changed.body | {"updatedAt": ""} == expected | {"updatedAt": ""}
    assert changed.body["updatedAt"] > made.body["updatedAt"]
    whole = await shop(method, path, {"attributes": {"city": "Πάτρα", "points": None}})
    assert whole.body["attributes"] == {"city": "Πάτρα"}


async def test_a_number_can_change_but_not_to_one_that_is_there(shop: TenantCaller) -> None:
    one, two = await new_contact(shop), await new_contact(shop, PHONE + 1)
    moved = await shop.put(f"/api/contacts/{one}", {"phone": "6944123458"})
    assert moved.body["phone"] == "+306944123458"
    same = await shop.put(f"/api/contacts/{one}", {"phone": "+306944123458", "firstName": "x"})
    assert same.status == 200
    taken = await shop.put(f"/api/contacts/{one}", {"phone": f"+{PHONE + 1}"})
    assert (taken.status, taken.body["code"]) == (409, "CONTACT_EXISTS")
    assert taken.body["details"] == {"id": two}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no phone": ({"firstName": "x"}, "phone"),
    "not a phone": ({"phone": "call me"}, "phone"),
    "phone as a number": ({"phone": PHONE}, "phone"),
    "gender": ({"gender": "robot"}, "gender"),
    "birthday of another form": ({"birthday": "31/12/1990"}, "birthday"),
    "birthday to come": ({"birthday": "2999-01-01"}, "birthday"),
    "birthday long ago": ({"birthday": "1899-12-31"}, "birthday"),
    "email": ({"email": "n/a"}, "email"),
    "a long name": ({"firstName": "x" * 1001}, "firstName"),
    "NUL": ({"firstName": "a\0"}, "firstName"),
    "subscribed as a word": ({"isSubscribed": "yes"}, "isSubscribed"),
    "lists as words": ({"lists": ["1"]}, "lists.0"),
    "unknown lists": ({"lists": [12345]}, "lists"),
    "nested attributes": ({"attributes": {"a": {"b": 1}}}, "attributes.a"),
    "a nameless attribute": ({"attributes": {"": 1}}, "attributes"),
    "a large number": ({"attributes": {"a": 2**63}}, "attributes.a"),
    "many attributes": ({"attributes": {str(n): 1 for n in range(201)}}, "attributes"),
    "an unknown field": ({"first_name": "x"}, "first_name"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_field_is_refused_by_its_name(shop: TenantCaller, name: str) -> None:
    fields, said = BAD[name]
    body = fields if "phone" in name else {"phone": "+306944123456"} | fields
    refused = await shop.post("/api/contacts", body)
    assert (refused.status, refused.body["code"]) == (400, "VALIDATION_ERROR"), refused.text
    assert refused.body["details"][0]["field"].startswith(said)
    assert (await shop.get("/api/contacts")).body["total"] == 0


async def test_the_same_request_again_makes_no_second_contact(shop: TenantCaller) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = await shop.post("/api/contacts", MARIA, headers=headers)
    second = await shop.post("/api/contacts", MARIA, headers=headers)
    assert (second.status, second.body) == (201, first.body)


# ---------------------------------------------------------------------------------------- opt-outs


async def test_a_number_that_opted_out_stays_so_until_the_api_says_otherwise(
    api: Api, shop: TenantCaller
) -> None:
    pool = api.ctx.pool
    contact_id = await new_contact(shop)
    path = f"/api/contacts/{contact_id}"
    assert await contacts.opt_out(pool, shop.id, PHONE, "sms")
    assert not await contacts.opt_out(pool, shop.id, PHONE, "link", 7)
    assert (await shop.get(path)).body["isSubscribed"] is False
    assert (await shop.put(path, {"firstName": "x"})).body["isSubscribed"] is False
    await shop.delete(path)
    again = await new_contact(shop)
    assert (await shop.get(f"/api/contacts/{again}")).body["isSubscribed"] is False
    lifted = await shop.put(f"/api/contacts/{again}", {"isSubscribed": True})
    assert lifted.body["isSubscribed"] is True
    assert not await contacts.opt_in(pool, shop.id, PHONE)


async def test_the_first_reason_of_an_opt_out_is_kept(pool: Pool) -> None:
    await contacts.opt_out(pool, 1, PHONE, "sms", 3)
    await contacts.opt_out(pool, 1, PHONE, "api")
    row = await pool.fetchrow("select source, campaign_id from opt_out")
    assert row is not None
    assert tuple(row) == ("sms", 3)


async def test_is_subscribed_can_be_said_of_a_new_contact(shop: TenantCaller) -> None:
    contact_id = await new_contact(shop, isSubscribed=False)
    assert (await shop.get(f"/api/contacts/{contact_id}")).body["isSubscribed"] is False
    await shop.delete(f"/api/contacts/{contact_id}")
    again = await new_contact(shop, isSubscribed=True)
    assert (await shop.get(f"/api/contacts/{again}")).body["isSubscribed"] is True


async def test_the_new_number_of_a_contact_has_its_own_opt_out(shop: TenantCaller) -> None:
    contact_id = await new_contact(shop, isSubscribed=False)
    moved = await shop.put(f"/api/contacts/{contact_id}", {"phone": f"+{PHONE + 1}"})
    assert moved.body["isSubscribed"] is True


# ------------------------------------------------------------------------------------------ search


async def found(shop: TenantCaller, **params: Any) -> tuple[list[str], int]:
    """First names of a page, and the total."""
    given = {name: str(value).lower() for name, value in params.items()}
    reply = await shop.get("/api/contacts", params=given)
    assert reply.status == 200, reply.text
    return [one["firstName"] for one in reply.body["items"]], reply.body["total"]


@pytest.fixture
async def known(shop: TenantCaller, other: TenantCaller) -> dict[str, int]:
    """Four contacts and a list with two of them."""
    list_id = await new_list(shop)
    await new_contact(shop, 306944123456, firstName="a", lastName="O'Brien 100%", lists=[list_id])
    await new_contact(shop, 306971234567, firstName="b", lastName="Παπαδόπουλος")
    await new_contact(shop, 4477009006, firstName="c", isSubscribed=False, lists=[list_id])
    await new_contact(shop, 33639982148, firstName="d", isSubscribed=False)
    await new_contact(other, 306944123456, firstName="not ours")
    return {"list": list_id}


@pytest.mark.parametrize(
    ("params", "expected"),
    [({}, "dcba"),
     ({"q": "+3069"}, "ba"), ({"q": "0030694"}, "a"), ({"q": "30 694"}, "a"), ({"q": "69"}, "ba"),
     ({"q": "0"}, "ba"), ({"q": "306971234567"}, "b"), ({"q": "+3069712345678"}, ""), ({"q": "3"}, "dba"),
     ({"q": "παπαδ"}, "b"), ({"q": "100%"}, "a"), ({"q": "%"}, "a"), ({"q": "_"}, ""), ({"q": "o'b"}, "a"),
     ({"q": "b παπ"}, "b"),
     ({"isSubscribed": True}, "ba"), ({"isSubscribed": False}, "dc"),
     ({"q": "4477", "isSubscribed": True}, ""), ({"q": "4477", "isSubscribed": False}, "c"),
     ({"q": "c", "isSubscribed": False}, "c"), ({"page": 2, "pageSize": 3}, "a"), ({"page": 3, "pageSize": 3}, "")],
)  # fmt: skip
async def test_contacts_are_found_by_number_name_and_subscription(
    shop: TenantCaller, known: dict[str, int], params: dict[str, Any], expected: str
) -> None:
    names, total = await found(shop, **params)
    assert "".join(names) == expected
    assert total == (4 if "page" in params else len(expected))


async def test_contacts_are_found_by_list(
    shop: TenantCaller, other: TenantCaller, known: dict[str, int]
) -> None:
    assert await found(shop, listId=known["list"]) == (["c", "a"], 2)
    assert await found(shop, listId=known["list"], pageSize=1, page=2) == (["a"], 2)
    assert await found(shop, listId=known["list"], isSubscribed=False) == (["c"], 1)
    assert await found(shop, listId=known["list"], q="69") == (["a"], 1)
    assert (await other.get(f"/api/contacts?listId={known['list']}")).status == 404


@pytest.mark.parametrize(
    "query", ["q=", "listId=0", "listId=x", "isSubscribed=perhaps", "page=0", "pageSize=101", "x=1"]
)
async def test_a_bad_filter_is_refused(shop: TenantCaller, query: str) -> None:
    refused = await shop.get(f"/api/contacts?{query}")
    assert (refused.status, refused.body["code"]) == (400, "VALIDATION_ERROR")


# ------------------------------------------------------------------------------------------- lists


async def count(shop: TenantCaller, list_id: int) -> int:
    return int((await shop.get(f"/api/lists/{list_id}")).body["contactCount"])


async def test_lists_count_their_contacts_whatever_happens_to_them(shop: TenantCaller) -> None:
    one, two = await new_list(shop, "One"), await new_list(shop, "Two")
    ids = [await new_contact(shop, PHONE + n, lists=[one]) for n in range(3)]
    assert (await count(shop, one), await count(shop, two)) == (3, 0)
    added = await shop.post(f"/api/lists/{two}/contacts", {"contactIds": [*ids, ids[0]]})
    assert (added.status, added.body) == (200, {"added": 3})
    again = await shop.post(f"/api/lists/{two}/contacts", {"contactIds": ids})
    assert again.body == {"added": 0}
    await shop.put(f"/api/contacts/{ids[0]}", {"lists": [two]})
    assert (await count(shop, one), await count(shop, two)) == (2, 3)
    assert (await shop.delete(f"/api/lists/{two}/contacts/{ids[1]}")).status == 204
    assert (await shop.delete(f"/api/lists/{two}/contacts/{ids[1]}")).status == 404
    assert (await count(shop, one), await count(shop, two)) == (2, 2)
    await shop.delete(f"/api/contacts/{ids[2]}")
    assert (await count(shop, one), await count(shop, two)) == (1, 1)
    assert (await shop.get("/api/contacts")).body["total"] == 2
    shown = await shop.get("/api/lists")
    assert [(x["name"], x["contactCount"]) for x in shown.body["items"]] == [("One", 1), ("Two", 1)]


async def test_a_list_has_a_name_of_its_own_and_can_be_renamed(shop: TenantCaller) -> None:
    one, two = await new_list(shop, "One"), await new_list(shop, "Two")
    again = await shop.post("/api/lists", {"name": " One "})
    assert (again.status, again.body["code"]) == (409, "LIST_EXISTS")
    taken = await shop.put(f"/api/lists/{two}", {"name": "One"})
    assert (taken.status, taken.body["code"]) == (409, "LIST_EXISTS")
    assert (await shop.put(f"/api/lists/{one}", {"name": "First"})).body["name"] == "First"
    for bad in ({"name": " "}, {}, {"name": "x" * 201}, {"name": "x", "count": 3}):
        assert (await shop.post("/api/lists", bad)).status == 400


async def test_a_deleted_list_leaves_its_contacts(shop: TenantCaller) -> None:
    list_id = await new_list(shop)
    contact_id = await new_contact(shop, lists=[list_id])
    assert (await shop.delete(f"/api/lists/{list_id}")).status == 204
    assert (await shop.get(f"/api/lists/{list_id}")).status == 404
    assert (await shop.get(f"/api/contacts/{contact_id}")).body["lists"] == []
    assert (await shop.delete(f"/api/lists/{list_id}")).status == 404


@pytest.mark.parametrize("role", ["listIds", "excludeListIds"])
async def test_a_list_that_a_draft_names_is_not_deleted(shop: TenantCaller, role: str) -> None:
    list_id = await new_list(shop)
    campaign = await shop.post(
        "/api/campaigns", {"name": "Sale", "messageText": "Hi", role: [list_id]}
    )
    assert campaign.status == 201, campaign.text
    refused = await shop.delete(f"/api/lists/{list_id}")
    assert (refused.status, refused.body["code"]) == (409, "LIST_IN_USE")
    assert refused.body["details"] == {"campaignIds": [campaign.body["id"]]}
    await shop.delete(f"/api/campaigns/{campaign.body['id']}")
    assert (await shop.delete(f"/api/lists/{list_id}")).status == 204


async def test_lists_and_contacts_of_others_are_unknown(
    shop: TenantCaller, other: TenantCaller
) -> None:
    theirs, their_contact = await new_list(other), await new_contact(other)
    mine = await new_list(shop)
    for method in ("GET", "DELETE"):
        assert (await shop(method, f"/api/lists/{theirs}")).status == 404
    assert (await shop.put(f"/api/lists/{theirs}", {"name": "x"})).status == 404
    body = {"contactIds": [their_contact]}
    assert (await shop.post(f"/api/lists/{theirs}/contacts", body)).status in (400, 404)
    unknown = await shop.post(f"/api/lists/{mine}/contacts", body)
    assert (unknown.status, unknown.body["code"]) == (400, "VALIDATION_ERROR")
    assert str(their_contact) in unknown.body["message"]
    refused = await shop.post("/api/contacts", {"phone": f"+{PHONE}", "lists": [mine, theirs]})
    assert (refused.status, refused.body["code"]) == (400, "VALIDATION_ERROR")
    assert refused.body["details"][0]["value"] == f"[{theirs}]"
    assert await count(other, theirs) == 0
    assert (await shop.get("/api/contacts")).body["total"] == 0


async def test_kept_sizes_are_true_after_writers_that_met(api: Api, shop: TenantCaller) -> None:
    lists = [await new_list(shop, str(n)) for n in range(3)]
    ids = [await new_contact(shop, PHONE + n) for n in range(8)]
    rng = random.Random(7)

    async def meddle(contact_id: int) -> None:
        for _ in range(6):
            await shop.put(
                f"/api/contacts/{contact_id}", {"lists": rng.sample(lists, rng.randrange(4))}
            )
        if contact_id % 3 == 0:
            await shop.delete(f"/api/contacts/{contact_id}")

    await asyncio.gather(*map(meddle, ids))
    rows = await api.ctx.pool.fetch(
        "select l.id, audience_size(1, l.id) as kept, "
        "(select count(*) from contact_list_member m where m.list_id = l.id) as true from contact_list l"
    )
    assert {row["id"]: row["kept"] for row in rows} == {row["id"]: row["true"] for row in rows}
    assert (await shop.get("/api/contacts")).body["total"] == sum(one % 3 != 0 for one in ids)


# --------------------------------------------------------------------------------------- audiences


@dataclass
class Person:
    """What a contact of the model is."""

    phone: int
    gender: str | None
    birthday: date | None
    lists: set[int] = field(default_factory=set)
    opted_out: bool = False


@dataclass
class Town:
    """Contacts of one tenant among others', and the same as plain objects."""

    pool: Pool
    tenant_id: int
    lists: list[int]
    people: dict[int, Person]

    def expected(self, audience: Audience, as_of: date) -> dict[int, bool]:
        """id → opted out, by the rules read plainly."""
        found = {}
        for contact_id, person in self.people.items():
            if audience.list_ids and not person.lists & set(audience.list_ids):
                continue
            if person.lists & set(audience.exclude_list_ids):
                continue
            if audience.gender and person.gender != audience.gender:
                continue
            if audience.age_group and not in_group(person.birthday, audience.age_group, as_of):
                continue
            found[contact_id] = person.opted_out
        return found


def in_group(birthday: date | None, group: str, as_of: date) -> bool:
    if birthday is None:
        return False
    age = as_of.year - birthday.year - ((as_of.month, as_of.day) < (birthday.month, birthday.day))
    return {"18_24": 18 <= age <= 24, "25_39": 25 <= age <= 39, "40_plus": age >= 40}[group]


@pytest.fixture
async def town(pool: Pool) -> Town:
    rng = random.Random(42)
    made_lists = [
        await contacts.create_list(pool, tenant_id, name)
        for tenant_id in (1, 2, 3)
        for name in ("a", "b", "c")
    ]
    lists = [one.id for one in made_lists]
    people: dict[int, Person] = {}
    mine = lists[3:6]
    birthdays = [
        date(y, m, d)
        for y in (1950, 1986, 1987, 2001, 2002, 2008)
        for m, d in ((6, 14), (6, 15), (6, 16))
    ]
    async with pool.acquire() as db, db.transaction():
        for n in range(600):
            tenant_id = rng.choice([1, 2, 2, 2, 3])
            person = Person(
                PHONE + n,
                rng.choice(["male", "female", None]),
                rng.choice([*birthdays, None]),
                {one for one in lists[3 * tenant_id - 3 : 3 * tenant_id] if rng.random() < 0.3},
                rng.random() < 0.2,
            )
            made = await contacts.create(
                db, tenant_id, person.phone, {"gender": person.gender, "birthday": person.birthday},
                list_ids=sorted(person.lists), is_subscribed=not person.opted_out,
            )  # fmt: skip
            if tenant_id == 2:
                people[made.id] = person
            elif rng.random() < 0.5:
                await contacts.opt_out(db, 2, PHONE + 1000 + n, "sms")
    return Town(pool, 2, mine, people)


def audiences(lists: list[int]) -> list[Audience]:
    a, b, c = lists
    chosen = [
        Audience(), Audience([a]), Audience([a, b]), Audience([c, a, b]), Audience([], [a]),
        Audience([a, b], [b, c]), Audience([a], [a]),
    ]  # fmt: skip
    return [
        Audience(one.list_ids, one.exclude_list_ids, gender, group)
        for one in chosen
        for gender in (None, "male")
        for group in (None, "18_24", "25_39", "40_plus")
    ]


async def test_an_audience_is_what_the_rules_say(town: Town) -> None:
    highest = await contacts.highest_id(town.pool, town.tenant_id)
    assert highest == max(town.people)
    for audience in audiences(town.lists):
        expected = town.expected(audience, AS_OF)
        counted = await contacts.audience_count(town.pool, town.tenant_id, audience, AS_OF)
        assert counted == sum(not opted_out for opted_out in expected.values()), audience
        estimated = await contacts.audience_estimate(town.pool, town.tenant_id, audience, AS_OF)
        assert estimated == counted
        rows: dict[int, bool] = {}
        after = 0
        while True:
            page = await contacts.audience_page(
                town.pool, town.tenant_id, audience, AS_OF, after, highest, 17
            )
            rows |= {row["id"]: row["opted_out"] for row in page}
            if len(page) < 17:
                break
            after = page[-1]["id"]
        assert rows == expected, audience
        assert list(rows) == sorted(rows)


async def test_a_page_has_what_a_text_may_say_and_nobody_newer(pool: Pool) -> None:
    async with pool.acquire() as db, db.transaction():
        values = {
            "first_name": "Μαρία", "last_name": "Παππά", "email": "m@x.gr", "gender": "female",
            "birthday": date(1990, 12, 31), "attributes": {"city": "Αθήνα"},
        }  # fmt: skip
        first = await contacts.create(db, 1, PHONE, values)
        await contacts.create(db, 1, PHONE + 1, {})
    [row] = await contacts.audience_page(pool, 1, Audience(), AS_OF, 0, first.id, 10)
    expected = {"id": first.id, "phone": PHONE, **values, "opted_out": False}
    assert {**row, "attributes": json.loads(row["attributes"])} == expected
    assert await contacts.audience_page(pool, 1, Audience(), AS_OF, first.id, first.id, 10) == []


async def test_lists_of_others_have_nobody_for_me(town: Town) -> None:
    theirs = Audience([town.lists[0] - 1, town.lists[2] + 1])
    assert await contacts.audience_count(town.pool, town.tenant_id, theirs, AS_OF) == 0
    assert (
        await contacts.audience_page(town.pool, town.tenant_id, theirs, AS_OF, 0, 10**9, 10) == []
    )
    excluded = Audience((), theirs.list_ids)
    everybody = await contacts.audience_count(town.pool, town.tenant_id, Audience(), AS_OF)
    assert await contacts.audience_count(town.pool, town.tenant_id, excluded, AS_OF) == everybody


async def test_a_tenant_without_contacts_has_no_audience(pool: Pool) -> None:
    assert await contacts.highest_id(pool, 1) == 0
    assert await contacts.audience_count(pool, 1, Audience(), AS_OF) == 0
    assert await contacts.audience_estimate(pool, 1, Audience(), AS_OF) == 0
    assert await contacts.audience_page(pool, 1, Audience(), AS_OF, 0, 0, 10) == []


async def test_an_estimate_of_many_is_near(pool: Pool) -> None:
    n = 60_000
    await pool.execute(
        "insert into contact (tenant_id, phone, gender, birthday) "
        "select 1 + (g % 2), 306900000000 + g, case when g % 3 = 0 then 'male' end, date '1950-01-01' + g % 20000 "
        "from generate_series(1, $1::int) g",
        2 * n,
    )
    await pool.execute("insert into contact_list (tenant_id, name) values (1, 'most'), (1, 'some')")
    await pool.execute(
        "insert into contact_list_member select 1, id from contact where tenant_id = 1 and id % 10 < 9 union all "
        "select 2, id from contact where tenant_id = 1 and id % 4 = 0"
    )
    await pool.execute(
        "insert into opt_out (tenant_id, phone, source) "
        "select 1, phone, 'sms' from contact where tenant_id = 1 and id % 50 = 2"
    )
    for audience in (
        Audience(),
        Audience((), [2], "male"),
        Audience([1], (), None, "40_plus"),
        Audience([2, 1], (), "male"),
        Audience([1, 2], [2]),
    ):
        exact = await contacts.audience_count(pool, 1, audience, AS_OF)
        sampled = await pool.fetchval(
            contacts.SQL["audience_estimate"], 1, *audience.parameters(AS_OF), 10_000
        )
        # Four standard errors of a share in a sample of 10,000, and what a stratum may hide.
        assert abs(sampled - exact) < 0.025 * n, audience
        assert await contacts.audience_estimate(pool, 1, audience, AS_OF) == exact
    nobody_left_out = (2, *Audience().parameters(AS_OF), 10_000)
    assert await pool.fetchval(contacts.SQL["audience_estimate"], *nobody_left_out) == n


# -------------------------------------------------------------------------------------- recipients


async def test_recipients_are_appended_once_a_number_and_read_in_order(
    api: Api, shop: TenantCaller
) -> None:
    pool = api.ctx.pool
    made = await shop.post("/api/campaigns", {"name": "Sale", "messageText": "Hi"})
    campaign_id = int(made.body["id"])
    await contacts.opt_out(pool, shop.id, PHONE + 2, "sms")
    first = [
        Recipient(PHONE + 2, None, {"code": "2"}),
        Recipient(PHONE, None, {"code": "0"}),
        Recipient(None, "call me", {}),
        Recipient(PHONE, None, {"code": "again"}),
    ]
    assert await contacts.add_recipients(pool, campaign_id, first) == (2, 1, 1)
    second = [Recipient(PHONE, None, {}), Recipient(PHONE + 1, None, {}), Recipient(None, "", {})]
    assert await contacts.add_recipients(pool, campaign_id, second) == (1, 1, 1)
    assert await contacts.add_recipients(pool, campaign_id, []) == (0, 0, 0)
    page = await contacts.recipient_page(pool, campaign_id, 0, 3)
    rest = await contacts.recipient_page(pool, campaign_id, page[-1]["id"], 3)
    assert [
        (r["phone"], r["raw"], json.loads(r["attributes"]), r["opted_out"]) for r in (*page, *rest)
    ] == [
        (PHONE + 2, None, {"code": "2"}, True),
        (PHONE, None, {"code": "0"}, False),
        (None, "call me", {}, False),
        (PHONE + 1, None, {}, False),
        (None, "", {}, False),
    ]
    assert await contacts.recipient_count(pool, campaign_id) == 2
    await contacts.opt_in(pool, shop.id, PHONE + 2)
    assert await contacts.recipient_count(pool, campaign_id) == 3


async def test_filters_are_those_of_the_room(pool: Pool) -> None:
    async with pool.acquire() as db, db.transaction():
        made = await contacts.create(db, 1, PHONE, {"last_name": "Παππά"})
    assert await contacts.find(pool, 1, Filters(q="παππ"), "GR", 10, 0) == ([made], 1)
    assert await contacts.find(pool, 2, Filters(q="παππ"), "GR", 10, 0) == ([], 0)
