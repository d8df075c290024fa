"""The log, on a real Redis and on an emulated one: both must keep every promise."""

import asyncio
import math
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis
from redis.asyncio import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from chaos.proxy import Proxy
from cli.processes import free_port
from cli.redis_server import RedisServer
from relay import keys
from relay.claim import Claim
from relay.connection import connect
from relay.durations import BOUNDS_MS, Histogram, histogram
from relay.errors import IdempotencyConflict, QueueFull, StreamGone, StreamLost
from relay.events import (
    CANCELLED,
    COMPLETED,
    FAILED,
    STARTED,
    TEXT,
    Cursor,
    Entry,
    Event,
    decode_batch,
    entry,
)
from relay.ids import is_stream_id, new_stream_id
from relay.log import VIEWERS_SECONDS, Appended, Created, Load, Log
from tests.conftest import (
    append,
    claim_one,
    ends,
    make_claims,
    make_log,
    reported_before,
    set_state,
)
from tests.listening import listening
from tests.redis_process import running_redis

SECRET = "a prompt that nobody else may see"
REQUEST: dict[str, Any] = {"messages": [{"role": "user", "content": SECRET}]}
BEGIN = [entry(STARTED, {"attempt": 1}), entry(TEXT, "a"), entry(TEXT, "b")]
END = [entry(COMPLETED, {})]
HOUR_MS = 3_600_000


@pytest.fixture(params=["real", "fake"])
async def redis(request: pytest.FixtureRequest, redis_server: RedisServer) -> AsyncIterator[Redis]:
    if request.param == "fake":
        async with FakeAsyncRedis() as fake:
            yield fake
        return
    async with connect(redis_server.url) as real:
        await real.flushall()
        yield real


async def claimed(redis: Redis, worker: str = "w") -> Claim:
    """A claim on a new stream."""
    await make_log(redis).create(REQUEST)
    return await claim_one(redis, worker)


async def lapse(redis: Redis, claim: Claim) -> None:
    """As if the worker had not renewed for longer than its lease."""
    await redis.zadd(keys.LEASES, {claim.stream_id: 0})
    assert ends(await make_claims(redis).sweep()) == [(claim.stream_id, "")]


async def wake_tokens(redis: Any) -> int:
    return int(await redis.llen(keys.WAKE))


async def lose_tail(redis: Redis, stream_id: str, keep: int) -> None:
    """As a Redis that comes back without what it wrote last: `keep` events are left."""
    entries = await redis.xrange(keys.log(stream_id))
    await redis.delete(keys.log(stream_id))
    for entry_id, fields in entries[:keep]:
        await redis.xadd(keys.log(stream_id), fields, id=entry_id)
    next_seq = int(entries[keep - 1][0].partition(b"-")[2]) + 1
    await set_state(redis, stream_id, "next", next_seq)


async def everything(redis: Redis) -> str:
    """All names and values that stand in Redis."""
    read: dict[bytes, Any] = {
        b"string": redis.get,
        b"hash": redis.hgetall,
        b"stream": redis.xrange,
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
    }
    found = [(key, await read[await redis.type(key)](key)) async for key in redis.scan_iter()]
    return repr(sorted(found))


def shape(events: list[Event]) -> list[tuple[str, str]]:
    return [(str(event.cursor), event.kind) for event in events]


# Birth.


async def test_a_stream_is_born_queued_with_its_job(redis: Redis, log: Log) -> None:
    stream_id, created_ms, repeated, heard = await log.create(REQUEST)
    assert created_ms == (await log.state(stream_id)).created_ms
    assert not heard, "nobody has subscribed"
    assert is_stream_id(stream_id)
    assert not repeated
    assert await log.read(stream_id) == [Event(Cursor(0, 1), "queued", b"{}")]
    assert await redis.zrange(keys.QUEUE, 0, -1) == [stream_id.encode()]
    assert await wake_tokens(redis) == 1
    for key in (keys.log(stream_id), keys.state(stream_id), keys.job(stream_id)):
        assert 0 < await redis.pttl(key) <= 60_000


