"""The AI SDK's wire and its requests, as pure functions."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from pydantic import ValidationError

from api.ui_request import UIChatRequest
from api.wires import chat_completions, ui_messages
from emulator.answers import Answer
from emulator.script import Script
from relay.chunks import Chunk, Compactor
from relay.errors import BadRequest
from relay.events import (
    CANCELLED,
    COMPLETED,
    FAILED,
    QUEUED,
    STARTED,
    Cursor,
    Entry,
    Event,
    entry,
    join_text,
    to_json,
)
from tests.corpus import CORPUS

Part = dict[str, Any]

CANCEL = entry(CANCELLED, {})
FAIL = entry(FAILED, {"code": "upstream_failed", "message": "The model failed."})


def numbered(entries: Iterable[Entry]) -> list[Event]:
    """As they stand in a log: every `started` begins an attempt."""
    events: list[Event] = []
    attempt, seq = 0, 1
    for each in entries:
        attempt, seq = (attempt + 1, 0) if each.kind == STARTED else (attempt, seq + 1)
        events.append(Event(Cursor(attempt, seq), *each))
    return events


def attempt(chunks: Iterable[Chunk], number: int = 1) -> tuple[list[Entry], Entry]:
    """An attempt's entries without its end, and its end."""
    compactor = Compactor(number, "m")
    entries = [each for chunk in chunks for each in compactor.entries(to_json(chunk))]
    return entries, entry(COMPLETED, {"finish_reason": compactor.finish_reason})


