"""Erasure: a person's data is gone from everywhere in the tenant, sums and money are as they were, and nothing that
happens later texts the person by what is left."""

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import Api, Reply, TenantCaller
from shop import ACCEPTED, PHONE, REFUSED, UNKNOWN, Shop, shop_of, until_waited_for
from support import assert_sound

from smsd import campaigns, certificates, contacts, database, expansions, imports, queue
from smsd.campaigns import Totals
from smsd.certificates import Certificate
from smsd.expansions import Chunk, Rendered
from smsd.mitto import ItemResult

NUMBER = PHONE


@dataclass
class Case:
    """A tenant with one contact, called Maria, whose number is the first that the shop texts."""

    api: Api
    pool: database.Pool
    tenant: TenantCaller
    shop: Shop
    contact_id: int

    async def erase(self) -> Reply:
        return await self.tenant.delete(f"/api/contacts/{self.contact_id}?erase=true")

    async def erased(self) -> None:
        reply = await self.erase()
        assert reply.status == 204, reply.text
        await assert_sound(self.pool)

    async def traces(self) -> list[str]:
        """Tables in which the number, the name or a text to it is still found."""
        found = []
        for row in await self.pool.fetch(
            "select relname from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace order by 1"
        ):
            query = f"select count(*) from {row[0]} r where r::text ~ '{NUMBER}|Maria|Hi 0'"
            if await self.pool.fetchval(query):
                found.append(row[0])
        return found

    async def totals(self, campaign_id: int) -> Totals:
        return (await self.shop.progress(campaign_id)).totals

    async def single(self) -> int:
        async with self.pool.acquire() as connection, connection.transaction():
            found = await queue.add_message(
                connection, self.shop.id, self.shop.account_id, NUMBER, "Hi 0", "Shop", 2
            )
        assert found is not None
        return found


@pytest.fixture
async def case(api: Api) -> Case:
    account_id = await api.new_account(requestsPerSecond=50_000)
    tenant = await api.new_tenant(account_id=account_id, credits=1_000, requestsPerSecond=50_000)
    shop = await shop_of(api, tenant)
    listed = await tenant.post("/api/lists", {"name": "Regulars"})
    given = {
        "phone": f"+{NUMBER}", "firstName": "Maria", "email": "maria@example.com", "attributes": {"city": "Athens"},
        "lists": [listed.body["id"]],
    }  # fmt: skip
    made = await tenant.post("/api/contacts", given, headers={"Idempotency-Key": "once"})
    assert made.status == 201, made.text
    return Case(api, api.ctx.pool, tenant, shop, made.body["id"])


async def certificate(case: Case, campaign_id: int) -> Certificate:
    async with case.pool.acquire() as db, certificates.snapshot(db):
        found = await certificates.issue(db, case.shop.id, campaign_id)
    assert found is not None
    return found


async def test_without_erase_messages_stay_as_they_are(case: Case) -> None:
    campaign_id = await case.shop.sending(3)
    await case.shop.send_all(ACCEPTED)
    assert (await case.tenant.delete(f"/api/contacts/{case.contact_id}")).status == 204
    shown = (await case.tenant.get(f"/api/campaigns/{campaign_id}/messages")).body["items"]
    assert shown[0]["to"] == f"+{NUMBER}"


async def test_nothing_of_the_person_is_found_anywhere(case: Case) -> None:
    await case.shop.sending(5)
    await case.shop.send_all(ACCEPTED, REFUSED)
    await case.single()
    await case.shop.send_all(ACCEPTED)
    case.shop.phones = PHONE
    await case.shop.sending(5)
    draft = await case.shop.draft()
    await case.pool.execute(
        "insert into recipient (campaign_id, phone, attributes) values ($1, $2, $3)",
        draft.id, NUMBER, {"firstName": "Maria"},
    )  # fmt: skip
    await case.pool.execute(
        "insert into raw_receipt (account_id, body, why) values ($1, $2, 'unreadable')",
        case.shop.account_id, f'{{"to": "{NUMBER}"}}',
    )  # fmt: skip
    await case.pool.execute(
        "update message set detail = $1 where phone = $2", f"no such number {NUMBER}", NUMBER
    )
    assert await case.traces() == ["contact", "message", "raw_receipt", "recipient"]
    await case.erased()
    assert await case.traces() == []
    assert await case.pool.fetchval("select count(*) from contact_list_member") == 0
    assert (await case.erase()).status == 404