async def test_a_stream_tells_its_state_from_birth_to_end(redis: Redis, log: Log) -> None:
    first, second = [(await log.create(REQUEST)).stream_id for _ in range(2)]
    await redis.zadd(keys.QUEUE, {first: 1})  # Both may have come in one millisecond.
    queued = await log.state(second)
    assert (queued.status, queued.claims, queued.place) == ("queued", 0, 2)
    assert queued.created_ms > 1_700_000_000_000
    assert (queued.started_ms, queued.ended_ms, queued.viewers) == (None, None, {})

    claim = await claim_one(redis)
    assert claim.stream_id == first
    assert (await log.state(second)).place == 1
    running = await log.state(first)
    assert (running.status, running.claims, running.place) == ("running", 1, None)
    assert running.started_ms is None

    await append(log, claim, 0, BEGIN)
    started = (await log.state(first)).started_ms
    await append(log, claim, 3, END)
    ended = await log.state(first)
    assert started is not None
    assert ended.ended_ms is not None
    assert ended.created_ms <= started <= ended.ended_ms
    assert (ended.status, ended.started_ms, ended.claims) == ("completed", started, 1)


async def test_a_full_queue_creates_nothing(redis: Redis) -> None:
    log = make_log(redis, queue_limit=1)
    await log.create(REQUEST)
    before = await everything(redis)
    with pytest.raises(QueueFull):
        await log.create(REQUEST, idempotency_key="k", digest="d")
    assert await everything(redis) == before
    await claim_one(redis)
    await log.create(REQUEST, idempotency_key="k", digest="d")


async def test_the_wake_list_does_not_grow_beyond_the_queue(redis: Redis) -> None:
    log = make_log(redis, queue_limit=2)
    for _ in range(4):
        await log.create(REQUEST)
        await claim_one(redis)
    assert await wake_tokens(redis) == 2


# Idempotency.


async def test_the_same_key_and_body_lead_to_the_same_stream(redis: Redis) -> None:
    log = make_log(redis, queue_limit=1)
    first = await log.create(REQUEST, idempotency_key="k", digest="d")
    assert await log.create(REQUEST, idempotency_key="k", digest="d") == Created(
        first.stream_id, first.created_ms, repeated=True
    )
    assert await redis.zcard(keys.QUEUE) == 1


async def test_the_same_key_with_another_body_is_a_conflict(redis: Redis, log: Log) -> None:
    await log.create(REQUEST, idempotency_key="k", digest="d")
    before = await everything(redis)
    with pytest.raises(IdempotencyConflict):
        await log.create(REQUEST, idempotency_key="k", digest="other")
    assert await everything(redis) == before


async def test_other_keys_and_no_key_lead_to_new_streams(log: Log) -> None:
    created = [
        await log.create(REQUEST, idempotency_key=key, digest="d") for key in ("k", "l", "", "")
    ]
    assert len({each.stream_id for each in created}) == 4
    assert not any(each.repeated for each in created)


async def test_after_an_erase_the_same_key_leads_to_a_new_stream(log: Log) -> None:
    first = await log.create(REQUEST, idempotency_key="k", digest="d")
    await log.erase(first.stream_id)
    again = await log.create(REQUEST, idempotency_key="k", digest="other")
    assert not again.repeated
    assert again.stream_id != first.stream_id


async def test_to_erase_an_old_stream_does_not_free_a_key_that_was_used_anew(
    redis: Redis, log: Log
) -> None:
    old = await log.create(REQUEST, idempotency_key="k", digest="d")
    await redis.delete(keys.idempotency("k"))  # Redis lost it.
    new = await log.create(REQUEST, idempotency_key="k", digest="d")
    await log.erase(old.stream_id)
    assert await log.create(REQUEST, idempotency_key="k", digest="d") == Created(
        new.stream_id, new.created_ms, repeated=True
    )


async def key_seconds(redis: Redis) -> int:
    """How long the key `k` and the chat `c` will be remembered, to the nearest ten."""
    names = (keys.idempotency("k"), keys.chat("c"))
    [seconds] = {int(round(await redis.pttl(name), -4) / 1000) for name in names}
    return seconds


