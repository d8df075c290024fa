"""Viewers of all classes on one feed: they share its frames and its rides, and no promise.

What each is promised is told by its codec alone, run over the events that it is to see.
"""

import asyncio
import re
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple
from unittest.mock import patch

from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from api import feed as feed_module
from api import multi_viewer
from api.ai_sdk import UIMessageViewer
from api.chat_completions import ChatCompletionViewer, WithUsage
from api.feed import Feed, Wire
from api.held_viewer import TextViewer
from api.hub import Hub
from api.line import EXTENSION
from api.long_response import LongResponse
from api.multi_viewer import Lane, MultiViewer
from api.parts import Parts
from api.presence import Presence
from api.responses import PlainViewer, ResponseViewer
from api.viewer import NativeViewer
from api.wires import chat_completions, native, responses, text, ui_messages
from relay.chunks import Compactor
from relay.errors import StreamGone
from relay.events import (
    CANCELLED,
    COMPLETED,
    CUT_SHORT,
    FAILED,
    QUEUED,
    STARTED,
    Cursor,
    Event,
    entry,
    to_json,
)
from relay.log import BIRTH
from relay.settings import Settings
from tests.asgi import Taker
from tests.conftest import make_log

BORN = responses.Born("id", 1, "m")
GONE = StreamGone("erased")
OF_SEVERAL = re.compile(rb'id: (.*)\n(event.*\ndata: \{)"stream_id":"(\w+)",?(.*\n\n)')
RESET = b'data: {"type":"reset-step"}\n\n'
ENDS = {
    COMPLETED: {"finish_reason": "stop"},
    FAILED: {"code": "upstream_failed", "message": "m", "retryable": False},
    CANCELLED: {},
}
TEXTS = ["%d ", "%d" + "x" * 500, "%d\ud83d", "\ude00%d"]
DELTAS: list[dict[str, Any]] = [
    *({"content": text} for text in TEXTS),
    {"role": "assistant", "content": ""},
    {"reasoning_content": "%d?"},
    {"refusal": "%d!"},
    {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "%d"}}]},
]
CHUNKS: list[dict[str, Any]] = [
    *({"choices": [{"index": 0, "delta": delta}]} for delta in DELTAS),
    {"choices": [{"index": 1, "delta": DELTAS[0]}]},
    {"choices": [], "usage": {"prompt_tokens": 1}},
]
"""As an upstream says them, each with a number in the place of `%d`."""


class Log:
    """A feed that grows as a worker makes it of an upstream's chunks."""

    def __init__(self, stream_id: str) -> None:
        self.feed = Feed(stream_id)
        self.feed.add([BIRTH])
        self._next = 0
        self.begin_anew()

    def begin_anew(self) -> None:
        self._attempt, self._seq = self.feed.events[-1].cursor.attempt + 1, 0
        self._compactor = Compactor(self._attempt, "m")

    def say(self, numbers: list[int], *, ending: str | None = None) -> None:
        """These chunks, which are heard together."""
        entries = []
        for number in numbers:
            self._next += 1
            chunk = to_json({"id": "c", **CHUNKS[number]}).replace(b"%d", b"%d" % self._next)
            entries += self._compactor.entries(chunk)
        if ending is not None:
            entries.append(entry(ending, ENDS[ending]))
        places = [Cursor(self._attempt, self._seq + n) for n in range(len(entries))]
        self._seq += len(entries)
        self.feed.add(
            [Event(at, *each) for at, each in zip(places, entries, strict=True)], read=True
        )


Step = tuple[Any, ...]


class Class(NamedTuple):
    wire: Wire
    make: Callable[..., LongResponse]
    gone: Callable[[StreamGone], bytes] | None
    """Broken off without."""
    anew: Callable[[list[Event]], bytes] | None = None
    """What is said in the place of a new attempt, after these events; broken off without."""
    takes_back: bool = False
    held: bool = False
    first: bytes = b""


def _interrupted(_: list[Event]) -> bytes:
    return chat_completions.encode_error(chat_completions.INTERRUPTED)


