import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ReadOnlyError

from cli.redis_server import RedisServer
from relay.connection import connect
from relay.listener import Listener
from tests.conftest import events_of, redis_user
from tests.listening import listening

News = tuple[str | bytes, ...]


class Ear:
    """A listener, and what it told in order; and whether Redis was away when one was lost."""

    away: bool

    def __init__(self, redis: Redis, *channels: str) -> None:
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self.listener = Listener(
            redis,
            *channels,
            on_message=lambda channel, data: self._news.put_nowait(("heard", channel, data)),
            on_subscribed=lambda channel: self._news.put_nowait(("subscribed", channel)),
            on_lost=self._lost,
        )

    def _lost(self) -> None:
        self.away = self.listener.away
        self._news.put_nowait(("lost",))

    async def next(self, count: int = 1) -> list[News]:
        async with asyncio.timeout(5):
            return [await self._news.get() for _ in range(count)]

    async def after_losses(self) -> list[News]:
        """The next news but for lost connections: each try that failed is one."""
        while (news := await self.next()) == [("lost",)]:
            pass
        return news

    async def hears_nothing(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._news.get()
        except TimeoutError:
            return True
        return False


@asynccontextmanager
async def running(listener: Listener) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(listener.run())
    try:
        yield task
    finally:
        await end(task)


async def end(task: asyncio.Task[None]) -> int:
    """How often it had to be cancelled until it ended: once, it should be."""
    for times in range(1, 100):
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.05)
        if done:
            return times
    raise AssertionError("it does not end")


async def kill_subscribers(redis: Redis) -> None:
    await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # type: ignore[no-untyped-call]


async def subscribers(redis: Redis, channel: str) -> int:
    [(_, count)] = await redis.pubsub_numsub(channel)
    return int(count)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.listener.RECONNECT_SECONDS", 0.01)


async def test_what_is_published_after_the_subscription_is_heard(redis: Redis) -> None:
    ear = Ear(redis, "a", "b")
    async with running(ear.listener):
        assert set(await ear.next(2)) == {("subscribed", "a"), ("subscribed", "b")}
        assert ear.listener.connected
        await redis.publish("b", b"\x00\n1")
        await redis.publish("c", "not for us")
        await redis.publish("a", "2")
        assert await ear.next(2) == [("heard", "b", b"\x00\n1"), ("heard", "a", b"2")]


async def test_a_lost_connection_is_told_and_every_channel_subscribed_again(redis: Redis) -> None:
    ear = Ear(redis, "a")
    async with running(ear.listener):
        await ear.next()
        ear.listener.add("b")
        assert await ear.next() == [("subscribed", "b")]
        for _ in range(3):
            await kill_subscribers(redis)
            lost, *subscribed = await ear.next(3)
            assert lost == ("lost",)
            assert not ear.away
            assert set(subscribed) == {("subscribed", "a"), ("subscribed", "b")}
            await redis.publish("b", "x")
            assert await ear.next() == [("heard", "b", b"x")]


async def test_a_channel_can_be_added_before_the_first_connection(redis: Redis) -> None:
    ear = Ear(redis, "a")
    ear.listener.add("b")
    async with running(ear.listener):
        assert set(await ear.next(2)) == {("subscribed", "a"), ("subscribed", "b")}


async def test_a_channel_that_comes_during_the_connecting_is_not_forgotten(redis: Redis) -> None:
    ear = Ear(redis, "a")
    async with running(ear.listener):
        await asyncio.sleep(0)  # It connects now.
        assert not ear.listener.connected
        ear.listener.add("b")
        assert set(await ear.next(2)) == {("subscribed", "a"), ("subscribed", "b")}


async def test_a_channel_that_goes_during_the_connecting_is_let_go(redis: Redis) -> None:
    ear = Ear(redis, "a", "b")
    async with running(ear.listener):
        await asyncio.sleep(0)  # It connects now.
        assert not ear.listener.connected
        ear.listener.drop("b")
        ear.listener.add("last")
        while (await ear.next()) != [("subscribed", "last")]:
            pass
        assert await subscribers(redis, "b") == 0


