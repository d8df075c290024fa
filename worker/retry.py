"""How long to wait before asking another server again. Pure."""

from collections.abc import Mapping

_DOUBLINGS = 64
"""Enough for any wait to be the longest, and few enough for a float to hold."""


def delay_before(
    number: int,
    headers: Mapping[str, str],
    chance: float,
    *,
    first_seconds: float,
    most_seconds: float,
) -> float:
    """Seconds before try `number`, 2 being the first retry; `chance` from 0 to 1.

    What the other server asks for is kept, up to `most_seconds`, and on top of either comes up to a
    fifth, so that those who were refused together do not come back together. Without its word, the
    wait doubles up to there, half of it by chance.
    """
    asked = seconds_asked(headers)
    if asked is not None:
        return min(asked, most_seconds) * (1 + 0.2 * chance)
    ceiling: float = min(first_seconds * 2 ** min(number - 2, _DOUBLINGS), most_seconds)
    return ceiling * (0.5 + 0.5 * chance)


def seconds_asked(headers: Mapping[str, str]) -> float | None:
    """What the other server asks for."""
    asked = _seconds(headers, "retry-after-ms", 0.001)
    return _seconds(headers, "retry-after", 1) if asked is None else asked


def _seconds(headers: Mapping[str, str], name: str, unit: float) -> float | None:
    try:
        seconds = float(headers[name]) * unit
    except (KeyError, ValueError):
        # Retry-After may also be a date; Azure and OpenAI send seconds.
        return None
    return seconds if 0 <= seconds < float("inf") else None
