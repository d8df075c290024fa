"""The JavaScript client, run by Node: on the real stack, and on servers that lie (`tests/js`)."""

import asyncio
import json
import os
import shutil
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from chaos.proxy import Proxy
from emulator.app import Emulator
from relay.settings import Settings
from tests.conftest import ROOT, ask, changed, running_api, running_worker
from worker.claiming import ClaimingWorker

JS = Path(__file__).parent / "js"
AROUND_THE_GUIDE = """
const answer = { textContent: "" };
const note = { textContent: "" };
const controller = new AbortController();
process.on("exit", () => console.log(JSON.stringify([answer.textContent, note.textContent])));
"""
SLOW = {"chunks": 100, "delay_ms": 40}
"""Four seconds: time enough to do something in the middle."""
SLOW_TEXT = "".join(f"{number} " for number in range(100))
Told = tuple[str, Any]


@pytest.fixture
def node() -> str:
    found = shutil.which("node")
    if found is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("There is no node here.")
    return str(found)


class Journal:
    """What a Node that watches has told so far, as (callback, argument)."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.told: list[Told] = []

    async def until(self, callback: str, argument: object = ...) -> Any:
        """The argument of the next such call."""
        async for told in self._lines():
            if told[0] == callback and argument in (..., told[1]):
                return told[1]
        pytest.fail(f"It ended without {callback}: {self.told[-3:]}")

    async def outcome(self) -> dict[str, Any]:
        """Of the watching, which is over and has told nothing after it."""
        done = await self.until("done")
        assert [told async for told in self._lines()] == []
        assert await self._process.wait() == 0
        return dict(done)

    async def _lines(self) -> AsyncIterator[Told]:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            callback, argument = json.loads(line)
            self.told.append((callback, argument))
            yield callback, argument

    def all(self, callback: str) -> list[Any]:
        return [argument for name, argument in self.told if name == callback]

    @property
    def screen(self) -> str:
        text = ""
        for callback, argument in self.told:
            text = "" if callback == "reset" else text + argument if callback == "text" else text
        return text

    @property
    def ids(self) -> list[str]:
        return [event["id"] for event in self.all("event")]


@asynccontextmanager
async def watching(
    node: str, http: httpx2.AsyncClient, stream_id: str, port: int | None = None
) -> AsyncIterator[Journal]:
    """Node watches a stream, at another port than the API's if one is given."""
    url = str(http.base_url.copy_with(port=port or http.base_url.port, path="/"))
    process = await asyncio.create_subprocess_exec(
        node,
        str(JS / "journal.mjs"),
        f"{url}streams/{stream_id}/events",
        env=environment(http),
        stdout=PIPE,
        limit=1 << 20,
    )
    try:
        async with asyncio.timeout(40):
            yield Journal(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def environment(http: httpx2.AsyncClient) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "RELAY_JS": str(http.base_url.join("/relay.js"))}


async def test_the_module_is_served_as_a_module_and_asked_for_anew(
    api: httpx2.AsyncClient,
) -> None:
    response = await api.get("/relay.js")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/javascript; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["etag"]


@pytest.mark.parametrize("name", ["parser.test.mjs", "watch.test.mjs"])
async def test_the_promises_that_need_no_stack_hold(
    api: httpx2.AsyncClient, node: str, name: str
) -> None:
    command = [node, "--test", "--test-reporter=tap", str(JS / name)]
    process = await asyncio.create_subprocess_exec(*command, env=environment(api), stdout=PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert b"\n# pass 0\n" not in output


@pytest.mark.parametrize(
    ("stream_id", "then", "shown"),
    [
        (None, "", ["Hello", ""]),
        (None, "controller.abort();", ["", ""]),
        ("x", "", ["", "There is no stream with this id: check it."]),
        # A path that refuses to be watched.
        ("x/cancel?", "", ["", "See /docs for the methods of this path."]),
    ],
)
async def test_the_javascript_of_the_guide_shows_the_answer_or_why_there_is_none(
    stack: httpx2.AsyncClient, node: str, stream_id: str | None, then: str, shown: list[str]
) -> None:
    guide = (ROOT / "docs" / "integrate.md").read_text()
    code = guide.split("```js\n")[1].split("```")[0]
    code = code.replace("http://127.0.0.1:8000/relay.js", (JS / "relay.mjs").as_uri())
    code = code.replace("http://127.0.0.1:8000", str(stack.base_url.join("/"))[:-1])
    code = code.replace("${id}", stream_id or await ask(stack, text=["Hel", "lo"]))
    process = await asyncio.create_subprocess_exec(
        *(node, "--input-type=module", "--eval", AROUND_THE_GUIDE + code + then),
        env=environment(stack),
        stdout=PIPE,
        stderr=STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert json.loads(output) == shown


async def test_a_whole_answer_is_told_piece_by_piece(stack: httpx2.AsyncClient, node: str) -> None:
    async with watching(node, stack, await ask(stack, **SLOW)) as journal:
        outcome = await journal.outcome()
    assert (outcome["kind"], outcome["finish_reason"]) == ("completed", "stop")
    assert journal.all("reset") == [1]
    assert journal.all("text") == [f"{number} " for number in range(100)]
    assert outcome["chunks"] == [e["event"] for e in journal.all("event")].count("chunk")


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ({"text": ["See: "], "surrogate": True}, "See: \N{GRINNING FACE}"),
        ({"refusal": "I would rather not."}, ""),
        ({"tool_calls": [{"name": "f", "arguments": {"x": 1}}]}, ""),
        ({"empty": True}, ""),
    ],
)
async def test_count_and_hash_hold_for_every_kind_of_answer(
    stack: httpx2.AsyncClient, node: str, script: dict[str, object], text: str
) -> None:
    async with watching(node, stack, await ask(stack, **script)) as journal:
        assert (await journal.outcome())["kind"] == "completed"
    # The halves of an emoji come from JSON as two strings, and Python does not join them.
    assert journal.screen.encode("utf-16", "surrogatepass").decode("utf-16") == text
    assert journal.all("reset") == [1]


