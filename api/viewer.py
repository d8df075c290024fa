"""A viewer: one response that follows a feed. It is an index into it and nothing more."""

import asyncio
import random
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.feed import FRAMES_AT_ONCE, Feed
from api.hub import Hub
from api.problems import problem, problem_for
from api.wires import native, text
from relay.events import CANCELLED, FAILED, STARTED, Cursor, Event

HEADERS = {
    "cache-control": "no-cache, no-transform",
    # nginx and its like would hold the answer back until it is whole.
    "x-accel-buffering": "no",
}
RETRY_MS = 1000
DRAIN_RETRY_MS = (500, 3000)


class BrokenOff(Exception):
    """The response must not get its proper end, so that no client takes it for the whole answer."""


class Viewer(Response):
    """The native wire. Takes all frames since its cursor and writes them as one body message.

    It ends after the terminal event; when the log is gone, which it says in band; when this process
    drains; and, broken off, when the client takes nothing for `write_seconds`.
    """

    media_type = native.MEDIA_TYPE
    heartbeat = native.HEARTBEAT

    def __init__(
        self,
        hub: Hub,
        feed: Feed,
        cursor: Cursor | None,
        *,
        heartbeat_seconds: float,
        write_seconds: float,
        headers: dict[str, str] | None = None,
        on_leave: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(headers={**HEADERS, **(headers or {})})
        # The base class has counted an empty body; a stream has no length.
        del self.headers["content-length"]
        self._hub = hub
        self._feed = feed
        self._cursor = cursor
        self._heartbeat_seconds = heartbeat_seconds
        self._write_seconds = write_seconds
        self._on_leave = on_leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = asyncio.ensure_future(_left(receive))
        try:
            await self._respond(scope, receive, send, left)
        except (BrokenOff, TimeoutError):
            # An ASGI server closes the connection when the application returns before the end.
            pass
        finally:
            left.cancel()
        if self._on_leave is not None and not self._feed.ended and not self._hub.draining:
            await self._on_leave()

    async def _respond(
        self, scope: Scope, receive: Receive, send: Send, left: asyncio.Future[None]
    ) -> None:
        await self._begin(send)
        await self._write(send, native.retry(RETRY_MS))
        await self._follow(send, left)
        if self._hub.draining:
            await self._write(send, native.retry(random.randint(*DRAIN_RETRY_MS)))  # noqa: S311
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _follow(self, send: Send, left: asyncio.Future[None]) -> None:
        """Write the feed from the cursor on, until its end or until the viewer must go."""
        feed = self._feed
        index = None
        while not left.done() and not self._hub.draining:
            if feed.gone is not None:
                await self._write(send, self._tell_gone(feed))
                return
            if index is None and (self._cursor is None or feed.reaches(self._cursor)):
                index = feed.position(self._cursor)
            body, taken = self._take(index) if index is not None else (b"", 0)
            if index is not None and taken:
                index += taken
                await self._write(send, body)
            elif feed.ended:
                return
            elif not await feed.changed(self._heartbeat_seconds, unless=left):
                await self._write(send, self.heartbeat)

    def _take(self, index: int) -> tuple[bytes, int]:
        """The next piece of the body, and how many events it covers."""
        frames = self._feed.frames(native.encode, index)
        return b"".join(frames), len(frames)

    def _tell_gone(self, feed: Feed) -> bytes:
        assert feed.gone is not None  # noqa: S101
        return native.encode_gone(feed.gone)

    async def _begin(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )

    async def _write(self, send: Send, body: bytes) -> None:
        if body:
            async with asyncio.timeout(self._write_seconds):
                await send({"type": "http.response.body", "body": body, "more_body": True})


class TextViewer(Viewer):
    """The text wire.

    Plain text has no way to say "forget that" or "that was not all", so only a completed answer
    ends cleanly. After a failure, a cancel or a new attempt the response breaks off: curl reports
    that with exit code 18, an HTTP library as an incomplete read. If it fails before the first
    text, the response is a problem.
    """

    media_type = text.MEDIA_TYPE
    heartbeat = b""
    _written = False

    async def _respond(
        self, scope: Scope, receive: Receive, send: Send, left: asyncio.Future[None]
    ) -> None:
        # A client with a cursor has text already, though nothing was written here.
        self._written = self._cursor is not None and self._cursor.attempt > 0
        while not (self._speaks() or self._feed.ended or left.done() or self._hub.draining):
            await self._feed.changed(self._heartbeat_seconds, unless=left)
        if not self._speaks() and (failure := self._failure()):
            for name in ("x-stream-id", "location"):
                if name in self.headers:
                    failure.headers[name] = self.headers[name]
            await failure(scope, receive, send)
            return
        await self._begin(send)
        await self._follow(send, left)
        if self._hub.draining:
            raise BrokenOff
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _take(self, index: int) -> tuple[bytes, int]:
        events = self._feed.events[index : index + FRAMES_AT_ONCE]
        upto = next((i for i, event in enumerate(events) if self._breaks(event)), len(events))
        if events and upto == 0:
            raise BrokenOff
        body = b"".join(self._feed.frames(text.encode, index)[:upto])
        self._written = self._written or bool(body)
        return body, upto

    def _breaks(self, event: Event) -> bool:
        return event.kind in {FAILED, CANCELLED} or (event.kind == STARTED and self._written)

    def _tell_gone(self, feed: Feed) -> bytes:
        raise BrokenOff

    def _speaks(self) -> bool:
        """Whether there is any text to begin with."""
        events = self._feed.events[self._feed.position(None) :]
        return any(text.encode(event) for event in events)

    def _failure(self) -> Response | None:
        if self._feed.gone is not None:
            return problem_for(self._feed.gone)
        if self._hub.draining:
            detail = "Watch this stream again: another process answers."
            return problem(503, "draining", detail, retry_seconds=1)
        last = self._feed.events[-1]
        if last.kind == FAILED:
            value = last.value()
            return problem(502, value["code"], value["message"])
        if last.kind == CANCELLED:
            return problem(409, "cancelled", "The stream was cancelled before its first text.")
        return None


async def _left(receive: Receive) -> None:
    """Done when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
