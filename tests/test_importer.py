"""Imports: from the bytes that a client sends to contacts, once each, whatever happens on the way."""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import Api, TenantCaller

from smsd import contacts, database, imports, queue
from smsd.database import Pool
from smsd.importer import BLOCK_RECORDS, Importer
from smsd.imports import ERRORS_KEPT, Import

SAMPLE = Path(str(files("smsd"))) / "data" / "contacts.csv"
PIECE = 100_000
HEADER = b"phone,firstName,city\n"
PHONE = 306900000000


@pytest.fixture
async def tenant_id(pool: Pool) -> int:
    await pool.execute("insert into traffic_account (name, provider_id) values ('Main', 'mitto')")
    made: int = await pool.fetchval(
        "insert into tenant (name, account_id) values ('Shop', 1) returning id"
    )
    return made


async def uploaded(
    pool: Pool, tenant_id: int, data: bytes, *, list_id: int | None = None, charset: str = "utf-8"
) -> int:
    """A queued job with these bytes, in pieces."""
    job_id = await imports.begin_upload(pool, tenant_id, list_id, charset)
    for start in range(0, len(data), PIECE):
        await imports.add_piece(pool, job_id, start, data[start : start + PIECE])
    await imports.finish_upload(pool, job_id, data.count(b"\n"))
    return job_id


async def replica(pool: Pool) -> int:
    return await queue.register(pool, "test", "0")


async def drain(importer: Importer, replica_id: int) -> int:
    """Imports all there is; how many blocks that took."""
    blocks = 0
    while await importer.import_block(replica_id):
        blocks += 1
    return blocks


async def imported(pool: Pool, tenant_id: int, data: bytes, **options: Any) -> Import:
    job_id = await uploaded(pool, tenant_id, data, **options)
    replica_id = await replica(pool)
    await drain(Importer(pool, lambda: replica_id), replica_id)
    return await shown(pool, tenant_id, job_id)


async def shown(pool: Pool, tenant_id: int, job_id: int) -> Import:
    job = await imports.get(pool, tenant_id, job_id)
    assert job is not None
    return job


async def all_contacts(pool: Pool) -> dict[int, tuple[str | None, dict[str, Any]]]:
    rows = await pool.fetch("select phone, first_name, attributes from contact")
    return {row["phone"]: (row["first_name"], row["attributes"]) for row in rows}


def lines(n: int, start: int = 0) -> bytes:
    return b"".join(b"+%d,n%d,c\n" % (PHONE + start + i, start + i) for i in range(n))


# ------------------------------------------------------------------------------------------- files


async def test_the_sample_becomes_its_contacts(pool: Pool, tenant_id: int) -> None:
    data = SAMPLE.read_bytes()
    job = await imported(pool, tenant_id, data)
    assert (job.status, job.created, job.updated, job.skipped) == ("completed", 9500, 260, 10)
    assert job.processed == job.total == 9770
    assert len(job.errors) == 10
    rows = data.decode().splitlines()
    for error in job.errors:
        assert error["value"].split(",")[0] in rows[error["line"] - 1]
        assert error["message"]
    assert await pool.fetchval("select count(*) from contact") == 9500
    assert await pool.fetchval("select count(*) from import_piece") == 0

    again = await imported(pool, tenant_id, data)
    assert (again.created, again.updated, again.skipped) == (0, 9760, 10)


async def test_a_contact_has_what_its_line_says(pool: Pool, tenant_id: int) -> None:
    data = (
        "\ufeffPhone number;First name;Last name;email;gender;birth date;Loyalty points\r\n"
        '694 412 3456;"Μαρία ""Μαίρη""";Παππά;m@x.gr;F;31.12.1990;12\r\n'
    ).encode()
    job = await imported(pool, tenant_id, data)
    assert (job.created, job.errors) == (1, [])
    [one], _ = await contacts.find(pool, tenant_id, contacts.Filters(), "GR", 10, 0)
    assert (one.phone, one.first_name, one.last_name) == (306944123456, 'Μαρία "Μαίρη"', "Παππά")
    assert (one.email, one.gender, one.birthday) == ("m@x.gr", "female", date(1990, 12, 31))
    assert one.attributes == {"Loyalty points": "12"}
    assert one.is_subscribed


