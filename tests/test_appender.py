"""The appender, on a real Redis: attempts that line up, and a log whose calls are counted."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from relay import keys
from relay.claim import Claim
from relay.errors import StreamLost
from relay.events import STARTED, TEXT, entry
from relay.log import Appended, Batch, Log
from tests.conftest import flat, make_claims, make_log, until
from worker import appender as module
from worker.appender import Appender

LIMITS = {"open_ms": 60_000, "retention_ms": 60_000, "queue_limit": 1000}


class CountedLog(Log):
    """The real log; `fail` calls do not get through, and while `shut` none returns."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis, **LIMITS)
        self.calls: list[list[int]] = []
        """How many entries each batch of each call had."""
        self.called = asyncio.Event()
        self.fail = 0
        self.open = asyncio.Event()
        self.open.set()

    async def append(self, batches: Sequence[Batch]) -> list[Appended | StreamLost | ResponseError]:
        self.called.set()
        self.calls.append([batch.length for batch in batches])
        await self.open.wait()
        if self.fail:
            self.fail -= 1
            raise RedisConnectionError("no way there")
        return await super().append(batches)


class Writer:
    """An attempt with something to say."""

    def __init__(self, claim: Claim, appender: Appender) -> None:
        self.claim = claim
        self._appender = appender
        self._entries = [entry(STARTED, {"attempt": 1})]
        self._standing = 0
        self.lost = asyncio.Event()
        self.all_stands = asyncio.Event()

    def say(self, *texts: str) -> None:
        self._entries += [entry(TEXT, text) for text in texts]
        self.all_stands.clear()
        self._appender.line_up(self)

    def batch(self, limit: int) -> Batch | None:
        entries = self._entries[self._standing :][:limit]
        claim = self.claim
        return Batch(claim.stream_id, claim.attempt, claim.owner, self._standing, flat(entries))

    def settle(self, outcome: Appended | StreamLost) -> None:
        if isinstance(outcome, StreamLost):
            self.lost.set()
            return
        self._standing = outcome.next_seq
        if self._standing < len(self._entries):
            self._appender.line_up(self)
        else:
            self.all_stands.set()

    async def stands(self) -> None:
        async with asyncio.timeout(5):
            await self.all_stands.wait()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REDIS_RETRY_SECONDS", 0.01)


@pytest.fixture
def counted(redis: Redis) -> CountedLog:
    return CountedLog(redis)


async def writers(redis: Redis, log: Log, count: int) -> list[Writer]:
    for _ in range(count):
        await make_log(redis).create({"messages": []})
    appender = Appender(log)
    return [Writer(claim, appender) for claim in await make_claims(redis).claim(count)]


async def texts(log: Log, writer: Writer) -> list[Any]:
    return [event.value() for event in await log.read(writer.claim.stream_id)][2:]


async def test_what_lines_up_during_a_call_goes_together_in_the_next(
    redis: Redis, counted: CountedLog
) -> None:
    first, *others = await writers(redis, counted, 20)
    counted.open.clear()
    first.say("a")
    await counted.called.wait()
    for writer in others:
        writer.say("a")
        writer.say("b")
    counted.open.set()
    for writer in (first, *others):
        await writer.stands()
    assert counted.calls == [[2], [3] * 19]
    assert [await texts(counted, writer) for writer in others] == [["a", "b"]] * 19


async def test_whoever_is_alone_waits_for_nothing(
    redis: Redis, counted: CountedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "APART_SECONDS", 60)
    [writer] = await writers(redis, counted, 1)
    for text in "abc":
        writer.say(text)
        await writer.stands()
    assert counted.calls == [[2], [1], [1]]


async def test_of_several_the_next_call_waits_for_what_comes_soon(
    redis: Redis, counted: CountedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "APART_SECONDS", 0.3)
    some = await writers(redis, counted, 2)
    for writer in some:
        writer.say("a")
    for writer in some:
        await writer.stands()
    for text in "bc":
        for writer in some:
            writer.say(text)
            await redis.ping()
    for writer in some:
        await writer.stands()
    assert counted.calls == [[2, 2], [2, 2]]


