"""The feed, with no loop of its own and no Redis."""

import asyncio
import socket
from collections.abc import Callable

import pytest
import uvloop
from uvicorn.protocols.http.flow_control import FlowControl

from api.feed import BYTES_AT_ONCE, FRAMES_AT_ONCE, Encode, Feed
from api.line import Line
from relay.errors import StreamGone
from relay.events import COMPLETED, FAILED, QUEUED, STARTED, TEXT, Cursor, Event
from tests.asgi import Taker


def event(cursor: str, kind: str = TEXT, data: bytes = b'"x"') -> Event:
    return Event(Cursor.parse(cursor), kind, data)


QUEUE = event("0-1", QUEUED, b"{}")
FIRST = event("1-0", STARTED, b"{}")
SECOND = event("2-0", STARTED, b"{}")
CHUNKS = frozenset({TEXT})


def feed_of(*events: Event) -> Feed:
    feed = Feed("id")
    assert feed.add(list(events), read=True)
    return feed


def plain() -> Encode:
    return lambda event: event.data


def ids(feed: Feed) -> list[str]:
    return [str(event.cursor) for event in feed.events]


def test_what_stands_is_passed_over() -> None:
    feed = feed_of(QUEUE, FIRST, event("1-1"))
    assert feed.add([FIRST, event("1-1"), event("1-2")])
    assert ids(feed) == ["0-1", "1-0", "1-1", "1-2"]


@pytest.mark.parametrize("missing", ["1-3", "2-1", "3-7"])
def test_nothing_is_taken_from_a_gap_on(missing: str) -> None:
    feed = feed_of(QUEUE, FIRST, event("1-1"))
    assert not feed.add([event(missing), event("1-2")])
    assert ids(feed)[-1] == "1-1"


def test_an_end_that_no_worker_wrote_waits_for_what_may_stand_before_it() -> None:
    """It stands in an attempt of its own, so its id does not show whether anything is missing."""
    feed = feed_of(QUEUE, FIRST, event("1-1"))
    end = event("2-0", FAILED, b"{}")
    assert not feed.add([end])
    assert feed.add([event("1-2"), end], read=True)
    assert ids(feed) == ["0-1", "1-0", "1-1", "1-2", "2-0"]


def test_a_log_begins_with_its_first_entry() -> None:
    assert not Feed("id").add([event("1-1")])


def test_nothing_follows_a_terminal_event() -> None:
    feed = feed_of(QUEUE, FIRST, event("1-1", COMPLETED, b"{}"))
    feed.add([event("1-2"), SECOND])
    assert feed.ended
    assert ids(feed)[-1] == "1-1"


@pytest.mark.parametrize(
    ("cursor", "next_id"),
    [
        (None, "2-0"),
        ("0-1", "2-0"),
        ("1-0", "2-0"),
        ("1-1", "2-0"),
        ("1-9", "2-0"),
        ("2-0", "2-1"),
        ("2-1", "2-2"),
        # None of these was ever handed out by this log.
        ("2-9", "2-0"),
        ("7-0", "2-0"),
    ],
)
def test_a_viewer_goes_on_strictly_after_its_cursor_or_at_the_newest_start(
    cursor: str | None, next_id: str
) -> None:
    feed = feed_of(QUEUE, FIRST, event("1-1"), SECOND, event("2-1"), event("2-2", COMPLETED))
    index = feed.position(Cursor.parse(cursor) if cursor else None)
    assert ids(feed)[index] == next_id


def test_a_failure_without_a_start_of_its_own_goes_on_where_the_viewer_is() -> None:
    feed = feed_of(QUEUE, FIRST, event("1-1"), event("2-0", COMPLETED, b"{}"))
    assert ids(feed)[feed.position(Cursor(1, 1))] == "2-0"


def test_a_viewer_that_was_told_of_the_queue_is_not_told_again() -> None:
    feed = feed_of(QUEUE)
    assert feed.position(Cursor(0, 1)) == 1
    assert feed.position(None) == 0


def test_it_is_known_how_the_log_goes_on_up_to_its_top_and_when_it_has_ended() -> None:
    feed = feed_of(QUEUE, FIRST)
    assert feed.reaches(Cursor(1, 0))
    assert not feed.reaches(Cursor(1, 1))
    feed.add([event("1-1", COMPLETED, b"{}")])
    assert feed.reaches(Cursor(9, 9))


