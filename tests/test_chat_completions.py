"""The real openai SDK, unmodified, against the running stack."""

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncAzureOpenAI, AsyncOpenAI, OpenAI
from pydantic import SecretStr
from redis.asyncio import Redis

from api.chat_request import ChatCompletionRequest
from api.feed import Feed
from api.openai_errors import failed
from api.problems import RETRY_SECONDS
from api.wires.chat_completions import encoder
from cli.redis_server import RedisServer
from emulator.app import Emulator
from emulator.script import prompt
from relay.events import FAILED, Cursor, Event, to_json
from relay.ids import is_stream_id, new_stream_id
from relay.settings import Settings
from tests.conftest import changed, running_api, running_worker, stack_settings, text_of, watch
from tests.corpus import CORPUS, LOOKUP
from tests.test_upstream import answering, refusal

MODEL = "demo"


@pytest.fixture(params=["azure", "openai"])
def settings(request: pytest.FixtureRequest, settings: Settings, emulator_url: str) -> Settings:
    """Both kinds of upstream: Azure says more in each chunk."""
    if request.param == "azure":
        return settings
    none = dict.fromkeys(("azure_endpoint", "azure_key", "azure_deployment"))
    base = {"openai_base_url": f"{emulator_url}/v1", "openai_model": MODEL}
    return changed(settings, **none, **base, openai_key=SecretStr("key"))


@pytest.fixture
async def sdk(stack: httpx2.AsyncClient) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stack.base_url}/v1", api_key="k", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
async def direct(settings: Settings, emulator_url: str) -> AsyncIterator[AsyncOpenAI]:
    """What the same client talks to without chat-relay in between."""
    path = "openai/v1" if settings.azure_endpoint else "v1"
    async with AsyncOpenAI(
        base_url=f"{emulator_url}/{path}",
        api_key="k",
        default_headers={"api-key": "k"},
        max_retries=0,
    ) as sdk:
        yield sdk


def question(**script: Any) -> Any:
    return [{"role": "user", "content": prompt(**script)}]


def same(given: Any) -> Any:
    """What must be equal: all, but that ids and times, which are of each request, are told."""
    data = given.model_dump(exclude_unset=True)
    return data | {key: bool(data.get(key)) for key in ("id", "created")}


async def streamed(sdk: AsyncOpenAI, script: Any, options: Any) -> list[Any]:
    stream = await sdk.chat.completions.create(
        model=MODEL, messages=question(**script), stream=True, **options
    )
    return [same(chunk) async for chunk in stream]


@pytest.mark.parametrize("name", CORPUS)
async def test_every_chunk_is_the_upstreams(
    name: str, sdk: AsyncOpenAI, direct: AsyncOpenAI
) -> None:
    assert await streamed(sdk, *CORPUS[name]) == await streamed(direct, *CORPUS[name])


@pytest.mark.parametrize("name", CORPUS)
async def test_the_whole_answer_is_the_upstreams(
    name: str, sdk: AsyncOpenAI, direct: AsyncOpenAI
) -> None:
    script, options = CORPUS[name]
    options = {key: value for key, value in options.items() if key != "stream_options"}
    asked = {"model": MODEL, "messages": question(**script), **options}
    ours, theirs = [same(await client.chat.completions.create(**asked)) for client in (sdk, direct)]
    assert without_filter_results(ours) == without_filter_results(theirs)


def without_filter_results(completion: Any) -> Any:
    """The upstream tells other results of its filter when it streams; see the test below."""
    for choice in completion["choices"]:
        choice.pop("content_filter_results", None)
    return completion


async def test_the_filters_results_are_those_of_the_newest_word_on_each_category(
    sdk: AsyncOpenAI, settings: Settings
) -> None:
    asked: Any = {"model": MODEL, "messages": question(chunks=4)}
    [choice] = same(await sdk.chat.completions.create(**asked))["choices"]
    if settings.azure_endpoint:
        assert choice["content_filter_results"]["hate"] == {"filtered": False, "severity": "safe"}
    else:
        assert "content_filter_results" not in choice
    asked["messages"] = question(chunks=4, late_filter="blocked")
    [choice] = same(await sdk.chat.completions.create(**asked))["choices"]
    assert choice["content_filter_results"]["protected_material_text"]["filtered"] is True


