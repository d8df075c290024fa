"""The viewers, driven at the seam of ASGI."""

import asyncio
import json
import random
import tracemalloc

import pytest
from redis.asyncio import Redis
from starlette.types import Message, Receive, Scope, Send

from api.ai_sdk import UIMessageViewer
from api.chat_completions import ChatCompletionViewer
from api.feed import BYTES_AT_ONCE, FRAMES_AT_ONCE, Feed, Wire
from api.held_viewer import HeldViewer, TextViewer
from api.hub import Hub
from api.line import chunk_of
from api.long_response import Pace
from api.multi_viewer import Lane, MultiViewer
from api.parts import Parts
from api.presence import Presence
from api.responses import PlainViewer, ResponseViewer
from api.viewer import NativeViewer
from api.wires.responses import Born
from relay.errors import StreamGone
from relay.events import (
    CANCELLED,
    COMPLETED,
    FAILED,
    QUEUED,
    STARTED,
    TEXT,
    WHOLE,
    Cursor,
    Entry,
    Event,
    entry,
)
from relay.settings import Settings
from tests import asgi
from tests.asgi import viewing
from tests.conftest import given_up, make_log, until


@pytest.fixture(params=["any server", "our server"], autouse=True)
def _server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "LINED", request.param == "our server")


@pytest.fixture
async def hub(redis: Redis) -> Hub:
    return Hub(redis, make_log(redis), cache_bytes=0, retention_seconds=60)


STARTS = entry(STARTED, {"attempt": 1, "model": "m"})
ENDS = entry(COMPLETED, {"finish_reason": "stop"})
FILTERED = {"code": "content_filter", "message": "m", "retryable": False}


class Log:
    """A feed that grows as the test says."""

    def __init__(self) -> None:
        self.feed = Feed("id")
        self.feed.add([Event(Cursor(0, 1), QUEUED, b"{}")])
        self._attempt = 1
        self._seq = 0

    def add(self, *entries: Entry) -> None:
        for kind, data in entries:
            self.feed.add([Event(Cursor(self._attempt, self._seq), kind, data)], read=True)
            self._seq += 1

    async def is_ridden(self) -> bool:
        """Whether somebody has everything."""
        return any(self.feed._riders.values())

    async def is_awaited(self) -> bool:
        """The same, whether it rides or is to be woken."""
        return bool(self.feed._waiters) or await self.is_ridden()

    def begin_anew(self) -> None:
        self._attempt, self._seq = self._attempt + 1, 0
        self.add(entry(STARTED, {"attempt": self._attempt, "model": "m", "envelope": {}}))


def text(*texts: str) -> list[Entry]:
    return [entry(TEXT, text) for text in texts]


def viewer(
    hub: Hub,
    log: Log,
    *,
    heartbeat_seconds: float = 60,
    write_seconds: float = 60,
    drain_seconds: float = 0,
) -> NativeViewer:
    pace = Pace(heartbeat_seconds, write_seconds, drain_seconds)
    return NativeViewer(hub, log.feed, None, pace)


def text_viewer(hub: Hub, log: Log, *, drain_seconds: float = 0) -> TextViewer:
    return TextViewer(hub, log.feed, None, Pace(60, 60, drain_seconds))


@pytest.mark.parametrize("gone", [False, True])
async def test_its_first_words_come_with_what_there_is_to_say(hub: Hub, gone: bool) -> None:
    log = Log()
    if gone:
        log.feed.end_as_gone(StreamGone("erased"))
    async with viewing(viewer(hub, log)) as taker:
        await taker.has(b"stream_gone" if gone else b"queued")
    first = taker.writes[0]
    assert first.startswith(b"retry: ")
    assert first.endswith(b"\n\n")
    assert first.count(b"event: ") == 1


async def test_viewers_that_would_lose_their_connection_together_come_back_at_different_times(
    hub: Hub,
) -> None:
    log = Log()
    waits = set()
    for _ in range(9):
        async with viewing(viewer(hub, log)) as taker:
            await taker.has(b"queued")
        waits.add(int(taker.body.split()[1]))
    assert len(waits) > 1
    assert all(500 <= wait <= 2000 for wait in waits)


