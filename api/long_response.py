"""A response that goes on until something ends it: what every viewer does, whatever it shows."""

import asyncio
import random
from enum import Enum, auto
from functools import cache, partial
from typing import NamedTuple, Self

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from api.counters import GIVEN_UP
from api.hub import Hub
from api.line import Line
from api.settle import settle
from api.wires import sse
from relay.settings import Settings

HEADERS = {
    "cache-control": "no-store, no-transform",
    # nginx and its like would hold the answer back until it is whole.
    "x-accel-buffering": "no",
}
COME_BACK_MS = (500, 2000)
"""Between these a viewer waits that has lost its connection, was sent away or came in vain: those
whom one process loses at once must not storm the next one together."""


LATE = 0.9
"""Who cannot go on elsewhere leaves only after so much of the drain."""


class Pace(NamedTuple):
    """The times of a long response."""

    heartbeat_seconds: float
    """After so long without news a viewer is told that its connection still stands."""
    write_seconds: float
    """A client that takes nothing for so long is taken to have left."""
    drain_seconds: float
    """Within this each viewer is sent away, at a moment of its own."""

    @classmethod
    def configured(cls, settings: Settings) -> Self:
        return cls(settings.heartbeat_seconds, settings.write_seconds, settings.drain_seconds)


class BrokenOff(Exception):
    """The response must not get its proper end, so that no client takes it for the whole answer."""


class Exit(Enum):
    """Why a response ends before what it shows has ended."""

    LEFT = auto()
    """The client has left, or takes nothing more."""
    SENT_AWAY = auto()
    """This process drains: the client is to go on elsewhere."""


@cache
def _raw(headers: tuple[tuple[str, str], ...]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers]


def come_back() -> bytes:
    """When a viewer is to try again, if this connection is lost; for each another time."""
    return sse.retry(random.randint(*COME_BACK_MS))  # noqa: S311 - it is no secret


def send_away(
    over: asyncio.Future[Exit], drain_seconds: float, *, resumes: bool
) -> asyncio.TimerHandle:
    """Choose a moment of its own, so that not all clients storm the next process at once; a late
    one for those that could not go on there, whose answer may end before."""
    earliest = 0 if resumes else LATE * drain_seconds
    seconds = random.uniform(earliest, drain_seconds)  # noqa: S311 - it is no secret
    return asyncio.get_running_loop().call_later(seconds, settle, over, Exit.SENT_AWAY)


class LongResponse(Response):
    """It ends by itself; broken off when this process drains, at a moment of its own; and, socket
    and all, when the client takes nothing for `write_seconds`."""

    resumes = False
    """Whether its clients go on elsewhere by themselves, with what they have."""

    def __init__(self, hub: Hub, pace: Pace, *, headers: dict[str, str] | None = None) -> None:
        # Not by the base class: it would give the stream a length, and each viewer 700 bytes of
        # headers of its own.
        self.status_code = 200
        self.background = None
        self.raw_headers = [
            *_raw(tuple(HEADERS.items())),
            *_raw((("content-type", f"{self.media_type}; charset={self.charset}"),)),
            *((name.encode(), value.encode()) for name, value in (headers or {}).items()),
        ]
        self._hub = hub
        self._pace = pace
        self._parting: asyncio.TimerHandle | None = None
        self._line: Line | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        line = self._line = Line.of(scope)
        over: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        watching = None
        if line is not None:
            line.when_lost(partial(settle, over, Exit.LEFT))
        else:
            watching = asyncio.ensure_future(until_left(receive, over))
        if self._hub.draining:
            # It has only just come: it may as well go elsewhere at once.
            settle(over, Exit.SENT_AWAY)
        try:
            await self._respond(scope, receive, send, over)
        except BrokenOff:
            # An ASGI server closes the connection when the application returns before the end.
            pass
        except TimeoutError:
            GIVEN_UP.inc()
            if line is not None:
                # Otherwise the server would wait until the peer has taken the rest.
                line.abort()
            settle(over, Exit.LEFT)
        finally:
            if watching is not None:
                watching.cancel()
            if self._parting is not None:
                self._parting.cancel()
        if over.done() and over.result() is Exit.LEFT:
            await self._left()

    async def _respond(
        self, scope: Scope, receive: Receive, send: Send, over: asyncio.Future[Exit]
    ) -> None:
        """The whole response. `over` is done when it is to end early, and says why."""
        raise NotImplementedError

    async def _left(self) -> None:
        """The client has left before the end, or takes nothing more."""

    def _part_when_draining(self, over: asyncio.Future[Exit]) -> None:
        if self._hub.draining and self._parting is None:
            self._parting = send_away(over, self._pace.drain_seconds, resumes=self.resumes)

    async def _end_early(self, send: Send, why: Exit) -> None:
        """Nothing is left to say to one that left; one that is sent away is to come back."""
        if why is Exit.SENT_AWAY:
            await self._write(send, self._last_words())
            raise BrokenOff

    def _last_words(self) -> bytes:
        """To one that is sent away."""
        raise NotImplementedError

    async def _begin(self, send: Send) -> None:
        start = {"type": "http.response.start"}
        await self._send(send, {**start, "status": self.status_code, "headers": self.raw_headers})

    async def _write(self, send: Send, body: bytes) -> None:
        if body:
            await self._send(send, {"type": "http.response.body", "body": body, "more_body": True})

    async def _until_taken(self, send: Send) -> None:
        """Wait until the peer has taken most of what was written."""
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": True})

    async def _end(self, send: Send) -> None:
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        if self._line is not None and not self._line.full:
            await send(message)  # It waits for nothing, and a timer costs more than it does.
            return
        async with asyncio.timeout(self._pace.write_seconds):
            await send(message)


async def until_left(receive: Receive, over: asyncio.Future[Exit]) -> None:
    """Settle `over` when the client has left."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except HTTPException:
        # A body that nobody asked for, and too long: nothing can be heard behind it.
        pass
    settle(over, Exit.LEFT)
