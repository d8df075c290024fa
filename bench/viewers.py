"""What viewers cost one API process: idle ones (target 5), and late ones (8)."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from redis import Redis

from bench import systems
from bench.load import Load, events_url, get, post, run
from bench.machine import percentile, wait_for
from bench.report import Report, Target
from bench.systems import System
from bench.upstream import question
from relay import keys

IDLE = 1000
LATE_CHUNKS = 2000
LATE = 1000


def report(quick: bool) -> Report:
    idle, latecomers = _kib_per_idle_viewer(), _late()
    return Report(
        f"viewers of one API process; {LATE_CHUNKS} chunks of a finished answer",
        ["KiB per idle viewer", "joins, p50 ms", f"{LATE} join in 1 s, ms", "reads of Redis"],
        {
            "relay": [
                f"{idle:.1f}",
                f"{latecomers.p50_ms:.1f}",
                f"{latecomers.all_ms:.0f}",
                str(latecomers.reads),
            ]
        },
        [
            Target("5 KiB per idle viewer", idle, 16),
            Target("8 joining a finished answer, p50 ms", latecomers.p50_ms, 10),
            Target(f"8 reads of Redis by {LATE} joiners", latecomers.reads, 1),
        ],
        {"kib": idle, **asdict(latecomers)},
    )


def _kib_per_idle_viewer() -> float:
    """Of API memory, over a thousand that come after a thousand others."""
    with systems.relay() as system:
        path = ask(system, question(2, first_ms=600_000))
        with _idle(system.port, path):
            before = system.front.rss_kib()
            with _idle(system.port, path):
                return (system.front.rss_kib() - before) / IDLE


@dataclass
class Late:
    p50_ms: float
    """From the connection to the last of 2,000 chunks, one viewer after the other."""
    all_ms: float
    """Until a thousand that came within a second had all of them."""
    reads: int
    """Of the log, by all those."""


def _late() -> Late:
    with systems.relay() as system, Redis.from_url(system.redis_url) as redis:
        load = _latecomers(system, redis)
        redis.config_resetstat()
        load.count, load.arrive_seconds = LATE, 1.0
        together = run(load)
        stats: Any = redis.info("commandstats")
        reads = stats["cmdstat_xrange"]["calls"]
        load = _latecomers(system, redis)
        load.rounds = 100
        alone = run(load)
        if together.broken or alone.broken:
            raise RuntimeError("some latecomers did not get it all")
    return Late(percentile(alone.whole, 50), together.wall_seconds * 1000, reads)


def _latecomers(system: System, redis: "Redis") -> Load:
    """Of an answer that nobody watched, and that is finished."""
    path = ask(system, question(LATE_CHUNKS))
    stream_id = path.split("/")[2]
    state = keys.state(stream_id)
    wait_for("the end of an answer", lambda: bool(redis.hget(state, "ended")))
    return Load(port=system.port, count=1, request=get(path).decode(), chunks=LATE_CHUNKS)


def ask(system: System, asked: str) -> str:
    """Where the events of its answer are."""
    request = post("/chat", {"messages": [{"role": "user", "content": asked}]})
    return asyncio.run(events_url(system.port, request))


@contextmanager
def _idle(port: int, path: str) -> Iterator[None]:
    """A thousand viewers that have everything there is."""
    peers = []
    for _ in range(IDLE):
        peer = socket.create_connection(("127.0.0.1", port))
        peer.sendall(get(path))
        peers.append(peer)
    for peer in peers:
        while b"event: " not in (received := peer.recv(65536)):
            assert received, "the server ended it"
    time.sleep(0.5)  # What a beginning takes and gives back is not what a viewer costs.
    try:
        yield
    finally:
        for peer in peers:
            peer.close()
