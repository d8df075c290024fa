import hashlib
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.chunks import Chunk, Compactor, Expander, parse, reasoning_of, speaks
from relay.errors import Garbled, UpstreamError
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
    text_of,
    to_json,
)
from tests.test_events import ANY_TEXT

HEAD: Chunk = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-x"}
FILTERS = {"hate": {"filtered": False, "severity": "safe"}}
THINKING: Chunk = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}


def chunk(*choices: Chunk, **more: Any) -> Chunk:
    return {**HEAD, "choices": list(choices), **more}


def choice(delta: Chunk | None = None, reason: str | None = None, **more: Any) -> Chunk:
    return {"index": 0, "delta": delta or {}, "finish_reason": reason, **more}


def said(text: str, **more: Any) -> Chunk:
    return chunk(choice({"content": text}), **more)


ROLE = chunk(choice({"role": "assistant", "content": "", "refusal": None}))
STOP = chunk(choice(reason="stop"))
AZURE_FIRST: Chunk = {
    "id": "",
    "object": "",
    "created": 0,
    "model": "",
    "choices": [],
    "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": FILTERS}],
}
LATE_FILTER = chunk(
    {
        "index": 0,
        "finish_reason": None,
        "content_filter_results": FILTERS,
        "content_filter_offsets": {"check_offset": 44, "start_offset": 44, "end_offset": 198},
    }
)
USAGE = chunk(usage={"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5})
# As OpenRouter has it.
USAGE_BESIDE_NOTHING = chunk(
    choice({"role": "assistant", "content": ""}), usage={"prompt_tokens": 3, "total_tokens": 5}
)
TOKEN = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]}


def call(**part: Any) -> Chunk:
    return chunk(choice({"tool_calls": [{"index": 0, **part}]}))


RECORDED: dict[str, list[Chunk]] = {
    "plain": [ROLE, said("Hel"), said("lo"), said("\n\u2028😀"), STOP],
    "azure": [
        AZURE_FIRST,
        chunk(choice({"role": "assistant", "content": ""}, content_filter_results={})),
        chunk(choice({"content": "a"}, content_filter_results={})),
        chunk(choice({"content": "b"}, content_filter_results=FILTERS)),
        chunk(choice({"content": "c"}, content_filter_results=FILTERS)),
        chunk(choice({"content": "d"}, content_filter_results={})),
        chunk(choice(reason="stop", content_filter_results={})),
    ],
    "azure with a late filter": [AZURE_FIRST, ROLE, said("a"), STOP, LATE_FILTER],
    "tool calls in pieces": [
        chunk(choice({"role": "assistant", "content": None})),
        call(id="call_1", type="function", function={"name": "find", "arguments": ""}),
        call(function={"arguments": '{"q":'}),
        call(function={"arguments": '"x"}'}),
        chunk(choice(reason="tool_calls")),
    ],
    "text, then a tool call, then text": [
        *(ROLE, said("a"), said("b"), call(id="call_1"), said("c"), said("d"), STOP)
    ],
    "three choices": [
        *(chunk({**choice({"content": str(n)}), "index": n % 3}) for n in range(9)),
        *(chunk({**choice(reason="stop"), "index": n}) for n in range(3)),
    ],
    "three choices in a chunk": [
        chunk(*[{**choice({"content": "x"}), "index": n} for n in range(3)])
    ],
    "second choice alone": [chunk({**choice({"content": x}), "index": 1}) for x in "ab"],
    "logprobs": [
        chunk(choice({"content": "a"}, logprobs=None)),
        chunk(choice({"content": "b"}, logprobs=None)),
        chunk(choice({"content": "c"}, logprobs=TOKEN)),
        chunk(choice({"content": "d"}, logprobs=TOKEN)),
    ],
    "refusal": [ROLE, chunk(choice({"refusal": "I"})), chunk(choice({"refusal": " won't"})), STOP],
    "usage": [said("a", usage=None), said("b", usage=None), STOP, USAGE],
    "usage beside nothing": [ROLE, said("a"), STOP, USAGE_BESIDE_NOTHING],
    "usage with every text": [said("a", usage={"n": 1}), said("b", usage={"n": 2}), said("c")],
    "fingerprint that changes": [
        said("a", system_fingerprint="fp_1"),
        said("b", system_fingerprint="fp_1"),
        said("c", system_fingerprint="fp_2"),
        said("d", system_fingerprint="fp_2"),
        said("e", system_fingerprint=None),
        said("f"),
        said("g"),
    ],
    "id that changes": [said("a"), said("b", id="c-2"), said("c", id="c-2"), said("d")],
    "service tier and fields unheard of": [
        said("a", service_tier="default", new={"b": [1]}),
        said("b", service_tier="default", new={"b": [1]}),
        said("c", service_tier="default"),
    ],
    "split emoji": [said("\ud83d"), said("\ude00"), said("x")],
    "finish with text": [said("a"), chunk(choice({"content": "b"}, "stop"))],
    "the text of the answer beside it": [{"content": x, **said("a")} for x in "aab"],
    "no finish_reason at all": [chunk({"index": 0, "delta": {"content": x}}) for x in "abc"],
    "nulls": [chunk(), {**HEAD, "choices": None}, chunk({"index": 0, "delta": None}), {}],
}


