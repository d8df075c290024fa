"""The hub against a real Redis."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from api import hub as hub_module
from api.feed import FRAMES_AT_ONCE, Feed
from api.hub import NO_WORKER, Hub
from api.wires import native
from cli.redis_server import RedisServer
from relay import keys
from relay.claim import Claim
from relay.connection import connect
from relay.errors import StreamGone
from relay.events import COMPLETED, STARTED, TEXT, Cursor, Entry, Event, entry
from relay.ids import new_stream_id
from relay.log import Created, Log
from tests import asgi
from tests.asgi import Taker, entered, watching
from tests.conftest import append, make_claims, make_log, until


@asynccontextmanager
async def running_hub(redis: Redis, cache_bytes: int = 2**20) -> AsyncIterator[Hub]:
    hub = Hub(redis, make_log(redis), cache_bytes=cache_bytes, retention_seconds=60)
    running = asyncio.create_task(hub.run())

    async def connected() -> bool:
        return hub.connected

    await until(connected)
    try:
        yield hub
    finally:
        running.cancel()
        await asyncio.wait([running])


@pytest.fixture
async def hub(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    """Without its patrol, which in the end would find whatever a test is about."""
    monkeypatch.setattr(hub_module, "PATROL_SECONDS", 3600)
    async with running_hub(redis) as hub:
        yield hub


@pytest.fixture
async def patrolled_hub(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    """Whose patrol comes round all the time."""
    monkeypatch.setattr(hub_module, "PATROL_SECONDS", 0.05)
    async with running_hub(redis) as hub:
        yield hub


class Writer:
    """What a worker does to a log, one step at a time."""

    def __init__(self, redis: Redis) -> None:
        self._log = make_log(redis)
        self._claims = make_claims(redis)
        self._claim: Claim | None = None
        self._next = 0
        self.stream_id = ""

    async def create(self, stream_id: str = "") -> Created:
        created = await self._log.create({"messages": []}, stream_id=stream_id)
        self.stream_id = created.stream_id
        return created

    async def begin(self) -> None:
        """A new attempt: hand over what is held, claim anew and say `started`."""
        if self._claim is not None:
            await self._claims.hand_over(self._claim)
        [self._claim] = await self._claims.claim(1)
        self._next = 0
        await self.append(entry(STARTED, {"attempt": self._claim.attempt, "model": "m"}))

    def cursors(self, *seqs: int) -> list[str]:
        """Of the newest attempt."""
        assert self._claim is not None
        return [str(Cursor(self._claim.attempt, seq)) for seq in seqs]

    async def say(self, *texts: str) -> None:
        await self.append(*(entry(TEXT, text) for text in texts))

    async def finish(self) -> None:
        await self.append(entry(COMPLETED, {"finish_reason": "stop"}))

    async def append(self, *entries: Entry) -> None:
        assert self._claim is not None
        self._next = (await append(self._log, self._claim, self._next, entries)).next_seq


async def until_begun(feed: Feed) -> None:
    """Until it is heard here that its writer has begun."""

    async def has_begun() -> bool:
        return feed.begun

    await until(has_begun)


@pytest.fixture
async def writer(redis: Redis) -> Writer:
    writer = Writer(redis)
    await writer.create()
    return writer


def counting(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    """How often methods of Log are called."""
    calls = dict.fromkeys(names, 0)

    def counted(name: str, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return await method(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(Log, name, counted(name, getattr(Log, name)))
    return calls


# Promise 1: order and completeness.

Step = st.one_of(
    st.tuples(st.just("say"), st.integers(1, 5)),
    st.tuples(st.just("join"), st.just(0)),
    st.tuples(st.just("leave"), st.integers(0, 5)),
    st.tuples(st.just("resume"), st.integers(0, 5)),
    st.tuples(st.just("stop taking"), st.integers(0, 5)),
    st.tuples(st.just("take"), st.integers(0, 5)),
    st.tuples(st.just("cut"), st.just(0)),
    st.tuples(st.just("begin"), st.just(0)),
    st.tuples(st.just("yield"), st.integers(1, 20)),
)


class Person:
    """A viewer over all its connections, which keeps the one rule."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.text = ""
        self._connection = AsyncExitStack()
        self._taker: Taker | None = None

    @property
    def watching(self) -> bool:
        return self._taker is not None

    async def connect(self, hub: Hub, stream_id: str) -> None:
        after = self.ids[-1] if self.ids else ""
        self._taker = await self._connection.enter_async_context(watching(hub, stream_id, after))

    async def do(self, verb: str, hub: Hub, stream_id: str) -> None:
        if self._taker is None:
            if verb == "resume":
                await self.connect(hub, stream_id)
        elif verb == "stop taking":
            self._taker.reading.clear()
        elif verb == "take":
            self._taker.reading.set()

    async def see_the_end(self) -> None:
        assert self._taker is not None
        self._taker.reading.set()
        await self._taker.has(b"event: completed")
        await self.disconnect()

    async def disconnect(self) -> None:
        if self._taker is None:
            return
        await self._connection.aclose()
        for frame in self._taker.frames:
            self.ids.append(frame.id)
            if frame.event == "started":
                self.text = ""
            elif frame.event == "chunk":
                self.text += json.loads(frame.data)["text"]
        self._taker = None


