import asyncio
from importlib import resources

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cli.redis_server import RedisServer
from relay.connection import connect, script
from tests.conftest import make_claims

SCRIPTS = [
    file.name.removesuffix(".lua")
    for file in (resources.files("relay") / "lua").iterdir()
    if not file.name.startswith("_")
]


@pytest.mark.parametrize("name", SCRIPTS)
async def test_redis_understands_each_script(redis: Redis, name: str) -> None:
    registered = script(redis, name)
    assert await redis.script_load(registered.script) == registered.sha


async def test_a_redis_that_does_not_answer_is_not_waited_for() -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, connect(f"redis://127.0.0.1:{port}", answer_seconds=0.05) as redis:
        async with asyncio.timeout(2):
            with pytest.raises(RedisTimeoutError):
                await redis.ping()


async def test_a_call_does_not_wait_for_a_free_connection_for_ever(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.connection.WAIT_SECONDS", 0.05)
    async with connect(redis_server.url, connections=1) as redis, asyncio.timeout(2):
        blocking = asyncio.create_task(make_claims(redis).wake(redis, 0.2))
        await asyncio.sleep(0)  # It takes the only connection.
        with pytest.raises(RedisConnectionError, match="No connection available"):
            await redis.ping()
        await blocking
        assert await redis.ping()


async def test_a_redis_that_is_away_is_a_redis_error() -> None:
    async with connect("unix:///nowhere/redis.sock") as redis:
        with pytest.raises(RedisError):
            await redis.ping()


async def test_a_call_that_is_cancelled_ends_at_whatever_step(redis: Redis) -> None:
    """A cancel that goes lost in a call makes a shutdown wait for ever."""

    async def call_for_ever() -> None:
        while True:
            await redis.ping()

    lost = []
    for steps in range(20):
        task = asyncio.create_task(call_for_ever())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.05)
        if not done:
            lost.append(steps)
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=0.01)
    assert lost == []
