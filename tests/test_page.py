"""The page, as a person meets it: a real Chromium on the real stack."""

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator
from typing import Literal

import httpx2
import pytest

from emulator.app import Emulator
from emulator.script import prompt
from relay.settings import Settings
from tests.conftest import ask, changed, running_api, running_worker
from worker.claiming import ClaimingWorker

pytest.importorskip("playwright", reason="the browser group is not installed")
from playwright.async_api import (
    Browser,
    Error,
    Locator,
    Page,
    Request,
    Route,
    TimeoutError,  # noqa: A004
    ViewportSize,
    expect,
)

from tests.chromium import PATIENCE_MS, chromium

pytestmark = pytest.mark.browser

QUIET_MS = 3000
"""Longer than an EventSource (1 s) and the page itself (2 s) wait before they come back."""
SLOW = {"chunks": 150, "delay_ms": 40}
"""Six seconds: time enough to do something in the middle."""
SLOW_TEXT = "".join(f"{number} " for number in range(150))
STREAM = re.compile("#([a-z2-7]{32})$")
RECORD = """() => {
    window.seen = [];
    const answer = document.querySelector("#answer");
    const note = () => seen.push(answer.textContent);
    new MutationObserver(note).observe(answer, {
        childList: true, characterData: true, subtree: true,
    });
}"""
EVENT_SOURCE = """(url) => {
    window.told = [];
    window.source = new EventSource(url);
    for (const kind of ["queued", "started", "chunk", "completed", "failed", "cancelled"])
        source.addEventListener(kind, (e) => told.push([kind, e.lastEventId, e.data]));
}"""


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)
    async with chromium() as browser:
        yield browser


