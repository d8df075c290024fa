"""How many viewers a stream has, over all API processes."""

import asyncio
import time
from contextlib import suppress

from redis.exceptions import RedisError

from api.hub import Hub
from relay.log import VIEWERS_SECONDS, Log, State

REPORT_SECONDS = 1.0
REFRESH_SECONDS = VIEWERS_SECONDS / 3


class Presence:
    """Each process reports its own numbers, and withdraws them at its end; one that was killed
    stops counting after a minute."""

    def __init__(self, hub: Hub, log: Log, process: str) -> None:
        self._hub = hub
        self._log = log
        self._process = process
        self._reported: dict[str, int | None] = {}
        """None where nothing was heard of a report, which may have arrived all the same."""
        self._refreshed = 0.0

    async def run(self) -> None:
        """Report what has changed, and now and then everything, until cancelled."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            counts = self._hub.viewers()
            refresh = time.monotonic() - self._refreshed > REFRESH_SECONDS
            news = {
                stream_id: counts.get(stream_id, 0)
                for stream_id in counts.keys() | self._reported.keys()
                if refresh or counts.get(stream_id, 0) != self._reported.get(stream_id)
            }
            self._reported |= dict.fromkeys(news)
            with suppress(RedisError):  # The next round says it again.
                await self._log.report_viewers(self._process, news)
                self._reported = dict(counts)
                self._refreshed = time.monotonic() if refresh else self._refreshed

    async def withdraw(self) -> None:
        """Nobody watches here any more."""
        if self._hub.redis_away:
            return  # It stops counting by itself, and the end must not wait for Redis.
        gone = dict.fromkeys(self._reported.keys() | self._hub.viewers().keys(), 0)
        with suppress(RedisError):
            await self._log.report_viewers(self._process, gone)

    def total(self, stream_id: str, state: State) -> int:
        """All viewers of a stream: those here, exactly, and those that others reported."""
        others = sum(n for process, n in state.viewers.items() if process != self._process)
        return others + self._hub.viewers().get(stream_id, 0)
