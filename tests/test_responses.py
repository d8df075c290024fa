"""The real openai SDK's Responses, unmodified, against the running stack."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response
from pydantic import BaseModel
from redis.asyncio import Redis

from api.responses_request import ResponsesRequest
from api.wires.responses import GOES_BACK
from emulator.app import Emulator
from emulator.script import prompt
from relay import keys
from relay.settings import Settings
from tests.conftest import claim_one, running_api, running_worker, text_of, until, watch
from tests.corpus import LOOKUP
from tests.test_chat_completions import parameters

MODEL = "demo"
TOOL: Any = {
    "type": "function",
    "name": "lookup",
    "parameters": {"type": "object", "properties": {}},
    "strict": False,
}


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """The SDK puts off a second's work to its first use. Done while the loop stands still for it,
    Redis would be taken for silent, and away."""
    with OpenAI(api_key="k") as sdk:
        assert callable(sdk.responses.create)
    Response.construct(id="x", output=[{"type": "message"}])


def client(http: httpx2.AsyncClient) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="k", max_retries=0)


@pytest.fixture
async def sdk(stack: httpx2.AsyncClient) -> AsyncIterator[AsyncOpenAI]:
    async with client(stack) as sdk:
        yield sdk


def asking(**script: Any) -> Any:
    return {"model": MODEL, "input": prompt(**script)}


def counted(number: int) -> str:
    return "".join(f"{n} " for n in range(number))


async def begun(sdk: AsyncOpenAI, **script: Any) -> str:
    response = await sdk.responses.create(**asking(**script), background=True)
    return str(response.id)


async def taken(stream: Any) -> list[Any]:
    return [event.model_dump() async for event in stream]


async def replayed(sdk: AsyncOpenAI, response_id: str) -> list[Any]:
    return await taken(await sdk.responses.retrieve(response_id, stream=True))


def texts(events: list[Any]) -> list[str]:
    """The text of each item by its deltas."""
    grown: dict[int, str] = {}
    for event in events:
        if event["type"] == "response.output_text.delta":
            grown[event["output_index"]] = grown.get(event["output_index"], "") + event["delta"]
    return list(grown.values())


async def test_the_answer_is_waited_for_or_watched(sdk: AsyncOpenAI) -> None:
    asked = asking(chunks=3)
    whole = await sdk.responses.create(**asked)
    assert (whole.status, whole.output_text) == ("completed", "0 1 2 ")
    assert whole.usage
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    events = await taken(await sdk.responses.create(**asked, stream=True, background=True))
    assert texts(events) == ["0 1 2 "]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "response.completed"
    async with sdk.responses.stream(**asked) as stream:
        assert (await stream.get_final_response()).output_text == "0 1 2 "


async def test_the_sync_sdk_waits_streams_and_resumes_too(stack: httpx2.AsyncClient) -> None:
    def all_three() -> tuple[str, str, list[int], str]:
        with OpenAI(base_url=f"{stack.base_url}/v1", api_key="k", max_retries=0) as sdk:
            whole = sdk.responses.create(**asking(chunks=3))
            with sdk.responses.stream(**asking(chunks=3)) as stream:
                helped = stream.get_final_response().output_text
            rest = sdk.responses.retrieve(whole.id, stream=True, starting_after=6)
            numbers = [event.sequence_number for event in rest]
            with sdk.responses.stream(response_id=whole.id, starting_after=6) as again:
                same = again.get_final_response().output_text
            return whole.output_text, helped, numbers, same

    whole, helped, numbers, same = await asyncio.to_thread(all_three)
    assert (whole, helped, same) == ("0 1 2 ", "0 1 2 ", "0 1 2 ")
    assert numbers == list(range(7, 7 + len(numbers)))
    assert numbers


async def test_in_the_background_it_is_queued_at_once_and_polled_until_it_is_completed(
    settings: Settings,
) -> None:
    async with running_api(settings) as http, client(http) as sdk:
        response = await sdk.responses.create(**asking(chunks=3), background=True)
        assert (response.status, response.output) == ("queued", [])
        async with running_worker(settings):

            async def ended() -> bool:
                return (await sdk.responses.retrieve(response.id)).status == "completed"

            await until(ended)
        last = await sdk.responses.retrieve(response.id)
    assert last.output_text == "0 1 2 "
    assert last.created_at == response.created_at


async def test_what_was_dropped_in_the_middle_is_resumed_without_a_repeated_or_missing_event(
    sdk: AsyncOpenAI,
) -> None:
    stream = await sdk.responses.create(
        **asking(chunks=30, delay_ms=10), stream=True, background=True
    )
    seen = [(await anext(stream)).model_dump() for _ in range(12)]
    await stream.close()
    response_id = seen[0]["response"]["id"]
    for _ in range(2):
        last = seen[-1]["sequence_number"]
        rest = await sdk.responses.retrieve(response_id, stream=True, starting_after=last)
        seen += [(await anext(rest)).model_dump() for _ in range(5)]
        await rest.close()
    last = seen[-1]["sequence_number"]
    seen += await taken(await sdk.responses.retrieve(response_id, stream=True, starting_after=last))
    assert seen == await replayed(sdk, response_id)
    assert texts(seen) == [counted(30)]


async def test_whoever_has_it_all_is_told_no_more(sdk: AsyncOpenAI) -> None:
    response_id = (await sdk.responses.create(**asking(chunks=2))).id
    events = await replayed(sdk, response_id)
    for beyond in (0, 5):
        last = events[-1]["sequence_number"] + beyond
        rest = await sdk.responses.retrieve(response_id, stream=True, starting_after=last)
        assert await taken(rest) == []


async def test_whoever_has_more_than_stands_yet_is_told_only_what_comes_after_it(
    settings: Settings,
) -> None:
    async with running_api(settings) as http, client(http) as sdk:
        response_id = await begun(sdk, chunks=9)
        rest = await sdk.responses.retrieve(response_id, stream=True, starting_after=8)
        async with running_worker(settings):
            seen = await taken(rest)
        assert seen == (await replayed(sdk, response_id))[9:]


async def test_a_second_viewer_from_any_process_gets_the_same_events(
    settings: Settings, worker: Any
) -> None:
    async with (
        running_api(settings) as one,
        running_api(settings) as other,
        client(one) as sdk,
        client(other) as second,
    ):
        stream = await sdk.responses.create(**asking(chunks=30, delay_ms=5), stream=True)
        first = await anext(stream)
        assert first.type == "response.created"
        late = asyncio.create_task(replayed(second, first.response.id))
        mine = [first.model_dump(), *await taken(stream)]
        assert mine == await late == await replayed(second, first.response.id)
        objects = [await each.responses.retrieve(first.response.id) for each in (sdk, second)]
        assert objects[0] == objects[1]
        assert objects[0].model_dump() == mine[-1]["response"]


@pytest.mark.parametrize("streams", [True, False])
async def test_the_same_answer_is_watched_natively(
    sdk: AsyncOpenAI, stack: httpx2.AsyncClient, streams: Any
) -> None:
    raw = await sdk.responses.with_raw_response.create(**asking(chunks=3), stream=streams)
    assert raw.headers["x-request-id"] == raw.headers["x-stream-id"]
    assert text_of(await watch(stack, raw.headers["x-stream-id"])) == "0 1 2 "
    answer = raw.parse()
    response = (await anext(answer)).response if streams else answer
    assert response.id == f"resp_{raw.headers['x-stream-id']}"


async def test_a_cancel_ends_the_upstream_and_every_viewer_and_keeps_the_text(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    stream = await sdk.responses.create(**asking(chunks=1, end="stall"), stream=True)
    created = await anext(stream)
    async for event in stream:
        if event.type == "response.output_text.delta":
            break
    cancelled = await sdk.responses.cancel(created.response.id)
    assert (cancelled.status, cancelled.output_text) == ("cancelled", "0 ")
    rest = await taken(stream)
    assert rest[-1]["response"]["status"] == "cancelled"
    record = await emulator.request(0)
    async with asyncio.timeout(5):
        await record.over.wait()
    assert record.outcome == "disconnected"
    assert await sdk.responses.cancel(created.response.id) == cancelled


async def test_a_cancel_that_no_worker_hears_of_in_time_tells_how_the_response_stands(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.responses.CANCEL_SECONDS", 0.01)
    async with running_api(settings) as http, client(http) as sdk:
        response_id = (await sdk.responses.create(**asking(), background=True)).id
        await claim_one(redis)
        assert (await sdk.responses.cancel(response_id)).status == "queued"


async def test_a_response_that_waits_is_cancelled_at_once(settings: Settings) -> None:
    async with running_api(settings) as http, client(http) as sdk:
        cancelled = await sdk.responses.cancel(await begun(sdk, chunks=1))
        assert (cancelled.status, cancelled.output) == ("cancelled", [])


@pytest.mark.parametrize(
    ("headers", "script", "outcome"),
    [
        ({"x-on-disconnect": "cancel"}, {"chunks": 1, "end": "stall"}, "disconnected"),
        ({}, {"chunks": 40, "delay_ms": 10}, "completed"),
    ],
)
async def test_leaving_stops_the_answer_only_where_that_was_asked_for(
    sdk: AsyncOpenAI, emulator: Emulator, headers: Any, script: Any, outcome: str
) -> None:
    for streams in (True, False):
        asked: Any = sdk.responses.create(
            **asking(**script),
            stream=streams,
            extra_headers=headers,
        )
        number = emulator.total
        running = asyncio.ensure_future(asked)
        record = await emulator.request(number)
        if streams:
            await (await running).close()
        else:
            running.cancel()
        async with asyncio.timeout(5):
            await record.over.wait()
        assert record.outcome == outcome


async def test_what_fails_before_it_began_is_an_error_by_its_status_and_in_the_background_in_band(
    sdk: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.upstream.FIRST_RETRY_SECONDS", 0.001)
    asked = asking(status=429, retry_after_ms=1)
    failed = []
    for streams in (False, True):
        with pytest.raises(openai.RateLimitError) as raised:
            await sdk.responses.create(**asked, stream=streams)
        assert raised.value.code == "upstream_rate_limited"
        headers = raised.value.response.headers
        assert headers["x-should-retry"] == "false"
        assert headers["x-request-id"] == headers["x-stream-id"]
        failed.append(await sdk.responses.retrieve(f"resp_{headers['x-stream-id']}"))
    watched = await taken(await sdk.responses.create(**asked, stream=True, background=True))
    kinds = [event["type"] for event in watched]
    assert kinds == ["response.created", "response.queued", "response.failed"]
    failed.append(Response.construct(**watched[-1]["response"]))
    for response in failed:
        assert response.status == "failed"
        assert response.error
        assert response.error.code == "rate_limit_exceeded"


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_stream_can_be_cancelled_and_left_before_it_began(
    settings: Settings, redis: Redis, leaves: bool
) -> None:
    async def is_queued() -> bool:
        return bool(await redis.zcard(keys.QUEUE) == 1)

    async with running_api(settings) as http, client(http) as sdk:
        headers = {"x-on-disconnect": "cancel"}
        asked: Any = sdk.responses.create(**asking(chunks=1), stream=True, extra_headers=headers)
        asking_for_it = asyncio.ensure_future(asked)
        await until(is_queued)
        [stream_id] = await redis.zrange(keys.QUEUE, 0, -1)
        response_id = f"resp_{stream_id.decode()}"
        if leaves:
            asking_for_it.cancel()
        else:
            await sdk.responses.cancel(response_id)
            assert await taken(await asking_for_it) == await replayed(sdk, response_id)

        async def is_cancelled() -> bool:
            response: Response = await sdk.responses.retrieve(response_id)
            return response.status == "cancelled"

        await until(is_cancelled)


async def test_an_answer_that_fails_in_the_middle_is_failed_with_what_was_said(
    sdk: AsyncOpenAI,
) -> None:
    events = await taken(await sdk.responses.create(**asking(chunks=3, end="eof"), stream=True))
    assert texts(events) == ["0 1 2 "]
    response = events[-1]["response"]
    assert (response["status"], response["error"]["type"]) == ("failed", "upstream_incomplete")
    assert response["output"][0]["status"] == "incomplete"


async def test_in_the_background_a_worker_that_is_replaced_is_told_by_items_and_never_spliced(
    settings: Settings,
) -> None:
    async with running_api(settings) as http, client(http) as sdk:
        asked = asking(chunks=40, delay_ms=20)
        async with running_worker(settings):
            waiting = asyncio.ensure_future(sdk.responses.create(**asked))
            stream = await sdk.responses.create(**asked, stream=True, background=True)
            seen = [(await anext(stream)).model_dump() for _ in range(12)]
        async with running_worker(settings):
            events = seen + await taken(stream)
            whole = await waiting
        response_id = events[0]["response"]["id"]
        assert events == await replayed(sdk, response_id)
        last = seen[-1]["sequence_number"]
        rest = await sdk.responses.retrieve(response_id, stream=True, starting_after=last)
        assert await taken(rest) == events[last + 1 :]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    first, second = texts(events)
    assert counted(40).startswith(first)
    assert second == whole.output_text == counted(40)
    assert [item["content"][0]["text"] for item in events[-1]["response"]["output"]] == [second]


async def test_a_plain_stream_ends_as_failed_when_its_worker_is_replaced_and_the_answer_goes_on(
    settings: Settings,
) -> None:
    """Frameworks would take the text of both attempts together."""
    async with running_api(settings) as http, client(http) as sdk:
        async with running_worker(settings):
            stream = await sdk.responses.create(**asking(chunks=40, delay_ms=20), stream=True)
            seen = [(await anext(stream)).model_dump() for _ in range(12)]
        async with running_worker(settings):
            seen += await taken(stream)
            last = seen[-1]["response"]
            whole = await taken(await sdk.responses.retrieve(last["id"], stream=True))
    assert (last["status"], last["error"]["type"]) == ("failed", "interrupted")
    [told] = texts(seen)
    assert counted(40).startswith(told)
    assert texts(whole)[-1] == counted(40)
    assert seen[:-1] == whole[: len(seen) - 1], "Each event has its number for every viewer."


async def test_a_call_is_made_and_its_output_sent_back_with_the_output_as_it_came(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    asked: Any = [{"role": "user", "content": prompt(tool_calls=[LOOKUP])}]
    async with sdk.responses.stream(model=MODEL, input=asked, tools=[TOOL]) as stream:
        response = await stream.get_final_response()
    [call] = response.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("lookup", LOOKUP["arguments"])
    asked += [item.model_dump(exclude_none=True) for item in response.output]
    asked.append({"type": "function_call_output", "call_id": call.call_id, "output": "Rain."})
    asked.append({"role": "user", "content": prompt(chunks=1)})
    answer = await sdk.responses.create(model=MODEL, input=asked, tools=[TOOL])
    assert answer.output_text == "0 "
    _, assistant, tool, _ = (await emulator.request(1)).body["messages"]
    assert [each["id"] for each in assistant["tool_calls"]] == [call.call_id]
    assert tool == {"role": "tool", "tool_call_id": call.call_id, "content": "Rain."}


@pytest.mark.parametrize(
    ("delta", "back"),
    [
        ({"reasoning_content": "Hm."}, {"reasoning_content": "Hm."}),
        ({"reasoning": "Hm."}, {}),
        ({"content": [{"type": "thinking", "thinking": "Hm."}]}, {}),
    ],
)
async def test_what_led_to_a_call_goes_back_to_a_model_service_that_names_it_so(
    sdk: AsyncOpenAI, emulator: Emulator, delta: Any, back: Any
) -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    said = [(delta, None), ({"tool_calls": [call]}, "tool_calls")]
    choices = [{"index": 0, "delta": each, "finish_reason": end} for each, end in said]
    raw = [{"id": "x", "model": MODEL, "choices": [choice]} for choice in choices]
    first = await sdk.responses.create(**asking(raw=raw))
    assert [item.type for item in first.output] == ["reasoning", "function_call"]
    result = {"type": "function_call_output", "call_id": "c", "output": "1"}
    asked: Any = [*first.output, result, {"role": "user", "content": prompt(chunks=1)}]
    await sdk.responses.create(model=MODEL, input=asked)
    called = (await emulator.request(1)).body["messages"][0]
    calls = [{"id": "c", "type": "function", "function": call["function"]}]
    assert called == {"role": "assistant", "content": None, "tool_calls": calls, **back}


def thought(text: str, item_id: str = f"{GOES_BACK}_1") -> Any:
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": item_id, "summary": [], "content": content}


def said(role: str, content: str | None, **more: Any) -> Any:
    return {"role": role, "content": content, **more}


LOOKED: Any = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
LOOKS = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        (
            [thought("A"), said("assistant", "I look."), LOOKED],
            [said("assistant", "I look.", reasoning_content="A", tool_calls=[LOOKS])],
        ),
        (
            [thought("A"), LOOKED, thought("B"), LOOKED],
            [said("assistant", None, reasoning_content="AB", tool_calls=[LOOKS, LOOKS])],
        ),
        (
            [thought("A"), thought("B"), said("assistant", "Yes.")],
            [said("assistant", "Yes.", reasoning_content="AB")],
        ),
        (
            [thought("A"), said("user", "Hm?"), said("assistant", "Yes.")],
            [said("user", "Hm?"), said("assistant", "Yes.")],
        ),
        ([thought("A", "rs_1"), said("assistant", "Yes.")], [said("assistant", "Yes.")]),
        ([thought("A", ""), said("assistant", "Yes.")], [said("assistant", "Yes.")]),
    ],
)
def test_a_thought_goes_back_with_what_followed_from_it(
    items: list[Any], messages: list[Any]
) -> None:
    request = ResponsesRequest.model_validate({"model": MODEL, "input": items})
    assert request.to_asked().to_stored()[0]["messages"] == messages


class Weather(BaseModel):
    """It rains or not."""

    rain: bool


async def test_what_the_sdk_has_parsed_is_sent_back_with_it_and_the_model_does_not_see_it(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    strict = TOOL | {"strict": True}
    said: Any = {"text": ['{"rain":', "true}"], "tool_calls": [LOOKUP]}
    first = await sdk.responses.parse(**asking(**said), text_format=Weather, tools=[strict])
    # As it stands there: the SDK for JavaScript sends it so, and in Python whoever dumps it.
    output = [item.model_dump(exclude_none=True) for item in first.output]
    [message, call] = output
    assert message["content"][0]["parsed"] == {"rain": True}
    assert call["parsed_arguments"] == LOOKUP["arguments"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "Rain."}
    asked: Any = [*output, result, {"role": "user", "content": prompt(chunks=1)}]
    assert (await sdk.responses.create(model=MODEL, input=asked)).output_text == "0 "
    assert "parsed" not in json.dumps((await emulator.request(1)).body)


async def test_the_model_is_asked_what_the_response_was_asked(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    url = {"url": "https://example.org/a.png", "detail": "original"}
    image: Any = {"type": "input_image", "image_url": url["url"], "detail": url["detail"]}
    earlier: Any = {"type": "output_text", "text": "Hi.", "annotations": []}
    asked: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "See."}, image]},
        {"type": "message", "role": "assistant", "content": [earlier], "id": "m", "status": "x"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"type": "reasoning", "id": "r", "summary": []},
        {"type": "function_call", "call_id": "d", "name": "f", "arguments": "{}"},
        {"type": "message", "role": "assistant", "content": "I look."},
        {"type": "function_call_output", "call_id": "d", "output": "2"},
        {"role": "user", "content": prompt(text=['{"rain":', "true}"])},
    ]
    response = await sdk.responses.parse(
        model=MODEL,
        input=asked,
        text_format=Weather,
        instructions="Be brief.",
        tools=[TOOL | {"strict": True}],
        tool_choice={"type": "function", "name": "lookup"},
        parallel_tool_calls=False,
        temperature=0.5,
        top_p=0.25,
        max_output_tokens=99,
        reasoning={"effort": "low"},
        text={"verbosity": "low"},
        metadata={"a": "b"},
        user="u",
        service_tier="flex",
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        extra_body={"prompt_cache_options": {"a": 1}},
        safety_identifier="s",
        store=True,
    )
    assert response.output_parsed == Weather(rain=True)
    body = (await emulator.request(0)).body
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "See."}, {"type": "image_url", "image_url": url}],
        },
        {"role": "assistant", "content": "Hi.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        {"role": "assistant", "content": "I look."},
        {"role": "assistant", "content": None, "tool_calls": [call | {"id": "d"}]},
        {"role": "tool", "tool_call_id": "d", "content": "2"},
        {"role": "user", "content": asked[-1]["content"]},
    ]
    [tool] = body["tools"]
    assert (tool["type"], tool["function"]["name"]) == ("function", "lookup")
    assert body["tool_choice"] == {"type": "function", "function": {"name": "lookup"}}
    assert body["response_format"]["type"] == "json_schema"
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["rain"]
    told = {"temperature": 0.5, "top_p": 0.25, "max_completion_tokens": 99, "verbosity": "low"}
    told |= {"user": "u", "service_tier": "flex", "prompt_cache_key": "k", "safety_identifier": "s"}
    told |= {"prompt_cache_retention": "24h", "prompt_cache_options": {"a": 1}}
    assert told.items() <= body.items()
    assert body["reasoning_effort"] == "low"
    assert body["parallel_tool_calls"] is False
    assert not {"metadata", "store"} & body.keys()


async def test_what_frameworks_send_by_themselves_is_taken_and_the_model_hears_nothing_of_it(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    plain: Any = {"model": MODEL, "input": prompt(chunks=1)}
    of_frameworks: list[dict[str, Any]] = [
        {"include": []},
        {"include": ["reasoning.encrypted_content"], "reasoning": {"summary": None}},
        {"store": False, "truncation": "disabled", "include": None, "previous_response_id": None},
        {"tools": [], "text": {"format": None}, "conversation": None},
    ]
    for more in [{}, *of_frameworks]:
        response = await sdk.responses.create(**plain, extra_body=more)
        assert response.output_text == "0 "
    bodies = [(await emulator.request(number)).body for number in range(emulator.total)]
    assert bodies == [bodies[0]] * (1 + len(of_frameworks))


async def test_who_asks_for_json_is_told_so_with_the_answer(sdk: AsyncOpenAI) -> None:
    """LangChain parses a streamed answer only then."""
    asked: Any = {"model": MODEL, "input": prompt(text=['{"rain":', "true}"])}
    async with sdk.responses.stream(**asked, text_format=Weather) as stream:
        streamed = await stream.get_final_response()
    for response in (streamed, await sdk.responses.parse(**asked, text_format=Weather)):
        assert response.text
        assert response.text.format
        assert response.text.format.type == "json_schema"
    assert (await sdk.responses.create(**asked)).text is None
    wanted: Any = {"format": {"type": "json_object"}}
    key: Any = {"extra_headers": {"idempotency-key": "once"}}
    for _ in ("queued", "repeated"):
        told = await sdk.responses.create(**asked, text=wanted, background=True, **key)
        assert told.text
        assert told.text.format
        assert told.text.format.type == "json_object"


@pytest.mark.parametrize(
    ("kind", "field", "short"),
    [
        ("ResponsesRequest", "input", {"type": "string"}),
        ("MessageItem", "content", {"type": "string"}),
        ("CallOutputItem", "output", {"type": "string"}),
        ("ResponsesRequest", "tool_choice", {"enum": ["none", "auto", "required"]}),
    ],
)
async def test_the_openapi_document_allows_the_short_form_of_what_has_one(
    api: httpx2.AsyncClient, kind: str, field: str, short: dict[str, Any]
) -> None:
    schemas = (await api.get("/openapi.json")).json()["components"]["schemas"]
    forms = schemas[kind]["properties"][field].get("anyOf", [])
    assert any(short.items() <= form.items() for form in forms)
    assert len(forms) > 1, "The long one is still allowed."


@pytest.mark.parametrize(
    "given", [["Hello"], [{"role": "user", "content": [{"text": "Hello"}]}]], ids=["item", "part"]
)
async def test_what_has_no_type_is_refused_in_words_that_are_not_of_this_server_inside(
    sdk: AsyncOpenAI, given: Any
) -> None:
    with pytest.raises(openai.BadRequestError, match="a JSON object with a known type"):
        await sdk.responses.create(model=MODEL, input=given)


async def test_an_item_that_is_not_known_is_refused_with_those_that_are(sdk: AsyncOpenAI) -> None:
    asked: Any = {"model": MODEL, "input": [{"type": "item_reference", "id": "msg_x"}]}
    with pytest.raises(openai.BadRequestError, match=r"'item_reference' is not known.*'message'"):
        await sdk.responses.create(**asked)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": 9}, "temperature", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "invalid_value"),
        ({"tool_choice": "never"}, "tool_choice.type", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "unknown_parameter"),
        ({"truncation": "auto"}, "truncation", "invalid_value"),
        ({"include": ["file_search_call.results"]}, "include.0", "invalid_value"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "invalid_value"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "input.0.message.content.0",
            "invalid_value",
        ),
    ],
)
async def test_bad_input_is_refused_in_openais_shape_with_the_field_named(
    sdk: AsyncOpenAI, change: dict[str, Any], param: str, code: str, emulator: Emulator
) -> None:
    asked: Any = {**asking(), **change}
    with pytest.raises(openai.BadRequestError) as raised:
        await sdk.responses.create(**asked, background=True)
    assert (raised.value.param, raised.value.code) == (param, code)
    assert raised.value.type == "invalid_request_error"
    assert emulator.total == 0


async def test_what_the_sdk_can_ask_and_this_server_cannot_honour_is_refused_by_name(
    sdk: AsyncOpenAI,
) -> None:
    unknown = parameters(sdk.responses.create) - ResponsesRequest.model_fields.keys()
    assert "conversation" in unknown
    for name in unknown:
        with pytest.raises(openai.BadRequestError) as raised:
            await sdk.responses.create(**{**asking(), name: "x"})
        assert (raised.value.param, raised.value.code) == (name, "unknown_parameter")


async def test_what_cannot_be_retrieved_is_refused_with_the_field_named(sdk: AsyncOpenAI) -> None:
    response_id = await begun(sdk, chunks=1)
    asked: Any = {
        "after": (1, "after", "unknown_parameter"),
        "include": (["file_search_call.results"], "include[].0", "invalid_value"),
        "include_obfuscation": (True, "include_obfuscation", "invalid_value"),
    }
    for name, (value, param, code) in asked.items():
        with pytest.raises(openai.BadRequestError) as raised:
            await sdk.responses.retrieve(response_id, stream=True, extra_query={name: value})
        assert (raised.value.param, raised.value.code) == (param, code)


async def test_who_looks_at_a_response_may_ask_for_what_who_created_it_may(
    sdk: AsyncOpenAI, api: httpx2.AsyncClient
) -> None:
    created = await sdk.responses.create(**asking(chunks=1))
    seen = await sdk.responses.retrieve(created.id, include=["reasoning.encrypted_content"])
    assert seen.output_text == "0 "
    by_hand = {"include": "reasoning.encrypted_content"}
    assert (await api.get(f"/v1/responses/{created.id}", params=by_hand)).json() == seen.to_dict()


async def test_the_openapi_document_has_no_two_parameters_of_which_generators_make_one_name(
    api: httpx2.AsyncClient,
) -> None:
    paths = (await api.get("/openapi.json")).json()["paths"]
    for operation in (each for methods in paths.values() for each in methods.values()):
        names = [re.sub(r"\W", "", each["name"]) for each in operation.get("parameters", ())]
        assert len(set(names)) == len(names), names
    assert "/v1/responses/{response_id}" in paths


async def test_any_other_model_is_refused(sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        await sdk.responses.create(model="gpt-99", input="Hello")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


async def test_what_was_erased_is_not_found_and_told_to_who_watches(sdk: AsyncOpenAI) -> None:
    stream = await sdk.responses.create(**asking(chunks=1, end="stall"), stream=True)
    response_id = (await anext(stream)).response.id
    await sdk.responses.delete(response_id)
    with pytest.raises(openai.APIError) as told:
        await taken(stream)
    assert told.value.code == "stream_gone"
    for asked in (
        sdk.responses.retrieve(response_id),
        sdk.responses.retrieve(response_id, stream=True),
        sdk.responses.cancel(response_id),
        sdk.responses.delete(response_id),
    ):
        with pytest.raises(openai.NotFoundError) as raised:
            await asked
        assert raised.value.code == "stream_gone"


async def test_what_never_was_is_not_found(sdk: AsyncOpenAI) -> None:
    for response_id in ("resp_x", "x"):
        with pytest.raises(openai.NotFoundError) as raised:
            await sdk.responses.retrieve(response_id)
        assert raised.value.code == "stream_unknown"


async def test_a_draining_server_breaks_off_and_the_rest_comes_from_another(
    settings: Settings, worker: Any
) -> None:
    async with running_api(settings) as other, client(other) as second, AsyncExitStack() as later:
        async with running_api(settings) as one:
            sdk = await later.enter_async_context(client(one))
            stream = await sdk.responses.create(**asking(chunks=60, delay_ms=20), stream=True)
            seen = [(await anext(stream)).model_dump() for _ in range(8)]
            reading = asyncio.ensure_future(rest_until_broken(stream))
        seen += await reading
        last, response_id = seen[-1]["sequence_number"], seen[0]["response"]["id"]
        rest = await second.responses.retrieve(response_id, stream=True, starting_after=last)
        seen += await taken(rest)
        assert seen == await replayed(second, response_id)
    assert texts(seen) == [counted(60)]


async def rest_until_broken(stream: Any) -> list[Any]:
    """All that comes until the connection breaks; a proper end would be taken for the whole."""
    events: list[Any] = []
    try:
        async for event in stream:
            events.append(event.model_dump())
    except (openai.APIConnectionError, httpx2.TransportError):
        return events
    pytest.fail("it ended as if that had been all")


async def test_the_same_key_leads_to_the_same_response(sdk: AsyncOpenAI) -> None:
    key: Any = {"extra_headers": {"idempotency-key": "once"}}
    one = await sdk.responses.create(**asking(chunks=1), background=True, **key)
    two = await sdk.responses.create(**asking(chunks=1), **key)
    assert (two.id, two.output_text) == (one.id, "0 ")
    conflicting: Any = {**asking(chunks=2), **key}
    with pytest.raises(openai.ConflictError) as refused:
        await sdk.with_options(max_retries=2).responses.create(**conflicting)
    assert refused.value.code == "idempotency_conflict"
    assert refused.value.response.headers["x-should-retry"] == "false", "it would be refused again"


async def test_once_an_answer_is_born_its_response_needs_nothing_more_of_redis(
    sdk: AsyncOpenAI, redis: Any
) -> None:
    # Refused now, the SDK would ask once more, and have a second answer made.
    await redis.execute_command("ACL SETUSER default -hgetall -xrange")
    try:
        told = await sdk.responses.create(**asking(chunks=1), background=True)
        stream = await sdk.responses.create(**asking(chunks=1), background=True, stream=True)
        first = await anext(aiter(stream))
    finally:
        await redis.execute_command("ACL SETUSER default +@all")
    await stream.close()
    for response in (told, first.response):
        now = await sdk.responses.retrieve(response.id)
        assert response.created_at == now.created_at
        assert (response.status, response.output) == ("queued", [])


async def test_without_redis_the_sdk_is_told_to_try_again(sdk: AsyncOpenAI, redis: Any) -> None:
    await redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(openai.InternalServerError) as raised:
            await sdk.responses.create(**asking(), background=True)
    finally:
        await redis.config_set("maxmemory", 0)
    assert (raised.value.status_code, raised.value.code) == (503, "redis_away")
    assert raised.value.response.headers["retry-after"]
