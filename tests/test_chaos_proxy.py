import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from socket import SO_LINGER, SOL_SOCKET

import pytest

from chaos.proxy import Proxy
from tests.listening import listening

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
SILENCE_SECONDS = 0.2


class Echo:
    """The target: says back what it hears, and remembers how its connections ended."""

    def __init__(self) -> None:
        self.port = 0
        self.heard = bytearray()
        self.ends: asyncio.Queue[str] = asyncio.Queue()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1000):
                self.heard += data
                writer.write(data)
            self.ends.put_nowait("closed")
        except ConnectionResetError:
            self.ends.put_nowait("reset")


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    echo = Echo()
    async with listening(echo.accept) as echo.port:
        yield echo


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[Proxy]:
    async with Proxy(echo.port) as proxy:
        yield proxy


@pytest.fixture
async def ends(proxy: Proxy) -> AsyncIterator[Ends]:
    """A connection through the proxy that has carried bytes."""
    async with connected(proxy) as ends:
        assert await said(b"hello", *ends) == b"hello"
        yield ends


@asynccontextmanager
async def connected(proxy: Proxy) -> AsyncIterator[Ends]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def said(data: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """What comes back."""
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), 5)


async def is_silent(reader: asyncio.StreamReader) -> bool:
    try:
        await asyncio.wait_for(reader.read(1), SILENCE_SECONDS)
    except TimeoutError:
        return True
    return False


async def test_the_end_of_one_side_reaches_the_other_after_the_bytes_before_it(
    ends: Ends, echo: Echo
) -> None:
    reader, writer = ends
    assert await said(b"x" * 1_000_000, reader, writer) == b"x" * 1_000_000
    writer.close()
    assert await asyncio.wait_for(echo.ends.get(), 5) == "closed"


async def test_a_cut_resets_both_sides_and_whoever_comes(
    proxy: Proxy, ends: Ends, echo: Echo
) -> None:
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(ends[0].read(1), 5)
    assert await asyncio.wait_for(echo.ends.get(), 5) == "reset"
    async with connected(proxy) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(1), 5)


async def test_after_a_cut_new_connections_pass(proxy: Proxy) -> None:
    proxy.cut()
    proxy.heal()
    async with connected(proxy) as ends:
        assert await said(b"again", *ends) == b"again"


async def test_frozen_nothing_reaches_either_side_and_no_connection_ends(
    proxy: Proxy, ends: Ends, echo: Echo
) -> None:
    reader, writer = ends
    proxy.freeze()
    writer.write(b"held")
    assert await is_silent(reader)
    assert echo.heard == b"hello"
    writer.close()
    await asyncio.sleep(SILENCE_SECONDS)
    assert echo.ends.empty()


async def test_a_connection_that_is_made_while_frozen_is_accepted_and_held(proxy: Proxy) -> None:
    proxy.freeze()
    async with connected(proxy) as (reader, writer):
        writer.write(b"held")
        assert await is_silent(reader)
        proxy.heal()
        assert await asyncio.wait_for(reader.readexactly(4), 5) == b"held"


async def test_what_was_held_goes_on_its_way_after_the_thaw(proxy: Proxy, ends: Ends) -> None:
    reader, writer = ends
    proxy.freeze()
    writer.write(b"held")
    assert await is_silent(reader)
    proxy.heal()
    assert await asyncio.wait_for(reader.readexactly(4), 5) == b"held"


async def test_half_open_for_good_a_frozen_connection_stays_silent_and_others_pass(
    proxy: Proxy, ends: Ends, echo: Echo
) -> None:
    proxy.freeze()
    ends[1].write(b"lost")
    proxy.heal(lose_frozen=True)
    async with connected(proxy) as others:
        assert await said(b"new", *others) == b"new"
    ends[1].write(b"lost")
    assert await is_silent(ends[0])
    assert echo.heard == b"hellonew"


async def test_a_cut_ends_also_what_was_frozen(proxy: Proxy, ends: Ends) -> None:
    proxy.freeze()
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(ends[0].read(1), 5)


async def test_a_dead_target_ends_the_connection(echo: Echo, proxy: Proxy) -> None:
    proxy.target = 1
    async with connected(proxy) as (reader, _):
        assert await asyncio.wait_for(reader.read(1), 5) == b""


async def test_a_connection_that_is_just_ending_is_no_obstacle_to_a_cut(
    proxy: Proxy, echo: Echo
) -> None:
    for turns in range(20):
        async with connected(proxy) as ends:
            assert await said(b"hello", *ends) == b"hello"
            ends[1].get_extra_info("socket").setsockopt(
                SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0)
            )
            ends[1].transport.abort()
            for _ in range(turns):
                await asyncio.sleep(0)
            proxy.cut()
        proxy.heal()
        assert await echo.ends.get()