async def test_a_blank_cell_keeps_what_is_known_and_attributes_are_merged(
    pool: Pool, tenant_id: int
) -> None:
    await imported(pool, tenant_id, b"phone,firstName,city,code\n6944123456,Maria,Athens,1\n")
    job = await imported(
        pool, tenant_id,
        b"phone,firstName,city,size\n6944123456,,Patra,\n+306944123456,,,L\n6944123457,Nikos,,\n",
    )  # fmt: skip
    assert (job.created, job.updated) == (1, 2)
    assert await all_contacts(pool) == {
        306944123456: ("Maria", {"city": "Patra", "code": "1", "size": "L"}),
        306944123457: ("Nikos", {}),
    }


async def test_what_does_not_change_is_not_written(pool: Pool, tenant_id: int) -> None:
    await imported(pool, tenant_id, HEADER + lines(3))
    before = await pool.fetch("select xmin, updated_at from contact order by id")
    await imported(pool, tenant_id, HEADER + lines(2) + b"+306900000002,other,c\n")
    after = await pool.fetch("select xmin, updated_at from contact order by id")
    assert before[:2] == after[:2]
    assert before[2]["updated_at"] < after[2]["updated_at"]


async def test_is_subscribed_opts_out_and_never_in(pool: Pool, tenant_id: int) -> None:
    await contacts.opt_out(pool, tenant_id, PHONE, "sms")
    data = b"phone,isSubscribed\n+306900000000,true\n+306900000001,no\n+306900000002,yes\n+306900000003,\n+306900000001,yes\n"
    job = await imported(pool, tenant_id, data)
    assert (job.created, job.updated, job.skipped) == (4, 1, 0)
    rows = await pool.fetch("select phone, source from opt_out order by phone")
    assert [tuple(row) for row in rows] == [(PHONE, "sms"), (PHONE + 1, "import")]


async def test_all_of_a_file_are_put_on_the_list(pool: Pool, tenant_id: int) -> None:
    list_id = (await contacts.create_list(pool, tenant_id, "Regulars")).id
    await imported(pool, tenant_id, HEADER + lines(3))
    job = await imported(pool, tenant_id, HEADER + lines(5) + lines(1), list_id=list_id)
    assert (job.created, job.updated) == (2, 4)
    found = await contacts.get_list(pool, tenant_id, list_id)
    assert found is not None
    assert found.contacts == 5
    assert await pool.fetchval("select count(*) from contact_list_member") == 5


async def test_a_list_that_is_deleted_meanwhile_fails_the_import(
    pool: Pool, tenant_id: int
) -> None:
    list_id = (await contacts.create_list(pool, tenant_id, "Regulars")).id
    job_id = await uploaded(pool, tenant_id, HEADER + lines(3), list_id=list_id)
    async with pool.acquire() as db, db.transaction():
        assert await contacts.delete_list(db, tenant_id, list_id)
    replica_id = await replica(pool)
    await drain(Importer(pool, lambda: replica_id), replica_id)
    job = await shown(pool, tenant_id, job_id)
    assert job.status == "failed"
    assert "the list was deleted" in job.errors[0]["message"]
    assert await pool.fetchval("select count(*) from contact") == 0


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "no phone": (b"name,city\nx,y\n", "no column phone; it has 'name, city'. Taken are phone,"),
    "UTF-16": ("phone\n6944123456\n".encode("utf-16"), "UTF-16; save it as CSV UTF-8"),
    "a workbook": (b"PK\x03\x04" + bytes(1000), "an Excel workbook; save it as CSV UTF-8"),
    "blank": (b"\r\n\r\n", "has no header"),
    "a header without end": (b"phone," + b"x" * 300_000, "has no header"),
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_a_file_that_cannot_be_read_fails_and_says_why(
    pool: Pool, tenant_id: int, name: str
) -> None:
    data, says = UNREADABLE[name]
    job = await imported(pool, tenant_id, data)
    assert (job.status, job.created, job.skipped) == ("failed", 0, 0)
    [error] = job.errors
    assert says in error["message"]
    assert error["line"] == 1
    assert job.finished_at is not None
    assert await pool.fetchval("select count(*) from import_piece") == 0


async def test_a_header_alone_is_an_import_of_nobody(pool: Pool, tenant_id: int) -> None:
    for data in (b"phone,firstName", b"phone,firstName\r\n\r\n"):
        job = await imported(pool, tenant_id, data)
        assert (job.status, job.processed, job.total, job.errors) == ("completed", 0, 0, [])


