"""Each client that people have, unmodified, with a user who does what docs/integrate.md tells.

One shape for all of them, so that a test is a situation that any of them may come into.
"""

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from playwright.async_api import Browser, Page, Route

from emulator.script import prompt
from relay.client import Client as RelayClient
from relay.events import STARTED, TERMINAL
from tests.chromium import PATIENCE_MS
from tests.test_ai_sdk import Chat, Part, chat, text

MODEL = "demo"
LOST = (openai.APIConnectionError, httpx2.TransportError)
"""How openai-python says that the connection was lost, before the answer began and in it."""


class Shown(NamedTuple):
    """What a user has before the eyes: `ending` is empty, or completed, cancelled or failed."""

    ending: str
    text: str


class Place(NamedTuple):
    """Where a test's clients meet the server, over connections that can be cut."""

    url: str
    chat_id: str
    browser: Browser
    script: bytes
    app: str = ""
    """Of the page, if it is of another origin."""


class Client(ABC):
    """One client and its user."""

    @abstractmethod
    async def ask(self, question: str) -> None:
        """Ask, and watch the answer."""

    @abstractmethod
    async def join(self, other: Any) -> None:
        """Watch the answer that another one asked for."""

    @abstractmethod
    async def until(self, text: str) -> None:
        """Return when this is shown anew."""

    async def come_back(self) -> None:  # noqa: B027 - most do so by themselves
        """After the connection was lost."""

    @abstractmethod
    async def cancel(self) -> None: ...

    @abstractmethod
    async def outcome(self) -> Shown:
        """What is shown at the end."""

    @abstractmethod
    async def history(self) -> list[Shown]:
        """All that was shown, each time something changed."""


# In Python. What is written once for a sync and an async SDK runs its calls by these two.


async def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    result = await asyncio.to_thread(function, *args, **options)
    return await result if isinstance(result, Awaitable) else result


async def each(stream: Any) -> AsyncIterator[Any]:
    if hasattr(stream, "__aiter__"):
        async for item in stream:
            yield item
    else:
        iterator = iter(stream)
        while (item := await asyncio.to_thread(next, iterator, None)) is not None:
            yield item


class InPython(Client):
    """It is read as far as the test wants to see."""

    def __init__(self) -> None:
        self.states: AsyncIterator[Shown]
        self._history: list[Shown] = []

    async def until(self, text: str) -> None:
        async for shown in self.states:
            self._history.append(shown)
            if text in shown.text:
                return
        pytest.fail(f"It ended without {text!r}: {self._history[-1:]}")

    async def outcome(self) -> Shown:
        self._history += [shown async for shown in self.states]
        return self._history[-1]

    async def history(self) -> list[Shown]:
        return self._history

    @abstractmethod
    async def aclose(self) -> None: ...


class Relay(InPython):
    """relay.client."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.client = RelayClient(url)

    async def aclose(self) -> None:
        self.client.__exit__(None, None, None)

    async def ask(self, question: str) -> None:
        asked = [{"role": "user", "content": question}]
        self.stream_id = await call(self.client.ask, asked)
        self.states = self.natively()

    async def join(self, other: Any) -> None:
        self.stream_id = other.stream_id
        self.states = self.natively()

    async def cancel(self) -> None:
        await call(self.client.cancel, self.stream_id)

    async def natively(self) -> AsyncIterator[Shown]:
        text = ""
        async for update in each(self.client.watch(self.stream_id)):
            text = "" if update.kind == STARTED else text + update.text
            yield Shown(update.kind if update.kind in TERMINAL else "", text)


class ChatCompletions(Relay):
    """openai-python's. All that it has no words for its user does natively."""

    def __init__(self, url: str, sdk: type[AsyncOpenAI | OpenAI]) -> None:
        super().__init__(url)
        self.sdk = sdk(base_url=f"{url}/v1", api_key="k", max_retries=0)

    async def aclose(self) -> None:
        await super().aclose()
        await call(self.sdk.close)

    async def ask(self, question: str) -> None:
        create = self.sdk.chat.completions.with_raw_response.create
        asked = [{"role": "user", "content": question}]
        try:
            raw = await call(create, model=MODEL, messages=asked, stream=True)
        except openai.APIStatusError:
            self.states = self._refused()
        else:
            self.stream_id = raw.headers["x-stream-id"]
            self.states = self._stream(raw.parse())

    async def _refused(self) -> AsyncIterator[Shown]:
        yield Shown("failed", "")

    async def _stream(self, stream: Any) -> AsyncIterator[Shown]:
        text = ""
        try:
            async for chunk in each(stream):
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                yield Shown("", text)
            yield Shown("completed", text)
            return
        except LOST:
            pass
        except openai.APIError as told:
            if told.code != "interrupted":
                yield Shown("cancelled" if told.code == "cancelled" else "failed", text)
                return
        async for shown in self.natively():
            yield shown