@pytest.mark.parametrize("server", ["any server", "our server"])
@given(steps=st.lists(Step, max_size=30))
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_interleaving_gives_every_viewer_exactly_the_log(
    redis_server: RedisServer, server: str, steps: list[tuple[str, int]]
) -> None:
    with patch.object(asgi, "LINED", server == "our server"):
        asyncio.run(_interleave(redis_server.url, steps))


async def _interleave(url: str, steps: list[tuple[str, int]]) -> None:
    async with connect(url) as redis:
        await redis.flushall()
        writer, said, people = Writer(redis), 0, [Person()]
        stream_id = (await writer.create()).stream_id
        async with running_hub(redis) as hub:
            await people[0].connect(hub, stream_id)
            await writer.begin()
            for verb, number in steps:
                person = people[number % len(people)]
                if verb == "say":
                    await writer.say(*(f"{said + n} " for n in range(number)))
                    said += number
                elif verb == "join":
                    people.append(Person())
                    await people[-1].connect(hub, stream_id)
                elif verb == "leave":
                    await person.disconnect()
                elif verb in {"resume", "stop taking", "take"}:
                    await person.do(verb, hub, stream_id)
                elif verb == "cut":
                    await redis.client_kill_filter(_type="pubsub")
                elif verb == "begin":
                    await writer.begin()
                elif verb == "yield":
                    for _ in range(number):
                        await asyncio.sleep(0)
            await writer.finish()
            await writer_seen_by_all(hub, stream_id, people)
        log = await make_log(redis).read(stream_id)
    check(log, people)


async def writer_seen_by_all(hub: Hub, stream_id: str, people: list[Person]) -> None:
    for person in people:
        if not person.watching:
            await person.connect(hub, stream_id)
        await person.see_the_end()


def check(log: list[Any], people: list[Person]) -> None:
    newest = max(i for i, event in enumerate(log) if event.kind == STARTED)
    text = "".join(event.value() for event in log[newest:] if event.kind == TEXT)
    following = {str(a.cursor): str(b.cursor) for a, b in pairwise(log)}
    starts = [str(event.cursor) for event in log if event.kind == STARTED]
    for person in people:
        assert person.text == text
        assert len(set(person.ids)) == len(person.ids), "an event came twice"
        for before, after in pairwise(person.ids):
            # Strictly the next event; or, back on a log that began anew, the start it leads to.
            assert after == following[before] or after in starts


# Streams that are watched from their birth.


