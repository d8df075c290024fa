"""More and more: streams on one worker, viewers on one API process (targets 6 and 9). A knee is
where the delay leaves the line, or the core is full."""

from dataclasses import asdict

from bench import fan_out, generations
from bench.fan_out import Pace
from bench.report import Report, Target

STREAMS = (10, 100, 300, 500, 700, 1000)
VIEWERS = [Pace(viewers, 40, 100, 1) for viewers in (10, 100, 1000, 2500, 5000)]
DELAY_MS = {100: 5, 300: 25, 500: 25}
"""Streams -> delay p99 that target 6 allows."""


def report(quick: bool) -> Report:
    streams = generations.measure(STREAMS)
    viewers = fan_out.measure(fan_out.STARTS, VIEWERS, runs=1)
    rows = {f"{made.streams} streams": made.cells() for made in streams}
    for pace, cell in viewers["relay"].items():
        rows[f"{pace.viewers} viewers"] = [
            f"{cell.p50_ms:.1f}",
            f"{cell.p99_ms:.1f}",
            f"{cell.busy:.2f}",
            f"{1e6 / cell.events_per_cpu_second:.1f}",
            "",
            str(cell.broken),
        ]
    return Report(
        "more streams of 50 chunks/s on one worker; more viewers of 10 chunks/s on one API process",
        ["delay p50, ms", "delay p99, ms", "core", "us each", "Redis us each", "missing"],
        rows,
        [
            Target(f"6 delay p99 of {made.streams} streams, ms", made.delay_p99, bound)
            for made in streams
            if (bound := DELAY_MS.get(made.streams))
        ],
        {
            "streams": [asdict(made) for made in streams],
            "viewers": {
                name: {pace.viewers: asdict(cell) for pace, cell in row.items()}
                for name, row in viewers.items()
            },
        },
    )
