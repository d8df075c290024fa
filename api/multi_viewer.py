"""A viewer of several streams on one connection: browsers allow six to a host."""

import asyncio
from collections import deque
from collections.abc import Sequence

from starlette.types import Receive, Scope, Send

from api.feed import BYTES_AT_ONCE, Feed, any_changed
from api.hub import Hub
from api.long_response import Exit, LongResponse, Pace, come_back
from api.wires import multiplexed, sse
from relay.errors import StreamGone
from relay.events import Cursor

EVENTS_AT_ONCE = 64
"""Of one stream for one write."""


class Lane:
    """Where a viewer is in one of its streams."""

    def __init__(self, feed: Feed, cursor: Cursor | None) -> None:
        self.feed = feed
        self._go_to(cursor)
        self._index: int | None = None
        self._noticed = len(feed.notices)

    @classmethod
    def of_nothing(cls, stream_id: str, gone: StreamGone, *, told: bool) -> "Lane":
        feed = Feed(stream_id)
        feed.end_as_gone(gone)
        lane = cls(feed, None)
        if told:
            lane.place = multiplexed.TOLD_GONE
        return lane

    def _go_to(self, cursor: Cursor | None) -> None:
        self.cursor = cursor
        # Kept as its text: each event of a lane has the places of all.
        self.place = multiplexed.text_of(cursor)

    @property
    def told_gone(self) -> bool:
        return self.place == multiplexed.TOLD_GONE

    @property
    def over(self) -> bool:
        """Whether nothing more is to be said of it."""
        return self.told_gone or (self.feed.closed and self.cursor == self.feed.top)

    def take(self, lanes: Sequence["Lane"], room: int) -> bytes:
        """What is new, as frames, some at a time and none that begins beyond `room` bytes; each has
        the places in all `lanes`."""
        if self.feed.gone is not None:
            return self._tell_gone(self.feed.gone, lanes)
        if self._index is None and self.feed.reaches(self.cursor):
            self._index = self.feed.position(self.cursor)
        parts = self._notices()
        if self._index is not None:
            for event in self.feed.events[self._index : self._index + EVENTS_AT_ONCE]:
                if room <= 0:
                    break
                self._index += 1
                self._go_to(event.cursor)
                places = [lane.place for lane in lanes]
                parts.append(multiplexed.encode(event, self.feed.stream_id, places))
                room -= len(parts[-1])
        return b"".join(parts)

    def _tell_gone(self, gone: StreamGone, lanes: Sequence["Lane"]) -> bytes:
        if self.over:
            return b""
        self.place = multiplexed.TOLD_GONE
        places = [lane.place for lane in lanes]
        return multiplexed.encode_gone(gone, self.feed.stream_id, places)

    def _notices(self) -> list[bytes]:
        fresh = self.feed.notices[self._noticed :]
        self._noticed += len(fresh)
        return [sse.comment(notice) for notice in fresh]


class MultiViewer(LongResponse):
    """Ends when every stream has ended or is gone. It has the bounds of a viewer of one."""

    media_type = sse.MEDIA_TYPE
    resumes = True

    def __init__(self, hub: Hub, lanes: list[Lane], pace: Pace) -> None:
        super().__init__(hub, pace)
        self._lanes = lanes
        self._turns = deque(lanes)

    async def _respond(
        self, scope: Scope, receive: Receive, send: Send, over: asyncio.Future[Exit]
    ) -> None:
        await self._begin(send)
        await self._write(send, come_back())
        while not all(lane.over for lane in self._lanes):
            if over.done():
                await self._end_early(send, over.result())
                return
            self._part_when_draining(over)
            if news := self._take():
                await self._write(send, news)
            else:
                await self._wait(send, over)
        await self._end(send)

    def _take(self) -> bytes:
        """The next write: all that a slow viewer holds. The lanes take turns, or one that has much
        to say would hold up the others."""
        parts: list[bytes] = []
        room = BYTES_AT_ONCE
        for _ in self._lanes:
            if room <= 0:
                break
            parts.append(self._turns[0].take(self._lanes, room))
            room -= len(parts[-1])
            self._turns.rotate(-1)
        return b"".join(parts)

    def _last_words(self) -> bytes:
        return come_back()

    async def _wait(self, send: Send, over: asyncio.Future[Exit]) -> None:
        feeds = [lane.feed for lane in self._lanes if not lane.over]
        if not await any_changed(feeds, self._pace.heartbeat_seconds, unless=over):
            await self._write(send, sse.HEARTBEAT)