def spoken(*deltas: Part, finish: str = "stop") -> list[Chunk]:
    head = {"id": "c", "model": "m", "created": 1}
    said = [{**head, "choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    end = {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
    return [*said, end]


def recorded(name: str) -> list[Chunk]:
    """What the emulated upstream says."""
    script, options = CORPUS[name]
    answer = Answer(Script(**script), {**options, "stream": True}, azure=True, number=1, model="m")
    data = b"".join(frame for _, frame, _ in answer.steps()).split(b"\n\n")
    lines = [line.removeprefix(b"data: ") for line in data if line]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def written(events: Iterable[Event]) -> list[Part]:
    """The parts of the frames, which must end as the SDK knows an end."""
    encode = ui_messages.encoder()
    frames = b"".join(encode(event) for event in events).split(b"\n\n")
    assert frames.pop() == b""
    assert all(frame.startswith(b"data: ") for frame in frames)
    if frames and frames[-1] == b"data: [DONE]":
        frames.pop()
    return [json.loads(frame.removeprefix(b"data: ")) for frame in frames]


def whole(chunks: list[Chunk]) -> list[Part]:
    entries, end = attempt(chunks)
    return written(numbered([entry(QUEUED, {}), *entries, end]))


def put_together(parts: list[Part]) -> list[Part]:
    """What a client makes of them, as strictly as the SDK does."""
    shown: list[Part] = []
    active: dict[str, Part] = {}
    for part in parts:
        kind, _, verb = part["type"].rpartition("-")
        if part["type"] == "reset-step":
            shown, active = [], {}
        elif verb == "start":
            name = part.get("id") or part["toolCallId"]
            assert name not in active
            active[name] = {"kind": kind, "text": "", "name": part.get("toolName")}
            shown.append(active[name])
        elif verb == "delta":
            delta = part["inputTextDelta"] if kind == "tool-input" else part["delta"]
            active[part.get("id") or part["toolCallId"]]["text"] += delta
        elif verb == "end":
            del active[part["id"]]
        elif verb in {"available", "error"} and kind == "tool-input":
            active.pop(part["toolCallId"])["input"] = part["input"]
    return [{**part, "text": join_text([part["text"]])} for part in shown]


@pytest.mark.parametrize("name", CORPUS)
def test_the_parts_put_together_are_what_the_upstream_said(name: str) -> None:
    chunks = recorded(name)
    entries, end = attempt(chunks)
    message = chat_completions.fold(numbered([*entries, end]))["choices"][0]["message"]
    shown = put_together(whole(chunks))
    texts = "".join(part["text"] for part in shown if part["kind"] == "text")
    assert texts == (message["content"] or "") + (message["refusal"] or "")
    calls = [(part["name"], part["input"]) for part in shown if part["kind"] == "tool-input"]
    assert calls == [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls") or ()
    ]


def test_a_text_is_opened_at_its_first_word_and_closed_before_the_end() -> None:
    parts = whole(spoken({"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}))
    assert parts == [
        {"type": "text-start", "id": "text-1"},
        {"type": "text-delta", "id": "text-1", "delta": "a"},
        {"type": "text-delta", "id": "text-1", "delta": "b"},
        {"type": "text-end", "id": "text-1"},
        {"type": "finish-step"},
        {"type": "finish", "finishReason": "stop"},
    ]


@pytest.mark.parametrize(
    "names", [["reasoning_content"], ["reasoning"], ["reasoning", "reasoning_content"]]
)
def test_reasoning_stands_apart_from_the_text_wherever_it_comes(names: list[str]) -> None:
    hm, so = dict.fromkeys(names, "hm"), dict.fromkeys(names, "so")
    deltas: list[Part] = [
        {**hm, "content": ""},
        {**hm, "content": ""},
        {"content": "a"},
        {"content": "a"},
        {**so, "content": None},
        {"content": "b"},
    ]
    shown = put_together(whole(spoken(*deltas)))
    assert [(part["kind"], part["text"]) for part in shown] == [
        ("reasoning", "hmhm"),
        ("text", "aa"),
        ("reasoning", "so"),
        ("text", "b"),
    ]


def test_a_text_that_goes_on_after_a_call_is_another_one() -> None:
    texts = [{"content": text} for text in ("a", "b")]
    chunks = spoken(*texts, call("x", "f", "{}"), *texts, *texts)
    parts = whole(chunks)
    kinds = [part["type"] for part in parts]
    text = ["text-start", "text-delta", "text-delta", "text-end"]
    assert kinds[:7] == [*text, "tool-input-start", "tool-input-delta", "text-start"]
    said = [part["delta"] for part in parts if part["type"] == "text-delta"]
    assert said == ["a", "b", "a", "b", "a", "b"]


def test_a_text_that_always_comes_with_reasoning_keeps_both() -> None:
    both = {"reasoning_content": "r", "content": "t"}
    shown = put_together(whole(spoken(both, both, both)))
    assert [part["text"] for part in shown if part["kind"] == "reasoning"] == ["r", "r", "r"]
    assert [part["text"] for part in shown if part["kind"] == "text"] == ["t", "t", "t"]


def test_a_content_that_is_no_text_is_passed_over() -> None:
    shown = put_together(whole(spoken({"content": [{"type": "thinking"}]}, {"content": "a"})))
    assert [(part["kind"], part["text"]) for part in shown] == [("text", "a")]


@pytest.mark.parametrize(("finish", "told"), [("stop", "content-filter"), ("length", "length")])
def test_a_refusal_finishes_as_the_sdks_own_providers_finish_it(finish: str, told: str) -> None:
    parts = whole(spoken({"content": "Well. "}, {"refusal": "No."}, finish=finish))
    assert [part["text"] for part in put_together(parts)] == ["Well. No."]
    assert parts[-1] == {"type": "finish", "finishReason": told}


def test_a_tool_may_be_run_only_when_the_answer_stands() -> None:
    entries, end = attempt(spoken(call("c", "f", '{"a":'), call("c", "f", "1}")))
    before = written(numbered(entries))
    assert [part["type"] for part in before] == ["tool-input-start", *["tool-input-delta"] * 2]
    available = {"type": "tool-input-available", "toolCallId": "c", "toolName": "f"}
    assert {**available, "input": {"a": 1}} in written(numbered([*entries, end]))
    assert written(numbered([*entries, CANCEL]))[3:] == [{"type": "abort", "reason": "cancelled"}]


@pytest.mark.parametrize(
    "arguments", ['{"a":', '{"a": NaN}', '{"a": 1e999}', "[" * 20_000 + "]" * 20_000]
)
def test_arguments_that_are_no_plain_json_are_an_error_of_the_call_and_not_of_the_stream(
    arguments: str,
) -> None:
    parts = whole(spoken(call("c", "f", arguments), finish="length"))
    assert parts[2]["type"] == "tool-input-error"
    assert (parts[2]["toolCallId"], parts[2]["input"]) == ("c", arguments)
    assert parts[-1] == {"type": "finish", "finishReason": "length"}


@pytest.mark.parametrize("index", [{}, {"index": None}])
def test_calls_that_a_server_does_not_number_are_told_apart_by_their_ids(index: Part) -> None:
    pieces: list[Part] = [
        {"id": "a", "function": {"name": "f", "arguments": '{"x":'}},
        {"function": {"arguments": "1}"}},
        {"id": "b", "function": {"name": "g", "arguments": "{}"}},
    ]
    parts = whole(spoken(*({"tool_calls": [index | piece]} for piece in pieces)))
    available = [part for part in parts if part["type"] == "tool-input-available"]
    calls = [(part["toolCallId"], part["toolName"], part["input"]) for part in available]
    assert calls == [("a", "f", {"x": 1}), ("b", "g", {})]


def test_a_call_without_arguments_has_an_empty_input() -> None:
    parts = whole(spoken(call("c", "f", "")))
    assert [part["input"] for part in parts if part["type"] == "tool-input-available"] == [{}]


def call(call_id: str, name: str, arguments: str) -> Part:
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": 0, "id": call_id, "type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content_filter", "content-filter"),
        ("tool_calls", "tool-calls"),
        ("something_new", "other"),
    ],
)
def test_why_it_ended_is_told_by_the_sdks_names(reason: str, told: str) -> None:
    assert whole(spoken({"content": "a"}, finish=reason))[-1]["finishReason"] == told


@pytest.mark.parametrize(
    "first", [{"content": "a"}, {"reasoning_content": "a"}, call("c", "f", '{"a"')]
)
def test_a_new_attempt_takes_back_what_was_written_and_nothing_is_left_of_it(first: Part) -> None:
    lost, _ = attempt(spoken(first, first))
    again, end = attempt(spoken({"content": "b"}, {"content": "c"}), number=2)
    parts = written(numbered([*lost, *again, end]))
    assert [part["type"] for part in parts].count("reset-step") == 1
    assert put_together(parts) == [{"kind": "text", "text": "bc", "name": None}]


def test_nothing_is_taken_back_where_nothing_was_written() -> None:
    silent, _ = attempt(spoken({"role": "assistant", "content": ""}))
    again, end = attempt(spoken({"content": "b"}), number=2)
    parts = written(numbered([entry(QUEUED, {}), *silent, *again, end]))
    assert parts[0]["type"] == "text-start"


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (CANCEL, {"type": "abort", "reason": "cancelled"}),
        (FAIL, {"type": "error", "errorText": "The model failed."}),
    ],
)
def test_what_was_not_finished_closes_its_text_and_says_so_instead_of_finish(
    end: Entry, told: Part
) -> None:
    entries, _ = attempt(spoken({"content": "a"}))
    events = numbered([*entries, end])
    assert written(events)[-2:] == [{"type": "text-end", "id": "text-1"}, told]
    encode = ui_messages.encoder()
    assert [encode(event) for event in events][-1].endswith(b"\n\ndata: [DONE]\n\n")


def test_a_message_begins_with_its_id_and_its_step() -> None:
    assert ui_messages.encode_start("m") == (
        b'data: {"type":"start","messageId":"m"}\n\ndata: {"type":"start-step"}\n\n'
    )


TOOL = {"type": "tool-f", "toolCallId": "c", "input": {"a": 1}}
BROKEN = {"state": "output-error", "errorText": "It broke."}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
THOUGHT = {"type": "reasoning", "providerMetadata": ui_messages.GOES_BACK}
GARBLED = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '"{\\"a\\""'}}


