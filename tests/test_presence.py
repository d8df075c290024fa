"""How many watch, as one process reports it to the others, over a real Redis."""

import asyncio
import math
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from api import presence as module
from api.app import create_app
from api.hub import Hub
from api.presence import Presence
from relay.log import Log
from relay.settings import Settings
from tests.asgi import entered
from tests.conftest import until
from tests.test_hub import running_hub


@asynccontextmanager
async def reporting(redis: Redis, log: Log) -> AsyncIterator[Hub]:
    """A hub whose viewers are reported."""
    async with running_hub(redis) as hub:
        running = asyncio.create_task(Presence(hub, log, "p").run())
        try:
            yield hub
        finally:
            running.cancel()


@pytest.mark.parametrize(("arrives", "stays"), [(False, True), (True, False)])
async def test_the_next_report_makes_up_for_one_of_which_nothing_was_heard(
    redis: Redis, log: Log, monkeypatch: pytest.MonkeyPatch, arrives: bool, stays: bool
) -> None:
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.01)
    # A report of everything would make up for it as well, if later.
    monkeypatch.setattr(module, "REFRESH_SECONDS", math.inf)
    report, lost, told = Log.report_viewers, asyncio.Event(), asyncio.Event()

    async def unheard(log: Log, process: str, counts: dict[str, int]) -> None:
        monkeypatch.setattr(Log, "report_viewers", report)
        if arrives:
            await report(log, process, counts)
        lost.set()
        await told.wait()
        raise RedisConnectionError

    monkeypatch.setattr(Log, "report_viewers", unheard)
    stream_id = (await log.create({"messages": []})).stream_id

    async def right() -> bool:
        return (await log.state(stream_id)).viewers == ({"p": 1} if stays else {})

    async with reporting(redis, log) as hub, AsyncExitStack() as viewer:
        await viewer.enter_async_context(entered(hub, stream_id))
        await lost.wait()
        if not stays:
            await viewer.aclose()
        told.set()
        await until(right)


async def test_a_process_that_ends_since_a_part_of_it_died_counts_no_longer_either(
    settings: Settings, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.01)
    dies, killed = asyncio.Event(), asyncio.Event()

    async def die(_: Hub) -> None:
        await dies.wait()
        raise RuntimeError

    monkeypatch.setattr(Hub, "_patrol", die)
    monkeypatch.setattr(os, "kill", lambda *_: killed.set())
    stream_id = (await log.create({"messages": []})).stream_id

    async def counts() -> bool:
        return bool((await log.state(stream_id)).viewers)

    app = create_app(settings)
    async with app.router.lifespan_context(app):
        await app.state.parts.hub.enter(stream_id)
        await until(counts)
        dies.set()
        await killed.wait()
    assert not await counts()


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[dict[str, int]]:
    """Each that has arrived."""
    report, arrived = Log.report_viewers, asyncio.Queue[dict[str, int]]()

    async def noted(log: Log, process: str, counts: dict[str, int]) -> None:
        await report(log, process, counts)
        if counts:
            arrived.put_nowait(counts)

    monkeypatch.setattr(Log, "report_viewers", noted)
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.01)
    return arrived


async def test_a_report_tells_only_what_has_changed(
    redis: Redis, log: Log, reports: asyncio.Queue[dict[str, int]]
) -> None:
    one, two = [(await log.create({"messages": []})).stream_id for _ in range(2)]
    async with reporting(redis, log) as hub, asyncio.timeout(5):
        async with entered(hub, one):
            assert await reports.get() == {one: 1}
            async with entered(hub, two):
                assert await reports.get() == {two: 1}
            assert await reports.get() == {two: 0}
        assert await reports.get() == {one: 0}


async def test_viewers_that_stay_are_reported_again_though_others_come_and_go_all_the_time(
    redis: Redis,
    log: Log,
    reports: asyncio.Queue[dict[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0.1)
    watched, other = [(await log.create({"messages": []})).stream_id for _ in range(2)]
    async with reporting(redis, log) as hub, entered(hub, watched), asyncio.timeout(5):
        assert await reports.get() == {watched: 1}
        again: dict[str, int] = {}
        while watched not in again:
            async with entered(hub, other):
                again = await reports.get()
            again |= await reports.get()