def spaced(chunk: Chunk) -> bytes:
    """JSON as others write it."""
    return json.dumps(chunk).encode()


def entries_of(chunks: list[Chunk], render: Callable[[Chunk], bytes] = to_json) -> list[Entry]:
    compactor = Compactor(1, "asked-for")
    return [entry for chunk in chunks for entry in compactor.entries(render(chunk))]


def expanded(entries: list[Entry]) -> list[Chunk]:
    expander = Expander()
    events = [Event(Cursor(1, seq), *entry) for seq, entry in enumerate(entries)]
    chunks = [expander.chunk(event) for event in events]
    return [chunk for chunk in chunks if chunk is not None]


def bytes_of(entry: Entry) -> int:
    return len(entry.kind) + len(entry.data)


@pytest.mark.parametrize("render", [to_json, spaced])
@pytest.mark.parametrize("chunks", RECORDED.values(), ids=RECORDED)
def test_what_the_upstream_said_is_read_back_whole(
    chunks: list[Chunk], render: Callable[[Chunk], bytes]
) -> None:
    assert expanded(entries_of(chunks, render)) == chunks


@pytest.mark.parametrize("unfinished", [{"finish_reason": None}, {"finish_reason": ""}, {}])
def test_text_is_stored_alone_however_a_server_says_that_more_comes(unfinished: Chunk) -> None:
    chunks = [chunk({"index": 0, "delta": {"content": x}, **unfinished}) for x in "abc"]
    assert [entry.kind for entry in entries_of(chunks)] == [STARTED, WHOLE, TEXT, TEXT]


INDEXES = st.integers(0, 2)
ENVELOPES = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["", "c-1", "c-2"]),
        "model": st.sampled_from(["", "gpt-x"]),
        "created": st.integers(0, 1),
        "system_fingerprint": st.sampled_from([None, "fp_1", "fp_2"]),
        "service_tier": st.none(),
    },
)
DELTAS = st.fixed_dictionaries(
    {},
    optional={
        "content": ANY_TEXT | st.none(),
        "role": st.just("assistant"),
        "refusal": st.none() | st.text(max_size=3),
        "tool_calls": st.lists(st.fixed_dictionaries({"index": INDEXES}), max_size=2),
    },
)
CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "index": INDEXES,
        "delta": st.none() | DELTAS,
        "finish_reason": st.sampled_from([None, None, "", "stop", "content_filter"]),
        "logprobs": st.none() | st.just(TOKEN),
        "content_filter_results": st.sampled_from([{}, FILTERS]),
    },
)
PLAIN = ANY_TEXT.map(said)
CHUNKS = PLAIN | st.builds(
    lambda envelope, rest: {**envelope, **rest},
    ENVELOPES,
    st.fixed_dictionaries(
        {},
        optional={
            "choices": st.none() | st.lists(CHOICES, max_size=3),
            "usage": st.none() | st.just({"total_tokens": 5}),
            "prompt_filter_results": st.just([FILTERS]),
        },
    ),
)


@given(st.lists(CHUNKS, max_size=6), st.sampled_from([to_json, spaced]))
def test_whatever_the_upstream_says_is_read_back_whole(
    chunks: list[Chunk], render: Callable[[Chunk], bytes]
) -> None:
    assert expanded(entries_of(chunks, render)) == chunks


