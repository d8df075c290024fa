"""The AI SDK's API: over HTTP, and by the real packages, unmodified, in Node."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from redis.asyncio import Redis

from emulator.app import Emulator
from emulator.script import prompt
from relay import keys
from relay.settings import Settings
from tests.conftest import changed, running_api, running_worker, text_of, until_broken_off, watch

Part = dict[str, Any]

FORTY = "".join(f"{n} " for n in range(40))
PATIENTLY: dict[str, Any] = {"chunks": 40, "delay_ms": 50}
"""So that a process on a busy machine can do something meanwhile."""
SLOWLY: dict[str, Any] = {"chunks": 40, "delay_ms": 20}
LOOKUP: Part = {"name": "lookup", "arguments": {"city": "Zürich"}, "id": "call_1"}


def question(**script: Any) -> Part:
    return {"id": "q", "role": "user", "parts": [{"type": "text", "text": prompt(**script)}]}


def chatting(chat_id: str = "chat", **script: Any) -> Part:
    return {"id": chat_id, "messages": [question(**script)], "trigger": "submit-message"}


def parts_of(response: httpx2.Response) -> list[Part]:
    assert response.status_code == 200, response.text
    assert response.headers["x-vercel-ai-ui-message-stream"] == "v1"
    data = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(line) for line in data]


def said(parts: list[Part]) -> str:
    return "".join(part["delta"] for part in parts if part["type"] == "text-delta")


@asynccontextmanager
async def begun(
    http: httpx2.AsyncClient, body: Part, **headers: str
) -> AsyncIterator[tuple[str, AsyncIterator[str]]]:
    """An answer whose first text has come: its stream's id, and what lines come further."""
    async with http.stream("POST", "/api/chat", json=body, headers=headers) as response:
        lines = response.aiter_lines()
        async for line in lines:
            if "text-delta" in line:
                break
        yield response.headers["x-stream-id"], lines


async def test_an_answer_is_a_message_from_start_to_finish(stack: httpx2.AsyncClient) -> None:
    response = await stack.post("/api/chat", json=chatting(chunks=3))
    parts = parts_of(response)
    assert [part["type"] for part in parts] == [
        *("start", "start-step", "text-start"),
        *["text-delta"] * 3,
        *("text-end", "finish-step", "finish"),
    ]
    assert said(parts) == "0 1 2 "
    assert response.headers["content-type"].startswith("text/event-stream")
    events = await watch(stack, response.headers["x-stream-id"])
    assert text_of(events) == "0 1 2 ", "it is a stream like any other"


async def test_the_message_id_does_not_give_the_stream_away(stack: httpx2.AsyncClient) -> None:
    response = await stack.post("/api/chat", json=chatting(chunks=1))
    assert response.headers["x-stream-id"] not in response.text


@pytest.mark.parametrize("chat_id", ["chat", "a/b", "Zürich ?#%", "x/stream"])
async def test_any_process_replays_it_from_the_start_under_the_same_message_id(
    settings: Settings, chat_id: str
) -> None:
    async with (
        running_api(settings) as here,
        running_api(settings) as there,
        running_worker(settings),
        begun(here, chatting(chat_id, **SLOWLY)),
    ):
        url = f"/api/chat/{quote(chat_id, safe='')}/stream"
        first, second = await asyncio.gather(there.get(url), here.get(url))
    assert said(parts_of(first)) == FORTY
    assert [part["type"] for part in parts_of(first)[:2]] == ["start", "start-step"]
    assert parts_of(first) == parts_of(second)


async def test_there_is_nothing_to_resume_before_an_answer_after_it_and_when_it_is_erased(
    stack: httpx2.AsyncClient,
) -> None:
    async def resumed() -> int:
        return (await stack.get("/api/chat/chat/stream")).status_code

    assert await resumed() == 204
    await stack.post("/api/chat", json=chatting(chunks=1))
    assert await resumed() == 204
    async with begun(stack, chatting(chunks=1, end="stall")) as (stream_id, lines):
        await stack.delete(f"/streams/{stream_id}")
        assert await resumed() == 204
        rest = [line async for line in lines if line]
    assert json.loads(rest[-2][6:])["type"] == "error", "who watches is told"
    assert rest[-1] == "data: [DONE]"


