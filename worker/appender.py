"""The appender: what the generations of this process have lined up goes to Redis together."""

import asyncio
from typing import Protocol

from redis.exceptions import RedisError, ResponseError

from relay.connection import reason
from relay.errors import StreamLost
from relay.log import Appended, Batch, Log
from relay.logs import get_logger

logger = get_logger()

ENTRIES_AT_ONCE = 1000
BYTES_AT_ONCE = 256 * 1024
"""Of one call: while it appends, Redis does nothing else, and a call that takes longer than a
client waits for it would be sent again for ever. One entry may be more."""
APART_SECONDS = 0.001
"""From the beginning of a call to that of the next, at least, unless it is the same ones again.
With a hundred streams that is a third fewer calls for a fifth of a millisecond of delay; whoever is
alone waits for nothing."""
REDIS_RETRY_SECONDS = 0.2


class Writer(Protocol):
    """One attempt at an answer, which has something to append."""

    def batch(self, limit: int) -> Batch | None:
        """What lines up from where its log ends, at most `limit` entries; None if it may no longer
        write, or if all stands."""

    def settle(self, outcome: Appended | StreamLost) -> None:
        """What became of it; whoever has more then lines up anew."""


class Appender:
    """One call at a time, of all that has lined up meanwhile. It repeats what failed, in order."""

    def __init__(self, log: Log) -> None:
        self._log = log
        # A dict for its order: first come, first appended.
        self._waiting: dict[Writer, None] = {}
        self._taken: dict[Writer, Batch] = {}
        """By the last call."""
        self._put_off: dict[Writer, None] = {}
        """Those whom Redis refused alone, until all of them try again together."""
        self._next_call = 0.0
        """By the loop's clock, not before."""
        self._appending: asyncio.Task[None] | None = None

    def line_up(self, writer: Writer) -> None:
        if writer in self._put_off:
            return
        self._waiting[writer] = None
        if self._appending is None or self._appending.done():
            self._appending = asyncio.create_task(self._append())
            self._appending.add_done_callback(self._ended)

    async def _append(self) -> None:
        # A task's step comes after all that the loop has read: what came together goes together.
        loop = asyncio.get_running_loop()
        while self._waiting:
            pause = self._next_call - loop.time()
            if pause > 0 and self._waiting.keys() != self._taken.keys():
                await asyncio.sleep(pause)
            self._next_call = loop.time() + APART_SECONDS
            self._take()
            if self._taken:
                await self._call()

    def _take(self) -> None:
        self._taken, limit, room = {}, ENTRIES_AT_ONCE, BYTES_AT_ONCE
        while self._waiting and limit > 0 and room > 0:
            writer = next(iter(self._waiting))
            del self._waiting[writer]
            if (batch := writer.batch(limit)) is not None:
                self._taken[writer] = batch = batch.within(room)
                limit -= batch.length
                room -= batch.size

    async def _call(self) -> None:
        try:
            outcomes = await self._log.append(list(self._taken.values()))
        except RedisError as error:
            logger.warning("append_failed", streams=len(self._taken), error=reason(error))
            self._waiting = dict.fromkeys(self._taken) | self._waiting
            await asyncio.sleep(REDIS_RETRY_SECONDS)  # At once it would only fail again.
            return
        refused: dict[Writer, ResponseError] = {}
        for writer, outcome in zip(self._taken, outcomes, strict=True):
            if isinstance(outcome, ResponseError):
                refused[writer] = outcome
                self._waiting.pop(writer, None)  # It may have lined up more meanwhile.
            else:
                writer.settle(outcome)
        if refused:
            example = str(next(iter(refused.values())))
            logger.warning("append_refused", streams=len(refused), error=example)
            if not self._put_off:
                asyncio.get_running_loop().call_later(REDIS_RETRY_SECONDS, self._try_again)
            self._put_off |= dict.fromkeys(refused)

    def _try_again(self) -> None:
        put_off, self._put_off = self._put_off, {}
        for writer in put_off:
            self.line_up(writer)

    def _ended(self, appending: asyncio.Task[None]) -> None:
        if not appending.cancelled() and (error := appending.exception()) is not None:
            # Attempts that hold a lease and cannot write would hang: rather let others have them.
            logger.critical("appender_died", exc_info=error)
            for writer in self._taken | self._waiting:
                writer.settle(StreamLost("what writes it has died"))
            self._waiting = {}
