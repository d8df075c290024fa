"""The native API over a real uvicorn, without a worker: what a caller gets back."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel, ValidationError
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from api.chat_request import Asked, ChatRequest
from api.hosts import is_loopback
from api.hub import Hub
from api.presence import REFRESH_SECONDS
from api.responses_request import ResponsesRequest
from api.ui_request import UIChatRequest
from api.wires.chat_completions import STATUSES
from relay.events import COMPLETED, entry
from relay.ids import new_stream_id
from relay.log import VIEWERS_SECONDS, Log
from relay.settings import MIB, Settings
from tests.conftest import (
    ask,
    asking,
    changed,
    events_of,
    make_claims,
    make_log,
    reported_before,
    running_api,
    running_worker,
    until,
)
from tests.test_hub import Writer

UNKNOWN = "no-such-stream"


def code(response: httpx2.Response, status: int) -> str:
    """The stable code of a problem; everything that a problem must have is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["type"] == f"urn:chat-relay:problem:{problem['code']}"
    assert problem["title"]
    assert problem["detail"].endswith(".")
    assert ("retry-after" in response.headers) == (status == 503)
    assert "Traceback" not in response.text
    return str(problem["code"])


async def test_a_job_is_accepted_at_once_with_where_to_watch_it(api: httpx2.AsyncClient) -> None:
    response = await api.post("/chat", json=asking())
    assert response.status_code == 202
    body = response.json()
    stream_id = body["stream_id"]
    assert body == {
        "stream_id": stream_id,
        "status": "queued",
        "url": f"/streams/{stream_id}",
        "events_url": f"/streams/{stream_id}/events",
        "cancel_url": f"/streams/{stream_id}/cancel",
    }
    assert response.headers["location"] == f"/streams/{stream_id}"
    assert response.headers["x-stream-id"] == stream_id


@pytest.mark.parametrize(
    ("body", "status", "expected", "field"),
    [
        ("{nonsense", 400, "bad_json", None),
        ("", 422, "invalid_request", "body"),
        ("[]", 422, "invalid_request", "body"),
        ("{}", 422, "invalid_request", "messages"),
        ('{"messages": []}', 422, "invalid_request", "messages"),
        ('{"messages": "Hello"}', 422, "invalid_request", "messages"),
        ('{"messages": [{"content": "x"}]}', 422, "invalid_request", "messages.0.role"),
        ('{"messages": [{"role": "king"}]}', 422, "invalid_request", "messages.0.role"),
        ('{"messages": [{"role": "user"}], "temprature": 1}', 422, "invalid_request", "temprature"),
        ('{"messages": [{"role": "user"}], "model": "x"}', 422, "invalid_request", "model"),
        ('{"messages": [{"role": "user"}], "base_url": "x"}', 422, "invalid_request", "base_url"),
        (
            '{"messages": [{"role": "user"}], "temperature": 9}',
            422,
            "invalid_request",
            "temperature",
        ),
    ],
)
async def test_bad_input_is_refused_by_name_and_nothing_is_created(
    api: httpx2.AsyncClient, redis: Redis, body: str, status: int, expected: str, field: str | None
) -> None:
    headers = {"content-type": "application/json"}
    response = await api.post("/chat", content=body, headers=headers)
    assert code(response, status) == expected
    if field is not None:
        assert field in [error["field"] for error in response.json()["errors"]]
    assert await redis.keys("relay:*") == []


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ([], "body: It must be a JSON object."),
        ({"messages": ["Hello"]}, "messages.0: It must be a JSON object."),
        ({"messages": [{"role": "user"}], "sing": True}, "sing: This server does not know it."),
        (
            {"messages": [{"role": "user"}], "model": "x"},
            "model: The server chooses it: leave it out. OpenAI's own body goes to "
            "/v1/chat/completions.",
        ),
        (
            {"messages": [{"role": "user"}], "stream": True},
            "stream: Leave it out: Accept: text/event-stream streams. OpenAI's own body goes to "
            "/v1/chat/completions.",
        ),
    ],
)
async def test_a_wrong_body_is_told_of_in_words_of_the_caller(
    api: httpx2.AsyncClient, body: Any, sentence: str
) -> None:
    assert (await api.post("/chat", json=body)).json()["detail"] == sentence


