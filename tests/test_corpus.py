"""What the upstream says reaches every client whole: the corpus by each wire, and directly.

Chat completions, which are the upstream's own wire, have theirs in `test_chat_completions.py`.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from copy import deepcopy
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI

from api.wires.ui_messages import GOES_BACK
from emulator.script import prompt
from relay.client import Client
from relay.events import join_text
from tests.conftest import watch
from tests.corpus import CORPUS
from tests.test_ai_sdk import CLIENTS, Chat, Part, chat, clients
from tests.test_chat_completions import MODEL, question, streamed

ENVELOPE = {"id", "object", "created", "model", "system_fingerprint", "service_tier"}
"""The native wires tell the model once, in `started`, and the rest of this not at all."""
NO_OPTIONS = [name for name, (_, options) in CORPUS.items() if not {"n", "logprobs"} & set(options)]
"""There is one choice and no logprobs in a response, and in a message of the AI SDK."""


@pytest.fixture
async def direct(emulator_url: str) -> AsyncIterator[AsyncOpenAI]:
    """The upstream without chat-relay in between, on the path on which it says most."""
    async with AsyncOpenAI(base_url=f"{emulator_url}/openai/v1", api_key="k") as sdk:
        yield sdk


async def said(direct: AsyncOpenAI, name: str) -> list[Part]:
    """The upstream's chunks."""
    script, options = CORPUS[name]
    # A worker always asks for it.
    chunks = await streamed(direct, script, options | {"stream_options": {"include_usage": True}})
    return [{key: chunk[key] for key in chunk.keys() - ENVELOPE} for chunk in chunks]


def text_of(chunks: Iterable[Part]) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == 0]
    return join_text([choice.get("delta", {}).get("content") or "" for choice in choices])


def rebuilt(told: Iterable[Part]) -> list[Part]:
    """The upstream's chunks by the data of native ones: a text alone is the last whole chunk that
    had a text, with this one in its place."""
    chunks: list[Part] = []
    last: Part = {}
    for data in told:
        text = data.pop("text", None)
        chunk = data or deepcopy(last)
        if text is not None:
            chunk["choices"][0]["delta"]["content"] = text
            last = chunk
        chunks.append(chunk)
    return chunks


def data_of(events: list[httpx2.ServerSentEvent]) -> list[Any]:
    return [event.json() for event in events if event.event == "chunk"]


async def ask(http: httpx2.AsyncClient, name: str, **headers: str) -> httpx2.Response:
    script, options = CORPUS[name]
    options = {key: value for key, value in options.items() if key != "stream_options"}
    asked = {"messages": question(**script), **options}
    return await http.post("/chat", json=asked, headers=headers)


async def begun(http: httpx2.AsyncClient, name: str) -> str:
    return str((await ask(http, name)).json()["stream_id"])


@pytest.mark.parametrize("name", CORPUS)
async def test_events_say_what_the_upstream_says(
    name: str, stack: httpx2.AsyncClient, direct: AsyncOpenAI
) -> None:
    events = await watch(stack, await begun(stack, name))
    assert rebuilt(data_of(events)) == await said(direct, name)


async def test_on_one_connection_each_stream_says_what_its_upstream_says(
    stack: httpx2.AsyncClient, direct: AsyncOpenAI
) -> None:
    ids = {name: await begun(stack, name) for name in CORPUS}
    async with stack.sse("/streams/events", params={"ids": ",".join(ids.values())}) as source:
        told = data_of([event async for event in source if event.data])
    for name, stream_id in ids.items():
        own = (data for data in told if data.get("stream_id") == stream_id)
        chunks = [{key: data[key] for key in data.keys() - {"stream_id"}} for data in own]
        assert rebuilt(chunks) == await said(direct, name), name


@pytest.mark.parametrize("name", CORPUS)
async def test_the_python_client_says_it(
    name: str, stack: httpx2.AsyncClient, direct: AsyncOpenAI
) -> None:
    stream_id = await begun(stack, name)
    with Client(str(stack.base_url)) as client:
        updates = await asyncio.to_thread(lambda: list(client.watch(stream_id)))
    chunks = await said(direct, name)
    assert join_text([update.text for update in updates]) == text_of(chunks)
    assert rebuilt(update.data for update in updates if update.kind == "chunk") == chunks