async def test_a_key_and_a_chat_are_remembered_as_long_as_their_stream_stands(redis: Redis) -> None:
    log = make_log(redis, open_ms=10_000, retention_ms=40_000)
    await log.create(REQUEST, idempotency_key="k", digest="d", chat="c")
    born = await key_seconds(redis)
    [claim] = await make_claims(redis, open_ms=20_000).claim(1)
    begun = await key_seconds(redis)
    await make_claims(redis, open_ms=30_000).renew([claim])
    renewed = await key_seconds(redis)
    await append(log, claim, 0, BEGIN + END)
    assert (born, begun, renewed, await key_seconds(redis)) == (10, 20, 30, 40)


async def test_the_key_of_what_no_worker_ended_is_remembered_as_long(redis: Redis) -> None:
    log = make_log(redis, open_ms=10_000, retention_ms=40_000)
    stream_id = (await log.create(REQUEST, idempotency_key="k", digest="d", chat="c")).stream_id
    await log.cancel(stream_id)
    assert await key_seconds(redis) == 40


async def test_a_chat_leads_to_its_newest_stream_whatever_becomes_of_older_ones(
    redis: Redis,
) -> None:
    log = make_log(redis, open_ms=40_000, retention_ms=10_000)
    old, older, new = [(await log.create(REQUEST, chat="c")).stream_id for _ in range(3)]
    await log.cancel(old)
    await log.erase(older)
    assert await log.newest_of("c") == new
    assert await redis.pttl(keys.chat("c")) > 30_000
    await log.erase(new)
    assert await log.newest_of("c") is None


async def test_what_is_not_created_leads_nowhere(redis: Redis) -> None:
    log = make_log(redis, queue_limit=1)
    first = await log.create(REQUEST, idempotency_key="k", digest="d", chat="c")
    with pytest.raises(QueueFull):
        await log.create(REQUEST, chat="c")
    assert await log.newest_of("c") == first.stream_id


# Append and read.


async def test_ids_are_dense_within_an_attempt(redis: Redis, log: Log) -> None:
    claim = await claimed(redis)
    assert await append(log, claim, 0, BEGIN) == Appended(3, cancel_asked=False)
    assert await append(log, claim, 3, END) == Appended(4, cancel_asked=False)
    assert shape(await log.read(claim.stream_id)) == [
        ("0-1", "queued"),
        (f"{claim.attempt}-0", "started"),
        (f"{claim.attempt}-1", "t"),
        (f"{claim.attempt}-2", "t"),
        (f"{claim.attempt}-3", "completed"),
    ]


async def test_what_is_read_is_what_was_appended(redis: Redis, log: Log) -> None:
    claim = await claimed(redis)
    texts = ["", "\n", "ü😀", "\u2028", "\0", "\ud83d", "% %s {}"]
    await append(log, claim, 0, [entry(TEXT, text) for text in texts])
    assert [event.value() for event in (await log.read(claim.stream_id))[1:]] == texts