async def test_the_newest_answer_of_a_chat_is_the_one_that_is_resumed_and_stopped(
    stack: httpx2.AsyncClient,
) -> None:
    async with begun(stack, chatting(chunks=1, end="stall")) as (old, _):
        async with begun(stack, chatting(text=["new"], end="stall")) as (_, lines):
            assert (await stack.post("/api/chat/chat/stop")).status_code == 204
            assert "abort" in "".join([line async for line in lines])
        assert (await stack.get(f"/streams/{old}")).json()["status"] == "running"


async def test_a_repeated_question_does_not_make_its_answer_the_newest_again(
    stack: httpx2.AsyncClient,
) -> None:
    old, new = chatting(text=["old"], end="stall"), chatting(text=["new"], end="stall")
    async with (
        begun(stack, old, **{"idempotency-key": "old"}) as (first, _),
        begun(stack, new, **{"idempotency-key": "new"}) as (second, _),
        begun(stack, old, **{"idempotency-key": "old"}) as (again, _),
        stack.stream("GET", "/api/chat/chat/stream") as resumed,
    ):
        assert first == again
        assert resumed.headers["x-stream-id"] == second


async def test_to_stop_is_idempotent_and_harmless_where_there_is_nothing(
    stack: httpx2.AsyncClient, emulator: Emulator
) -> None:
    assert (await stack.post("/api/chat/chat/stop")).status_code == 204
    async with begun(stack, chatting(chunks=1, end="stall")) as (stream_id, _):
        for _ in range(2):
            assert (await stack.post("/api/chat/chat/stop")).status_code == 204
    async with asyncio.timeout(5):
        await emulator.requests[-1].over.wait()
    assert emulator.requests[-1].outcome == "disconnected"
    await stack.delete(f"/streams/{stream_id}")
    assert (await stack.post("/api/chat/chat/stop")).status_code == 204


async def test_what_leads_from_a_chat_to_its_stream_goes_when_the_stream_does(
    stack: httpx2.AsyncClient, redis: Redis
) -> None:
    response = await stack.post("/api/chat", json=chatting(chunks=1))
    left = [
        await redis.pttl(key)
        for key in (keys.chat("chat"), keys.log(response.headers["x-stream-id"]))
    ]
    assert left[0] == pytest.approx(left[1], abs=1000)


async def test_a_draining_process_breaks_off_and_never_ends_cleanly(settings: Settings) -> None:
    async with running_worker(settings), AsyncExitStack() as stack:
        async with running_api(settings) as leaving:
            http = httpx2.AsyncClient(base_url=leaving.base_url, trust_env=False)
            await stack.enter_async_context(http)
            viewer = begun(http, chatting(chunks=1, end="stall"))
            _, lines = await stack.enter_async_context(viewer)
        assert not any(await until_broken_off(lines))


async def test_an_answer_goes_on_in_the_message_that_was_sent_last(
    stack: httpx2.AsyncClient, emulator: Emulator
) -> None:
    output = {"state": "output-available", "input": {}, "output": "Sunny."}
    called = {"type": "tool-lookup", "toolCallId": "call_1", **output}
    body = chatting(chunks=2)
    body["messages"].append({"id": "mine", "role": "assistant", "parts": [called]})
    parts = parts_of(await stack.post("/api/chat", json=body))
    assert parts[0] == {"type": "start", "messageId": "mine"}
    assert emulator.requests[-1].body["messages"][-1]["content"] == "Sunny."


async def test_leaving_stops_the_answer_only_where_that_was_asked_for(
    stack: httpx2.AsyncClient, emulator: Emulator
) -> None:
    async with begun(stack, chatting(chunks=1, end="stall"), **{"x-on-disconnect": "cancel"}):
        pass
    async with asyncio.timeout(5):
        await emulator.requests[-1].over.wait()
    async with begun(stack, chatting(**SLOWLY)):
        pass
    assert said(parts_of(await stack.get("/api/chat/chat/stream"))) == FORTY


