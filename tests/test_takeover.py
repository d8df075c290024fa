"""A worker, as a process of its own, fails in every way there is; another one takes over."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from chaos.proxy import Proxy
from cli.processes import free_port
from cli.redis_server import RedisServer, find_redis_server
from emulator.app import Emulator, Record
from relay.settings import Settings
from tests.conftest import (
    asking,
    running_api,
    running_worker,
    stack_settings,
    text_of,
    until,
    watch,
    worker_env,
)
from tests.redis_process import running_redis

LEASE_SECONDS = 1.5
TAKEOVER_SECONDS = LEASE_SECONDS + 1
FAILURES = ["killed", "frozen", "cut off", "half-open"]


@pytest.fixture
def port() -> int:
    return free_port("127.0.0.1", 0)


@pytest.fixture
async def server(port: int, tmp_path: Path) -> AsyncIterator[RedisServer]:
    """On a port, so that a proxy can stand before it."""
    binary = find_redis_server(os.environ.get("RELAY_REDIS_SERVER"))
    async with running_redis(
        binary, tmp_path, "--port", str(port), "--bind", "127.0.0.1"
    ) as server:
        yield server


@pytest.fixture
def settings(server: RedisServer, emulator_url: str) -> Settings:
    return stack_settings(server.url, emulator_url, lease_seconds=LEASE_SECONDS)


@dataclass
class Victim:
    process: Process
    proxy: Proxy

    def fail(self, how: str) -> None:
        match how:
            case "killed":
                self.process.kill()
            case "frozen":
                self.process.send_signal(signal.SIGSTOP)
            case "cut off":
                self.proxy.cut()
            case "half-open":
                self.proxy.freeze()

    def come_back(self, how: str) -> None:
        if how == "frozen":
            self.process.send_signal(signal.SIGCONT)
        self.proxy.heal()


@asynccontextmanager
async def victim(port: int, settings: Settings, cwd: Path) -> AsyncIterator[Victim]:
    """`python -m worker`, which reaches Redis through a proxy."""
    async with Proxy(port) as proxy:
        env = worker_env(settings) | {
            "REDIS_URL": f"redis://127.0.0.1:{proxy.port}/0",
            "RELAY_LEASE_SECONDS": str(LEASE_SECONDS),
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "worker", env=env, cwd=cwd, stderr=DEVNULL
        )
        try:
            yield Victim(process, proxy)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def data(event: httpx2.ServerSentEvent) -> Any:
    return event.json()


async def said(record: Record) -> bool:
    return record.sent >= 3


async def over(record: Record) -> None:
    async with asyncio.timeout(10):
        await record.over.wait()


async def ask(http: httpx2.AsyncClient, recovery: str, **script: object) -> str:
    body = {**asking(**script), "recovery": recovery}
    return str((await http.post("/chat", json=body)).json()["stream_id"])


@pytest.mark.parametrize("how", FAILURES)
async def test_the_job_of_a_failed_worker_is_anothers_soon_after_its_lease(
    how: str, port: int, settings: Settings, tmp_path: Path, emulator: Emulator
) -> None:
    async with running_api(settings) as http, victim(port, settings, tmp_path) as worker:
        stream_id = await ask(http, "restart", chunks=60, delay_ms=40)
        viewer = asyncio.create_task(watch(http, stream_id))
        async with asyncio.timeout(20):
            first = await emulator.request(0)
        await until(lambda: said(first))
        async with running_worker(settings):
            failed = asyncio.get_running_loop().time()
            worker.fail(how)
            async with asyncio.timeout(TAKEOVER_SECONDS + 5):
                second = await emulator.request(1)
            # The second on top is the machine's, which is not always idle.
            assert asyncio.get_running_loop().time() - failed < TAKEOVER_SECONDS + 1
            worker.come_back(how)
            # One that wakes up closes its upstream and writes nothing more.
            await over(first)
            assert first.outcome == "disconnected"
            events = await viewer
    assert second.outcome == "completed"
    assert [event.event for event in events].count("started") == 2
    assert [data(event)["attempt"] for event in events if event.event == "started"] == [1, 2]
    begun = [index for index, event in enumerate(events) if event.event == "started"][-1]
    assert text_of(events[begun:]) == "".join(f"{n} " for n in range(60))
    assert events[-1].event == "completed"
    assert emulator.total == 2


async def test_before_the_first_chunk_viewers_notice_nothing(
    port: int, settings: Settings, tmp_path: Path, emulator: Emulator
) -> None:
    async with running_api(settings) as http, victim(port, settings, tmp_path) as worker:
        stream_id = await ask(http, "fail", chunks=3, first_ms=1000)
        viewer = asyncio.create_task(watch(http, stream_id))
        async with asyncio.timeout(20):
            await emulator.request(0)
        worker.fail("killed")
        async with running_worker(settings):
            events = await viewer
    kinds = [event.event for event in events]
    assert kinds == ["queued", "started", *["chunk"] * (len(kinds) - 3), "completed"]
    assert text_of(events) == "0 1 2 "


async def test_what_must_not_begin_anew_is_told_as_interrupted(
    port: int, settings: Settings, tmp_path: Path, emulator: Emulator
) -> None:
    async with running_api(settings) as http, victim(port, settings, tmp_path) as worker:
        stream_id = await ask(http, "fail", chunks=60, delay_ms=40)
        viewer = asyncio.create_task(watch(http, stream_id))
        async with asyncio.timeout(20):
            first = await emulator.request(0)
        await until(lambda: said(first))
        async with running_worker(settings):
            worker.fail("killed")
            events = await viewer
    assert (events[-1].event, data(events[-1])["code"]) == ("failed", "interrupted")
    assert text_of(events).startswith("0 1 ")
    assert emulator.total == 1


async def test_viewers_are_told_that_no_worker_is_left(
    port: int, settings: Settings, tmp_path: Path, emulator: Emulator
) -> None:
    async with running_api(settings) as http, victim(port, settings, tmp_path) as worker:
        stream_id = await ask(http, "restart", chunks=60, delay_ms=40)
        async with asyncio.timeout(20):
            await emulator.request(0)
        events = f"/streams/{stream_id}/events"
        async with asyncio.timeout(LEASE_SECONDS + 8), http.stream("GET", events) as response:
            worker.fail("killed")
            async for line in response.aiter_lines():
                if line.startswith(": no worker is running"):
                    return
    pytest.fail("the connection ended without a word")