async def test_lines_of_another_encoding_are_told_and_a_declared_one_is_read(
    pool: Pool, tenant_id: int
) -> None:
    data = b"phone,firstName\n6944123456,Maria\n6944123457," + "Νίκος\n".encode("iso-8859-7")
    job = await imported(pool, tenant_id, data)
    assert (job.created, job.skipped) == (1, 1)
    assert job.errors[0]["line"] == 3
    assert "is not UTF-8" in job.errors[0]["message"]
    job = await imported(pool, tenant_id, data, charset="iso8859-7")
    assert (job.created, job.updated, job.skipped) == (1, 1, 0)
    assert (await all_contacts(pool))[306944123457] == ("Νίκος", {})


async def test_the_first_thousand_errors_are_kept_and_all_are_counted(
    pool: Pool, tenant_id: int
) -> None:
    bad = BLOCK_RECORDS + 700
    job = await imported(pool, tenant_id, HEADER + b"x,y,z\n" * bad + lines(1))
    assert (job.created, job.skipped, len(job.errors)) == (1, bad, ERRORS_KEPT)
    assert [error["line"] for error in job.errors] == list(range(2, ERRORS_KEPT + 2))


async def test_a_cell_with_a_line_break_does_not_shift_the_lines_of_errors(
    pool: Pool, tenant_id: int
) -> None:
    record = b'+306900000000,"a\nb",c\n'
    job = await imported(pool, tenant_id, HEADER + record * BLOCK_RECORDS + b"bad,y,z\n")
    assert (job.created, job.updated, job.skipped) == (1, BLOCK_RECORDS - 1, 1)
    assert job.errors[0]["line"] == 2 + 2 * BLOCK_RECORDS
    assert job.errors[0]["value"] == "bad"


# --------------------------------------------------------------------------------------- on the way


async def test_who_dies_in_the_middle_is_followed_by_another_who_counts_nothing_twice(
    pool: Pool, tenant_id: int
) -> None:
    n = 3 * BLOCK_RECORDS + 10
    data = HEADER + lines(n) + b"bad,y,z\n" + lines(500)
    job_id = await uploaded(pool, tenant_id, data)
    first, second = await replica(pool), await replica(pool)
    importer = Importer(pool, lambda: first)
    assert await importer.import_block(first)

    # Wherever it is cut off: claimed, read, written in part, or committed without our knowing.
    cut_off = 0
    for turns in range(1, 60, 4):
        task = asyncio.create_task(importer.import_block(first))
        for _ in range(turns):
            await asyncio.sleep(0.002)
            if task.done():
                break
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        cut_off += task.cancelled()
    assert cut_off > 0
    assert not await Importer(pool, lambda: second).import_block(second)  # the first still lives
    await queue.leave(pool, first, "killed")
    await drain(Importer(pool, lambda: second), second)

    job = await shown(pool, tenant_id, job_id)
    assert (job.status, job.created, job.updated, job.skipped) == ("completed", n, 500, 1)
    assert job.processed == job.total == n + 501
    assert [error["line"] for error in job.errors] == [n + 2]
    assert await pool.fetchval("select count(*) from contact") == n


async def test_a_replica_that_was_declared_dead_writes_nothing_more(
    pool: Pool, tenant_id: int
) -> None:
    job_id = await uploaded(pool, tenant_id, HEADER + lines(10))
    first, second = await replica(pool), await replica(pool)
    stale = await imports.claim(pool, first)
    assert stale is not None
    await queue.leave(pool, first, "no heartbeat")
    await drain(Importer(pool, lambda: second), second)
    block = imports.Block({"charset": "utf-8"}, cursor=stale.size, line=12)
    assert not await imports.write(pool, stale, first, block, block.arrays())
    assert (await shown(pool, tenant_id, job_id)).created == 10


async def test_two_replicas_share_many_imports(pool: Pool, tenant_id: int) -> None:
    jobs = [await uploaded(pool, tenant_id, HEADER + lines(700, start=300 * n)) for n in range(6)]
    replicas = [await replica(pool) for _ in range(2)]
    await asyncio.gather(*(drain(Importer(pool, lambda: 0), one) for one in replicas))
    done = [await shown(pool, tenant_id, job_id) for job_id in jobs]
    assert {job.status for job in done} == {"completed"}
    assert sum(job.created for job in done) == 300 * 5 + 700
    assert sum(job.created + job.updated for job in done) == 6 * 700
    assert await pool.fetchval("select audience_size(0, $1)", tenant_id) == 300 * 5 + 700


