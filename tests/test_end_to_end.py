"""The promises, as a stranger would try them: real Redis, real uvicorn, real SDK, real sockets."""

import asyncio
import hashlib
import time
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import pytest
from redis.asyncio import Redis

from emulator.app import Emulator
from relay.settings import Settings
from tests.conftest import (
    ask,
    asking,
    events_of,
    running_api,
    running_worker,
    text_of,
    until,
    until_broken_off,
    watch,
)
from tests.test_ai_sdk import chatting

FIFTY = "".join(f"{n} " for n in range(50))


async def status(http: httpx2.AsyncClient, stream_id: str) -> dict[str, object]:
    body: dict[str, object] = (await http.get(f"/streams/{stream_id}")).json()
    return body


async def until_text(http: httpx2.AsyncClient, stream_id: str, part: str) -> None:
    async def there() -> bool:
        return part in str((await status(http, stream_id))["text"])

    await until(there)


# The answer.


async def test_an_answer_comes_whole(stack: httpx2.AsyncClient) -> None:
    stream_id = await ask(stack, chunks=50)
    events = await watch(stack, stream_id)
    kinds = [event.event for event in events if event.event != "queued"]
    assert kinds == ["started", *["chunk"] * (len(kinds) - 2), "completed"]
    assert text_of(events) == FIFTY
    [started] = [event.json() for event in events if event.event == "started"]
    assert started == {"attempt": 1, "model": "demo"}
    ending = events[-1].json()
    assert isinstance(ending, dict)
    assert ending["finish_reason"] == "stop"
    assert ending["chunks"] == len(kinds) - 2
    assert ending["sha256"] == hashlib.sha256(FIFTY.encode()).hexdigest()
    assert ending["usage"]["total_tokens"] > 0


async def test_the_status_tells_what_there_is(stack: httpx2.AsyncClient) -> None:
    stream_id = await ask(stack, chunks=50)
    events = await watch(stack, stream_id)
    told = await status(stack, stream_id)
    assert told["status"] == "completed"
    assert told["text"] == FIFTY
    assert told["attempt"] == 1
    assert told["place"] is None
    assert told["model"] == "demo"
    assert told["finish_reason"] == "stop"
    ending = events[-1].json()
    assert isinstance(ending, dict)
    assert (told["usage"], told["error"]) == (ending["usage"], None)
    assert told["last_event_id"] == events[-1].id
    times = [told[name] for name in ("created_ms", "first_chunk_ms", "ended_ms")]
    assert times == sorted(times, key=lambda ms: int(str(ms)))


async def test_the_text_itself_comes_to_a_terminal(stack: httpx2.AsyncClient) -> None:
    response = await stack.post("/chat", json=asking(chunks=50), headers={"accept": "text/plain"})
    assert response.status_code == 200
    assert response.text == FIFTY
    stream_id = response.headers["x-stream-id"]
    later = await stack.get(f"/streams/{stream_id}/events", headers={"accept": "text/plain"})
    assert later.text == FIFTY


async def test_text_of_a_failed_answer_breaks_off(stack: httpx2.AsyncClient) -> None:
    body = asking(chunks=50, after=10, end="eof")
    with pytest.raises(httpx2.RemoteProtocolError):
        await stack.post("/chat", json=body, headers={"accept": "text/plain"})


async def test_one_request_creates_and_watches(stack: httpx2.AsyncClient) -> None:
    async with stack.sse("/chat", method="POST", json=asking(chunks=50)) as source:
        events = [event async for event in source if event.data]
    assert text_of(events) == FIFTY
    assert (await status(stack, source.response.headers["x-stream-id"]))["status"] == "completed"


# Promise 1: order and completeness.


async def test_every_viewer_sees_the_same_whenever_it_joins(stack: httpx2.AsyncClient) -> None:
    stream_id = await ask(stack, chunks=50, delay_ms=5)
    early = [asyncio.create_task(watch(stack, stream_id)) for _ in range(5)]
    await until_text(stack, stream_id, "20 ")
    middle = [asyncio.create_task(watch(stack, stream_id)) for _ in range(5)]
    seen = [await viewer for viewer in early + middle]
    seen.append(await watch(stack, stream_id))
    for events in seen:
        assert text_of(events) == FIFTY
        assert [e.id for e in events if e.event != "queued"] == [e.id for e in seen[-1]]


async def test_a_viewer_resumes_strictly_after_its_cursor(stack: httpx2.AsyncClient) -> None:
    stream_id = await ask(stack, chunks=50)
    whole = await watch(stack, stream_id)
    for index, event in enumerate(whole[:-1]):
        if event.event != "queued":
            assert await watch(stack, stream_id, after=event.id) == whole[index + 1 :]


async def test_a_viewer_that_drops_and_resumes_again_and_again_misses_nothing(
    stack: httpx2.AsyncClient,
) -> None:
    stream_id = await ask(stack, chunks=50, delay_ms=4)
    events: list[httpx2.ServerSentEvent] = []
    while not events or events[-1].event != "completed":
        headers = {"last-event-id": events[-1].id} if events else {}
        async with stack.sse(f"/streams/{stream_id}/events", headers=headers) as source:
            arriving = aiter(source)
            for _ in range(7):
                event = await anext(arriving, None)
                if event is not None and event.data:
                    events.append(event)
    assert text_of(events) == FIFTY
    assert len({event.id for event in events}) == len(events)


