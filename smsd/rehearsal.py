"""The rehearsal: connections go through a batch's whole way before there is one.

The first time that a connection is asked for something Postgres reads the catalogue, compiles the function and plans its
statements: the way of a batch takes some 30 ms then and a few later. So at start one batch of nobody goes that way on
each connection, in a transaction that is rolled back: nobody sees it, and it touches no row that others wait for.
"""

import asyncio
from contextlib import AsyncExitStack

import structlog

from smsd import database, queue
from smsd.database import Connection, Pool
from smsd.mitto import ItemResult
from smsd.model import MessageState
from smsd.queue import Answer, ReceiptRow

SQL = database.queries("rehearsal")
CONNECTIONS = 10
"""How many at most: what a busy daemon uses at once."""

log = structlog.get_logger()


async def rehearse(pool: Pool, size: int) -> None:
    """Opens the pool's connections (`size`, at most CONNECTIONS) and rehearses on each. That it fails changes nothing but
    how long the first batches take."""
    try:
        async with AsyncExitStack() as stack:
            taken = [
                await stack.enter_async_context(pool.acquire())
                for _ in range(min(size, CONNECTIONS))
            ]
            async with asyncio.TaskGroup() as group:
                for connection in taken:
                    group.create_task(_go_through(connection))
    except* Exception as error:
        log.warning("rehearsal.failed", error=repr(error.exceptions[0]))


async def _go_through(connection: Connection) -> None:
    transaction = connection.transaction()
    await transaction.start()
    try:
        us = await connection.fetchval(SQL["stage"])  # account and replica alike
        claim = await queue.claim(connection, us, us, 1, lead_us=0)
        for grant in claim.grants:  # none in a database that is not the one kept
            intent = await queue.intent(connection, grant, us)
            provider_ids = [f"rehearsal {message_id}" for message_id in intent.ids]
            items = [
                ItemResult(message_id, MessageState.ACCEPTED, provider_id, None)
                for message_id, provider_id in zip(intent.ids, provider_ids, strict=True)
            ]
            answer = Answer.of(items, None, 200)
            await queue.settle_items(connection, grant.batch_id, intent.attempt, answer)
            await queue.rejoin_receipts(connection, provider_ids)
            delivered = int(MessageState.DELIVERED)
            receipts = [ReceiptRow(us, one, delivered, None, None) for one in provider_ids]
            await queue.apply_receipts(connection, receipts)
    finally:
        await transaction.rollback()
