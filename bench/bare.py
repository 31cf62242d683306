"""The bare pipeline: the least that sends a campaign from Postgres, as fast as we can make it. What smsd is measured by.

Rows with their personalised texts are copied in, claimed 500 at a time with SKIP LOCKED, posted with several in flight,
and the results written by one update a batch. There is nothing else: no limits, no credits, no fairness, no
opt-outs, no leases, no intents, so that a crash loses or repeats whatever was on its way.

`python -m bench.bare VARIANT DSN MITTO_URL N` says "ready", waits for a line, works, says "done". Variants:
  bare       the messages themselves are claimed, as a queue of rows does it
  batches    a row for every batch, and that is what is claimed: one update for 500 messages (the fastest we know)
  simulator  bodies made beforehand are posted and nothing else: what the simulator can take
"""

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import aiohttp
import asyncpg
import orjson
import uvloop

from bench.common import FIRST_PHONE, MITTO_KEY, PUBLIC_URL
from smsd.model import API_KEY_HEADER, BULK_PATH

BATCH = 500
CHUNK = 10_000
IN_FLIGHT = 5
CONNECTIONS = 10
ACCOUNT = "bench"
SCHEMA = """
create table message (
  id           bigint primary key,
  phone        bigint not null,
  text         text not null,
  state        smallint not null default 0,
  provider_id  text
) with (fillfactor = 70);
create table batch (first_id bigint primary key, last_id bigint not null, claimed boolean not null default false);
create index batch_waiting on batch (first_id) where not claimed;
"""
INDEX_OF_ROWS = "create index message_waiting on message (id) where state = 0"
CLAIM = """
update batch set claimed = true
 where first_id = (select first_id from batch where not claimed order by first_id limit 1 for update skip locked)
returning first_id, last_id
"""
READ = "select id, phone, text from message where id between $1 and $2 order by id"
CLAIM_ROWS = f"""
with next_ as (select id from message where state = 0 order by id limit {BATCH} for update skip locked)
update message m set state = 1 from next_ where m.id = next_.id returning m.id, m.phone, m.text
"""
SETTLE = """
update message m set state = 2, provider_id = u.provider_id
  from unnest($1::bigint[], $2::text[]) as u(id, provider_id)
 where m.id = u.id
"""

Rows = Sequence[asyncpg.Record] | Sequence[tuple[int, int, str]]
Begin = Callable[[], Awaitable[None]]
"""Works until everything is sent."""


def text_of(name: str, token: str) -> str:
    """What a recipient is sent: the text of smsd's campaign (bench/pipeline.py)."""
    return f"Hi {name}, 20% off everything until Sunday at the corner shop.\n{PUBLIC_URL}/u/{token}"


def message(i: int) -> tuple[int, int, str]:
    """Id, phone and text of recipient i; what stands for the token is as long as smsd's, and signs nothing."""
    return i, FIRST_PHONE + i, text_of(f"Name{i}", f"{i:019d}")


