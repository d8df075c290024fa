"""Waiting for the end of an answer, by requests that are told of it as a whole."""

import asyncio
from collections.abc import Callable

from fastapi import Request, Response

from api.asking import Asking
from api.feed import Feed
from api.parts import Parts


async def when_ended(
    request: Request, asking: Asking, feed: Feed, answer: Callable[[Feed], Response]
) -> Response:
    """What `answer` makes of a feed that has ended, or that this process, draining, lets go."""
    await until_ended(request, asking.parts, feed)
    on_leave = asking.on_leave(feed)
    if on_leave is not None and not (feed.ended or asking.parts.hub.draining):
        await on_leave()
    response = answer(feed)
    response.headers["x-stream-id"] = feed.stream_id
    return response


async def until_ended(request: Request, parts: Parts, feed: Feed) -> None:
    """Return when the answer has ended, the client has left, or this process drains."""
    left = asyncio.ensure_future(_left(request))
    try:
        while not (feed.ended or left.done() or parts.hub.draining):
            await feed.changed(parts.settings.heartbeat_seconds, unless=left)
    finally:
        left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