async def test_viewers_of_two_processes_see_the_same(settings: Settings) -> None:
    async with (
        running_api(settings) as one,
        running_api(settings) as two,
        running_worker(settings),
    ):
        stream_id = await ask(one, chunks=50, delay_ms=2)
        here, there = await asyncio.gather(watch(one, stream_id), watch(two, stream_id))
    assert [e.id for e in here if e.event != "queued"] == [
        e.id for e in there if e.event != "queued"
    ]
    assert text_of(here) == text_of(there) == FIFTY


async def test_the_answer_outlives_the_connection_that_asked_for_it(
    stack: httpx2.AsyncClient, emulator: Emulator
) -> None:
    async with stack.sse("/chat", method="POST", json=asking(chunks=50, delay_ms=5)) as source:
        arriving = aiter(source)
        for _ in range(10):
            await anext(arriving)
        stream_id = source.response.headers["x-stream-id"]
    events = await watch(stack, stream_id)
    assert text_of(events) == FIFTY
    assert emulator.total == 1


async def test_viewers_live_through_a_restart_of_the_api(settings: Settings) -> None:
    async with running_worker(settings), AsyncExitStack() as viewer:
        async with running_api(settings) as http:
            stream_id = await ask(http, chunks=50, delay_ms=20)
            own = await viewer.enter_async_context(httpx2.AsyncClient(base_url=http.base_url))
            path = f"/streams/{stream_id}/events"
            source = await viewer.enter_async_context(own.sse(path))
            arriving = aiter(source)
            seen = [await anext(arriving) for _ in range(5)]
        seen += await until_broken_off(arriving)
        assert "completed" not in {event.event for event in seen}
        cursor = next(event.id for event in reversed(seen) if event.data)
        async with running_api(settings) as http:
            seen += await watch(http, stream_id, after=cursor)
    assert text_of([event for event in seen if event.data]) == FIFTY


# Promise 4: honest about loss.


async def test_an_answer_that_just_stops_is_a_failure(stack: httpx2.AsyncClient) -> None:
    stream_id = await ask(stack, chunks=50, after=10, end="eof")
    events = await watch(stack, stream_id)
    ending = events[-1].json()
    assert isinstance(ending, dict)
    assert events[-1].event == "failed"
    assert ending["code"] == "upstream_incomplete"
    assert ending["retryable"] is True
    assert text_of(events) == "".join(f"{n} " for n in range(10))


async def test_a_stream_erased_under_its_viewers_is_told_and_its_upstream_closed(
    stack: httpx2.AsyncClient, emulator: Emulator
) -> None:
    stream_id = await ask(stack, chunks=1000, delay_ms=10)
    watching = asyncio.create_task(watch(stack, stream_id))
    await until_text(stack, stream_id, "5 ")
    assert (await stack.delete(f"/streams/{stream_id}")).status_code == 204
    events = await watching
    assert events[-1].event == "failed"
    assert "stream_gone" in events[-1].data
    record = await emulator.request(0)
    async with asyncio.timeout(1):
        await record.over.wait()
    assert record.outcome == "disconnected"
    assert (await stack.get(f"/streams/{stream_id}/events")).status_code == 410


# Promise 6: cancel reaches the socket of the upstream.


async def test_cancel_closes_the_upstream_and_keeps_the_partial_text(
    stack: httpx2.AsyncClient, emulator: Emulator
) -> None:
    stream_id = await ask(stack, chunks=1000, delay_ms=10)
    watching = asyncio.create_task(watch(stack, stream_id))
    await until_text(stack, stream_id, "5 ")
    record = await emulator.request(0)
    asked = time.monotonic()
    response = await stack.post(f"/streams/{stream_id}/cancel")
    assert response.json()["status"] == "cancelling"
    async with asyncio.timeout(5):
        await record.over.wait()
    assert record.outcome == "disconnected"
    assert record.ended is not None
    assert record.ended - asked < 1
    events = await watching
    assert events[-1].event == "cancelled"
    told = await status(stack, stream_id)
    assert told["status"] == "cancelled"
    assert told["text"] == text_of(events)
    assert str(told["text"]).startswith("0 1 2 3 4 5 ")
    again = await stack.post(f"/streams/{stream_id}/cancel")
    assert again.json()["status"] == "cancelled"


async def test_cancel_reaches_a_silent_upstream_from_another_process(
    settings: Settings, emulator: Emulator
) -> None:
    async with (
        running_api(settings) as one,
        running_api(settings) as two,
        running_worker(settings),
    ):
        stream_id = await ask(one, chunks=5, after=2, end="stall")
        record = await emulator.request(0)
        await until_text(one, stream_id, "1 ")
        await two.post(f"/streams/{stream_id}/cancel")
        async with asyncio.timeout(1):
            await record.over.wait()
        events = await watch(one, stream_id)
    assert events[-1].event == "cancelled"


