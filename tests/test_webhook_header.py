"""X-Webhook-URL on every API that creates streams: taken, or refused in the shape of that API."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from api.app import create_app
from api.webhook import StreamEnded
from emulator.app import Emulator
from emulator.script import prompt
from relay import keys
from relay.errors import ConfigurationError
from relay.settings import Settings
from relay.webhooks import LONGEST_URL
from tests.conftest import changed, running_api
from tests.receiver import Receiver, receiving

SECRET = SecretStr(f"whsec_{'a' * 32}")
SAID = prompt(chunks=1)
MESSAGE = {"role": "user", "content": SAID}
UI_MESSAGE = {"id": "m", "role": "user", "parts": [{"type": "text", "text": SAID}]}
BODIES: dict[str, dict[str, Any]] = {
    "/chat": {"messages": [MESSAGE]},
    "/v1/chat/completions": {"model": "demo", "messages": [MESSAGE]},
    "/v1/responses": {"model": "demo", "input": SAID},
    "/api/chat": {"id": "c", "messages": [UI_MESSAGE]},
}
each_api = pytest.mark.parametrize("path", BODIES)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return changed(settings, webhook_hosts="127.0.0.1", webhook_keys=SECRET, webhook_private=True)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


async def post(
    api: httpx2.AsyncClient, path: str, url: str | bytes, **headers: str
) -> httpx2.Response:
    given: Any = {"x-webhook-url": url, **headers}
    return await api.post(path, json=BODIES[path], headers=given)


@each_api
async def test_each_api_that_creates_a_stream_has_it_told_of(
    stack: httpx2.AsyncClient, emulator: Emulator, receiver: Receiver, path: str
) -> None:
    response = await post(stack, path, receiver.url)
    assert response.status_code < 300, response.text
    told = StreamEnded.model_validate_json((await receiver.request()).body, extra="forbid")
    assert told.type == "stream.completed"
    assert told.data.stream_id == response.headers["x-stream-id"]
    status = (await stack.get(told.data.url)).json()
    assert status["status"] == "completed"
    assert status["ended_ms"] == told.timestamp.timestamp() * 1000
    assert "the-marker" not in json.dumps((await emulator.request(0)).body)


@each_api
async def test_it_counts_in_what_an_idempotency_key_stands_for(
    stack: httpx2.AsyncClient, receiver: Receiver, path: str
) -> None:
    key = {"idempotency-key": "k"}
    first = await post(stack, path, receiver.url, **key)
    again = await post(stack, path, receiver.url, **key)
    assert again.headers["x-stream-id"] == first.headers["x-stream-id"]
    for other in (
        await post(stack, path, receiver.url + "x", **key),
        await stack.post(path, json=BODIES[path], headers=key),
    ):
        assert other.status_code == 409
        assert "idempotency_conflict" in other.text


def told_natively(response: httpx2.Response) -> tuple[int, str, str]:
    problem = response.json()
    [error] = problem["errors"]
    return response.status_code, error["field"].removeprefix("header."), problem["detail"]


def told_as_openai_does(response: httpx2.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    assert error["code"] == "invalid_value"
    return response.status_code, error["param"], error["message"]


def told_to_the_ai_sdk(response: httpx2.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error.split(":")[0], error


TOLD = {
    "/chat": (422, told_natively),
    "/v1/chat/completions": (400, told_as_openai_does),
    "/v1/responses": (400, told_as_openai_does),
    "/api/chat": (422, told_to_the_ai_sdk),
}
REFUSED: list[tuple[str | bytes, str]] = [
    ("", "must be a URL"),
    ("nonsense", "must be a URL"),
    ("https://user:the-marker@127.0.0.1/", "must be a URL"),
    ("https://127.0.0.1/#the-marker", "must be a URL"),
    ("https://127.0.0.1/" + "x" * LONGEST_URL, "must be a URL"),
    ("https://127.0.0.1/\u00fc".encode(), "must be a URL"),
    ("https://other.test/the-marker", "RELAY_WEBHOOK_HOSTS"),
]


@each_api
async def test_what_may_not_be_told_is_refused_by_the_name_of_the_header_and_nothing_is_created(
    api: httpx2.AsyncClient, redis: Redis, path: str
) -> None:
    status, told = TOLD[path]
    for url, reason in REFUSED:
        code, field, sentence = told(await post(api, path, url))
        assert (code, field) == (status, "x-webhook-url")
        assert reason in sentence
        assert sentence.endswith(".")
        assert "the-marker" not in sentence
    assert await redis.keys("relay:*") == []


@each_api
async def test_where_no_host_is_allowed_it_is_refused_with_the_setting_that_is_missing(
    settings: Settings, redis: Redis, path: str
) -> None:
    async with running_api(changed(settings, webhook_hosts="")) as api:
        status, told = TOLD[path]
        for url in ("https://127.0.0.1/", "nonsense"):
            code, field, sentence = told(await post(api, path, url))
            assert (code, field) == (status, "x-webhook-url")
            assert "RELAY_WEBHOOK_HOSTS" in sentence
    assert await redis.keys("relay:*") == []


async def test_http_is_refused_where_private_addresses_are(settings: Settings) -> None:
    async with running_api(changed(settings, webhook_private=False)) as api:
        _, _, sentence = told_natively(await post(api, "/chat", "http://127.0.0.1/"))
        assert "RELAY_WEBHOOK_PRIVATE" in sentence
        assert (await post(api, "/chat", "https://127.0.0.1/")).status_code == 202


async def test_without_the_header_nobody_is_told(stack: httpx2.AsyncClient, redis: Redis) -> None:
    response = await stack.post("/v1/chat/completions", json=BODIES["/v1/chat/completions"])
    state: Any = redis
    stream_id = response.headers["x-stream-id"]
    assert not await state.hexists(keys.state(stream_id), "webhook")
    assert await redis.zcard(keys.WEBHOOKS) == 0


async def test_the_document_names_the_header_and_describes_the_webhook(
    api: httpx2.AsyncClient,
) -> None:
    document = (await api.get("/openapi.json")).json()
    for path in BODIES:
        parameters = document["paths"][path]["post"]["parameters"]
        assert "x-webhook-url" in [parameter["name"] for parameter in parameters]
    operation = document["webhooks"]["stream-ended"]["post"]
    named = {parameter["name"] for parameter in operation["parameters"]}
    assert named == {"webhook-id", "webhook-timestamp", "webhook-signature"}
    assert set(operation["responses"]) == {"204"}
    assert "StreamEnded" in document["components"]["schemas"]


def test_hosts_without_a_secret_end_the_start_of_the_api_too(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="RELAY_WEBHOOK_SECRET"):
        create_app(changed(settings, webhook_keys=SecretStr("")))
