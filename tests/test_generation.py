import asyncio
import gc
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from cli.redis_server import RedisServer
from emulator.app import Emulator, Record
from relay import keys
from relay.chunks import Chunk, Expander, parse
from relay.claim import Claim, Claims
from relay.connection import connect
from relay.errors import StreamGone, StreamLost
from relay.events import Cursor, Event, text_of
from relay.log import Appended, Batch, Log
from relay.settings import Settings
from tests.conftest import asking, changed
from worker.appender import Appender
from worker.generation import Generation
from worker.upstream import Upstream


class NotedLog(Log):
    """The real log, and how it is used. `fail` calls in a row do not get through to Redis; the
    answers to the next `deafen` calls are lost on their way back."""

    calls = 0
    fail = 0
    deafen = 0
    standing = 0

    def __init__(self, redis: Redis, **changes: int) -> None:
        limits = {"open_ms": 60_000, "retention_ms": 60_000, "queue_limit": 100} | changes
        super().__init__(redis, **limits)
        self._grown = asyncio.Condition()
        self.failed = asyncio.Event()
        self.batches: list[Batch] = []

    async def append(self, batches: Sequence[Batch]) -> list[Appended | StreamLost | ResponseError]:
        self.calls += 1
        self.batches += batches
        if self.fail:
            self.fail -= 1
            self.failed.set()
            raise RedisConnectionError("no way there")
        outcomes = await super().append(batches)
        if self.deafen:
            self.deafen -= 1
            raise RedisConnectionError("no way back")
        async with self._grown:
            self.standing = max([o.next_seq for o in outcomes if isinstance(o, Appended)] or [0])
            self._grown.notify_all()
        return outcomes

    async def reaches(self, seq: int) -> None:
        async with asyncio.timeout(5), self._grown:
            await self._grown.wait_for(lambda: self.standing >= seq)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.appender.REDIS_RETRY_SECONDS", 0.01)
    monkeypatch.setattr("worker.upstream.FIRST_RETRY_SECONDS", 0.001)


@pytest.fixture
def log(redis: Redis) -> NotedLog:
    return NotedLog(redis)


@pytest.fixture
async def upstream(settings: Settings) -> AsyncIterator[Upstream]:
    async with opened(settings) as upstream:
        yield upstream


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Upstream]:
    upstream = Upstream(settings)
    try:
        yield upstream
    finally:
        await upstream.close()


async def claimed(log: Log, claims: Claims, **script: Any) -> Claim:
    await log.create(asking(**script))
    [claim] = await claims.claim(1)
    return claim


def generation(
    claim: Claim,
    log: Log,
    upstream: Upstream,
    *,
    answer_seconds: float = 10,
) -> Generation:
    return Generation(claim, Appender(log), upstream, answer_seconds=answer_seconds)


async def run(generation: Generation) -> None:
    async with asyncio.timeout(10):
        await generation.run()


def text_in(events: list[Event]) -> str:
    return "".join(map(text_of, events))


def numbers(count: int) -> str:
    return "".join(f"{n} " for n in range(count))


def assert_dense(events: list[Event]) -> None:
    assert events[0].cursor == Cursor(0, 1)
    assert [event.cursor for event in events[1:]] == [
        Cursor(events[-1].cursor.attempt, seq) for seq in range(len(events) - 1)
    ]


async def ended(emulator: Emulator) -> Record:
    async with asyncio.timeout(1):
        record = await emulator.request(0)
        await record.over.wait()
    return record


# The log of a generation


async def test_the_log_tells_the_answer_from_started_to_completed(
    log: NotedLog, claims: Claims, upstream: Upstream
) -> None:
    claim = await claimed(log, claims, chunks=5)
    await run(generation(claim, log, upstream))
    events = await log.read(claim.stream_id)
    assert_dense(events)
    kinds = [event.kind for event in events]
    assert kinds[:2] == ["queued", "started"]
    assert set(kinds[2:-1]) == {"c", "t"}
    assert kinds[-1] == "completed"
    assert events[1].value()["attempt"] == 1
    assert text_in(events) == numbers(5)
    told = events[-1].value()
    assert told["finish_reason"] == "stop"
    assert told["usage"]["completion_tokens"] == 5
    assert told["chunks"] == len(events) - 3
    assert told["sha256"] == hashlib.sha256(numbers(5).encode()).hexdigest()
    assert (await log.state(claim.stream_id)).status == "completed"