TEMPLATES = [
    b'{"id":"c","choices":[{"index":0,"delta":{"content":%b},"finish_reason":null}]}',
    b'{"choices": [{"index": 0, "delta": {"content": %b}, "finish_reason": null}]}',
    b'{"choices":[{"index":0,"delta":{"content" : %b},"finish_reason":null}]}',
    b'{"content":"a","choices":[{"index":0,"delta":{"content":%b},"finish_reason":null}]}',
    b'{"choices":[{"index":0,"delta":{"content":%b},"finish_reason":null}],"content":"a"}',
    b'{"choices":[{"index":0,"delta":{"content":%b,"content":"a"},"finish_reason":null}]}',
    b'{"choices":[{"index":0,"delta":{"x":"\\"content\\":\\"a\\"","content":%b},"finish_reason":null}]}',
    b'{"choices":[{"index":0,"delta":{"content":%b},"finish_reason":null}],"obfuscation":"q"}',
]
STRINGS = [b'"a"', b'"b"', b'"\\u0062"', b'"\\n\\"\\\\\\/"', b'"\\ud83d"', '"\u2028😀"'.encode()]
STRINGS += [b"null", b'"a","x":"b"', b'"a"},"x":{"y":"b"', b'"\xff"', b'"\n"', b'"', b"", b'"\\x"']


@given(
    st.sampled_from(TEMPLATES),
    st.lists(st.sampled_from(STRINGS), min_size=3, max_size=8),
    st.lists(st.tuples(st.sampled_from(TEMPLATES), st.sampled_from(STRINGS)), max_size=3),
)
def test_a_chunk_that_is_told_by_its_bytes_is_stored_as_one_that_is_parsed(
    template: bytes, strings: list[bytes], others: list[tuple[bytes, bytes]]
) -> None:
    known, parsed = Compactor(1, "m"), Compactor(1, "m")
    for form, text in [*((template, text) for text in strings), *others]:
        data = form % text
        parsed._around = None
        expected, given_ = [outcome(compactor, data) for compactor in (parsed, known)]
        assert [(e.kind, json.loads(e.data)) for e in given_] == [
            (e.kind, json.loads(e.data)) for e in expected
        ]
        assert known.summary() == parsed.summary()


def test_a_byte_that_is_no_utf8_costs_its_character_and_not_the_answer() -> None:
    compactor, texts = Compactor(1, "m"), (b'"a"', b'"b"', b'"\xff"', b'"c"')
    entries = [entry for text in texts for entry in compactor.entries(TEMPLATES[0] % text)]
    assert text_in(entries) == "ab\ufffdc"


def outcome(compactor: Compactor, data: bytes) -> list[Entry]:
    try:
        return compactor.entries(data)
    except UpstreamError as error:
        return [entry("failed", error.code)]


@pytest.mark.parametrize(
    ("chunk", "begun"),
    [
        *((each, False) for each in ({}, ROLE, AZURE_FIRST, USAGE, *RECORDED["nulls"])),
        *(
            (each, True)
            for each in (said("a"), STOP, call(id="x"), chunk(choice({"refusal": "I"})))
        ),
        (chunk(choice({"role": "assistant", "content": "a"})), True),
        (chunk(choice(), choice({"reasoning_content": "Hm"})), True),
    ],
)
def test_an_answer_begins_with_the_first_piece_of_it_and_not_with_its_announcement(
    chunk: Chunk, begun: bool
) -> None:
    assert speaks(chunk) is begun


def test_nearly_all_of_an_answer_is_told_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = 0

    def counted(data: bytes) -> Chunk:
        nonlocal parsed
        parsed += 1
        return parse(data)

    monkeypatch.setattr("relay.chunks.parse", counted)
    texts = [said(f"{n}") for n in range(100)]
    entries_of([ROLE, *texts, STOP, USAGE])
    assert parsed < 10


@pytest.mark.parametrize(
    "data",
    [
        b"null",
        b"[1]",
        b'{"choices": ["x"]}',
        b'{"choices": [{"index": true}]}',
        b'{"choices": [{"index": 0, "delta": "x"}]}',
        b'{"choices": [{"index": 0, "finish_reason": 1}]}',
        b'{"choices": [{"index": 0, "delta": {"tool_calls": ["x"]}}]}',
        b'{"choices": [{"index": 0, "delta": {"tool_calls": [{"index": "0"}]}}]}',
        b'{"choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"arguments": {}}}]}}]}',
        b'{"choices": [{"index": 0, "content_filter_results": []}]}',
        b'{"usage": []}',
        b'{"usage": {"prompt_tokens_details": 5}}',
        b'{"usage": {"completion_tokens_details": [1]}}',
        b'{"logprob": NaN}',
        b'{"logprob": -Infinity}',
        b'{"usage": {"total_tokens": 1e999}}',
        b'{"model": 5}',
    ],
)
def test_what_no_wire_could_tell_is_no_chunk(data: bytes) -> None:
    with pytest.raises(Garbled):
        Compactor(1, "m").entries(data)


