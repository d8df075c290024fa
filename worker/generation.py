"""A generation: one attempt at one answer, from the upstream into the log."""

import asyncio
import json
from contextlib import aclosing
from typing import Any

from redis.exceptions import RedisError

from relay.chunks import Compactor
from relay.claim import Claim
from relay.errors import RelayError, StreamLost, UpstreamError
from relay.events import CANCELLED, COMPLETED, FAILED, TERMINAL, Entry, entry
from relay.log import Log
from relay.logs import get_logger
from worker.upstream import Upstream

logger = get_logger("generation")

REDIS_RETRY_SECONDS = 0.2


class Generation:
    """Two halves: one reads the upstream and lines up entries, the other appends what has lined up,
    all of it at once. So a fast upstream costs few appends and a slow Redis never stalls the
    upstream. The entries are kept until the terminal one stands: should Redis come back without
    its last second, the log is brought up to date from them.
    """

    def __init__(
        self,
        claim: Claim,
        log: Log,
        upstream: Upstream,
        *,
        answer_seconds: float,
    ) -> None:
        self._claim = claim
        self._log = log
        self._upstream = upstream
        self._answer_seconds = answer_seconds
        self._compactor = Compactor(claim.ordinal, upstream.model)
        self._entries: list[Entry] = []
        self._lined_up = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._cancel_asked = False
        self._lost = False

    async def run(self) -> None:
        """Return when the terminal event stands in the log, or when this attempt may no longer
        write. Cancelling it closes the upstream and leaves the log as it is."""
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(self._read_ended)
        if self._cancel_asked:
            self._reader.cancel()
        try:
            await self._append()
        except StreamLost as lost:
            logger.info("attempt_lost", **self._names, reason=lost.message)
        finally:
            self._lost = True
            self._reader.cancel()
            # Until the reader has ended, the upstream's socket may be open.
            await asyncio.wait([self._reader])

    def cancel(self) -> None:
        """Close the upstream and end the stream as cancelled."""
        self._cancel_asked = True
        if self._reader is not None:
            self._reader.cancel()

    def lose(self) -> None:
        """Close the upstream and write nothing more: another attempt owns the stream."""
        self._lost = True
        if self._reader is not None:
            self._reader.cancel()
        self._lined_up.set()

    async def _read(self) -> None:
        request = json.loads(self._claim.request)
        async with (
            asyncio.timeout(self._answer_seconds),
            aclosing(self._upstream.stream(request)) as chunks,
        ):
            async for chunk in chunks:
                self._line_up(*self._compactor.entries(chunk))
        if not self._compactor.complete:
            raise UpstreamError(
                "upstream_incomplete",
                "The model service ended the answer without finishing it: ask again.",
                retryable=True,
            )

    def _read_ended(self, reader: asyncio.Task[None]) -> None:
        """However reading ended, exactly one terminal event follows, unless the stream is lost."""
        error = None if reader.cancelled() else reader.exception()
        if self._lost:
            return
        summary = self._compactor.summary()
        if reader.cancelled() and self._cancel_asked:
            self._line_up(entry(CANCELLED, summary))
        elif reader.cancelled() or error is not None:
            self._line_up(entry(FAILED, self._failure(error) | summary))
        else:
            finish = {
                "finish_reason": self._compactor.finish_reason,
                "usage": self._compactor.usage,
            }
            self._line_up(entry(COMPLETED, finish | summary))

    def _failure(self, error: BaseException | None) -> dict[str, Any]:
        match error:
            case RelayError():
                code, message, retryable = error.code, error.message, error.retryable
            case TimeoutError():
                code, message, retryable = "answer_timeout", "The answer took too long.", False
            case _:
                logger.error("generation_died", **self._names, exc_info=error)
                code, message, retryable = "internal", "Something went wrong here.", True
        return {"code": code, "message": message, "retryable": retryable}

    def _line_up(self, *entries: Entry) -> None:
        self._entries += entries
        self._lined_up.set()

    async def _append(self) -> None:
        """Append what lines up until a terminal entry stands. Raises StreamLost."""
        standing = 0
        while True:
            await self._lined_up.wait()
            self._lined_up.clear()
            while standing < len(self._entries):
                if self._lost:
                    raise StreamLost("the lease was lost")
                standing = await self._append_from(standing)
                if standing == len(self._entries) and self._entries[-1].kind in TERMINAL:
                    logger.info(self._entries[-1].kind, **self._names)
                    return
            if self._lost:
                raise StreamLost("the lease was lost")

    async def _append_from(self, standing: int) -> int:
        """One append; returns how many entries stand then, fewer if Redis lost some."""
        claim = self._claim
        try:
            appended = await self._log.append(
                claim.stream_id, claim.attempt, claim.owner, standing, self._entries[standing:]
            )
        except RedisError as error:
            logger.warning("append_failed", **self._names, error=type(error).__name__)
            await asyncio.sleep(REDIS_RETRY_SECONDS)
            return standing
        if appended.cancel_asked and not self._cancel_asked:
            self.cancel()
        return appended.next_seq

    @property
    def _names(self) -> dict[str, Any]:
        return {"stream": self._claim.stream_id, "attempt": self._claim.attempt}