async def test_nothing_the_upstream_said_is_lost(
    log: NotedLog, claims: Claims, upstream: Upstream
) -> None:
    script = {"chunks": 9, "late_filter": "annotations", "surrogate": True, "refusal": "no, never"}
    claim = await claimed(log, claims, **script)
    await run(generation(claim, log, upstream))
    expander = Expander()
    events = await log.read(claim.stream_id)
    told = [chunk for event in events if (chunk := expander.chunk(event)) is not None]
    said: list[Chunk] = []
    await upstream.stream(asking(**script), lambda together: said.extend(map(parse, together)))
    for chunk in (*told, *said):  # Of two answers to the same question only these differ.
        for name in ("id", "created"):
            chunk.pop(name, None)
    assert told == said


async def test_an_end_without_a_finish_reason_is_a_failure(
    log: NotedLog, claims: Claims, upstream: Upstream
) -> None:
    claim = await claimed(log, claims, chunks=9, after=3, end="eof")
    await run(generation(claim, log, upstream))
    events = await log.read(claim.stream_id)
    assert events[-1].kind == "failed"
    assert events[-1].value()["code"] == "upstream_incomplete"
    assert events[-1].value()["retryable"] is True
    assert text_in(events) == numbers(3)


SAID = [({"content": "whole"}, None), ({}, "stop")]
FINISHED = [{"choices": [{"index": 0, "delta": d, "finish_reason": f}]} for d, f in SAID]


@pytest.mark.parametrize("end", ["no_done", "reset", "stall"])
async def test_an_answer_with_its_finish_reason_is_whole_however_its_connection_ends(
    end: str, log: NotedLog, claims: Claims, settings: Settings
) -> None:
    claim = await claimed(log, claims, raw=FINISHED, end=end)
    async with opened(changed(settings, stall_seconds=0.1)) as upstream:
        await run(generation(claim, log, upstream))
    events = await log.read(claim.stream_id)
    assert text_in(events) == "whole"
    assert events[-1].kind == "completed"
    assert events[-1].value()["finish_reason"] == "stop"


async def test_of_several_choices_one_may_not_have_begun_when_the_connection_breaks(
    log: NotedLog, claims: Claims, upstream: Upstream
) -> None:
    await log.create(asking(raw=FINISHED, end="reset") | {"n": 2})
    [claim] = await claims.claim(1)
    await run(generation(claim, log, upstream))
    events = await log.read(claim.stream_id)
    assert (events[-1].kind, events[-1].value()["code"]) == ("failed", "upstream_unreachable")


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ({"status": 401}, "upstream_denied"),
        ({"prompt_filter": True}, "content_filter"),
        ({"end": "error", "after": 2}, "upstream_failed"),
        ({"end": "reset", "after": 2}, "upstream_unreachable"),
        ({"end": "stall", "after": 2}, "upstream_timeout"),
    ],
)
async def test_a_failure_of_the_upstream_is_told_with_its_code_and_what_there_is(
    script: dict[str, Any], code: str, log: NotedLog, claims: Claims, settings: Settings
) -> None:
    claim = await claimed(log, claims, chunks=9, **script)
    async with opened(changed(settings, stall_seconds=0.1)) as upstream:
        await run(generation(claim, log, upstream))
    events = await log.read(claim.stream_id)
    assert_dense(events)
    text = numbers(script.get("after", 0))
    assert text_in(events) == text
    assert events[-1].kind == "failed"
    assert events[-1].value()["code"] == code
    assert events[-1].value()["sha256"] == hashlib.sha256(text.encode()).hexdigest()


async def test_an_answer_that_takes_too_long_is_ended(
    log: NotedLog, claims: Claims, upstream: Upstream, emulator: Emulator
) -> None:
    claim = await claimed(log, claims, chunks=9, after=2, end="stall")
    await run(generation(claim, log, upstream, answer_seconds=0.2))
    events = await log.read(claim.stream_id)
    assert events[-1].kind == "failed"
    assert events[-1].value()["code"] == "answer_timeout"
    assert text_in(events) == numbers(2)
    assert (await ended(emulator)).outcome == "disconnected"


async def test_a_request_that_cannot_be_read_ends_its_stream_alone(
    log: NotedLog, claims: Claims, upstream: Upstream, emulator: Emulator
) -> None:
    claim = replace(await claimed(log, claims), request=b"no JSON")
    await run(generation(claim, log, upstream))
    assert (await log.read(claim.stream_id))[-1].value()["code"] == "internal"
    assert emulator.total == 0