async def test_what_came_since_the_last_write_goes_out_as_one(hub: Hub) -> None:
    log = Log()
    log.add(STARTS)
    async with viewing(viewer(hub, log)) as taker:
        await taker.has(b"started")
        taker.reading.clear()
        log.add(*text("a"))
        await asyncio.sleep(0)
        log.add(*text("b", "c", "d"))
        log.add(ENDS)
        taker.reading.set()
        await taker.has(b"completed")
    assert [write.count(b"event: ") for write in taker.writes if b"event: " in write] in (
        [1, 1, 4],
        [1, 5],
    )


async def test_a_chunk_wakes_no_viewer_that_has_everything(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asgi, "LINED", True)
    log = Log()
    log.add(STARTS)
    async with viewing(viewer(hub, log)) as taker:
        await taker.has(b"started")
        await until(log.is_ridden)
        sent, writes = taker.sent, len(taker.writes)
        log.add(*text(*map(str, range(100))))
        await taker.has(b'{"text":"99"}')
        assert taker.sent == sent
        assert len(taker.writes) == writes + 1, "what came together is written together"
        log.add(ENDS)
        await taker.has(b"completed")
    assert taker.ended


async def test_an_idle_viewer_hears_a_heartbeat(hub: Hub) -> None:
    for watching in (
        viewer(hub, Log(), heartbeat_seconds=0.01),
        several_viewer(hub, [Log()], heartbeat_seconds=0.01),
    ):
        async with viewing(watching) as taker:
            await taker.has(b":\n\n:\n\n")
        assert [frame.event for frame in taker.frames] == ["queued"]


async def test_one_that_was_told_something_hears_heartbeats_after_it_as_before(hub: Hub) -> None:
    log = Log()
    async with viewing(viewer(hub, log, heartbeat_seconds=0.01)) as taker:
        await taker.has(b":\n\n:\n\n")
        log.feed.notice(b"Redis is away")
        await taker.has(b": Redis is away\n\n:\n\n:\n\n")


async def test_while_chunks_come_there_is_no_heartbeat(hub: Hub) -> None:
    log = Log()
    log.add(STARTS)
    async with viewing(viewer(hub, log, heartbeat_seconds=0.2)) as taker:
        await taker.has(b"started")
        for number in range(30):
            log.add(*text(str(number)))
            await asyncio.sleep(0.01)
        assert b"\n:\n\n" not in taker.body
        await taker.has(b"\n:\n\n")


async def test_a_viewer_that_takes_nothing_is_broken_off(hub: Hub) -> None:
    log = Log()
    taking = viewer(hub, log, write_seconds=0.05)
    before = given_up()
    async with viewing(taking) as taker:
        await taker.has(b"queued")
        taker.reading.clear()
        log.add(STARTS)
        async with asyncio.timeout(5):
            await asyncio.wait(_others())
        assert not taker.ended
    assert given_up() == before + 1


def _others() -> set[asyncio.Task[None]]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


async def test_what_a_slow_viewer_holds_is_bounded(hub: Hub) -> None:
    """Promise 5: one write of a bounded number of frames, however long it sleeps; then it catches
    up with the whole log."""
    log = Log()
    log.add(STARTS)
    async with viewing(viewer(hub, log)) as slow:
        await slow.has(b"started")
        slow.reading.clear()
        tracemalloc.start()
        try:
            for n in range(40):
                log.add(*text(*(f"{n}.{i} " for i in range(250))))
                await asyncio.sleep(0)
            held = tracemalloc.take_snapshot().filter_traces(
                [tracemalloc.Filter(True, "*/api/viewer.py")]
            )
        finally:
            tracemalloc.stop()
        log.add(ENDS)
        assert sum(trace.size for trace in held.traces) < 64 * 1024
        slow.reading.set()
        await slow.has(b"completed")
    assert max(write.count(b"event: ") for write in slow.writes) == FRAMES_AT_ONCE
    assert [frame.id for frame in slow.frames[1:-1]] == [f"1-{n}" for n in range(1, 10_001)]


