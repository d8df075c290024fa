"""What Python's garbage collector need not look through."""

import gc

YOUNG, ROUNDS, ALL = 5_000, 2, 1_000
"""The collector's thresholds: it looks at the new objects when they are 5,000, at those that stayed
every 2nd time, and every 1,000th time of that at everything."""


def spare_the_collector() -> None:
    """Call it when all is imported and made. What stands then stays to the end, a hundred thousand
    objects: to look through them again takes a tenth of a second, in which no chunk moves.

    So does what many streams under way hold. But only cycles need a collector, and no question or
    answer is in one, however it ends (tests/test_generation.py). So it looks at everything only
    when some ten million objects have come that did not go."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, ROUNDS, ALL)