class BrokenUpstream(Upstream):
    async def stream(
        self, request: dict[str, Any], take: Callable[[list[bytes]], None], _: Any = None
    ) -> None:
        take([b'{"choices":[{"index":0,"delta":{"content":"so far"},"finish_reason":null}]}'])
        raise RuntimeError(str(request["messages"]))


async def test_the_unexpected_is_told_as_internal_and_without_its_text(
    log: NotedLog, claims: Claims, settings: Settings
) -> None:
    claim = await claimed(log, claims, text=["the-marker"])
    await run(generation(claim, log, BrokenUpstream(settings)))
    events = await log.read(claim.stream_id)
    assert events[-1].kind == "failed"
    assert events[-1].value()["code"] == "internal"
    assert text_in(events) == "so far"
    assert b"the-marker" not in b"".join(event.data for event in events)


async def test_the_unexpected_puts_no_prompt_into_a_log_line(
    log: NotedLog, claims: Claims, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = await claimed(log, claims, text=["the-marker"])
    await run(generation(claim, log, BrokenUpstream(settings)))
    written = capsys.readouterr().err
    assert "generation_died" in written
    assert "RuntimeError" in written
    assert "the-marker" not in written


async def test_an_operator_reads_which_answer_failed_and_why(
    log: NotedLog, claims: Claims, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = await claimed(log, claims, status=500)
    async with opened(changed(settings, upstream_tries=2)) as upstream:
        await run(generation(claim, log, upstream))
    written = capsys.readouterr().err.splitlines()
    retry, failed = [line for line in written if claim.stream_id in line]
    assert "level=warning" in retry
    assert "upstream_retry" in retry
    assert 'cause="HTTP 500"' in retry
    assert "level=warning" in failed
    assert "event=failed" in failed
    assert "code=upstream_unavailable" in failed
    assert 'cause="HTTP 500"' in failed
    assert 'reason="The model service is not available: ask again."' in failed
    assert "cause" not in (await log.read(claim.stream_id))[-1].value()


async def test_an_operator_reads_how_long_an_answer_took_and_how_much_it_was(
    log: NotedLog, claims: Claims, upstream: Upstream, said: list[Any]
) -> None:
    claim = await claimed(log, claims, chunks=3, delay_ms=20)
    await run(generation(claim, log, upstream))
    [end] = [each for each in said if each["event"] == "completed"]
    assert end["chunks"] == (await log.read(claim.stream_id))[-1].value()["chunks"]
    assert 0 < end["first_seconds"] < end["seconds"]


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": [None]},
        {"choices": ["text"]},
        {"choices": 1},
        {"choices": [{"index": 0, "delta": "text"}]},
        {"choices": [{"index": [], "delta": {"content": "text"}}]},
    ],
)
async def test_a_chunk_of_a_strange_shape_is_the_upstreams_failure(
    chunk: Chunk, log: NotedLog, claims: Claims, upstream: Upstream
) -> None:
    claim = await claimed(log, claims, raw=[chunk])
    await run(generation(claim, log, upstream))
    events = await log.read(claim.stream_id)
    assert (events[-1].kind, events[-1].value()["code"]) == ("failed", "upstream_garbled")