@pytest.mark.parametrize(
    "data",
    [b'{"choices": [%b]}', b'{"choices": [{"index": 0, "delta": {"tool_calls": [%b]}}]}'],
)
def test_what_is_wrong_a_million_times_is_refused_at_the_first(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(Garbled):
            Compactor(1, "m").entries(data % b",".join([b"1"] * 100_000))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 10_000_000


@pytest.mark.parametrize("error", [{"error": "x"}, {"object": "error", "choices": []}])
def test_an_error_among_the_chunks_is_no_chunk(error: Chunk) -> None:
    compactor = Compactor(1, "m")
    compactor.entries(to_json(said("a")))
    with pytest.raises(UpstreamError) as raised:
        compactor.entries(to_json(error))
    assert raised.value.code == "upstream_failed"


def test_a_content_of_parts_is_passed_on_whole_and_its_text_counts() -> None:
    parts = chunk(choice({"content": [THINKING, {"type": "text", "text": "a"}]}))
    entries = entries_of([parts, said("b"), STOP])
    assert expanded(entries) == [parts, said("b"), STOP]
    assert text_in(entries) == "ab"


def test_what_stands_in_a_part_of_the_content_as_thinking_is_reasoning() -> None:
    delta: Chunk = {"content": [THINKING, {"type": "text", "text": "a"}], "reasoning": None}
    assert reasoning_of(delta) == "Hm."
    assert reasoning_of({**delta, "content": [], "reasoning_content": "So."}) == "So."


def text_in(entries: list[Entry]) -> str:
    return "".join(text_of(Event(Cursor(1, seq), *each)) for seq, each in enumerate(entries))


def test_true_and_one_are_not_the_same_chunk() -> None:
    chunks = [said("a", new=1), said("b", new=True), said("c", new=1.0)]
    assert json.dumps(expanded(entries_of(chunks))) == json.dumps(chunks)


def test_the_padding_against_eavesdroppers_is_dropped() -> None:
    padded = [said(text, obfuscation="x" * n) for n, text in enumerate("abc")]
    entries = entries_of(padded)
    assert expanded(entries) == [said("a"), said("b"), said("c")]
    assert [entry.kind for entry in entries[2:]] == [TEXT, TEXT]


@given(st.lists(ANY_TEXT, min_size=2, max_size=6))
def test_a_text_costs_its_own_json_and_one_byte(texts: list[str]) -> None:
    for text, stored in zip(texts[1:], entries_of([said(t) for t in texts])[2:], strict=True):
        plain = len(json.dumps(text, ensure_ascii=False).encode(errors="surrogatepass"))
        assert bytes_of(stored) <= max(plain, len(json.dumps(text))) + 1


@pytest.mark.parametrize("text", ["", "a", "Hello, world", "grüße 😀"])
def test_a_plain_text_costs_three_bytes_more_than_itself(text: str) -> None:
    last = entries_of([ROLE, said("x"), said(text)])[-1]
    assert bytes_of(last) <= len(text.encode()) + 3


@pytest.mark.parametrize(
    "both",
    [
        choice({"content": "", "tool_calls": [{"index": 0, "function": {"arguments": "1"}}]}),
        choice({"content": "", "reasoning_content": "ha"}),
        choice({"content": "", "refusal": "no"}),
        choice({"content": "a"}, logprobs=TOKEN),
    ],
)
def test_what_is_said_beside_a_text_is_never_left_out_as_a_repetition(both: Chunk) -> None:
    assert [entry.kind for entry in entries_of([chunk(both)] * 2)] == [STARTED, WHOLE, WHOLE]


@pytest.mark.parametrize("name", ["azure", "logprobs", "fingerprint that changes", "usage"])
def test_what_has_not_changed_is_not_stored_again(name: str) -> None:
    entries = entries_of([*RECORDED[name], *[said("x", created=2)] * 3])
    assert bytes_of(entries[-1]) == 4


def test_a_role_that_some_servers_repeat_with_every_text_is_stored_once() -> None:
    chunks = [chunk(choice({"role": "assistant", "content": text})) for text in "abc"]
    entries = entries_of(chunks)
    assert [entry.kind for entry in entries] == [STARTED, WHOLE, TEXT, TEXT]
    assert expanded(entries) == chunks


def test_what_all_chunks_of_an_answer_say_is_stored_with_the_first_alone() -> None:
    first, *others = entries_of(RECORDED["tool calls in pieces"])
    assert [HEAD["model"].encode() in data for _, data in (first, *others)] == [True, *[False] * 5]


@pytest.mark.parametrize(
    ("first", "model"), [(said("a"), "gpt-x"), (AZURE_FIRST, "asked-for"), ({}, "asked-for")]
)
def test_an_attempt_begins_with_started_and_its_model(first: Chunk, model: str) -> None:
    begin, second = entries_of([first])
    assert begin.kind == STARTED
    assert second.kind != STARTED
    value = json.loads(begin.data)
    assert (value["attempt"], value["model"]) == (1, model)


def test_a_later_attempt_is_read_without_the_earlier_one() -> None:
    earlier = entries_of([said("a", system_fingerprint="fp_1"), said("b")])
    later = entries_of([said("A"), said("B")])
    assert expanded(earlier + later)[2:] == [said("A"), said("B")]


@pytest.mark.parametrize("kind", [QUEUED, COMPLETED])
def test_other_events_stand_for_no_chunk(kind: str) -> None:
    assert expanded([entry(kind, {})]) == []


def second(reason: str | None = None, **delta: Any) -> Chunk:
    return chunk({**choice(delta, reason), "index": 1})


def test_what_another_choice_says_again_and_again_is_never_told_as_the_text() -> None:
    assert text_in(entries_of([said("a"), *[second(content="no")] * 3])) == "a"


@pytest.mark.parametrize(
    ("chunks", "complete", "reason"),
    [
        ([], False, None),
        ([ROLE], False, None),
        ([ROLE, said("a")], False, None),
        ([ROLE, said("a"), USAGE], False, None),
        ([ROLE, said("a"), STOP], True, "stop"),
        ([STOP], True, "stop"),
        ([said("a"), chunk(choice(reason=""))], False, None),
        ([said("a"), STOP, USAGE], True, "stop"),
        ([said("a"), STOP, USAGE_BESIDE_NOTHING], True, "stop"),
        ([said("a"), STOP, USAGE_BESIDE_NOTHING, second(content="b")], False, "stop"),
        ([said("a"), STOP, LATE_FILTER], True, "stop"),
        ([said("a"), STOP, chunk(choice(reason="content_filter"))], True, "content_filter"),
        ([said("a"), chunk(choice(reason="length"))], True, "length"),
        ([said("a"), second(content="b"), STOP], False, "stop"),
        ([said("a"), second(content="b"), STOP, second("length")], True, "stop"),
        ([said("a"), second("length"), STOP], True, "stop"),
        ([said("a"), second("length")], False, "length"),
        ([second("content_filter")], True, "content_filter"),
        ([chunk({"delta": {"content": "a"}}), chunk({"finish_reason": "stop"})], True, "stop"),
    ],
)
def test_an_answer_is_complete_when_each_choice_that_began_has_finished(
    chunks: list[Chunk], complete: bool, reason: str | None
) -> None:
    compactor = Compactor(1, "m")
    for each in chunks:
        compactor.entries(to_json(each))
    assert (compactor.complete, compactor.finish_reason) == (complete, reason)


@pytest.mark.parametrize(
    ("chunks", "usage"),
    [
        ([said("a"), STOP], None),
        ([said("a"), STOP, USAGE], USAGE["usage"]),
        ([said("a", usage={"n": 1}), said("b", usage={"n": 2}), said("c", usage=None)], {"n": 2}),
    ],
)
def test_the_last_usage_counts(chunks: list[Chunk], usage: Chunk | None) -> None:
    compactor = Compactor(1, "m")
    for each in chunks:
        compactor.entries(to_json(each))
    assert compactor.usage == usage


@pytest.mark.parametrize(
    ("chunks", "text"),
    [
        ([], ""),
        ([ROLE, said("a"), said("ü"), STOP], "aü"),
        ([said("\ud83d"), said("\ude00")], "😀"),
        ([said("a"), second(content="no"), said("b")], "ab"),
    ],
)
def test_the_summary_tells_the_number_of_chunks_and_the_hash_of_the_text(
    chunks: list[Chunk], text: str
) -> None:
    compactor = Compactor(1, "m")
    for each in chunks:
        compactor.entries(to_json(each))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert compactor.summary() == {"chunks": len(chunks), "sha256": digest}
