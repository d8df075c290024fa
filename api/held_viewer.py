"""Viewers of what can take nothing back: of one attempt, and of one that waits for its words."""

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.long_response import BrokenOff, Exit
from api.problems import problem, tell_wait
from api.viewer import Viewer, Words
from api.wires import text
from relay.errors import StreamGone
from relay.events import CANCELLED, CUT_SHORT, FAILED, QUEUED, STARTED, TEXT, WHOLE, Event


class Superseded(BrokenOff):
    """What was written, up to this index, is no longer true and cannot be taken back."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class OneAttemptViewer(Viewer):
    """What it has said of an answer cannot be taken back, so with a new attempt it is superseded,
    before anything of that is written."""

    rides_on = frozenset({TEXT, WHOLE})  # At a new attempt it may have to break off.
    _written = False

    def _take(self, index: int) -> tuple[bytes, int]:
        frames = self._feed.frames(self.wire, index)
        upto = 0
        for frame in frames:
            event = self._feed.events[index + upto]
            if self._breaks(event):
                break
            says = bool(frame) and event.kind not in {QUEUED, STARTED}
            self._written = self._written or says
            upto += 1
        if frames and upto == 0:
            raise Superseded(index)
        return b"".join(frames[:upto]), upto

    def _may_ride(self) -> bool:
        # What riders write is not seen here, so the attempt after it would be spliced to it.
        return self._written

    def _breaks(self, event: Event) -> bool:
        """Whether what was written so far is no longer true."""
        return event.kind == STARTED and self._written


class HeldViewer(OneAttemptViewer):
    """A wire whose status and headers wait for its first words, so that an answer which ends before
    them is an error by its status."""

    _silent = 0
    """The index up to which the newest attempt has said nothing."""

    async def _respond(
        self, scope: Scope, receive: Receive, send: Send, over: asyncio.Future[Exit]
    ) -> None:
        while not (self._speaks() or self._feed.ended or over.done()):
            self._part_when_draining(over)
            await self._feed.changed(self._pace.heartbeat_seconds, unless=over)
        if not self._speaks() and (failure := self._failure(over)):
            for name in ("x-stream-id", "x-request-id", "location"):
                if name in self.headers:
                    failure.headers[name] = self.headers[name]
            await failure(scope, receive, send)
            return
        await self._begin(send)
        await self._follow(send, over)
        await self._end(send)

    def _speaks(self) -> bool:
        """Whether there is anything to begin with, other than that there will be nothing."""
        # Else each chunk of a long thought would be looked at again with every one that follows.
        self._silent = max(self._silent, self._feed.position(None))
        while frames := self._feed.frames(self.wire, self._silent):
            for frame in frames:
                if frame and self._feed.events[self._silent].kind not in CUT_SHORT:
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
        refusal = self._refusal(502, value["code"], value["message"])
        tell_wait(refusal, value)
        return refusal

    def _refusal(self, status: int, code: str, detail: str) -> Response:
        raise NotImplementedError


def _break_off(_: StreamGone) -> bytes:
    raise BrokenOff


class TextViewer(HeldViewer):
    """The text wire.

    Plain text has no way to say "forget that" or "that was not all", so only a completed answer
    ends cleanly. After a failure, a cancel or a new attempt the response breaks off: curl reports
    that with exit code 18, an HTTP library as an incomplete read. If it fails before the first
    text, the response is a problem.
    """

    wire = staticmethod(text.encoder)
    words = Words(
        media_type=text.MEDIA_TYPE,
        first=bytes,
        heartbeat=b"",
        notice=lambda _: b"",
        gone=_break_off,
        last=bytes,
    )

    async def _respond(
        self, scope: Scope, receive: Receive, send: Send, over: asyncio.Future[Exit]
    ) -> None:
        # A client with a cursor has text already, though nothing was written here.
        self._written = self._cursor is not None and self._cursor.attempt > 0
        await super()._respond(scope, receive, send, over)

    def _breaks(self, event: Event) -> bool:
        return event.kind in CUT_SHORT or super()._breaks(event)

    def _refusal(self, status: int, code: str, detail: str) -> Response:
        return problem(status, code, detail)