class Responses(InPython):
    """openai-python's, in the background: the response is found again by its id."""

    def __init__(self, url: str, sdk: type[AsyncOpenAI | OpenAI]) -> None:
        super().__init__()
        self.sdk = sdk(base_url=f"{url}/v1", api_key="k", max_retries=0)
        self.responses = self.sdk.responses

    async def aclose(self) -> None:
        await call(self.sdk.close)

    async def ask(self, question: str) -> None:
        asked = {"model": MODEL, "input": question, "background": True, "stream": True}
        self.states = self._stream(await call(self.responses.create, **asked))

    async def join(self, other: Any) -> None:
        self.states = self._stream(await call(self.responses.retrieve, other.id, stream=True))

    async def cancel(self) -> None:
        await call(self.responses.cancel, self.id)

    async def _stream(self, stream: Any) -> AsyncIterator[Shown]:
        text, last = "", -1
        while True:
            try:
                async for event in each(stream):
                    last = event.sequence_number
                    match event.type:
                        case "response.created":
                            self.id = event.response.id
                        case "response.output_item.added":
                            text = ""
                        case "response.output_text.delta":
                            text += event.delta
                        case "response.completed" | "response.failed" | "response.incomplete":
                            yield Shown(event.response.status, text)
                            return
                    yield Shown("", text)
            except LOST:
                find = self.responses.retrieve
                stream = await call(find, self.id, stream=True, starting_after=last)


class InNode(Client):
    """The Chat behind useChat."""

    def __init__(self, page: Chat, stop: Callable[[], Awaitable[Any]]) -> None:
        self.page = page
        self._stop = stop
        self._history: list[Shown] = []

    async def ask(self, question: str) -> None:
        await self._do("send", question)

    async def join(self, other: Any) -> None:
        await self._do("resume")

    async def until(self, text: str) -> None:
        await self._until(lambda _, shown: text in shown.text)

    async def come_back(self) -> None:
        ending, text = await self.outcome()
        assert ending == "failed"
        await self._do("resume")
        await self.until(text)

    async def cancel(self) -> None:
        await self._stop()

    async def outcome(self) -> Shown:
        return await self._until(lambda state, _: state.get("done") == self.doing)

    async def history(self) -> list[Shown]:
        return self._history

    async def _do(self, command: str, value: Any = None) -> None:
        self.doing = command
        await self.page.do(command, value)

    async def _until(self, holds: Callable[[Part, Shown], bool]) -> Shown:
        def seen(state: Part) -> bool:
            self._history.append(self._shown(state))
            return holds(state, self._history[-1])

        await self.page.until(seen)
        return self._history[-1]

    def _shown(self, state: Part) -> Shown:
        ended = "completed" if state.get("finished", {}).get("finishReason") else "cancelled"
        ending = "failed" if state["status"] == "error" else ended
        return Shown(ending if "done" in state else "", text(state))


# In Chromium. `shown` on the page is what `Client.history` tells.

SHOWN = """
globalThis.shown = [["", ""]];
globalThis.show = (ending, text) => shown.push([ending, text]);
"""
ASK = """async (question) => {
    const body = JSON.stringify({messages: [{role: "user", content: question}]});
    const headers = {"content-type": "application/json"};
    const response = await fetch("/chat", {method: "POST", headers, body});
    return (await response.json()).stream_id;
}"""
EVENT_SOURCE = """([url, mine]) => {
    const source = new EventSource(url);
    let text = "";
    const on = (kind, take) => source.addEventListener(kind, ({data}) => {
        const value = JSON.parse(data);
        if ((value.stream_id ?? mine) === mine) take(value);
    });
    on("started", () => show("", text = ""));
    on("chunk", (chunk) => show("", text += chunk.text ?? ""));
    for (const kind of ["completed", "cancelled", "failed"]) on(kind, () => show(kind, text));
}"""
WATCH = """async ([url]) => {
    const { watch } = await import("/relay.js");
    let text = "";
    watch(url, {
        onReset: () => show("", text = ""),
        onText: (piece) => show("", text += piece),
        onDone: ({kind}) => show(kind, text),
    });
}"""
SCREEN = """
const ending = (status) => ({
    stop: "completed", "tool-calls": "completed", stopped: "cancelled", error: "failed",
})[status] ?? "";
new MutationObserver(() => {
    const texts = [...document.querySelectorAll("article.assistant p")];
    const status = document.querySelector("[role=status]")?.textContent;
    show(ending(status), texts.map(({textContent}) => textContent).join(""));
}).observe(document, {childList: true, characterData: true, subtree: true});
"""


