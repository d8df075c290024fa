"""The cache of finished streams."""

from api.feed import Feed
from api.finished import Finished
from relay.events import COMPLETED, QUEUED, Cursor, Event


def ended(stream_id: str, size: int = 1000) -> Feed:
    feed = Feed(stream_id)
    feed.add([Event(Cursor(0, 1), QUEUED, b"{}"), Event(Cursor(0, 2), COMPLETED, b"x" * size)])
    return feed


def test_the_least_recently_used_goes_first() -> None:
    finished = Finished(3 * ended("x").bytes)
    for name in "abc":
        finished.keep(ended(name), 60)
    assert finished.get("a") is not None
    finished.keep(ended("d"), 60)
    assert [feed.stream_id for feed in finished.feeds()] == ["c", "a", "d"]


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    finished = Finished(1000)
    finished.keep(ended("a", 100_000), 60)
    assert finished.feeds() == []


def test_nothing_outlives_its_retention() -> None:
    finished = Finished(10**6)
    finished.keep(ended("a"), -1)
    assert finished.get("a") is None
    assert finished.feeds() == []


def test_keeping_again_counts_once() -> None:
    finished = Finished(2 * ended("x").bytes)
    for _ in range(5):
        finished.keep(ended("a"), 60)
    finished.keep(ended("b"), 60)
    assert len(finished.feeds()) == 2


def test_what_is_dropped_or_cleared_is_gone() -> None:
    finished = Finished(10**6)
    finished.keep(ended("a"), 60)
    finished.keep(ended("b"), 60)
    assert finished.drop("a") is not None
    assert finished.drop("a") is None
    finished.clear()
    assert finished.get("b") is None