@pytest.fixture
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A page on which no script may die."""
    context = await browser.new_context()
    errors: list[Error] = []
    context.on("weberror", lambda web_error: errors.append(web_error.error))
    page = await context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    yield page
    await context.close()
    assert errors == []


def address(http: httpx2.AsyncClient, stream_id: str = "") -> str:
    return f"{http.base_url}#{stream_id}" if stream_id else str(http.base_url)


def answer_on(page: Page) -> Locator:
    return page.locator("#answer")


def status_on(page: Page) -> Locator:
    return page.get_by_role("status")


def stop_on(page: Page) -> Locator:
    return page.get_by_role("button", name="Stop")


async def type_question(page: Page, text: str) -> None:
    await page.get_by_label("Your question").fill(text)


async def ask_on(page: Page, http: httpx2.AsyncClient, **script: object) -> str:
    """Ask as a person does; the id of the stream that then stands in the address."""
    await page.goto(address(http))
    await type_question(page, prompt(**script))
    await page.get_by_role("button", name="Ask").click()
    await expect(page).to_have_url(STREAM)
    found = STREAM.search(page.url)
    assert found is not None
    return found[1]


async def shows_exactly(page: Page, text: str) -> None:
    await expect(answer_on(page)).to_have_js_property("textContent", text)


async def logged_text(http: httpx2.AsyncClient, stream_id: str) -> str:
    return str((await http.get(f"/streams/{stream_id}")).json()["text"])


def requests_of(page: Page, ending: str) -> list[Request]:
    """Fills with the requests of the page whose path ends so."""
    seen: list[Request] = []

    def note(request: Request) -> None:
        if request.url.endswith(ending):
            seen.append(request)

    page.on("request", note)
    return seen


async def hold(page: Page, pattern: str) -> asyncio.Queue[Route]:
    """The requests that match stop here until the test lets them go on."""
    held: asyncio.Queue[Route] = asyncio.Queue()

    def keep(route: Route) -> None:
        held.put_nowait(route)

    await page.route(pattern, keep)
    return held


async def asks_nothing_more(page: Page) -> None:
    with pytest.raises(TimeoutError):
        await page.wait_for_event("request", timeout=QUIET_MS)


async def is_midway(emulator: Emulator) -> None:
    """What the test does now, it does while the upstream is still talking."""
    assert (await emulator.request(0)).outcome is None


async def test_a_person_types_a_question_and_watches_the_answer_grow(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    await page.goto(address(stack))
    await page.evaluate(RECORD)
    await type_question(page, prompt(chunks=20, delay_ms=40))
    await page.get_by_role("button", name="Ask").click()
    await expect(status_on(page)).to_have_text("Complete.")
    seen = [text for text in await page.evaluate("seen") if text]
    assert seen[-1] == "".join(f"{number} " for number in range(20))
    assert len(set(seen)) > 5
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))


async def test_a_server_that_does_not_answer_is_told_and_asked_again(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    """As where six windows have all connections that a browser makes to it."""
    await page.add_init_script(
        "const { timeout } = AbortSignal; AbortSignal.timeout = timeout.bind(AbortSignal, 100)"
    )
    held = await hold(page, "**/chat")
    await page.goto(address(stack))
    await type_question(page, prompt(text=["Hello"]))
    await page.keyboard.press("Enter")
    await held.get()
    await expect(page.get_by_text("close other windows")).to_be_visible()
    await expect(page.get_by_role("button", name="Ask")).to_be_enabled()


async def test_the_page_lives_on_while_a_very_long_answer_comes(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    pieces = 40_000
    await page.add_init_script("""
        let writes = (globalThis.writes = [0]);
        const { appendData } = CharacterData.prototype;
        CharacterData.prototype.appendData = function (text) {
          writes[0] += 1;
          appendData.call(this, text);
        };
    """)
    await ask_on(page, stack, chunks=pieces)
    await page.evaluate("""
        new MutationObserver(([{ target }]) => {
          globalThis.last = [target.textContent, document.getElementById("answer").textContent];
        }).observe(document.getElementById("status"), { childList: true })
    """)
    await expect(status_on(page)).to_have_text("Complete.", timeout=60_000)
    whole = "".join(f"{number} " for number in range(pieces))
    assert await page.evaluate("last") == ["Complete.", whole]
    assert await page.evaluate("writes[0]") < pieces / 10


async def test_enter_sends_the_question(stack: httpx2.AsyncClient, page: Page) -> None:
    await page.goto(address(stack))
    await type_question(page, prompt(text=["Hello"]))
    await page.keyboard.press("Enter")
    await shows_exactly(page, "Hello")


async def test_shift_and_enter_begin_a_line_and_send_nothing(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    await page.goto(address(stack))
    asked = requests_of(page, "/chat")
    await type_question(page, "One")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("Two")
    await expect(page.get_by_label("Your question")).to_have_value("One\nTwo")
    await page.keyboard.press("Enter")
    await expect(page).to_have_url(STREAM)
    [request] = asked
    assert request.post_data_json == {"messages": [{"role": "user", "content": "One\nTwo"}]}


async def test_enter_pressed_twice_asks_once(stack: httpx2.AsyncClient, page: Page) -> None:
    held = await hold(page, "**/chat")
    await page.goto(address(stack))
    await type_question(page, prompt(text=["Once"]))
    await page.keyboard.press("Enter")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("button", name="Ask")).to_be_disabled()
    await (await held.get()).continue_()
    await shows_exactly(page, "Once")
    assert held.empty()


async def test_a_question_of_blanks_alone_is_not_sent(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    await page.goto(address(stack))
    asked = requests_of(page, "/chat")
    await type_question(page, " \n ")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_have_text("Type a question first.")
    await type_question(page, prompt(text=["Hello"]))
    await page.keyboard.press("Enter")
    await shows_exactly(page, "Hello")
    await expect(page.get_by_role("alert")).to_be_empty()
    assert len(asked) == 1


async def test_a_question_that_cannot_be_sent_stays_in_its_field(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    await page.route("**/chat", lambda route: route.abort())
    await page.goto(address(stack))
    await type_question(page, "Is anybody there?")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_have_text("The server cannot be reached: try again.")
    await expect(page.get_by_label("Your question")).to_have_value("Is anybody there?")
    await page.unroute("**/chat")
    await page.keyboard.press("Enter")
    await expect(page).to_have_url(STREAM)
    await expect(page.get_by_role("alert")).to_be_empty()


async def test_a_sign_in_in_front_is_asked_for_and_no_other_try(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    await page.route("**/chat", lambda route: route.fulfill(status=401, body="<html>"))
    await page.route("**/events", lambda route: route.fulfill(status=401, body="<html>"))
    told = "The server answered 401: sign in, then reload."
    await page.goto(address(stack, await ask(stack)))
    await expect(status_on(page)).to_have_text(told)
    await type_question(page, "Is anybody there?")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_have_text(told)


async def test_a_question_typed_before_the_page_is_whole_is_not_lost(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    held = await hold(page, "**/page.js")
    await page.goto(address(stack), wait_until="commit")
    await type_question(page, prompt(text=["Hello"]))
    button = page.get_by_role("button", name="Ask")
    await expect(button).to_be_disabled()
    await (await held.get()).continue_()
    await button.click()
    await shows_exactly(page, "Hello")


async def test_a_reload_midway_goes_on_and_ends_with_the_text_of_the_log(
    stack: httpx2.AsyncClient, page: Page, emulator: Emulator
) -> None:
    stream_id = await ask_on(page, stack, **SLOW)
    await expect(answer_on(page)).to_contain_text("9 10 ")
    await page.reload()
    await expect(answer_on(page)).to_contain_text("9 10 ")
    await is_midway(emulator)
    await expect(status_on(page)).to_have_text("Complete.")
    await shows_exactly(page, SLOW_TEXT)
    assert await logged_text(stack, stream_id) == SLOW_TEXT


async def test_a_second_window_shows_the_same_midway_and_at_the_end(
    stack: httpx2.AsyncClient, page: Page, emulator: Emulator
) -> None:
    await ask_on(page, stack, **SLOW)
    await expect(answer_on(page)).to_contain_text("9 10 ")
    async with page.context.expect_page() as opening:
        await page.get_by_role("link", name="second window").click()
    second = await opening.value
    await expect(answer_on(second)).to_contain_text("9 10 ")
    await is_midway(emulator)
    await shows_exactly(page, SLOW_TEXT)
    await shows_exactly(second, SLOW_TEXT)


async def test_stop_reaches_the_upstream_and_keeps_what_came(
    stack: httpx2.AsyncClient, page: Page, emulator: Emulator
) -> None:
    stream_id = await ask_on(page, stack, chunks=5, end="stall")
    await shows_exactly(page, "0 1 2 3 4 ")
    await stop_on(page).click()
    await expect(status_on(page)).to_have_text("Stopped. This is how far it came.")
    record = await emulator.request(0)
    await record.over.wait()
    assert record.outcome == "disconnected"
    await shows_exactly(page, "0 1 2 3 4 ")
    await expect(stop_on(page)).to_be_hidden()
    assert (await stack.get(f"/streams/{stream_id}")).json()["status"] == "cancelled"


async def test_a_failure_of_the_upstream_is_shown_as_a_sentence(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    stream_id = await ask_on(page, stack, chunks=5, after=3, end="eof")
    await expect(status_on(page)).to_have_text(
        "The model service ended the answer without finishing it: ask again."
    )
    await shows_exactly(page, "0 1 2 ")
    error = (await stack.get(f"/streams/{stream_id}")).json()["error"]
    await expect(status_on(page)).to_have_text(error["message"])


async def test_markup_in_an_answer_is_shown_as_text(stack: httpx2.AsyncClient, page: Page) -> None:
    text = "<img src=x onerror=\"document.title = 'owned'\"><b>bold</b> &amp; so on"
    await ask_on(page, stack, text=[text[:9], text[9:]])
    await expect(status_on(page)).to_have_text("Complete.")
    await shows_exactly(page, text)
    assert await answer_on(page).locator("*").count() == 0
    await expect(page).to_have_title("chat-relay")


async def test_a_refusal_is_shown_as_the_answer(stack: httpx2.AsyncClient, page: Page) -> None:
    await ask_on(page, stack, refusal="I would rather not.")
    await shows_exactly(page, "I would rather not.")


async def test_an_emoji_that_came_in_two_halves_is_whole(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    await ask_on(page, stack, text=["See: "], surrogate=True)
    await expect(status_on(page)).to_have_text("Complete.")
    # Each half in a node of its own would be two replacement characters on the screen.
    nodes = "answer => [...answer.childNodes].map(node => node.data)"
    assert await answer_on(page).evaluate(nodes) == ["See: \N{GRINNING FACE}"]


async def test_a_refused_stop_is_said_once_however_the_answer_goes_on(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    await page.route("**/cancel", lambda route: route.fulfill(status=502, body="<html>"))
    await ask_on(page, stack, chunks=5, end="stall")
    await shows_exactly(page, "0 1 2 3 4 ")
    await stop_on(page).click()
    await expect(page.get_by_role("alert")).to_have_text("The server answered 502: try again.")
    await expect(status_on(page)).to_have_text("demo answers …")


@pytest.mark.parametrize("name", ["unknown", "..", "%2e%2e", "a/b?c"])
async def test_an_address_that_names_no_stream_says_so_and_asks_no_more(
    stack: httpx2.AsyncClient, page: Page, name: str
) -> None:
    asked = requests_of(page, "/events")
    await page.goto(address(stack, name))
    await expect(status_on(page)).to_have_text("There is no stream with this id: check it.")
    await asks_nothing_more(page)
    assert len(asked) <= 1
    await expect(stop_on(page)).to_be_hidden()


async def test_an_erased_stream_says_so_and_asks_no_more(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    stream_id = await ask(stack, text=["Secret"])
    await stack.delete(f"/streams/{stream_id}")
    gone = (await stack.get(f"/streams/{stream_id}")).json()
    assert gone["code"] == "stream_gone"
    asked = requests_of(page, "/events")
    await page.goto(address(stack, stream_id))
    await expect(status_on(page)).to_have_text(gone["detail"])
    await asks_nothing_more(page)
    assert len(asked) == 1
    await shows_exactly(page, "")


async def test_a_stream_erased_while_it_is_watched_says_so_and_asks_no_more(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    asked = requests_of(page, "/events")
    stream_id = await ask_on(page, stack, chunks=5, end="stall")
    await shows_exactly(page, "0 1 2 3 4 ")
    await stack.delete(f"/streams/{stream_id}")
    gone = (await stack.get(f"/streams/{stream_id}")).json()
    await expect(status_on(page)).to_have_text(gone["detail"])
    await asks_nothing_more(page)
    assert len(asked) == 1


async def test_after_the_terminal_event_the_page_asks_no_more(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    asked = requests_of(page, "/events")
    await ask_on(page, stack, chunks=3)
    await expect(status_on(page)).to_have_text("Complete.")
    await asks_nothing_more(page)
    assert len(asked) == 1


async def test_after_a_restart_of_the_api_the_page_comes_back_with_the_whole_text_once(
    settings: Settings, worker: ClaimingWorker, emulator: Emulator, page: Page
) -> None:
    asked = requests_of(page, "/events")
    async with running_api(settings) as http:
        port = http.base_url.port
        await ask_on(page, http, **SLOW)
        await expect(answer_on(page)).to_contain_text("9 10 ")
    await expect(status_on(page)).to_have_text("Connection lost, coming back …")
    await expect(answer_on(page)).to_contain_text("9 10 ")
    await is_midway(emulator)
    async with running_api(changed(settings, port=port)):
        await expect(status_on(page)).to_have_text("Complete.")
        await shows_exactly(page, SLOW_TEXT)
    assert len(asked) > 1
    assert re.fullmatch(r"\d+-\d+", await asked[-1].header_value("last-event-id") or "")


async def test_a_server_that_is_away_for_a_while_is_asked_again(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    stream_id = await ask(stack, text=["At last"])
    answers = iter([503])

    async def refuse_once(route: Route) -> None:
        if status := next(answers, None):
            await route.fulfill(status=status)
        else:
            await route.continue_()

    await page.route("**/events", refuse_once)
    await page.goto(address(stack, stream_id))
    await expect(status_on(page)).to_have_text("Connection lost, coming back …")
    await shows_exactly(page, "At last")
    await expect(status_on(page)).to_have_text("Complete.")


async def test_that_the_server_cannot_be_reached_is_said_no_longer_when_it_is_back(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    stream_id = await ask(stack, text=["At last"])
    for pattern in ("**/events", "**/cancel"):
        await page.route(pattern, lambda route: route.abort())
    await page.goto(address(stack, stream_id))
    await stop_on(page).click()
    await expect(page.get_by_role("alert")).to_have_text("The server cannot be reached: try again.")
    await page.unroute("**/events")
    await shows_exactly(page, "At last")
    await expect(page.get_by_role("alert")).to_be_empty()


async def test_a_new_attempt_clears_what_the_one_before_it_said(
    api: httpx2.AsyncClient, settings: Settings, page: Page
) -> None:
    """The stamps in the text are of the moment, so no two attempts say the same."""
    async with running_worker(settings):
        stream_id = await ask_on(page, api, chunks=40, delay_ms=50, stamp=True)
        await expect(answer_on(page)).to_contain_text("9:")
        await page.evaluate(RECORD)
    before = await answer_on(page).text_content() or ""
    async with running_worker(settings):
        await expect(status_on(page)).to_have_text("Complete.")
    seen = await page.evaluate("seen")
    assert "" in seen
    after = await logged_text(api, stream_id)
    assert not after.startswith(before[:10])
    await shows_exactly(page, after)


async def test_another_address_leaves_nothing_of_the_stream_before(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    first = await ask(stack, chunks=5, end="stall")
    second = await ask(stack, text=["Second"])
    await page.goto(address(stack, first))
    await shows_exactly(page, "0 1 2 3 4 ")
    await page.goto(address(stack, second))
    await expect(status_on(page)).to_have_text("Complete.")
    await shows_exactly(page, "Second")
    await page.go_back()
    await shows_exactly(page, "0 1 2 3 4 ")
    await expect(stop_on(page)).to_be_visible()


async def test_a_late_word_about_a_stream_left_behind_changes_nothing(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    held = await hold(page, "**/cancel")
    await ask_on(page, stack, chunks=5, end="stall")
    await shows_exactly(page, "0 1 2 3 4 ")
    await stop_on(page).click()
    route = await held.get()
    second = await ask(stack, chunks=3, end="stall")
    await page.goto(address(stack, second))
    await shows_exactly(page, "0 1 2 ")
    async with page.expect_response("**/cancel") as late:
        await route.fulfill(status=502, body="<html>")
    await (await late.value).finished()
    await shows_exactly(page, "0 1 2 ")
    await expect(page.get_by_role("alert")).to_be_empty()
    await expect(status_on(page)).to_have_text("demo answers …")
    await expect(stop_on(page)).to_be_visible()


async def test_a_stream_left_behind_is_watched_no_longer(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    first = await ask(stack, chunks=5, end="stall")
    await page.goto(address(stack, first))
    await shows_exactly(page, "0 1 2 3 4 ")
    async with page.expect_event("requestfailed") as left:
        await page.goto(address(stack))
    assert (await left.value).url.endswith(f"/streams/{first}/events")
    await asks_nothing_more(page)


async def test_what_is_being_waited_for_is_said_until_it_comes(
    stack: httpx2.AsyncClient, page: Page
) -> None:
    """The events of the route are of the moment: only a comment, and no end of the answer."""
    frames = 'id: 1-0\nevent: started\ndata: {"attempt":1,"model":"demo"}\n\n: Redis is away\n\n'

    async def tell_and_wait(route: Route) -> None:
        await route.fulfill(content_type="text/event-stream", body="retry: 3000\n\n" + frames)

    await page.route("**/events", tell_and_wait)
    stream_id = await ask(stack, text=["At last"])
    await page.goto(address(stack))
    await page.evaluate(RECORD.replace("#answer", "#status"))
    await page.goto(address(stack, stream_id))
    await expect(status_on(page)).to_have_text("Connection lost, coming back …")
    assert "Redis is away …" in await page.evaluate("seen")
    await page.unroute("**/events")
    await expect(status_on(page)).to_have_text("Complete.")


async def test_an_unmodified_event_source_comes_back_by_itself_and_ends_after_the_terminal_event(
    settings: Settings, worker: ClaimingWorker, emulator: Emulator, page: Page
) -> None:
    asked = requests_of(page, "/events")
    async with running_api(settings) as http:
        port = http.base_url.port
        stream_id = await ask(http, **SLOW)
        await page.goto(address(http))
        await page.evaluate(EVENT_SOURCE, f"/streams/{stream_id}/events")
        await page.wait_for_function("told.length > 10")
    await page.wait_for_function("source.readyState === EventSource.CONNECTING")
    await is_midway(emulator)
    async with running_api(changed(settings, port=port)):
        await page.wait_for_function("source.readyState === EventSource.CLOSED")
        await asks_nothing_more(page)
    responses = [await request.response() for request in asked]
    # Those that found no server have no response.
    assert [each.status for each in responses if each is not None] == [200, 200, 204]
    assert len(asked) < 30
    told: list[list[str]] = await page.evaluate("told")
    kinds = [kind for kind, *_ in told if kind != "queued"]
    assert kinds == ["started", *["chunk"] * (len(kinds) - 2), "completed"]
    assert len({cursor for _, cursor, _ in told}) == len(told)
    texts = [json.loads(data).get("text", "") for _, _, data in told]
    assert "".join(texts) == SLOW_TEXT


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_narrow_screen_needs_no_scrolling_to_the_side(
    stack: httpx2.AsyncClient, browser: Browser, scheme: Literal["light", "dark"]
) -> None:
    stream_id = await ask(stack, text=["W" * 500], end="stall")
    viewport = ViewportSize(width=375, height=700)
    async with await browser.new_page(viewport=viewport, color_scheme=scheme) as page:
        await page.goto(address(stack, stream_id))
        await shows_exactly(page, "W" * 500)
        assert await page.evaluate("document.documentElement.scrollWidth") == 375


async def test_the_description_of_the_api_is_shown_and_nobody_else_is_asked_for_it(
    api: httpx2.AsyncClient, page: Page
) -> None:
    here = str(api.base_url)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.goto(f"{here}/docs")
    await expect(page.get_by_text("Erase a stream")).to_be_visible()
    assert [url for url in asked if not url.startswith((here, "data:"))] == []