WRONG = [5] * 100_000
HELLO = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": WRONG}),
        (ChatRequest, {"messages": [{**HELLO, "content": WRONG}]}),
        (ChatRequest, {"messages": [{**HELLO, "tool_calls": WRONG}]}),
        *((ChatRequest, {"messages": [HELLO], name: WRONG}) for name in ("tools", "functions")),
        *((ChatRequest, {"messages": [HELLO], name: WRONG}) for name in ("stop", "modalities")),
        (ResponsesRequest, {"model": "demo", "input": WRONG}),
        (ResponsesRequest, {"model": "demo", "input": [{**HELLO, "content": WRONG}]}),
        (ResponsesRequest, {"model": "demo", "input": [{"type": "reasoning", "summary": WRONG}]}),
        (ResponsesRequest, {"model": "demo", "input": "Hello", "tools": WRONG}),
        (UIChatRequest, {"id": "c", "messages": WRONG}),
        (UIChatRequest, {"id": "c", "messages": [{"id": "m", "role": "user", "parts": WRONG}]}),
        (UIChatRequest, {"id": "c", "messages": [], "tools": WRONG}),
    ],
)
def test_of_a_hundred_thousand_wrong_items_few_errors_are_made(
    kind: type[BaseModel], body: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    assert refused.value.error_count() <= 2


async def test_a_body_of_wrong_items_is_refused_by_the_first(api: httpx2.AsyncClient) -> None:
    response = await api.post("/chat", json={"messages": WRONG})
    assert code(response, 422) == "invalid_request"
    assert [error["field"] for error in response.json()["errors"]] == ["messages.0"]


async def test_what_the_chat_completions_api_knows_is_passed_on(
    api: httpx2.AsyncClient, redis: Redis
) -> None:
    body: dict[str, Any] = {
        **asking(),
        "temperature": 0.5,
        "top_p": 0.25,
        "max_tokens": 4,
        "max_completion_tokens": 5,
        "n": 2,
        "stop": ["x"],
        "seed": 7,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"1": 2},
        "logprobs": True,
        "top_logprobs": 3,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "functions": [{"name": "f"}],
        "function_call": {"name": "f"},
        "response_format": {"type": "json_object"},
        "reasoning_effort": "low",
        "verbosity": "high",
        "prediction": {"type": "content", "content": "x"},
        "modalities": ["text"],
        "web_search_options": {"search_context_size": "low"},
        "service_tier": "flex",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {"a": 1},
        "moderation": {"model": "m"},
        "safety_identifier": "s",
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
    }
    assert body.keys() == Asked.model_fields.keys()
    await api.post("/chat", json=body)
    [claim] = await make_claims(redis).claim(1)
    assert json.loads(claim.request) == body


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8"])
async def test_a_body_over_the_limit_is_refused_and_one_of_that_size_is_not(
    api: httpx2.AsyncClient, chunked: bool, over: int, kind: str
) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "?"}]}).encode()
    body = body.ljust(MIB + over)

    async def pieces() -> Any:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    content: Any = pieces() if chunked else body
    headers = {"content-type": kind}
    response = await api.post("/chat", content=content, headers=headers)
    if over:
        assert code(response, 413) == "body_too_large"
    else:
        assert response.status_code == 202


@pytest.mark.parametrize("path", ["/chat", "/v1/responses"])
async def test_who_asks_before_sending_a_body_over_the_limit_sends_none_of_it(
    api: httpx2.AsyncClient, path: str
) -> None:
    reader, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
    announced = f"content-type: application/json\r\ncontent-length: {MIB + 1}\r\n"
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n{announced}\r\n"
    writer.write(head.encode())
    assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    # To its end: on a connection that was kept the next request would be taken for the body.
    async with asyncio.timeout(5):
        assert b"connection: close" in await reader.read()
    writer.close()
    await writer.wait_closed()


async def test_unknown_is_404_and_gone_is_410_everywhere(api: httpx2.AsyncClient) -> None:
    paths = (await api.get("/openapi.json")).json()["paths"]
    routes = [(method, path) for path in paths if "{stream_id}" in path for method in paths[path]]
    assert len(routes) >= 4
    for method, path in routes:
        unknown, gone = (path.format(stream_id=each) for each in (UNKNOWN, new_stream_id()))
        assert code(await api.request(method, unknown), 404) == "stream_unknown", path
        assert code(await api.request(method, gone), 410) == "stream_gone", path


@pytest.mark.parametrize("cursor", ["x", "1", "-1-0", "1-0-0", "01-1", "1-" + "9" * 40, "\uff11-1"])
async def test_a_malformed_cursor_is_refused(api: httpx2.AsyncClient, cursor: str) -> None:
    stream_id = await ask(api)
    path = f"/streams/{stream_id}/events"
    response = await api.get(path, params={"last_event_id": cursor})
    assert code(response, 400) == "malformed_cursor"


