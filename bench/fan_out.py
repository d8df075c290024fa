"""One stream, many viewers (target 4): events delivered per second of the front process'
CPU, and how long they take. Never flat out: there every server joins events, and the figure means
something else."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

from bench import systems
from bench.load import Seen, get, run
from bench.machine import REST, Meter, median, percentile, process, python
from bench.report import Report, Target
from bench.systems import Start, System
from bench.upstream import question


class Pace(NamedTuple):
    viewers: int
    chunks: int
    delay_ms: float
    every: int
    """Of a client's reads every so many-th is looked into."""

    def __str__(self) -> str:
        return f"{self.viewers} x {1000 / self.delay_ms:.0f}/s"


PACES = [Pace(100, 4000, 1, 16), Pace(1000, 200, 20, 8), Pace(1000, 600, 2, 8)]
"""The last is more than any of them can do event by event."""
ARRIVALS_PER_SECOND = 800
FIRST_MS = 1500
"""From when the last viewer is there to when the chunks begin."""

BOUNDS = [("nchan", 1.0, 0.8, None), ("resumable-stream", 4, 4, None), ("naive", 2, 2, 1.5)]
"""Peer, ratio where it is paced, ratio where it is saturated, ratio that is no noise."""
SLOW, SLOW_VIEWERS = {"naive", "resumable-stream"}, 1000
"""No more than so many: they are far enough off."""
ONCE = {*product(["naive"], PACES), ("resumable-stream", PACES[-1])}
"""So far off from their bounds that one run tells; three would take two minutes more."""
STARTS: dict[str, Start] = {
    "nchan": systems.nchan,
    "naive": systems.naive,
    "resumable-stream": partial(systems.resumable_stream, follows=True),
    "relay": systems.relay_in_two,
}


@dataclass
class Cell:
    """Medians over the runs."""

    events_per_cpu_second: float
    p50_ms: float
    p99_ms: float
    broken: int
    busy: float
    """Of the front process' core."""

    def __str__(self) -> str:
        broken = f" {self.broken} broken" if self.broken else ""
        return f"{self.events_per_cpu_second / 1000:.0f} k; {self.p99_ms:.1f}{broken}"


Table = dict[str, dict[Pace, Cell]]


def report(quick: bool) -> Report:
    names = ["naive", "relay"] if quick else list(STARTS)
    paces = PACES[1:2] if quick else PACES
    table = measure(names, paces, runs=1 if quick else 3)
    return Report(
        "one stream, many viewers: thousands of events per CPU second of the front process;"
        " delay p99, ms",
        [str(pace) for pace in paces],
        {name: [str(row[pace]) for pace in paces] for name, row in table.items()},
        _targets(table, paces),
        {
            name: {str(pace): asdict(cell) for pace, cell in row.items()}
            for name, row in table.items()
        },
    )


def _targets(table: Table, paces: Sequence[Pace]) -> list[Target]:
    targets = []
    relay = table["relay"]
    for peer, bound, saturated, collapse in BOUNDS:
        for pace in paces if peer in table else ():
            ratio = relay[pace].events_per_cpu_second / table[peer][pace].events_per_cpu_second
            wanted = saturated if pace == PACES[-1] else bound
            name = f"4 events/cpu-s {pace}, by {peer}'s"
            targets.append(Target(name, ratio, wanted, at_least=True, collapse=collapse))
    if "nchan" in table:
        p99 = relay[PACES[1]].p99_ms / table["nchan"][PACES[1]].p99_ms
        targets.append(Target(f"4 delay p99 {PACES[1]}, by nchan's", p99, 1.3))
    broken = sum(cell.broken for cell in relay.values())
    return [*targets, Target("4 viewers disconnected", broken, 0)]


def measure(names: Collection[str], paces: Sequence[Pace], runs: int) -> Table:
    """The systems take turns: what the machine does in these minutes falls upon all of them."""
    seen: dict[str, dict[Pace, list[Cell]]] = {name: defaultdict(list) for name in names}
    for pace, number, name in product(paces, range(runs), names):
        too_many = name in SLOW and pace.viewers > SLOW_VIEWERS
        often_enough = number > 0 and (name, pace) in ONCE
        if name not in seen or too_many or often_enough:
            continue
        try:
            seen[name][pace].append(_once(name, pace))
        except LookupError as missing:
            print(f"{name}: not measured, {missing}")
            del seen[name]
    return {
        name: {pace: _medians(cells) for pace, cells in row.items()} for name, row in seen.items()
    }


def _medians(cells: Sequence[Cell]) -> Cell:
    return Cell(
        median([cell.events_per_cpu_second for cell in cells]),
        median([cell.p50_ms for cell in cells]),
        median([cell.p99_ms for cell in cells]),
        sum(cell.broken for cell in cells),
        median([cell.busy for cell in cells]),
    )


def _once(name: str, pace: Pace) -> Cell:
    with STARTS[name]() as system, Meter(system.front) as meter:
        seen = _run(system, pace)
        cpu = max(0.01, meter.cpu_seconds(seen.begun, seen.ended))
    return Cell(
        len(seen.whole) * pace.chunks / cpu,
        percentile(seen.delays, 50),
        percentile(seen.delays, 99),
        seen.broken,
        cpu / (seen.ended - seen.begun),
    )


def _run(system: System, pace: Pace) -> Seen:
    viewers, chunks, delay_ms, every = pace
    arrive_seconds = viewers / ARRIVALS_PER_SECOND
    first_ms = FIRST_MS + arrive_seconds * 1000
    with ExitStack() as stack:
        load = system.load(
            question(chunks, delay_ms, first_ms), chunks, viewers, share=not system.publish
        )
        load.arrive_seconds, load.every = arrive_seconds, every
        if system.publish:
            load.request = get(system.path).decode()
            script = (chunks, delay_ms, first_ms + 500)
            argv = python("bench.publish", system.port, system.publish, *script)
            stack.enter_context(process(argv, REST))
        return run(load)