async def test_one_that_leaves_is_let_go_at_once(hub: Hub) -> None:
    log = Log()
    async with asyncio.timeout(1), viewing(viewer(hub, log)) as taker:
        await taker.has(b"queued")


async def test_one_that_left_is_asked_about_unless_the_stream_had_ended(hub: Hub) -> None:
    asked: list[str] = []

    async def on_leave() -> None:
        asked.append("left")

    for ended in (False, True):
        log = Log()
        log.add(STARTS)
        leaving = NativeViewer(hub, log.feed, None, Pace(60, 60, 0), on_leave=on_leave)
        async with viewing(leaving) as taker:
            await taker.has(b"started")
            taker.reading.clear()
            log.add(*([ENDS] if ended else text("a")))
            for _ in range(5):  # It leaves while its last write is not yet taken.
                await asyncio.sleep(0)
    assert asked == ["left"]


async def test_one_whose_text_is_no_longer_true_is_broken_off_and_has_not_left(hub: Hub) -> None:
    asked: list[str] = []

    async def on_leave() -> None:
        asked.append("left")

    log = Log()
    log.add(STARTS, *text("half"))
    watching = TextViewer(hub, log.feed, None, Pace(60, 60, 0), on_leave=on_leave)
    async with viewing(watching) as taker:
        await taker.has(b"half")
        log.begin_anew()
        async with asyncio.timeout(5):
            await asyncio.wait(_others())
    assert asked == []


async def test_one_that_takes_nothing_has_left_too(hub: Hub) -> None:
    left = asyncio.Event()

    async def on_leave() -> None:
        left.set()

    log = Log()
    stuck = NativeViewer(hub, log.feed, None, Pace(60, 0.05, 0), on_leave=on_leave)
    async with viewing(stuck) as taker:
        await taker.has(b"queued")
        taker.reading.clear()
        log.add(STARTS)
        async with asyncio.timeout(5):
            await left.wait()


async def test_only_a_write_that_takes_too_long_aborts_the_connection(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asgi, "LINED", True)
    for stuck in (False, True):
        log = Log()
        log.add(STARTS)
        watching = viewer(hub, log, write_seconds=0.05 if stuck else 60)
        async with viewing(watching) as taker:
            await taker.has(b"started")
            if stuck:
                taker.reading.clear()
                log.add(*text("a"))
                async with asyncio.timeout(5):
                    await taker.aborted.wait()
            assert taker.aborted.is_set() == stuck


async def test_an_end_that_is_not_taken_aborts_the_connection_too(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asgi, "LINED", True)
    log = Log()
    log.add(STARTS)
    watching = viewer(hub, log, write_seconds=0.05)

    async def all_but_the_end(scope: Scope, receive: Receive, send: Send) -> None:
        async def full_before_the_end(message: Message) -> None:
            if b"completed" in message.get("body", b""):
                taker.reading.clear()
                taker.write(chunk_of(message["body"]))
            else:
                await send(message)

        await watching(scope, receive, full_before_the_end)

    async with viewing(all_but_the_end) as taker, asyncio.timeout(5):
        log.add(ENDS)
        await taker.aborted.wait()


# A process that drains.


async def test_a_draining_process_breaks_its_viewers_off_with_a_time_to_come_back(hub: Hub) -> None:
    log = Log()
    log.add(STARTS)
    async with viewing(viewer(hub, log)) as taker:
        await taker.has(b"started")
        hub.draining = True
        log.feed.wake()
        async with asyncio.timeout(5):
            await asyncio.wait(_others())
        assert not taker.ended
    assert 500 <= int(taker.body.split(b"retry: ")[2]) <= 2000
    assert taker.frames[-1].event == "started"


async def test_until_it_must_go_a_viewer_is_told_everything_and_an_answer_that_ends_is_whole(
    hub: Hub,
) -> None:
    log = Log()
    log.add(STARTS)
    async with viewing(viewer(hub, log, drain_seconds=3600)) as taker:
        await taker.has(b"started")
        hub.draining = True
        log.feed.wake()
        log.add(*text("a"))
        await taker.has(b'{"text":"a"}')
        log.add(ENDS)
        async with asyncio.timeout(5):
            await asyncio.wait(_others())
        assert taker.ended
    assert taker.body.count(b"retry: ") == 1


