"""The cache of finished streams."""

from api.feed import Encode, Feed
from api.finished import Finished
from relay.events import COMPLETED, QUEUED, Cursor, Event


def ended(stream_id: str, size: int = 1000) -> Feed:
    feed = Feed(stream_id)
    feed.add([Event(Cursor(0, 1), QUEUED, b"{}"), Event(Cursor(0, 2), COMPLETED, b"x" * size)])
    return feed


def tenfold() -> Encode:
    """A wire whose frames are much longer than what they tell."""
    return lambda event: 10 * event.data


def kept(finished: Finished) -> list[str]:
    return list(finished._kept)


def test_the_least_recently_used_goes_first() -> None:
    finished = Finished(3 * ended("x").bytes)
    for name in "abc":
        finished.keep(ended(name), 60)
    assert finished.get("a") is not None
    finished.keep(ended("d"), 60)
    assert kept(finished) == ["c", "a", "d"]


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    finished = Finished(1000)
    finished.keep(ended("a", 100_000), 60)
    assert kept(finished) == []


def test_nothing_outlives_its_retention() -> None:
    finished = Finished(10**6)
    finished.keep(ended("a"), -1)
    assert finished.get("a") is None
    assert kept(finished) == []


def test_nor_does_what_nobody_asks_for_again() -> None:
    finished = Finished(10**6)
    finished.keep(ended("a"), -1)
    finished.keep(ended("b"), 60)
    finished.keep(ended("c"), -1)
    finished.drop_expired()
    assert kept(finished) == ["b", "c"]
    finished.drop("b")
    finished.drop_expired()
    assert kept(finished) == []


def test_keeping_again_counts_once() -> None:
    finished = Finished(2 * ended("x").bytes)
    for _ in range(5):
        finished.keep(ended("a"), 60)
    finished.keep(ended("b"), 60)
    assert len(kept(finished)) == 2


def test_what_is_dropped_or_cleared_is_gone() -> None:
    finished = Finished(10**6)
    finished.keep(ended("a"), 60)
    finished.keep(ended("b"), 60)
    for _ in range(2):
        finished.drop("a")
        assert kept(finished) == ["b"]
    finished.clear()
    assert kept(finished) == []


def test_an_answer_counts_by_what_its_frames_are_however_little_they_tell() -> None:
    finished = Finished(5 * ended("x").bytes)
    feed = ended("a")
    feed.frames(tenfold, 0)
    finished.keep(feed, 60)
    assert kept(finished) == []


def test_frames_that_are_made_for_one_who_comes_late_drop_what_was_used_before() -> None:
    finished = Finished(9 * ended("x").bytes)
    for name in "abc":
        finished.keep(ended(name), 60)
    late = finished.get("b")
    assert late is not None
    late.frames(tenfold, 0)
    assert kept(finished) == ["c", "b"]


def test_what_is_no_longer_kept_counts_for_nothing_however_it_grows() -> None:
    finished = Finished(2 * ended("x").bytes)
    for _ in range(3):
        dropped, cleared = ended("a"), ended("b")
        for feed in (dropped, cleared):
            finished.keep(feed, 60)
        finished.drop("a")
        finished.clear()
        for feed in (dropped, cleared):
            feed.frames(tenfold, 0)
    for name in "ab":
        finished.keep(ended(name), 60)
    assert len(kept(finished)) == 2