async def test_a_second_viewer_midway_is_told_the_same(
    stack: httpx2.AsyncClient, node: str, emulator: Emulator
) -> None:
    stream_id = await ask(stack, **SLOW)
    async with watching(node, stack, stream_id) as first:
        await first.until("text", "20 ")
        async with watching(node, stack, stream_id) as second:
            await second.until("text", "10 ")
            assert (await emulator.request(0)).outcome is None
            assert await second.outcome() == await first.outcome()
    assert first.screen == second.screen == SLOW_TEXT
    assert first.ids[-len(second.ids) :] == second.ids


async def test_a_restart_of_the_api_repeats_nothing_and_loses_nothing(
    settings: Settings, worker: ClaimingWorker, node: str
) -> None:
    async with AsyncExitStack() as viewer:
        async with running_api(settings) as http:
            port = http.base_url.port
            stream_id = await ask(http, **SLOW)
            journal = await viewer.enter_async_context(watching(node, http, stream_id))
            await journal.until("text", "9 ")
        await journal.until("lost")
        async with running_api(changed(settings, port=port)):
            assert (await journal.outcome())["kind"] == "completed"
    assert journal.all("text") == [f"{number} " for number in range(100)]
    assert journal.all("reset") == [1]
    assert len(set(journal.ids)) == len(journal.ids)


async def test_cut_connections_repeat_nothing_and_lose_nothing(
    stack: httpx2.AsyncClient, node: str
) -> None:
    assert stack.base_url.port is not None
    async with Proxy(stack.base_url.port) as proxy:
        stream_id = await ask(stack, chunks=100, delay_ms=40)
        async with watching(node, stack, stream_id, proxy.port) as journal:
            for _ in range(2):
                await journal.until("text")
                proxy.cut()
                await journal.until("lost")
                proxy.heal()
            assert (await journal.outcome())["kind"] == "completed"
    assert journal.all("text") == [f"{number} " for number in range(100)]
    assert journal.all("reset") == [1]
    assert len(journal.all("open")) == 3


async def test_a_cancel_is_told_and_keeps_what_came(stack: httpx2.AsyncClient, node: str) -> None:
    stream_id = await ask(stack, chunks=5, end="stall")
    async with watching(node, stack, stream_id) as journal:
        await journal.until("text", "4 ")
        await stack.post(f"/streams/{stream_id}/cancel")
        assert (await journal.outcome())["kind"] == "cancelled"
    assert journal.screen == "0 1 2 3 4 "


async def test_an_error_of_the_upstream_is_told_with_its_code(
    stack: httpx2.AsyncClient, node: str
) -> None:
    stream_id = await ask(stack, chunks=5, after=3, end="eof")
    async with watching(node, stack, stream_id) as journal:
        outcome = await journal.outcome()
    assert (outcome["kind"], outcome["code"]) == ("failed", "upstream_incomplete")
    assert journal.screen == "0 1 2 "


async def test_an_answer_that_another_worker_begins_anew_is_cleared_and_then_whole(
    api: httpx2.AsyncClient, settings: Settings, node: str
) -> None:
    stream_id = await ask(api, chunks=60, delay_ms=40, label=True)
    async with watching(node, api, stream_id) as journal:
        await journal.until("open")
        async with running_worker(settings):
            await journal.until("text", "1.9 ")
        async with running_worker(settings):
            assert (await journal.outcome())["kind"] == "completed"
    assert journal.all("reset") == [1, 2]
    assert journal.screen == "".join(f"2.{number} " for number in range(60))


async def test_an_erased_stream_is_gone_before_and_while_it_is_watched(
    stack: httpx2.AsyncClient, node: str
) -> None:
    stream_id = await ask(stack, chunks=5, end="stall")
    async with watching(node, stack, stream_id) as journal:
        await journal.until("text", "4 ")
        await stack.delete(f"/streams/{stream_id}")
        during = await journal.outcome()
    async with watching(node, stack, stream_id) as journal:
        later = await journal.outcome()
    assert (during["kind"], during["code"]) == ("gone", "stream_gone")
    assert (later["kind"], later["code"]) == ("gone", "stream_gone")
    assert later["message"] == during["message"]
