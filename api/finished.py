"""Finished streams, kept for those who come late."""

import time
from collections import OrderedDict

from api.feed import Feed


class Finished:
    """The most recently used feeds that have ended, within a bound of bytes and their retention."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, tuple[Feed, int, float]] = OrderedDict()

    def keep(self, feed: Feed, seconds: float) -> None:
        self.drop(feed.stream_id)
        self._kept[feed.stream_id] = (feed, feed.bytes, time.monotonic() + seconds)
        self._bytes += feed.bytes
        while self._bytes > self._limit_bytes:
            self.drop(next(iter(self._kept)))

    def get(self, stream_id: str) -> Feed | None:
        if stream_id not in self._kept:
            return None
        feed, _, until = self._kept[stream_id]
        if time.monotonic() > until:
            self.drop(stream_id)
            return None
        self._kept.move_to_end(stream_id)
        return feed

    def drop(self, stream_id: str) -> Feed | None:
        feed, size, _ = self._kept.pop(stream_id, (None, 0, 0))
        self._bytes -= size
        return feed

    def clear(self) -> None:
        self._kept.clear()
        self._bytes = 0

    def feeds(self) -> list[Feed]:
        return [feed for feed, _, _ in self._kept.values()]
