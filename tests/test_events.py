import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.errors import MalformedCursor
from relay.events import (
    CANCELLED,
    COMPLETED,
    FAILED,
    QUEUED,
    STARTED,
    TEXT,
    WHOLE,
    Cursor,
    Entry,
    Event,
    Halves,
    decode_batch,
    entry,
    join_text,
    text_of,
    to_json,
)

ANY_CHARACTER = st.characters(codec=None, exclude_categories=())
ANY_TEXT = st.text(ANY_CHARACTER | st.sampled_from("\n\r\0\u2028\u2029\u0085\ud83d\ude00 "))
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
CURSORS = st.builds(Cursor, st.integers(0, 999_999_999_999), st.integers(0, 999_999_999))


@given(CURSORS)
def test_a_cursor_is_read_as_it_was_written(cursor: Cursor) -> None:
    assert Cursor.parse(str(cursor)) == cursor


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "1",
        "1-",
        "-1",
        "1-2-3",
        "01-2",
        "1-02",
        "00-0",
        "+1-2",
        "1--2",
        " 1-2",
        "1-2 ",
        "1-2\n",
        "1 - 2",
        "1_0-2",
        "1-*",
        "$",
        "0x1-2",
        "1.0-2",
        "\u0661-\u0662",
        "²-1",
        "1-2\0",
        "1234567890123-1",
        "1-1234567890",
        "1-18446744073709551616",
        "1-\ud83d",
    ],
)
def test_a_cursor_that_no_log_hands_out_is_malformed(text: str) -> None:
    with pytest.raises(MalformedCursor):
        Cursor.parse(text)


def test_cursors_are_ordered_as_numbers_first_by_attempt() -> None:
    texts = ["0-1", "1-0", "1-9", "1-10", "2-0", "10-0"]
    assert [str(cursor) for cursor in sorted(map(Cursor.parse, reversed(texts)))] == texts


@pytest.mark.parametrize(
    ("cursor", "following", "leads"),
    [
        ("0-1", "0-2", True),
        ("0-1", "1-0", True),
        ("0-1", "7-0", True),
        ("1-0", "1-1", True),
        ("1-9", "1-10", True),
        ("1-9", "2-0", True),
        ("1-0", "1-0", False),
        ("1-0", "1-2", False),
        ("1-1", "1-0", False),
        ("1-9", "2-1", False),
        ("2-0", "1-0", False),
        ("2-5", "1-6", False),
    ],
)
def test_a_cursor_leads_to_the_next_seq_or_the_start_of_a_later_attempt(
    cursor: str, following: str, leads: bool
) -> None:
    assert Cursor.parse(cursor).leads_to(Cursor.parse(following), new_start=True) is leads


KINDS = st.sampled_from([STARTED, TEXT, WHOLE, FAILED])


@given(CURSORS, st.lists(st.tuples(KINDS, ANY_JSON), max_size=4))
def test_a_batch_is_read_as_it_was_published(
    first: Cursor, values: list[tuple[str, object]]
) -> None:
    entries = [entry(kind, value) for kind, value in values]
    lines = [str(first).encode(), *(b"%s %s" % (kind.encode(), data) for kind, data in entries)]
    assert decode_batch(b"\n".join(lines)) == [
        Event(Cursor(first.attempt, first.seq + offset), kind, data)
        for offset, (kind, data) in enumerate(entries)
    ]


