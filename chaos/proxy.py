"""A TCP proxy whose connections can be cut, or frozen as by a network that lost its other half."""

import asyncio
import socket
import struct
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self

Mode = Literal["pass", "cut", "freeze"]

_READ_BYTES = 65536
_NO_LINGER = struct.pack("ii", 1, 0)


class Proxy:
    """One port of loopback in front of another, in the running event loop.

    pass    bytes go both ways, as does the end of a connection
    cut     every connection is reset, a new one as soon as it is made
    freeze  connections are made and kept and nothing goes through, no end either: to each side the
            other is silent, until `heal`
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.mode: Mode = "pass"
        self._open = asyncio.Event()
        self._open.set()
        self._links: set[_Link] = set()
        self._listener: asyncio.Server | None = None

    def cut(self) -> None:
        self.mode = "cut"
        self._open.set()
        for link in self._links:
            link.reset()

    def freeze(self) -> None:
        self.mode = "freeze"
        self._open.clear()

    def heal(self, *, lose_frozen: bool = False) -> None:
        """Back to pass. What was held goes on its way; or, with `lose_frozen`, the connections that
        were frozen stay silent for good, as those do that a network has forgotten."""
        if lose_frozen and self.mode == "freeze":
            for link in self._links:
                link.lost = True
        self.mode = "pass"
        self._open.set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._listener is not None:
            self._listener.close()
        while self._links:
            for link in self._links:
                link.reset()
            await asyncio.wait({link.task for link in self._links})

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        link.task = asyncio.create_task(self._link(link, reader, writer))
        link.task.add_done_callback(lambda _: self._links.discard(link))
        self._links.add(link)

    async def _link(
        self, link: "_Link", reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            try:
                await self._join(link, reader, writer)
            finally:
                _close(writer, reset=link.was_reset)

    async def _join(
        self, link: "_Link", reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.mode == "cut":
            link.was_reset = True
            return
        await self._may_pass(link)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        pumps = [
            asyncio.create_task(self._pump(link, reader, far_writer)),
            asyncio.create_task(self._pump(link, far_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            # Before anything is awaited: there a reset may come between.
            _close(far_writer, reset=link.was_reset)
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self, link: "_Link", reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while True:
            data = await reader.read(_READ_BYTES)
            await self._may_pass(link)
            if not data:
                return
            writer.write(data)
            await writer.drain()

    async def _may_pass(self, link: "_Link") -> None:
        await self._open.wait()
        if link.lost:
            await asyncio.Event().wait()


class _Link:
    """A client's connection and the one to the target that belongs to it."""

    task: "asyncio.Task[None]"

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.was_reset = False
        self.lost = False

    def reset(self) -> None:
        if not self.was_reset:
            self.was_reset = True
            # Here too: a task that is cancelled before its first step closes nothing.
            _close(self.writer, reset=True)
            self.task.cancel()


def _close(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    """Let both ends know: by FIN after what was written, or at once by RST."""
    if reset:
        with suppress(OSError):  # It may have ended by itself meanwhile.
            peer = writer.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        writer.transport.abort()
    else:
        writer.close()