def test_only_viewers_of_events_come_back_by_themselves() -> None:
    assert NativeViewer.resumes
    assert MultiViewer.resumes
    others = (TextViewer, ChatCompletionViewer, ResponseViewer, UIMessageViewer)
    assert not any(kind.resumes for kind in others)


@pytest.mark.parametrize("resumes", [True, False])
async def test_only_who_can_go_on_elsewhere_leaves_early_in_a_drain(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, resumes: bool
) -> None:
    moments = []

    def earliest(first: float, last: float) -> float:
        moments.append((first, last))
        return first

    monkeypatch.setattr(random, "uniform", earliest)
    log = Log()
    log.add(STARTS, *text("a"))
    either = viewer if resumes else text_viewer
    async with viewing(either(hub, log, drain_seconds=3600)) as taker:
        await taker.has(b"a")
        hub.draining = True
        log.feed.wake()
        if not resumes:
            for _ in range(5):  # In which the other one leaves.
                await asyncio.sleep(0)
            log.add(ENDS)
        async with asyncio.timeout(5):
            await asyncio.wait(_others())
        assert taker.ended == (not resumes)
    assert moments == [(0 if resumes else 0.9 * 3600, 3600)]


async def test_an_answer_that_was_taken_whole_ends_cleanly_though_its_viewer_must_go(
    hub: Hub,
) -> None:
    log = Log()
    log.add(STARTS)
    async with viewing(viewer(hub, log)) as taker:
        await taker.has(b"started")
        taker.reading.clear()
        hub.draining = True
        log.add(ENDS)
        for _ in range(5):  # Its time to go comes while its last write is not yet taken.
            await asyncio.sleep(0)
        taker.reading.set()
        async with asyncio.timeout(5):
            await asyncio.wait(_others())
        assert taker.ended


async def test_one_that_comes_to_a_draining_process_is_only_told_when_to_come_back(
    hub: Hub,
) -> None:
    hub.draining = True
    log = Log()
    log.add(STARTS)
    async with viewing(viewer(hub, log, drain_seconds=3600)) as taker:
        async with asyncio.timeout(5):
            await asyncio.wait(_others())
        assert (taker.status, taker.ended) == (200, False)
    assert taker.body.startswith(b"retry: ")
    assert taker.frames == []


@pytest.mark.parametrize("leaves", [True, False])
async def test_one_that_leaves_a_draining_process_has_left_and_one_sent_away_has_not(
    hub: Hub, leaves: bool
) -> None:
    asked: list[str] = []

    async def on_leave() -> None:
        asked.append("left")

    log = Log()
    log.add(STARTS)
    watching = NativeViewer(
        hub,
        log.feed,
        None,
        Pace(60, 60, 3600 if leaves else 0),
        on_leave=on_leave,
    )
    async with viewing(watching) as taker:
        await taker.has(b"started")
        hub.draining = True
        log.feed.wake()
        if not leaves:
            async with asyncio.timeout(5):
                await asyncio.wait(_others())
    assert asked == (["left"] if leaves else [])


# Notices.


async def test_a_notice_is_a_comment_once_for_each_that_is_there_and_no_event(hub: Hub) -> None:
    log = Log()
    log.add(STARTS)
    async with (
        viewing(viewer(hub, log)) as one,
        viewing(viewer(hub, log)) as two,
        viewing(several_viewer(hub, [log])) as of_several,
    ):
        there = (one, two, of_several)
        for taker in there:
            await taker.has(b"started")
        log.feed.notice(b"Redis is away")
        for taker in there:
            await taker.has(b": Redis is away\n\n")
        async with (
            viewing(viewer(hub, log)) as late,
            viewing(several_viewer(hub, [log])) as late_of_several,
        ):
            everybody = (*there, late, late_of_several)
            log.add(ENDS)
            for taker in everybody:
                await taker.has(b"completed")
    assert [taker.body.count(b"Redis is away") for taker in everybody] == [1, 1, 1, 0, 0]
    assert [frame.event for frame in one.frames] == ["started", "completed"]


