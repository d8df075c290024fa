"""Every client that people have in every situation, on a stack of processes."""

import asyncio
import itertools
import json
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from chaos.proxy import Proxy
from chaos.stack import SETTINGS, Stack
from emulator.script import prompt
from tests.conftest import until
from tests.corpus import LOOKUP
from tests.test_ai_sdk import CLIENTS, Part

pytest.importorskip("playwright", reason="the browser group is not installed")
from playwright.async_api import Browser

from tests.chromium import chromium
from tests.drivers import DRIVERS, MODEL, Client, InReact, Place, in_chromium

pytestmark = [pytest.mark.clients, pytest.mark.asyncio(loop_scope="module")]
fixture = partial(pytest_asyncio.fixture, loop_scope="module")
module_fixture = fixture(scope="module")

HALF = "".join(f"{number} " for number in range(10))
WHOLE = "".join(f"{number} " for number in range(20))
APP = "http://localhost:5173"
"""Where the pages of another origin are; nothing listens there."""
Another = Callable[[], Awaitable[Client]]


@module_fixture
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Two APIs and one worker; whichever is ended is started again."""
    settings = {
        **SETTINGS,
        "RELAY_LEASE_SECONDS": "1.5",
        "RELAY_DRAIN_SECONDS": "0",
        "RELAY_CORS_ORIGINS": APP,
    }
    stack = Stack(tmp_path_factory.mktemp("stack"), apis=2, workers=1, settings=settings)
    async with httpx2.AsyncClient() as http, stack.running(http):
        yield stack
    assert stack.complaints == []


def port(url: str) -> int:
    return int(url.rpartition(":")[2])


@fixture()
async def front(stack: Stack) -> AsyncIterator[Proxy]:
    """Before the first API, until a test turns it to the other one."""
    await stack.apis[0].ready()
    async with Proxy(port(stack.urls[0])) as front:
        yield front


@module_fixture
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def script() -> bytes:
    """The page as its bundler makes it, with React's checks of development in it."""
    bundle = ["node_modules/.bin/esbuild", "page.jsx", "--bundle", "--jsx=automatic"]
    return subprocess.run(bundle, cwd=CLIENTS, capture_output=True, check=True).stdout


@fixture()
async def place(
    front: Proxy, browser: Browser, script: bytes, request: pytest.FixtureRequest
) -> Place:
    chat_id = re.sub(r"\W+", "-", request.node.name)
    return Place(f"http://127.0.0.1:{front.port}", chat_id, browser, script)


class Upstream:
    """What a test has to do with the model: it says half of an answer, and the rest when told."""

    def __init__(self, http: httpx2.AsyncClient, key: str) -> None:
        self._http = http
        self._key = key

    def question(self, **more: Any) -> str:
        return prompt(chunks=20, hold_after=10, key=self._key, **more)

    async def say_the_rest(self) -> None:
        await self._http.post(f"/emulator/release/{self._key}")

    async def requests(self) -> list[Part]:
        journal = (await self._http.get("/emulator/requests")).json()
        return [record for record in journal if record["key"] == self._key]

    async def has_lost(self, count: int) -> None:
        """Return when so many of the requests have been left by who asked."""

        async def lost() -> bool:
            outcomes = [record["outcome"] for record in await self.requests()]
            return outcomes.count("disconnected") == count

        await until(lost)


@fixture()
async def upstream(stack: Stack, place: Place) -> AsyncIterator[Upstream]:
    async with httpx2.AsyncClient(base_url=stack.upstream_url) as http:
        yield Upstream(http, place.chat_id)


@fixture(params=DRIVERS)
async def another(request: pytest.FixtureRequest, place: Place) -> AsyncIterator[Another]:
    """Opens one more of the client that the test is about."""
    opening = DRIVERS[request.param]
    async with AsyncExitStack() as leaving:
        yield lambda: leaving.enter_async_context(opening(place))


@fixture()
async def client(another: Another) -> Client:
    return await another()


async def test_an_answer_grows_until_it_is_whole(client: Client) -> None:
    await client.ask(prompt(chunks=20, delay_ms=20))
    assert await client.outcome() == ("completed", WHOLE)
    texts = [shown.text for shown in await client.history()]
    assert len(set(texts)) > 5
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))


async def test_an_answer_whose_connection_is_lost_in_the_middle_becomes_whole_all_the_same(
    client: Client, front: Proxy, upstream: Upstream
) -> None:
    await client.ask(upstream.question())
    await client.until("9 ")
    front.cut()
    front.heal()
    await client.come_back()
    await upstream.say_the_rest()
    assert await client.outcome() == ("completed", WHOLE)
    assert all(WHOLE.startswith(shown.text) for shown in await client.history())