async def test_what_was_sent_stays_as_what_it_cost_and_came_to(case: Case) -> None:
    campaign_id = await case.shop.sending(6, batch_size=3)
    (first,) = await case.shop.post()
    await case.shop.answer(*first, ACCEPTED, REFUSED, UNKNOWN)
    await case.shop.send_all(ACCEPTED)
    await campaigns.finish(case.pool)
    before, money = await case.totals(campaign_id), await case.pool.fetchrow("table credit")
    certified = await certificate(case, campaign_id)
    await case.erased()
    assert await case.totals(campaign_id) == before
    assert await case.pool.fetchrow("table credit") == money
    after = await certificate(case, campaign_id)
    assert (certified.erased, after.erased) == (0, 1)
    assert after.credits == certified.credits
    assert after.sha256 != certified.sha256
    lines = (await case.tenant.get(f"/api/campaigns/{campaign_id}/messages.csv")).text.splitlines()
    assert lines[1].split(",")[1:3] == ["erased", "accepted"]
    assert lines[2].split(",")[1] == f"+{NUMBER + 1}"
    reply = await case.tenant.get(f"/api/campaigns/{campaign_id}/certificate")
    assert (reply.body["erased"], reply.body["sha256"]) == (1, after.sha256)
    shown = (await case.tenant.get(f"/api/campaigns/{campaign_id}/messages")).body["items"][0]
    assert (shown["to"], shown["text"], shown["status"]) == ("erased", None, "accepted")


async def test_a_receipt_still_finds_the_message(case: Case) -> None:
    campaign_id = await case.shop.sending(1)
    await case.shop.send_all(ACCEPTED)
    await case.erased()
    await case.shop.receive(M1=30)
    assert (await case.totals(campaign_id)).delivered == 1


@pytest.mark.parametrize("leased", [False, True])
@pytest.mark.parametrize("others", [0, 4])
async def test_what_waits_is_not_sent_and_its_credits_come_back(
    case: Case, leased: bool, others: int
) -> None:
    campaign_id = await case.shop.begin(1 + others)
    await case.shop.expand(1 + others)
    grants = await case.shop.claim() if leased else []
    await case.erased()
    sums = await case.totals(campaign_id)
    assert (sums.skipped, sums.queued + sums.processing) == (1, others)
    assert await case.pool.fetchval("select reserved from credit") == others
    posted = []
    for grant in grants:
        intent = await queue.intent(case.pool, grant, case.shop.replica_id)
        if intent.verdict == "post":
            posted.append((grant, intent))
    if not leased:
        posted = await case.shop.post()
    phones = [phone for _, intent in posted for phone in intent.phones]
    assert phones == [NUMBER + 1 + n for n in range(others)]
    for grant, intent in posted:
        await case.shop.answer(grant, intent, ACCEPTED)
    await campaigns.finish(case.pool)
    assert await case.shop.status(campaign_id) == "completed"
    assert (await certificate(case, campaign_id)).reasons["skipped"] == {"erased": 1}
    await assert_sound(case.pool)


async def test_what_is_in_flight_ends_first(case: Case) -> None:
    campaign_id = await case.shop.sending(2)
    ((grant, intent),) = await case.shop.post()
    reply = await case.erase()
    assert (reply.status, reply.body["code"]) == (409, "ERASE_LATER")
    assert reply.body["details"] == {"reason": "in_flight"}
    assert (await case.tenant.get(f"/api/contacts/{case.contact_id}")).status == 200
    await case.shop.answer(grant, intent, ACCEPTED)
    await case.erased()
    assert (await case.totals(campaign_id)).accepted == 2