async def test_the_same_idempotency_key_leads_to_the_same_message(
    stack: httpx2.AsyncClient,
) -> None:
    key = {"idempotency-key": "once"}
    first, again = [
        await stack.post("/api/chat", json=chatting(chunks=2), headers=key) for _ in range(2)
    ]
    assert parts_of(first) == parts_of(again)
    other = await stack.post("/api/chat", json=chatting("other", chunks=2), headers=key)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": ""}, "id"),
        ({"id": "x" * 256}, "id"),
        ({"messages": []}, "messages"),
        ({"messages": [{**question(), "content": "Hi"}]}, "messages.0.content"),
        ({"messages": [{"id": "m", "role": "tool", "parts": []}]}, "messages.0.role"),
        ({"messages": [{"id": "m", "role": "user", "parts": [{}]}]}, "messages.0.parts.0"),
        ({"trigger": "resume-stream"}, "trigger"),
        ({"model": "gpt-99"}, "model"),
        ({"n": 2}, "n"),
        ({"body": 2}, "body"),
    ],
)
async def test_bad_input_is_refused_with_the_field_named(
    stack: httpx2.AsyncClient, emulator: Emulator, change: Part, field: str
) -> None:
    response = await stack.post("/api/chat", json={**chatting(), **change})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert response.json()["error"].startswith(f"{field}: ")
    assert emulator.total == 0


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"'])
async def test_what_is_no_json_object_is_refused(stack: httpx2.AsyncClient, body: bytes) -> None:
    response = await stack.post("/api/chat", content=body)
    assert (response.status_code, response.json()["code"]) == (400, "bad_json")
    assert "JSON object" in response.json()["error"]


async def test_half_an_emoji_in_the_id_of_a_chat_is_refused_too(stack: httpx2.AsyncClient) -> None:
    body = json.dumps({**chatting(), "id": "\ud83d"})
    headers = {"content-type": "application/json"}
    response = await stack.post("/api/chat", content=body, headers=headers)
    assert response.status_code == 422


async def test_without_redis_it_is_503(stack: httpx2.AsyncClient, redis: Redis) -> None:
    await redis.config_set("maxmemory", 1)
    try:
        response = await stack.post("/api/chat", json=chatting())
    finally:
        await redis.config_set("maxmemory", 0)
    assert (response.status_code, response.json()["code"]) == (503, "redis_away")
    assert response.headers["retry-after"]


# By the real packages.

CLIENTS = Path(__file__).parent / "clients"
clients = pytest.mark.clients


