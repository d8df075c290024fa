"""Several streams on one connection, to the ends of all."""

import json
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import pytest

from api.wires import multiplexed
from api.wires.multiplexed import TOLD_GONE
from relay.errors import MalformedCursor, StreamGone
from relay.events import Cursor, Event
from relay.ids import new_stream_id
from relay.settings import Settings
from tests.conftest import ask, running_api, running_worker, text_of, until_broken_off

URL = "/streams/events"


def test_a_frame_names_its_stream_and_has_the_cursors_of_all() -> None:
    event = Event(Cursor(1, 2), "t", b'"a\\nb"')
    frame = multiplexed.encode(event, "S", ["1-2", "", "0-1"])
    assert frame == b'id: 1-2..0-1\nevent: chunk\ndata: {"stream_id":"S","text":"a\\nb"}\n\n'
    frame = multiplexed.encode(Event(Cursor(0, 1), "queued", b"{}"), "S", ["0-1"])
    assert frame == b'id: 0-1\nevent: queued\ndata: {"stream_id":"S"}\n\n'
    frame = multiplexed.encode_gone(StreamGone("It is gone."), "S", ["", "x"])
    assert frame.startswith(b'id: .x\nevent: failed\ndata: {"stream_id":"S","code":"stream_gone"')


@pytest.mark.parametrize(
    "places", [[None], [Cursor(1, 2)], [None, Cursor(3, 4), None], [TOLD_GONE, None, TOLD_GONE]]
)
def test_a_cursor_of_several_is_read_as_it_was_written(places: list[multiplexed.Place]) -> None:
    text = multiplexed.join(map(multiplexed.text_of, places))
    assert multiplexed.split(text, len(places)) == places


@pytest.mark.parametrize("text", ["1-1", "1-1.1-1.1-1", "a.b", ".xx", ".X", "1-1 .1-1"])
def test_a_cursor_that_was_never_handed_out_is_refused(text: str) -> None:
    with pytest.raises(MalformedCursor):
        multiplexed.split(text, 2)


async def events(
    http: httpx2.AsyncClient, ids: list[str], after: str = "", most: int = 10**9
) -> list[httpx2.ServerSentEvent]:
    """Up to the end, or some."""
    headers = {"last-event-id": after} if after else {}
    seen: list[httpx2.ServerSentEvent] = []
    async with http.sse(URL, params={"ids": ",".join(ids)}, headers=headers) as source:
        async for event in source:
            if event.data:
                seen.append(event)
            if len(seen) == most:
                break
    return seen


def of(stream_id: str, seen: list[httpx2.ServerSentEvent]) -> list[httpx2.ServerSentEvent]:
    return [event for event in seen if data(event)["stream_id"] == stream_id]


def data(event: httpx2.ServerSentEvent) -> Any:
    return json.loads(event.data)


async def test_each_stream_comes_whole_and_the_connection_ends_with_the_last(
    stack: httpx2.AsyncClient,
) -> None:
    counts = [3, 20, 8]
    ids = [await ask(stack, chunks=count, delay_ms=5) for count in counts]
    seen = await events(stack, ids)
    for stream_id, count in zip(ids, counts, strict=True):
        own = of(stream_id, seen)
        assert text_of(own) == "".join(f"{n} " for n in range(count))
        assert [event.event for event in own][-1] == "completed"


async def test_one_cursor_resumes_all_of_them_whenever_it_was_taken(
    stack: httpx2.AsyncClient,
) -> None:
    ids = [await ask(stack, chunks=15, delay_ms=5) for _ in range(3)]
    seen = await events(stack, ids, most=7)
    for most in (1, 9, 10**9):
        seen += await events(stack, ids, after=seen[-1].id, most=most)
    for stream_id in ids:
        own = of(stream_id, seen)
        assert text_of(own) == "".join(f"{n} " for n in range(15))
        assert [event.event for event in own].count("started") == 1
        assert len({event.id for event in own}) == len(own)
    response = await stack.get(
        URL, params={"ids": ",".join(ids)}, headers={"last-event-id": seen[-1].id}
    )
    assert response.status_code == 204


async def test_a_stream_that_is_gone_is_told_and_holds_up_no_other(
    stack: httpx2.AsyncClient,
) -> None:
    gone, alive = new_stream_id(), await ask(stack, chunks=3)
    seen = await events(stack, [gone, alive])
    [end] = of(gone, seen)
    assert (end.event, data(end)["code"]) == ("failed", "stream_gone")
    assert text_of(of(alive, seen)) == "0 1 2 "
    # Whoever comes back with what there was has it all.
    params = {"ids": f"{gone},{alive}", "last_event_id": of(alive, seen)[-1].id}
    assert (await stack.get(URL, params=params)).status_code == 204