async def test_a_small_file_does_not_wait_for_a_large_one(pool: Pool, tenant_id: int) -> None:
    large = await uploaded(pool, tenant_id, HEADER + lines(4 * BLOCK_RECORDS))
    small = await uploaded(pool, tenant_id, HEADER + lines(3))
    replica_id = await replica(pool)
    importer = Importer(pool, lambda: replica_id)
    for _ in range(2):
        assert await importer.import_block(replica_id)
    assert (await shown(pool, tenant_id, small)).status == "completed"
    running = await shown(pool, tenant_id, large)
    assert (running.status, running.processed) == ("running", BLOCK_RECORDS)
    assert running.total >= 4 * BLOCK_RECORDS


@asynccontextmanager
async def running(importer: Importer) -> AsyncIterator[None]:
    task = asyncio.create_task(importer.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def finished(pool: Pool, tenant_id: int, job_id: int) -> Import:
    async with asyncio.timeout(30):
        while True:
            with suppress(*database.AWAY):
                job = await shown(pool, tenant_id, job_id)
                if job.status not in ("queued", "running"):
                    return job
            await asyncio.sleep(0.01)


async def test_the_loop_outlives_the_loss_of_its_connections(
    pool: Pool, tenant_id: int, connection: database.Connection
) -> None:
    n = 6 * BLOCK_RECORDS
    job_id = await uploaded(pool, tenant_id, HEADER + lines(n))
    replica_id = await replica(pool)
    async with running(Importer(pool, lambda: replica_id)):
        for _ in range(3):
            await asyncio.sleep(0.1)
            await connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where datname = current_database() and pid <> pg_backend_pid()"
            )
        job = await finished(pool, tenant_id, job_id)
    assert (job.status, job.created, job.updated) == ("completed", n, 0)


async def test_a_job_that_nobody_can_read_fails_with_a_word_and_others_go_on(
    pool: Pool, tenant_id: int
) -> None:
    """Column names that are no list: nobody writes such a job, so nobody reads one."""
    poison = await uploaded(pool, tenant_id, HEADER + lines(3))
    await pool.execute("update import_job set header = '{\"names\": 5}'")
    sound = await uploaded(pool, tenant_id, HEADER + lines(3))
    replica_id = await replica(pool)
    async with running(Importer(pool, lambda: replica_id)):
        assert (await finished(pool, tenant_id, sound)).status == "completed"
        failed = await finished(pool, tenant_id, poison)
    assert failed.status == "failed"
    assert [error["message"] for error in failed.errors] == [
        "the file cannot be read on from here (TypeError); the log has more"
    ]
    assert await pool.fetchval("select count(*) from import_piece") == 0


async def test_the_loop_waits_for_a_registration_and_hears_of_uploads(
    pool: Pool, tenant_id: int
) -> None:
    registered: list[int] = []
    importer = Importer(pool, lambda: registered[0] if registered else None)
    async with running(importer):
        job_id = await uploaded(pool, tenant_id, HEADER + lines(3))
        importer.wake()
        await asyncio.sleep(0.05)
        assert (await shown(pool, tenant_id, job_id)).status == "queued"
        registered.append(await replica(pool))
        importer.wake()
        assert (await finished(pool, tenant_id, job_id)).created == 3


async def test_a_large_file_is_read_in_constant_memory_and_without_holding_up_others(
    pool: Pool, tenant_id: int
) -> None:
    n = 100_000
    job_id = await imports.begin_upload(pool, tenant_id, None, "utf-8")
    data = HEADER + lines(n)
    for start in range(0, len(data), 1 << 20):
        await imports.add_piece(pool, job_id, start, data[start : start + (1 << 20)])
    await imports.finish_upload(pool, job_id, n)
    del data
    replica_id = await replica(pool)
    importer = Importer(pool, lambda: replica_id)
    for _ in range(3):
        await importer.import_block(replica_id)
    before, turns = resident_megabytes(), 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.002)
            turns += 1

    turning = asyncio.create_task(turn())
    blocks = await drain(importer, replica_id)
    turning.cancel()
    assert (await shown(pool, tenant_id, job_id)).created == n
    assert resident_megabytes() - before < 20
    assert turns > 5 * blocks


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


# ----------------------------------------------------------------------------------------- over HTTP

CSV = {"Content-Type": "text/csv"}
URL = "/api/contacts/import"