_said_gone = chat_completions.encode_gone
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
    "chat": Class(
        chat_completions.encoder,
        lambda parts, reader: ChatCompletionViewer(parts.hub, reader.feed, None, parts.pace),
        _said_gone,
        _interrupted,
        held=True,
    ),
    "with usage": Class(
        chat_completions.encoder_with_usage,
        lambda parts, reader: WithUsage(parts.hub, reader.feed, None, parts.pace),
        _said_gone,
        _interrupted,
        held=True,
    ),
    "response": Class(
        BORN,
        lambda parts, reader: ResponseViewer(parts, reader.feed, BORN, skip=reader.skip),
        _said_gone,
        takes_back=True,
    ),
    "plain response": Class(
        BORN,
        lambda parts, reader: PlainViewer(parts, reader.feed, BORN),
        _said_gone,
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


class Person:
    """A viewer, and what its client takes of it."""

    def __init__(self, parts: Parts, *readers: Reader, lined: bool) -> None:
        self.readers = readers
        self.reader = reader = readers[0]
        self.taker = Taker()
        self.left = False
        self.stuck_seconds = 0.0
        self._notices = len(reader.feed.notices)
        self._hub = parts.hub
        viewer = reader.kind.make(parts, *readers)
        scope = {"type": "http"} | ({"extensions": {EXTENSION: self.taker.line}} if lined else {})
        self.task = asyncio.create_task(viewer(scope, self.taker.receive, self.taker.send))

    @property
    def over(self) -> bool:
        return self.task.done()

    def leave(self) -> None:
        if not self.over:
            self.left = True
            self.taker.leave()

    @property
    def blocks(self) -> list[bytes]:
        return re.findall(rb"(?s).*?\n\n", self.taker.body)

    @property
    def beats(self) -> int:
        return self.blocks.count(b":\n\n")

    @property
    def attentive(self) -> bool:
        """Whether it has heard all that there is when everything rests."""
        return not self.over and self.taker.reading.is_set()

    def check(self) -> None:
        if self.over and not self.left:
            self.task.result()
        if self.taker.status not in {0, 200}:
            self._check_refusal()
            return
        if self.reader.kind.held and not self.taker.status:
            assert not (self.attentive and self.reader.speaks(now=True)), self.explain()
            return
        told = [self.taker.body] if self.reader.name == "text" else self._events()
        for reader, body in zip(self.readers, told, strict=True):
            ways = reader.ways(settled=self.attentive)
            assert any(body in bodies for how, bodies in ways if how in self._ways()), (
                self.explain()
            )
        if self.reader.kind.held and self.taker.status and not self.left:
            completed = self.reader.feed.events[-1].kind == COMPLETED
            assert completed or self.reader.speaks(), self.explain()

    def _ways(self) -> set[str]:
        if self.left:
            return {"going", "ended", "broken"}
        if self.over and self.taker.ended:
            return {"ended"}
        if self.over and not (self._hub.draining or self.stuck_seconds >= 30):
            return {"broken"}
        one = {"going", "broken"} if self.over else {"going"}
        return one if len(self.readers) == 1 else {*one, "ended"}

    def _events(self) -> list[bytes]:
        """Without what is said beside the events, which may stand between any two."""
        blocks = self.blocks
        assert b"".join(blocks) == self.taker.body
        heard = [block for block in blocks if block.startswith(b": ")]
        notices = [b": %b\n\n" % notice for notice in self.reader.feed.notices[self._notices :]]
        all_of_them = self.attentive and blocks and not self.reader.feed.ended
        assert heard == (notices if all_of_them else notices[: len(heard)])
        retries = [n for n, block in enumerate(blocks) if block.startswith(b"retry: ")]
        assert set(retries) <= {0, len(blocks) - 1}
        events = [block for block in blocks if not block.startswith((b":", b"retry: "))]
        if self.reader.name == "several":
            return self._unwoven(events)
        told = b"".join(events)
        if told:
            assert told.startswith(self.reader.kind.first)
        return [told.removeprefix(self.reader.kind.first).removeprefix(RESET)]

    def _unwoven(self, events: list[bytes]) -> list[bytes]:
        """What was told of each stream, in the words of a viewer of it alone."""
        names = [reader.feed.stream_id.encode() for reader in self.readers]
        places = [str(reader.cursor or "").encode() for reader in self.readers]
        told = [b""] * len(names)
        for event in events:
            match = re.fullmatch(
                rb'id: (.*)\n(event.*\ndata: \{)"stream_id":"(\w+)",?(.*\n\n)', event
            )
            assert match, event
            of, before, places = names.index(match[3]), places, match[1].split(b".")
            told[of] += (
                (b"" if places[of] == b"x" else b"id: %b\n" % places[of]) + match[2] + match[4]
            )
            assert [*places[:of], *places[of + 1 :]] == [*before[:of], *before[of + 1 :]]
        return told

    def _check_refusal(self) -> None:
        last = self.reader.feed.events[-1].kind
        chat = self.reader.name != "text"
        assert self.taker.ended
        assert self.reader.kind.held
        assert self.taker.status in {
            410 if self.reader.feed.gone else 0,
            {FAILED: 502, CANCELLED: 400 if chat else 409}.get(last, 0),
            503 if self._hub.draining else 0,
        }

    def explain(self) -> str:
        return f"{self.reader.name} was told {self.taker.body!r}"


SEATS = st.integers(0, 5)
NAMES = st.sampled_from([*CLASSES, "response", "plain response"])  # These share a wire.
PLACES = st.one_of(st.just(0), st.integers(0, 9))
JOINS = st.tuples(st.just("join"), NAMES, PLACES, st.sampled_from([True, True, True, False]))
SAID = st.lists(st.one_of(st.just(0), st.integers(0, len(CHUNKS) - 1)), min_size=1, max_size=5)
SAYS = st.tuples(st.sampled_from(["say", "say", "say", "begin anew"]), SAID)
ONE_DOES = st.tuples(st.sampled_from(["stop taking", "stop taking", "leave"]), SEATS)
ALL_DO = st.tuples(st.sampled_from(["rest", "take", "yield", "elsewhere", "notice", "wait"]))
STEP = st.one_of(SAYS, SAYS, ALL_DO, ALL_DO, ONE_DOES, JOINS)
TURN = st.tuples(st.sampled_from(["drain", "gone", *ENDS]))


@given(
    cast=st.lists(JOINS, min_size=2, max_size=6),
    steps=st.lists(STEP, min_size=8, max_size=30),
    turns=st.lists(st.one_of(TURN, STEP), max_size=8),
)
@example(
    # Of one wire, and only one of them may ride on to a new attempt.
    cast=[("join", name, 0, True) for name in ("response", "plain response")],
    steps=[("say", [0]), ("say", [0]), ("rest",), ("begin anew", [0]), ("rest",)],
    turns=[],
)
@example(
    cast=[("join", name, 0, True) for name in CLASSES],
    steps=[("say", [0]), ("rest",), *(("stop taking", n) for n in range(len(CLASSES)))],
    turns=[("completed",), ("yield",), ("gone",), ("take",)],
)
@settings(max_examples=100)
def test_any_mix_of_viewers_on_one_feed_is_told_what_each_would_be_told_alone(
    cast: list[Step], steps: list[Step], turns: list[Step]
) -> None:
    with (
        patch.object(feed_module, "FRAMES_AT_ONCE", 3),
        patch.object(feed_module, "BYTES_AT_ONCE", 900),
        patch.object(multi_viewer, "EVENTS_AT_ONCE", 3),
        patch.object(multi_viewer, "BYTES_AT_ONCE", 900),
    ):
        asyncio.run(Mix().play([*cast, *steps, *turns]))


class Mix:
    async def play(self, steps: list[Step]) -> None:
        """By a clock of its own, on which only `wait` takes time."""
        self._now = 0.0
        asyncio.get_running_loop().time = lambda: self._now  # type: ignore[method-assign]
        redis = Redis()
        store = make_log(redis)
        self._hub = Hub(redis, store, cache_bytes=0, retention_seconds=60)
        configured = Settings()
        presence = Presence(self._hub, store, process="p")
        self._parts = Parts(configured, store, self._hub, presence, configured.webhooks, "m")
        self._log, self._other = Log("id"), Log("other")
        self._people: list[Person] = []
        for verb, *how in steps:
            await self._do(verb, *how)
        for person in self._people:
            person.taker.reading.set()
        await self._rest()
        for log in (self._log, self._other):
            log.say([], ending=COMPLETED)
        await self._rest()
        assert all(person.over for person in self._people)

    async def _do(self, verb: str, *how: Any) -> None:  # noqa: C901, PLR0912
        feed = self._log.feed
        if verb == "elsewhere":
            self._other.say([0])
        elif verb == "join":
            self._join(*how)
        elif verb == "say":
            self._log.say(*how)
        elif verb == "begin anew":
            self._log.begin_anew()
            self._log.say(*how)
        elif verb == "rest":
            await self._rest()
        elif verb == "take":
            for person in self._people:
                person.taker.reading.set()
        elif verb == "yield":
            await asyncio.sleep(0)
        elif verb == "wait":
            await self._wait()
        elif verb == "notice":
            feed.notice(b"Redis is away")
        elif verb == "gone":
            feed.end_as_gone(GONE)
        elif verb == "drain":
            self._hub.draining = True
            feed.wake()
        elif verb in ENDS:
            self._log.say([], ending=verb)
        elif self._people:
            person = self._people[how[0] % len(self._people)]
            if verb == "leave":
                person.leave()
            else:
                person.taker.reading.clear()

    def _join(self, name: str, number: int, lined: bool) -> None:
        feed = self._log.feed
        cursor, skip = None, 0
        top = feed.events[-1].cursor
        if name in WITH_CURSOR and number:
            places = [Cursor(top.attempt, top.seq + n) for n in (3, 1)]
            places += [event.cursor for event in feed.events[::-1]]
            cursor = places[(number - 1) % len(places)]
        elif name == "response":
            skip = number
        reader = Reader(name, feed, cursor, skip)
        readers = [reader]
        if name == "several":
            readers.append(Reader(name, self._other.feed))
        self._people.append(Person(self._parts, *readers, lined=lined))

    async def _rest(self) -> None:
        for _ in range(30):
            await asyncio.sleep(0)
        for person in self._people:
            person.check()

    async def _wait(self) -> None:
        """As long as who hears nothing meanwhile is told that its connection still stands."""
        await self._rest()
        before = [(p, p.beats) for p in self._people if p.attentive and p.taker.status]
        self._now += 15
        for person in self._people:
            person.stuck_seconds += 15 * (not person.taker.reading.is_set())
        await self._rest()
        for person, beats in before:
            if person.reader.name != "text" and not person.over:
                assert person.beats == beats + 1, person.explain()
