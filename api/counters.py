"""What this process counts as it happens, for `GET /metrics`. Counts alone: no id, no text."""

from prometheus_client import Counter, disable_created_metrics

# A time of birth beside each count would be a second series that nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotations

REFUSED = Counter(
    "relay_refused",
    "Requests that this process refused; relay_ended counts how answers end",
    ["code"],
    registry=None,
)
for _code in ("queue_full", "redis_away", "draining", "internal"):
    REFUSED.labels(_code)  # Alerts are on these: a rate would not know of a first one without a 0.
GIVEN_UP = Counter(
    "relay_viewers_given_up",
    "Viewers of this process that took nothing for too long and were let go",
    registry=None,
)