@pytest.fixture
async def shop(api: Api) -> TenantCaller:
    return await api.new_tenant()


async def import_all(api: Api) -> None:
    replica_id = await replica(api.ctx.pool)
    await drain(Importer(api.ctx.pool, lambda: replica_id), replica_id)


async def test_a_body_becomes_contacts(api: Api, shop: TenantCaller) -> None:
    list_id = (await shop.post("/api/lists", {"name": "Regulars"})).body["id"]
    accepted = await shop.post(f"{URL}?listId={list_id}", data=SAMPLE.read_bytes(), headers=CSV)
    assert accepted.status == 202, accepted.text
    assert accepted.body["status"] == "queued"
    assert api.nudges == ["importer"]
    path = f"{URL}/{accepted.body['jobId']}"
    waiting = (await shop.get(path)).body
    assert waiting["status"] == "queued"
    assert waiting["progress"] == {"processed": 0, "total": 9770}
    await import_all(api)
    done = (await shop.get(path)).body
    assert done["status"] == "completed"
    assert done["progress"] == {"processed": 9770, "total": 9770}
    results = done["results"]
    assert (results["created"], results["updated"], results["skipped"]) == (9500, 260, 10)
    assert set(results["errors"][0]) == {"line", "value", "message"}
    assert (await shop.get(f"/api/lists/{list_id}")).body["contactCount"] == 9500
    other = await api.new_tenant(name="Other")
    assert (await other.get(path)).status == 404


async def test_a_form_with_a_file_becomes_contacts(api: Api, shop: TenantCaller) -> None:
    form = aiohttp.FormData()
    form.add_field("note", "not the file")
    content = "phone,firstName\n6944123456,Μαρία\n".encode("iso-8859-7")
    form.add_field(
        "file", content, filename="contacts.csv", content_type="text/csv; charset=iso-8859-7"
    )
    accepted = await shop.post(URL, data=form)
    assert accepted.status == 202, accepted.text
    await import_all(api)
    assert await all_contacts(api.ctx.pool) == {306944123456: ("Μαρία", {})}


