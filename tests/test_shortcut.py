"""The shortcut gives the answers that FastAPI's stack gives, to good requests and to bad ones; what
is plainly right takes it, and nothing else does."""

import asyncio
import gc
import json
import re
from typing import Any

import httpx2
import pytest

from api import shortcut
from api.chat_request import ChatRequest
from emulator.script import prompt
from relay.ids import new_stream_id
from relay.settings import Settings
from tests.conftest import ask, changed, running_api, running_worker

JSON = {"content-type": "application/json"}
QUESTION = {"messages": [{"role": "user", "content": prompt(chunks=3)}]}
EVENTS = {"accept": "text/event-stream"}
OWN = re.compile(rb"[a-z2-7]{32}|chatcmpl-emulator\d+|\"created\":\d+|(?<=retry: )\d+|(?<=id: )\d+")


def asked(body: Any = QUESTION, **headers: str) -> tuple[str, str, dict[str, str], bytes]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return "POST", "/chat", JSON | named, content


ASKED = {
    "plain": asked(),
    "watched": asked(accept="text/event-stream"),
    "as text": asked(accept="text/plain;q=0.9, */*"),
    "with a charset": asked(content_type="application/json; charset=utf-8"),
    "every field": asked(
        {**QUESTION, "temperature": 0.5, "stop": ["x"], "logit_bias": {"1": 2}, "recovery": "fail"}
    ),
    "half an emoji": asked(b'{"messages":[{"role":"user","content":"\\ud83d"}]}'),
    "a whole number for a broken one": asked({**QUESTION, "temperature": 1}),
    "no JSON": asked(b"{"),
    "no object": asked(b"[]"),
    "nothing": asked(b""),
    "not UTF-8": asked(b'{"messages":[{"role":"user","content":"\xff"}]}'),
    "not a number": asked(b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}'),
    "nested": asked(b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "an unknown field": asked({**QUESTION, "sing": True}),
    "a wrong field": asked({**QUESTION, "temperature": "hot"}),
    "a text for a number": asked({**QUESTION, "temperature": "1"}),
    "no messages": asked({"messages": []}),
    "not announced as JSON": asked(content_type="text/plain"),
    "too long": asked({**QUESTION, "user": "x" * 20_000}),
    "a long key": asked(idempotency_key="x" * 256),
    "a wrong header": asked(x_on_disconnect="explode"),
    "a webhook where there are none": asked(x_webhook_url="https://example.com/"),
}
PLAINLY_RIGHT = {
    "plain",
    "watched",
    "as text",
    "every field",
    "a whole number for a broken one",
    "a text for a number",
}
"""Of those, what must take the shortcut; the rest must not."""
UNKNOWN, GONE = "a" * 32, new_stream_id()
WATCHED = {
    "from the start": ("", {}),
    "as events": ("", EVENTS),
    "as text": ("", {"accept": "text/plain"}),
    "after a cursor": ("", {"last-event-id": "1-2"}),
    "after one in the query": ("?last_event_id=1-2", {}),
    "after both": ("?last_event_id=1-1", {"last-event-id": "1-3"}),
    "of which one is empty": ("?last_event_id=1-1", {"last-event-id": ""}),
    "after two": ("", [("last-event-id", "1-2"), ("last-event-id", "1-4")]),
    "with all": ("", {"last-event-id": "1-7"}),
    "after no cursor": ("", {"last-event-id": "one"}),
    "with a query of others": ("?x=1&last_event_id=1-2&last_event_id=1-3", {}),
}


def alike(response: httpx2.Response) -> Any:
    """All but what is of each request."""
    headers = {k: v for k, v in response.headers.items() if k not in {"date", "content-length"}}
    return response.status_code, OWN.sub(b"", str(headers).encode()), OWN.sub(b"", response.content)


@pytest.fixture
def both(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A request's answers with the shortcut and without, and whether the first came by it."""
    respond, shortened = shortcut._respond, 0

    async def counted(*arguments: Any) -> None:
        nonlocal shortened
        shortened += 1
        await respond(*arguments)

    monkeypatch.setattr(shortcut, "_respond", counted)

    async def ask_both(request: Any) -> tuple[Any, Any, bool]:
        small = changed(settings, body_bytes=16_384)
        async with running_api(small) as http, running_worker(small):
            method, path, headers, content = request
            if "ID" in path:
                path = path.replace("ID", await finished(http))
            answers, counts = [], [shortened]
            for patched in ({}, {"_ask": None, "_watch": None}):
                with monkeypatch.context() as patch:
                    for name in patched:
                        patch.setattr(shortcut, name, lambda *_: None)
                    options = {"headers": headers, "content": content}
                    answers.append(alike(await http.request(method, path, **options)))
                    counts.append(shortened)
        assert counts[1] == counts[2]
        return answers[0], answers[1], counts[0] < counts[1]

    return ask_both


async def finished(http: httpx2.AsyncClient) -> str:
    stream_id = await ask(http, chunks=3)
    await http.get(f"/streams/{stream_id}/events", headers=EVENTS)
    return stream_id


@pytest.mark.parametrize("name", ASKED)
async def test_a_question_is_answered_alike(name: str, both: Any) -> None:
    short, long, shortened = await both(ASKED[name])
    assert short == long
    assert shortened == (name in PLAINLY_RIGHT)


@pytest.mark.parametrize("name", WATCHED)
async def test_a_viewer_is_shown_the_same(name: str, both: Any) -> None:
    query, headers = WATCHED[name]
    short, long, shortened = await both(("GET", f"/streams/ID/events{query}", headers, b""))
    assert short == long
    assert shortened


@pytest.mark.parametrize(
    "stream_id",
    [UNKNOWN, GONE, "x", "%2E%2E"],
    ids=["unknown", "gone", "no id", "a way up"],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_what_is_not_there_is_refused_alike(method: str, stream_id: str, both: Any) -> None:
    short, long, shortened = await both((method, f"/streams/{stream_id}/events", {}, b""))
    assert short == long
    assert shortened == ((method, stream_id) == ("GET", GONE))


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("/chat", {"idempotency-key", "x-on-disconnect", "x-webhook-url"}),
        ("/streams/{stream_id}/events", {"stream_id", "last-event-id", "last_event_id"}),
    ],
)
async def test_the_shortcut_knows_all_that_its_routes_take(
    path: str, known: set[str], settings: Settings
) -> None:
    async with running_api(settings) as http:
        [operation] = (await http.get("/openapi.json")).json()["paths"][path].values()
    named = {parameter["name"].lower() for parameter in operation["parameters"]}
    assert named == known, "one that api/shortcut.py does not know would be passed over there"


@pytest.mark.parametrize(
    ("method", "path", "at_once"),
    [
        ("POST", "/streams/ID/cancel", False),
        ("DELETE", "/streams/ID", False),
        ("POST", "/v1/chat/completions", False),
        ("GET", "/healthz", True),
        ("GET", "/readyz", True),
        ("GET", "/metrics", True),
    ],
)
async def test_of_many_requests_one_begins_in_each_turn_but_for_those_about_the_process(
    method: str, path: str, at_once: bool
) -> None:
    turn, begun = 0, list[int]()

    async def app(*_: Any) -> None:
        begun.append(turn)

    served = shortcut.Shortcut(app)
    scope = {"type": "http", "method": method, "path": path}
    nothing: Any = None
    requests = [asyncio.create_task(served(scope, nothing, nothing)) for _ in range(5)]
    while not all(request.done() for request in requests):
        await asyncio.sleep(0)  # One turn of the loop: turns are what is counted.
        turn += 1
    assert len(set(begun)) == (1 if at_once else 5)


async def test_a_viewer_does_not_keep_the_question(stack: httpx2.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": prompt(chunks=1, end="stall")}]}
    async with stack.stream("POST", "/chat", json=body, headers=EVENTS) as response:
        async for line in response.aiter_lines():
            if line == "event: chunk":
                break
        gc.collect()  # Of all that came before.
        kept = list(filter(is_question, gc.get_objects()))
    assert kept == []


def is_question(thing: object) -> bool:
    if type(thing) is dict:  # As ASGI has a body.
        return thing.get("type") == "http.request" and bool(thing.get("body"))
    return isinstance(thing, ChatRequest)