def output(content: str) -> Part:
    return {"role": "tool", "tool_call_id": "c", "content": content}


def text(words: str) -> Part:
    return {"type": "text", "text": words}


def asked(*messages: Part, **more: Any) -> Part:
    numbered = [{"id": f"m{n}", **message} for n, message in enumerate(messages)]
    request = UIChatRequest.model_validate({"id": "chat", "messages": numbered, **more})
    return request.to_asked().to_stored()[0]


USER: Part = {"role": "user", "parts": [text("Hi")]}


@pytest.mark.parametrize(
    ("role", "parts", "expected"),
    [
        ("user", [text("Hi")], [{"role": "user", "content": "Hi"}]),
        ("system", [text("Be kind.")], [{"role": "system", "content": "Be kind."}]),
        ("user", [text("a"), text("b")], [{"role": "user", "content": [text("a"), text("b")]}]),
        ("user", [text("a"), {"type": "data-x", "data": 1}], [{"role": "user", "content": "a"}]),
        (
            "user",
            [{"type": "file", "mediaType": "image/png", "url": "https://x/y.png"}, text("What?")],
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
                        text("What?"),
                    ],
                }
            ],
        ),
        (
            "assistant",
            [{"type": "step-start"}, {"type": "reasoning", "text": "hm"}, text("a"), text("b")],
            [{"role": "assistant", "content": "ab"}],
        ),
        (
            "assistant",
            [
                {"type": "step-start"},
                {**THOUGHT, "text": "h"},
                {**THOUGHT, "text": "m", "state": "done"},
                THOUGHT,
                {**TOOL, "state": "output-available", "output": "two"},
                {"type": "step-start"},
                {**THOUGHT, "text": "So."},
                text("It is 2."),
                {"type": "step-start"},
                {**THOUGHT, "text": "What"},
            ],
            [
                {**CALLING, "reasoning_content": "hm"},
                output("two"),
                {"role": "assistant", "content": "It is 2.", "reasoning_content": "So."},
            ],
        ),
        ("assistant", [], []),
        ("assistant", [{"type": "step-start"}, text("")], []),
        ("assistant", [{**TOOL, "state": "input-available"}], []),
        (
            "assistant",
            [
                {"type": "step-start"},
                text("Let me look."),
                {**TOOL, "state": "output-available", "output": {"b": 2}},
                {"type": "step-start"},
                text("It is 2."),
            ],
            [
                {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
                output('{"b": 2}'),
                {"role": "assistant", "content": "It is 2."},
            ],
        ),
        (
            "assistant",
            [{**TOOL, "state": "output-available", "output": "two"}],
            [CALLING, output("two")],
        ),
        (
            "assistant",
            [{**TOOL, "type": "dynamic-tool", "toolName": "f", **BROKEN}],
            [CALLING, output("It broke.")],
        ),
        (
            "assistant",
            [{"type": "tool-f", "toolCallId": "c", "rawInput": '{"a"', **BROKEN}],
            [{"role": "assistant", "content": None, "tool_calls": [GARBLED]}, output("It broke.")],
        ),
        (
            "assistant",
            [{**TOOL, "state": "output-denied"}],
            [
                CALLING,
                output("The user did not allow this tool call."),
            ],
        ),
    ],
)
def test_ui_messages_become_the_messages_of_a_chat_completion(
    role: str, parts: list[Part], expected: list[Part]
) -> None:
    assert asked({"role": role, "parts": parts}, USER)["messages"][:-1] == expected