async def test_of_several_that_are_all_gone_a_first_request_learns_by_its_status(
    api: httpx2.AsyncClient,
) -> None:
    ids = [new_stream_id(), new_stream_id()]
    for cursor in ("", "."):
        response = await api.get(URL, params={"ids": ",".join(ids), "last_event_id": cursor})
        assert (response.status_code, response.json()["code"]) == (410, "stream_gone")


async def test_the_loss_of_a_stream_is_told_once_to_who_comes_back(
    stack: httpx2.AsyncClient,
) -> None:
    ids = [await ask(stack, chunks=2), await ask(stack, chunks=1, end="stall")]
    seen: list[httpx2.ServerSentEvent] = []
    while not any(event.event == "completed" for event in seen):
        seen += await events(stack, ids, after=seen[-1].id if seen else "", most=1)
    await stack.delete(f"/streams/{ids[1]}")
    [lost] = await events(stack, ids, after=seen[-1].id)
    assert (lost.event, data(lost)["code"]) == ("failed", "stream_gone")
    assert data(lost)["stream_id"] == ids[1]
    assert lost.id == f"{seen[-1].id.split('.')[0]}.x"
    header = {"headers": {"last-event-id": lost.id}}
    for given in (
        header,
        {"params": {"last_event_id": lost.id}},
        header | {"params": {"last_event_id": seen[0].id}},
    ):
        params = {"ids": ",".join(ids), **given.get("params", {})}
        response = await stack.get(URL, params=params, headers=given.get("headers"))
        assert response.status_code == 204


async def test_who_comes_back_to_several_that_are_all_gone_is_told_of_each(
    stack: httpx2.AsyncClient,
) -> None:
    ids = [await ask(stack, chunks=1), await ask(stack, chunks=1)]
    [seen] = await events(stack, ids, most=1)
    for stream_id in ids:
        await stack.delete(f"/streams/{stream_id}")
    lost = await events(stack, ids, after=seen.id)
    told = [(event.event, data(event)["stream_id"]) for event in lost]
    assert told == [("failed", ids[0]), ("failed", ids[1])]


async def test_what_was_told_to_be_gone_is_not_told_again_with_the_rest_of_others(
    stack: httpx2.AsyncClient,
) -> None:
    ids = [new_stream_id(), await ask(stack, chunks=3)]
    [told] = await events(stack, ids, most=1)
    assert told.id == "x."
    rest = await events(stack, ids, after=told.id)
    assert {data(event)["stream_id"] for event in rest} == {ids[1]}
    assert text_of(rest) == "0 1 2 "


async def test_a_stream_erased_under_its_viewers_is_told(stack: httpx2.AsyncClient) -> None:
    ids = [await ask(stack, chunks=1, end="stall"), await ask(stack, chunks=2)]
    seen: list[httpx2.ServerSentEvent] = []
    async with stack.sse(URL, params={"ids": ",".join(ids)}) as source:
        async for event in source:
            if event.data:
                seen.append(event)
            if event.event == "completed":
                await stack.delete(f"/streams/{ids[0]}")
    assert data(of(ids[0], seen)[-1])["code"] == "stream_gone"
    assert text_of(of(ids[1], seen)) == "0 1 "


async def test_viewers_of_several_live_through_a_restart_of_the_api(settings: Settings) -> None:
    async with running_worker(settings), AsyncExitStack() as viewer:
        async with running_api(settings) as http:
            ids = [await ask(http, chunks=30, delay_ms=20) for _ in range(2)]
            own = await viewer.enter_async_context(
                httpx2.AsyncClient(base_url=http.base_url, trust_env=False)
            )
            source = await viewer.enter_async_context(own.sse(URL, params={"ids": ",".join(ids)}))
            arriving = aiter(source)
            begun = [await anext(arriving) for _ in range(9)]
        seen = [each for each in begun + await until_broken_off(arriving) if each.data]
        assert "completed" not in {event.event for event in seen}
        async with running_api(settings) as http:
            seen += await events(http, ids, after=seen[-1].id)
    for stream_id in ids:
        assert text_of(of(stream_id, seen)) == "".join(f"{n} " for n in range(30))


async def test_a_hundred_share_a_connection_and_one_named_twice_is_one_of_them(
    api: httpx2.AsyncClient,
) -> None:
    ids = [new_stream_id() for _ in range(100)]
    cursor = {"last-event-id": multiplexed.join([TOLD_GONE] * 100)}
    response = await api.get(URL, params={"ids": ",".join(ids + ids)}, headers=cursor)
    assert response.status_code == 204


@pytest.mark.parametrize(
    ("params", "status"),
    [
        ({"ids": "nobody"}, 404),
        ({"ids": ""}, 404),
        ({}, 422),
        ({"ids": ",".join(new_stream_id() for _ in range(101))}, 422),
        ({"ids": new_stream_id(), "last_event_id": "1-1.1-1"}, 400),
    ],
)
async def test_bad_input_is_refused(
    api: httpx2.AsyncClient, params: dict[str, str], status: int
) -> None:
    assert (await api.get(URL, params=params)).status_code == status
