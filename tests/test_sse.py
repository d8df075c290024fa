"""The decoder of the upstream's events, by examples and against the one of an HTTP library."""

from collections.abc import AsyncIterator
from itertools import pairwise

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.connection import REPLY_SECONDS
from relay.errors import Garbled
from worker import sse
from worker.sse import Decoder

# Of the standard, without what only matters to a browser (id, event, retry).
PIECES = [
    "data",
    ":",
    " ",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "x",
    "é",
    "data: a",
    "data:b\n",
    "id: 1",
    "retry",
]


def cut(text: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def decoded(pieces: list[bytes]) -> list[bytes]:
    decoder = Decoder()
    return [data for piece in pieces for data in decoder.feed(piece)]


@pytest.mark.parametrize(
    ("text", "data"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a\n\n", [b" a"]),
        (b"data: a: b\n\n", [b"a: b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"event: x\nid: 1\ndata: a\n\n", [b"a"]),
        (b"event: error\ndata: a\n\ndata:b\nevent:error\n\n", [sse.ERROR, sse.ERROR]),
        (b"event: error\n\n", []),
        (b": a comment\n\n", []),
        (b": a comment\ndata: a\n\n", [b"a"]),
        (b"data\n\ndata:\n\n", []),
        (b"datum: a\n\n", []),
        (b"\n\n\ndata: a\n\n\n\n", [b"a"]),
        (b"data: a\r\n\r\ndata: b\r\r", [b"a", b"b"]),
        (b"data: a\r\ndata: b\r\n\r\n", [b"a\nb"]),
        (b"data: a\r\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\n\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"\xef\xbb\xbfdata: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\n\ndata: without its end\n", [b"a"]),
    ],
)
def test_the_data_of_whole_events_comes_however_they_are_cut(
    text: bytes, data: list[bytes]
) -> None:
    assert decoded([text]) == data
    assert decoded([text[n : n + 1] for n in range(len(text))]) == data
    for n in range(len(text)):
        assert decoded([text[:n], b"", text[n:]]) == data


class Body(httpx2.AsyncByteStream):
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


@given(st.lists(st.sampled_from(PIECES), max_size=20), st.lists(st.integers(0, 60), max_size=6))
async def test_it_agrees_with_a_decoder_of_the_whole_standard(
    words: list[str], places: list[int]
) -> None:
    # Behind the text stand blank lines: what has none behind it, the other one tells as well.
    pieces = cut("".join([*words, "\n\n\n"]).encode(), places)
    response = httpx2.Response(
        200,
        headers={"content-type": "text/event-stream"},
        stream=Body(pieces),
        request=httpx2.Request("GET", "http://x"),
    )
    expected = [event.data async for event in httpx2.EventSource(response) if event.data]
    assert [data.decode() for data in decoded(pieces)] == expected


def test_an_event_without_an_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MOST_BYTES", 1000)
    decoder = Decoder()
    assert decoder.feed(b"data: " + b"x" * 900) == []
    with pytest.raises(Garbled) as raised:
        decoder.feed(b"x" * 100)
    assert raised.value.cause == "an event of more than 1000 bytes"


@pytest.mark.parametrize("end", [b"", b"\n\n"], ids=["without its end", "whole"])
def test_an_event_is_refused_that_a_slow_link_to_redis_could_not_carry_in_one_call(
    end: bytes,
) -> None:
    bytes_a_second = 10_000_000 // 8
    decoder = Decoder()
    with pytest.raises(Garbled):
        decoder.feed(b"x" * int(REPLY_SECONDS * bytes_a_second) + end)
