"""Viewers of all classes on one feed: they share its frames and its rides, and no promise."""

import asyncio
import re
from typing import Any
from unittest.mock import patch

from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from api import feed as feed_module
from api import multi_viewer
from api.feed import Feed
from api.hub import Hub
from api.line import EXTENSION
from api.parts import Parts
from api.presence import Presence
from relay.chunks import Compactor
from relay.errors import StreamGone
from relay.events import (
    CANCELLED,
    COMPLETED,
    FAILED,
    Cursor,
    Event,
    entry,
    to_json,
)
from relay.log import BIRTH
from relay.settings import Settings
from tests.asgi import Taker
from tests.conftest import make_log
from tests.promised import CLASSES, WITH_CURSOR, Reader
from tests.stage import Stage

GONE = StreamGone("erased")
OF_SEVERAL = re.compile(rb'id: (.*)\n(event.*\ndata: \{)"stream_id":"(\w+)",?(.*\n\n)')
RESET = b'data: {"type":"reset-step"}\n\n'
ENDS = {
    COMPLETED: {"finish_reason": "stop"},
    FAILED: {"code": "upstream_failed", "message": "m", "retryable": False},
    CANCELLED: {},
}
TEXTS = ["%d ", "%d" + "x" * 2500, "%d\ud83d", "\ude00%d"]
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


Step = tuple[Any, ...]
"""The name of a method of `Mix`, and what it is given."""


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
            match = OF_SEVERAL.fullmatch(event)
            assert match, event
            of, before, places = names.index(match[3]), places, match[1].split(b".")
            its_id = b"" if places[of] == b"x" else b"id: %b\n" % places[of]
            told[of] += its_id + match[2] + match[4]
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
SAYS = st.tuples(st.sampled_from(["say", "say", "say", "begin_anew"]), SAID)
ONE_DOES = st.tuples(st.sampled_from(["stop_taking", "stop_taking", "leave"]), SEATS)
ALL_DO = st.tuples(st.sampled_from(["rest", "take", "turn", "say_elsewhere", "notice", "wait"]))
STEP = st.one_of(SAYS, SAYS, ALL_DO, ALL_DO, ONE_DOES, JOINS)
OVER = st.one_of(
    st.tuples(st.sampled_from(["drain", "go_away"])),
    st.tuples(st.just("end"), st.sampled_from(list(ENDS))),
)


@given(
    cast=st.lists(JOINS, min_size=2, max_size=6),
    steps=st.lists(STEP, min_size=8, max_size=30),
    last_steps=st.lists(st.one_of(OVER, STEP), max_size=8),
)
@example(
    # Of one wire, and only one of them may ride on to a new attempt.
    cast=[("join", name, 0, True) for name in ("response", "plain response")],
    steps=[("say", [0]), ("say", [0]), ("rest",), ("begin_anew", [0]), ("rest",)],
    last_steps=[],
)
@example(
    cast=[("join", name, 0, True) for name in CLASSES],
    steps=[("say", [0]), ("rest",), *(("stop_taking", n) for n in range(len(CLASSES)))],
    last_steps=[("end", COMPLETED), ("turn",), ("turn",), ("turn",), ("go_away",), ("take",)],
)
@settings(max_examples=100)
def test_any_mix_of_viewers_on_one_feed_is_told_what_each_would_be_told_alone(
    cast: list[Step], steps: list[Step], last_steps: list[Step]
) -> None:
    with (
        patch.object(feed_module, "FRAMES_AT_ONCE", 4),
        patch.object(feed_module, "BYTES_AT_ONCE", 4000),
        patch.object(multi_viewer, "EVENTS_AT_ONCE", 3),
        patch.object(multi_viewer, "BYTES_AT_ONCE", 4000),
    ):
        stage = Stage()
        with asyncio.Runner(loop_factory=lambda: stage) as runner:
            runner.run(Mix(stage).play([*cast, *steps, *last_steps]))


class Mix:
    """A feed and who watches it. Each step is a method."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    async def play(self, steps: list[Step]) -> None:
        redis = Redis()
        store = make_log(redis)
        self._hub = Hub(redis, store, cache_bytes=0, retention_seconds=60)
        configured = Settings()
        presence = Presence(self._hub, store, process="p")
        self._parts = Parts(configured, store, self._hub, presence, configured.webhooks, "m")
        self._log, self._other = Log("id"), Log("other")
        self._people: list[Person] = []
        for verb, *how in steps:
            await getattr(self, verb)(*how)
        await self.take()
        await self.rest()
        for log in (self._log, self._other):
            log.say([], ending=COMPLETED)
        await self.rest()
        assert all(person.over for person in self._people)

    async def join(self, name: str, number: int, lined: bool) -> None:
        feed = self._log.feed
        cursor, skip = None, 0
        top = feed.events[-1].cursor
        if name in WITH_CURSOR and number:
            places = [Cursor(top.attempt, top.seq + n) for n in (3, 1)]
            places += [event.cursor for event in feed.events[::-1]]
            cursor = places[(number - 1) % len(places)]
        elif name == "response":
            skip = number
        readers = [Reader(name, feed, cursor, skip)]
        if name == "several":
            readers.append(Reader(name, self._other.feed))
        self._people.append(Person(self._parts, *readers, lined=lined))

    async def say(self, numbers: list[int]) -> None:
        self._log.say(numbers)

    async def begin_anew(self, numbers: list[int]) -> None:
        self._log.begin_anew()
        self._log.say(numbers)

    async def end(self, kind: str) -> None:
        self._log.say([], ending=kind)

    async def say_elsewhere(self) -> None:
        self._other.say([0])

    async def notice(self) -> None:
        self._log.feed.notice(b"Redis is away")

    async def go_away(self) -> None:
        self._log.feed.end_as_gone(GONE)

    async def drain(self) -> None:
        self._hub.draining = True
        self._log.feed.wake()

    async def leave(self, seat: int) -> None:
        self._people[seat % len(self._people)].leave()

    async def stop_taking(self, seat: int) -> None:
        self._people[seat % len(self._people)].taker.reading.clear()

    async def take(self) -> None:
        for person in self._people:
            person.taker.go_on()

    async def turn(self) -> None:
        """So that the next step falls between two of theirs."""
        await asyncio.sleep(0)

    async def rest(self) -> None:
        await self._stage.rest()
        for person in self._people:
            person.check()

    async def wait(self) -> None:
        """As long as who hears nothing meanwhile is told that its connection still stands."""
        await self.rest()
        before = [(p, p.beats) for p in self._people if p.attentive and p.taker.status]
        self._stage.now += 15
        for person in self._people:
            person.stuck_seconds += 15 * (not person.taker.reading.is_set())
        await self.rest()
        for person, beats in before:
            if person.reader.name != "text" and not person.over:
                assert person.beats == beats + 1, person.explain()
