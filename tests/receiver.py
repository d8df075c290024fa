"""A receiver of webhooks on a real socket: what it answers, and when, is in the test's hand."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tests.listening import listening

ENDLESS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
"""After this head it goes on for as long as it is read."""
HALF = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n"
"""After this head the body comes a tenth of a second late."""
STALLED = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"
"""After this head nothing comes."""


def answer(status: int, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status} X", *headers, f"content-length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


@dataclass(frozen=True)
class Request:
    line: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    def __init__(self) -> None:
        self.port = 0
        self.connections = 0
        self.requests: list[Request] = []
        self.answers: list[bytes] = []
        """Given in turn; when they are used up, 204."""
        self.answering = asyncio.Event()
        """While it is clear, nothing is answered."""
        self.answering.set()
        self.left = asyncio.Event()
        """The other side has closed a connection before all was written to it."""
        self.over = asyncio.Event()
        """A connection is over, in whatever way."""
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?secret=the-marker"

    async def request(self, number: int = 0, seconds: float = 10) -> Request:
        """The request of that number, when it has come."""
        async with asyncio.timeout(seconds):
            while len(self.requests) <= number:
                self._changed.clear()
                await self._changed.wait()
        return self.requests[number]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            self.requests.append(await _read(reader))
            self._changed.set()
            leaving = asyncio.create_task(reader.read(1))
            try:
                await self._answer(writer, leaving)
            finally:
                leaving.cancel()
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left.set()
        finally:
            self.over.set()

    async def _answer(self, writer: asyncio.StreamWriter, leaving: asyncio.Task[bytes]) -> None:
        head = self.answers.pop(0) if self.answers else answer(204)
        answering = asyncio.create_task(self.answering.wait())
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        answering.cancel()
        if not leaving.done():
            writer.write(head)
        if head == HALF:
            await asyncio.wait({leaving}, timeout=0.1)
            writer.write(b"end")
        if head == STALLED:
            await leaving
        while head == ENDLESS:
            writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
            await writer.drain()
        if leaving.done():
            self.left.set()


async def _read(reader: asyncio.StreamReader) -> Request:
    line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
    headers = {name.lower(): value for name, value in (each.split(": ", 1) for each in lines)}
    return Request(line, headers, await reader.readexactly(int(headers["content-length"])))


@asynccontextmanager
async def receiving(
    *answers: bytes, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Receiver]:
    receiver = Receiver()
    receiver.answers += answers
    async with listening(receiver.serve, host, port, tls) as receiver.port:
        yield receiver


class Names:
    """A resolver that knows the names of a test, and asks the machine's about all others."""

    def __init__(self) -> None:
        self.lookups: list[str] = []
        self._known: dict[str, Callable[[], list[str]]] = {}
        self._look_up: Any = socket.getaddrinfo

    def __setitem__(self, name: str, addresses: list[str] | Callable[[], list[str]]) -> None:
        self._known[name] = addresses if callable(addresses) else lambda: addresses

    def getaddrinfo(self, host: str, port: int, *rest: Any, **options: Any) -> Any:
        self.lookups.append(host)
        if host not in self._known:
            return self._look_up(host, port, *rest, **options)
        found = self._known[host]()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in found]
