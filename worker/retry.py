"""How long to wait before asking the upstream again. Pure."""

from collections.abc import Mapping

FIRST_SECONDS = 0.5
MOST_SECONDS = 20.0
"""More than this nobody waits for a first word: a longer Retry-After is cut to it."""


def delay_before(attempt: int, headers: Mapping[str, str], chance: float) -> float:
    """Seconds before attempt number `attempt`, 2 being the first retry; `chance` from 0 to 1.

    What the upstream asks for is kept, and up to a fifth is added so that the workers which were
    refused together do not come back together. Without its word, the wait doubles, half of it by
    chance.
    """
    asked = _seconds(headers, "retry-after-ms", 0.001)
    if asked is None:
        asked = _seconds(headers, "retry-after", 1)
    if asked is not None:
        return min(asked * (1 + 0.2 * chance), MOST_SECONDS)
    ceiling: float = min(FIRST_SECONDS * 2 ** (attempt - 2), MOST_SECONDS)
    return ceiling * (0.5 + 0.5 * chance)


def _seconds(headers: Mapping[str, str], name: str, unit: float) -> float | None:
    try:
        seconds = float(headers[name]) * unit
    except (KeyError, ValueError):
        # Retry-After may also be a date; Azure and OpenAI send seconds.
        return None
    return seconds if 0 <= seconds < float("inf") else None