class InChromium(Client):
    def __init__(self, page: Page, place: Place) -> None:
        self.page = page
        self.place = place

    async def until(self, text: str) -> None:
        await self.page.wait_for_function("text => shown.at(-1)[1].includes(text)", arg=text)

    async def outcome(self) -> Shown:
        await self.page.wait_for_function("shown.at(-1)[0]")
        return (await self.history())[-1]

    async def history(self) -> list[Shown]:
        return [Shown(*each) for each in await self.page.evaluate("shown")]


class Natively(InChromium):
    """A script on a page of the same server, which watches by `watch`."""

    watch = EVENT_SOURCE

    async def ask(self, question: str) -> None:
        await self.page.goto(f"{self.place.url}/healthz")
        self.stream_id = await self.page.evaluate(ASK, question)
        await self._watch()

    async def join(self, other: Any) -> None:
        await self.page.goto(f"{self.place.url}/healthz")
        self.stream_id = other.stream_id
        await self._watch()

    async def cancel(self) -> None:
        path = f"/streams/{self.stream_id}/cancel"
        await self.page.evaluate("path => fetch(path, {method: 'POST'}).then(() => {})", path)

    async def _watch(self) -> None:
        await self.page.evaluate(self.watch, [await self._events(), self.stream_id])

    async def _events(self) -> str:
        return f"/streams/{self.stream_id}/events"


class Several(Natively):
    """It watches another stream on the same connection."""

    async def _events(self) -> str:
        other = await self.page.evaluate(ASK, prompt(chunks=3))
        return f"/streams/events?ids={other},{self.stream_id}"


class ByModule(Natively):
    watch = WATCH


class InReact(InChromium):
    """`useChat({id, resume: true})`, rendered: its user reads, types, reloads and presses Stop."""

    async def ask(self, question: str) -> None:
        await self._open()
        field = self.page.get_by_label("Your question")
        await field.fill(question)
        await field.press("Enter")

    async def join(self, other: Any) -> None:
        await self._open()

    async def come_back(self) -> None:
        ending, text = await self.outcome()
        assert ending == "failed"
        await self.reload()
        await self.until(text)

    async def reload(self) -> None:
        """Return when it is resumed: what was said before, the page has kept."""
        await self.page.reload()
        await self.page.get_by_role("status").get_by_text("streaming").wait_for()

    async def cancel(self) -> None:
        await self.page.get_by_role("button", name="Stop").click()

    async def _open(self) -> None:
        url, app = self.place.url, self.place.app
        page = f"{app}/page?{url}" if app else f"{url}/page"
        await self.page.goto(f"{page}#{self.place.chat_id}")


PAGE = b'<!doctype html><body></body><script type="module" src="/page.js"></script>'


async def serve(route: Route, script: bytes) -> None:
    """What is the application's own, as where one proxy stands before it and the relay."""
    if route.request.resource_type == "script":
        await route.fulfill(content_type="text/javascript; charset=utf-8", body=script)
    else:
        await route.fulfill(content_type="text/html", body=PAGE)


@asynccontextmanager
async def in_node(place: Place) -> AsyncIterator[Client]:
    async with httpx2.AsyncClient(base_url=place.url) as http, chat(http, place.chat_id) as page:
        yield InNode(page, lambda: http.post(f"/api/chat/{place.chat_id}/stop"))


InPage = TypeVar("InPage", bound=InChromium)


@asynccontextmanager
async def in_chromium(kind: type[InPage], place: Place) -> AsyncIterator[InPage]:
    """No script of the page may die."""
    async with await place.browser.new_context() as context:
        errors: list[Any] = []
        context.on("weberror", lambda web_error: errors.append(web_error.error))
        await context.add_init_script(SHOWN + (SCREEN if kind is InReact else ""))
        own = re.compile(r"/page(\.js)?(\?.*)?$")
        await context.route(own, lambda route: serve(route, place.script))
        page = await context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        yield kind(page, place)
        assert errors == []


Opening = Callable[[Place], AbstractAsyncContextManager[Client]]
DRIVERS: dict[str, Opening] = {
    "relay.client": lambda at: aclosing(Relay(at.url)),
    "chat completions, async": lambda at: aclosing(ChatCompletions(at.url, AsyncOpenAI)),
    "chat completions, sync": lambda at: aclosing(ChatCompletions(at.url, OpenAI)),
    "responses, async": lambda at: aclosing(Responses(at.url, AsyncOpenAI)),
    "responses, sync": lambda at: aclosing(Responses(at.url, OpenAI)),
    "Chat in Node": in_node,
    "useChat in React": partial(in_chromium, InReact),
    "EventSource": partial(in_chromium, Natively),
    "EventSource of several": partial(in_chromium, Several),
    "relay.js": partial(in_chromium, ByModule),
}
