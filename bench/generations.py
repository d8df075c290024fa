"""How many answers one worker makes at a time, on a core of its own (targets 6 and 9): each of 50
chunks a second. The chunks are heard where an API would hear them, on their channels."""

import asyncio
import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import uvloop
from redis.asyncio import Redis

from bench import systems
from bench.machine import FRONT, REST, Process, percentile, process, python
from bench.upstream import question
from relay.connection import connect, open_connection
from relay.log import Log
from relay.pipe import Opened, Replies

DELAY_MS = 20
SECONDS = 6
BEGIN_SECONDS = 3
"""Until all have begun; these do not count."""
_STAMP = re.compile(rb'"\d+:(\d{12,}) "')


@dataclass
class Made:
    streams: int
    delay_p50: float
    """ms, from the upstream's write to the channel."""
    delay_p99: float
    busy: float
    """Of the worker's core."""
    microseconds: float
    """Of the worker's CPU for a chunk."""
    redis_microseconds: float
    missing: float
    """Of the chunks that should have come, the part that did not."""

    def cells(self) -> list[str]:
        delays = [f"{self.delay_p50:.1f}", f"{self.delay_p99:.1f}"]
        costs = [f"{self.busy:.2f}", f"{self.microseconds:.1f}", f"{self.redis_microseconds:.1f}"]
        return [*delays, *costs, f"{max(0, self.missing):.1%}"]


def measure(counts: Sequence[int]) -> list[Made]:
    return [_measure(count) for count in counts]


def _measure(count: int) -> Made:
    with ExitStack() as stack:
        model = stack.enter_context(systems.upstream())
        store, url = stack.enter_context(systems.redis(REST))
        env = systems.relay_env(url, model, concurrency=count)
        worker = stack.enter_context(process(python("worker"), FRONT, env))
        os.sched_setaffinity(0, REST)
        try:
            return uvloop.run(_watch(url, count, worker, store))
        finally:
            os.sched_setaffinity(0, FRONT | REST)


async def _watch(url: str, count: int, worker: Process, store: Process) -> Made:
    async with connect(url) as redis:
        delays: list[float] = []
        ear = _Ear(await open_connection(redis), delays)
        await _ask(redis, count)
        await asyncio.sleep(BEGIN_SECONDS)
        delays.clear()
        before = _now(worker, store)
        await asyncio.sleep(SECONDS)
        after = _now(worker, store)
        ear.close()
    seconds, cpu, redis_cpu = (b - a for a, b in zip(before, after, strict=True))
    chunks = count * seconds * 1000 / DELAY_MS
    return Made(
        count,
        percentile(delays, 50),
        percentile(delays, 99),
        cpu / seconds,
        cpu / chunks * 1e6,
        redis_cpu / chunks * 1e6,
        1 - len(delays) / chunks,
    )


async def _ask(redis: Redis, count: int) -> None:
    log = Log(redis, open_ms=600_000, retention_ms=600_000, queue_limit=2 * count)
    chunks = (BEGIN_SECONDS + SECONDS + 3) * 1000 // DELAY_MS
    request = {"messages": [{"role": "user", "content": question(chunks, DELAY_MS)}]}
    for _ in range(count):
        await log.create(request)


class _Ear(Replies):
    def __init__(self, connection: Opened, delays: list[float]) -> None:
        self._delays = delays
        super().__init__(connection)
        self.send("PSUBSCRIBE", "relay:*:channel")

    def take(self, reply: Any) -> None:
        now = time.monotonic_ns()
        if reply[0] == b"pmessage":
            self._delays += [(now - int(stamp[1])) / 1e6 for stamp in _STAMP.finditer(reply[3])]


def _now(worker: Process, store: Process) -> tuple[float, ...]:
    return time.monotonic(), worker.cpu_seconds(), store.cpu_seconds()
