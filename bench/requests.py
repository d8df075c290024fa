"""One request per viewer: so many at once, of a hundred chunks 20 ms apart (targets 1 and 2).

Time to the first token, and how long a chunk takes from the upstream's write to the client's read.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product

from bench import systems
from bench.load import Seen, run
from bench.machine import median, percentile
from bench.report import Report, Target
from bench.systems import Start, System
from bench.upstream import question

DELAY_MS = 20
CHUNKS = 100
COUNTS = (1, 20, 100, 300)
ALONE_CHUNKS, ALONE_ROUNDS = 10, 15
"""One client at a time has one first token: so more rounds, and shorter ones."""
DIRECT, UPSTREAM, RELAY = "direct", "upstream", "relay, one request"
STARTS: dict[str, Start] = {
    UPSTREAM: systems.upstream,
    DIRECT: systems.direct,
    "tutorial": systems.tutorial,
    "naive": systems.naive,
    "resumable-stream": systems.resumable_stream,
    RELAY: systems.relay,
    "relay, two requests": systems.relay_in_two,
}
ONCE = {"naive", "tutorial", "resumable-stream", "relay, two requests"}
"""No target is a ratio to these."""
LONG = (DIRECT, 300)
"""Nor to this one, and it takes long."""
TOO_SLOW = {("naive", 100), ("naive", 300), ("tutorial", 300)}
"""They take minutes, and then say no more than the ones before."""


@dataclass
class Cell:
    """Medians over the runs, in ms."""

    first_p50: float
    first_p99: float
    delay_p50: float
    delay_p99: float
    broken: int
    spread: float
    """Of the first token's p50 over the runs: the greatest by the least."""

    def __str__(self) -> str:
        first = f"{self.first_p50:.1f}/{self.first_p99:.1f}"
        return f"{first}; {self.delay_p50:.2f}/{self.delay_p99:.1f}" + ("!" if self.broken else "")


Table = dict[str, dict[int, Cell]]


def report(quick: bool) -> Report:
    names = [UPSTREAM, DIRECT, RELAY] if quick else list(STARTS)
    counts = COUNTS[:3] if quick else COUNTS
    table = _measure(names, counts, runs=1 if quick else 3)
    spread = max(cell.spread for name in (DIRECT, RELAY) for cell in table[name].values())
    return Report(
        "one request per viewer: first token p50/p99; chunk delay p50/p99, ms; c = clients at once"
        f" (of direct and relay, runs differ by up to {spread:.2f}x in the first)",
        [f"c{count}" for count in counts],
        {
            name: [str(row[count]) if count in row else "-" for count in counts]
            for name, row in table.items()
        },
        _targets(table),
        {name: {n: asdict(cell) for n, cell in row.items()} for name, row in table.items()},
    )


def _targets(table: Table) -> list[Target]:
    us, direct, upstream = table[RELAY], table[DIRECT], table[UPSTREAM]

    def above(count: int, field: str) -> float:
        return float(getattr(us[count], field) - getattr(upstream[count], field))

    def by_direct(count: int, field: str) -> float:
        return float(getattr(us[count], field) / getattr(direct[count], field))

    first = "1 first token"
    targets = [
        Target(f"{first} c1 p50, by direct's", by_direct(1, "first_p50"), 1.0, collapse=4),
        Target(f"{first} c100 p50, by direct's", by_direct(100, "first_p50"), 0.25, collapse=1),
        Target(f"{first} c20 p99, by direct's", by_direct(20, "first_p99"), 1.0, collapse=3),
        Target("2 delay c1 p50 above upstream's, ms", above(1, "delay_p50"), 0.5),
        Target("2 delay c1 p99 above upstream's, ms", above(1, "delay_p99"), 1.5),
        Target("2 delay c100 p99 above upstream's, ms", above(100, "delay_p99"), 5),
    ]
    if 300 in us:
        targets.append(Target("2 delay c300 p99, ms above upstream's", above(300, "delay_p99"), 25))
    return targets


def _measure(names: list[str], counts: tuple[int, ...], runs: int) -> Table:
    """Those that a target compares run together and take turns: what the machine does in these
    minutes falls upon all of them."""
    compared = [name for name in names if name not in ONCE]
    table = _take_turns(compared, counts, runs)
    for name in names:
        if name in ONCE:
            table |= _take_turns([name], counts, 1)
    return {name: table[name] for name in names if name in table}


def _take_turns(names: list[str], counts: tuple[int, ...], runs: int) -> Table:
    with ExitStack() as stack:
        running = {name: system for name in names if (system := _started(name, stack))}
        table: Table = {name: {} for name in running}
        for count in counts:
            here = [name for name in running if (name, count) not in TOO_SLOW]
            seen: dict[str, list[Seen]] = {name: [] for name in here}
            for name in here:
                _run(running[name], count)  # To warm up.
            for number, name in product(range(runs), here):
                if number == 0 or (name, count) != LONG:
                    seen[name].append(_run(running[name], count))
            for name in here:
                table[name][count] = _cell(seen[name])
    return table


def _started(name: str, stack: ExitStack) -> System | None:
    try:
        return stack.enter_context(STARTS[name]())
    except LookupError as missing:
        print(f"{name}: not measured, {missing}")
        return None


def _cell(seen: list[Seen]) -> Cell:
    firsts = [percentile(each.first, 50) for each in seen]
    return Cell(
        first_p50=median(firsts),
        first_p99=median([percentile(each.first, 99) for each in seen]),
        delay_p50=median([percentile(each.delays, 50) for each in seen]),
        delay_p99=median([percentile(each.delays, 99) for each in seen]),
        broken=sum(each.broken for each in seen),
        spread=max(firsts) / min(firsts),
    )


def _run(system: System, count: int) -> Seen:
    chunks, rounds = (ALONE_CHUNKS, ALONE_ROUNDS) if count == 1 else (CHUNKS, 1)
    return run(system.load(question(chunks, DELAY_MS), chunks, count, rounds=rounds))