async def test_a_notice_comes_though_the_cursor_is_not_yet_reached(hub: Hub) -> None:
    log = Log()
    ahead = NativeViewer(hub, log.feed, Cursor(1, 5), Pace(60, 60, 0))
    of_several = several_viewer(hub, [log], Cursor(1, 5))
    async with viewing(ahead) as one, viewing(of_several) as two:
        for taker in (one, two):
            await taker.has(b"retry")
        log.feed.notice(b"Redis is away")
        for taker in (one, two):
            await taker.has(b": Redis is away\n\n")


async def test_no_notice_is_mixed_into_text(hub: Hub) -> None:
    log = Log()
    log.add(STARTS, *text("a"))
    async with viewing(text_viewer(hub, log)) as taker:
        await taker.has(b"a")
        log.feed.notice(b"Redis is away")
        await asyncio.sleep(0)
        log.add(*text("b"), ENDS)
        await taker.has(b"ab")
    assert taker.body == b"ab"


async def test_a_stream_that_goes_away_is_told_in_band_and_not_shown_to_its_end(hub: Hub) -> None:
    log = Log()
    log.add(STARTS, *text("secret"), ENDS)
    log.feed.end_as_gone(StreamGone("erased"))
    async with viewing(viewer(hub, log)) as taker:
        await taker.has(b"stream_gone")
    assert json.loads(taker.frames[-1].data) == {
        "code": "stream_gone",
        "message": "erased",
        "retryable": False,
    }
    assert b"secret" not in taker.body


async def test_a_stream_that_went_away_while_it_was_first_read_is_told_as_gone(hub: Hub) -> None:
    feed = Feed("id")
    feed.end_as_gone(StreamGone("erased"))
    async with viewing(NativeViewer(hub, feed, Cursor(1, 2), Pace(60, 60, 0))) as taker:
        await taker.has(b"stream_gone")


async def test_who_was_told_the_end_is_told_of_no_other_though_the_stream_then_goes_away(
    hub: Hub,
) -> None:
    log, running = Log(), Log()
    log.add(STARTS, *text("a"))
    async with (
        viewing(viewer(hub, log)) as slow,
        viewing(several_viewer(hub, [log, running])) as of_several,
    ):
        await slow.has(b'{"text":"a"}')
        slow.reading.clear()
        log.add(ENDS)
        await of_several.has(b"completed")
        log.feed.end_as_gone(StreamGone("erased"))
        slow.reading.set()
        running.add(STARTS, ENDS)
        for taker in (slow, of_several):
            await taker.over.wait()
            assert taker.ended
            assert b"stream_gone" not in taker.body
    assert slow.frames[-1].event == "completed"


# Of a response.


def response_viewer(hub: Hub, redis: Redis, log: Log, kind: type[ResponseViewer]) -> ResponseViewer:
    settings, store = Settings(), make_log(redis)
    presence = Presence(hub, store, process="p")
    parts = Parts(settings, store, hub, presence, settings.webhooks, "m")
    return kind(parts, log.feed, Born("id", 1, "m"))


def delta(**fields: str) -> Entry:
    return entry(WHOLE, {"chunk": {"choices": [{"index": 0, "delta": fields}]}})


async def test_a_response_is_shown_no_further_once_it_goes_away_though_it_was_begun_anew(
    hub: Hub, redis: Redis
) -> None:
    log = Log()
    for _ in range(2):
        log.begin_anew()
        log.add(delta(content="secret"))
    async with viewing(response_viewer(hub, redis, log, ResponseViewer)) as taker:
        taker.reading.clear()
        await asyncio.sleep(0)  # It has come, and waits until its headers are taken.
        log.feed.end_as_gone(StreamGone("erased"))
        taker.reading.set()
        await taker.has(b"stream_gone")
    assert b"secret" not in taker.body