async def test_a_large_body_is_kept_in_pieces(api: Api, shop: TenantCaller) -> None:
    data = HEADER + lines(60_000)
    assert (await shop.post(URL, data=io.BytesIO(data), headers=CSV)).status == 202
    rows = await api.ctx.pool.fetch("select start, data from import_piece order by start")
    assert len(rows) == -(-len(data) // (1 << 20))
    assert b"".join(row["data"] for row in rows) == data
    assert [row["start"] for row in rows] == [n << 20 for n in range(len(rows))]


async def test_the_same_upload_again_is_the_same_job(api: Api, shop: TenantCaller) -> None:
    headers = {**CSV, "Idempotency-Key": "k1"}
    data = HEADER + lines(3)
    first = await shop.post(URL, data=data, headers=headers)
    second = await shop.post(URL, data=data, headers=headers)
    assert (second.status, second.body) == (202, first.body)
    other = await shop.post(URL, data=data + lines(1), headers=headers)
    assert (other.status, other.body["code"]) == (422, "IDEMPOTENCY_MISMATCH")
    assert await api.ctx.pool.fetchval("select count(*) from import_job") == 1


async def test_the_same_form_again_is_the_same_job(api: Api, shop: TenantCaller) -> None:
    replies = []
    for _ in range(2):
        form = aiohttp.FormData()  # each has a boundary of its own
        form.add_field("file", HEADER + lines(2), filename="c.csv")
        replies.append(await shop.post(URL, data=form, headers={"Idempotency-Key": "k1"}))
    assert [reply.status for reply in replies] == [202, 202]
    assert replies[0].body == replies[1].body


async def no_job_is_left(api: Api) -> None:
    assert await api.ctx.pool.fetchval("select count(*) from import_job") == 0
    assert await api.ctx.pool.fetchval("select count(*) from import_piece") == 0


async def test_what_cannot_be_an_import_is_refused_and_leaves_nothing(
    api: Api, shop: TenantCaller
) -> None:
    data = HEADER + lines(1)
    refusals: list[tuple[str, dict[str, str], bytes, int, str]] = [
        (URL, CSV, b"", 400, "VALIDATION_ERROR"),
        (URL, {"Content-Type": "application/x-www-form-urlencoded"}, data, 415, "UNSUPPORTED_MEDIA_TYPE"),
        (URL, {"Content-Type": "application/json"}, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE"),
        (URL, {"Content-Type": "text/csv; charset=utf-16"}, data, 400, "VALIDATION_ERROR"),
        (URL, {"Content-Type": "text/csv; charset=iso-8859-99"}, data, 400, "VALIDATION_ERROR"),
        (URL, {"Content-Type": "multipart/form-data"}, data, 400, "BAD_REQUEST"),
        (URL, {"Content-Type": "multipart/form-data; boundary=x"}, data, 400, "BAD_REQUEST"),
        (URL, {"Content-Type": "multipart/form-data; boundary=x"}, b"--x--\r\n", 400, "VALIDATION_ERROR"),
        (f"{URL}?listId=12345", CSV, data, 404, "NOT_FOUND"),
        (f"{URL}?list=1", CSV, data, 400, "VALIDATION_ERROR"),
        (URL, {**CSV, "Idempotency-Key": "has space"}, data, 400, "VALIDATION_ERROR"),
    ]  # fmt: skip
    for url, headers, body, status, code in refusals:
        refused = await shop.post(url, data=body, headers=headers)
        assert (refused.status, refused.body["code"]) == (status, code), (headers, refused.text)
    await no_job_is_left(api)
    assert api.nudges == []


async def test_a_list_of_another_tenant_is_not_there(api: Api, shop: TenantCaller) -> None:
    other = await api.new_tenant(name="Other")
    theirs = (await other.post("/api/lists", {"name": "Theirs"})).body["id"]
    refused = await shop.post(f"{URL}?listId={theirs}", data=HEADER, headers=CSV)
    assert (refused.status, refused.body["code"]) == (404, "NOT_FOUND")


async def begin_post(
    api: Api, shop: TenantCaller, length: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A POST that announces `length` bytes; none of them is sent yet."""
    reader, writer = await asyncio.open_connection(api.client.host, api.client.port)
    head = (
        f"POST {URL} HTTP/1.1\r\nHost: smsd\r\nAuthorization: Bearer {shop.key}\r\n"
        f"Content-Type: text/csv\r\nContent-Length: {length}\r\n\r\n"
    )
    writer.write(head.encode())
    await writer.drain()
    return reader, writer


async def test_a_file_beyond_the_limit_is_refused_before_it_is_sent(
    api: Api, shop: TenantCaller
) -> None:
    reader, writer = await begin_post(api, shop, 500_000_001)
    assert (await reader.readline()).startswith(b"HTTP/1.1 413")
    writer.close()
    await no_job_is_left(api)


async def test_an_upload_that_breaks_off_is_never_imported(api: Api, shop: TenantCaller) -> None:
    _, writer = await begin_post(api, shop, 10_000_000)
    writer.write(HEADER + lines(50_000))
    await writer.drain()
    async with asyncio.timeout(5):
        while not await api.ctx.pool.fetchval("select count(*) from import_piece"):
            await asyncio.sleep(0.01)
        writer.close()
        while await api.ctx.pool.fetchval("select count(*) from import_job"):
            await asyncio.sleep(0.01)
    await no_job_is_left(api)


async def test_uploads_that_broke_off_are_dropped_after_an_hour(pool: Pool, tenant_id: int) -> None:
    fresh = await imports.begin_upload(pool, tenant_id, None, "utf-8")
    stale = await imports.begin_upload(pool, tenant_id, None, "utf-8")
    done = await uploaded(pool, tenant_id, HEADER)
    await imports.add_piece(pool, stale, 0, HEADER)
    await pool.execute(
        "update import_job set moved_at = now() - interval '61 minutes' where id = any($1::bigint[])",
        [stale, done],
    )
    assert await imports.drop_stale_uploads(pool) == 1
    left = await pool.fetch("select id from import_job order by id")
    assert [row["id"] for row in left] == [fresh, done]
    with pytest.raises(imports.UploadGone):
        await imports.add_piece(pool, stale, len(HEADER), b"x")
    with pytest.raises(imports.UploadGone):
        await imports.finish_upload(pool, stale, 1)


async def test_bytes_are_taken_in_their_order_alone(pool: Pool, tenant_id: int) -> None:
    job_id = await imports.begin_upload(pool, tenant_id, None, "utf-8")
    await imports.add_piece(pool, job_id, 0, HEADER)
    for start in (0, len(HEADER) + 1):
        with pytest.raises(imports.UploadGone):
            await imports.add_piece(pool, job_id, start, b"x")