async def test_an_api_that_is_replaced_in_the_middle_lets_its_clients_go_on_with_another(
    client: Client, front: Proxy, stack: Stack, upstream: Upstream
) -> None:
    await client.ask(upstream.question())
    await client.until("9 ")
    front.target = port(stack.urls[1])
    await stack.apis[0].terminate()
    await client.come_back()
    await upstream.say_the_rest()
    assert await client.outcome() == ("completed", WHOLE)
    assert all(WHOLE.startswith(shown.text) for shown in await client.history())


async def test_a_second_viewer_at_another_api_has_what_was_said_and_then_the_same(
    client: Client, another: Another, front: Proxy, stack: Stack, upstream: Upstream
) -> None:
    await client.ask(upstream.question())
    await client.until("9 ")
    front.target = port(stack.urls[1])
    second = await another()
    await second.join(client)
    await second.until("9 ")
    await upstream.say_the_rest()
    one, other = await asyncio.gather(client.outcome(), second.outcome())
    assert one == other == ("completed", WHOLE)


async def test_a_cancel_reaches_the_upstream_and_what_was_said_stays(
    client: Client, upstream: Upstream
) -> None:
    await client.ask(upstream.question())
    await client.until("9 ")
    await client.cancel()
    assert await client.outcome() == ("cancelled", HALF)
    await upstream.has_lost(1)


@pytest.mark.parametrize(
    ("asked", "said"), [({"status": 401}, ""), ({"chunks": 10, "end": "eof"}, HALF)]
)
async def test_an_error_of_the_upstream_is_told_as_one(
    client: Client, asked: dict[str, Any], said: str
) -> None:
    await client.ask(prompt(**asked))
    assert await client.outcome() == ("failed", said)


async def test_a_worker_killed_in_the_middle_is_replaced_and_its_text_with_it(
    client: Client, stack: Stack, upstream: Upstream
) -> None:
    await client.ask(upstream.question(label=True))
    await client.until(".9 ")
    await stack.workers[0].kill()
    await upstream.has_lost(1)
    await upstream.say_the_rest()
    ending, text = await client.outcome()
    _, second = await upstream.requests()
    assert (ending, text) == ("completed", "".join(f"{second['number']}.{n} " for n in range(20)))
    for shown in await client.history():
        assert len({word.partition(".")[0] for word in shown.text.split()}) <= 1


async def test_who_waits_for_the_whole_answer_does_not_notice_that_its_worker_is_killed(
    place: Place, stack: Stack, upstream: Upstream
) -> None:
    async def both() -> tuple[str | None, str]:
        asked: Any = [{"role": "user", "content": upstream.question()}]
        async with AsyncOpenAI(base_url=f"{place.url}/v1", api_key="k", max_retries=0) as sdk:
            completion, response = await asyncio.gather(
                sdk.chat.completions.create(model=MODEL, messages=asked),
                sdk.responses.create(model=MODEL, input=asked),
            )
        return completion.choices[0].message.content, response.output_text

    async def begun() -> bool:
        return [record["sent"] for record in await upstream.requests()] == [10, 10]

    waiting = asyncio.create_task(both())
    await until(begun)
    await stack.workers[0].kill()
    await upstream.has_lost(2)
    await upstream.say_the_rest()
    assert await waiting == (WHOLE, WHOLE)
    assert len(await upstream.requests()) == 4


async def test_a_page_reloaded_in_the_middle_goes_on_with_every_kind_of_part(
    place: Place, upstream: Upstream
) -> None:
    asked = upstream.question(reasoning="Hm. ", tool_calls=[LOOKUP])
    async with in_chromium(InReact, place) as client:
        await client.ask(asked)
        await client.until("8 ")
        await client.reload()
        await client.until("8 ")
        await upstream.say_the_rest()
        assert await client.outcome() == ("completed", WHOLE)
        page = client.page
        assert await page.locator("article.user").all_text_contents() == [asked]
        assert await page.locator("details").all_text_contents() == ["Hm. "]
        call = page.get_by_title("tool-lookup input-available")
        assert json.loads(await call.text_content() or "") == LOOKUP["arguments"]


async def test_a_page_of_another_origin_asks_resumes_and_stops(
    place: Place, upstream: Upstream
) -> None:
    async with in_chromium(InReact, place._replace(app=APP)) as client:
        # Chromium takes the page to be of the internet, and asks before it may come to loopback.
        await client.page.context.grant_permissions(["local-network-access"])
        await client.ask(upstream.question())
        await client.until("9 ")
        await client.reload()
        await client.until("9 ")
        await client.cancel()
        assert await client.outcome() == ("cancelled", HALF)
