import re
from string import ascii_lowercase

import pytest

from relay.ids import alias_of, is_stream_id, new_stream_id

ALPHABET = ascii_lowercase + "234567"
# One that was handed out once: what a user kept must be known to every later version.
KEPT = "aaaqeayeaudaocajbifqydiob62qkqho"


def test_an_id_is_well_formed() -> None:
    for _ in range(200):
        stream_id = new_stream_id()
        assert re.fullmatch("[a-z2-7]{32}", stream_id)
        assert is_stream_id(stream_id)


def test_no_two_ids_are_alike_in_any_part() -> None:
    ids = [new_stream_id() for _ in range(500)]
    assert len(set(ids)) == 500
    assert all(len(set(column)) > 8 for column in zip(*ids, strict=True))


def test_an_id_of_an_earlier_version_is_known() -> None:
    assert is_stream_id(KEPT)


@pytest.mark.parametrize("position", range(32))
def test_one_wrong_character_is_found(position: int) -> None:
    for character in set(ALPHABET) - {KEPT[position]}:
        assert not is_stream_id(KEPT[:position] + character + KEPT[position + 1 :])


@pytest.mark.parametrize("position", range(31))
def test_two_swapped_characters_are_found(position: int) -> None:
    a, b = KEPT[position], KEPT[position + 1]
    swapped = KEPT[:position] + b + a + KEPT[position + 2 :]
    assert is_stream_id(swapped) == (a == b)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        KEPT[:-1],
        KEPT + "a",
        KEPT + "\n",
        " " + KEPT[1:],
        KEPT.upper(),
        KEPT[:-1] + "=",
        "=" * 32,
        "0" * 32,
        "a" * 32,
        "é" * 32,
        "\uff4b" * 32,
        KEPT[:8] + ":" + KEPT[9:],
        KEPT[:8] + "*" + KEPT[9:],
        KEPT[:8] + "\0" + KEPT[9:],
        "\ud83d" * 32,
    ],
)
def test_any_other_shape_is_refused(text: str) -> None:
    assert not is_stream_id(text)


def test_an_alias_is_the_same_for_ever_and_does_not_hold_the_id() -> None:
    assert alias_of(KEPT) == "257e13436c58f132d5f0c5ae"
    assert re.fullmatch("[0-9a-f]{24}", alias_of(new_stream_id()))