async def test_a_read_begins_strictly_after_the_cursor(redis: Redis, log: Log) -> None:
    claim = await claimed(redis)
    await append(log, claim, 0, BEGIN)
    events = await log.read(claim.stream_id)
    for index, event in enumerate(events):
        assert await log.read(claim.stream_id, event.cursor) == events[index + 1 :]
    assert await log.read(claim.stream_id, Cursor(10**6, 9)) == []


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
async def test_a_long_log_is_read_whole(
    redis: Redis, log: Log, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("relay.log._PAGE", 2)
    claim = await claimed(redis)
    await append(log, claim, 0, [entry(TEXT, str(number)) for number in range(count)])
    events = await log.read(claim.stream_id)
    assert [event.cursor for event in events[1:]] == [
        Cursor(claim.attempt, seq) for seq in range(count)
    ]


class SlowLink(Proxy):
    """64 KiB in 12 ms."""

    async def _may_pass(self, link: Any) -> None:
        await asyncio.sleep(0.012)


async def test_a_log_that_takes_too_long_for_one_reply_is_read_whole_all_the_same(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    port = free_port("127.0.0.1", 0)
    async with (
        running_redis(redis_server.argv[0], tmp_path, "--port", str(port)) as server,
        connect(server.url) as redis,
        SlowLink(port) as link,
        connect(f"redis://127.0.0.1:{link.port}/0", reply_seconds=0.6) as slow,
    ):
        claim = await claimed(redis)
        for first in range(0, 2400, 100):
            await append(make_log(redis), claim, first, [entry(TEXT, 2048 * "x")] * 100)
        assert len(await make_log(slow).read(claim.stream_id)) == 1 + 2400


async def test_a_redis_that_hangs_costs_a_reader_one_time_limit(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        running_redis(redis_server.argv[0], tmp_path) as server,
        connect(server.url, reply_seconds=0.5) as redis,
    ):
        claim = await claimed(redis)
        server.process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(RedisTimeoutError):
            await make_log(redis).read(claim.stream_id)
        waited = time.monotonic() - begun
        server.process.send_signal(signal.SIGCONT)
    assert waited < 2 * 0.5


async def test_a_log_that_never_comes_is_an_error_and_not_asked_for_without_end() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            if b"PING" in data:
                writer.write(b"+PONG\r\n")
            elif b"EXISTS" in data:
                writer.write(b":1\r\n")

    async with (
        asyncio.timeout(5),
        listening(talk) as port,
        connect(f"redis://127.0.0.1:{port}", reply_seconds=0.1) as redis,
    ):
        with pytest.raises(RedisTimeoutError):
            await make_log(redis).read(new_stream_id())


async def test_what_is_published_is_what_stands_in_the_log(redis: Redis, log: Log) -> None:
    claim = await claimed(redis)
    async with hearing(redis, keys.channel(claim.stream_id)) as messages:
        await append(log, claim, 0, BEGIN)
        await append(log, claim, 1, [*BEGIN[1:], entry(TEXT, "c\n"), *END])
        heard = [await anext(messages), await anext(messages)]
    assert heard[0] == b'%d-0\nstarted {"attempt":1}\nt "a"\nt "b"' % claim.attempt
    published = [event for message in heard for event in decode_batch(message)]
    assert published == (await log.read(claim.stream_id))[1:]


@asynccontextmanager
async def hearing(redis: Redis, channel: str) -> AsyncIterator[AsyncIterator[bytes]]:
    """What is published there. It stands from the beginning of the block on: Redis may take what
    two connections send in another order than that in which they sent it."""
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe(channel)
        replies = pubsub.listen()
        assert (await anext(replies))["type"] == "subscribe"
        yield (reply["data"] async for reply in replies)


@pytest.mark.parametrize("entries", [BEGIN, BEGIN + END])
async def test_to_repeat_an_append_changes_nothing(
    redis: Redis, log: Log, entries: list[Entry]
) -> None:
    claim = await claimed(redis)
    appended = await append(log, claim, 0, entries)
    before = await log.read(claim.stream_id)
    for first in range(len(entries)):
        assert await append(log, claim, first, entries[first:]) == appended
    assert await log.read(claim.stream_id) == before


async def test_an_append_that_overlaps_adds_only_what_is_new(redis: Redis, log: Log) -> None:
    claim = await claimed(redis)
    await append(log, claim, 0, BEGIN[:2])
    assert (await append(log, claim, 0, BEGIN + END)).next_seq == 4
    assert [event.kind for event in (await log.read(claim.stream_id))[1:]] == [
        *("started", "t", "t", "completed")
    ]


async def test_a_gap_is_answered_by_where_the_log_ends(redis: Redis, log: Log) -> None:
    claim = await claimed(redis)
    await append(log, claim, 0, BEGIN)
    await lose_tail(redis, claim.stream_id, keep=3)
    assert await append(log, claim, 3, END) == Appended(2, cancel_asked=False)
    assert (await log.state(claim.stream_id)).status == "running"
    await append(log, claim, 2, [*BEGIN[2:], *END])
    events = await log.read(claim.stream_id)
    assert [event.kind for event in events] == ["queued", "started", "t", "t", "completed"]
    assert [event.data for event in events[1:]] == [data for _, data in BEGIN + END]


async def share_the_attempt(redis: Redis, first: Claim) -> Claim:
    """As if the same attempt had been handed out twice, which its number is to prevent."""
    await lapse(redis, first)
    second = await claim_one(redis, "two")
    await set_state(redis, first.stream_id, "attempt", first.attempt)
    return replace(second, attempt=first.attempt)


async def test_of_two_writers_with_one_attempt_only_the_owner_may_write(
    redis: Redis, log: Log
) -> None:
    first = await claimed(redis, "one")
    second = await share_the_attempt(redis, first)
    with pytest.raises(StreamLost, match="another attempt"):
        await append(log, first, 0, BEGIN)
    await append(log, second, 0, BEGIN)


async def test_an_earlier_attempt_is_fenced(redis: Redis, log: Log) -> None:
    first = await claimed(redis)
    await append(log, first, 0, BEGIN)
    await lapse(redis, first)
    with pytest.raises(StreamLost, match="another attempt"):
        await append(log, first, 3, END)
    second = await claim_one(redis)
    for late in (BEGIN, BEGIN + END):
        with pytest.raises(StreamLost, match="another attempt"):
            await append(log, first, 0, late)
    await append(log, second, 0, BEGIN[:1])
    assert shape(await log.read(first.stream_id))[-2:] == [
        (f"{first.attempt}-2", "t"),
        (f"{second.attempt}-0", "started"),
    ]


async def test_started_is_the_time_of_the_newest_attempt(redis: Redis, log: Log) -> None:
    claim = await claimed(redis)
    await append(log, claim, 0, BEGIN)
    await set_state(redis, claim.stream_id, "started_ms", 1)
    await lapse(redis, claim)
    await append(log, await claim_one(redis), 0, BEGIN)
    assert (await log.state(claim.stream_id)).started_ms != 1


# The end.


@pytest.mark.parametrize("kind", [COMPLETED, FAILED, CANCELLED])
async def test_a_closed_log_never_grows(redis: Redis, log: Log, kind: str) -> None:
    claim = await claimed(redis)
    await append(log, claim, 0, [*BEGIN, entry(kind, {})])
    before = await log.read(claim.stream_id)
    for first, entries in [(4, END), (4, BEGIN), (3, [entry(TEXT, "x"), *END]), (5, END)]:
        with pytest.raises(StreamLost):
            await append(log, claim, first, entries)
    assert await log.cancel(claim.stream_id) == kind
    assert await make_claims(redis).sweep() == []
    assert await make_claims(redis).claim(1) == []
    assert await log.read(claim.stream_id) == before


@pytest.mark.parametrize("again", [BEGIN, [*BEGIN, *END]], ids=["a part", "all"])
async def test_who_did_not_hear_that_its_end_stands_is_told_so_when_it_repeats_any_of_it(
    redis: Redis, log: Log, again: list[Entry]
) -> None:
    claim = await claimed(redis)
    await append(log, claim, 0, [*BEGIN, *END])
    assert (await append(log, claim, 0, again)).next_seq == 4


async def test_who_lost_the_stream_is_not_told_that_its_end_stands(redis: Redis, log: Log) -> None:
    claim = await claimed(redis)
    await append(log, claim, 0, BEGIN)
    await lapse(redis, claim)
    assert await log.cancel(claim.stream_id) == "cancelled"
    with pytest.raises(StreamLost):
        await append(log, claim, 3, END)


async def test_who_shares_the_attempt_number_is_not_told_that_its_end_stands(
    redis: Redis, log: Log
) -> None:
    first = await claimed(redis, "one")
    await append(log, await share_the_attempt(redis, first), 0, BEGIN + END)
    with pytest.raises(StreamLost):
        await append(log, first, 3, END)


@pytest.mark.parametrize("by", ["worker", "cancel"])
async def test_after_the_end_the_log_stands_for_the_retention(redis: Redis, by: str) -> None:
    log = make_log(redis, open_ms=60_000, retention_ms=2 * HOUR_MS)
    if by == "worker":
        claim = await claimed(redis)
        await append(log, claim, 0, BEGIN)
        assert 0 < await log.remaining_ms(claim.stream_id) <= 60_000
        await append(log, claim, 3, END)
        stream_id = claim.stream_id
    else:
        stream_id = (await log.create(REQUEST)).stream_id
        await log.cancel(stream_id)
    assert HOUR_MS < await log.remaining_ms(stream_id) <= 2 * HOUR_MS
    assert HOUR_MS < await redis.pttl(keys.state(stream_id)) <= 2 * HOUR_MS


@pytest.mark.parametrize("ending", [COMPLETED, FAILED, CANCELLED, "cancel before the claim"])
async def test_after_the_end_the_prompt_is_gone_from_redis(
    redis: Redis, log: Log, ending: str
) -> None:
    stream_id = (await log.create(REQUEST, idempotency_key="k", digest="d")).stream_id
    assert SECRET in await everything(redis)
    if ending == "cancel before the claim":
        await log.cancel(stream_id)
    else:
        claim = await claim_one(redis)
        await append(log, claim, 0, [*BEGIN, entry(ending, {})])
    assert SECRET not in await everything(redis)
    assert not await redis.exists(keys.job(stream_id))
    assert not await redis.zcard(keys.QUEUE) + await redis.zcard(keys.LEASES)


# Cancel.


async def test_to_cancel_what_waits_ends_it(redis: Redis, log: Log) -> None:
    stream_id = (await log.create(REQUEST)).stream_id
    async with hearing(redis, keys.channel(stream_id)) as messages:
        assert await log.cancel(stream_id) == "cancelled"
        message = await anext(messages)
    events = await log.read(stream_id)
    assert [event.kind for event in events] == ["queued", "cancelled"]
    assert decode_batch(message) == events[1:]
    state = await log.state(stream_id)
    assert (state.status, state.place) == ("cancelled", None)
    assert state.ended_ms is not None


async def test_an_end_that_no_worker_wrote_reaches_who_has_more_than_redis(
    redis: Redis, log: Log
) -> None:
    """Viewers may have seen what Redis lost: an id among those would never come to them."""
    claim = await claimed(redis)
    await append(log, claim, 0, BEGIN)
    await lose_tail(redis, claim.stream_id, keep=2)
    await lapse(redis, claim)
    assert await log.cancel(claim.stream_id) == "cancelled"
    [end] = await log.read(claim.stream_id, Cursor(claim.attempt, 2))
    assert (end.kind, end.cursor.seq) == ("cancelled", 0)


async def test_to_cancel_what_runs_tells_the_worker_and_ends_nothing(
    redis: Redis, log: Log
) -> None:
    claim = await claimed(redis)
    await append(log, claim, 0, BEGIN)
    async with hearing(redis, keys.CONTROL) as messages:
        assert await log.cancel(claim.stream_id) == "cancelling"
        assert await anext(messages) == f"cancel {claim.stream_id}".encode()
    assert (await log.state(claim.stream_id)).status == "running"
    assert await append(log, claim, 3, [entry(TEXT, "c")]) == Appended(4, cancel_asked=True)
    assert await append(log, claim, 4, [entry(CANCELLED, {})]) == Appended(5, cancel_asked=True)


async def test_a_cancel_outlives_the_worker_that_heard_it(redis: Redis, log: Log) -> None:
    claim = await claimed(redis)
    await log.cancel(claim.stream_id)
    await redis.zadd(keys.LEASES, {claim.stream_id: 0})
    assert ends(await make_claims(redis).sweep()) == [(claim.stream_id, CANCELLED)]
    assert (await log.read(claim.stream_id))[-1].kind == CANCELLED


async def test_to_cancel_again_changes_nothing(redis: Redis, log: Log) -> None:
    waiting = (await log.create(REQUEST)).stream_id
    assert [await log.cancel(waiting) for _ in range(3)] == ["cancelled"] * 3
    assert len(await log.read(waiting)) == 2

    claim = await claimed(redis)
    assert [await log.cancel(claim.stream_id) for _ in range(3)] == ["cancelling"] * 3
    await append(log, claim, 0, [*BEGIN, *END])
    assert [await log.cancel(claim.stream_id) for _ in range(3)] == ["completed"] * 3


# How long it took.


async def ended_after(redis: Redis, log: Log, first_ms: int) -> Load:
    """What is told when the one stream has ended whose first chunk came so late."""
    claim = await claimed(redis)
    await append(log, claim, 0, BEGIN)
    created_ms = (await log.state(claim.stream_id)).created_ms
    await set_state(redis, claim.stream_id, "started_ms", created_ms + first_ms)
    await append(log, claim, 3, END)
    return await log.load()


def none_or_one(bound_ms: float) -> dict[float, int]:
    """How a histogram counts one stream that took longer than all the bounds below this one."""
    return {ms / 1000: int(ms >= bound_ms) for ms in (*BOUNDS_MS, math.inf)}


@pytest.mark.parametrize(
    ("first_ms", "bound_ms"),
    [(0, 250), (250, 250), (251, 500), (600_000, 600_000), (600_001, math.inf)],
)
async def test_what_took_no_longer_than_a_bound_is_counted_from_it_on(
    redis: Redis, log: Log, first_ms: int, bound_ms: float
) -> None:
    load = await ended_after(redis, log, first_ms)
    assert load.first_chunk == Histogram(none_or_one(bound_ms), first_ms / 1000)


async def test_the_time_to_the_end_counts_from_the_question(redis: Redis, log: Log) -> None:
    claim = await claimed(redis)
    asked_ms = (await log.state(claim.stream_id)).created_ms - 40_000
    await set_state(redis, claim.stream_id, "created_ms", asked_ms)
    for _ in range(2):
        await append(log, claim, 0, [*BEGIN, *END])  # To repeat it is harmless.
    ended_ms = (await log.state(claim.stream_id)).ended_ms or 0
    answer = (await log.load()).answer
    assert answer == Histogram(none_or_one(60_000), (ended_ms - asked_ms) / 1000)


async def test_a_stream_without_a_first_chunk_counts_by_its_end_alone(
    redis: Redis, log: Log
) -> None:
    await log.cancel((await log.create(REQUEST)).stream_id)
    load = await log.load()
    assert (load.first_chunk.within[math.inf], load.answer.within[math.inf]) == (0, 1)


async def test_a_clock_that_was_set_back_neither_stops_an_end_nor_counts_below_nothing(
    redis: Redis, log: Log
) -> None:
    claim = await claimed(redis)
    await append(log, claim, 0, BEGIN)
    created_ms = (await log.state(claim.stream_id)).created_ms
    await set_state(redis, claim.stream_id, "created_ms", created_ms + HOUR_MS)
    await append(log, claim, 3, END)
    assert (await log.state(claim.stream_id)).status == "completed"
    load = await log.load()
    assert load.first_chunk == load.answer == Histogram(none_or_one(250), 0)


def test_what_was_counted_by_bounds_of_another_version_stays_counted() -> None:
    """In every bucket of which it is known that it belongs there."""
    within, seconds = histogram({"700": 2, "1000": 1, "900000": 4, "inf": 8, "sum": 1500})
    assert (within[0.5], within[1.0], within[600.0], within[math.inf]) == (0, 3, 3, 15)
    assert seconds == 1.5


# Erase, and what is gone.


OF_NO_STREAM = {keys.WAKE, keys.SWEPT, keys.WORKERS, keys.ENDED}


@pytest.mark.parametrize("age", ["queued", "running", "ended"])
async def test_an_erased_stream_leaves_no_trace(redis: Redis, log: Log, age: str) -> None:
    stream_id = (await log.create(REQUEST, idempotency_key="k", digest="d", chat="c")).stream_id
    await log.report_viewers("api", {stream_id: 1})
    if age != "queued":
        await append(log, await claim_one(redis), 0, BEGIN + (END if age == "ended" else []))
    async with hearing(redis, keys.CONTROL) as messages:
        await log.erase(stream_id)
        assert await anext(messages) == f"erase {stream_id}".encode()
    assert {key.decode() async for key in redis.scan_iter()} <= OF_NO_STREAM


async def test_an_erased_log_stays_erased(redis: Redis, log: Log) -> None:
    claim = await claimed(redis)
    await append(log, claim, 0, BEGIN)
    await log.erase(claim.stream_id)
    for first, entries in [(0, BEGIN), (3, END), (3, BEGIN)]:
        with pytest.raises(StreamLost, match="erased"):
            await append(log, claim, first, entries)
    assert await make_claims(redis).renew([claim]) == ["lost"]
    await make_claims(redis).hand_over(claim)
    assert await make_claims(redis).sweep() == []
    assert await make_claims(redis).claim(1) == []
    assert {key.decode() async for key in redis.scan_iter()} <= OF_NO_STREAM


async def test_a_log_that_vanished_alone_is_not_begun_again(redis: Redis, log: Log) -> None:
    claim = await claimed(redis)
    await append(log, claim, 0, BEGIN)
    await redis.delete(keys.log(claim.stream_id))
    with pytest.raises(StreamLost, match="erased"):
        await append(log, claim, 3, END)
    with pytest.raises(StreamGone):
        await log.cancel(claim.stream_id)
    assert not await redis.exists(keys.log(claim.stream_id))


@pytest.mark.parametrize("gone", ["never was", "erased", "expired"])
@pytest.mark.parametrize("question", ["read", "read after", "state", "cancel", "erase"])
async def test_what_is_gone_is_said_to_be_gone(
    redis: Redis, log: Log, gone: str, question: str
) -> None:
    stream_id = new_stream_id()
    if gone != "never was":
        stream_id = (await log.create(REQUEST)).stream_id
        await append(log, await claim_one(redis), 0, BEGIN + END)
    if gone == "erased":
        await log.erase(stream_id)
    if gone == "expired":
        await redis.pexpire(keys.log(stream_id), 0)
        await redis.pexpire(keys.state(stream_id), 0)
    ask: dict[str, Any] = {
        "read": log.read,
        "read after": lambda stream_id: log.read(stream_id, Cursor(1, 0)),
        "state": log.state,
        "cancel": log.cancel,
        "erase": log.erase,
    }
    with pytest.raises(StreamGone):
        await ask[question](stream_id)
    assert await log.remaining_ms(stream_id) < 0


async def test_an_erase_in_the_midst_of_a_read_is_no_empty_log(redis: Redis, log: Log) -> None:
    stream_id = (await log.create(REQUEST)).stream_id
    # It is there when asked for, and has nothing when read.
    await redis.xtrim(keys.log(stream_id), maxlen=0, approximate=False)
    with pytest.raises(StreamGone):
        await log.read(stream_id)


# Viewers.


async def test_a_report_that_is_cut_anywhere_leaves_nothing_that_stays(
    redis_server: RedisServer,
) -> None:
    """As an API does that is killed while Redis is slow to read."""
    left = 0

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        from_redis, to_redis = await asyncio.open_unix_connection(redis_server.socket)

        async def back() -> None:
            while said := await from_redis.read(65536):
                writer.write(said)
            writer.close()

        backwards = asyncio.create_task(back())
        while left > 0 and (said := await reader.read(1)):
            left -= len(said)
            to_redis.write(said)
        to_redis.close()
        await backwards

    async with connect(redis_server.url) as redis:
        await redis.flushall()
        await make_log(redis).report_viewers("api", {new_stream_id(): 1})
    async with listening(pass_on) as port:
        for length in range(150, 700, 10):
            left = length
            async with connect(f"redis://127.0.0.1:{port}") as cut:
                log = make_log(cut)
                with suppress(RedisError):
                    await log.report_viewers("api", {new_stream_id(): 1 for _ in range(3)})
    async with connect(redis_server.url) as redis:
        notes = [key async for key in redis.scan_iter(keys.viewers("*"))]
        assert len(notes) > 1
        assert [key for key in notes if await redis.ttl(key) < 0] == []


async def test_each_process_reports_its_viewers(redis: Redis, log: Log) -> None:
    stream_id = (await log.create(REQUEST)).stream_id
    await log.report_viewers("one", {stream_id: 2})
    await log.report_viewers("two", {stream_id: 1})
    await log.report_viewers("one", {stream_id: 3})
    assert (await log.state(stream_id)).viewers == {"one": 3, "two": 1}
    assert 0 < await redis.ttl(keys.viewers(stream_id)) <= VIEWERS_SECONDS
    await log.report_viewers("one", {stream_id: 0})
    assert (await log.state(stream_id)).viewers == {"two": 1}


async def test_a_report_of_viewers_counts_for_a_minute_of_redis_own_clock(
    redis: Redis, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)  # Of a host whose clock is wrong.
    stream_id = (await log.create(REQUEST)).stream_id
    await log.report_viewers("here", {stream_id: 1})
    await reported_before(redis, stream_id, "dead", 61)
    await reported_before(redis, stream_id, "alive", 55)
    assert (await log.state(stream_id)).viewers == {"here": 1, "alive": 9}
