import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import (
    APIConnectionError,
    APIError,
    APIStatusError,
    AsyncAzureOpenAI,
    AsyncOpenAI,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    RateLimitError,
)
from openai.types.chat import ChatCompletionChunk

from emulator.answers import Answer
from emulator.app import Emulator
from emulator.script import BadScript, Script, demo, parse, prompt
from emulator.serve import serve

BROKEN = (APIConnectionError, httpx2.HTTPError)


@pytest.fixture
def emulator() -> Emulator:
    return Emulator()


@pytest.fixture
async def url(emulator: Emulator) -> AsyncIterator[str]:
    async with serve(emulator) as base:
        yield base


@pytest.fixture
async def azure(url: str) -> AsyncIterator[AsyncAzureOpenAI]:
    async with AsyncAzureOpenAI(
        azure_endpoint=url, api_key="k", api_version="2024-10-21", max_retries=0
    ) as client:
        yield client


@pytest.fixture
async def openai(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        yield client


async def ask(client: AsyncOpenAI, content: str, **options: Any) -> list[ChatCompletionChunk]:
    return [chunk async for chunk in await opened(client, content, **options)]


async def opened(client: AsyncOpenAI, content: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": content}]
    return await client.chat.completions.create(
        model="gpt", messages=messages, stream=True, **options
    )


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def finishes_of(chunks: list[ChatCompletionChunk]) -> list[str]:
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    return [reason for reason in reasons if reason]


async def read_until_broken(stream: Any) -> tuple[list[ChatCompletionChunk], Exception]:
    chunks = []
    try:
        async for chunk in stream:
            chunks.append(chunk)
    except (*BROKEN, APIError, json.JSONDecodeError) as error:
        return chunks, error
    pytest.fail("the stream ended in order")


async def test_an_azure_stream_has_filters_role_text_and_finish_in_that_order(
    azure: AsyncAzureOpenAI, emulator: Emulator
) -> None:
    first, role, *texts, finish = await ask(azure, prompt(text=["Good", " day"]))
    assert (first.choices, first.id, first.model) == ([], "", "")
    assert first.model_dump()["prompt_filter_results"][0]["prompt_index"] == 0
    assert not {"service_tier", "usage"} & role.to_dict().keys()
    assert role.model_dump(exclude_unset=True)["choices"][0]["delta"] == {
        "role": "assistant",
        "content": "",
        "refusal": None,
    }
    assert [text.choices[0].delta.content for text in texts] == ["Good", " day"]
    filters = texts[0].model_dump()["choices"][0]["content_filter_results"]
    assert sorted(filters) == ["hate", "self_harm", "sexual", "violence"]
    assert filters["hate"] == {"filtered": False, "severity": "safe"}
    assert finish.choices[0].finish_reason == "stop"
    record = await emulator.request(0)
    await record.over.wait()
    assert (record.outcome, record.sent) == ("completed", 2)
    assert record.headers["api-key"] == "k"
    assert record.body["model"] == "gpt"


async def test_an_openai_stream_has_no_filters_and_a_null_usage_on_each_chunk(
    openai: AsyncOpenAI,
) -> None:
    usage = {"include_usage": True}
    *chunks, last = await ask(openai, prompt(chunks=3), stream_options=usage)
    assert text_of(chunks) == "0 1 2 "
    for chunk in chunks:
        fields = chunk.model_dump(exclude_unset=True)
        assert fields["model"] == "gpt"
        assert fields["usage"] is None
        assert fields["service_tier"] == "default"
        assert "content_filter_results" not in fields["choices"][0]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 3
    assert last.usage.total_tokens == last.usage.prompt_tokens + 3


async def test_the_v1_path_of_azure_answers_as_azure(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/openai/v1", api_key="k", max_retries=0) as client:
        chunks = await ask(client, prompt(chunks=2))
    assert "prompt_filter_results" in chunks[0].model_dump()
    assert text_of(chunks) == "0 1 "


async def test_usage_comes_last_if_asked_for_and_not_denied(azure: AsyncAzureOpenAI) -> None:
    asked = {"include_usage": True}
    assert (await ask(azure, prompt(chunks=4), stream_options=asked))[-1].usage
    assert not (await ask(azure, prompt(chunks=4)))[-1].usage
    assert not (await ask(azure, prompt(chunks=4, usage=False), stream_options=asked))[-1].usage


async def test_tool_calls_come_in_pieces_that_join_to_what_was_wanted(
    azure: AsyncAzureOpenAI,
) -> None:
    wanted = {"city": "Bremen", "days": [1, 2, 3]}
    calls = [
        {"name": "weather", "arguments": wanted, "id": "call_a"},
        {"name": "time", "arguments": "now"},
    ]
    chunks = await ask(azure, prompt(tool_calls=calls))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    parts = [part for delta in deltas for part in delta.tool_calls or []]
    names = [part.function.name for part in parts if part.function and part.function.name]
    first = [part for part in parts if part.index == 0]
    arguments = [part.function.arguments or "" for part in first if part.function]
    assert names == ["weather", "time"]
    assert first[0].id == "call_a"
    assert len(arguments) > 5
    assert json.loads("".join(arguments)) == wanted
    assert parts[-1].function
    assert (parts[-1].index, parts[-1].function.arguments) == (1, "now")
    assert text_of(chunks) == ""
    assert finishes_of(chunks) == ["tool_calls"]


async def test_choices_are_interleaved(azure: AsyncAzureOpenAI) -> None:
    chunks = await ask(azure, prompt(chunks=3), n=2)
    order = [chunk.choices[0].index for chunk in chunks if chunk.choices]
    assert order == [0, 1] * 5
    assert text_of(chunks, 0) == text_of(chunks, 1) == "0 1 2 "
    assert finishes_of(chunks) == ["stop", "stop"]


async def test_logprobs_are_there_if_asked_for(azure: AsyncAzureOpenAI) -> None:
    chunks = await ask(azure, prompt(text=["Hé"]), logprobs=True, top_logprobs=2)
    (logprobs,) = (each.choices[0].logprobs for each in chunks[1:] if each.choices[0].logprobs)
    assert logprobs.content is not None
    assert logprobs.content[0].bytes == [72, 195, 169]
    assert len(logprobs.content[0].top_logprobs) == 2


async def test_reasoning_comes_in_pieces_before_the_text(openai: AsyncOpenAI) -> None:
    chunks = await ask(openai, prompt(reasoning="So then.", chunks=1))
    assert not any("usage" in chunk.to_dict() for chunk in chunks)
    deltas = [chunk.model_dump(exclude_unset=True)["choices"][0]["delta"] for chunk in chunks]
    assert deltas[1:4] == [
        {"reasoning_content": "So t"},
        {"reasoning_content": "hen."},
        {"content": "0 "},
    ]


async def test_a_refusal_comes_in_pieces_and_without_text(azure: AsyncAzureOpenAI) -> None:
    chunks = await ask(azure, prompt(refusal="I cannot help with that."))
    pieces = [chunk.choices[0].delta.refusal or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == "I cannot help with that."
    assert text_of(chunks) == ""


async def test_an_empty_answer_still_finishes(azure: AsyncAzureOpenAI) -> None:
    chunks = await ask(azure, prompt(empty=True, finish_reason="length"))
    assert text_of(chunks) == ""
    assert finishes_of(chunks) == ["length"]


async def test_lone_surrogates_arrive_as_two_json_escapes(azure: AsyncAzureOpenAI) -> None:
    chunks = await ask(azure, prompt(surrogate=True))
    contents = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert contents[1:3] == ["\ud83d", "\ude00"]


async def test_raw_chunks_arrive_as_they_stand(azure: AsyncAzureOpenAI, emulator: Emulator) -> None:
    raw: list[dict[str, Any]] = [{"choices": [], "odd": {"b": 1, "a": None}}, {"x": "ü\ud83d"}]
    lines = []
    messages: Any = [{"role": "user", "content": prompt(raw=raw)}]
    async with azure.chat.completions.with_streaming_response.create(
        model="gpt", messages=messages, stream=True
    ) as response:
        lines = [line async for line in response.iter_lines() if line]
    assert [json.loads(line.removeprefix("data: ")) for line in lines[:-1]] == raw
    assert lines[0] == 'data: {"choices":[],"odd":{"b":1,"a":null}}'
    assert lines[-1] == "data: [DONE]"
    assert (await emulator.request(0)).sent == 2


async def test_labels_say_which_request_each_piece_answers_also_after_a_refused_one(
    azure: AsyncAzureOpenAI, emulator: Emulator
) -> None:
    script = prompt(chunks=3, label=True, key="k", status=503, status_times=1)
    with pytest.raises(InternalServerError):
        await ask(azure, script)
    assert text_of(await ask(azure, script)) == "2.0 2.1 2.2 "
    assert text_of(await ask(azure, script)) == "3.0 3.1 3.2 "
    assert [(record.number, record.key) for record in emulator.requests] == [
        (1, "k"),
        (2, "k"),
        (3, "k"),
    ]


async def test_what_is_held_goes_on_when_its_key_is_released_and_later_requests_are_not_held(
    openai: AsyncOpenAI, emulator: Emulator, url: str
) -> None:
    asked = prompt(chunks=5, hold_after=3, key="a b")
    other = await opened(openai, prompt(chunks=2, hold_after=1, key="c"))
    stream = await opened(openai, asked)
    chunks = [await anext(stream) for _ in range(4)]
    assert (text_of(chunks), emulator.requests[-1].sent) == ("0 1 2 ", 3)
    async with httpx2.AsyncClient() as http:
        assert (await http.post(f"{url}/emulator/release/a b")).is_success
    assert text_of(chunks + [chunk async for chunk in stream]) == "0 1 2 3 4 "
    assert text_of(await ask(openai, asked)) == "0 1 2 3 4 "
    assert emulator.requests[0].outcome is None
    await other.close()


async def test_an_answer_can_be_held_before_its_first_piece(
    openai: AsyncOpenAI, emulator: Emulator
) -> None:
    stream = await opened(openai, prompt(chunks=1, hold_after=0, key="k"))
    role = await anext(stream)
    assert (role.choices[0].delta.role, emulator.requests[0].sent) == ("assistant", 0)
    emulator.release("k")
    assert text_of([chunk async for chunk in stream]) == "0 "


async def test_the_journal_forgets_its_oldest_requests_but_not_how_many_there_were() -> None:
    async with (
        serve(Emulator(journal=2)) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
        httpx2.AsyncClient() as http,
    ):
        for _ in range(3):
            await ask(client, prompt(chunks=1))
        journal = (await http.get(f"{url}/emulator/requests")).json()
    assert [entry["number"] for entry in journal] == [2, 3]


async def test_stamps_are_numbered_and_taken_after_the_pauses(azure: AsyncAzureOpenAI) -> None:
    before = time.monotonic_ns()
    chunks = await ask(azure, prompt(chunks=4, stamp=True, first_ms=10, delay_ms=20))
    stamps = [stamp.split(":") for stamp in text_of(chunks).split()]
    times = [int(at) for _, at in stamps]
    assert [number for number, _ in stamps] == ["0", "1", "2", "3"]
    assert times[-1] < time.monotonic_ns()
    # Not from one to the next: what comes late is followed by the others at their times.
    assert all(at - before > due for at, due in zip(times, (29e6, 49e6, 69e6, 89e6), strict=True))


def test_pauses_vary_as_much_as_wanted_about_the_delay_and_each_time_the_same() -> None:
    script = Script(chunks=101, delay_ms=10, jitter_ms=5)

    def pauses() -> list[float]:
        answer = Answer(script, {}, azure=True, number=1, model="m")
        return [pause for pause, _, _ in answer.steps() if pause]

    assert pauses() == pauses()
    assert (min(pauses()), max(pauses())) == pytest.approx((0.005, 0.015))
    assert sum(pauses()[:101]) / 101 == pytest.approx(0.010)


async def test_without_done_the_finish_reason_still_comes(
    azure: AsyncAzureOpenAI, emulator: Emulator
) -> None:
    chunks = await ask(azure, prompt(chunks=3, end="no_done"))
    assert finishes_of(chunks) == ["stop"]
    record = await emulator.request(0)
    await record.over.wait()
    assert record.outcome == "failed"


async def test_an_eof_looks_like_success_but_has_no_finish_reason(
    azure: AsyncAzureOpenAI, emulator: Emulator
) -> None:
    chunks = await ask(azure, prompt(chunks=9, end="eof", after=4))
    assert text_of(chunks) == "0 1 2 3 "
    assert finishes_of(chunks) == []
    assert (await emulator.request(0)).sent == 4


async def test_a_reset_comes_after_exactly_the_pieces_wanted(
    azure: AsyncAzureOpenAI, emulator: Emulator
) -> None:
    stream = await opened(azure, prompt(chunks=9, end="reset", after=4))
    chunks, _ = await read_until_broken(stream)
    record = await emulator.request(0)
    await record.over.wait()
    assert text_of(chunks) == "0 1 2 3 "
    assert record.outcome == "failed"


@pytest.mark.parametrize("pad", [0, 5_000_000], ids=["all sent", "much unsent"])
async def test_a_reset_is_told_in_no_log(caplog: pytest.LogCaptureFixture, pad: int) -> None:
    async with (
        serve(Emulator()) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
    ):
        await read_until_broken(await opened(client, prompt(chunks=1, pad=pad, end="reset")))
    assert [each for each in caplog.records if each.name.startswith("uvicorn")] == []


async def test_an_error_in_the_stream_is_raised_with_its_code(azure: AsyncAzureOpenAI) -> None:
    stream = await opened(azure, prompt(chunks=3, end="error", error_code="overloaded"))
    chunks, raised = await read_until_broken(stream)
    assert text_of(chunks) == "0 1 2 "
    assert isinstance(raised, APIError)
    assert raised.code == "overloaded"


async def test_garbage_is_no_json(azure: AsyncAzureOpenAI) -> None:
    stream = await opened(azure, prompt(chunks=3, end="garbage"))
    chunks, raised = await read_until_broken(stream)
    assert text_of(chunks) == "0 1 2 "
    assert isinstance(raised, json.JSONDecodeError)


async def test_a_client_that_leaves_a_stalled_stream_is_noticed_at_once(
    azure: AsyncAzureOpenAI, emulator: Emulator
) -> None:
    stream = await opened(azure, prompt(chunks=3, end="stall"))
    chunks = [await anext(aiter(stream)) for _ in range(5)]
    assert text_of(chunks) == "0 1 2 "
    record = await emulator.request(0)
    assert record.outcome is None
    left = time.monotonic()
    await stream.close()
    await asyncio.wait_for(record.over.wait(), 1)
    assert record.outcome == "disconnected"
    assert record.ended is not None
    assert record.ended - left < 1


async def test_a_client_that_leaves_during_a_pause_is_noticed_at_once(
    azure: AsyncAzureOpenAI, emulator: Emulator
) -> None:
    stream = await opened(azure, prompt(chunks=3, delay_ms=60_000))
    await anext(aiter(stream))
    await stream.close()
    record = await emulator.request(0)
    await asyncio.wait_for(record.over.wait(), 1)
    assert (record.outcome, record.sent) == ("disconnected", 0)


@pytest.mark.parametrize("fields", [{"end": "hang"}, {"first_ms": 60_000}])
async def test_a_client_that_leaves_before_the_headers_is_noticed_at_once(
    azure: AsyncAzureOpenAI, emulator: Emulator, fields: dict[str, Any]
) -> None:
    asking = asyncio.create_task(ask(azure, prompt(**fields)))
    record = await emulator.request(0)
    asking.cancel()
    await asyncio.wait_for(record.over.wait(), 1)
    assert (record.outcome, record.sent) == ("disconnected", 0)


async def test_too_many_requests_come_as_often_as_wanted_for_a_key_then_it_succeeds(
    azure: AsyncAzureOpenAI, emulator: Emulator
) -> None:
    limited = prompt(
        status=429, status_times=2, key="a", retry_after_ms=1500, retry_after=2, chunks=1
    )
    for _ in range(2):
        with pytest.raises(RateLimitError) as caught:
            await ask(azure, limited)
        assert caught.value.code == "429"
        assert caught.value.response.headers["retry-after-ms"] == "1500"
        assert caught.value.response.headers["retry-after"] == "2"
    assert text_of(await ask(azure, limited)) == "0 "
    with pytest.raises(RateLimitError):
        await ask(azure, limited.replace('"a"', '"b"'))
    await (await emulator.request(3)).over.wait()
    outcomes = [record.outcome for record in emulator.requests]
    assert outcomes == ["failed", "failed", "completed", "failed"]


async def test_an_http_error_has_the_code_of_the_script(azure: AsyncAzureOpenAI) -> None:
    with pytest.raises(InternalServerError) as caught:
        await ask(azure, prompt(status=503, error_code="ServiceUnavailable"))
    assert (caught.value.status_code, caught.value.code) == (503, "ServiceUnavailable")


@pytest.mark.parametrize(
    ("status", "kind"), [(429, "invalid_request_error"), (500, "server_error")]
)
async def test_an_http_error_of_openai_has_its_type(
    openai: AsyncOpenAI, status: int, kind: str
) -> None:
    with pytest.raises(APIStatusError) as caught:
        await ask(openai, prompt(status=status))
    assert (caught.value.status_code, caught.value.type) == (status, kind)


async def test_a_blocked_prompt_is_a_400_of_the_content_filter(azure: AsyncAzureOpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        await ask(azure, prompt(prompt_filter=True))
    body: Any = caught.value.body
    assert caught.value.code == "content_filter"
    assert body["innererror"]["code"] == "ResponsibleAIPolicyViolation"
    assert body["innererror"]["content_filter_result"]["violence"]["filtered"] is True


@pytest.mark.parametrize(
    ("late_filter", "reasons"),
    [("annotations", ["stop"]), ("blocked", ["stop", "content_filter"])],
)
async def test_the_late_filter_speaks_after_the_finish_without_a_delta(
    azure: AsyncAzureOpenAI, late_filter: str, reasons: list[str]
) -> None:
    asked = {"include_usage": True}
    script = prompt(chunks=4, late_filter=late_filter)
    *chunks, first, second, usage = await ask(azure, script, stream_options=asked)
    assert chunks[-1].choices[0].finish_reason == "stop"
    for chunk in (first, second):
        choice = chunk.choices[0].to_dict()
        assert "delta" not in choice
        assert "content_filter_offsets" in choice
    assert finishes_of([*chunks, first, second]) == reasons
    assert usage.usage


async def test_a_request_that_does_not_stream_gets_one_object(
    azure: AsyncAzureOpenAI, openai: AsyncOpenAI
) -> None:
    for client in (azure, openai):
        whole = await client.chat.completions.create(
            model="gpt", messages=[{"role": "user", "content": prompt(chunks=3)}]
        )
        assert whole.object == "chat.completion"
        assert whole.choices[0].message.content == "0 1 2 "
        assert whole.usage
        assert whole.usage.completion_tokens == 3
    calls: Any = [{"name": "f", "arguments": {"a": [1, 2]}}]
    whole = await azure.chat.completions.create(
        model="gpt", messages=[{"role": "user", "content": prompt(tool_calls=calls)}]
    )
    (call,) = whole.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"a": [1, 2]}


async def test_an_unknown_key_of_a_script_is_named(
    azure: AsyncAzureOpenAI, emulator: Emulator
) -> None:
    with pytest.raises(BadRequestError, match="chunkz"):
        await ask(azure, 'emulate {"chunkz": 3}')
    record = await emulator.request(0)
    await record.over.wait()
    assert record.outcome == "failed"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('emulate {"status": 200}', "status"),
        ('emulate {"end": "never"}', "end"),
        ('emulate {"chunks": ', "JSON"),
    ],
)
def test_a_script_that_cannot_be_used_says_why(text: str, named: str) -> None:
    with pytest.raises(BadScript, match=named):
        parse(text)


def test_a_message_that_only_begins_with_emulate_is_no_script() -> None:
    assert parse("emulate a pirate, please").text


def test_a_prompt_is_parsed_to_the_script_it_was_made_from() -> None:
    assert parse(prompt(chunks=3, end="eof", delay_ms=2.5)) == Script(
        chunks=3, end="eof", delay_ms=2.5
    )
    with pytest.raises(TypeError):
        prompt(chunkz=3)


def test_the_demo_echoes_what_was_asked_and_lasts_some_seconds() -> None:
    script = demo("  What is\na log? " + "x" * 200)
    assert script.text is not None
    text = "".join(script.text)
    assert text.startswith(f"You wrote: “What is a log? {'x' * 64}…”\n")
    assert "".join(demo("And now?").text or []).startswith("You wrote: “And now?”\n")
    assert "demo upstream" in text
    assert text.endswith("I stop talking.")
    assert max(map(len, script.text)) <= 9
    assert 200 < len(script.text) < 300


async def test_the_parts_of_a_message_are_read_as_its_text(azure: AsyncAzureOpenAI) -> None:
    stream: Any = await azure.chat.completions.create(
        model="gpt",
        messages=[
            {"role": "user", "content": "emulate nothing"},
            {"role": "user", "content": [{"type": "text", "text": prompt(chunks=2)}]},
            {"role": "assistant", "content": "no"},
        ],
        stream=True,
    )
    assert text_of([chunk async for chunk in stream]) == "0 1 "


async def test_what_lacks_a_key_a_version_or_a_path_is_refused(url: str) -> None:
    classic = f"{url}/openai/deployments/gpt/chat/completions"
    body = {"messages": [{"role": "user", "content": "hi"}]}
    async with httpx2.AsyncClient() as client:
        keyless = await client.post(f"{classic}?api-version=1", json=body)
        no_version = await client.post(classic, json=body, headers={"api-key": "k"})
        key_for_openai = await client.post(
            f"{url}/v1/chat/completions", json=body, headers={"api-key": "k"}
        )
        lost = await client.get(f"{url}/v2")
        unreadable = await client.post(
            f"{url}/openai/v1/chat/completions", content=b"{", headers={"api-key": "k"}
        )
        healthy = await client.get(f"{url}/healthz")
    assert (keyless.status_code, keyless.json()["error"]["code"]) == (401, "401")
    assert no_version.status_code == 404
    assert no_version.json()["error"]["message"] == "Resource not found"
    assert key_for_openai.json()["error"]["code"] == "invalid_api_key"
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "404")
    assert unreadable.status_code == 400
    assert healthy.json() == {"status": "ok"}


@pytest.mark.parametrize(
    "wrong",
    [{"messages": "hi"}, {"messages": ["hi"]}, {"n": -1}, {"n": 129}, {"n": "two"}],
    ids=str,
)
async def test_a_field_that_azure_would_refuse_is_named(url: str, wrong: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], **wrong}
    async with httpx2.AsyncClient() as client:
        refused = await client.post(
            f"{url}/openai/v1/chat/completions", json=body, headers={"api-key": "k"}
        )
    assert refused.status_code == 400
    assert f"'{next(iter(wrong))}'" in refused.json()["error"]["message"]


