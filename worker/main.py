"""One worker process, put together."""

import asyncio
import os
import secrets
import socket
from typing import Any

import uvloop
from arq.worker import func

from relay.claim import Claims
from relay.connection import connect
from relay.descriptors import allow_every_descriptor, room_for
from relay.heap import spare_the_collector
from relay.log import JOB, Log
from relay.logs import get_logger
from relay.outbox import Outbox
from relay.settings import Settings
from worker.appender import Appender
from worker.claiming import ClaimingWorker, Job
from worker.counting import RetryCount
from worker.deliveries import Deliveries
from worker.generation import Generation
from worker.upstream import Upstream

logger = get_logger()

SPARE_DESCRIPTORS = 128
"""Beside one for each answer: what the process has at its start, 50 webhooks, the pool to Redis."""


async def generate(ctx: dict[str, Any], _stream_id: str) -> None:
    """The job. It carries the stream id alone; the request came with the claim."""
    job: Job = ctx["job"]
    settings: Settings = ctx["settings"]
    generation = Generation(
        job.claim,
        ctx["appender"],
        ctx["upstream"],
        answer_seconds=settings.answer_seconds,
    )
    job.on_cancel = generation.cancel
    job.on_lost = generation.lose
    await generation.run()


def create_worker(settings: Settings, *, handle_signals: bool = True) -> ClaimingWorker:
    """Raises ConfigurationError. Connects when it runs, not here."""
    name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    redis = connect(settings.redis_url)
    return ClaimingWorker(
        [func(generate, name=JOB)],
        settings,
        redis=redis,
        claims=Claims.configured(redis, name, settings),
        deliveries=Deliveries(Outbox(redis), settings.webhooks),
        ctx={
            "settings": settings,
            "appender": Appender(Log.configured(redis, settings)),
            "upstream": Upstream(settings, on_retry=RetryCount(redis).add),
        },
        on_shutdown=_close_upstream,
        handle_signals=handle_signals,
    )


def run(settings: Settings) -> None:
    """Work until a signal says to end. Raises ConfigurationError before anything is begun."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_work(settings))


async def _work(settings: Settings) -> None:
    allow_every_descriptor()
    # In the loop that runs: uvloop loses a signal for which it has a handler and does not run yet.
    worker = create_worker(_within_descriptors(settings))
    spare_the_collector()
    try:
        await worker.async_run()
    except asyncio.CancelledError:
        pass  # By a signal.
    finally:
        await worker.close()


def _within_descriptors(settings: Settings) -> Settings:
    """What a worker takes and has no socket for would fail, while others have room for it."""
    room = max(1, room_for(settings.concurrency, spare=SPARE_DESCRIPTORS))
    if room < settings.concurrency:
        logger.warning("concurrency_lowered", wanted=settings.concurrency, allowed=room)
    return settings.model_copy(update={"concurrency": room})


async def _close_upstream(ctx: dict[Any, Any]) -> None:
    upstream: Upstream = ctx["upstream"]
    await upstream.close()
