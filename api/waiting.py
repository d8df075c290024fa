"""Waiting for the end of an answer, or for its beginning, before anything is said of it."""

import asyncio
from collections.abc import Callable

from fastapi import Request, Response

from api.asking import Asking, names
from api.feed import Feed
from api.long_response import Exit, send_away, until_left
from api.parts import Parts


async def when_ended(
    request: Request, asking: Asking, feed: Feed, answer: Callable[[Feed], Response]
) -> Response:
    """What `answer` makes of a feed that has ended, or that this process, draining, lets go."""
    why = await until_ended(request, asking.parts, feed)
    on_leave = asking.on_leave(feed)
    if on_leave is not None and why is Exit.LEFT and not feed.ended:
        await on_leave()
    response = answer(feed)
    response.headers.update(names(feed.stream_id))
    return response


async def until_ended(request: Request, parts: Parts, feed: Feed) -> Exit | None:
    """Return when the answer has ended, or why it is waited for no longer."""
    return await _until(lambda: feed.ended, request, parts, feed)


async def until_begun(request: Request, parts: Parts, feed: Feed) -> Exit | None:
    """Return when the answer has begun, or ended without, or why it is waited for no longer."""
    return await _until(lambda: feed.begun or feed.ended, request, parts, feed)


async def _until(
    reached: Callable[[], bool], request: Request, parts: Parts, feed: Feed
) -> Exit | None:
    over: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
    watching = asyncio.ensure_future(until_left(request.receive, over))
    parting = None
    try:
        while not (reached() or over.done()):
            if parts.hub.draining and parting is None:
                parting = send_away(over, parts.pace.drain_seconds, resumes=False)
            await feed.changed(parts.pace.heartbeat_seconds, unless=over)
    finally:
        watching.cancel()
        if parting is not None:
            parting.cancel()
    return over.result() if over.done() else None