async def test_a_dropped_channel_is_heard_no_more_and_not_subscribed_again(redis: Redis) -> None:
    ear = Ear(redis, "a", "b")
    async with running(ear.listener):
        await ear.next(2)
        ear.listener.drop("b")
        ear.listener.add("c")
        assert await ear.next() == [("subscribed", "c")]
        await redis.publish("b", "x")
        await redis.publish("a", "y")
        assert await ear.next() == [("heard", "a", b"y")]
        await kill_subscribers(redis)
        _, *subscribed = await ear.next(3)
        assert set(subscribed) == {("subscribed", "a"), ("subscribed", "c")}
        assert await subscribers(redis, "b") == 0


async def test_a_channel_may_be_added_and_dropped_while_the_connection_breaks(
    redis: Redis,
) -> None:
    ear = Ear(redis, "a", "b")
    async with running(ear.listener):
        await ear.next(2)
        await kill_subscribers(redis)
        ear.listener.add("c")
        ear.listener.drop("b")
        news = await ear.next(3)
        assert ("lost",) in news
        while await subscribers(redis, "c") + await subscribers(redis, "a") < 2:
            await ear.next()
        assert await subscribers(redis, "b") == 0


async def test_a_redis_that_is_away_is_tried_again_until_it_is_there(
    redis_server: Any, tmp_path: Path
) -> None:
    socket = tmp_path / "redis.sock"
    async with connect(f"unix://{socket}") as redis:
        ear = Ear(redis, "a")
        async with running(ear.listener):
            assert await ear.next(2) == [("lost",), ("lost",)]
            assert not ear.listener.connected
            there(socket, redis_server)
            assert await ear.after_losses() == [("subscribed", "a")]


def there(socket: Path, redis_server: RedisServer) -> None:
    """From now on Redis is where it was not."""
    socket.symlink_to(redis_server.url.removeprefix("unix://").partition("?")[0])


async def test_a_channel_that_redis_refuses_is_asked_for_again(
    redis: Redis, redis_server: RedisServer, said: list[Any]
) -> None:
    admin: Any = redis
    async with (
        redis_user(redis, redis_server, "+@all", "resetchannels") as url,
        connect(url) as ours,
    ):
        ear = Ear(ours, "a")
        async with running(ear.listener):
            assert await ear.next() == [("lost",)]
            await admin.execute_command("ACL", "SETUSER", "us", "allchannels")
            assert await ear.after_losses() == [("subscribed", "a")]
    refused = said[0]
    assert (refused["event"], refused["log_level"]) == ("channel_refused", "warning")
    assert refused["error"].startswith("NoPermissionError: ")


async def test_an_operator_reads_that_redis_was_away_and_when_it_is_back(
    redis: Redis, said: list[Any]
) -> None:
    ear = Ear(redis, "a")
    async with running(ear.listener):
        await ear.next()
        await kill_subscribers(redis)
        assert await ear.next(2) == [("lost",), ("subscribed", "a")]
    lost, back = said
    assert (lost["event"], lost["log_level"]) == ("redis_lost", "warning")
    assert lost["error"] == "the connection broke"
    assert (back["event"], back["seconds"] >= 0) == ("redis_back", True)


async def test_an_operator_reads_how_long_redis_was_away_each_time(
    redis: Redis,
    redis_server: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[Any],
) -> None:
    monkeypatch.setattr("relay.listener.RECONNECT_SECONDS", 0.1)
    socket = tmp_path / "redis.sock"
    async with connect(f"unix://{socket}") as ours:
        ear = Ear(ours, "a")
        async with running(ear.listener):
            begun = time.monotonic()
            await ear.next(4)
            there(socket, redis_server)
            await ear.after_losses()
            again = time.monotonic()
            await kill_subscribers(redis)
            assert await ear.next(2) == [("lost",), ("subscribed", "a")]
            end = time.monotonic()
    away, cut = [line["seconds"] for line in said if line["event"] == "redis_back"]
    assert 0.3 <= away <= again - begun + 0.1
    assert cut <= end - again + 0.1