class Chat:
    """useChat's Chat in a process of its own. A state is what a page shows."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def do(self, command: str, value: Any = None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": command, "with": value}).encode() + b"\n")
        await self._process.stdin.drain()

    async def done(self, command: str, value: Any = None) -> Part:
        """Do it and see it through."""
        await self.do(command, value)
        return await self.until(lambda state: state.get("done") == command)

    async def until(self, holds: Callable[[Part], bool]) -> Part:
        """The first state from now on of which this holds."""
        assert self._process.stdout is not None
        async with asyncio.timeout(20):
            while line := await self._process.stdout.readline():
                state: Part = json.loads(line)
                if holds(state):
                    return state
        raise AssertionError("the client has died")


@asynccontextmanager
async def chat(http: httpx2.AsyncClient, chat_id: str = "chat") -> AsyncIterator[Chat]:
    process = await asyncio.create_subprocess_exec(
        *("node", "chat.mjs", str(http.base_url), chat_id),
        cwd=CLIENTS,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**24,
    )
    try:
        yield Chat(process)
    finally:
        process.kill()
        await process.communicate()


def text(state: Part, kind: str = "text") -> str:
    """What stands in the answer."""
    last: Part = state["messages"][-1] if state["messages"] else {"role": "user"}
    if last["role"] != "assistant":
        return ""
    return "".join(str(part["text"]) for part in last["parts"] if part["type"] == kind)


def longer(words: int) -> Callable[[Part], bool]:
    return lambda state: len(text(state).split()) > words


def roles(state: Part) -> list[str]:
    return [message["role"] for message in state["messages"]]


@clients
async def test_usechat_has_the_whole_answer(stack: httpx2.AsyncClient) -> None:
    async with chat(stack) as page:
        state = await page.done("send", prompt(chunks=40))
        assert (text(state), state["status"], roles(state)) == (
            *(FORTY, "ready"),
            ["user", "assistant"],
        )
        parts = state["messages"][-1]["parts"]
        assert [part.get("state") for part in parts] == [None, "done"]
        state = await page.done("send", prompt(chunks=2))
        assert (text(state), len(roles(state))) == ("0 1 ", 4)
        state = await page.done("regenerate")
        assert (text(state), len(roles(state))) == ("0 1 ", 4)


@clients
async def test_half_an_emoji_a_chunk_is_a_whole_one_on_the_page(stack: httpx2.AsyncClient) -> None:
    async with chat(stack) as page:
        assert text(await page.done("send", prompt(surrogate=True))) == "\U0001f600"


@clients
async def test_a_page_that_waits_passes_over_the_heartbeats(settings: Settings) -> None:
    often = changed(settings, heartbeat_seconds=0.02)
    async with running_api(often) as api, running_worker(often), chat(api) as page:
        state = await page.done("send", prompt(chunks=2, first_ms=300))
    assert (text(state), state["status"]) == ("0 1 ", "ready")


@clients
async def test_a_reloaded_page_has_it_from_the_start_and_live(stack: httpx2.AsyncClient) -> None:
    async with chat(stack) as reloaded:
        async with chat(stack) as page:
            await page.do("send", prompt(**PATIENTLY))
            before = await page.until(longer(5))
        await reloaded.do("show", before["messages"][:1])
        state = await reloaded.done("resume")
        assert (text(state), state["status"]) == (FORTY, "ready")
        assert roles(state) == ["user", "assistant"]
        assert state["messages"][-1]["id"] == before["messages"][-1]["id"]
        state = await reloaded.done("resume")
        assert (text(state), state["status"]) == (FORTY, "ready"), "there is nothing to add"


@clients
async def test_a_page_that_is_sent_away_knows_it_and_resumes_elsewhere_in_the_same_message(
    settings: Settings,
) -> None:
    async with (
        running_worker(settings),
        running_api(settings) as there,
        AsyncExitStack() as pages,
    ):
        async with running_api(settings) as here:
            page = await pages.enter_async_context(chat(here))
            await page.do("send", prompt(**PATIENTLY))
            await page.until(longer(3))
        state = await page.until(lambda state: state.get("done") == "send")
        assert state["status"] == "error"
        assert FORTY.startswith(text(state))
        await page.do("move", str(there.base_url))
        state = await page.done("resume")
    assert (text(state), state["status"], roles(state)) == (FORTY, "ready", ["user", "assistant"])


@clients
async def test_two_pages_show_the_same(stack: httpx2.AsyncClient) -> None:
    async with chat(stack) as first, chat(stack) as second:
        await first.do("send", prompt(**PATIENTLY))
        begun = await first.until(longer(3))
        await second.do("resume")
        one, other = await asyncio.gather(
            first.until(lambda state: state.get("done") == "send"),
            second.until(lambda state: state.get("done") == "resume"),
        )
    assert text(one) == FORTY
    assert one["messages"][-1] == other["messages"][-1]
    assert one["messages"][-1]["id"] == begun["messages"][-1]["id"]


@clients
async def test_stop_reaches_the_model_and_every_page_keeps_what_there_is(
    stack: httpx2.AsyncClient, emulator: Emulator
) -> None:
    async with chat(stack) as page:
        await page.do("send", prompt(chunks=3, end="stall"))
        await page.until(longer(2))
        await stack.post("/api/chat/chat/stop")
        state = await page.until(lambda state: state.get("done") == "send")
        assert (text(state), state["status"]) == ("0 1 2 ", "ready")
        assert state["messages"][-1]["parts"][-1]["state"] == "done"
        assert emulator.requests[-1].outcome == "disconnected"
        state = await page.done("resume")
        assert (text(state), state["status"]) == ("0 1 2 ", "ready")


@clients
async def test_its_own_stop_only_leaves_and_the_answer_is_there_to_resume(
    stack: httpx2.AsyncClient,
) -> None:
    async with chat(stack) as page:
        await page.do("send", prompt(**PATIENTLY))
        await page.until(longer(3))
        left = await page.done("stop")
        assert (left["status"], FORTY.startswith(text(left))) == ("ready", True)
        state = await page.done("resume")
    assert (text(state), state["status"], roles(state)) == (FORTY, "ready", ["user", "assistant"])


@clients
@pytest.mark.parametrize(
    ("script", "kept"),
    [({"prompt_filter": True}, ""), ({"chunks": 3, "end": "eof"}, "0 1 2 ")],
)
async def test_a_failure_is_shown_as_one_sentence_and_what_was_said_is_kept(
    stack: httpx2.AsyncClient, script: Any, kept: str
) -> None:
    async with chat(stack) as page:
        state = await page.done("send", prompt(**script))
        assert (text(state), state["status"]) == (kept, "error")
        assert state["error"].endswith(".")
        assert "{" not in state["error"]
        state = await page.done("send", prompt(chunks=2))
        assert (text(state), state["status"]) == ("0 1 ", "ready"), "and the chat goes on"


@clients
async def test_a_new_attempt_takes_the_place_of_the_old_one_in_every_page(
    settings: Settings, emulator: Emulator
) -> None:
    script = {**PATIENTLY, "label": True}
    async with running_api(settings) as api, chat(api) as page, chat(api) as late:
        async with running_worker(settings):
            await page.do("send", prompt(**script))
            before = await page.until(longer(5))
        async with running_worker(settings):
            await page.until(lambda state: text(state).startswith("2."))
            state, other = await asyncio.gather(
                page.until(lambda state: state.get("done") == "send"), late.done("resume")
            )
    assert text(before).startswith("1.0 ")
    assert text(state) == text(other) == "".join(f"2.{n} " for n in range(40))
    assert state["messages"][-1]["id"] == before["messages"][-1]["id"]


@clients
async def test_a_tool_is_called_once_and_its_output_goes_to_the_model(
    stack: httpx2.AsyncClient, emulator: Emulator
) -> None:
    async with chat(stack) as page:
        state = await page.done("send", prompt(text=["Let me look."], tool_calls=[LOOKUP]))
        [call] = state["called"]
        assert (call["toolName"], call["input"]) == ("lookup", {"city": "Zürich"})
        part = state["messages"][-1]["parts"][-1]
        assert (part["type"], part["state"]) == ("tool-lookup", "input-available")
        output = {"tool": "lookup", "toolCallId": call["toolCallId"], "output": {"sun": True}}
        await page.done("tool_output", output)
        state = await page.done("go_on")
        assert roles(state) == ["user", "assistant"]
    said = emulator.requests[-1].body["messages"][1:]
    assert said[0]["content"] == "Let me look."
    assert json.loads(said[0]["tool_calls"][0]["function"]["arguments"]) == {"city": "Zürich"}
    assert said[1] == {"role": "tool", "tool_call_id": "call_1", "content": '{"sun": true}'}


@clients
async def test_a_page_reloaded_after_a_tools_output_keeps_the_call_and_has_the_answer(
    stack: httpx2.AsyncClient,
) -> None:
    async with chat(stack) as reloaded:
        async with chat(stack) as page:
            asked = prompt(chunks=20, delay_ms=50, tool_calls=[LOOKUP])
            called = await page.done("send", asked)
            output = {"tool": "lookup", "toolCallId": "call_1", "output": "Sunny."}
            known = await page.done("tool_output", output)
            await page.do("go_on")
            await page.until(lambda state: len(text(state)) > len(text(called)))
        await reloaded.do("show", known["messages"])
        state = await reloaded.done("resume")
    assert text(state) == "".join(f"{n} " for n in range(20))
    assert state["messages"][:2] == known["messages"]


@clients
async def test_reasoning_is_a_part_of_its_own_and_goes_back_to_who_wants_it(
    stack: httpx2.AsyncClient, emulator: Emulator
) -> None:
    deltas = [{"reasoning_content": "hm "}, {"reasoning_content": "so"}, {"content": "Yes."}]
    choices: list[Part]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    raw = [{"id": "c", "model": "m", "choices": [choice]} for choice in choices]
    async with chat(stack) as page:
        state = await page.done("send", prompt(raw=raw))
        assert (text(state, "reasoning"), text(state)) == ("hm so", "Yes.")
        state = await page.done("send", prompt(chunks=1))
        assert state["status"] == "ready"
    _, answer, _ = (await emulator.request(1)).body["messages"]
    expected = {"role": "assistant", "content": "Yes.", "reasoning_content": "hm so"}
    assert answer == expected


@clients
async def test_a_refused_question_is_shown_with_the_field_named(
    stack: httpx2.AsyncClient,
) -> None:
    async with chat(stack, "x" * 256) as page:
        state = await page.done("send", "Hi")
    assert state["status"] == "error"
    assert json.loads(state["error"])["error"].startswith("id: ")
