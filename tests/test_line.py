"""The line, on a connection that is over: by uvloop, which raises where asyncio is silent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvloop

from api.line import Line
from tests.listening import listening


class Flow:
    write_paused = False

    def resume_reading(self) -> None:
        pass


@asynccontextmanager
async def lost_line() -> AsyncIterator[Line]:
    lost = asyncio.Event()

    class Peer(asyncio.Protocol):
        def connection_lost(self, _: Exception | None) -> None:
            lost.set()

    async def stay(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listening(stay) as port:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(Peer, "127.0.0.1", port)
        line = Line(transport, Flow())
        line.abort()
        await lost.wait()
        yield line


def test_to_write_to_one_that_is_lost_is_no_error_for_all_who_are_written_to_after_it() -> None:
    async def write() -> None:
        async with lost_line() as line:
            assert line.write(b"1\r\nx\r\n")

    uvloop.run(write())


def test_that_it_was_lost_before_is_told_at_once() -> None:
    told: list[str] = []

    async def ask() -> None:
        async with lost_line() as line:
            line.when_lost(lambda: told.append("lost"))
            assert told == ["lost"]

    uvloop.run(ask())
