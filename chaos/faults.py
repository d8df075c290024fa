"""The faults, and how long the viewers felt each."""

import asyncio
import os
import signal
import time
from bisect import bisect_left, bisect_right
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from redis.asyncio import Redis

from chaos.stack import Child, Stack, empty

SECONDS = 8.0
"""Of a fault of one process: longer than its lease of 5 s."""
REDIS_SECONDS = 3.0
DOWN_SECONDS = 1.0
LOST_SECONDS = 1.0


@dataclass(frozen=True)
class Fault:
    """`inject` returns whom it hit, when it is over: a process is back or a line mended."""

    name: str
    inject: Callable[[Stack, Redis, Random], Awaitable[str]]
    outage: bool = False
    """Nobody can recover before its end: the time to recover counts from there."""
    at_most: int | None = None
    """Times per run."""


@dataclass(frozen=True)
class Injected:
    """Times are time.monotonic()."""

    fault: Fault
    whom: str
    begun: float
    ended: float

    @property
    def reference(self) -> float:
        return self.ended if self.fault.outage else self.begun


@dataclass
class Wait:
    """One viewer's wait for the end of a stream; times are time.monotonic(), rising."""

    begun: float
    words: list[float] = field(default_factory=list)
    """When it heard of the stream: an event, that it is gone, a comment that says something."""


async def inject(fault: Fault, stack: Stack, redis: Redis, random: Random) -> Injected:
    begun = time.monotonic()
    whom = await fault.inject(stack, redis, random)
    return Injected(fault, whom, begun, time.monotonic())


def worst_recoveries(
    injected: Sequence[Injected], waits: Iterable[Wait], *, overlap: bool
) -> dict[str, float]:
    """Fault -> the longest that a viewer waited for its next word after the reference of such a
    fault and before the next one began, in seconds. With `overlap` to its very end, also beyond
    the next.

    Every silence counts, not the first alone: a SIGTERM is felt when the grace is over.
    """
    ordered = sorted(injected, key=lambda each: each.reference)
    references = [each.reference for each in ordered]
    ends = [*(each.begun for each in ordered[1:]), float("inf")]
    worst = {each.fault.name: 0.0 for each in ordered}
    for wait in waits:
        for before, after in pairwise([wait.begun, *wait.words]):
            first = max(bisect_right(references, before) - 1, 0)
            for index in range(first, bisect_left(references, after)):
                until = after if overlap else min(after, ends[index])
                silence = until - max(before, references[index])
                name = ordered[index].fault.name
                worst[name] = max(worst[name], silence)
    return worst


# One process.


def _on_one(
    whose: str, act: Callable[[Child], Awaitable[None]]
) -> Callable[[Stack, Redis, Random], Awaitable[str]]:
    async def inject_it(stack: Stack, _: Redis, random: Random) -> str:
        child = random.choice(stack.workers if whose == "worker" else stack.apis)
        await act(child)
        return child.name

    return inject_it


async def _freeze(child: Child) -> None:
    child.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(SECONDS)
    finally:
        child.send(signal.SIGCONT)


async def _cut(child: Child) -> None:
    assert child.proxy is not None  # noqa: S101
    child.proxy.cut()
    await asyncio.sleep(SECONDS)
    child.proxy.heal()


async def _half_open(child: Child) -> None:
    assert child.proxy is not None  # noqa: S101
    child.proxy.freeze()
    await asyncio.sleep(SECONDS)
    child.proxy.heal(lose_frozen=True)


async def _thaw(child: Child) -> None:
    """As _half_open, but what was held is delivered, late."""
    assert child.proxy is not None  # noqa: S101
    child.proxy.freeze()
    await asyncio.sleep(SECONDS)
    child.proxy.heal()


# Redis.


async def _kill_redis(stack: Stack, _: Redis, __: Random) -> str:
    await _restart_redis(stack)
    return "redis"


async def _take_redis_away(stack: Stack, _: Redis, __: Random) -> str:
    """Every lease lapses meanwhile, and those who hold them live."""
    await _restart_redis(stack, seconds=SECONDS)
    return "redis"


async def _lose_a_second(stack: Stack, _: Redis, __: Random) -> str:
    """What a crash of the machine does with appendfsync everysec; a killed process loses nothing,
    for its writes are with the kernel."""
    file = max(stack.redis_data.rglob("*.aof"), key=lambda path: path.stat().st_mtime)
    size = file.stat().st_size
    await asyncio.sleep(LOST_SECONDS)
    await _restart_redis(stack, lambda: os.truncate(file, size))
    return "redis"


async def _empty_redis(stack: Stack, _: Redis, __: Random) -> str:
    await _restart_redis(stack, lambda: empty(stack.redis_data))
    return "redis"


async def _restart_redis(
    stack: Stack, meanwhile: Callable[[], None] = lambda: None, seconds: float = DOWN_SECONDS
) -> None:
    stack.redis.hold()
    try:
        await stack.redis.kill()
        meanwhile()
        await asyncio.sleep(seconds)
    finally:
        stack.redis.release()
    await stack.redis.ready()


async def _freeze_redis(stack: Stack, _: Redis, __: Random) -> str:
    stack.redis.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(REDIS_SECONDS)
    finally:
        stack.redis.send(signal.SIGCONT)
    return "redis"


async def _read_only(_: Stack, redis: Redis, __: Random) -> str:
    await redis.execute_command("REPLICAOF", "127.0.0.1", "1")  # type: ignore[no-untyped-call]
    await asyncio.sleep(REDIS_SECONDS)
    await redis.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call]
    return "redis"


async def _out_of_memory(_: Stack, redis: Redis, __: Random) -> str:
    await redis.config_set("maxmemory", 1)
    await asyncio.sleep(REDIS_SECONDS)
    await redis.config_set("maxmemory", 0)
    return "redis"


# All.


async def _roll(stack: Stack, _: Redis, __: Random) -> str:
    for child in (*stack.apis, *stack.workers):
        await _terminate(child)
    return "all"


async def _terminate(child: Child) -> None:
    await child.terminate()
    await child.ready()


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("worker-kill", _on_one("worker", Child.kill)),
        Fault("worker-freeze", _on_one("worker", _freeze)),
        Fault("worker-cut", _on_one("worker", _cut)),
        Fault("worker-halfopen", _on_one("worker", _half_open)),
        Fault("worker-thaw", _on_one("worker", _thaw)),
        Fault("worker-term", _on_one("worker", _terminate)),
        Fault("api-kill", _on_one("api", Child.kill)),
        Fault("api-term", _on_one("api", _terminate)),
        Fault("api-halfopen", _on_one("api", _half_open)),
        Fault("redis-kill", _kill_redis, outage=True),
        Fault("redis-away", _take_redis_away, outage=True),
        Fault("redis-loss", _lose_a_second, outage=True),
        Fault("redis-freeze", _freeze_redis, outage=True),
        Fault("redis-readonly", _read_only, outage=True),
        Fault("redis-oom", _out_of_memory, outage=True),
        Fault("redis-empty", _empty_redis, outage=True, at_most=1),
        Fault("rolling", _roll),
    )
}
