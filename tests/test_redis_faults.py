"""Redis fails under the stack: nobody exits, nobody mixes anything, and it goes on by itself."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis.asyncio import Redis

from chaos.proxy import Proxy
from cli.processes import free_port
from cli.redis_server import find_redis_server
from emulator.app import Emulator
from relay import keys
from relay.connection import REPLY_SECONDS, connect
from relay.ids import new_stream_id
from relay.settings import Settings
from tests.conftest import (
    ask,
    asking,
    events_of,
    running_api,
    running_worker,
    stack_settings,
    text_of,
    until,
    watch,
)
from tests.redis_process import RedisProcess, running_redis

LEASE_SECONDS = 1.0
OUTAGE_SECONDS = 2.5
"""Of every lease in it nothing is left."""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    binary = find_redis_server(os.environ.get("RELAY_REDIS_SERVER"))
    async with running_redis(binary, tmp_path) as server:
        yield server


@pytest.fixture
def settings(server: RedisProcess, emulator_url: str) -> Settings:
    return stack_settings(server.url, emulator_url, lease_seconds=LEASE_SECONDS)


@asynccontextmanager
async def killed(server: RedisProcess) -> AsyncIterator[None]:
    await server.kill()
    yield
    await server.start()


@asynccontextmanager
async def frozen(server: RedisProcess) -> AsyncIterator[None]:
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def read_only(server: RedisProcess) -> AsyncIterator[None]:
    async with connect(server.url) as redis:
        await command(redis, "REPLICAOF", "127.0.0.1", "1")
        yield
        await command(redis, "REPLICAOF", "NO", "ONE")


@asynccontextmanager
async def full(server: RedisProcess) -> AsyncIterator[None]:
    async with connect(server.url) as redis:
        await redis.config_set("maxmemory", 1)
        yield
        await redis.config_set("maxmemory", 0)


def forget(data: Path) -> None:
    for path in data.rglob("*.aof*"):
        path.unlink()


async def command(redis: Redis, *words: str) -> Any:
    client: Any = redis
    return await client.execute_command(*words)


OUTAGES = [killed, frozen, read_only, full]


async def refused(http: httpx2.AsyncClient) -> bool:
    return (await http.post("/chat", json=asking(chunks=1))).status_code == 503


async def accepted(http: httpx2.AsyncClient) -> bool:
    return (await http.post("/chat", json=asking(chunks=1))).status_code == 202


@pytest.mark.parametrize("outage", OUTAGES)
async def test_an_answer_outlives_an_outage_of_redis_that_is_longer_than_the_lease(
    outage: Any, server: RedisProcess, settings: Settings, emulator: Emulator
) -> None:
    async with running_api(settings) as http, running_worker(settings), running_worker(settings):
        stream_id = await ask(http, chunks=40, delay_ms=100)
        watching = asyncio.Event()
        viewer = asyncio.create_task(watch(http, stream_id, watching=watching))
        await emulator.request(0)
        await watching.wait()
        async with outage(server):
            await asyncio.sleep(OUTAGE_SECONDS)
        events = await viewer
    # On one connection, from one attempt.
    assert [event.event for event in events].count("started") == 1
    assert events[-1].event == "completed"
    assert text_of(events) == "".join(f"{n} " for n in range(40))
    assert emulator.total == 1


@pytest.mark.parametrize("outage", OUTAGES)
async def test_without_redis_a_request_is_refused_at_once_and_soon_after_it_is_back_accepted(
    outage: Any, server: RedisProcess, settings: Settings
) -> None:
    async with running_api(settings) as http:
        async with outage(server):
            assert await refused(http)
            # One that hangs must have been found out first.
            await asyncio.sleep(OUTAGE_SECONDS)
            begun = time.monotonic()
            for _ in range(20):
                assert await refused(http)
            assert time.monotonic() - begun < 2
        await until(lambda: accepted(http), seconds=2)
        assert (await http.get("/readyz")).status_code == 200


@pytest.mark.parametrize("outage", OUTAGES)
@pytest.mark.parametrize("path", ["/chat", "/v1/chat/completions"])
async def test_who_leaves_while_redis_is_away_has_the_answer_cancelled_when_it_is_back(
    outage: Any,
    path: str,
    server: RedisProcess,
    settings: Settings,
    emulator: Emulator,
    said: list[Any],
) -> None:
    async def tried() -> bool:
        # A full Redis takes it at once.
        return not {"cancel_failed", "cancel_asked"}.isdisjoint(events_of(said))

    body = {**asking(chunks=1, end="stall"), **({"model": "demo"} if path != "/chat" else {})}
    headers = {"accept": "text/event-stream", "x-on-disconnect": "cancel"}
    async with running_api(settings) as http, running_worker(settings):
        asked = asyncio.create_task(http.post(path, json=body, headers=headers))
        record = await emulator.request(0)
        async with outage(server):
            asked.cancel()
            await until(tried)
        async with asyncio.timeout(5):
            await record.over.wait()
    assert record.outcome == "disconnected"


async def test_while_redis_hangs_nobody_waits_to_be_told_that_it_does(
    server: RedisProcess, settings: Settings
) -> None:
    stream, response = f"/streams/{new_stream_id()}", f"/v1/responses/resp_{new_stream_id()}"
    asked = [(method, path) for path in (stream, response) for method in ("GET", "DELETE")]
    asked += [("POST", f"{stream}/cancel"), ("POST", f"{response}/cancel")]
    asked += [("GET", "/api/chat/c/stream"), ("POST", "/api/chat/c/stop")]
    async with running_api(settings) as http, frozen(server):

        async def found_out() -> bool:
            return "relay_redis_up 0.0" in (await http.get("/metrics")).text

        await until(found_out)
        begun = time.monotonic()
        for method, path in asked:
            assert (await http.request(method, path)).status_code == 503, path
        # Of one request it would be the time limit to Redis.
        assert time.monotonic() - begun < REPLY_SECONDS


async def test_after_a_failover_everybody_hears_the_new_master_though_the_old_one_still_runs(
    tmp_path: Path, emulator_url: str
) -> None:
    binary = find_redis_server(os.environ.get("RELAY_REDIS_SERVER"))
    async with AsyncExitStack() as stack:
        ports = free_port("127.0.0.1", 0), free_port("127.0.0.1", 0)
        old, new = [
            await stack.enter_async_context(
                running_redis(binary, tmp_path / str(port), "--port", str(port))
            )
            for port in ports
        ]
        address = await stack.enter_async_context(Proxy(ports[0]))
        settings = stack_settings(f"redis://127.0.0.1:{address.port}/0", emulator_url)
        await stack.enter_async_context(running_api(settings))
        await stack.enter_async_context(running_worker(settings))
        redis = await stack.enter_async_context(connect(new.url))

        async def everybody_listens() -> bool:
            [(_, listening)] = await redis.pubsub_numsub(keys.CONTROL)
            return bool(listening == 2)

        async with read_only(old):
            address.target = ports[1]
            await until(everybody_listens)


async def test_a_redis_that_comes_back_empty_is_told_to_viewers_and_serves_again(
    server: RedisProcess, settings: Settings, tmp_path: Path, emulator: Emulator
) -> None:
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(running_api(settings))
        await stack.enter_async_context(running_worker(settings))
        stream_id = await ask(http, chunks=1000, delay_ms=50)
        watching = asyncio.Event()
        viewer = asyncio.create_task(watch(http, stream_id, watching=watching))
        record = await emulator.request(0)
        await watching.wait()
        await server.kill()
        await asyncio.to_thread(forget, tmp_path)
        await server.start()
        events = await viewer
        end: Any = events[-1].json()
        assert (events[-1].event, end["code"]) == ("failed", "stream_gone")
        assert (await http.get(f"/streams/{stream_id}")).status_code == 410
        async with asyncio.timeout(5):
            await record.over.wait()
        assert record.outcome == "disconnected"
        again = await watch(http, await ask(http, chunks=3))
        assert (again[-1].event, text_of(again)) == ("completed", "0 1 2 ")


async def test_with_its_memory_full_redis_is_no_reason_for_an_answer_to_wait(
    server: RedisProcess, settings: Settings, emulator: Emulator
) -> None:
    async with running_api(settings) as http, running_worker(settings):
        stream_id = await ask(http, chunks=10, delay_ms=50)
        await emulator.request(0)
        async with full(server), asyncio.timeout(10):
            events = await watch(http, stream_id)
            assert (await http.get(f"/streams/{stream_id}")).json()["status"] == "completed"
    assert events[-1].event == "completed"


@pytest.mark.parametrize("outage", [killed, frozen, read_only])
async def test_viewers_are_told_that_redis_is_away_or_takes_nothing_in(
    outage: Any, server: RedisProcess, settings: Settings
) -> None:
    async with running_api(settings) as http:
        stream_id = await ask(http, chunks=1)
        events = f"/streams/{stream_id}/events"
        async with http.stream("GET", events) as response, outage(server), asyncio.timeout(10):
            assert ": Redis is away" in "\n".join([line async for line in until_comment(response)])


async def test_an_event_source_that_comes_while_redis_is_away_comes_back(
    server: RedisProcess, settings: Settings, said: list[Any]
) -> None:
    """By a 503 it would be ended for good; others are told so by one. The operator is by both."""
    async with running_api(settings) as http:
        stream_id = await ask(http, chunks=1)
        async with killed(server):
            for events in (f"/streams/{stream_id}/events", f"/streams/events?ids={stream_id}"):
                told = events_of(said).count("redis_away")
                status, body = await broken_off(http, events)
                assert status == 200
                assert b"\nretry: " in body
                assert events_of(said).count("redis_away") == told + 1
                assert (await http.get(events)).status_code == 503


async def broken_off(http: httpx2.AsyncClient, url: str) -> tuple[int, bytes]:
    """What an EventSource is told in a response that does not get its proper end."""
    body = b""
    async with http.stream("GET", url, headers={"accept": "text/event-stream"}) as response:
        try:
            async for data in response.aiter_bytes():
                body += data
        except httpx2.RemoteProtocolError:
            return response.status_code, body
    pytest.fail("It ended as if that had been all.")


async def until_comment(response: httpx2.Response) -> AsyncIterator[str]:
    """The lines of a response up to the first comment that says something."""
    async for line in response.aiter_lines():
        yield line
        if line.startswith(": "):
            return
