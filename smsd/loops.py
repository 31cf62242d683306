"""What the daemon's loops have in common: they wait for the first of news, the next look, and the end."""

import asyncio


async def first_of(seconds: float, *events: asyncio.Event) -> None:
    """Waits for the first of: one of the events, the time."""
    if seconds <= 0 or any(event.is_set() for event in events):
        return
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