async def test_a_call_holds_so_many_entries_and_whoever_has_more_waits_for_the_others(
    redis: Redis, counted: CountedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ENTRIES_AT_ONCE", 10)
    long, short = await writers(redis, counted, 2)
    long.say(*map(str, range(24)))
    short.say("a")
    await long.stands()
    await short.stands()
    assert counted.calls == [[10], [2, 8], [7]]
    assert await texts(counted, long) == [str(number) for number in range(24)]


async def test_a_call_holds_so_many_bytes_of_all_together_and_whoever_has_more_waits(
    redis: Redis, counted: CountedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = await writers(redis, counted, 4)
    each = sum(len(data) for _, data in (entry(STARTED, {"attempt": 1}), entry(TEXT, "x" * 40)))
    monkeypatch.setattr(module, "BYTES_AT_ONCE", 2 * each + 1)
    for writer in some:
        writer.say("x" * 40)
    for writer in some:
        await writer.stands()
    assert counted.calls == [[2, 2, 1], [2, 1]]


async def test_calls_that_fail_are_repeated_and_nothing_stands_twice(
    redis: Redis, counted: CountedLog
) -> None:
    some = await writers(redis, counted, 3)
    counted.fail = 3
    for writer in some:
        writer.say("a", "b")
    for writer in some:
        await writer.stands()
        assert await texts(counted, writer) == ["a", "b"]


async def test_a_call_that_failed_is_told_and_not_repeated_at_once(
    redis: Redis, counted: CountedLog, monkeypatch: pytest.MonkeyPatch, said: list[Any]
) -> None:
    monkeypatch.setattr(module, "REDIS_RETRY_SECONDS", 60)
    [writer] = await writers(redis, counted, 1)
    counted.fail = 1
    writer.say("a")
    await counted.called.wait()
    for text in "bcd":
        writer.say(text)
        await redis.ping()
    assert counted.calls == [[2]]
    assert [(line["event"], line["streams"]) for line in said] == [("append_failed", 1)]
    assert "no way there" in said[0]["error"]


async def test_what_is_wrong_with_one_stream_stops_no_other(
    redis: Redis, counted: CountedLog
) -> None:
    wrong, lost, sound = await writers(redis, counted, 3)
    log = keys.log(wrong.claim.stream_id)
    await redis.rename(log, "aside")
    await redis.set(log, "no stream")
    await redis.delete(keys.state(lost.claim.stream_id))
    for writer in (wrong, lost, sound):
        writer.say("a")
    await sound.stands()
    async with asyncio.timeout(5):
        await lost.lost.wait()
    assert await texts(counted, sound) == ["a"]
    assert not wrong.all_stands.is_set()
    wrong.say("b")
    await redis.rename("aside", log)
    await wrong.stands()
    assert await texts(counted, wrong) == ["a", "b"]


async def test_what_redis_refuses_is_not_sent_again_at_once_and_nobody_else_waits_for_it(
    redis: Redis, counted: CountedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REDIS_RETRY_SECONDS", 60)
    wrong, sound = await writers(redis, counted, 2)
    await redis.set(keys.log(wrong.claim.stream_id), "no stream")
    counted.open.clear()
    wrong.say("a")
    await counted.called.wait()
    wrong.say("b")  # Before it is known that the first was refused.
    counted.open.set()
    for text in "abc":
        wrong.say(text)
        sound.say(text)
        await sound.stands()
    assert counted.calls == [[2], [2], [1], [1]]


async def test_what_is_wrong_with_many_streams_is_told_in_one_line(
    redis: Redis, counted: CountedLog, said: list[Any]
) -> None:
    some = await writers(redis, counted, 3)
    logs = [keys.log(writer.claim.stream_id) for writer in some]
    for log in logs:
        await redis.rename(log, f"aside {log}")
        await redis.set(log, "no stream")
    for writer in some:
        writer.say("a")

    async def told() -> bool:
        return bool(said)

    await until(told)
    first = said[0]
    assert (first["event"], first["streams"]) == ("append_refused", 3)
    assert "WRONGTYPE" in first["error"]
    for log in logs:
        await redis.rename(f"aside {log}", log)
    for writer in some:
        await writer.stands()


async def test_an_appender_that_dies_says_so_lets_its_attempts_go_and_serves_those_that_come(
    redis: Redis, counted: CountedLog, monkeypatch: pytest.MonkeyPatch, said: list[Any]
) -> None:
    unlucky, waiting, later = await writers(redis, counted, 3)
    counted.open.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", lambda *_: 1 / 0)
        unlucky.say("a")
        await counted.called.wait()
        waiting.say("a")
        counted.open.set()
        async with asyncio.timeout(5):
            await unlucky.lost.wait()
            await waiting.lost.wait()
    [died] = said
    assert (died["event"], type(died["exc_info"])) == ("appender_died", ZeroDivisionError)
    later.say("a")
    await later.stands()
