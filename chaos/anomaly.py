"""What a fault run may find to be wrong. Pure."""

from typing import Literal, NamedTuple

Kind = Literal[
    "lost",
    "duplicated",
    "reordered",
    "skipped",
    "spliced",
    "divergent",
    "unterminated",
    "leaked",
    "refused",
    "erred",
    "pretended",
    "exited",
    "unsettled",
]
"""The first eight are the checker's; the others are seen while the run lasts:

refused    no stream could be had
erred      an answer that the API does not have
pretended  a broken answer called complete
exited     a process ended by itself, not when it was told to, or did not come back
unsettled  streams never came to rest
"""


class Anomaly(NamedTuple):
    kind: Kind
    stream_id: str
    """Empty where it is of no stream."""
    where: str
    """`log`, `upstream request N`, `viewer NAME`, or whoever else met it."""
    what: str
    """One sentence with the evidence."""