NESTED: Any = []
for _ in range(5000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("role", "part"),
    [
        ("user", {"type": "file", "mediaType": "application/pdf", "url": "https://x/y.pdf"}),
        ("user", {"type": "file", "mediaType": "image/png", "url": "file:///etc/passwd"}),
        ("user", {"type": "poem", "text": "a"}),
        ("user", {"type": "text"}),
        ("user", {"text": "a"}),
        ("assistant", {"type": "file", "mediaType": "image/png", "url": "https://x/y.png"}),
        ("assistant", {"type": "tool-f", "state": "output-available"}),
        ("assistant", {"type": None}),
        ("assistant", {"type": ["text"]}),
        ("assistant", {"type": {}}),
        ("assistant", {"type": NESTED}),
        ("user", {"type": NESTED}),
    ],
)
def test_a_part_that_cannot_be_said_is_refused_by_its_place(role: str, part: Part) -> None:
    with pytest.raises(BadRequest, match=r"^messages\.1\.parts\.1: "):
        asked(USER, {"role": role, "parts": [text("a"), part]})


def test_messages_in_which_nothing_is_asked_are_refused() -> None:
    with pytest.raises(BadRequest, match=r"^messages: "):
        asked({"role": "assistant", "parts": []})
    with pytest.raises(BadRequest, match=r"^messages\.0\.parts: "):
        asked({"role": "user", "parts": []})


def test_tools_go_to_the_model_and_the_ids_of_the_chat_do_not() -> None:
    stored = asked(USER, trigger="regenerate-message", messageId="m1", tools=[{"type": "function"}])
    assert stored == {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function"}],
    }


@pytest.mark.parametrize(
    ("role", "trigger", "continued"),
    [
        ("user", "submit-message", None),
        ("assistant", "submit-message", "m"),
        ("assistant", "regenerate-message", None),
    ],
)
def test_an_answer_goes_on_with_the_last_message_if_that_is_the_assistants(
    role: str, trigger: str, continued: str | None
) -> None:
    message = {"id": "m", "role": role, "parts": [text("a")]}
    body = {"id": "chat", "messages": [message], "trigger": trigger}
    assert UIChatRequest.model_validate(body).continued == continued


@pytest.mark.parametrize("chat", ["", "a\nb", "x" * 256])
def test_a_chat_has_an_id_under_which_it_can_be_found_again(chat: str) -> None:
    message = {"id": "m", "role": "user", "parts": [{"type": "text", "text": "hi"}]}
    with pytest.raises(ValidationError):
        UIChatRequest.model_validate({"id": chat, "messages": [message]})
    assert UIChatRequest.model_validate({"id": "a b/ü", "messages": [message]}).id == "a b/ü"
