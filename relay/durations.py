"""How long streams took: as the scripts count it in Redis, and as a histogram."""

import math
from collections.abc import Mapping
from typing import NamedTuple

BOUNDS_MS = (250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 120_000, 300_000, 600_000)
"""Of the buckets, which the scripts know from here. Each count stands in Redis under its bound, so
they can be changed: what was counted under another one stays in every bucket above that."""


class Histogram(NamedTuple):
    within: dict[float, int]
    """Seconds, in rising order to infinity -> how many took no longer."""
    seconds: float
    """All of them together."""


def histogram(counts: Mapping[str, int]) -> Histogram:
    """Of what stands in Redis: bound in ms, or `inf` -> how many took no longer, and longer than
    the bound below; `sum` -> all of them together in ms."""
    buckets = {float(bound): count for bound, count in counts.items() if bound != "sum"}
    within = {
        bound / 1000: sum(count for highest, count in buckets.items() if highest <= bound)
        for bound in (*BOUNDS_MS, math.inf)
    }
    return Histogram(within, counts.get("sum", 0) / 1000)
