"""A client at the seam of ASGI: what it takes and when it leaves is in the test's hand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp, Message

from api.hub import Hub
from api.viewer import Viewer
from relay.events import Cursor


@dataclass(frozen=True)
class Frame:
    id: str
    event: str
    data: str


class Taker:
    """Takes whole messages; while `reading` is clear it takes nothing, as a full socket does."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.writes: list[bytes] = []
        self.ended = False
        self.reading = asyncio.Event()
        self.reading.set()
        self.leaving = asyncio.Event()
        self._changed = asyncio.Event()

    async def receive(self) -> Message:
        await self.leaving.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.reading.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.writes.append(message["body"])
            self.body += message["body"]
            self.ended = not message.get("more_body", False)
        self._changed.set()

    async def has(self, text: bytes, seconds: float = 5) -> None:
        """Return when the body holds `text`."""
        async with asyncio.timeout(seconds):
            while text not in self.body:
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
    try:
        yield taker
    finally:
        taker.leaving.set()
        taker.reading.set()
        await running


async def run(app: ASGIApp, taker: Taker) -> None:
    await app({"type": "http"}, taker.receive, taker.send)


@asynccontextmanager
async def watching(hub: Hub, stream_id: str, after: str = "") -> AsyncIterator[Taker]:
    """A viewer of the native wire."""
    cursor = Cursor.parse(after) if after else None
    async with hub.watch(stream_id) as feed:
        viewer = Viewer(hub, feed, cursor, heartbeat_seconds=15, write_seconds=30)
        async with viewing(viewer) as taker:
            yield taker