@given(ANY_JSON)
@example("a\nb\rc\0\u2028\u2029\u0085")
@example("\ud83d")
@example({"\udc00": ["\ud83d\n", "ü😀"]})
@example({"deep": json.loads("[" * 400 + "]" * 400), "long": 10**40, "small": 1e-7})
def test_json_is_one_line_of_utf8_that_means_the_value(value: object) -> None:
    data = to_json(value)
    assert json.loads(data) == json.loads(json.dumps(value))
    assert not {ord("\n"), ord("\r"), 0} & set(data)
    assert json.loads(data.decode("utf-8", "strict")) == json.loads(data)


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ({"a": [1, None]}, b'{"a":[1,null]}'),
        ("ü😀", '"ü😀"'.encode()),
        ("\ud83d", b'"\\ud83d"'),
        ("ü\ude00", b'"\\u00fc\\ude00"'),
        ({"a": ["\ud83d", None]}, b'{"a":["\\ud83d",null]}'),
    ],
)
def test_json_is_compact_and_escapes_only_what_it_must(value: object, data: bytes) -> None:
    assert to_json(value) == data


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([], ""),
        (["a", "", "b"], "ab"),
        (["\ud83d", "\ude00"], "😀"),
        (["a\ud83d", "", "\ude00b"], "a😀b"),
        (["\ud83d", "a"], "\ufffda"),
        (["\ude00", "\ud83d"], "\ufffd\ufffd"),
        (["x", "\ud83d"], "x\ufffd"),
    ],
)
def test_a_character_split_over_two_texts_is_healed(parts: list[str], text: str) -> None:
    assert join_text(parts) == text


@given(
    st.text(st.sampled_from("aü😀👍\n") | st.characters(codec="utf-8"), max_size=20),
    st.integers(1, 3),
)
def test_text_is_whole_again_wherever_it_was_cut(text: str, size: int) -> None:
    units = text.encode("utf-16-le")
    cuts = range(0, len(units), 2 * size)
    parts = [units[cut : cut + 2 * size].decode("utf-16-le", "surrogatepass") for cut in cuts]
    assert join_text(parts) == text


@given(st.lists(ANY_TEXT))
def test_what_cannot_be_healed_is_replaced_one_for_one(parts: list[str]) -> None:
    pairs = re.compile("[\ud800-\udbff][\udc00-\udfff]")
    whole = pairs.sub(
        lambda pair: pair[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le"),
        "".join(parts),
    )
    assert join_text(parts) == re.sub("[\ud800-\udfff]", "\ufffd", whole)


@given(st.lists(st.text("aü😀\ud800\udbff\udc00\udfff", max_size=3)))
@example(["\ud800", "", "\udc00"])
@example(["\udbff", "\udfff"])
@example(["a😀\udbff", "a"])
def test_of_a_text_in_pieces_nothing_waits_but_half_a_character_for_its_other_half(
    pieces: list[str],
) -> None:
    halves, came, told = Halves(), "", ""
    for piece in pieces:
        came += piece
        told += halves.whole(piece, last=False)
        assert told == join_text([re.sub("[\ud800-\udbff]\\Z", "", came)])
    assert told + halves.whole("", last=True) == join_text([came])


@pytest.mark.parametrize("kind", [QUEUED, STARTED, TEXT, WHOLE, COMPLETED, FAILED, CANCELLED])
def test_three_kinds_are_terminal(kind: str) -> None:
    event = Event(Cursor(1, 0), kind, b"{}")
    assert event.terminal is (kind in {"completed", "failed", "cancelled"})


@pytest.mark.parametrize(
    ("appended", "text"),
    [
        (entry(TEXT, "a\n"), "a\n"),
        (entry(WHOLE, {"chunk": {"choices": [{"index": 0, "delta": {"content": "a"}}]}}), "a"),
        (entry(WHOLE, {"chunk": {"choices": [{"delta": {"content": "a"}}]}}), "a"),
        (entry(WHOLE, {"chunk": {"choices": [{"index": 1, "delta": {"content": "b"}}]}}), ""),
        (entry(WHOLE, {"chunk": {"choices": [{"index": 0, "delta": {"content": None}}]}}), ""),
        (entry(WHOLE, {"chunk": {"choices": [{"index": 0, "delta": None}]}}), ""),
        (entry(WHOLE, {"chunk": {"choices": [{"index": 0}]}}), ""),
        (entry(WHOLE, {"chunk": {"choices": []}}), ""),
        (entry(WHOLE, {"chunk": {"choices": None}}), ""),
        (entry(WHOLE, {"chunk": {}}), ""),
        (entry(STARTED, {"attempt": 1}), ""),
        (entry(COMPLETED, {"text": "no"}), ""),
    ],
)
def test_the_text_of_an_event_is_that_of_the_first_choice(appended: Entry, text: str) -> None:
    assert text_of(Event(Cursor(1, 0), *appended)) == text
