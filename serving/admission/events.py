"""Events that say how something is now: they go back when it changes again."""

import asyncio


def set_event(event: asyncio.Event, value: bool) -> None:
    """Sets the event, or clears it."""
    if value:
        event.set()
    else:
        event.clear()


async def until_set(event: asyncio.Event) -> None:
    """Until the event is set, and still is when the waiter's turn comes."""
    while not event.is_set():
        await event.wait()
