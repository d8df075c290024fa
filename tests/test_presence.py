"""How many watch, as one process reports it to the others, over a real Redis."""

import asyncio
import math
import os
from contextlib import AsyncExitStack

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

    async with running_hub(redis) as hub, AsyncExitStack() as viewer:
        reporting = asyncio.create_task(Presence(hub, log, "p").run())
        await viewer.enter_async_context(entered(hub, stream_id))
        await lost.wait()
        if not stays:
            await viewer.aclose()
        told.set()
        await until(right)
        reporting.cancel()


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