async def test_the_same_key_and_body_lead_to_the_same_stream(api: httpx2.AsyncClient) -> None:
    headers = {"idempotency-key": "k" * 255}
    ids = {
        (await api.post("/chat", json=asking(), headers=headers)).json()["stream_id"]
        for _ in range(3)
    }
    assert len(ids) == 1
    response = await api.post("/chat", json=asking(chunks=7), headers=headers)
    assert code(response, 409) == "idempotency_conflict"
    headers["idempotency-key"] += "k"
    assert code(await api.post("/chat", json=asking(), headers=headers), 422) == "invalid_request"


async def test_a_field_that_is_null_is_one_that_was_left_out(
    api: httpx2.AsyncClient, redis: Redis
) -> None:
    called: Any = {"role": "assistant", "content": None, "tool_calls": []}
    body = {"messages": [*asking()["messages"], called]}
    nulls = dict.fromkeys([*Asked.model_fields, "of_another_api"])
    headers = {"idempotency-key": "k"}
    answers = [await api.post("/chat", json=each, headers=headers) for each in (body, nulls | body)]
    assert len({answer.json()["stream_id"] for answer in answers}) == 1
    await api.post("/chat", json=nulls | body)
    for claim in await make_claims(redis).claim(2):
        assert json.loads(claim.request) == body


async def test_an_api_knows_the_model_without_a_key(settings: Settings) -> None:
    async with running_api(changed(settings, azure_key=None)) as api:
        models = (await api.get("/v1/models")).json()["data"]
    assert [model["id"] for model in models] == [settings.azure_deployment]


async def test_a_full_queue_is_told_before_a_stream_exists(
    settings: Settings, redis: Redis, said: list[Any]
) -> None:
    async with running_api(changed(settings, queue_limit=2)) as api:
        for _ in range(2):
            await ask(api)
        before = await redis.dbsize()
        response = await api.post("/chat", json=asking())
        assert code(response, 503) == "queue_full"
        assert int(response.headers["retry-after"]) > 0
        assert await redis.dbsize() == before
    assert "queue_full" in events_of(said)


async def test_the_status_tells_the_place_in_the_queue(api: httpx2.AsyncClient) -> None:
    ids = [await ask(api) for _ in range(3)]
    statuses = [(await api.get(f"/streams/{stream_id}")).json() for stream_id in ids]
    assert [status["place"] for status in statuses] == [1, 2, 3]
    assert {status["status"] for status in statuses} == {"queued"}
    assert statuses[0]["text"] == ""


async def begun(redis: Redis) -> Writer:
    """Of a new stream, which has `started`."""
    writer = Writer(redis)
    await writer.create()
    await writer.begin()
    return writer


