"""What a part of the benchmark has to say: a table, and how far its targets are met."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """A bound on a figure, mostly on a ratio of two figures of one run. A number that `name`
    begins with is that of the list in docs/performance.md."""

    name: str
    value: float
    bound: float
    at_least: bool = False
    """Otherwise it is at most."""
    collapse: float | None = None
    """A value this far off is no noise: something broke. Of ratios and counts only, and with a wide
    margin, as it fails a build."""

    @property
    def met(self) -> bool:
        return self._within(self.bound)

    @property
    def collapsed(self) -> bool:
        return self.collapse is not None and not self._within(self.collapse)

    def _within(self, bound: float) -> bool:
        return self.value >= bound if self.at_least else self.value <= bound

    def cells(self) -> list[str]:
        sign = ">=" if self.at_least else "<="
        return [f"{self.value:.3g}", f"{sign} {self.bound:g}", "yes" if self.met else "no"]


@dataclass(frozen=True)
class Report:
    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    targets: Sequence[Target] = ()
    figures: Any = field(default=None)
    """What JSON can hold, for the plots."""

    def print(self) -> None:
        print_table(self.title, self.columns, self.rows)


def print_targets(targets: Iterable[Target]) -> None:
    rows = {target.name: target.cells() for target in targets}
    print_table("targets", ["here", "bound", "met"], rows)


def print_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    lines = [["", *columns], *([name, *cells] for name, cells in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for name, *cells in lines:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *right]).rstrip(), flush=True)