async def test_what_is_expected_is_whole_and_nothing_of_it_is_read(
    hub: Hub, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counting(monkeypatch, "read")
    feed = hub.expect(new_stream_id())
    writer = Writer(redis)
    created = await writer.create(feed.stream_id)
    await writer.begin()
    await writer.say("early")
    hub.born(feed, heard=created.heard)
    await writer.finish()
    async with watching(hub, feed.stream_id) as taker:
        await taker.has(b"completed")
    assert [frame.id for frame in taker.frames] == writer.cursors(0, 1, 2)
    assert feed.events == await make_log(redis).read(feed.stream_id)
    assert calls["read"] == 1, "that was ours"
    hub.leave(feed)
    assert hub.viewers() == {}


@pytest.mark.parametrize("cut", ["before its birth", "after it", "and stands again after it"])
async def test_what_is_expected_is_whole_though_the_connection_breaks(
    hub: Hub, redis: Redis, cut: str
) -> None:
    feed = hub.expect(new_stream_id())
    writer = Writer(redis)

    async def stands_again() -> bool:
        channel = keys.channel(feed.stream_id)
        return bool(await redis.pubsub_numsub(channel) == [(channel.encode(), 1)])

    if cut == "before its birth":
        await redis.client_kill_filter(_type="pubsub")
    created = await writer.create(feed.stream_id)
    await writer.begin()
    await redis.client_kill_filter(_type="pubsub")
    await writer.say("unheard")
    if cut == "and stands again after it":
        await until(stands_again)
    hub.born(feed, heard=created.heard)
    async with watching(hub, feed.stream_id) as taker:
        await taker.has(b"unheard")
        await writer.finish()
        await taker.has(b"completed")
    assert feed.events == await make_log(redis).read(feed.stream_id)
    hub.leave(feed)


@pytest.mark.parametrize("stands_at_once", [False, True])
async def test_what_was_born_before_its_channel_stood_is_read(
    hub: Hub, redis: Redis, stands_at_once: bool
) -> None:
    writer = Writer(redis)
    stream_id = new_stream_id()
    created = await writer.create(stream_id)
    await writer.begin()
    await writer.say("unheard")
    feed = hub.expect(stream_id)
    if stands_at_once:
        # Whoever enters waits for a channel, and the one that was asked for before stands by then.
        async with entered(hub, (await Writer(redis).create()).stream_id):
            pass
    hub.born(feed, heard=created.heard)
    async with watching(hub, stream_id) as taker:
        await taker.has(b"unheard")
        await writer.finish()
        await taker.has(b"completed")
    hub.leave(feed)


async def test_nobody_looks_for_a_stream_that_is_not_born_yet(hub: Hub, redis: Redis) -> None:
    feed = hub.expect(new_stream_id())
    await hub._catch_up(feed)
    assert feed.gone is None
    hub.leave(feed)

    async def let_go() -> bool:
        channel = keys.channel(feed.stream_id)
        return bool(await redis.pubsub_numsub(channel) == [(channel.encode(), 0)])

    await until(let_go)
    assert not hub._unborn


# Lost connections and gaps.


async def test_what_is_published_while_the_connection_is_down_is_read_from_the_log(
    hub: Hub, writer: Writer, redis: Redis
) -> None:
    await writer.begin()
    async with watching(hub, writer.stream_id) as taker:
        await taker.has(b"started")
        await redis.client_kill_filter(_type="pubsub")
        await writer.say("missed")
        await taker.has(b"missed")


async def test_a_gap_in_what_is_published_is_cured_from_the_log_at_once(
    hub: Hub, writer: Writer, redis: Redis
) -> None:
    await writer.begin()
    async with watching(hub, writer.stream_id) as taker:
        await writer.say("heard")
        await taker.has(b"heard")

        async def has_caught_up() -> bool:
            return not hub._reading

        await until(has_caught_up)
        await leave_a_gap(redis, writer, 2)
        await taker.has(b"heard after 2")
    assert [frame.id for frame in taker.frames] == writer.cursors(0, 1, 2, 3)


async def leave_a_gap(redis: Redis, writer: Writer, seq: int) -> None:
    """Write two entries, of which the second alone is heard."""
    unheard, heard = writer.cursors(seq, seq + 1)
    await redis.xadd(keys.log(writer.stream_id), {"t": '"unheard"'}, id=unheard)
    await redis.xadd(keys.log(writer.stream_id), {"t": f'"heard after {seq}"'}, id=heard)
    await redis.publish(keys.channel(writer.stream_id), f'{heard}\nt "heard after {seq}"')


async def turned_away(feed: Feed) -> None:
    """Return when it was to be caught up with, which came to nothing: its log is being read."""

    async def is_stale() -> bool:
        return feed.stale

    await until(is_stale)
    await asyncio.sleep(0)  # No event tells that the task has run; in a turn of the loop it has.


async def test_a_gap_that_is_heard_while_the_log_is_read_does_not_wait_for_the_patrol(
    hub: Hub, writer: Writer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Log.read

    async def outrun(log: Log, stream_id: str, after: Cursor | None = None) -> Any:
        monkeypatch.setattr(Log, "read", read)
        events = await read(log, stream_id, after)
        await leave_a_gap(redis, writer, 3)
        await turned_away(hub._feeds[stream_id])
        return events

    await writer.begin()
    async with watching(hub, writer.stream_id) as taker:
        await taker.has(b"started")

        async def has_caught_up() -> bool:
            return not hub._reading

        await until(has_caught_up)
        monkeypatch.setattr(Log, "read", outrun)
        await leave_a_gap(redis, writer, 1)
        await taker.has(b"heard after 3")
    assert [frame.id for frame in taker.frames] == writer.cursors(0, 1, 2, 3, 4)


@pytest.mark.parametrize("trouble", ["takes long", "fails"])
async def test_a_new_attempt_that_is_heard_before_the_log_is_read_hides_nothing_that_was_missed(
    hub: Hub, writer: Writer, redis: Redis, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """Else the frames of a wire that numbers them would have other numbers than elsewhere."""
    read, asked, go_on = Log.read, asyncio.Event(), asyncio.Event()

    async def troubled(log: Log, *which: Any) -> Any:
        asked.set()
        if trouble == "fails":
            raise RedisConnectionError
        await go_on.wait()
        return await read(log, *which)

    await writer.begin()
    async with entered(hub, writer.stream_id) as feed:
        before = feed.top
        monkeypatch.setattr(Log, "read", troubled)
        await redis.client_kill_filter(_type="pubsub")
        await writer.say("missed")
        await asked.wait()
        monkeypatch.setattr(Log, "read", read)
        await writer.begin()

        async def is_heard() -> bool:
            return feed.stale or feed.top != before

        await until(is_heard)
        go_on.set()
        log = await make_log(redis).read(writer.stream_id)

        async def is_whole() -> bool:
            return feed.top == log[-1].cursor

        await until(is_whole)
        assert feed.events == log


async def test_what_begins_during_the_first_read_does_not_hide_what_was_before(
    hub: Hub, writer: Writer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Log.read

    async def outrun(log: Log, *which: Any) -> Any:
        monkeypatch.setattr(Log, "read", read)
        events = await read(log, *which)
        await writer.begin()
        feed = hub._feeds[writer.stream_id]

        async def is_heard() -> bool:
            return feed.stale or bool(feed.events)

        await until(is_heard)
        return events

    monkeypatch.setattr(Log, "read", outrun)
    async with entered(hub, writer.stream_id) as feed:
        await until_begun(feed)
        assert feed.events == await make_log(redis).read(writer.stream_id)


async def test_what_is_heard_during_the_first_read_does_not_wait_for_the_patrol(
    hub: Hub, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await writer.begin()
    read = Log.read

    async def outrun(log: Log, stream_id: str, after: Cursor | None = None) -> Any:
        monkeypatch.setattr(Log, "read", read)
        events = await read(log, stream_id, after)
        await writer.say("meanwhile")
        await turned_away(hub._feeds[writer.stream_id])
        return events

    monkeypatch.setattr(Log, "read", outrun)
    await _sees(hub, writer.stream_id, b"meanwhile")


async def test_a_lost_last_publication_is_found_by_the_patrol(
    patrolled_hub: Hub, writer: Writer, redis: Redis
) -> None:
    await writer.begin()
    async with watching(patrolled_hub, writer.stream_id) as taker:
        await taker.has(b"started")
        [last] = writer.cursors(1)
        await redis.xadd(keys.log(writer.stream_id), {"completed": "{}"}, id=last)
        await taker.has(b"completed")


async def test_an_answer_that_has_expired_does_not_stay_in_memory_until_somebody_asks_for_it(
    patrolled_hub: Hub, writer: Writer, redis: Redis
) -> None:
    await writer.begin()
    await writer.finish()
    await redis.pexpire(keys.log(writer.stream_id), 300)
    async with entered(patrolled_hub, writer.stream_id):
        assert patrolled_hub._finished._kept

    async def is_gone() -> bool:
        return not patrolled_hub._finished._kept

    await until(is_gone)


async def test_the_patrol_asks_a_redis_that_is_away_for_nothing(
    writer: Writer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "PATROL_SECONDS", 0)
    reads = counting(monkeypatch, "read")

    async def some_rounds() -> int:
        for _ in range(20):
            await redis.ping()
        return reads["read"]

    async with running_hub(redis) as hub, entered(hub, writer.stream_id):
        assert await some_rounds() < await some_rounds()
        hub._listener.away = True
        assert await some_rounds() == await some_rounds()


async def test_that_no_log_can_be_read_is_said_of_all_and_not_of_each(
    hub: Hub, writer: Writer, monkeypatch: pytest.MonkeyPatch, said: list[Any]
) -> None:
    async def fail(*_: Any) -> None:
        raise RedisConnectionError

    async with entered(hub, writer.stream_id) as feed:
        monkeypatch.setattr(Log, "read", fail)
        await hub._catch_up(feed)
    [told] = [each for each in said if each["event"] == "log_unreadable"]
    assert "stream" not in told, "else it would be written for each, however many there are"


async def test_a_log_that_redis_lost_is_told_in_band(
    hub: Hub, writer: Writer, redis: Redis
) -> None:
    await writer.begin()
    async with watching(hub, writer.stream_id) as taker:
        await taker.has(b"started")
        await redis.flushall()
        await redis.client_kill_filter(_type="pubsub")
        await taker.has(b'"code":"stream_gone"')
    assert taker.frames[-1].event == "failed"
    assert taker.frames[-1].id == ""
    with pytest.raises(StreamGone):  # Whoever comes late is told by the status.
        await hub.enter(writer.stream_id)


# Fan-out.


async def test_a_thousand_viewers_cost_redis_no_more_than_one(
    hub: Hub, writer: Writer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await writer.begin()
    calls = counting(monkeypatch, "read")
    async with AsyncExitStack() as stack:
        takers = [
            await stack.enter_async_context(watching(hub, writer.stream_id)) for _ in range(1000)
        ]
        await writer.say("hello")
        await writer.finish()
        for taker in takers:
            await taker.has(b"completed")
        [(_, subscribers)] = await redis.pubsub_numsub(keys.channel(writer.stream_id))
        assert subscribers <= 1
    # The first read, and one more when the subscription stood.
    assert calls["read"] <= 2
    said = {taker.body.partition(b"\n\n")[2] for taker in takers}  # Each its own `retry:` before.
    assert len(said) == 1


async def test_frames_are_encoded_once_for_all_viewers(
    hub: Hub, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Cursor] = []
    encode = native.encode

    def noted(event: Event) -> bytes:
        encoded.append(event.cursor)
        return encode(event)

    monkeypatch.setattr(native, "encode", noted)
    await writer.begin()
    async with (
        entered(hub, writer.stream_id) as feed,
        watching(hub, writer.stream_id) as one,
        watching(hub, writer.stream_id) as two,
    ):
        await writer.say("a", "b")
        await writer.finish()
        await one.has(b"completed")
        await two.has(b"completed")
        assert encoded == [event.cursor for event in feed.events]


async def test_finished_streams_are_read_once_for_all_who_come_late(
    hub: Hub, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await writer.begin()
    await writer.finish()
    calls = counting(monkeypatch, "read")
    for _ in range(50):
        async with watching(hub, writer.stream_id) as taker:
            await taker.has(b"completed")
    assert calls["read"] == 1


async def test_a_stream_that_nobody_watches_any_more_is_let_go(
    hub: Hub, writer: Writer, redis: Redis
) -> None:
    await writer.begin()
    channel = keys.channel(writer.stream_id)
    async with watching(hub, writer.stream_id) as taker:
        await taker.has(b"started")

    async def let_go() -> bool:
        return bool(await redis.pubsub_numsub(channel) == [(channel.encode(), 0)])

    await until(let_go)
    assert hub.viewers() == {}


async def test_a_viewer_that_leaves_during_the_first_read_disturbs_no_other(
    hub: Hub, writer: Writer
) -> None:
    await writer.begin()

    async def join() -> None:
        async with entered(hub, writer.stream_id):
            pass

    hasty = asyncio.create_task(join())
    await asyncio.sleep(0)
    other = asyncio.create_task(_sees(hub, writer.stream_id, b"started"))
    hasty.cancel()
    await asyncio.wait([other])
    assert not other.cancelled()
    other.result()


async def test_a_viewer_that_leaves_during_the_first_read_leaves_nothing_behind(
    hub: Hub, writer: Writer
) -> None:
    hasty = asyncio.create_task(hub.enter(writer.stream_id))
    await asyncio.sleep(0)  # The read is about to begin.
    hasty.cancel()
    await _nothing_runs(hub)
    assert hub._feeds == {}
    assert hub._listener._channels == {keys.CONTROL}


async def test_whoever_comes_in_the_moment_in_which_a_first_read_fails_reads_and_hears_alone(
    hub: Hub, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, late = Log.read, []

    async def fail(log: Log, stream_id: str, after: Cursor | None = None) -> Any:
        monkeypatch.setattr(Log, "read", read)
        late.append(asyncio.create_task(hub.enter(stream_id)))
        raise RedisConnectionError

    monkeypatch.setattr(Log, "read", fail)
    with pytest.raises(RedisConnectionError):
        await hub.enter(writer.stream_id)
    feed = await late[0]
    assert [event.kind for event in feed.events] == ["queued"]
    await writer.begin()
    await until_begun(feed)
    hub.leave(feed)


async def entering_unheard(
    hub: Hub, stream_id: str, monkeypatch: pytest.MonkeyPatch
) -> asyncio.Task[Feed]:
    """One who enters and waits: as if Redis took its time, nobody hears that the channel stands."""

    async def waits() -> bool:
        return bool(hub._subscribing)

    with monkeypatch.context() as patched:
        patched.setattr(hub._listener, "add", lambda channel: None)
        entering = asyncio.create_task(hub.enter(stream_id))
        await until(waits)
    return entering


async def test_nobody_waits_for_a_channel_whose_connection_is_lost(
    hub: Hub, writer: Writer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    entering = await entering_unheard(hub, writer.stream_id, monkeypatch)
    await redis.client_kill_filter(_type="pubsub")
    async with asyncio.timeout(2):
        hub.leave(await entering)


async def test_whoever_waited_for_a_channel_when_its_connection_was_lost_misses_nothing_later(
    hub: Hub, writer: Writer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    entering = await entering_unheard(hub, writer.stream_id, monkeypatch)
    hub._listener._channels.add(keys.channel(writer.stream_id))  # As `add` has it do.
    await redis.client_kill_filter(_type="pubsub")
    feed = await entering
    await writer.begin()
    await until_begun(feed)
    hub.leave(feed)


@pytest.mark.parametrize("read", ["is about to begin", "has begun"])
async def test_a_viewer_that_leaves_before_an_unheard_birth_is_read_leaves_nothing_behind(
    hub: Hub, redis: Redis, read: str
) -> None:
    writer = Writer(redis)
    stream_id = new_stream_id()
    await writer.create(stream_id)
    await writer.begin()
    feed = hub.expect(stream_id)
    hub.born(feed, heard=False)
    if read == "has begun":
        await asyncio.sleep(0)
    hub.leave(feed)
    await _sees(hub, stream_id, b"started")
    await _nothing_runs(hub)
    assert hub._listener._channels == {keys.CONTROL}


async def test_nobody_waits_for_the_channel_of_a_feed_that_was_erased_and_made_anew(
    hub: Hub, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await entering_unheard(hub, writer.stream_id, monkeypatch)
    hub._heard(keys.CONTROL, f"erase {writer.stream_id}".encode())
    second = asyncio.create_task(hub.enter(writer.stream_id))
    async with asyncio.timeout(2):
        for feed in await asyncio.gather(first, second):
            hub.leave(feed)
    assert hub._listener._channels == {keys.CONTROL}


async def test_a_stream_that_is_erased_before_its_first_read_keeps_no_channel(
    hub: Hub, writer: Writer
) -> None:
    entering = asyncio.create_task(hub.enter(writer.stream_id))
    await asyncio.sleep(0)  # The read is about to begin.
    hub._heard(keys.CONTROL, f"erase {writer.stream_id}".encode())
    with pytest.raises(StreamGone):
        await entering
    assert hub._listener._channels == {keys.CONTROL}


async def _nothing_runs(hub: Hub) -> None:
    async def nothing_runs() -> bool:
        return not hub._tasks

    await until(nothing_runs)


async def _sees(hub: Hub, stream_id: str, text: bytes) -> None:
    async with watching(hub, stream_id) as taker:
        await taker.has(text)


# Gone means gone.


async def test_an_unknown_log_is_gone(hub: Hub) -> None:
    with pytest.raises(StreamGone):
        async with entered(hub, new_stream_id()):
            pass
    assert hub.viewers() == {}


async def test_an_erased_stream_is_gone_for_those_who_watch_and_in_the_cache_of_every_process(
    hub: Hub, writer: Writer, redis: Redis
) -> None:
    live = Writer(redis)
    await writer.begin()
    await writer.finish()
    await live.create()
    await live.begin()
    async with watching(hub, writer.stream_id) as taker:
        await taker.has(b"completed")
    async with watching(hub, live.stream_id) as taker:
        await taker.has(b"started")
        other = make_log(redis)
        await other.erase(writer.stream_id)
        await other.erase(live.stream_id)
        await taker.has(b"stream_gone")
    with pytest.raises(StreamGone):
        async with entered(hub, writer.stream_id):
            pass


@pytest.mark.parametrize("cut", [False, True])
async def test_what_is_erased_is_shown_no_further_though_it_had_ended_and_is_not_kept(
    redis: Redis, writer: Writer, cut: bool
) -> None:
    await writer.begin()
    async with (
        running_hub(redis, cache_bytes=2**20 if cut else 0) as hub,
        entered(hub, writer.stream_id) as feed,
        watching(hub, writer.stream_id) as slow,
    ):
        await slow.has(b"started")
        slow.reading.clear()
        await writer.say(*(f"secret {n}" for n in range(2 * FRAMES_AT_ONCE)))
        await writer.finish()

        async def ends_and_erasing_is_listened_to() -> bool:
            [(_, subscribers)] = await redis.pubsub_numsub(keys.CONTROL)
            return feed.ended and subscribers == 1

        await until(ends_and_erasing_is_listened_to)
        if cut:
            await redis.client_kill_filter(_type="pubsub")
            await until(ends_and_erasing_is_listened_to)
        assert hub._finished.get(writer.stream_id) is None
        await make_log(redis).erase(writer.stream_id)

        async def is_gone() -> bool:
            return feed.gone is not None

        await until(is_gone)
        assert hub.viewers() == {}, "reported, they would be a trace"
        slow.reading.set()
        await slow.has(b"stream_gone")
    assert b"secret 511" not in slow.body


async def test_an_erase_that_is_heard_during_the_first_read_is_gone_and_nothing_else(
    hub: Hub, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await writer.begin()
    read = Log.read

    async def erased_meanwhile(log: Log, stream_id: str, after: Cursor | None = None) -> Any:
        monkeypatch.undo()
        await log.erase(stream_id)

        async def heard() -> bool:
            return stream_id not in hub._feeds

        await until(heard)
        return await read(log, stream_id, after)

    monkeypatch.setattr(Log, "read", erased_meanwhile)
    with pytest.raises(StreamGone):
        async with entered(hub, writer.stream_id):
            pass


async def test_what_is_erased_while_it_is_read_for_one_that_left_is_not_kept(
    hub: Hub, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await writer.begin()
    await writer.finish()
    remaining_ms = Log.remaining_ms
    entering = asyncio.create_task(hub.enter(writer.stream_id))

    async def erased_meanwhile(log: Log, stream_id: str) -> int:
        entering.cancel()
        await asyncio.wait([entering])
        told = await remaining_ms(log, stream_id)
        hub._heard(keys.CONTROL, f"erase {stream_id}".encode())
        return told

    monkeypatch.setattr(Log, "remaining_ms", erased_meanwhile)
    await asyncio.wait([entering])
    await _nothing_runs(hub)
    assert hub._finished.get(writer.stream_id) is None


async def test_what_was_let_go_of_never_comes_back_into_memory(
    hub: Hub, writer: Writer, redis: Redis
) -> None:
    await writer.begin()
    await writer.finish()
    async with entered(hub, writer.stream_id) as feed:
        hub._finished.clear()
        # As a round of the patrol does that began before the connection was lost.
        await hub._catch_up(feed)
    assert hub._finished.get(writer.stream_id) is None


async def test_nothing_is_served_from_memory_once_erasing_could_go_unheard(
    hub: Hub, writer: Writer, redis: Redis
) -> None:
    await writer.begin()
    await writer.finish()
    async with watching(hub, writer.stream_id) as taker:
        await taker.has(b"completed")
    await redis.delete(keys.log(writer.stream_id))
    async with entered(hub, writer.stream_id):
        pass
    await redis.client_kill_filter(_type="pubsub")
    await until(lambda: _is_gone(hub, writer.stream_id))


async def test_what_had_ended_before_it_was_watched_is_served_from_memory_no_longer_than_from_redis(
    hub: Hub, writer: Writer, redis: Redis
) -> None:
    await writer.begin()
    await writer.finish()
    await redis.pexpire(keys.log(writer.stream_id), 500)
    assert not await _is_gone(hub, writer.stream_id)
    await until(lambda: _is_gone(hub, writer.stream_id))


async def _is_gone(hub: Hub, stream_id: str) -> bool:
    try:
        async with entered(hub, stream_id):
            return False
    except StreamGone:
        return True


async def test_nobody_waits_for_a_redis_that_is_known_to_be_away(
    hub: Hub, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = counting(monkeypatch, "read")
    hub._listener.away = True
    with pytest.raises(RedisConnectionError):
        await hub.enter(writer.stream_id)
    assert reads["read"] == 0


async def test_what_is_read_while_erasing_would_go_unheard_is_not_kept(
    redis: Redis, writer: Writer
) -> None:
    await writer.begin()
    await writer.finish()
    deaf = Hub(redis, make_log(redis), cache_bytes=2**20, retention_seconds=60)
    async with entered(deaf, writer.stream_id) as feed:
        assert feed.ended
    await make_log(redis).erase(writer.stream_id)
    with pytest.raises(StreamGone):
        async with entered(deaf, writer.stream_id):
            pass


async def test_the_cache_keeps_to_its_bytes(redis: Redis) -> None:
    names = []
    async with running_hub(redis, cache_bytes=20_000) as hub:
        for _ in range(10):
            writer = Writer(redis)
            names.append((await writer.create()).stream_id)
            await writer.begin()
            await writer.say("x" * 2000)
            await writer.finish()
            async with watching(hub, writer.stream_id) as taker:
                await taker.has(b"completed")
        kept = [feed for name in names if (feed := hub._finished.get(name))]
        assert 0 < sum(feed.bytes for feed in kept) <= 20_000
        assert kept[-1].stream_id == names[-1]


async def test_a_cursor_above_the_top_waits_for_what_follows_it(hub: Hub, writer: Writer) -> None:
    """Redis may have lost a tail that the viewer has and the worker is about to append again."""
    await writer.begin()
    async with watching(hub, writer.stream_id, after=writer.cursors(2)[0]) as taker:
        await writer.say("one", "two", "three")
        await writer.finish()
        await taker.has(b"completed")
    assert [frame.id for frame in taker.frames] == writer.cursors(3, 4)


async def test_a_cursor_of_an_attempt_that_is_over_leads_to_the_newest_start(
    hub: Hub, writer: Writer
) -> None:
    await writer.begin()
    await writer.say("one", "two")
    [cursor] = writer.cursors(1)
    await writer.begin()
    async with watching(hub, writer.stream_id, after=cursor) as taker:
        await taker.has(b"started")
    assert [frame.id for frame in taker.frames] == writer.cursors(0)


@pytest.fixture
async def attentive_hub(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    """It asks for reasons to wait without a pause."""
    monkeypatch.setattr(hub_module, "REASON_SECONDS", 0)
    async with running_hub(redis) as hub:
        yield hub


async def told(feed: Feed, *notices: bytes) -> None:
    async def all_of_them() -> bool:
        return feed.notices[: len(notices)] == list(notices)

    await until(all_of_them)


async def test_whoever_waits_for_a_worker_is_told_that_there_is_none_and_whoever_comes_then_too(
    attentive_hub: Hub, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "NOTICE_SECONDS", 60)
    one, two = [await make_log(redis).create({"messages": []}) for _ in range(2)]
    async with entered(attentive_hub, one.stream_id) as first:
        await told(first, NO_WORKER)
        async with entered(attentive_hub, two.stream_id) as second:
            await told(second, NO_WORKER)
        assert first.notices == [NO_WORKER]


async def test_it_is_told_again_for_as_long_as_it_is_so(
    attentive_hub: Hub, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "NOTICE_SECONDS", 0.01)
    async with entered(attentive_hub, writer.stream_id) as feed:
        await told(feed, *[NO_WORKER] * 3)


async def test_while_a_worker_gives_signs_of_life_nobody_is_told_anything(
    attentive_hub: Hub, writer: Writer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "ALIVE_SECONDS", 60)
    await make_claims(redis).sweep()
    asked = counting(monkeypatch, "silent_seconds")

    async def often() -> bool:
        return asked["silent_seconds"] > 3

    async with entered(attentive_hub, writer.stream_id) as feed:
        await until(often)
    assert feed.notices == []