async def test_an_import_under_way_comes_first(case: Case) -> None:
    job_id = await imports.begin_upload(case.pool, case.shop.id, None, "utf-8")
    await imports.add_piece(case.pool, job_id, 0, b"phone\n+306944123456\n")
    await imports.finish_upload(case.pool, job_id, 1)
    reply = await case.erase()
    assert (reply.status, reply.body["details"]) == (409, {"reason": "importing"})
    await case.pool.execute("update import_job set status = 'completed'")
    await case.erased()


async def test_an_intent_that_is_being_written_is_waited_for(case: Case) -> None:
    """It has looked who opted out and is about to read the numbers."""
    await case.shop.sending(2)
    (grant,) = await case.shop.claim()
    async with case.pool.acquire() as one, one.transaction():
        intent = await queue.intent(one, grant, case.shop.replica_id)
        erasing = asyncio.create_task(case.erase())
        await until_waited_for(case.pool, one)
    assert intent.phones == [NUMBER, NUMBER + 1]
    assert (await erasing).status == 409


async def test_a_chunk_read_before_is_not_written_after(case: Case) -> None:
    campaign_id = await case.shop.begin(3)
    expansion = await expansions.claim(case.pool, case.shop.replica_id)
    assert expansion is not None
    await case.erased()
    chunk = Chunk(3, 3, True, [Rendered(NUMBER + n, f"Hi {n}", 1) for n in range(3)], [])
    assert await expansions.commit(case.pool, expansion, chunk, case.shop.replica_id) is None
    assert await expansions.claim(case.pool, case.shop.replica_id) is not None
    assert (await case.totals(campaign_id)).total == 0
    assert await case.traces() == []


async def test_a_person_who_opted_out_is_not_texted_after_the_next_upload(case: Case) -> None:
    await contacts.opt_out(case.pool, case.shop.id, NUMBER, "link")
    await case.erased()
    assert await case.traces() == ["opt_out"]
    again = await case.tenant.post("/api/contacts", {"phone": f"+{NUMBER}"})
    assert again.body["isSubscribed"] is False


async def test_somebody_who_had_not_opted_out_may_come_back(case: Case) -> None:
    await case.erased()
    again = await case.tenant.post("/api/contacts", {"phone": f"+{NUMBER}"})
    assert (again.status, again.body["isSubscribed"]) == (201, True)


async def test_other_tenants_and_other_people_are_left_alone(case: Case) -> None:
    other = await case.api.new_tenant(account_id=case.shop.account_id, credits=100)
    theirs = await shop_of(case.api, other)
    made = await other.post("/api/contacts", {"phone": f"+{NUMBER}", "firstName": "Maria"})
    sent = await theirs.sending(2)
    await case.shop.sending(2)
    async with case.pool.acquire() as connection, connection.transaction():
        one = await queue.add_message(
            connection, theirs.id, theirs.account_id, NUMBER, "Hi", "Shop", 1
        )
    assert (await other.delete(f"/api/contacts/{case.contact_id}?erase=true")).status == 404
    await case.erased()
    assert (await other.get(f"/api/contacts/{made.body['id']}")).body["firstName"] == "Maria"
    shown = (await other.get(f"/api/campaigns/{sent}/messages")).body["items"]
    assert [(one["to"], one["text"]) for one in shown] == [
        (f"+{NUMBER}", "Hi 0"), (f"+{NUMBER + 1}", "Hi 1"),
    ]  # fmt: skip
    assert (await other.get(f"/api/messages/{one}")).body["to"] == f"+{NUMBER}"
    kept = await case.pool.fetchval("select count(*) from message where phone = $1", NUMBER + 1)
    assert kept == 2