@pytest.mark.parametrize("together", [False, True])
async def test_a_plain_response_ends_as_interrupted_before_anything_of_a_new_attempt_is_told(
    hub: Hub, redis: Redis, together: bool
) -> None:
    log = Log()
    log.begin_anew()
    log.add(delta(role="assistant"))
    async with viewing(response_viewer(hub, redis, log, PlainViewer)) as taker:
        if not together:
            await taker.has(b"in_progress")
            await until(log.is_awaited)
        log.add(delta(content="fir"), *text("st"))
        if not together:
            await taker.has(b'"delta":"st"')
        log.begin_anew()
        log.add(delta(content="second"), ENDS)
        await taker.over.wait()
    assert taker.ended
    assert b"second" not in taker.body
    frames = [json.loads(frame.data) for frame in taker.frames]
    assert [frame["sequence_number"] for frame in frames] == list(range(len(frames)))
    item, last = frames[-2:]
    assert (item["type"], item["item"]["status"]) == ("response.output_item.done", "incomplete")
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["type"] == "interrupted"
    assert last["response"]["output"] == [item["item"]]


async def test_a_plain_response_that_is_begun_anew_before_anything_was_told_goes_on(
    hub: Hub, redis: Redis
) -> None:
    log = Log()
    log.begin_anew()
    log.add(delta(role="assistant"))
    async with viewing(response_viewer(hub, redis, log, PlainViewer)) as taker:
        await taker.has(b"in_progress")
        log.begin_anew()
        log.add(delta(content="second"), ENDS)
        await taker.over.wait()
    last = json.loads(taker.frames[-1].data)
    assert (taker.ended, last["type"]) == (True, "response.completed")
    assert last["response"]["output"][0]["content"][0]["text"] == "second"


async def test_a_plain_response_is_told_nothing_of_a_new_attempt_though_another_rides_on_to_it(
    hub: Hub, redis: Redis
) -> None:
    log = Log()
    log.begin_anew()
    log.add(delta(content="fir"))
    async with viewing(response_viewer(hub, redis, log, ResponseViewer)) as other:
        await other.has(b"fir")
        await until(log.is_awaited)
        async with viewing(response_viewer(hub, redis, log, PlainViewer)) as taker:
            await taker.has(b"fir")
            log.add(*text("st"))
            await taker.has(b'"delta":"st"')
            log.begin_anew()
            log.add(delta(content="second"))
            await other.has(b"second")
            await taker.over.wait()
    assert b"second" not in taker.body
    last = json.loads(taker.frames[-1].data)
    assert last["response"]["error"]["type"] == "interrupted"


# Of several streams.


def several_viewer(
    hub: Hub, logs: list[Log], cursor: Cursor | None = None, *, heartbeat_seconds: float = 60
) -> MultiViewer:
    lanes = [Lane(log.feed, cursor) for log in logs]
    return MultiViewer(hub, lanes, Pace(heartbeat_seconds, 60, 0))


async def test_a_slow_viewer_of_several_holds_one_bounded_write_and_may_go_after_it(
    hub: Hub,
) -> None:
    logs = [Log() for _ in range(20)]
    async with viewing(several_viewer(hub, logs)) as slow:
        await slow.has(b"id: " + b".".join([b"0-1"] * 20))
        slow.reading.clear()
        hub.draining = True
        for log in logs:
            log.add(STARTS, *text(*["x" * 1000] * 60))
        for _ in range(5):  # Its time to go comes while its write is not yet taken.
            await asyncio.sleep(0)
        before = len(slow.body)
        slow.reading.set()
        async with asyncio.timeout(5):
            await asyncio.wait(_others())
        assert not slow.ended
    assert len(slow.body) - before <= BYTES_AT_ONCE + 2000
    assert slow.body.count(b"retry: ") == 2


async def test_of_several_streams_none_holds_up_another(hub: Hub) -> None:
    much, little = Log(), Log()
    much.add(STARTS, *text(*["x" * 1000] * 1000))
    little.add(STARTS, *text("little"))
    async with viewing(several_viewer(hub, [much, little])) as taker:
        much.add(ENDS)
        little.add(ENDS)
        await taker.over.wait()
    assert taker.ended
    assert taker.body.index(b"little") < 2 * BYTES_AT_ONCE
    assert taker.body.count(b"event: chunk") == 1001