async def test_a_stream_that_ends_while_it_is_looked_at_is_told_as_one_that_has_or_has_not(
    api: httpx2.AsyncClient, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = await begun(redis)
    looks = 0

    def ending(look: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any) -> Any:
            nonlocal looks
            looks += 1
            first, seen = looks == 1, await look(*arguments)
            if first:
                await writer.say("late")
                await writer.finish()
            return seen

        return call

    for name in ("read", "state"):
        monkeypatch.setattr(Log, name, ending(getattr(Log, name)))
    status = (await api.get(f"/streams/{writer.stream_id}")).json()
    told = [status[name] is not None for name in ("finish_reason", "ended_ms")]
    assert told == [status["status"] == "completed"] * 2
    assert status["text"] == ("late" if all(told) else "")


async def test_a_stream_can_be_looked_at_whatever_its_model_service_said(
    api: httpx2.AsyncClient, redis: Redis
) -> None:
    deep: Any = "\ud83d"
    for _ in range(300):
        deep = {"deeper": deep}
    writer = await begun(redis)
    await writer.append(entry(COMPLETED, {"finish_reason": "stop", "usage": deep}))
    response = await api.get(f"/streams/{writer.stream_id}")
    assert response.headers["content-type"] == "application/json"
    assert response.json()["usage"] == deep


async def test_a_queued_stream_is_cancelled_on_the_spot_however_often_it_is_asked(
    api: httpx2.AsyncClient, redis: Redis
) -> None:
    stream_id = await ask(api)
    for _ in range(3):
        response = await api.post(f"/streams/{stream_id}/cancel")
        assert response.json() == {"stream_id": stream_id, "status": "cancelled"}
    assert await make_claims(redis).claim(1) == []
    assert (await api.get(f"/streams/{stream_id}")).json()["status"] == "cancelled"


async def test_erased_means_erased(api: httpx2.AsyncClient, redis: Redis) -> None:
    stream_id = (await api.post("/chat", json=asking(), headers={"idempotency-key": "k"})).json()[
        "stream_id"
    ]
    assert (await api.delete(f"/streams/{stream_id}")).status_code == 204
    assert code(await api.get(f"/streams/{stream_id}"), 410) == "stream_gone"
    assert code(await api.delete(f"/streams/{stream_id}"), 410) == "stream_gone"
    assert [key for key in await redis.keys("*") if key != b"relay:wake"] == []


async def test_what_is_erased_is_shown_no_more_where_that_was_asked_though_nothing_is_heard_there(
    api: httpx2.AsyncClient, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = await begun(redis)
    await writer.finish()
    assert (await api.get(f"/streams/{writer.stream_id}/events")).status_code == 200
    monkeypatch.setattr(Hub, "_obey", lambda *_: None)
    assert (await api.delete(f"/streams/{writer.stream_id}")).status_code == 204
    assert (await api.get(f"/streams/{writer.stream_id}/events")).status_code == 410


async def test_an_expired_stream_is_gone_and_not_empty(settings: Settings, redis: Redis) -> None:
    async with running_api(changed(settings, live_seconds=1)) as api:
        stream_id = await ask(api)
        # What Redis does after open_ms, now.
        await redis.pexpire(f"relay:{stream_id}:log", 1)
        await redis.pexpire(f"relay:{stream_id}:state", 1)
        await asyncio.sleep(0.005)
        assert code(await api.get(f"/streams/{stream_id}/events"), 410) == "stream_gone"


async def test_a_cursor_at_what_stands_so_far_is_answered_by_all_that_follows(
    api: httpx2.AsyncClient,
) -> None:
    """By 204 an EventSource would end for good."""
    events = f"/streams/{await ask(api)}/events"
    async with api.stream("GET", events, headers={"last-event-id": "0-1"}) as response:
        assert response.status_code == 200
        await api.post(events.replace("/events", "/cancel"))
        said = await response.aread()
    assert b"event: cancelled" in said
    assert b"event: queued" not in said


async def test_a_cursor_at_the_terminal_event_is_answered_by_204(
    api: httpx2.AsyncClient,
) -> None:
    stream_id = await ask(api)
    await api.post(f"/streams/{stream_id}/cancel")
    cursor = (await api.get(f"/streams/{stream_id}")).json()["last_event_id"]
    headers = {"last-event-id": cursor}
    response = await api.get(f"/streams/{stream_id}/events", headers=headers)
    assert response.status_code == 204
    response = await api.get(f"/streams/{stream_id}/events", params={"last_event_id": cursor})
    assert response.status_code == 204
    # As an EventSource comes back whose URL had one for its first request.
    earlier = {"last_event_id": "0-1"}
    response = await api.get(f"/streams/{stream_id}/events", params=earlier, headers=headers)
    assert response.status_code == 204


async def test_a_stream_cannot_be_cached_or_held_back_on_its_way(api: httpx2.AsyncClient) -> None:
    stream_id = await ask(api)
    await api.post(f"/streams/{stream_id}/cancel")
    response = await api.get(f"/streams/{stream_id}/events")
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store, no-transform"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-stream-id"] == stream_id
    assert "content-length" not in response.headers


async def test_no_cache_keeps_what_is_told_of_an_answer_or_that_there_is_none(
    api: httpx2.AsyncClient,
) -> None:
    stream_id, gone = await ask(api), new_stream_id()
    await api.post(f"/streams/{stream_id}/cancel")
    cursor = (await api.get(f"/streams/{stream_id}")).json()["last_event_id"]
    for method, path, status in (
        ("GET", f"/streams/{stream_id}", 200),
        ("GET", f"/streams/{stream_id}/events?last_event_id={cursor}", 204),
        ("GET", f"/streams/{gone}", 410),
        ("GET", f"/streams/{gone}/events", 410),
        ("GET", f"/streams/{UNKNOWN}/events", 404),
        ("GET", f"/v1/responses/resp_{stream_id}", 200),
        ("GET", f"/v1/responses/resp_{gone}", 404),
        ("GET", "/api/chat/chat/stream", 204),
        ("HEAD", "/healthz", 200),
        ("GET", "/nowhere", 404),
        ("PUT", "/chat", 405),
    ):
        response = await api.request(method, path)
        told = (response.status_code, response.headers.get_list("cache-control"))
        assert told == (status, ["no-store"]), path
    response = await api.get("/healthz", headers={"host": "evil.example"})
    assert (response.status_code, response.headers["cache-control"]) == (421, "no-store")


async def test_files_may_be_kept_by_who_asks_whether_they_are_new(api: httpx2.AsyncClient) -> None:
    for path in ("/", "/relay.js", "/docs/assets/swagger-ui.css"):
        response = await api.get(path)
        assert response.headers.get_list("cache-control") == ["no-cache"], path
        assert response.headers["etag"]


async def test_nothing_here_is_a_problem_too(api: httpx2.AsyncClient) -> None:
    assert code(await api.get("/nowhere"), 404) == "not_found"
    assert code(await api.get("/chat"), 405) == "method_not_allowed"


async def test_what_fails_outside_of_any_route_has_the_shape_of_the_api_that_was_meant(
    api: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("relay.log.Log.create", broken)
    body = {"messages": [{"role": "user", "content": "Hi"}], "model": "demo"}
    for method, path, content, status, expected in (
        ("POST", "/v1/embeddings", body, 404, "not_found"),
        ("POST", "/openai/deployments/demo/embeddings", body, 404, "not_found"),
        ("GET", "/v1/chat/completions", None, 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions", "x" * MIB, 413, "body_too_large"),
        ("POST", "/v1/chat/completions", body, 500, "internal"),
    ):
        response = await api.request(method, path, json=content)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (status, expected, None)
    response = await api.get("/api/chat")
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
    assert response.json()["error"].endswith(".")


async def test_a_fault_of_ours_shows_no_trace_of_itself(
    api: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("relay.log.Log.read", broken)
    response = await api.get(f"/streams/{new_stream_id()}")
    assert code(response, 500) == "internal"
    assert "secret" not in response.text


async def test_a_question_is_503_while_redis_is_full_and_taken_when_there_is_room(
    api: httpx2.AsyncClient, redis: Redis
) -> None:
    await redis.config_set("maxmemory", "1")
    try:
        response = await api.post("/chat", json=asking())
        assert code(response, 503) == "redis_away"
        assert int(response.headers["retry-after"]) > 0
    finally:
        await redis.config_set("maxmemory", "0")
    await ask(api)


async def test_who_asks_and_watches_in_one_request_has_nothing_read(
    stack: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> None:
        raise RedisConnectionError

    monkeypatch.setattr("relay.log.Log.read", away)
    headers = {"accept": "text/event-stream"}
    response = await stack.post("/chat", json=asking(chunks=3), headers=headers)
    kinds = [line[7:] for line in response.text.split("\n") if line.startswith("event: ")]
    assert (kinds[:2], kinds[-1]) == (["queued", "started"], "completed")


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "application/json"),
        ("application/json, text/plain, */*", "application/json"),
        ("text/event-stream;q=0, */*", "application/json"),
        ("text/html, text/event-stream", "text/event-stream; charset=utf-8"),
        ("text/plain;q=0.5, Text/Event-Stream; Q=0.9", "text/event-stream; charset=utf-8"),
        ("text/plain;q=high, text/event-stream;q=0.9", "text/plain; charset=utf-8"),
    ],
)
async def test_post_answers_by_what_its_client_would_rather_have(
    stack: httpx2.AsyncClient, accept: str, media_type: str
) -> None:
    response = await stack.post("/chat", json=asking(chunks=1), headers={"accept": accept})
    assert response.headers["content-type"] == media_type


async def test_what_must_not_begin_anew_does_not_for_who_asked_and_watches_in_one_request(
    settings: Settings,
) -> None:
    body = {**asking(chunks=40, delay_ms=20), "recovery": "fail"}
    async with running_api(settings) as api, api.sse("/chat", method="POST", json=body) as source:
        arriving = aiter(source)
        async with running_worker(settings):
            while (await anext(arriving)).event != "chunk":
                pass
        async with running_worker(settings):
            *_, end = [event async for event in arriving if event.data]
    assert (end.event, json.loads(end.data).get("code")) == ("failed", "interrupted")


async def test_who_repeats_a_request_watches_the_stream_that_stands(
    stack: httpx2.AsyncClient,
) -> None:
    headers = {"accept": "text/event-stream", "idempotency-key": "once"}
    first, again = [
        await stack.post("/chat", json=asking(chunks=3), headers=headers) for _ in range(2)
    ]
    assert first.headers["x-stream-id"] == again.headers["x-stream-id"]
    assert "event: completed" in again.text
    assert "".join(text_in(again)) == "0 1 2 "


async def test_who_repeats_a_request_listens_to_no_other_stream(
    api: httpx2.AsyncClient, redis: Redis
) -> None:
    headers = {"idempotency-key": "once"}
    stream_id = (await api.post("/chat", json=asking(), headers=headers)).json()["stream_id"]
    again: Any = {"json": asking(), "headers": headers | {"accept": "text/event-stream"}}
    async with api.stream("POST", "/chat", **again) as response:
        await anext(response.aiter_bytes())
        channels = await redis.pubsub_channels("relay:*:channel")
    assert channels == [f"relay:{stream_id}:channel".encode()]


def text_in(response: httpx2.Response) -> list[str]:
    lines = response.text.split("\n")
    data = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    return [each["text"] for each in data if "text" in each]


async def test_health_and_readiness(api: httpx2.AsyncClient) -> None:
    for path in ("/healthz", "/readyz"):
        assert (await api.get(path)).json() == {"status": "ok"}
        assert (await api.head(path)).status_code == 200


NAMED = {"location", "retry-after", "x-request-id", "x-should-retry", "x-stream-id"}


async def test_other_origins_are_let_in_only_where_they_are_named(settings: Settings) -> None:
    origin = {"origin": "https://app.example"}
    async with running_api(settings) as api:
        response = await api.get("/healthz", headers=origin)
        assert "access-control-allow-origin" not in response.headers
    async with running_api(changed(settings, cors_origins="https://app.example")) as api:
        response = await api.get("/healthz", headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        exposed = response.headers["access-control-expose-headers"].split(", ")
        assert set(exposed) == NAMED
        for method in ("GET", "POST", "DELETE"):
            asked = {**origin, "access-control-request-method": method}
            assert (await api.options("/chat", headers=asked)).status_code == 200


HERE = ["127.0.0.1:8000", "[::1]:8000", "localhost", "Localhost.:80", "a.localhost", "x"]
NAMES = [
    "evil.example",
    "Evil.Example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil",
    "a.notlocalhost",
    "a.b:x",
]
ALL_ADDRESSES = "0.0.0.0"  # noqa: S104 - what is promised of a server that listens on them


@pytest.mark.parametrize(
    ("changes", "refused", "taken"),
    [
        ({}, [*NAMES, "app.example"], HERE),
        ({"allowed_hosts": "app.example, Other.example"}, NAMES, [*HERE, "Other.Example:80"]),
        ({"allowed_hosts": "*"}, [], NAMES),
        ({"host": ALL_ADDRESSES}, [], NAMES),
        ({"host": ALL_ADDRESSES, "allowed_hosts": "app.example"}, NAMES, ["app.example."]),
    ],
)
async def test_a_server_of_one_machine_is_asked_by_no_name_of_the_internet(
    settings: Settings, redis: Redis, changes: Any, refused: list[str], taken: list[str]
) -> None:
    async with running_api(changed(settings, **changes)) as api:
        before = await unknown_hosts(api)
        for host in refused:
            response = await api.post("/chat", json=asking(), headers={"host": host})
            assert code(response, 421) == "unknown_host"
        assert await redis.zcard("relay:queue") == 0
        assert await unknown_hosts(api) == before + len(refused)
        for host in taken:
            response = await api.post("/chat", json=asking(), headers={"host": host})
            assert response.status_code == 202, host


async def unknown_hosts(api: httpx2.AsyncClient) -> float:
    """How many requests this process has refused for their name."""
    lines = (await api.get("/metrics")).text.splitlines()
    named = [line for line in lines if line.startswith('relay_refused_total{code="unknown_host"}')]
    return sum(float(line.split()[1]) for line in named)


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        *((host, True) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost", "Localhost.")),
        *((host, False) for host in (ALL_ADDRESSES, "::", "10.0.0.1", "relay", "")),
    ],
)
def test_which_addresses_are_of_one_machine_alone(host: str, *, alone: bool) -> None:
    assert is_loopback(host) == alone


async def test_the_openapi_document_is_complete(api: httpx2.AsyncClient) -> None:
    document = (await api.get("/openapi.json")).json()
    paths = document["paths"]
    assert set(paths) == {
        "/chat",
        "/streams/{stream_id}",
        "/streams/{stream_id}/events",
        "/streams/{stream_id}/cancel",
        "/streams/events",
        "/openai/deployments/{deployment}/chat/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/api/chat",
        "/api/chat/{chat_id}/stream",
        "/api/chat/{chat_id}/stop",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    events = paths["/streams/{stream_id}/events"]["get"]
    streamed = events["responses"]["200"]["content"]
    assert {"text/event-stream", "text/plain"} <= set(streamed)
    assert "started" in streamed["text/event-stream"]["example"]
    assert {"last-event-id", "last_event_id"} <= {p["name"] for p in events["parameters"]}
    for path, methods in paths.items():
        for operation in methods.values():
            assert operation["summary"], path
            assert len(operation["tags"]) == 1, path
            errors = [s for s in operation["responses"] if s >= "400"]
            for status in errors:
                content = operation["responses"][status]["content"]
                assert set(content) == {
                    "application/json"
                    if path.startswith(("/v1/", "/openai/", "/api/"))
                    else "application/problem+json"
                }, path
    completion = set(paths["/v1/chat/completions"]["post"]["responses"])
    assert {str(status) for status in STATUSES.values()} | {"404", "409", "413"} <= completion
    assert {"400", "409", "413", "422", "503"} <= set(paths["/api/chat"]["post"]["responses"])
    assert set(paths["/api/chat/{chat_id}/stop"]["post"]["responses"]) == {"204", "422", "503"}
    deletion = paths["/v1/responses/{response_id}"]["delete"]["responses"]
    assert set(deletion) == {"200", "404", "503"}


async def test_every_body_has_an_example_that_is_answered_as_it_stands(
    stack: httpx2.AsyncClient,
) -> None:
    document = (await stack.get("/openapi.json")).json()
    asked = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if "requestBody" in operation:
                named = {each["name"]: each.get("example") for each in operation["parameters"]}
                body = operation["requestBody"]["content"]["application/json"]["schema"]
                [example] = document["components"]["schemas"][body["$ref"].split("/")[-1]][
                    "examples"
                ]
                asked.append(stack.request(method, path.format(**named), json=example))
    assert len(asked) == 5
    # Together, as the canned answers take their time.
    for response in await asyncio.gather(*asked):
        assert response.is_success, response.text


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/x-www-form-urlencoded", 415),
        ("text/json", 415),
        ("application/jsonl", 415),
        ("Application/JSON; charset=utf-8", 422),
        ("application/vnd.chat+json", 422),
    ],
)
async def test_a_body_that_is_not_announced_as_json_is_told_how(
    api: httpx2.AsyncClient, kind: str, status: int
) -> None:
    """And one that is, that it is no object."""
    response = await api.post("/chat", content="[]", headers={"content-type": kind})
    assert code(response, status) == ("not_json" if status == 415 else "invalid_request")
    assert ("content-type: application/json" in response.json()["detail"]) == (status == 415)


@pytest.mark.parametrize(
    ("value", "status", "expected"),
    [
        ('{"logit_bias":{"1":1e999}}', 422, "invalid_request"),
        ('{"prediction":{"a":NaN}}', 422, "invalid_request"),
        ('{"prediction":' + "[" * 100_000 + "]" * 100_000 + "}", 400, "bad_json"),
        ('{"seed":' + "9" * 5000 + "}", 400, "bad_json"),
    ],
)
async def test_json_that_goes_no_further_is_refused(
    api: httpx2.AsyncClient, value: str, status: int, expected: str
) -> None:
    body = '{"messages":[{"role":"user","content":"x"}],' + value.removeprefix("{")
    headers = {"content-type": "application/json"}
    assert code(await api.post("/chat", content=body, headers=headers), status) == expected


async def test_a_reply_never_outgrows_a_request_that_is_all_wrong(api: httpx2.AsyncClient) -> None:
    body = asking() | {f"field{n}": 1 for n in range(5000)}
    response = await api.post("/chat", json=body)
    assert code(response, 422) == "invalid_request"
    assert len(response.json()["errors"]) == 20


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/chat", "POST"),
        ("/streams/x", "DELETE, GET"),
        ("/v1/responses/x", "DELETE, GET"),
        ("/openai/v1/responses", "POST"),
        ("/healthz", "GET, HEAD"),
        ("/relay.js", "GET, HEAD"),
        ("/docs/assets/swagger-ui.css", "GET, HEAD"),
    ],
)
async def test_a_method_that_is_not_allowed_is_told_which_are(
    api: httpx2.AsyncClient, path: str, allowed: str
) -> None:
    response = await api.put(path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)