async def test_two_erased_people_cannot_be_told_apart_by_their_numbers(case: Case) -> None:
    """The number that is left is chance: the same person has another each time."""
    left = []
    for _ in range(2):
        case.shop.phones = NUMBER
        await case.shop.sending(1)
        await case.erased()
        left.append(await case.pool.fetchval("select phone from message order by id desc limit 1"))
        again = await case.tenant.post("/api/contacts", {"phone": f"+{NUMBER}"})
        case.contact_id = again.body["id"]
    assert left[0] != left[1]
    assert max(left) < 0


# ------------------------------------------------------------------------- what opens messages again


async def test_a_refused_message_of_an_erased_person_is_not_retried(case: Case) -> None:
    campaign_id = await case.shop.sending(2, batch_size=1)
    await case.shop.send_all(REFUSED)
    await campaigns.finish(case.pool)
    await case.erased()
    await case.shop.act(campaign_id, campaigns.retry_failed)
    posted = await case.shop.post(5)
    assert [intent.phones for _, intent in posted] == [[NUMBER + 1]]
    await assert_sound(case.pool)


async def test_an_unknown_message_of_an_erased_person_stays_unknown_and_is_not_sent_again(
    case: Case,
) -> None:
    campaign_id = await case.shop.sending(2, batch_size=2)
    ((grant, intent),) = await case.shop.post()
    await queue.settle_batch(case.pool, grant.batch_id, intent.attempt, "unknown", "unknown")
    await case.erased()
    assert (await case.totals(campaign_id)).unknown == 2
    await queue.settle_batch(
        case.pool, grant.batch_id, intent.attempt, "again", "retry", delay_seconds=0, most=6
    )
    posted = await case.shop.post(5)
    assert [intent.phones for _, intent in posted] == [[NUMBER + 1]]
    await assert_sound(case.pool)


@pytest.mark.parametrize("state", ["queued", "waiting", "unknown", "refused", "accepted"])
async def test_a_single_message_of_an_erased_person_is_never_sent_again(
    case: Case, state: str
) -> None:
    message_id = await case.single()
    await case.pool.execute("update batch set on_unknown = 'resend', reference = 'Maria'")
    grant = attempt = None
    if state != "queued":
        ((grant, intent),) = await case.shop.post()
        attempt = intent.attempt
        if state in ("accepted", "refused"):
            await case.shop.answer(grant, intent, ACCEPTED if state == "accepted" else REFUSED)
        else:
            action = "again" if state == "waiting" else "unknown"
            await queue.settle_batch(
                case.pool, grant.batch_id, attempt, action, action, delay_seconds=0, most=6
            )
    await case.erased()
    assert await case.traces() == []
    await case.pool.fetchval("select resend_asked(6, 0)")
    if grant is not None:
        late: list[Any] = [grant.batch_id, attempt, "again", "retry"]
        await queue.settle_batch(case.pool, *late, delay_seconds=0, most=6)
        await queue.withdraw(case.pool, grant, "never left")
    assert await case.shop.post(5) == []
    shown = (await case.tenant.get(f"/api/messages/{message_id}")).body
    expected = (
        "cancelled" if state in ("queued", "waiting") else "failed" if state == "refused" else state
    )
    assert (shown["status"], shown["to"], shown["reference"]) == (expected, "erased", None)
    await assert_sound(case.pool)


async def test_a_late_answer_for_a_whole_batch_finds_the_erased_message_too(case: Case) -> None:
    campaign_id = await case.shop.sending(2, batch_size=2)
    ((grant, intent),) = await case.shop.post()
    await queue.settle_batch(case.pool, grant.batch_id, intent.attempt, "unknown", "unknown")
    await case.erased()
    items = [ItemResult(one, ACCEPTED, f"L{one}", None) for one in intent.ids]
    await queue.settle_items(
        case.pool, grant.batch_id, intent.attempt, queue.Answer.of(items, "bulk", 200)
    )
    assert (await case.totals(campaign_id)).accepted == 2
    await assert_sound(case.pool)
