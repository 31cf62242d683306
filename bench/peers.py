"""General job queues on Postgres that do the same job: one of theirs for a batch of 500, as their documentation shows.

What is not theirs is as fast as we can make it: contacts are read from Postgres without those who opted out, texts made
with a signed link, rows copied in, and POST and results are the bare pipeline's (bench/bare.py). Unlike its rows, theirs
do the job: a number is there once, and a receipt finds its message by Mitto's id, which is written as smsd writes it.
Theirs are the jobs: many put in by one call, fetched, run with several at once, marked as done. Logging is at warnings.

`python -m bench.peers NAME DSN MITTO_URL N`, as bench/bare.py.
"""

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator
from typing import Any

import orjson
import uvloop

from bench import bare
from bench.bare import CHUNK, CONNECTIONS, IN_FLIGHT, Begin, Work, conduct, text_of
from bench.common import FIRST_PHONE
from smsd.text import unsubscribe_signer

SCHEMA = """
create table contact (id bigint primary key, phone bigint not null, first_name text);
create table opt_out (phone bigint primary key);
create unique index message_phone on message (phone);
create table provider_message (provider_id text collate "C" primary key, message_id bigint not null);
"""
SETTLE = f"""
with ids as (
  insert into provider_message (provider_id, message_id)
  select u.provider_id, u.id from unnest($1::bigint[], $2::text[]) as u(id, provider_id) order by u.provider_id)
{bare.SETTLE}"""
FILL = "insert into contact select g, $1 + g, 'Name' || g from generate_series(1, $2::bigint) g"
PAGE = """
select id, phone, first_name from contact c
 where id > $1 and not exists (select from opt_out o where o.phone = c.phone) order by id limit $2
"""
_tasks: list[asyncio.Task[Any]] = []


async def add_contacts(work: Work) -> None:
    """Those to send to, there before the clock runs; and what messages need that are to be found again."""
    await work.pool.execute(SCHEMA)
    work.settle = SETTLE
    await work.pool.execute(FILL, FIRST_PHONE, work.n)
    await work.pool.execute("vacuum (analyze) contact")


async def expand(work: Work) -> AsyncIterator[list[tuple[int, int]]]:
    """Makes messages of contacts, chunk by chunk; yields the batches of each: first and last id."""
    sign, cursor = unsubscribe_signer(secrets.token_bytes(32), 1, 1), 0
    while page := await work.pool.fetch(PAGE, cursor, CHUNK):
        cursor = page[-1][0]
        yield await work.copy([(i, phone, text_of(name, sign(phone))) for i, phone, name in page])


async def pgqueuer(work: Work) -> Begin:
    """A pool as its driver, jobs enqueued by lists; it fetches and marks them many at a time."""
    from pgqueuer import AsyncpgPoolDriver, PgQueuer, Queries

    await add_contacts(work)
    driver = AsyncpgPoolDriver(work.pool)
    queries = Queries(driver)
    await queries.install()
    queue = PgQueuer(driver)

    async def send(job: Any) -> None:
        await work.send(*orjson.loads(job.payload))

    queue.entrypoint("send")(send)
    _tasks.append(
        asyncio.create_task(queue.run(batch_size=IN_FLIGHT, max_concurrent_tasks=2 * IN_FLIGHT))
    )

    async def begin() -> None:
        async for batches in expand(work):
            payloads = [orjson.dumps(batch) for batch in batches]
            await queries.enqueue(["send"] * len(batches), payloads, [0] * len(batches))
        await work.done()

    return begin


async def procrastinate(work: Work) -> Begin:
    """Its psycopg pool, jobs deferred as batches, a worker with several at once that listens for them."""
    from procrastinate import App, PsycopgConnector

    await add_contacts(work)
    app = App(
        connector=PsycopgConnector(conninfo=work.dsn, min_size=CONNECTIONS, max_size=CONNECTIONS)
    )
    await app.open_async()
    await app.schema_manager.apply_schema_async()

    async def send(first: int, last: int) -> None:
        await work.send(first, last)

    task = app.task(name="send")(send)
    _tasks.append(
        asyncio.create_task(
            app.run_worker_async(concurrency=2 * IN_FLIGHT, install_signal_handlers=False)
        )
    )

    async def begin() -> None:
        async for batches in expand(work):
            await task.batch_defer_async(*({"first": one[0], "last": one[1]} for one in batches))
        await work.done()

    return begin


if __name__ == "__main__":
    uvloop.run(
        conduct({"pgqueuer": pgqueuer, "procrastinate": procrastinate}[sys.argv[1]], *sys.argv[2:])
    )
