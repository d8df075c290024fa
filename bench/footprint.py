"""What an answer takes: of Redis, of the line to a viewer, of commands (target 7)."""

import re
import time
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

from redis import Redis

from bench import systems
from bench.load import run
from bench.machine import median
from bench.report import Report, Target
from bench.upstream import question

CHUNKS = 1000
STREAMS = 100
DELAY_MS = 20
SECONDS = 4
RUNS = 3
_CALLED = re.compile(r"redis\.p?call\(\s*'(\w+)'")


@dataclass
class Footprint:
    log_kib: float
    """Of Redis' memory, for an answer of 1,000 short chunks."""
    bytes_per_chunk: float
    """Of server-sent events, for a short chunk."""
    commands_per_chunk: float
    """To Redis, by API and worker, with 100 streams of 50 chunks a second."""


def report(quick: bool) -> Report:
    found = _measure()
    return Report(
        f"what an answer takes; {CHUNKS} short chunks, and {STREAMS} streams of them at once",
        ["KiB in Redis", "bytes per event", "Redis commands per chunk"],
        {
            "relay": [
                f"{found.log_kib:.1f}",
                f"{found.bytes_per_chunk:.0f}",
                f"{found.commands_per_chunk:.3f}",
            ]
        },
        [
            Target("7 KiB in Redis", found.log_kib, 64, collapse=64),
            Target("7 bytes per event", found.bytes_per_chunk, 120, collapse=120),
            Target("7 commands per chunk", found.commands_per_chunk, 0.3, collapse=0.6),
        ],
        asdict(found),
    )


def _measure() -> Footprint:
    with systems.relay() as system, Redis.from_url(system.redis_url) as redis:
        seen = run(system.load(question(CHUNKS), CHUNKS, 1))
        [log] = redis.scan_iter("relay:*:log")
        log_bytes = redis.memory_usage(log, samples=0)
        assert isinstance(log_bytes, int)
        commands = median([_commands_per_chunk(system, redis) for _ in range(RUNS)])
        return Footprint(log_bytes / 1024, seen.whole_bytes / CHUNKS, commands)


def _commands_per_chunk(system: systems.System, redis: "Redis") -> float:
    chunks = SECONDS * 1000 // DELAY_MS
    redis.config_resetstat()
    run(system.load(question(chunks, DELAY_MS), chunks, STREAMS))
    time.sleep(0.1)  # Until the last of them has unsubscribed.
    stats: Any = redis.info("commandstats")
    # What a script calls is counted there, too; what scripts call is hardly called otherwise.
    sent = sum(
        stats[name]["calls"]
        for name in stats
        if name.removeprefix("cmdstat_").upper() not in _called_by_scripts()
    )
    return float(sent / (STREAMS * chunks))


@cache
def _called_by_scripts() -> set[str]:
    scripts = (resources.files("relay") / "lua").iterdir()
    return {name.upper() for script in scripts for name in _CALLED.findall(script.read_text())}