async def test_a_job_cancelled_while_it_waits_never_reaches_the_upstream(
    settings: Settings, emulator: Emulator
) -> None:
    async with running_api(settings) as http:
        cancelled = await ask(http, chunks=5)
        await http.post(f"/streams/{cancelled}/cancel")
        async with running_worker(settings):
            answered = await ask(http, chunks=5)
            assert (await watch(http, answered))[-1].event == "completed"
            assert [e.event for e in await watch(http, cancelled)] == ["queued", "cancelled"]
    assert emulator.total == 1


async def test_closing_the_tab_cancels_only_where_the_request_asked_for_it(
    stack: httpx2.AsyncClient, emulator: Emulator
) -> None:
    outcomes = []
    for on_disconnect in ("cancel", "continue"):
        headers = {"x-on-disconnect": on_disconnect}
        body = asking(chunks=60, delay_ms=10)
        async with stack.sse("/chat", method="POST", json=body, headers=headers) as source:
            arriving = aiter(source)
            for _ in range(5):
                await anext(arriving)
            stream_id = source.response.headers["x-stream-id"]
        outcomes.append((await watch(stack, stream_id))[-1].event)
    assert outcomes == ["cancelled", "completed"]


async def test_that_a_tab_closes_behind_a_stream_that_is_gone_is_no_error(
    settings: Settings, redis: Redis, said: list[Any]
) -> None:
    async with running_api(settings) as http:
        headers = {"x-on-disconnect": "cancel"}
        async with http.sse("/chat", method="POST", json=asking(), headers=headers) as source:
            arriving = aiter(source)  # Let go of, it would close the connection.
            await anext(arriving)
            await redis.flushall()

        async def told() -> bool:
            return "cancel_failed" in events_of(said)

        await until(told)
    assert "internal_error" not in events_of(said)


@pytest.mark.parametrize(
    "cancel", ["/streams/ID/cancel", "/v1/responses/resp_ID/cancel", "/api/chat/c/stop", ""]
)
async def test_an_operator_is_told_that_an_end_was_asked_for_in_whatever_way(
    stack: httpx2.AsyncClient, cancel: str, said: list[Any]
) -> None:
    headers = {"x-on-disconnect": "continue" if cancel else "cancel"}
    body = chatting("c", chunks=1, end="stall")
    async with stack.stream("POST", "/api/chat", json=body, headers=headers) as response:
        stream_id = response.headers["x-stream-id"]
        if cancel:
            assert (await stack.post(cancel.replace("ID", stream_id))).is_success
    assert (await watch(stack, stream_id))[-1].event == "cancelled"
    told = [(each["event"], each["stream"]) for each in said if "cancel_" in each["event"]]
    assert told == [("cancel_asked", stream_id)]


# The upstream's faults, as viewers see them.


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ({"prompt_filter": True}, "content_filter"),
        ({"status": 401}, "upstream_denied"),
        ({"chunks": 9, "after": 3, "end": "reset"}, "upstream_unreachable"),
        ({"chunks": 9, "after": 3, "end": "error"}, "upstream_failed"),
        ({"chunks": 9, "after": 3, "end": "garbage"}, "upstream_garbled"),
    ],
)
async def test_a_failing_upstream_ends_the_stream_with_a_code(
    stack: httpx2.AsyncClient, script: dict[str, object], code: str
) -> None:
    stream_id = await ask(stack, **script)
    events = await watch(stack, stream_id)
    ending = events[-1].json()
    assert isinstance(ending, dict)
    assert (events[-1].event, ending["code"]) == ("failed", code)
    assert (await status(stack, stream_id))["error"] == ending


async def test_a_late_filter_changes_the_finish_reason(stack: httpx2.AsyncClient) -> None:
    events = await watch(stack, await ask(stack, chunks=5, late_filter="blocked"))
    ending = events[-1].json()
    assert isinstance(ending, dict)
    assert ending["finish_reason"] == "content_filter"


async def test_a_refused_first_try_goes_unnoticed(
    stack: httpx2.AsyncClient, emulator: Emulator
) -> None:
    script = {"status": 429, "status_times": 2, "key": "k", "retry_after_ms": 5, "chunks": 50}
    events = await watch(stack, await ask(stack, **script))
    assert text_of(events) == FIFTY
    assert emulator.total == 3


# A worker's death.


async def test_a_worker_that_shuts_down_hands_its_job_over_and_texts_are_never_mixed(
    settings: Settings,
) -> None:
    async with running_api(settings) as http:
        async with running_worker(settings):
            stream_id = await ask(http, chunks=50, delay_ms=10)
            watching = asyncio.create_task(watch(http, stream_id))
            await until_text(http, stream_id, "5 ")
        async with running_worker(settings):
            events = await watching
    assert [event.event for event in events].count("started") == 2
    assert text_of(events) == FIFTY


async def test_redis_holds_no_prompt_once_the_answer_stands(
    stack: httpx2.AsyncClient, redis: Redis
) -> None:
    stream_id = await ask(stack, text=["answer"])
    await watch(stack, stream_id)
    everything = [await redis.dump(key) for key in await redis.keys("*")]
    assert not any(b"emulate" in dump for dump in everything)
