"""What this process counts as it happens, for `GET /metrics`. Counts alone: no id, no text."""

from prometheus_client import Counter, disable_created_metrics

# A time of birth beside each count would be a second series that nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotations

REFUSED = Counter(
    "relay_refused",
    "Requests that this process answered by an error",
    ["code"],
    registry=None,
)
GIVEN_UP = Counter(
    "relay_viewers_given_up",
    "Viewers of this process that took nothing for too long and were let go",
    registry=None,
)
