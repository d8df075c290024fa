"""`python -m bench.plots FIGURES FOLDER`: SVG plots of what `python -m bench --json FIGURES` found.

Needs matplotlib (the group `plots`), which nothing else does.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "chat-relay", "svg.fonttype": "none", "font.size": 9})
SIZE = (7.4, 3.4)


def main(figures: dict[str, Any], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    axes = _axes("clients at once, each with its own answer", "chunk delay p99, ms")
    for name, cells in figures["requests"].items():
        axes.plot(
            [int(n) for n in cells], [c["delay_p99"] for c in cells.values()], "o-", label=name
        )
    _save(folder / "requests.svg")

    axes = _axes("clients at once, each with its own answer", "time to first token p50, ms")
    for name, cells in figures["requests"].items():
        axes.plot(
            [int(n) for n in cells], [c["first_p50"] for c in cells.values()], "o-", label=name
        )
    _save(folder / "first-token.svg")

    axes = _axes("streams of 50 chunks/s on one worker", "chunk delay, ms")
    streams = figures["growth"]["streams"]
    for field in ("delay_p50", "delay_p99"):
        axes.plot(
            [made["streams"] for made in streams],
            [made[field] for made in streams],
            "o-",
            label=field.replace("delay_", ""),
        )
    _save(folder / "streams.svg")

    axes = _axes("viewers of one stream of 10 chunks/s", "events per CPU second")
    for name, cells in figures["growth"]["viewers"].items():
        events = [cell["events_per_cpu_second"] for cell in cells.values()]
        axes.plot([int(viewers) for viewers in cells], events, "o-", label=name)
    _save(folder / "viewers.svg")


def _axes(x: str, y: str) -> Any:
    _, axes = plt.subplots(figsize=SIZE, layout="constrained")
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.grid(visible=True, which="major", alpha=0.3)
    return axes


def _save(file: Path) -> None:
    plt.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    plt.savefig(file, metadata={"Date": None, "Creator": None})
    plt.close()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