async def test_the_sync_sdk_streams_and_waits_too(stack: httpx2.AsyncClient) -> None:
    def both() -> tuple[str, str | None]:
        with OpenAI(base_url=f"{stack.base_url}/v1", api_key="k", max_retries=0) as sdk:
            asked: dict[str, Any] = {"model": MODEL, "messages": question(chunks=3)}
            stream = sdk.chat.completions.create(**asked, stream=True)
            text = "".join(
                chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices
            )
            return text, sdk.chat.completions.create(**asked).choices[0].message.content

    assert await asyncio.to_thread(both) == ("0 1 2 ", "0 1 2 ")


@pytest.mark.parametrize(
    "thought",
    [
        {"reasoning_content": "Hm."},
        {"reasoning": "Hm."},
        {"reasoning": "Hm.", "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
        {"images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
    ],
)
async def test_an_answer_is_sent_back_as_it_came_and_only_what_is_no_input_is_left_out(
    sdk: AsyncOpenAI, emulator: Emulator, thought: dict[str, Any]
) -> None:
    cited = {"content": "See a.", "annotations": [{"type": "url_citation", "url_citation": {}}]}
    delta = {**thought, **cited, "of_no_other_server": None}
    choice = {"index": 0, "delta": delta, "finish_reason": "stop"}
    messages = question(raw=[{"id": "c", "model": MODEL, "choices": [choice]}])
    answer = await sdk.chat.completions.create(model=MODEL, messages=messages)
    messages.append(answer.choices[0].message)
    messages += question(chunks=1)
    key = {"idempotency-key": "a second turn"}
    create = sdk.chat.completions.with_raw_response.create
    second = await create(model=MODEL, messages=messages, extra_headers=key)
    said = {"role": "assistant", "content": "See a.", "refusal": None, **thought}
    assert emulator.requests[-1].body["messages"][1] == said
    messages[1] = said
    again = await create(model=MODEL, messages=messages, extra_headers=key)
    assert again.headers["x-stream-id"] == second.headers["x-stream-id"]


async def test_what_the_sdk_has_parsed_is_sent_back_with_it_and_the_model_does_not_see_it(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    said: Any = question(text=['{"rain":', "true}"], tool_calls=[LOOKUP])
    async with sdk.chat.completions.stream(model=MODEL, messages=said) as stream:
        answer = (await stream.get_final_completion()).choices[0].message
    unparsed: Any = answer.to_dict()
    [call] = unparsed["tool_calls"]
    assert unparsed["parsed"] is None
    assert call["function"]["parsed_arguments"] is None
    parsed = {**unparsed, "parsed": {"rain": True}}  # As the SDK for JavaScript sends it.
    result: Any = {"role": "tool", "tool_call_id": call["id"], "content": "Rain."}
    messages: Any = [*said, answer, result, parsed, result, *question(chunks=1)]
    second = await sdk.chat.completions.create(model=MODEL, messages=messages)
    assert second.choices[0].message.content == "0 "
    seen = emulator.requests[-1].body["messages"]
    assert [each["content"] for each in seen[1:5:2]] == ['{"rain":true}'] * 2
    assert "parsed" not in json.dumps(seen)


async def test_the_sdk_names_the_stream_whatever_became_of_it(sdk: AsyncOpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": question(chunks=1)}
    whole = await sdk.chat.completions.create(**asked)
    response = await sdk.responses.create(model=MODEL, input=question(chunks=1))
    assert is_stream_id(whole._request_id or "")
    assert response.id == f"resp_{response._request_id}"
    assert (await sdk.responses.retrieve(response.id))._request_id == response._request_id
    stream = await sdk.chat.completions.create(**asked, stream=True)
    assert is_stream_id(stream.response.headers["x-request-id"])
    await stream.close()
    asked["messages"] = question(status=400)
    for streams in (True, False):
        with pytest.raises(openai.BadRequestError) as raised:
            await sdk.chat.completions.create(**asked, stream=streams)
        assert is_stream_id(raised.value.request_id or "")


async def test_the_same_answer_is_watched_and_resumed_natively(
    sdk: AsyncOpenAI, stack: httpx2.AsyncClient
) -> None:
    """Though the client that asked for it goes away in the middle."""
    raw = await sdk.chat.completions.with_raw_response.create(
        model=MODEL, messages=question(chunks=30, delay_ms=10), stream=True
    )
    stream_id = raw.headers["x-stream-id"]
    stream = raw.parse()
    seen = [await anext(stream) for _ in range(5)]
    await stream.close()
    assert seen
    whole = await watch(stack, stream_id)
    assert text_of(whole) == "".join(f"{n} " for n in range(30))
    middle = whole[10]
    assert await watch(stack, stream_id, after=middle.id) == whole[11:]


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
        asking = sdk.chat.completions.create(
            model=MODEL,
            messages=question(**script),
            stream=streams,
            extra_headers=headers,
        )
        number = emulator.total
        running = asyncio.create_task(leave(asking, streams=streams))
        record = await emulator.request(number)
        if not streams:
            running.cancel()
        async with asyncio.timeout(5):
            await record.over.wait()
        assert record.outcome == outcome


async def leave(asking: Any, *, streams: bool) -> None:
    response = await asking
    if streams:
        await anext(aiter(response))
        await response.close()


@pytest.mark.parametrize(
    ("script", "error", "code"),
    [
        ({"status": 429, "retry_after_ms": 1}, openai.RateLimitError, "upstream_rate_limited"),
        ({"prompt_filter": True}, openai.BadRequestError, "content_filter"),
        ({"status": 400}, openai.BadRequestError, "upstream_refused"),
        ({"status": 401}, openai.InternalServerError, "upstream_denied"),
    ],
)
@pytest.mark.parametrize("streams", [True, False])
async def test_an_answer_that_fails_before_its_first_chunk_is_an_error_by_its_status(
    sdk: AsyncOpenAI,
    monkeypatch: pytest.MonkeyPatch,
    script: Any,
    error: type[openai.APIStatusError],
    code: str,
    streams: bool,
) -> None:
    monkeypatch.setattr("worker.upstream.FIRST_RETRY_SECONDS", 0.001)
    with pytest.raises(error) as raised:
        await sdk.chat.completions.create(model=MODEL, messages=question(**script), stream=streams)
    assert raised.value.code == code
    assert raised.value.response.headers["x-stream-id"]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("answer_timeout", 504),
        ("content_filter", 400),
        ("internal", 500),
        ("interrupted", 503),
        ("queue_timeout", 503),
        ("upstream_denied", 502),
        ("upstream_rate_limited", 429),
        ("upstream_refused", 400),
        ("upstream_timeout", 504),
        ("upstream_unavailable", 503),
    ],
)
def test_a_failure_has_the_status_that_openai_has_for_it(code: str, status: int) -> None:
    feed = Feed("id")
    value = {"code": code, "message": "It failed.", "retryable": True}
    feed.add([Event(Cursor(1, 0), FAILED, to_json(value))], read=True)
    response = failed(feed)
    assert response.status_code == status
    in_stream = encoder()(feed.events[-1])
    assert json.loads(in_stream.removeprefix(b"data: ")) == json.loads(bytes(response.body))


@pytest.mark.parametrize(("status", "retried"), [(429, True), (503, True), (401, False)])
@pytest.mark.parametrize(
    "ask",
    [
        lambda sdk, asked: sdk.chat.completions.create(model=MODEL, messages=asked),
        lambda sdk, asked: sdk.chat.completions.create(model=MODEL, messages=asked, stream=True),
        lambda sdk, asked: sdk.responses.create(model=MODEL, input=asked),
    ],
    ids=["whole", "streamed", "responses"],
)
async def test_what_the_worker_has_tried_in_vain_the_sdk_does_not_try_again(
    sdk: AsyncOpenAI,
    settings: Settings,
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    ask: Any,
    status: int,
    retried: bool,
) -> None:
    monkeypatch.setattr("worker.upstream.FIRST_RETRY_SECONDS", 0.001)
    with pytest.raises(openai.APIStatusError):
        await ask(sdk.with_options(max_retries=2), question(status=status))
    assert emulator.total == (settings.upstream_tries if retried else 1)


async def test_what_the_worker_may_not_try_again_the_sdk_does(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    """An answer that breaks off after its first chunk."""
    with pytest.raises(openai.InternalServerError):
        await sdk.with_options(max_retries=1).chat.completions.create(
            model=MODEL, messages=question(chunks=3, end="eof")
        )
    assert emulator.total == 2


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (400, {"code": "context_length_exceeded", "param": "messages"}, None),
        (429, {"code": "insufficient_quota", "param": None}, None),
        (400, {"code": "a sentence", "param": "top_p"}, ("upstream_refused", "top_p")),
        (401, {"code": "invalid_api_key"}, ("upstream_denied", None)),
    ],
)
@pytest.mark.parametrize("streams", [True, False])
async def test_a_refusal_of_the_request_has_the_code_that_programs_match_on(
    redis_server: RedisServer,
    redis: Redis,
    status: int,
    error: dict[str, Any],
    told: Any,
    streams: bool,
) -> None:
    body = {"model": MODEL, "messages": question(), "stream": streams}
    async with answering(refusal(status, **error)) as (url, _):
        settings = stack_settings(redis_server.url, url, upstream_tries=1)
        async with running_api(settings) as http, running_worker(settings):
            response = await http.post("/v1/chat/completions", json=body)
    said = response.json()["error"]
    assert (said["code"], said["param"]) == (told or (error["code"], error["param"]))


@pytest.mark.parametrize(
    ("script", "seconds"),
    [
        ({"status": 429, "retry_after": 30}, 30),
        ({"status": 503, "retry_after_ms": 1500}, 2),
        ({"status": 429, "retry_after": 1e300}, 86400),
        ({"status": 429}, None),
        ({"status": 429, "retry_after": 0}, None),
        ({"status": 429, "retry_after": 30, "error_code": "insufficient_quota"}, None),
        ({"status": 400, "retry_after": 30}, None),
    ],
)
async def test_how_long_the_model_service_asks_to_wait_is_told(
    settings: Settings, script: Any, seconds: int | None
) -> None:
    settings = changed(settings, upstream_tries=1)
    body = {"model": MODEL, "messages": question(**script)}
    async with running_api(settings) as http, running_worker(settings):
        response = await http.post("/v1/chat/completions", json=body)
        [*_, failed] = await watch(http, response.headers["x-stream-id"])
        asked = {"messages": question(**script)}
        text = await http.post("/chat", json=asked, headers={"accept": "text/plain"})
    told = json.loads(failed.data)
    assert told.get("retry_after") == seconds
    assert text.headers.get("retry-after") == (str(seconds) if seconds else None)
    ours = str(seconds or RETRY_SECONDS) if told["retryable"] else None
    assert response.headers.get("retry-after") == ours


def odd(delta: Any, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


@pytest.mark.parametrize(
    ("chunks", "notes"),
    [
        ([odd(None, "stop")], None),
        ([odd({"notes": [1]}), odd({"notes": [{"index": 0}]}, "stop")], [1, {"index": 0}]),
    ],
)
async def test_an_answer_of_an_odd_shape_is_told_as_one_object_all_the_same(
    stack: httpx2.AsyncClient, chunks: list[dict[str, Any]], notes: Any
) -> None:
    body = {"model": MODEL, "messages": question(raw=chunks)}
    response = await stack.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"].get("notes") == notes


async def test_an_answer_that_fails_in_the_middle_is_an_error_and_no_end(sdk: AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model=MODEL, messages=question(chunks=3, end="eof"), stream=True
    )
    text, code = await taken(stream)
    assert (text, code) == ("0 1 2 ", "upstream_incomplete")


async def test_a_cancelled_answer_is_an_error_and_no_end(stack: httpx2.AsyncClient) -> None:
    asked = {"model": MODEL, "messages": question(chunks=1, end="stall")}
    to: Any = {"url": "/v1/chat/completions", "headers": {"idempotency-key": "k"}}
    async with stack.stream("POST", **to, json={**asked, "stream": True}) as response:
        await stack.post(f"/streams/{response.headers['x-stream-id']}/cancel")
        lines = [line async for line in response.aiter_lines() if line]
    whole = await stack.post(**to, json=asked)
    assert "data: [DONE]" not in lines
    assert whole.status_code == 400
    told = whole.json()
    assert json.loads(lines[-1].removeprefix("data: ")) == told
    assert told["error"]["code"] == "cancelled"
    assert told["error"]["type"] == "invalid_request_error"
    assert told["error"]["message"].endswith(".")


async def taken(stream: Any) -> tuple[str, str | None]:
    """The text, and the code of the error that it ended in."""
    text = ""
    try:
        async for chunk in stream:
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    except openai.APIError as error:
        return text, error.code
    return text, None


async def test_a_takeover_is_never_spliced_into_a_stream_and_goes_unnoticed_by_who_waits(
    settings: Settings, emulator: Emulator
) -> None:
    forty = "".join(f"{n} " for n in range(40))
    asked: Any = {"model": MODEL, "messages": question(chunks=40, delay_ms=20)}
    async with (
        running_api(settings) as http,
        AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="k", max_retries=0) as sdk,
    ):
        async with running_worker(settings):
            waiting = asyncio.create_task(sdk.chat.completions.create(**asked))
            stream = await sdk.chat.completions.create(**asked, stream=True)
            seen = [await anext(stream) for _ in range(8)]
        async with running_worker(settings):
            rest, code = await taken(stream)
            whole = await waiting
    text = "".join(chunk.choices[0].delta.content or "" for chunk in seen if chunk.choices) + rest
    assert code == "interrupted"
    assert forty.startswith(text)
    assert whole.choices[0].message.content == forty


async def test_the_model_is_listed_and_any_other_refused(sdk: AsyncOpenAI) -> None:
    assert [model.id async for model in sdk.models.list()] == [MODEL]
    assert (await sdk.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError, match="no model 'another/one' here"):
        await sdk.models.retrieve("another/one")
    with pytest.raises(openai.NotFoundError) as raised:
        await sdk.chat.completions.create(model="gpt-99", messages=question())
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


async def test_azures_clients_are_answered_where_azure_has_it(
    stack: httpx2.AsyncClient,
) -> None:
    asked: Any = {"messages": question(chunks=2)}
    azure: Any = {"azure_endpoint": str(stack.base_url), "api_key": "k", "max_retries": 0}
    async with AsyncAzureOpenAI(**azure, api_version="2024-10-21") as sdk:
        stream = await sdk.chat.completions.create(**asked, model=MODEL, stream=True)
        assert await taken(stream) == ("0 1 ", None)
        with pytest.raises(openai.NotFoundError) as missing:
            await sdk.chat.completions.create(**asked, model="gpt-99")
        with pytest.raises(openai.BadRequestError) as refused:
            await sdk.chat.completions.create(**asked, model=MODEL, temperature=9)
    assert (missing.value.code, refused.value.param) == ("model_not_found", "temperature")
    async with AsyncOpenAI(base_url=f"{stack.base_url}/openai/v1", api_key="k") as sdk:
        response = await sdk.responses.create(model=MODEL, input=question(chunks=2))
        assert response.output_text == "0 1 "
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve(f"resp_{new_stream_id()}")
        chat = await sdk.chat.completions.create(**asked, model=MODEL)
        assert chat.choices[0].message.content == "0 1 "
        with pytest.raises(openai.NotFoundError) as slashed:
            await sdk.chat.completions.create(**asked, model="org/gpt")
    assert slashed.value.code == "model_not_found"
    deployment: Any = {"azure_deployment": MODEL, "api_version": "preview"}
    async with AsyncAzureOpenAI(**azure, **deployment) as sdk:
        whole = await sdk.chat.completions.create(**asked, model="as the application calls it")
    assert whole.choices[0].message.content == "0 1 "
    bare = await stack.post(f"/openai/deployments/{MODEL}/chat/completions", json=asked)
    assert bare.json()["choices"][0]["message"]["content"] == "0 1 "


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": 9}, "temperature", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"stream_options": {"sing": True}}, "stream_options.sing", "unknown_parameter"),
        (
            {"stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "invalid_value",
        ),
    ],
)
async def test_bad_input_is_refused_in_openais_shape_with_the_field_named(
    sdk: AsyncOpenAI, change: dict[str, Any], param: str, code: str, emulator: Emulator
) -> None:
    asked: Any = {"model": MODEL, "messages": question(), **change}
    with pytest.raises(openai.BadRequestError) as raised:
        await sdk.chat.completions.create(**asked)
    assert (raised.value.param, raised.value.code) == (param, code)
    assert raised.value.type == "invalid_request_error"
    assert emulator.total == 0


