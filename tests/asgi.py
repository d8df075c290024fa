"""A client at the seam of ASGI: what it takes and when it leaves is in the test's hand.

With LINED it is one of our own server, which offers a line beside ASGI.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

from starlette.types import ASGIApp, Message, Scope

from api.feed import Feed
from api.hub import Hub, Watching
from api.line import EXTENSION, Line
from api.long_response import Pace
from api.viewer import NativeViewer
from relay.events import Cursor


@dataclass(frozen=True)
class Frame:
    id: str
    event: str
    data: str


LINED = False


class Taker:
    """Takes whole messages; while `reading` is clear it takes nothing, as a full socket does."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.writes: list[bytes] = []
        self.sent = 0
        """How often the application itself has sent something."""
        self.ended = False
        self.reading = asyncio.Event()
        self.reading.set()
        self.leaving = asyncio.Event()
        self.aborted = asyncio.Event()
        self.over = asyncio.Event()
        """The application is done with it."""
        self._changed = asyncio.Event()
        self._pending: list[bytes] = []
        self.line = Line(cast(asyncio.Transport, self), self)

    @property
    def scope(self) -> Scope:
        return {"type": "http"} | ({"extensions": {EXTENSION: self.line}} if LINED else {})

    def done(self) -> None:
        self.over.set()
        self._changed.set()

    def go_on(self) -> None:
        """Take again, first what has piled up: of a socket that is sent by itself."""
        self.reading.set()
        self._take_pending()

    def leave(self) -> None:
        self.leaving.set()
        # As in a server, it is lost before anybody who waits for it to take something goes on.
        asyncio.get_running_loop().call_soon(self.line.lose)
        self.reading.set()

    # As the transport and the flow control of a line.

    @property
    def write_paused(self) -> bool:
        return bool(self._pending) and not self.reading.is_set()

    @write_paused.setter
    def write_paused(self, _: bool) -> None:
        raise NotImplementedError

    def resume_reading(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.leaving.is_set() or self.aborted.is_set()

    def abort(self) -> None:
        self.aborted.set()

    def write(self, chunk: bytes) -> None:
        size, _, rest = chunk.partition(b"\r\n")
        assert int(size, 16) == len(rest) - 2 > 0
        self._pending.append(rest[:-2])
        if self.reading.is_set():
            self._take_pending()

    def _take_pending(self) -> None:
        for body in self._pending:
            self._take(body)
        self._pending.clear()

    def _take(self, body: bytes) -> None:
        if body:
            self.writes.append(body)
        self.body += body
        self._changed.set()

    # As ASGI has it.

    async def receive(self) -> Message:
        await self.leaving.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.reading.wait()
        self.sent += 1
        self._take_pending()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self._take(message["body"])
            self.ended = not message.get("more_body", False)
        self._changed.set()

    async def has(self, text: bytes) -> None:
        """Return when the body holds `text`."""
        async with asyncio.timeout(5):
            while text not in self.body:
                assert not self.over.is_set(), f"it ended with {self.body!r}"
                self._changed.clear()
                await self._changed.wait()

    @property
    def frames(self) -> list[Frame]:
        """The events that have come whole."""
        frames = []
        for block in self.body.decode().split("\n\n")[:-1]:
            fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
            if "data" in fields:
                frames.append(Frame(fields.get("id", ""), fields["event"], fields["data"]))
        return frames


@asynccontextmanager
async def viewing(app: ASGIApp) -> AsyncIterator[Taker]:
    """Run an application for one request; leaving the block leaves the response."""
    taker = Taker()
    running = asyncio.create_task(run(app, taker))
    running.add_done_callback(lambda _: taker.done())
    try:
        yield taker
    finally:
        taker.leave()
        await running


async def run(app: ASGIApp, taker: Taker) -> None:
    await app(taker.scope, taker.receive, taker.send)


@asynccontextmanager
async def watching(hub: Hub, stream_id: str, after: str = "") -> AsyncIterator[Taker]:
    """A viewer of the native wire."""
    cursor = Cursor.parse(after) if after else None
    async with entered(hub, stream_id) as feed:
        viewer = NativeViewer(hub, feed, cursor, Pace(15, 30, 0))
        async with viewing(viewer) as taker:
            yield taker


@asynccontextmanager
async def entered(hub: Hub, stream_id: str) -> AsyncIterator[Feed]:
    """The feed of a stream, for as long as the block is."""
    watching = Watching(hub)
    try:
        yield await watching.feed(stream_id)
    finally:
        watching.end()
