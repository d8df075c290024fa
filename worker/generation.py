"""A generation: one attempt at one answer, from the upstream into the log."""

import asyncio
import json
import time
from typing import Any

from relay.chunks import Compactor
from relay.claim import Claim
from relay.errors import Cut, Garbled, Incomplete, StreamLost, UpstreamError
from relay.events import CANCELLED, COMPLETED, FAILED, TERMINAL, Entry, entry
from relay.log import Appended, Batch
from relay.logs import get_logger
from worker.appender import Appender
from worker.failures import Refused
from worker.upstream import CHUNK_BYTES, Upstream

logger = get_logger()

MOST_BYTES = 64 * 1024 * 1024
"""Of one answer, as it is kept: a model that never ends must not take the memory of all."""


class Generation:
    """It reads the upstream and lines up entries, which the appender takes from there, all at once.
    So a fast upstream costs few appends and a slow Redis never stalls the upstream. The entries are
    kept until the terminal one stands: should Redis come back without its last second, the log is
    brought up to date from them.
    """

    def __init__(
        self,
        claim: Claim,
        appender: Appender,
        upstream: Upstream,
        *,
        answer_seconds: float,
    ) -> None:
        self._claim = claim
        self._appender = appender
        self._upstream = upstream
        self._answer_seconds = answer_seconds
        self._compactor = Compactor(claim.ordinal, upstream.model)
        self._entries: list[str | bytes] = []
        """As a Batch has them."""
        self._bytes = 0
        """Of their data, and CHUNK_BYTES for each."""
        self._standing = 0
        """How many of them stand in the log."""
        self._over = asyncio.Event()
        """The terminal one stands, or none may be written any more."""
        self._reader: asyncio.Task[None] | None = None
        self._cancel_asked = False
        self._lost = False
        self._begun = time.monotonic()
        self._first_seconds: float | None = None
        self._cause = ""
        """As UpstreamError has it."""

    async def run(self) -> None:
        """Return when the terminal event stands in the log, or when this attempt may no longer
        write. Cancelling it closes the upstream and leaves the log as it is."""
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(self._read_ended)
        if self._cancel_asked:
            self._reader.cancel()
        try:
            await self._over.wait()
        finally:
            self._lost = True
            self._reader.cancel()
            # Until the reader has ended, the upstream's socket may be open.
            await asyncio.wait([self._reader])
            self._reader = None

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
        self._over.set()

    async def _read(self) -> None:
        request = json.loads(self._claim.request)
        async with asyncio.timeout(self._answer_seconds):
            try:
                await self._upstream.stream(request, self._take, logger.bind(**self._names))
            except Cut:
                # Behind its finish_reason nothing comes but what it cost, and [DONE]. Of several
                # choices one may not even have begun.
                if not self._compactor.complete or (request.get("n") or 1) > 1:
                    raise
        if not self._compactor.complete:
            raise Incomplete

    def _take(self, chunks: list[bytes]) -> None:
        if self._first_seconds is None:
            self._first_seconds = self._seconds()
        for chunk in chunks:
            entries = self._compactor.entries(chunk)
            self._bytes += sum(len(each.data) + CHUNK_BYTES for each in entries)
            if self._bytes > MOST_BYTES:
                raise Garbled(f"an answer of more than {MOST_BYTES} bytes")
            self._line_up(*entries)

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
            case UpstreamError():
                self._cause = error.cause
                code, message, retryable = error.code, error.message, error.retryable
            case TimeoutError():
                message = "The answer took too long: ask for less."
                code, retryable = "answer_timeout", False
            case _:
                logger.error("generation_died", **self._names, exc_info=error)
                message = "Something went wrong here: ask again."
                code, retryable = "internal", True
        # The code first, where lua/_common.lua looks for it.
        told: dict[str, Any] = {"code": code, "message": message, "retryable": retryable}
        if isinstance(error, Refused):
            if error.names:
                told["upstream"] = error.names
            if error.retryable and error.retry_after:
                told["retry_after"] = error.retry_after
        return told

    def _line_up(self, *entries: Entry) -> None:
        for each in entries:
            self._entries += each
        self._appender.line_up(self)

    # As the appender sees it.

    def batch(self, limit: int) -> Batch | None:
        standing, claim = self._standing, self._claim
        entries = self._entries[2 * standing : 2 * (standing + limit)]
        if self._lost or not entries:
            return None
        return Batch(claim.stream_id, claim.attempt, claim.owner, standing, entries)

    def settle(self, outcome: Appended | StreamLost) -> None:
        if isinstance(outcome, StreamLost):
            logger.info("attempt_lost", **self._names, reason=outcome.message)
            self.lose()
            return
        self._standing = outcome.next_seq
        if outcome.cancel_asked and not self._cancel_asked:
            self.cancel()
        if 2 * self._standing < len(self._entries):
            self._appender.line_up(self)
        elif (kind := str(self._entries[-2])) in TERMINAL:
            self._tell_end(kind, self._entries[-1])
            self._over.set()

    def _tell_end(self, kind: str, data: str | bytes) -> None:
        told = {**self._names, "chunks": self._compactor.chunks, "seconds": self._seconds()}
        if self._first_seconds is not None:
            told["first_seconds"] = self._first_seconds
        if kind == FAILED:
            failure = json.loads(data)
            told |= {"code": failure["code"], "cause": self._cause}
            logger.warning(kind, **told, reason=failure["message"])
        else:
            logger.info(kind, **told)

    def _seconds(self) -> float:
        """Since the claim."""
        return round(time.monotonic() - self._begun, 3)

    @property
    def _names(self) -> dict[str, Any]:
        return {"stream": self._claim.stream_id, "attempt": self._claim.attempt}
