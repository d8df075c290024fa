"""The codec alone, over all that an upstream may say; the SDK's own types and accumulator judge."""

import json
from typing import Any

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from api.wires.responses import Born, after, fold
from emulator.answers import Answer
from emulator.script import Script
from relay.chunks import Chunk, Compactor
from relay.events import CANCELLED, COMPLETED, FAILED, QUEUED, Cursor, Entry, Event, entry, to_json
from relay.ids import new_stream_id
from tests.corpus import CORPUS

BORN = Born(new_stream_id(), 1_700_000_000, "demo")
SDK_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
BIRTH = Event(Cursor(0, 1), *entry(QUEUED, {}))
END = entry(COMPLETED, {"finish_reason": "stop", "usage": None})


def said(fields: Chunk, asked: Chunk | None = None) -> list[Entry]:
    """An attempt's entries, to the end, for what the emulator says by this script."""
    script = Script(**fields)
    answer = Answer(script, {"messages": [], **(asked or {})}, azure=True, number=1, model="demo")
    compactor, entries = Compactor(1, "demo"), []
    for line in b"".join(piece for _, piece, _ in answer.steps()).split(b"\n\n"):
        if line and line != b"data: [DONE]":
            entries += compactor.entries(line.removeprefix(b"data: "))
    end = {"finish_reason": compactor.finish_reason, "usage": compactor.usage}
    return [*entries, entry(COMPLETED, {**end, **compactor.summary()})]


def deltas(*each: Chunk) -> list[Entry]:
    """An attempt's entries, without its end, of which each chunk has one of these deltas."""
    compactor, entries = Compactor(1, "demo"), []
    for delta in each:
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        entries += compactor.entries(to_json({"id": "c", "model": "m", "choices": [choice]}))
    return entries


def log(*attempts: list[Entry]) -> list[Event]:
    return [BIRTH] + [
        Event(Cursor(number, seq), *each)
        for number, entries in enumerate(attempts, 1)
        for seq, each in enumerate(entries)
    ]


def frames(events: list[Event]) -> list[Any]:
    encode = BORN()
    body = b"".join(encode(event) for event in events)
    told = []
    for frame in body.decode().split("\n\n")[:-1]:
        kind, data = frame.split("\n")
        told.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {told[-1]['type']}"
    return told


def kinds(told: list[Any]) -> list[str]:
    """Their types; of equal ones in a row the first."""
    each = [frame["type"].removeprefix("response.") for frame in told]
    return [kind for i, kind in enumerate(each) if i == 0 or kind != each[i - 1]]


@pytest.mark.parametrize("name", CORPUS)
def test_each_frame_is_one_that_the_sdk_knows_and_they_are_numbered_without_a_gap(
    name: str,
) -> None:
    told = frames(log(said(*CORPUS[name])))
    for frame in told:
        SDK_EVENT.validate_python(frame)
    assert [frame["sequence_number"] for frame in told] == list(range(len(told)))
    assert kinds(told)[:3] == ["created", "queued", "in_progress"]


@pytest.mark.parametrize("name", CORPUS)
def test_the_deltas_add_up_to_what_is_told_when_they_are_done_and_to_the_response(
    name: str,
) -> None:
    events = log(said(*CORPUS[name]))
    told = frames(events)
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    grown: dict[int, str] = {}
    for frame in told:
        state.handle_event(SDK_EVENT.validate_python(frame))
        if frame["type"].endswith(".delta"):
            grown[frame["output_index"]] = grown.get(frame["output_index"], "") + frame["delta"]
    last = told[-1]["response"]
    assert list(map(healed, grown.values())) == [text_of(item) for item in last["output"]]
    assert last == fold(BORN, events)
    done = [frame["item"] for frame in told if frame["type"] == "response.output_item.done"]
    assert last["output"] == done