async def test_of_several_streams_too_a_cursor_above_the_top_waits_for_what_follows_it(
    hub: Hub,
) -> None:
    log = Log()
    log.add(STARTS)
    async with viewing(several_viewer(hub, [log], Cursor(1, 2))) as taker:
        await taker.has(b"retry")
        log.add(*text("one", "two", "three"), ENDS)
        await taker.over.wait()
    assert [frame.id for frame in taker.frames] == ["1-3", "1-4"]


# The text wire.


async def test_text_is_the_text_and_nothing_else(hub: Hub) -> None:
    log = Log()
    log.add(STARTS, *text("Hé", "llo"), ENDS)
    async with viewing(text_viewer(hub, log)) as taker:
        await taker.has("Héllo".encode())
        await asyncio.sleep(0)
    assert (taker.status, taker.body, taker.ended) == (200, "Héllo".encode(), True)
    assert taker.headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("ending", [FAILED, CANCELLED])
async def test_text_that_is_not_whole_does_not_end_cleanly(hub: Hub, ending: str) -> None:
    log = Log()
    log.add(STARTS, *text("par", "tial"), entry(ending, {"code": "x", "message": "y"}))
    async with viewing(text_viewer(hub, log)) as taker:
        await taker.has(b"partial")
    assert not taker.ended


async def test_text_of_two_attempts_is_never_mixed(hub: Hub) -> None:
    log = Log()
    log.add(STARTS, *text("first"))
    async with viewing(text_viewer(hub, log)) as taker:
        await taker.has(b"first")
        log.begin_anew()
        log.add(*text("second"), ENDS)
        await taker.over.wait()
    assert (taker.body, taker.ended) == (b"first", False)


@pytest.mark.parametrize("together", [False, True])
async def test_text_of_two_attempts_is_never_mixed_though_the_one_it_began_for_was_never_written(
    hub: Hub, together: bool
) -> None:
    log = Log()
    log.add(STARTS, *text("first"))
    async with viewing(text_viewer(hub, log)) as taker:
        taker.reading.clear()
        await asyncio.sleep(0)  # It has come, and waits until its headers are taken.
        log.begin_anew()
        taker.reading.set()
        for _ in range(5):  # It has all there is: nothing.
            await asyncio.sleep(0)
        log.add(*text("second"))
        if not together:
            await taker.has(b"second")
        log.begin_anew()
        log.add(*text("third"), ENDS)
        await taker.over.wait()
    assert (taker.body, taker.ended) == (b"second", False)


async def test_a_text_viewer_that_has_text_of_an_attempt_gets_none_of_another(hub: Hub) -> None:
    log = Log()
    log.add(STARTS, *text("old half"))
    log.begin_anew()
    log.add(*text("new whole"), ENDS)
    resumed = TextViewer(hub, log.feed, Cursor(1, 1), Pace(60, 60, 0))
    async with viewing(resumed) as taker, asyncio.timeout(1):
        await asyncio.wait(_others())
    assert (taker.body, taker.ended) == (b"", False)


async def test_a_new_attempt_before_the_first_text_goes_unnoticed(hub: Hub) -> None:
    log = Log()
    log.add(STARTS)
    async with viewing(text_viewer(hub, log)) as taker:
        log.begin_anew()
        log.add(*text("second"), ENDS)
        await taker.has(b"second")
        await asyncio.sleep(0)
    assert (taker.body, taker.ended) == (b"second", True)


async def test_before_its_first_text_a_viewer_looks_at_each_chunk_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at, frames = 0, Feed.frames

    def counted(feed: Feed, wire: Wire, start: int) -> list[bytes]:
        nonlocal looked_at
        piece = frames(feed, wire, start)
        looked_at += len(piece)
        return piece

    monkeypatch.setattr(Feed, "frames", counted)
    log = Log()
    log.add(STARTS)
    async with viewing(text_viewer(hub, log)) as taker:
        for _ in range(100):
            log.add(entry(WHOLE, {"chunk": {"choices": [{"delta": {"reasoning": "hm"}}]}}))
            await asyncio.sleep(0)
        log.begin_anew()
        await asyncio.sleep(0)
        assert looked_at <= 110
        log.add(*text("said"), ENDS)
        await taker.over.wait()
    assert (taker.body, taker.ended) == (b"said", True)


