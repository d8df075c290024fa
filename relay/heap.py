"""What Python's garbage collector need not look through."""

import gc


def spare_the_collector() -> None:
    """Call it when all is imported and made. What stands then stays to the end, a hundred thousand
    objects: to look through them again takes a tenth of a second, in which no chunk moves."""
    gc.collect()
    gc.freeze()
