"""A whole way on one core (target 3): how many chunks a second it carries until one in a hundred is
later than 100 ms. Upstream and clients are on the other core."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

from bench import systems
from bench.load import run
from bench.machine import percentile
from bench.report import Report, Target
from bench.systems import ALL_ON_ONE, Cores, System
from bench.upstream import question

LATEST_MS = 100
DELAY_MS = 20
CHUNKS = 200
BEGIN = 60
ARRIVE_SECONDS = 2.0
STEPS = WIDE, NARROW = 1.5, 1.15

STARTS: dict[str, Callable[[Cores], AbstractContextManager[System]]] = {
    "direct": systems.direct,
    "tutorial": systems.tutorial,
    "relay": systems.relay,
}


@dataclass
class Carried:
    streams: int
    chunks_per_second: float
    """As they came: who lets some streams wait for others to end does not have all at once."""
    p99_ms: float


def report(quick: bool) -> Report:
    table = {name: _climb(name, BEGIN) for name in STARTS}
    relay, direct, tutorial = (
        table[name].chunks_per_second for name in ("relay", "direct", "tutorial")
    )
    return Report(
        f"all on one core: chunks/s carried until one in a hundred is {LATEST_MS} ms late",
        ["chunks/s", "delay p99, ms"],
        {
            name: [f"{carried.chunks_per_second:.0f}", f"{carried.p99_ms:.0f}"]
            for name, carried in table.items()
        },
        [
            Target("3 chunks/s on one core, by direct's", relay / direct, 2, at_least=True),
            Target("3 chunks/s on one core, by tutorial's", relay / tutorial, 3, at_least=True),
        ],
        {name: asdict(carried) for name, carried in table.items()},
    )


def _climb(name: str, streams: int) -> Carried:
    """In wide steps until it is too much, then from the last good one in narrow ones."""
    best = Carried(0, 0.0, 0.0)
    with STARTS[name](ALL_ON_ONE) as system:
        for step in STEPS:
            while (now := _carry(system, streams)).chunks_per_second > best.chunks_per_second:
                best = now
                streams = int(best.streams * step)
            streams = max(1, int(best.streams * NARROW))
    return best


def _carry(system: System, streams: int) -> Carried:
    """No chunks count if some are late or broken."""
    load = system.load(question(CHUNKS, DELAY_MS), CHUNKS, streams, arrive_seconds=ARRIVE_SECONDS)
    seen = run(load)
    p99 = percentile(seen.delays, 99)
    counts = not seen.broken and p99 <= LATEST_MS
    per_second = streams * CHUNKS / (seen.ended - seen.begun) if counts else 0.0
    return Carried(streams, per_second, p99)