async def test_a_request_whose_head_never_ends_is_cut(api: httpx2.AsyncClient) -> None:
    reader, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nx: ")
    with suppress(ConnectionError):
        for _ in range(1000):
            writer.write(b"x" * 65536)
            await writer.drain()
        assert await reader.read() == b""
    assert writer.is_closing() or reader.at_eof()
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    assert (await api.get("/healthz")).status_code == 200


async def test_a_large_body_and_many_requests_on_one_connection_are_no_long_head(
    api: httpx2.AsyncClient,
) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 900_000}]}
    for _ in range(5):
        assert (await api.post("/chat", json=body)).status_code == 202


async def test_a_body_does_not_count_towards_the_head_of_the_next_request(
    api: httpx2.AsyncClient,
) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 900_000}]}).encode()
    reader, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
    announced = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(b"POST /chat HTTP/1.1\r\nhost: x\r\n" + announced.encode() + body)
    assert b" 202 " in await reader.readline()
    writer.write(b"GET /healthz HTTP/1.1\r\n")
    # The first part of that head has been read when this one is answered.
    await api.get("/healthz")
    writer.write(b"host: x\r\nconnection: close\r\n\r\n")
    answered = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert b'{"status":"ok"}' in answered


async def test_a_key_whose_stream_is_gone_leads_to_a_new_one(
    api: httpx2.AsyncClient, redis: Redis
) -> None:
    headers = {"idempotency-key": "k"}
    first = (await api.post("/chat", json=asking(), headers=headers)).json()["stream_id"]
    await redis.delete(f"relay:{first}:log", f"relay:{first}:state")
    second = (await api.post("/chat", json=asking(), headers=headers)).json()["stream_id"]
    assert second != first
    assert (await api.get(f"/streams/{second}")).json()["status"] == "queued"