class Work:
    """What the bare pipeline and its peers have in common: rows in, a batch posted, its results recorded."""

    def __init__(
        self, pool: "asyncpg.Pool[asyncpg.Record]", dsn: str, mitto_url: str, n: int
    ) -> None:
        self.pool, self.dsn, self.n = pool, dsn, n
        self.settle = SETTLE
        self._url = mitto_url + BULK_PATH
        self._http = aiohttp.ClientSession(
            headers={API_KEY_HEADER: MITTO_KEY, "Content-Type": "application/json"}
        )
        self._left = n
        self._done = asyncio.Event()

    async def close(self) -> None:
        await self._http.close()

    async def add(self) -> AsyncIterator[list[tuple[int, int]]]:
        """Copies the rows in, chunk by chunk; yields the batches of each: first and last id."""
        for first in range(1, self.n + 1, CHUNK):
            last = min(first + CHUNK - 1, self.n)
            yield await self.copy([message(i) for i in range(first, last + 1)])

    async def copy(self, messages: list[tuple[int, int, str]]) -> list[tuple[int, int]]:
        """Copies one chunk in, contiguous by id; its batches."""
        await self.pool.copy_records_to_table(
            "message", records=messages, columns=["id", "phone", "text"]
        )
        first, last = messages[0][0], messages[-1][0]
        return [(i, min(i + BATCH - 1, last)) for i in range(first, last + 1, BATCH)]

    async def send(self, first: int, last: int) -> None:
        """Reads a batch, posts it and records the results."""
        await self.send_rows(await self.pool.fetch(READ, first, last))

    async def send_rows(self, rows: Rows) -> None:
        """Posts a batch, id, phone and text each, and records the results."""
        answer = orjson.loads(await self.post(body_of(rows)))
        provider_ids = [one["messageId"] for one in answer["messages"]]
        await self.pool.execute(self.settle, [row[0] for row in rows], provider_ids)
        self._left -= len(provider_ids)
        if not self._left:
            self._done.set()

    async def post(self, body: bytes) -> bytes:
        """The answer's body; raises on any status but 2xx."""
        async with self._http.post(self._url, data=body) as response:
            response.raise_for_status()
            return await response.read()

    async def done(self) -> None:
        """Returns when all results are recorded."""
        await self._done.wait()


def body_of(rows: Rows) -> bytes:
    """The JSON of a bulk request."""
    messages = [
        {
            "trafficAccountId": ACCOUNT,
            "destination": f"+{phone}",
            "sms": {"text": text, "sender": "Shop"},
        }
        for _, phone, text in rows
    ]
    return orjson.dumps({"messages": messages})


async def bare(work: Work) -> Begin:
    """Messages are copied in while those that are there already are claimed and sent."""
    await work.pool.execute(INDEX_OF_ROWS)
    return lambda: _pipeline(work, rows=True)


async def batches(work: Work) -> Begin:
    """Likewise, and what is claimed is a row that stands for a batch."""
    return lambda: _pipeline(work, rows=False)


async def _pipeline(work: Work, *, rows: bool) -> None:
    filled, news = False, asyncio.Event()

    async def fill() -> None:
        nonlocal filled, news
        async for added in work.add():
            if not rows:
                await work.pool.copy_records_to_table(
                    "batch", records=added, columns=["first_id", "last_id"]
                )
            news.set()
            news = asyncio.Event()
        filled = True
        news.set()

    async def send_one() -> bool:
        if rows:
            claimed = await work.pool.fetch(CLAIM_ROWS)
            if claimed:
                await work.send_rows(claimed)
            return bool(claimed)
        batch = await work.pool.fetchrow(CLAIM)
        if batch is not None:
            await work.send(*batch)
        return batch is not None

    async def worker() -> None:
        while True:
            nothing_more, wait = filled, news
            if not await send_one():
                if nothing_more:
                    return
                await wait.wait()

    await asyncio.gather(fill(), *(worker() for _ in range(IN_FLIGHT)))


async def simulator(work: Work) -> Begin:
    """Only the POSTs."""
    bodies = [
        body_of([message(i) for i in range(first, min(first + BATCH, work.n + 1))])
        for first in range(1, work.n + 1, BATCH)
    ]

    async def worker() -> None:
        while bodies:
            await work.post(bodies.pop())

    async def begin() -> None:
        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))

    return begin


async def conduct(
    prepare: Callable[[Work], Awaitable[Begin]], dsn: str, mitto_url: str, n: str
) -> None:
    """Prepares, says "ready", waits for a line, works, says "done", and stays until it is stopped."""
    async with asyncpg.create_pool(
        dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, reset=_keep_as_is
    ) as pool:
        work = Work(pool, dsn, mitto_url, int(n))
        begin = await prepare(work)
        gc.collect()
        gc.freeze()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await begin()
        print("done", flush=True)
        await asyncio.Event().wait()


async def _keep_as_is(_connection: object) -> None:
    """Nothing here sets session state: a reset would be a round trip for nothing."""


if __name__ == "__main__":
    uvloop.run(
        conduct(
            {"bare": bare, "batches": batches, "simulator": simulator}[sys.argv[1]], *sys.argv[2:]
        )
    )
