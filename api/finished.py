"""Finished streams, kept for those who come late."""

import time
from collections import OrderedDict

from api.feed import Feed


class Finished:
    """The most recently used feeds that have ended, within a bound of bytes and their retention."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, tuple[Feed, float]] = OrderedDict()

    def keep(self, feed: Feed, seconds: float) -> None:
        self.drop(feed.stream_id)
        self._kept[feed.stream_id] = (feed, time.monotonic() + seconds)
        # Who comes late by another wire has all of its frames made.
        feed.on_growth = self._grow
        self._grow(feed.bytes)

    def _grow(self, size: int) -> None:
        self._bytes += size
        while self._bytes > self._limit_bytes:
            self.drop(next(iter(self._kept)))

    def get(self, stream_id: str) -> Feed | None:
        if stream_id not in self._kept:
            return None
        feed, until = self._kept[stream_id]
        if time.monotonic() > until:
            self.drop(stream_id)
            return None
        self._kept.move_to_end(stream_id)
        return feed

    def drop_expired(self) -> None:
        """From the least recently used on, so that it costs no more than it drops: what was used
        since may hide others behind it, for one more retention at most."""
        while self._kept:
            stream_id, (_, until) = next(iter(self._kept.items()))
            if time.monotonic() <= until:
                return
            self.drop(stream_id)

    def drop(self, stream_id: str) -> None:
        feed, _ = self._kept.pop(stream_id, (None, 0))
        if feed is not None:
            feed.on_growth = None
            self._bytes -= feed.bytes

    def clear(self) -> None:
        for stream_id in list(self._kept):
            self.drop(stream_id)