async def test_a_missing_version_is_the_not_found_of_the_sdk(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/openai/deployments/gpt", api_key="k") as client:
        with pytest.raises(NotFoundError):
            await ask(client, "hi")


async def test_the_journal_can_be_read_over_http_without_headers(
    azure: AsyncAzureOpenAI, emulator: Emulator, url: str
) -> None:
    await ask(azure, prompt(chunks=2, key="k"))
    await (await emulator.request(0)).over.wait()
    async with httpx2.AsyncClient() as client:
        (entry,) = (await client.get(f"{url}/emulator/requests")).json()
    assert sorted(entry) == [
        *("body", "ended", "key", "number", "outcome", "path", "sent", "started")
    ]
    assert (entry["number"], entry["key"]) == (1, "k")
    assert (entry["sent"], entry["outcome"]) == (2, "completed")
    assert entry["path"] == "/openai/deployments/gpt/chat/completions"


async def test_serving_ends_quickly_with_streams_open() -> None:
    emulator = Emulator()
    async with serve(emulator) as base:
        client = AsyncOpenAI(base_url=f"{base}/v1", api_key="k", max_retries=0)
        stream = await opened(client, prompt(chunks=3, end="stall"))
        await anext(aiter(stream))
        ending = time.monotonic()
    assert time.monotonic() - ending < 0.5
    assert emulator.requests[0].outcome == "disconnected"
    await stream.close()
    await client.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_process_says_when_it_is_ready_and_leaves_at_once_on_a_signal(
    number: signal.Signals,
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "emulator", "--port", "0"),
        cwd=Path(__file__).parents[1],
        env=os.environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    ready = (await process.stdout.readline()).decode()
    words, _, base = ready.rstrip("\n").rpartition(" ")
    assert words == "emulator ready on"
    async with AsyncOpenAI(base_url=f"{base}/v1", api_key="k", max_retries=0) as client:
        with pytest.raises(BROKEN):
            await ask(client, prompt(chunks=2, end="reset"))
        stream = await opened(client, prompt(chunks=2, end="stall"))
        await anext(aiter(stream))
        sent = time.monotonic()
        process.send_signal(number)
        output, errors = await process.communicate()
        assert time.monotonic() - sent < 1
        await stream.close()
    assert (process.returncode, output, errors) == (0, b"", b"")
