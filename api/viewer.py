"""A viewer: one response that follows a feed. It is an index into it and nothing more."""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.feed import Feed, Wire
from api.hub import REDIS_AWAY, Hub
from api.line import Line
from api.long_response import RETRY_MS, BrokenOff, Exit, LongResponse, come_back
from api.problems import problem
from api.wires import native, text
from relay.errors import StreamGone
from relay.events import CANCELLED, FAILED, STARTED, TEXT, WHOLE, Cursor, Event


class Superseded(BrokenOff):
    """What was written is no longer true, and the wire has no words to take it back."""


class Viewer(LongResponse):
    """The native wire. Takes all frames since its cursor and writes them as one body message.

    It ends after the terminal event and when the log is gone, which it says in band.
    """

    media_type = native.MEDIA_TYPE
    wire: Wire = staticmethod(native.encoder)
    heartbeat = native.HEARTBEAT
    first_words = native.retry(RETRY_MS)
    rides_on = frozenset({STARTED, TEXT, WHOLE})
    """The kinds of events whose frames are to be written as they are."""

    def __init__(
        self,
        hub: Hub,
        feed: Feed,
        cursor: Cursor | None,
        *,
        heartbeat_seconds: float,
        write_seconds: float,
        drain_seconds: float = 0.0,
        headers: dict[str, str] | None = None,
        on_leave: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(
            hub, write_seconds=write_seconds, drain_seconds=drain_seconds, headers=headers
        )
        self._feed = feed
        self._cursor = cursor
        self._heartbeat_seconds = heartbeat_seconds
        self._on_leave = on_leave
        self._noticed = len(feed.notices)

    async def _left(self) -> None:
        if self._on_leave is not None and not self._feed.ended:
            await self._on_leave()

    async def _respond(
        self, scope: Scope, receive: Receive, send: Send, over: asyncio.Future[Exit]
    ) -> None:
        await self._begin(send)
        await self._follow(send, over)
        await self._end(send)

    async def _follow(self, send: Send, over: asyncio.Future[Exit]) -> None:
        """Write the feed from the cursor on, until its end or until the viewer must go."""
        words = self.first_words  # In one write with what follows: each wakes the client.
        feed = self._feed
        index = None
        while True:
            if feed.gone is not None:
                await self._write(send, words + self._tell_gone(feed.gone))
                return
            if index is None and (self._cursor is None or feed.reaches(self._cursor)):
                index = feed.position(self._cursor)
            # Asked first: one that has everything by the time it must go has its proper end.
            if feed.ended and index == len(feed.events):
                return
            if over.done():
                await self._end_early(send, over.result())
                return
            self._part_when_draining(over)
            words += self._take_notices()
            body, taken = self._take(index) if index is not None else (b"", 0)
            if index is not None:
                index += taken
            if words or taken:
                await self._write(send, words + body)
                words = b""
            elif self._line is not None and index is not None and self._rides():
                index = await self._ride(send, self._line, over)
            elif not await feed.changed(self._heartbeat_seconds, unless=over):
                await self._write(send, self.heartbeat)

    async def _ride(self, send: Send, line: Line, over: asyncio.Future[Exit]) -> int:
        """Let the feed write what comes for as long as that is all there is to do."""
        index = await self._feed.ride(
            self.wire, line, self.heartbeat, self._heartbeat_seconds, self.rides_on, unless=over
        )
        if line.full:
            await self._until_taken(send)
        return index

    def _rides(self) -> bool:
        """Whether the frames of a chunk are to be written as they are."""
        return True

    def _take(self, index: int) -> tuple[bytes, int]:
        """The next piece of the body, and how many events it covers."""
        frames = self._feed.frames(self.wire, index)
        return b"".join(frames), len(frames)

    def _take_notices(self) -> bytes:
        """What the feed has told since this viewer came or was last told."""
        fresh = self._feed.notices[self._noticed :]
        self._noticed += len(fresh)
        return b"".join(self._comment(notice) for notice in fresh)

    def _comment(self, notice: bytes) -> bytes:
        return native.comment(notice)

    def _tell_gone(self, gone: StreamGone) -> bytes:
        return native.encode_gone(gone)


class NotNow(Response):
    """To an EventSource while nothing can be read: one that hears 503 would never come back."""

    media_type = native.MEDIA_TYPE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del self.headers["content-length"]
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        body = native.comment(REDIS_AWAY) + come_back()
        # Left unended: a proper end would pass for the stream's.
        await send({"type": "http.response.body", "body": body, "more_body": True})


class HeldViewer(Viewer):
    """A wire whose status and headers wait for its first words, so that an answer which ends before
    them is an error by its status. What it has said cannot be taken back."""

    first_words = b""
    rides_on = frozenset({TEXT, WHOLE})  # At a new attempt it may have to break off.
    _written = False
    _silent = 0
    """The index up to which the newest attempt has said nothing."""

    async def _respond(
        self, scope: Scope, receive: Receive, send: Send, over: asyncio.Future[Exit]
    ) -> None:
        while not (self._speaks() or self._feed.ended or over.done()):
            self._part_when_draining(over)
            await self._feed.changed(self._heartbeat_seconds, unless=over)
        if not self._speaks() and (failure := self._failure(over)):
            for name in ("x-stream-id", "location"):
                if name in self.headers:
                    failure.headers[name] = self.headers[name]
            await failure(scope, receive, send)
            return
        await self._begin(send)
        await self._follow(send, over)
        await self._end(send)

    def _take(self, index: int) -> tuple[bytes, int]:
        frames = self._feed.frames(self.wire, index)
        upto = 0
        for frame in frames:
            if self._breaks(self._feed.events[index + upto]):
                break
            self._written = self._written or bool(frame)
            upto += 1
        if frames and upto == 0:
            raise Superseded
        return b"".join(frames[:upto]), upto

    def _rides(self) -> bool:
        # What riders write is not seen here, so the attempt after it would be spliced to it.
        return self._written

    def _breaks(self, event: Event) -> bool:
        """Whether what was written so far is no longer true."""
        return event.kind == STARTED and self._written

    def _speaks(self) -> bool:
        """Whether there is anything to begin with, other than that there will be nothing."""
        # Else each chunk of a long thought would be looked at again with every one that follows.
        self._silent = max(self._silent, self._feed.position(None))
        while frames := self._feed.frames(self.wire, self._silent):
            for frame in frames:
                if frame and self._feed.events[self._silent].kind not in {FAILED, CANCELLED}:
                    return True
                self._silent += 1
        return False

    def _failure(self, over: asyncio.Future[Exit]) -> Response | None:
        """What is answered instead if it ended, or must go, before it spoke."""
        if self._feed.gone is not None:
            return self._refusal(410, self._feed.gone.code, self._feed.gone.message)
        last = self._feed.events[-1]
        if last.kind == FAILED:
            return self._failed()
        if last.kind == CANCELLED:
            detail = "The stream was cancelled before its first text."
            return self._refusal(409, "cancelled", detail)
        if over.done() and over.result() is Exit.SENT_AWAY:
            detail = "Watch this stream again: another process answers."
            return self._refusal(503, "draining", detail)
        return None

    def _failed(self) -> Response:
        value = self._feed.events[-1].value()
        return self._refusal(502, value["code"], value["message"])

    def _refusal(self, status: int, code: str, detail: str) -> Response:
        raise NotImplementedError


class TextViewer(HeldViewer):
    """The text wire.

    Plain text has no way to say "forget that" or "that was not all", so only a completed answer
    ends cleanly. After a failure, a cancel or a new attempt the response breaks off: curl reports
    that with exit code 18, an HTTP library as an incomplete read. If it fails before the first
    text, the response is a problem.
    """

    media_type = text.MEDIA_TYPE
    wire = staticmethod(text.encoder)
    heartbeat = b""

    async def _respond(
        self, scope: Scope, receive: Receive, send: Send, over: asyncio.Future[Exit]
    ) -> None:
        # A client with a cursor has text already, though nothing was written here.
        self._written = self._cursor is not None and self._cursor.attempt > 0
        await super()._respond(scope, receive, send, over)

    def _breaks(self, event: Event) -> bool:
        return event.kind in {FAILED, CANCELLED} or super()._breaks(event)

    def _tell_gone(self, gone: StreamGone) -> bytes:
        raise BrokenOff

    def _comment(self, notice: bytes) -> bytes:
        return b""

    def _last_words(self) -> bytes:
        return b""

    def _refusal(self, status: int, code: str, detail: str) -> Response:
        return problem(status, code, detail)