async def test_what_is_so_in_any_case_may_be_said(sdk: AsyncOpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": question(chunks=1)}
    whole = await sdk.chat.completions.create(**asked, stream=None)
    assert whole.choices[0].message.content == "0 "
    response = await sdk.responses.create(
        model=MODEL, input=question(chunks=1), stream=None, background=None
    )
    assert response.output_text == "0 "
    plain = {"include_obfuscation": False}
    without_usage: Any = {"stream": True, "stream_options": plain | {"include_usage": None}}
    stream = await sdk.chat.completions.create(**asked, **without_usage)
    assert await taken(stream) == ("0 ", None)
    options: Any = {"stream": True, "stream_options": plain}
    created = await sdk.responses.create(model=MODEL, input=question(chunks=1), **options)
    events = [event async for event in created]
    response_id = events[0].response.id
    again = await sdk.responses.retrieve(response_id, stream=True, include_obfuscation=False)
    assert [event async for event in again] == events


def parameters(create: Callable[..., Any]) -> set[str]:
    """What a method of the SDK puts into the body."""
    transport = {"extra_headers", "extra_query", "extra_body", "timeout"}
    return set(inspect.signature(create).parameters) - transport


async def test_what_the_sdk_can_ask_and_this_server_cannot_honour_is_refused_by_name(
    sdk: AsyncOpenAI,
) -> None:
    unknown = parameters(sdk.chat.completions.create) - ChatCompletionRequest.model_fields.keys()
    assert "audio" in unknown
    for name in unknown:
        asked: Any = {"model": MODEL, "messages": question(), name: "x"}
        with pytest.raises(openai.BadRequestError) as raised:
            await sdk.chat.completions.create(**asked)
        assert (raised.value.param, raised.value.code) == (name, "unknown_parameter")


async def test_a_parameter_that_is_null_asks_for_nothing_whether_it_is_known_or_not(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    nulls: Any = dict.fromkeys(parameters(sdk.chat.completions.create) - {"model", "messages"})
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=question(chunks=1), extra_body=nulls
    )
    assert answer.choices[0].message.content == "0 "
    unknown = nulls.keys() - ChatCompletionRequest.model_fields.keys()
    assert "audio" in unknown
    assert not unknown & emulator.requests[-1].body.keys()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize(
    "value",
    ["", "NaN", "1e999", "[" * 5000 + "]" * 5000, "[" * 100_000 + "]" * 100_000],
    ids=["nothing", "NaN", "infinite", "deep", "deeper"],
)
async def test_what_is_no_plain_json_is_refused_in_openais_shape_and_by_one_code(
    stack: httpx2.AsyncClient, path: str, value: str
) -> None:
    body = f'{{"model": "{MODEL}", "input": "x", "prompt_cache_options": {{"a": {value}}}}}'
    if path == "/v1/chat/completions":
        body = body.replace('"input": "x"', '"messages": [{"role": "user", "content": "x"}]')
    headers = {"content-type": "application/json"}
    response = await stack.post(path, content=body, headers=headers)
    error = response.json()["error"]
    told = (response.status_code, error["code"], error["type"])
    assert told == (400, "invalid_json", "invalid_request_error"), error


async def test_without_redis_the_sdk_is_told_to_try_again(
    sdk: AsyncOpenAI, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(openai.InternalServerError) as raised:
            await sdk.chat.completions.create(model=MODEL, messages=question())
    finally:
        await redis.config_set("maxmemory", 0)
    assert (raised.value.status_code, raised.value.code) == (503, "redis_away")
    assert raised.value.response.headers["retry-after"]
    assert "x-should-retry" not in raised.value.response.headers
