"""`python -m bench`: the relay beside other ways of serving chat answers, in one run.

The process that clients talk to has a core of its own; upstream, Redis, worker and clients share
the other one. Compare what stands in one run: another machine shows other figures, and so does
this one an hour later. It fails where a ratio is so far off that something broke.
"""

import argparse
import json
import time
from pathlib import Path

from bench import (
    capacity,
    fan_out,
    footprint,
    growth,
    requests,
    slow_viewer,
    start_up,
    viewers,
)
from bench.machine import describe
from bench.report import Target, print_targets

PARTS = {
    "requests": requests.report,
    "capacity": capacity.report,
    "fan-out": fan_out.report,
    "viewers": viewers.report,
    "growth": growth.report,
    "slow-viewer": slow_viewer.report,
    "footprint": footprint.report,
    "start-up": start_up.report,
}
QUICK = ("requests", "fan-out", "footprint")


def main(parts: list[str], *, quick: bool, file: Path | None) -> int:
    print(describe())
    figures: dict[str, object] = {"machine": describe()}
    targets: list[Target] = []
    for part in parts:
        begun = time.monotonic()
        report = PARTS[part](quick)
        report.print()
        print(f"({part}: {time.monotonic() - begun:.0f} s)", flush=True)
        figures[part] = report.figures
        targets += report.targets
        if file is not None:
            file.write_text(json.dumps(figures, indent=1) + "\n")
    print_targets(targets)
    collapsed = [target.name for target in targets if target.collapsed]
    for name in collapsed:
        print(f"\n{name}: so far off that something broke")
    return 1 if collapsed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="few of them, once, in 90 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures, for bench.plots")
    arguments = parser.parse_args()
    chosen = arguments.parts or (QUICK if arguments.quick else PARTS)
    raise SystemExit(main(list(chosen), quick=arguments.quick, file=arguments.json))