def test_each_event_is_encoded_once_per_wire() -> None:
    encoded: list[Event] = []

    def encode(event: Event) -> bytes:
        encoded.append(event)
        return event.data

    def wire() -> Encode:
        return encode

    feed = feed_of(QUEUE, FIRST, event("1-1"))
    for _ in range(3):
        feed.frames(wire, 0)
    feed.add([event("1-2")])
    assert feed.frames(wire, 3) == [b'"x"']
    assert len(encoded) == 4


async def a_turn() -> None:
    """Of the loop: who was started waits now, and what had come together is written. No event tells
    of either."""
    await asyncio.sleep(0)


class Written(Line):
    """A line that keeps what is written to it."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    def write(self, chunk: bytes) -> bool:
        self.chunks.append(chunk)
        return True


class Lost(asyncio.Protocol):
    """Says when its connection is gone."""

    def __init__(self) -> None:
        self.over = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set()


async def test_an_encoder_that_fails_takes_nothing_from_the_riders_of_other_wires() -> None:
    def broken() -> Encode:
        return lambda event: 1 // (len(event.data) - 3) * b""

    feed, over = feed_of(QUEUE, FIRST), asyncio.get_running_loop().create_future()
    line = Written()
    let_off = asyncio.create_task(feed.ride(broken, Written(), b"", 60, CHUNKS, unless=over))
    rides_on = asyncio.create_task(feed.ride(plain, line, b"", 60, CHUNKS, unless=over))
    await a_turn()
    feed.add([event("1-1")])
    await asyncio.wait([let_off], timeout=2)
    assert let_off.result() == 2, "it has not seen the chunk"
    feed.add([event("1-2")])
    await a_turn()
    over.set_result(None)
    assert await rides_on == 4
    assert line.chunks == [b'3\r\n"x"\r\n'] * 2


async def test_each_wire_rides_on_for_the_kinds_of_events_that_it_takes_as_they_are() -> None:
    def other() -> Encode:
        return lambda event: event.data

    feed, over = feed_of(QUEUE, FIRST), asyncio.get_running_loop().create_future()
    line, kinds = Written(), CHUNKS | {STARTED}
    let_off = asyncio.create_task(feed.ride(other, Written(), b"", 60, CHUNKS, unless=over))
    rides_on = asyncio.create_task(feed.ride(plain, line, b"", 60, kinds, unless=over))
    await a_turn()
    feed.add([SECOND, event("2-1")])
    await asyncio.wait([let_off], timeout=2)
    assert let_off.result() == 2, "it has not seen the new attempt"
    assert line.chunks == [b'5\r\n{}"x"\r\n']
    feed.add([event("2-2", COMPLETED, b"{}")])
    assert await rides_on == 4, "nobody rides on to the end"


@pytest.mark.parametrize(("count", "size"), [(FRAMES_AT_ONCE + 1, 3), (2, BYTES_AT_ONCE)])
async def test_what_is_more_than_one_write_riders_take_themselves_and_lack_nothing(
    count: int, size: int
) -> None:
    feed, over = feed_of(QUEUE, FIRST), asyncio.get_running_loop().create_future()
    line = Written()
    let_off = asyncio.create_task(feed.ride(plain, line, b"", 60, CHUNKS, unless=over))
    await a_turn()
    feed.add([event(f"1-{n}", data=b"x" * size) for n in range(1, count + 1)])
    await asyncio.wait([let_off], timeout=2)
    assert let_off.result() == 2, "it has seen none of them"
    assert line.chunks == []


async def test_riders_are_never_written_an_empty_piece_which_would_end_their_response() -> None:
    def silent() -> Encode:
        return lambda event: b""

    feed, over = feed_of(QUEUE, FIRST), asyncio.get_running_loop().create_future()
    line = Written()
    riding = asyncio.create_task(feed.ride(silent, line, b"", 0, CHUNKS, unless=over))
    await a_turn()
    feed.add([event("1-1")])
    await a_turn()
    over.set_result(None)
    assert await riding == 3
    assert line.chunks == []


async def test_riders_stay_on_for_as_long_as_they_take_what_is_written_to_them() -> None:
    feed, over, peer = feed_of(QUEUE, FIRST), asyncio.get_running_loop().create_future(), Taker()
    riding = asyncio.create_task(feed.ride(plain, peer.line, b"", 60, CHUNKS, unless=over))
    await a_turn()
    feed.add([event("1-1")])
    await a_turn()
    assert not riding.done()
    peer.reading.clear()
    feed.add([event("1-2")])
    async with asyncio.timeout(2):
        assert await riding == 4


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_connection_that_is_gone_takes_nothing_from_other_riders(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    line = Written()

    async def ride_beside_it(ours: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        feed, over, lost = feed_of(QUEUE, FIRST), loop.create_future(), Lost()
        transport, _ = await loop.create_connection(lambda: lost, sock=ours)
        transport.abort()
        await lost.over.wait()
        gone = Line(transport, FlowControl(transport))
        riding = [
            asyncio.create_task(feed.ride(plain, each, b"", 60, CHUNKS, unless=over))
            for each in (gone, line)
        ]
        await a_turn()
        feed.add([event("1-1")])
        await a_turn()
        over.set_result(None)
        await asyncio.gather(*riding)

    ours, theirs = socket.socketpair()
    with theirs, asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(ride_beside_it(ours))
    assert line.chunks == [b'3\r\n"x"\r\n']


async def test_who_gets_on_is_not_written_what_it_has_and_others_still_lack() -> None:
    feed, over = feed_of(QUEUE, FIRST), asyncio.get_running_loop().create_future()
    early, late = Written(), Written()
    riding = [asyncio.create_task(feed.ride(plain, early, b"", 60, CHUNKS, unless=over))]
    await a_turn()
    riding.append(asyncio.create_task(feed.ride(plain, late, b"", 60, CHUNKS, unless=over)))
    feed.add([event("1-1", data=b'"a"')])
    await a_turn()
    feed.add([event("1-2", data=b'"b"')])
    await a_turn()
    over.set_result(None)
    assert await asyncio.gather(*riding) == [4, 4]
    assert early.chunks == [b'3\r\n"a"\r\n', b'3\r\n"b"\r\n']
    assert late.chunks == [b'3\r\n"b"\r\n']


async def test_who_gets_on_after_all_have_got_off_hears_heartbeats_as_they_did() -> None:
    feed = feed_of(QUEUE, FIRST)
    for _ in range(2):
        line, over = Written(), asyncio.get_running_loop().create_future()
        riding = asyncio.create_task(feed.ride(plain, line, b":", 0, CHUNKS, unless=over))
        await a_turn()
        over.set_result(None)
        assert await riding == 2
        assert b"1\r\n:\r\n" in line.chunks
        await a_turn()  # In which the next heartbeat would have been due.


def test_what_a_feed_holds_is_counted_by_its_events_and_once_more_by_their_frames() -> None:
    small, large = (feed_of(QUEUE, FIRST, event("1-1", data=b"x" * n)) for n in (0, 1000))
    assert large.bytes - small.bytes == 1000
    for feed in (small, large):
        feed.frames(plain, 0)
        feed.frames(plain, 1)
    assert large.bytes - small.bytes == 2000


def test_a_viewer_takes_a_bounded_number_of_frames_at_once() -> None:
    feed = feed_of(QUEUE, FIRST, *(event(f"1-{n}") for n in range(1, 3 * FRAMES_AT_ONCE)))
    assert len(feed.frames(plain, 0)) == FRAMES_AT_ONCE


def test_a_viewer_takes_a_bounded_number_of_bytes_at_once_and_always_one_frame() -> None:
    sizes = [BYTES_AT_ONCE // 2, BYTES_AT_ONCE // 2, 1, 3 * BYTES_AT_ONCE, BYTES_AT_ONCE, 1]
    texts = [event(f"1-{n}", data=b"x" * size) for n, size in enumerate(sizes, 1)]
    feed = feed_of(QUEUE, FIRST, *texts)
    index, writes = 2, []
    while frames := feed.frames(plain, index):
        writes.append([len(frame) for frame in frames])
        index += len(frames)
    assert writes == [sizes[:2], sizes[2:3], sizes[3:4], sizes[4:5], sizes[5:]]


async def test_a_notice_is_news() -> None:
    feed = feed_of(QUEUE)
    left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(feed.changed(60, unless=left))
    await a_turn()
    feed.notice(b"Redis is away")
    assert await waiting
    assert feed.notices == [b"Redis is away"]


async def test_waiting_ends_by_news_by_time_and_by_leaving() -> None:
    feed = feed_of(QUEUE)
    left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    assert not await feed.changed(0.01, unless=left)
    waiting = asyncio.create_task(feed.changed(60, unless=left))
    await a_turn()
    feed.add([FIRST])
    assert await waiting
    waiting = asyncio.create_task(feed.changed(60, unless=left))
    await a_turn()
    feed.end_as_gone(StreamGone("gone"))
    assert await waiting
    waiting = asyncio.create_task(feed.changed(60, unless=left))
    await a_turn()
    left.set_result(None)
    assert await waiting
    assert await feed.changed(60, unless=left)
    assert not feed._waiters