def healed(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")


def text_of(item: Chunk) -> str:
    if item["type"] == "function_call":
        return str(item["arguments"])
    return "".join(part.get("text", part.get("refusal")) for part in item["content"])


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("plain", "completed", None),
        ("a tool call in pieces", "completed", None),
        ("stopped by length", "incomplete", "max_output_tokens"),
        ("stopped by the filter", "incomplete", "content_filter"),
        ("a late filter that blocks", "incomplete", "content_filter"),
        ("empty", "completed", None),
    ],
)
def test_the_last_frame_says_how_it_ended(name: str, status: str, reason: str | None) -> None:
    last = frames(log(said(*CORPUS[name])))[-1]
    assert (last["type"], last["response"]["status"]) == (f"response.{status}", status)
    assert last["response"]["incomplete_details"] == ({"reason": reason} if reason else None)
    assert {item["status"] for item in last["response"]["output"]} <= {status}


def test_a_message_is_told_in_openais_order() -> None:
    told = kinds(frames(log(said({"chunks": 3}))))[3:]
    assert told == [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


def test_pieces_of_two_calls_that_come_in_turn_stay_apart() -> None:
    pieces = [
        {"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x":'}},
        {"index": 1, "id": "b", "function": {"name": "g", "arguments": "[1,"}},
        {"index": 0, "function": {"arguments": "1}"}},
        {"index": 1, "function": {"arguments": "2]"}},
    ]
    entries = deltas(*({"tool_calls": [piece]} for piece in pieces))
    output = frames(log([*entries, END]))[-1]["response"]["output"]
    calls = [(item["call_id"], item["name"], item["arguments"]) for item in output]
    assert calls == [("a", "f", '{"x":1}'), ("b", "g", "[1,2]")]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_an_item_of_its_own_before_the_message(name: str) -> None:
    told = frames(log([*deltas({name: "Hm."}, {"content": "Yes."}), END]))
    for frame in told:
        SDK_EVENT.validate_python(frame)
    output = told[-1]["response"]["output"]
    assert [(item["type"], text_of(item)) for item in output] == [
        ("reasoning", "Hm."),
        ("message", "Yes."),
    ]


CALL = {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize("other", [{"content": "Yes."}, {"refusal": "No."}, CALL])
def test_a_thought_is_over_when_something_else_begins_and_a_later_one_is_another_item(
    other: Chunk,
) -> None:
    thoughts: list[Chunk] = [{"reasoning": "H"}, {"reasoning": "m."}]
    events = log([*deltas(*thoughts, other, {"reasoning": "Oh."}), END])
    told = frames(events)
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    for frame in told:
        state.handle_event(SDK_EVENT.validate_python(frame))
    first = next(frame for frame in told if frame["type"] == "response.output_item.done")
    assert (first["item"]["status"], text_of(first["item"])) == ("completed", "Hm.")
    following = told[told.index(first) + 1]
    assert (following["type"], following["output_index"]) == ("response.output_item.added", 1)
    thought, _, later = told[-1]["response"]["output"]
    assert thought == first["item"]
    assert (later["type"], text_of(later)) == ("reasoning", "Oh.")
    statuses = [item["status"] for item in fold(BORN, events[:-1])["output"]]
    assert statuses == ["completed", "in_progress", "in_progress"]


def test_a_thought_that_was_over_stays_so_when_the_answer_fails() -> None:
    failed = entry(FAILED, {"code": "interrupted", "message": "Sorry.", "retryable": False})
    told = frames(log([*deltas({"reasoning": "Hm."}, {"content": "Yes"}), failed]))
    statuses = [item["status"] for item in told[-1]["response"]["output"]]
    assert statuses == ["completed", "incomplete"]
    done = [frame for frame in told if frame["type"] == "response.output_item.done"]
    assert [frame["output_index"] for frame in done] == [0, 1]


def test_a_content_that_is_no_text_is_passed_over() -> None:
    told = frames(log([*deltas({"content": [{"type": "thinking"}]}, {"content": "Yes."}), END]))
    output = told[-1]["response"]["output"]
    assert [(item["type"], text_of(item)) for item in output] == [("message", "Yes.")]


@pytest.mark.parametrize("index", [{}, {"index": None}])
def test_calls_that_a_server_does_not_number_are_told_apart_by_their_ids(index: Chunk) -> None:
    pieces: list[Chunk] = [
        {"id": "a", "function": {"name": "f", "arguments": '{"x":'}},
        {"function": {"arguments": "1}"}},
        {"id": "b", "function": {"name": "g", "arguments": "{}"}},
    ]
    told = frames(log([*deltas(*({"tool_calls": [index | piece]} for piece in pieces)), END]))
    output = told[-1]["response"]["output"]
    calls = [(item["call_id"], item["name"], item["arguments"]) for item in output]
    assert calls == [("a", "f", '{"x":1}'), ("b", "g", "{}")]


def test_a_refusal_after_text_is_a_second_part_of_the_message() -> None:
    told = frames(log([*deltas({"content": "Well."}, {"refusal": "No."}), END]))
    [message] = told[-1]["response"]["output"]
    assert [part["type"] for part in message["content"]] == ["output_text", "refusal"]
    [delta] = [frame for frame in told if frame["type"] == "response.refusal.delta"]
    assert delta["content_index"] == 1


def test_each_part_and_each_call_is_told_whole_and_in_its_place_when_it_is_done() -> None:
    call = {"index": 0, "function": {"name": "f", "arguments": '{"x":'}}  # Some give it no id.
    rest = {"index": 0, "function": {"arguments": "1}"}}
    calls: list[Chunk] = [{"tool_calls": [piece]} for piece in (call, rest)]
    grown: dict[str, str] = {}
    done: dict[str, str] = {}
    for frame in frames(log([*deltas({"content": "Well."}, {"refusal": "No."}, *calls), END])):
        SDK_EVENT.validate_python(frame)
        kind, _, step = frame["type"].rpartition(".")
        place = f"{kind} {frame.get('item_id')} {frame.get('content_index')}"
        if step == "delta":
            grown[place] = grown.get(place, "") + frame["delta"]
        elif step == "added":
            grown[place] = ""
        elif step == "done":
            done[place] = "".join(frame.get(name, "") for name in ("text", "refusal", "arguments"))
    assert done == grown
    assert {*done.values()} == {"Well.", "No.", '{"x":1}', ""}


def test_of_several_choices_which_other_apis_can_ask_for_the_response_is_the_first() -> None:
    choices = [{"index": i, "delta": {"content": text}} for i, text in enumerate(["Yes.", "No."])]
    entries = Compactor(1, "demo").entries(to_json({"id": "c", "model": "m", "choices": choices}))
    [message] = fold(BORN, log([*entries, END]))["output"]
    assert text_of(message) == "Yes."


def test_a_new_attempt_closes_the_items_of_the_last_and_none_is_ever_spliced() -> None:
    first = deltas({"content": "No"}, {"tool_calls": [{"index": 0, "id": "a", "function": {}}]})
    events = log(first, said({"chunks": 2}))
    told = frames(events)
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    for frame in told:
        state.handle_event(SDK_EVENT.validate_python(frame))
    done = [frame["item"] for frame in told if frame["type"] == "response.output_item.done"]
    assert [item["status"] for item in done] == ["incomplete", "incomplete", "completed"]
    assert len({item["id"] for item in done}) == 3
    [message] = told[-1]["response"]["output"]
    assert (message["id"], text_of(message)) == (done[2]["id"], "0 1 ")
    begun = [index for index, frame in enumerate(told) if "in_progress" in frame["type"]]
    assert len(begun) == 2
    assert told[begun[1]]["response"]["output"] == []


def test_the_numbers_before_an_event_do_not_depend_on_what_follows() -> None:
    events = log(deltas({"content": "a"}, {"content": "b"}), said(*CORPUS["parallel tools"]))
    whole = frames(events)
    for upto in range(len(events)):
        told = frames(events[:upto])
        assert told == whole[: len(told)]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("upstream_rate_limited", "rate_limit_exceeded"),
        ("content_filter", "invalid_prompt"),
        ("interrupted", "server_error"),
    ],
)
def test_a_failure_is_told_in_the_codes_of_the_api_with_ours_beside(code: str, told: str) -> None:
    failed = entry(FAILED, {"code": code, "message": "Sorry.", "retryable": False})
    last = frames(log([*deltas({"content": "a"}), failed]))[-1]
    SDK_EVENT.validate_python(last)
    assert last["type"] == "response.failed"
    response = last["response"]
    assert response["status"] == "failed"
    assert response["error"] == {"code": told, "message": "Sorry.", "type": code}
    assert [item["status"] for item in response["output"]] == ["incomplete"]


def test_the_code_of_the_model_service_goes_before_ours() -> None:
    """Programs match on it."""
    failed = {"code": "upstream_refused", "message": "Sorry.", "retryable": False}
    upstream = {"code": "context_length_exceeded", "param": "messages"}
    [*_, last] = frames(log([entry(FAILED, {**failed, "upstream": upstream})]))
    assert last["response"]["error"]["code"] == "context_length_exceeded"
    [*_, last] = frames(log([entry(FAILED, {**failed, "upstream": {"param": "messages"}})]))
    assert last["response"]["error"]["code"] == "invalid_prompt"


def test_a_cancelled_response_keeps_what_was_said_and_has_the_status_of_its_own() -> None:
    last = frames(log([*deltas({"content": "a"}), entry(CANCELLED, {})]))[-1]
    SDK_EVENT.validate_python(last)
    response = last["response"]
    assert (last["type"], response["status"]) == ("response.incomplete", "cancelled")
    assert [text_of(item) for item in response["output"]] == ["a"]


def test_an_end_before_the_first_chunk_is_told_after_the_birth() -> None:
    told = frames(log([entry(CANCELLED, {})]))
    assert kinds(told) == ["created", "queued", "incomplete"]


def test_usage_has_the_names_of_the_api() -> None:
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    end = entry(COMPLETED, {"finish_reason": "stop", "usage": usage})
    assert fold(BORN, log([*deltas({"content": "a"}), end]))["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 12,
    }


@pytest.mark.parametrize("details", [None, {"cached_tokens": None, "reasoning_tokens": None}])
def test_of_usage_what_the_upstream_leaves_open_is_nothing(details: Chunk | None) -> None:
    names = ("prompt_tokens_details", "completion_tokens_details")
    counts = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"))
    usage = {**dict.fromkeys(names, details), **counts}
    end = entry(COMPLETED, {"finish_reason": "stop", "usage": usage})
    response = Response.model_validate(fold(BORN, log([*deltas({"content": "a"}), end])))
    assert response.usage is not None
    assert response.usage.input_tokens == response.usage.output_tokens == 0
    assert response.usage.total_tokens == 0
    assert response.usage.input_tokens_details.cached_tokens == 0
    assert response.usage.output_tokens_details.reasoning_tokens == 0


def test_a_response_grows_from_queued_over_in_progress_and_tells_no_more_than_is_known() -> None:
    events = log(said({"chunks": 2}))
    grown = [fold(BORN, events[:upto]) for upto in range(1, len(events) + 1)]
    for response in grown:
        Response.model_validate(response)
    statuses = [response["status"] for response in grown]
    assert statuses == ["queued", *["in_progress"] * (len(events) - 2), "completed"]
    assert grown[0]["id"] == f"resp_{BORN.stream_id}"


def test_the_streams_id_stands_in_no_item() -> None:
    output = fold(BORN, log(said(*CORPUS["parallel tools"])))["output"]
    assert output
    assert BORN.stream_id not in json.dumps(output)


def test_the_rest_after_any_frame_is_found_however_the_body_is_cut() -> None:
    encode = BORN()
    pieces = [encode(event) for event in log(said({"text": ["\n\n", "b\r\n\r\n", "c"]}))]
    whole = b"".join(pieces).split(b"\n\n")[:-1]
    for start in range(len(whole) + 2):
        skip, body = start, b""
        for piece in pieces:
            rest, skip = after(piece, skip)
            body += rest
        assert body.split(b"\n\n")[:-1] == whole[start:]
