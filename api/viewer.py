"""A viewer: one response that follows a feed. It is an index into it and nothing more."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.feed import Feed, Wire
from api.hub import REDIS_AWAY, Hub
from api.line import Line
from api.long_response import Exit, LongResponse, Pace, come_back
from api.wires import native, sse
from relay.errors import StreamGone
from relay.events import STARTED, TEXT, WHOLE, Cursor


class Words(NamedTuple):
    """What a wire says beside its events. Nothing has a default: what is left out would be in the
    words of another wire."""

    media_type: str
    first: Callable[[], bytes]
    """Before all else."""
    heartbeat: bytes
    notice: Callable[[bytes], bytes]
    """That of one line of text, which is no event."""
    gone: Callable[[StreamGone], bytes]
    """Raises BrokenOff where there are no words for it."""
    last: Callable[[], bytes]
    """To one that is sent away, before its response is broken off."""


def words_in_events(
    *, first: Callable[[], bytes], gone: Callable[[StreamGone], bytes], last: Callable[[], bytes]
) -> Words:
    """Of a wire of Server-Sent Events, which all beat and comment alike."""
    return Words(sse.MEDIA_TYPE, first, sse.HEARTBEAT, sse.comment, gone, last)


class Viewer(LongResponse):
    """Takes the frames from its index on, as many as go into one write, and writes them.

    It ends after the terminal event and when the log is gone, which it says in band.
    """

    wire: Wire
    words: Words
    rides_on = frozenset({STARTED, TEXT, WHOLE})
    """The kinds of events through which it may ride: their frames can be written as they are."""

    def __init__(
        self,
        hub: Hub,
        feed: Feed,
        cursor: Cursor | None,
        pace: Pace,
        *,
        headers: dict[str, str] | None = None,
        on_leave: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.media_type = self.words.media_type
        super().__init__(hub, pace, headers=headers)
        self._feed = feed
        self._cursor = cursor
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
        words = self.words.first()  # In one write with what follows: each wakes the client.
        feed = self._feed
        index = None
        while True:
            if index is None and feed.gone is None and feed.reaches(self._cursor):
                index = self._beginning()
            # First: one that has everything gets its proper end, though it must go now, and though
            # what it has is gone.
            if feed.closed and index == len(feed.events):
                return
            if feed.gone is not None:
                await self._write(send, words + self.words.gone(feed.gone))
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
            elif self._line is not None and index is not None and self._may_ride():
                index = await self._ride(send, self._line, over)
            elif not await feed.changed(self._pace.heartbeat_seconds, unless=over):
                await self._write(send, self.words.heartbeat)

    async def _ride(self, send: Send, line: Line, over: asyncio.Future[Exit]) -> int:
        """Let the feed write what comes for as long as that is all there is to do."""
        heartbeat = self.words.heartbeat
        index = await self._feed.ride(
            self.wire, line, heartbeat, self._pace.heartbeat_seconds, self.rides_on, unless=over
        )
        if line.full:
            await self._until_taken(send)
        return index

    def _beginning(self) -> int:
        """The index from which it shows the feed."""
        return self._feed.position(self._cursor)

    def _may_ride(self) -> bool:
        """Whether it may now, being written to unseen by itself."""
        return True

    def _take(self, index: int) -> tuple[bytes, int]:
        """The next piece of the body, and how many events it covers."""
        frames = self._feed.frames(self.wire, index)
        return b"".join(frames), len(frames)

    def _take_notices(self) -> bytes:
        """What the feed has told since this viewer came or was last told."""
        fresh = self._feed.notices[self._noticed :]
        self._noticed += len(fresh)
        return b"".join(self.words.notice(notice) for notice in fresh)

    def _last_words(self) -> bytes:
        return self.words.last()


class NativeViewer(Viewer):
    """The native wire."""

    resumes = True
    wire = staticmethod(native.encoder)
    words = words_in_events(first=come_back, gone=native.encode_gone, last=come_back)


class NotNow(Response):
    """To an EventSource while nothing can be read: one that hears 503 would never come back."""

    media_type = sse.MEDIA_TYPE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del self.headers["content-length"]
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        body = sse.comment(REDIS_AWAY) + come_back()
        # Left unended: a proper end would pass for the stream's.
        await send({"type": "http.response.body", "body": body, "more_body": True})