async def test_a_repeated_request_is_told_what_became_of_the_stream(
    api: httpx2.AsyncClient,
) -> None:
    headers = {"idempotency-key": "k"}
    first = (await api.post("/chat", json=asking(), headers=headers)).json()
    await api.post(first["cancel_url"])
    again = (await api.post("/chat", json=asking(), headers=headers)).json()
    assert again == first | {"status": "cancelled"}


async def test_text_that_fails_before_it_begins_still_names_its_stream(
    api: httpx2.AsyncClient,
) -> None:
    headers = {"accept": "text/plain", "idempotency-key": "k"}
    stream_id = (await api.post("/chat", json=asking(), headers={"idempotency-key": "k"})).json()[
        "stream_id"
    ]
    await api.post(f"/streams/{stream_id}/cancel")
    response = await api.post("/chat", json=asking(), headers=headers)
    assert code(response, 409) == "cancelled"
    assert response.headers["x-stream-id"] == stream_id


async def test_the_page_is_served(api: httpx2.AsyncClient) -> None:
    assert "<title>chat-relay</title>" in (await api.get("/")).text
    assert (await api.get("/page.js")).headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize("path", ["/", "/page.js", "/relay.js", "/page.css"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_file_of_the_page_that_is_there_already_is_not_sent_again(
    api: httpx2.AsyncClient, path: str, method: str
) -> None:
    first = await api.request(method, path)
    kept = first.headers["etag"]
    again = await api.request(method, path, headers={"if-none-match": kept})
    assert (again.status_code, again.content) == (304, b"")
    assert (again.headers["etag"], again.headers["cache-control"]) == (kept, "no-cache")
    other = await api.request(method, path, headers={"if-none-match": '"other"'})
    assert (other.status_code, other.content) == (200, first.content)


async def viewers(api: httpx2.AsyncClient, stream_id: str) -> int:
    return int((await api.get(f"/streams/{stream_id}")).json()["viewers"])


async def counted(api: httpx2.AsyncClient, stream_id: str, expected: int) -> None:
    async def so_many() -> bool:
        return await viewers(api, stream_id) == expected

    await until(so_many)


async def test_how_many_watch_is_told_by_every_process(settings: Settings, redis: Redis) -> None:
    async with running_api(settings) as one, running_api(settings) as two:
        stream_id = await ask(one)
        async with one.sse(f"/streams/{stream_id}/events") as source:
            events = aiter(source)
            await anext(events)
            await counted(one, stream_id, 1)
            await counted(two, stream_id, 1)
        await counted(one, stream_id, 0)
        await counted(two, stream_id, 0)


async def test_a_process_that_ends_in_good_order_counts_no_longer(
    settings: Settings, redis: Redis
) -> None:
    async with running_api(settings) as other, AsyncExitStack() as stack:
        stream_id = await ask(other)
        async with running_api(settings) as leaving:
            http = httpx2.AsyncClient(base_url=leaving.base_url, trust_env=False)
            await stack.enter_async_context(http)
            await stack.enter_async_context(http.stream("GET", f"/streams/{stream_id}/events"))
            await counted(other, stream_id, 1)
        assert await viewers(other, stream_id) == 0


async def test_a_process_that_died_stops_counting(settings: Settings, redis: Redis) -> None:
    async with running_api(settings) as api:
        stream_id = await ask(api)
        log = make_log(redis)
        await log.report_viewers("dead", {stream_id: 9})
        assert await viewers(api, stream_id) == 9
        await reported_before(redis, stream_id, "dead", VIEWERS_SECONDS + 1)
        assert await viewers(api, stream_id) == 0


async def test_a_process_whose_viewers_stay_says_so_again_before_they_stop_counting(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert REFRESH_SECONDS < VIEWERS_SECONDS / 2
    for name in ("REPORT_SECONDS", "REFRESH_SECONDS"):
        monkeypatch.setattr(f"api.presence.{name}", 0.01)
    async with running_api(settings) as api:
        stream_id = await ask(api)

        async def reports() -> dict[str, int]:
            return (await make_log(redis).state(stream_id)).viewers

        async def counts() -> bool:
            return [*(await reports()).values()] == [1]

        async with api.stream("GET", f"/streams/{stream_id}/events"):
            for _ in range(3):
                await until(counts)
                [process] = await reports()
                await reported_before(redis, stream_id, process, VIEWERS_SECONDS + 1)
