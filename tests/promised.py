"""What one reader of a log is promised, by the class of its viewer and whoever else reads it.

It is told by the wire's codec alone, run over the events that the reader is to see.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import NamedTuple

from api.ai_sdk import UIMessageViewer
from api.chat_completions import ChatCompletionViewer, WithUsage
from api.feed import Feed, Wire
from api.held_viewer import TextViewer
from api.long_response import LongResponse
from api.multi_viewer import Lane, MultiViewer
from api.responses import PlainViewer, ResponseViewer
from api.viewer import NativeViewer
from api.wires import chat_completions, native, responses, text, ui_messages
from relay.errors import StreamGone
from relay.events import CUT_SHORT, QUEUED, STARTED, Cursor, Event

BORN = responses.Born("id", 1, "m")


class Class(NamedTuple):
    wire: Wire
    make: Callable[..., LongResponse]
    gone: Callable[[StreamGone], bytes] | None
    """Broken off without."""
    anew: Callable[[list[Event]], bytes] | None = None
    """What is said in the place of a new attempt, after these events; broken off without."""
    takes_back: bool = False
    """Whether it tells a new attempt."""
    held: bool = False
    """Whether it says nothing, not even its status, before the first word."""
    first: bytes = b""
    """Before all events."""


def _completion(viewer: type[ChatCompletionViewer]) -> Class:
    return Class(
        viewer.wire,
        lambda parts, reader: viewer(parts.hub, reader.feed, None, parts.pace),
        chat_completions.encode_gone,
        lambda _: chat_completions.encode_error(chat_completions.INTERRUPTED),
        held=True,
    )


CLASSES = {
    "native": Class(
        native.encoder,
        lambda parts, reader: NativeViewer(parts.hub, reader.feed, reader.cursor, parts.pace),
        native.encode_gone,
        takes_back=True,
    ),
    "several": Class(
        native.encoder,
        lambda parts, *readers: MultiViewer(
            parts.hub, [Lane(reader.feed, reader.cursor) for reader in readers], parts.pace
        ),
        native.encode_gone,
        takes_back=True,
    ),
    "text": Class(
        text.encoder,
        lambda parts, reader: TextViewer(parts.hub, reader.feed, reader.cursor, parts.pace),
        None,
        held=True,
    ),
    "chat": _completion(ChatCompletionViewer),
    "with usage": _completion(WithUsage),
    "response": Class(
        BORN,
        lambda parts, reader: ResponseViewer(parts, reader.feed, BORN, skip=reader.skip),
        chat_completions.encode_gone,
        takes_back=True,
    ),
    "plain response": Class(
        BORN,
        lambda parts, reader: PlainViewer(parts, reader.feed, BORN),
        chat_completions.encode_gone,
        lambda events: responses.interrupted(BORN, events),
    ),
    "AI SDK": Class(
        ui_messages.encoder,
        lambda parts, reader: UIMessageViewer(parts, reader.feed, "msg"),
        lambda gone: ui_messages.encode_error(gone.message),
        takes_back=True,
        first=ui_messages.encode_start("msg"),
    ),
}
WITH_CURSOR = {"native", "several", "text"}


class Reader:
    """What one reader of a log is promised, whoever else reads it."""

    def __init__(self, name: str, feed: Feed, cursor: Cursor | None = None, skip: int = 0) -> None:
        self.name, self.feed, self.cursor, self.skip = name, feed, cursor, skip
        self.kind = CLASSES[name]
        self._came = len(feed.events)

    def ways(self, *, settled: bool) -> Iterator[tuple[str, set[bytes]]]:
        """What may have been written to it; `settled`: with all there is, as it takes all."""
        ended, gone = self.feed.events[-1].terminal, self.feed.gone
        if not settled:
            yield "going", {b""}
        for begin in self._begins() or {len(self.feed.events)}:
            events = self.feed.events[begin:]
            frames = self._frames(begin)
            end = self._superseded(events, frames)
            upto = self._written(frames[:end])
            if not settled or not (ended or gone or end < len(events)):
                yield "going", set(upto[-1:] if settled else upto)
            if end < len(events):
                last = self.kind.anew and self.kind.anew(self.feed.events[: begin + end])
                yield "ended" if last else "broken", {upto[-1] + (last or b"")}
            elif ended:
                yield "ended", {upto[-1]}
            if gone:
                last = self.kind.gone and self.kind.gone(gone)
                # Nothing follows an end.
                told = upto[:-1] or upto if ended and end == len(events) else upto
                yield "ended" if last else "broken", {each + (last or b"") for each in told}

    def speaks(self, *, now: bool = False) -> bool:
        """Whether any attempt since it came has said something, or the newest one."""
        begin = _newest(self.feed.events[: None if now else self._came])
        told = zip(self.feed.events[begin:], self._frames(begin), strict=True)
        return any(frame and event.kind not in CUT_SHORT for event, frame in told)

    def _begins(self) -> set[int]:
        """Where it may begin: that depends on when it gets round to that."""
        return {
            begin
            for upto in range(self._came, len(self.feed.events) + 1)
            if (begin := self._begin(self.feed.events[:upto])) is not None
        }

    def _begin(self, events: list[Event]) -> int | None:
        start = 0 if self.kind.wire is BORN else _newest(events)
        places = [event.cursor for event in events]
        if self.cursor in places[start:]:
            return places.index(self.cursor) + 1
        known = self.cursor is None or self.cursor <= places[-1] or self.feed.ended
        return start if known else None

    def _frames(self, begin: int) -> list[bytes]:
        """By an encoder of its own, which sees nothing of earlier attempts."""
        origin = 0 if self.kind.wire is BORN else _newest(self.feed.events[: begin + 1])
        encode = self.kind.wire()
        return [encode(event) for event in self.feed.events[origin:]][begin - origin :]

    def _superseded(self, events: list[Event], frames: list[bytes]) -> int:
        """The index at which it must end before the log does."""
        written = self.name == "text" and self.cursor is not None and self.cursor.attempt > 0
        for index, event in enumerate(events):
            if event.kind == STARTED and written and not self.kind.takes_back:
                return index
            if event.kind in CUT_SHORT and self.name == "text":
                return index
            written = written or (frames[index] != b"" and event.kind not in {QUEUED, STARTED})
        return len(events)

    def _written(self, frames: list[bytes]) -> list[bytes]:
        whole = accumulate(frames, initial=b"")
        if not self.skip:
            return list(whole)
        return [b"\n\n".join(upto.split(b"\n\n")[self.skip :]) for upto in whole]


def _newest(events: list[Event]) -> int:
    return max((n for n, event in enumerate(events) if event.kind == STARTED), default=0)