@pytest.mark.parametrize("name", CORPUS)
async def test_plain_text_is_its_text(
    name: str, stack: httpx2.AsyncClient, direct: AsyncOpenAI
) -> None:
    """Of the first choice; it has no words for a refusal, reasoning and calls."""
    response = await ask(stack, name, accept="text/plain")
    assert response.text == text_of(await said(direct, name))


@pytest.mark.parametrize("name", NO_OPTIONS)
async def test_a_response_says_what_a_chat_completion_says(
    name: str, stack: httpx2.AsyncClient, direct: AsyncOpenAI
) -> None:
    asked = question(**CORPUS[name][0])
    completion = await direct.chat.completions.create(model=MODEL, messages=asked)
    base = f"{stack.base_url}/v1"
    async with AsyncOpenAI(base_url=base, api_key="k", max_retries=0) as sdk:
        waited = await sdk.responses.create(model=MODEL, input=asked)
        stream = await sdk.responses.create(model=MODEL, input=asked, stream=True)
        last: Any = [event async for event in stream][-1]
    assert of_response(waited) == of_response(last.response) == of_completion(completion)


def of_completion(completion: Any) -> Part:
    [choice] = completion.choices
    message = choice.message
    calls = message.tool_calls or []
    return {
        "text": join_text([message.content or ""]),
        "refusal": message.refusal or "",
        "reasoning": getattr(message, "reasoning_content", ""),
        "calls": [(call.id, call.function.name, call.function.arguments) for call in calls],
        "unfinished": {"length": "max_output_tokens", "content_filter": "content_filter"}.get(
            choice.finish_reason
        ),
        "usage": (completion.usage.prompt_tokens, completion.usage.completion_tokens),
    }


def of_response(response: Any) -> Part:
    items = response.output
    parts = [part for item in items if item.type != "function_call" for part in item.content]

    def joined(kind: str, field: str) -> str:
        return join_text([getattr(part, field) for part in parts if part.type == kind])

    calls = [item for item in items if item.type == "function_call"]
    details = response.incomplete_details
    assert response.status == ("incomplete" if details else "completed")
    return {
        "text": joined("output_text", "text"),
        "refusal": joined("refusal", "refusal"),
        "reasoning": joined("reasoning_text", "text"),
        "calls": [(call.call_id, call.name, call.arguments) for call in calls],
        "unfinished": details and details.reason,
        "usage": (response.usage.input_tokens, response.usage.output_tokens),
    }


@asynccontextmanager
async def tutorial(emulator_url: str) -> AsyncIterator[httpx2.AsyncClient]:
    """The backend that useChat has without chat-relay."""
    process = await asyncio.create_subprocess_exec(
        *("node", "direct.mjs", f"{emulator_url}/openai/v1"),
        cwd=CLIENTS,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            yield http
    finally:
        process.kill()
        await process.communicate()


@clients
async def test_usechat_shows_the_message_that_it_shows_without_chat_relay(
    stack: httpx2.AsyncClient, emulator_url: str
) -> None:
    async with tutorial(emulator_url) as direct, chat(stack) as page, chat(direct) as other:
        for name in NO_OPTIONS:
            asked = prompt(**CORPUS[name][0])
            ours, theirs = await asyncio.gather(*(shown(each, asked) for each in (page, other)))
            if name == "empty":
                # Here a message begins with its id, by which it is resumed; there with its text.
                assert (ours.pop("parts"), theirs.pop("parts")) == ([{"type": "step-start"}], [])
            assert ours == theirs, name


async def shown(page: Chat, asked: str) -> Part:
    """Status, how it finished, and the answer but for ids and our note of what goes back."""
    await page.done("show", [])
    state = await page.done("send", asked)
    parts = [part for message in state["messages"][1:] for part in message["parts"]]
    for part in parts:
        part.pop("id", None)
        if part.get("providerMetadata") == GOES_BACK:
            del part["providerMetadata"]
    return {"status": state["status"], "finished": state["finished"], "parts": parts}
