"""The wires: pure functions, table by table."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from api.feed import Wire
from api.wires import chat_completions, native, responses, text, ui_messages
from relay.chunks import Chunk, Compactor
from relay.errors import StreamGone
from relay.events import (
    COMPLETED,
    QUEUED,
    STARTED,
    TEXT,
    WHOLE,
    Cursor,
    Entry,
    Event,
    entry,
    to_json,
)

CURSOR = Cursor(1, 7)


@pytest.mark.parametrize(
    ("kind", "value", "event", "data"),
    [
        (QUEUED, {}, "queued", {}),
        (TEXT, "Hé\n\n\u2028", "chunk", {"text": "Hé\n\n\u2028"}),
        (
            STARTED,
            {"attempt": 2, "model": "m", "envelope": {"id": "x"}},
            "started",
            {"attempt": 2, "model": "m"},
        ),
        (
            WHOLE,
            {"chunk": {"choices": [{"index": 0, "delta": {"content": "Hi"}}], "usage": None}},
            "chunk",
            {"text": "Hi", "choices": [{"index": 0, "delta": {"content": "Hi"}}], "usage": None},
        ),
        (
            WHOLE,
            {"chunk": {"choices": [{"index": 1, "delta": {"content": "other"}}]}, "envelope": {}},
            "chunk",
            {"choices": [{"index": 1, "delta": {"content": "other"}}]},
        ),
        (
            WHOLE,
            {"chunk": {"choices": [{"index": 0, "delta": {"content": "Hi"}}], "text": "forged"}},
            "chunk",
            {"text": "Hi", "choices": [{"index": 0, "delta": {"content": "Hi"}}]},
        ),
        (WHOLE, {"chunk": {"text": "forged", "stream_id": "another's"}}, "chunk", {}),
        (COMPLETED, {"finish_reason": "stop"}, "completed", {"finish_reason": "stop"}),
    ],
)
def test_a_frame_has_the_cursor_the_kind_and_one_json_object(
    kind: str, value: object, event: str, data: object
) -> None:
    frame = native.encode(Event(CURSOR, kind, to_json(value))).decode()
    lines = frame.split("\n")
    assert lines[:2] == ["id: 1-7", f"event: {event}"]
    assert lines[2].startswith("data: ")
    assert json.loads(lines[2].removeprefix("data: ")) == data
    assert lines[3:] == ["", ""], "a frame is three lines and ends with an empty one"


def test_half_an_emoji_survives_until_a_client_joins_it() -> None:
    halves = [
        json.loads(native.encode(Event(CURSOR, *entry(TEXT, half))).split(b"data: ")[1])["text"]
        for half in ("\ud83d", "\ude00")
    ]
    assert "".join(halves).encode("utf-16", "surrogatepass").decode("utf-16") == "\U0001f600"


def test_a_short_text_chunk_costs_little_more_than_its_text() -> None:
    assert len(native.encode(Event(Cursor(1, 999), *entry(TEXT, " word")))) <= 60


def test_gone_is_a_failure_without_an_id() -> None:
    frame = native.encode_gone(StreamGone("It is gone."))
    assert frame == (
        b'event: failed\ndata: {"code":"stream_gone","message":"It is gone.","retryable":false}\n\n'
    )


NOTHING: Chunk = {"index": None, "id": None, "function": None}
NOWHERE: list[Chunk] = [
    {"choices": None},
    {"choices": [{"index": 0, "delta": None}]},
    {"choices": [{"index": 0, "delta": {"content": None, "tool_calls": None}}]},
    {"choices": [{"index": 0, "delta": {"content": "said", "tool_calls": [NOTHING]}}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": [NOTHING | {"function": {"name": None}}]}}]},
]


WIRES: list[Wire] = [
    native.encoder,
    text.encoder,
    chat_completions.encoder,
    chat_completions.encoder_with_usage,
    ui_messages.encoder,
    responses.Born("id", 1, "m"),
]


@pytest.mark.parametrize("wire", WIRES)
def test_a_kind_of_event_that_a_later_version_writes_is_of_no_wire_but_the_native_one(
    wire: Wire,
) -> None:
    told = wire()(Event(CURSOR, "progress", b'{"percent":50}'))
    expected = b'id: 1-7\nevent: progress\ndata: {"percent":50}\n\n'
    assert told == (expected if wire is native.encoder else b"")


@pytest.mark.parametrize("wire", WIRES)
def test_no_wire_minds_that_an_upstream_says_null_for_what_others_leave_out(wire: Wire) -> None:
    compactor, encode = Compactor(1, "m"), wire()
    entries = [each for chunk in NOWHERE for each in compactor.entries(to_json(chunk))]
    entries.append(entry(COMPLETED, {"finish_reason": None, "usage": None}))
    told = b"".join(encode(Event(CURSOR, *each)) for each in entries)
    assert told.count(b"said") > 0
    if wire is ui_messages.encoder:
        assert b":null" not in told, "its client knows none"


@pytest.mark.parametrize(
    ("usage", "told"),
    [(None, b'data: {"choices":[],"prompt_filter_results":[]}\n\n'), ({"total_tokens": 1}, b"")],
)
def test_without_usage_a_completion_lacks_the_chunk_of_it_alone(usage: object, told: bytes) -> None:
    chunk = {"choices": [], "prompt_filter_results": [], "usage": usage}
    encode = chat_completions.encoder()
    encode(Event(CURSOR, *entry(STARTED, {"envelope": {}})))
    assert encode(Event(CURSOR, *entry(WHOLE, {"chunk": chunk}))) == told


EMOJI = "\N{GRINNING FACE}".encode()


def plain(text: str) -> Entry:
    return entry(TEXT, text)


@pytest.mark.parametrize(
    ("entries", "written"),
    [
        ([plain("Hé")], "Hé".encode()),
        ([entry(WHOLE, {"chunk": {"choices": [{"delta": {"content": "Hi"}}]}})], b"Hi"),
        ([entry(WHOLE, {"chunk": {"choices": [], "usage": {}}})], b""),
        ([entry(STARTED, {}), entry(COMPLETED, {})], b""),
        ([plain("a\ud83d"), plain("\ude00b")], b"a" + EMOJI + b"b"),
        ([plain("\ud83d"), entry(WHOLE, {"chunk": {"choices": []}}), plain("\ude00")], EMOJI),
        ([plain("\ud83d"), plain("b"), plain("\ude00")], "\ufffdb\ufffd".encode()),
        ([plain("a\ud83d"), entry(COMPLETED, {})], "a\ufffd".encode()),
        ([plain("\ud83d"), entry(STARTED, {}), plain("b")], b"b"),
    ],
)
def test_text_is_the_text_of_the_first_choice_with_every_emoji_whole(
    entries: list[Entry], written: bytes
) -> None:
    encode = text.encoder()
    assert b"".join(encode(Event(CURSOR, *each)) for each in entries) == written


def whole(*deltas: Chunk) -> Chunk:
    """The message of the completion whose chunks have one of these each."""
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    events = [Event(CURSOR, WHOLE, to_json({"chunk": chunk})) for chunk in chunks]
    [choice] = chat_completions.fold(events)["choices"]
    message: Chunk = choice["message"]
    return message


def whole_calls(*pieces: Chunk) -> list[tuple[str, str, str]]:
    """Of the completion whose chunks have one of these each: id, name and arguments."""
    calls = whole(*({"tool_calls": [piece]} for piece in pieces))["tool_calls"]
    assert not any("index" in call for call in calls)
    return [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls]


CALL: list[Chunk] = [
    {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":'}},
    {"function": {"arguments": "1}"}},
]


@pytest.mark.parametrize("index", [{}, {"index": None}])
def test_calls_that_a_server_does_not_number_are_told_apart_by_their_ids(index: Chunk) -> None:
    other: Chunk = {"id": "b", "function": {"name": "g", "arguments": "{}"}}
    told = whole_calls(*(index | piece for piece in [*CALL, other]))
    assert told == [("a", "f", '{"x":1}'), ("b", "g", "{}")]


def test_a_call_keeps_its_id_where_a_server_repeats_it_as_an_empty_one() -> None:
    again: Chunk = {"id": "", "type": "", **CALL[1]}
    assert whole_calls(*({"index": 0} | piece for piece in (CALL[0], again))) == [
        ("a", "f", '{"x":1}')
    ]


def test_what_each_piece_of_reasoning_says_of_itself_stands_once_in_the_whole() -> None:
    piece: Chunk = {"type": "reasoning.text", "format": "openai-responses-v1", "index": 0}
    deltas = ({"reasoning_details": [piece | {"text": text}]} for text in ("Let ", "me see."))
    assert whole(*deltas)["reasoning_details"] == [piece | {"text": "Let me see."}]


THINKING = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]


def parts(*texts: str) -> list[Chunk]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("contents", "content"),
    [
        (["", THINKING, parts("Hel"), parts("lo"), ""], [*THINKING, *parts("Hel", "lo")]),
        (["", THINKING, "Hel", "lo"], [*THINKING, *parts("Hel", "lo")]),
        (["Hel", parts("lo")], parts("Hel", "lo")),
    ],
)
def test_a_content_of_parts_and_strings_is_told_whole_and_its_text_as_text(
    contents: list[Any], content: list[Chunk]
) -> None:
    deltas = [{"content": content} for content in contents]
    assert whole(*deltas)["content"] == content
    entries = [entry(WHOLE, {"chunk": {"choices": [{"index": 0, "delta": d}]}}) for d in deltas]
    encode = text.encoder()
    assert b"".join(encode(Event(CURSOR, *each)) for each in entries) == b"Hello"


def with_logprobs(count: int) -> list[Chunk]:
    return [{"logprobs": {"content": [{"token": "a", "logprob": -1.5}]}}] * count


def with_calls(count: int) -> list[Chunk]:
    return [{"delta": {"tool_calls": [{"index": number} for number in range(count)]}}]


@pytest.mark.parametrize("said", [with_logprobs, with_calls])
def test_an_answer_of_many_parts_is_made_whole_in_a_time_that_grows_with_their_number(
    said: Callable[[int], list[Chunk]],
) -> None:
    def seconds(count: int) -> float:
        choices = [{"index": 0, **each} for each in said(count)]
        events = [Event(CURSOR, WHOLE, to_json({"chunk": {"choices": choices}}))]
        begun = time.process_time()
        chat_completions.fold(events)
        return time.process_time() - begun

    few, many = (min(seconds(count) for _ in range(3)) for count in (500, 10_000))
    assert many < 100 * few, "twenty times as many; by the square it would be four hundred"