async def test_a_redis_that_loads_its_data_is_away_until_it_has(said: list[Any]) -> None:
    loads = True

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            if b"PING" in data:
                writer.write(b"-LOADING it reads\r\n" if loads else b"+PONG\r\n")
            elif b"SUBSCRIBE" in data:  # While it loads, too.
                writer.write(b"*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n")

    async with listening(talk) as port, connect(f"redis://127.0.0.1:{port}") as redis:
        ear = Ear(redis, "a")
        async with running(ear.listener):
            assert await ear.next(2) == [("lost",), ("lost",)]
            assert ear.listener.away
            loads = False
            assert await ear.after_losses() == [("subscribed", "a")]
            assert not ear.listener.away
    told = events_of(said)
    assert told == ["redis_lost"] * (len(told) - 1) + ["redis_back"]


async def test_a_redis_that_falls_silent_is_given_up(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, said: list[Any]
) -> None:
    monkeypatch.setattr("relay.listener.SILENCE_SECONDS", 0.05)
    ear = Ear(redis, "a")
    async with running(ear.listener):
        await ear.next()
        await redis.client_pause(300)
        assert await ear.next() == [("lost",)]
        assert ear.away
        assert said[0]["error"] == "Redis has fallen silent"
        assert await ear.after_losses() == [("subscribed", "a")]


async def test_a_redis_that_has_nothing_to_say_is_kept(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.listener.SILENCE_SECONDS", 0.1)
    ear = Ear(redis, "a")
    async with running(ear.listener):
        await ear.next()
        assert await ear.hears_nothing(0.5)
        assert ear.listener.connected


async def test_when_it_is_cancelled_it_lets_go_of_everything(redis: Redis) -> None:
    ear = Ear(redis, "a")
    async with running(ear.listener) as task:
        await ear.next()
    assert task.cancelled()
    assert await ear.next() == [("lost",)]
    assert not ear.listener.connected
    while await subscribers(redis, "a"):
        pass


async def test_it_ends_at_whatever_step_it_is_cancelled(redis: Redis) -> None:
    times = []
    for steps in range(30):
        task = asyncio.create_task(Ear(redis, "a").listener.run())
        for _ in range(steps):
            await asyncio.sleep(0)
        times.append(await end(task))
    assert times == [1] * 30


async def fail_over(redis: Redis) -> None:
    """A write is refused, and the next one taken, as by another master."""
    admin: Any = redis
    await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        with pytest.raises(ReadOnlyError):
            await redis.delete("key")
    finally:
        await admin.execute_command("REPLICAOF", "NO", "ONE")
    await redis.delete("key")


async def test_after_a_failover_it_connects_anew_and_once(redis: Redis) -> None:
    ear = Ear(redis, "a")
    async with running(ear.listener):
        await ear.next()
        await fail_over(redis)
        ear.listener.follow()
        assert await ear.next(2) == [("lost",), ("subscribed", "a")]
        ear.listener.follow()
        await redis.publish("a", "x")
        assert await ear.next() == [("heard", "a", b"x")]


async def test_a_failover_while_no_connection_stands_changes_nothing(redis: Redis) -> None:
    ear = Ear(redis, "a")
    await fail_over(redis)
    ear.listener.follow()
    async with running(ear.listener):
        assert await ear.next() == [("subscribed", "a")]


async def test_nobody_need_care_for_losses(redis: Redis) -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    listener = Listener(redis, "a", on_message=lambda _, data: heard.put_nowait(data))
    async with running(listener), asyncio.timeout(5):
        for _ in range(2):
            while not await redis.publish("a", "x"):
                pass
            assert await heard.get() == b"x"
            await kill_subscribers(redis)