async def test_text_breaks_off_when_the_stream_goes_away(hub: Hub) -> None:
    log = Log()
    log.add(STARTS, *text("partial"))
    async with viewing(text_viewer(hub, log)) as taker:
        await taker.has(b"partial")
        log.feed.end_as_gone(StreamGone("erased"))
        async with asyncio.timeout(1):
            await asyncio.wait(_others())
    assert not taker.ended


@pytest.mark.parametrize("kind", [TextViewer, ChatCompletionViewer])
async def test_what_has_no_words_for_coming_back_breaks_off_without_any_when_the_process_drains(
    hub: Hub, kind: type[HeldViewer]
) -> None:
    log = Log()
    chunk = {"choices": [{"index": 0, "delta": {"content": "partial"}}]}
    log.add(entry(STARTED, {"envelope": {}}), entry(WHOLE, {"chunk": chunk}))
    watching = kind(hub, log.feed, None, Pace(60, 60, 0))
    async with viewing(watching) as taker:
        await taker.has(b"partial")
        said = taker.body
        hub.draining = True
        log.feed.wake()
        async with asyncio.timeout(1):
            await asyncio.wait(_others())
    assert (taker.body, taker.ended) == (said, False)


@pytest.mark.parametrize(
    ("kind", "value", "status", "code"),
    [
        (FAILED, FILTERED, 502, "content_filter"),
        (CANCELLED, {}, 409, "cancelled"),
    ],
)
async def test_what_ends_before_the_first_text_is_a_problem(
    hub: Hub, kind: str, value: dict[str, str], status: int, code: str
) -> None:
    log = Log()
    log.add(entry(kind, value))
    async with viewing(text_viewer(hub, log)) as taker:
        await taker.has(b"}")
    assert taker.status == status
    assert json.loads(taker.body)["code"] == code


async def test_a_stream_gone_or_a_process_draining_before_the_first_text_is_a_problem(
    hub: Hub,
) -> None:
    log = Log()
    log.feed.end_as_gone(StreamGone("erased"))
    async with viewing(text_viewer(hub, log)) as taker:
        await taker.has(b"stream_gone")
    assert taker.status == 410
    hub.draining = True
    async with viewing(text_viewer(hub, Log())) as taker:
        await taker.has(b"draining")
    assert taker.status == 503


async def test_one_that_waits_for_its_first_text_is_sent_away_by_a_drain(hub: Hub) -> None:
    log = Log()
    async with viewing(text_viewer(hub, log)) as taker:
        await asyncio.sleep(0)  # It has come, and waits for the first text.
        hub.draining = True
        log.feed.wake()
        await taker.has(b"draining")
    assert taker.status == 503


@pytest.mark.parametrize(
    ("ending", "status", "body"),
    [
        (entry(FAILED, FILTERED), 502, b"content_filter"),
        (ENDS, 200, b""),
    ],
)
async def test_an_answer_that_ends_while_its_process_drains_is_told_as_it_is(
    hub: Hub, ending: Entry, status: int, body: bytes
) -> None:
    log = Log()
    async with viewing(text_viewer(hub, log, drain_seconds=3600)) as taker:
        await asyncio.sleep(0)  # It has come, and waits for the first text.
        hub.draining = True
        log.feed.wake()
        await asyncio.sleep(0)
        log.add(ending)
        async with asyncio.timeout(5):
            await asyncio.wait(_others())
    assert (taker.status, taker.ended) == (status, True)
    assert body in taker.body


async def test_an_empty_answer_is_an_empty_text(hub: Hub) -> None:
    log = Log()
    log.add(STARTS, ENDS)
    async with viewing(text_viewer(hub, log)) as taker:
        async with asyncio.timeout(1):
            await asyncio.wait(_others())
    assert (taker.status, taker.body, taker.ended) == (200, b"", True)