async def test_an_answer_that_never_ends_is_ended_before_it_takes_the_memory_of_all(
    log: NotedLog, claims: Claims, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.generation.MOST_BYTES", 2_000)
    claim = await claimed(log, claims, text=["x" * 100] * 100)
    await run(generation(claim, log, upstream))
    events = await log.read(claim.stream_id)
    assert (events[-1].kind, events[-1].value()["code"]) == ("failed", "upstream_garbled")
    assert sum(len(event.data) for event in events[:-1]) <= 2_000


async def test_also_chunks_with_next_to_nothing_in_them_take_memory(
    log: NotedLog, claims: Claims, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.generation.MOST_BYTES", 2_000)
    claim = await claimed(log, claims, text=["x"] * 30)
    await run(generation(claim, log, upstream))
    events = await log.read(claim.stream_id)
    assert (events[-1].kind, events[-1].value()["code"]) == ("failed", "upstream_garbled")


async def test_many_chunks_cost_few_appends(
    log: NotedLog, claims: Claims, upstream: Upstream
) -> None:
    claim = await claimed(log, claims, chunks=1000)
    await run(generation(claim, log, upstream))
    assert text_in(await log.read(claim.stream_id)) == numbers(1000)
    assert log.calls < 250


# Cancelled


async def test_a_call_holds_so_many_bytes_or_one_entry(
    log: NotedLog, claims: Claims, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.appender.BYTES_AT_ONCE", 400)
    claim = await claimed(log, claims, chunks=60, pad=100)
    await run(generation(claim, log, upstream))
    assert_dense(await log.read(claim.stream_id))
    assert all(batch.length == 1 or batch.size <= 400 for batch in log.batches)
    assert any(batch.length > 1 for batch in log.batches)


@pytest.mark.parametrize(
    ("script", "act"),
    [
        ({}, None),
        ({"status": 401}, None),
        ({"status": 500}, None),
        ({"end": "error", "after": 2}, None),
        ({"end": "reset", "after": 2}, None),
        ({"end": "garbage", "after": 2}, None),
        ({"end": "hang"}, None),
        ({"end": "stall", "after": 2}, None),
        ({"end": "stall", "after": 2}, Generation.cancel),
        ({"end": "stall", "after": 2}, Generation.lose),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
async def test_question_and_answer_go_without_a_collector_however_it_ends(
    script: dict[str, Any],
    act: Callable[[Generation], None] | None,
    log: NotedLog,
    claims: Claims,
    settings: Settings,
) -> None:
    appender = Appender(log)
    claim, next_one = [await claimed(log, claims, chunks=4, **each) for each in (script, {})]
    impatient = changed(settings, stall_seconds=0.2, first_chunk_seconds=0.3, upstream_tries=2)
    async with opened(impatient) as upstream:
        gc.collect()
        gc.disable()
        before = living()
        try:
            await made(Generation(claim, appender, upstream, answer_seconds=10), log, act)
            # The appender lets go of one with the call of the next.
            await made(Generation(next_one, appender, upstream, answer_seconds=10), log, None)
            await asyncio.sleep(0)
            left = living() - before
        finally:
            gc.enable()
    assert left == Counter({Generation: 1}), "the next one alone"


def living() -> Counter[type]:
    """What there is of that which holds a question or an answer."""
    kinds = {Generation, httpx2.Request, httpx2.Response}
    return Counter(type(each) for each in gc.get_objects() if type(each) in kinds)


async def made(
    generation: Generation, log: NotedLog, act: Callable[[Generation], None] | None
) -> None:
    running = asyncio.create_task(run(generation))
    if act is not None:
        await log.reaches(3)
        act(generation)
    await running


async def test_a_cancel_between_claim_and_start_is_not_lost(
    log: NotedLog, claims: Claims, upstream: Upstream, emulator: Emulator
) -> None:
    claim = await claimed(log, claims, chunks=1)
    ours = generation(claim, log, upstream)
    ours.cancel()
    await run(ours)
    assert [event.kind for event in await log.read(claim.stream_id)] == ["queued", "cancelled"]
    assert emulator.total == 0


async def test_a_cancel_mid_stream_closes_the_socket_and_keeps_the_text(
    log: NotedLog, claims: Claims, upstream: Upstream, emulator: Emulator
) -> None:
    claim = await claimed(log, claims, chunks=9, after=3, end="stall")
    ours = generation(claim, log, upstream)
    running = asyncio.create_task(run(ours))
    await log.reaches(6)
    ours.cancel()
    ours.cancel()
    assert (await ended(emulator)).outcome == "disconnected"
    await running
    events = await log.read(claim.stream_id)
    assert_dense(events)
    assert text_in(events) == numbers(3)
    assert [event.kind for event in events if event.terminal] == ["cancelled"]
    assert events[-1].value()["sha256"] == hashlib.sha256(numbers(3).encode()).hexdigest()


async def test_a_cancel_mark_is_seen_at_the_next_append(
    log: NotedLog, claims: Claims, upstream: Upstream, emulator: Emulator
) -> None:
    claim = await claimed(log, claims, chunks=500, delay_ms=5)
    running = asyncio.create_task(run(generation(claim, log, upstream)))
    await log.reaches(4)
    assert await log.cancel(claim.stream_id) == "cancelling"
    assert (await ended(emulator)).outcome == "disconnected"
    await running
    assert (await log.read(claim.stream_id))[-1].kind == "cancelled"


async def test_a_cancel_after_the_end_changes_nothing(
    log: NotedLog, claims: Claims, upstream: Upstream
) -> None:
    claim = await claimed(log, claims, chunks=1)
    ours = generation(claim, log, upstream)
    await run(ours)
    before = await log.read(claim.stream_id)
    ours.cancel()
    assert await log.read(claim.stream_id) == before


# Lost


async def test_a_lost_lease_closes_the_upstream_and_writes_nothing_more(
    log: NotedLog, claims: Claims, upstream: Upstream, emulator: Emulator
) -> None:
    claim = await claimed(log, claims, chunks=9, after=3, end="stall")
    ours = generation(claim, log, upstream)
    running = asyncio.create_task(run(ours))
    await log.reaches(6)
    before = await log.read(claim.stream_id)
    ours.lose()
    assert (await ended(emulator)).outcome == "disconnected"
    await running
    assert await log.read(claim.stream_id) == before
    assert not before[-1].terminal


async def test_what_is_lost_before_its_start_asks_nothing_and_writes_nothing(
    log: NotedLog, claims: Claims, upstream: Upstream, emulator: Emulator
) -> None:
    claim = await claimed(log, claims, chunks=1)
    ours = generation(claim, log, upstream)
    ours.lose()
    await run(ours)
    assert [event.kind for event in await log.read(claim.stream_id)] == ["queued"]
    assert emulator.total == 0


async def test_what_is_lost_while_redis_is_away_gives_up(
    log: NotedLog, claims: Claims, upstream: Upstream
) -> None:
    claim = await claimed(log, claims, chunks=1)
    log.fail = 10**9
    ours = generation(claim, log, upstream)
    running = asyncio.create_task(run(ours))
    await log.failed.wait()
    ours.lose()
    await running
    assert [event.kind for event in await log.read(claim.stream_id)] == ["queued"]


async def test_a_fenced_append_ends_it_quietly(
    log: NotedLog, claims: Claims, upstream: Upstream, emulator: Emulator, redis: Redis
) -> None:
    claim = await claimed(log, claims, chunks=1000, delay_ms=5)
    running = asyncio.create_task(run(generation(claim, log, upstream)))
    await log.reaches(4)
    await redis.zadd(keys.LEASES, {claim.stream_id: 0})
    await claims.sweep()
    [second] = await claims.claim(1)
    assert (await ended(emulator)).outcome == "disconnected"
    await running
    events = await log.read(claim.stream_id)
    assert not events[-1].terminal
    await run(generation(second, log, upstream, answer_seconds=0.1))
    later = [
        event for event in await log.read(claim.stream_id) if event.cursor.attempt == second.attempt
    ]
    assert later[0].kind == "started"
    assert later[-1].terminal


async def test_an_erased_stream_ends_it_quietly_and_stays_erased(
    log: NotedLog, claims: Claims, upstream: Upstream, emulator: Emulator
) -> None:
    claim = await claimed(log, claims, chunks=1000, delay_ms=5)
    running = asyncio.create_task(run(generation(claim, log, upstream)))
    await log.reaches(4)
    await log.erase(claim.stream_id)
    assert (await ended(emulator)).outcome == "disconnected"
    await running
    with pytest.raises(StreamGone):
        await log.read(claim.stream_id)


async def test_cancelling_the_task_closes_the_upstream_and_leaves_the_log_as_it_is(
    log: NotedLog, claims: Claims, upstream: Upstream, emulator: Emulator
) -> None:
    claim = await claimed(log, claims, chunks=9, after=3, end="stall")
    running = asyncio.create_task(run(generation(claim, log, upstream)))
    await log.reaches(6)
    before = await log.read(claim.stream_id)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (await ended(emulator)).outcome == "disconnected"
    assert await log.read(claim.stream_id) == before


# Redis in trouble


async def put_back_to(redis: Redis, claim: Claim, seq: int) -> None:
    """Redis comes back without what the attempt wrote after `seq`; -1 leaves the birth alone."""
    log, state = keys.log(claim.stream_id), keys.state(claim.stream_id)
    kept = await redis.xrange(log, max=f"{claim.attempt}-{seq}" if seq >= 0 else "0-1")
    async with redis.pipeline(transaction=True) as pipe:
        pipe.delete(log)
        for entry_id, fields in kept:
            pipe.xadd(log, fields, id=entry_id)
        pipe.hset(state, "next", str(seq + 1))
        await pipe.execute()


async def test_entries_that_redis_forgot_are_appended_again(
    log: NotedLog, claims: Claims, upstream: Upstream, redis: Redis
) -> None:
    claim = await claimed(log, claims, chunks=60, delay_ms=5)
    running = asyncio.create_task(run(generation(claim, log, upstream)))
    for seq in (10, 30):
        await log.reaches(seq)
        await put_back_to(redis, claim, 3)
        log.standing = 0
    await running
    events = await log.read(claim.stream_id)
    assert_dense(events)
    assert events[-1].kind == "completed"
    assert text_in(events) == numbers(60)


async def test_a_redis_that_forgot_the_whole_attempt_has_it_appended_from_started(
    log: NotedLog, claims: Claims, upstream: Upstream, redis: Redis
) -> None:
    claim = await claimed(log, claims, chunks=40, delay_ms=5)
    running = asyncio.create_task(run(generation(claim, log, upstream)))
    await log.reaches(10)
    await put_back_to(redis, claim, -1)
    await running
    events = await log.read(claim.stream_id)
    assert_dense(events)
    assert events[1].kind == "started"
    assert text_in(events) == numbers(40)


async def test_a_redis_that_forgot_the_stream_ends_it_quietly(
    log: NotedLog, claims: Claims, upstream: Upstream, emulator: Emulator, redis: Redis
) -> None:
    claim = await claimed(log, claims, chunks=1000, delay_ms=5)
    running = asyncio.create_task(run(generation(claim, log, upstream)))
    await log.reaches(4)
    await redis.flushall()
    assert (await ended(emulator)).outcome == "disconnected"
    await running
    assert await redis.keys() == []


@pytest.mark.parametrize("trouble", ["fail", "deafen"])
async def test_appends_that_fail_are_repeated_and_nothing_stands_twice(
    trouble: str, log: NotedLog, claims: Claims, upstream: Upstream
) -> None:
    claim = await claimed(log, claims, chunks=200, delay_ms=3)
    setattr(log, trouble, 3)
    running = asyncio.create_task(run(generation(claim, log, upstream)))
    await log.reaches(5)
    setattr(log, trouble, 3)
    await running
    assert getattr(log, trouble) == 0
    events = await log.read(claim.stream_id)
    assert_dense(events)
    assert events[-1].kind == "completed"
    assert text_in(events) == numbers(200)


async def test_the_terminal_event_comes_even_if_its_append_failed_or_its_answer_was_lost(
    log: NotedLog, claims: Claims, upstream: Upstream
) -> None:
    for trouble in ("fail", "deafen"):
        claim = await claimed(log, claims, status=401)
        setattr(log, trouble, 2)
        await run(generation(claim, log, upstream))
        kinds = [event.kind for event in await log.read(claim.stream_id)]
        assert kinds == ["queued", "failed"]


async def test_connections_that_redis_kills_are_made_again(
    redis_server: RedisServer, redis: Redis, claims: Claims, upstream: Upstream
) -> None:
    client: Any = redis
    async with connect(redis_server.url) as other:
        log = NotedLog(other)
        claim = await claimed(log, claims, chunks=60, delay_ms=3)
        running = asyncio.create_task(run(generation(claim, log, upstream)))
        for seq in (5, 20, 35):
            await log.reaches(seq)
            await client.execute_command("CLIENT", "KILL", "TYPE", "normal")
        await running
        events = await log.read(claim.stream_id)
    assert_dense(events)
    assert text_in(events) == numbers(60)


async def test_a_slow_redis_does_not_stall_the_upstream(
    log: NotedLog, claims: Claims, upstream: Upstream, emulator: Emulator
) -> None:
    claim = await claimed(log, claims, chunks=300)
    log.fail = 10**9
    running = asyncio.create_task(run(generation(claim, log, upstream)))
    assert (await ended(emulator)).outcome == "completed"
    log.fail = 0
    await running
    assert text_in(await log.read(claim.stream_id)) == numbers(300)


class DyingUpstream(Upstream):
    """Its connection fails while it is being closed."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.begun = asyncio.Event()

    async def stream(
        self, request: dict[str, Any], take: Callable[[list[bytes]], None], _: Any = None
    ) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise RuntimeError("the-marker")


async def test_an_upstream_that_dies_while_it_is_let_go_is_no_noise(
    log: NotedLog, claims: Claims, settings: Settings
) -> None:
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    claim = await claimed(log, claims)
    upstream = DyingUpstream(settings)
    ours = generation(claim, log, upstream)
    running = asyncio.create_task(ours.run())
    await upstream.begun.wait()
    running.cancel()
    await asyncio.wait([running])
    del ours, running
    gc.collect()
    assert complaints == []
