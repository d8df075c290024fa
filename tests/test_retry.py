import math
from functools import partial

import pytest

from worker import retry
from worker.upstream import FIRST_RETRY_SECONDS as FIRST_SECONDS
from worker.upstream import MOST_RETRY_SECONDS as MOST_SECONDS

delay_before = partial(retry.delay_before, first_seconds=FIRST_SECONDS, most_seconds=MOST_SECONDS)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7),
        ({"retry-after": "0"}, 0),
    ],
)
def test_what_the_upstream_asks_for_is_kept(headers: dict[str, str], seconds: float) -> None:
    assert delay_before(2, headers, 0) == pytest.approx(seconds)
    assert delay_before(9, headers, 0) == pytest.approx(seconds)


def test_zero_milliseconds_go_before_seconds_too() -> None:
    assert delay_before(2, {"retry-after-ms": "0", "retry-after": "7"}, 0) == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"retry-after": str(MOST_SECONDS)},
        {"retry-after": "120"},
        {"retry-after-ms": "120000"},
        {"retry-after": "1e300"},
    ],
)
def test_whoever_is_asked_to_wait_for_longer_than_the_most_comes_within_a_fifth_after_it(
    headers: dict[str, str],
) -> None:
    assert delay_before(2, headers, 0) == MOST_SECONDS
    assert delay_before(2, headers, 0.5) == pytest.approx(1.1 * MOST_SECONDS)
    assert delay_before(2, headers, 1) == pytest.approx(1.2 * MOST_SECONDS)


@pytest.mark.parametrize("asked", [0.01, 1, 16, 19])
def test_up_to_a_fifth_is_added_and_nothing_taken_from_what_was_asked(asked: float) -> None:
    headers = {"retry-after": str(asked)}
    assert delay_before(2, headers, 0.5) == pytest.approx(1.1 * asked)
    assert delay_before(2, headers, 1) == pytest.approx(1.2 * asked)


@pytest.mark.parametrize(("attempt", "times"), [(2, 1), (3, 2), (4, 4), (5, 8)])
def test_without_a_word_the_wait_doubles_half_of_it_by_chance(attempt: int, times: int) -> None:
    longest = FIRST_SECONDS * times
    assert delay_before(attempt, {}, 1) == pytest.approx(longest)
    assert delay_before(attempt, {}, 0) == pytest.approx(longest / 2)
    assert delay_before(attempt, {}, 0.5) == pytest.approx(longest * 0.75)


@pytest.mark.parametrize("attempt", [30, 5000])
def test_the_doubling_ends_at_the_most(attempt: int) -> None:
    assert delay_before(attempt, {}, 1) == MOST_SECONDS
    assert delay_before(attempt, {}, 0) == MOST_SECONDS / 2


def test_other_bounds_hold_for_both_kinds_of_wait() -> None:
    bounds = {"first_seconds": 5.0, "most_seconds": 600.0}
    assert delay_before(2, {}, 1, **bounds) == 5
    assert delay_before(3, {}, 1, **bounds) == 10
    assert delay_before(30, {}, 1, **bounds) == 600
    assert delay_before(2, {"retry-after": "601"}, 0, **bounds) == 600


@pytest.mark.parametrize(
    "nonsense", ["", "soon", "-1", "nan", "inf", "-inf", "1e999", "Wed, 21 Oct 2026 07:28:00 GMT"]
)
@pytest.mark.parametrize("name", ["retry-after", "retry-after-ms"])
def test_nonsense_in_a_header_counts_as_no_word(name: str, nonsense: str) -> None:
    delay = delay_before(2, {name: nonsense}, 1)
    assert delay == FIRST_SECONDS
    assert math.isfinite(delay)
