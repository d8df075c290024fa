"""The line: what our server lets a response do with its connection beside ASGI.

ASGI's `send` is a coroutine: to write the same chunk to a thousand viewers it would have to wake a
thousand tasks. With any other server a response does without a line.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol, Self

from starlette.types import Scope

EXTENSION = "relay.line"


class Flow(Protocol):
    """As uvicorn has it for each connection."""

    write_paused: bool

    def resume_reading(self) -> None: ...


class Line:
    """A response's hold on its connection, for as long as the response lasts."""

    __slots__ = ("_flow", "_tell_lost", "_transport")

    def __init__(self, transport: asyncio.Transport, flow: Flow) -> None:
        self._transport = transport
        self._flow = flow
        self._tell_lost: Callable[[], None] | None = None

    @classmethod
    def of(cls, scope: Scope) -> Self | None:
        line: Self | None = scope.get("extensions", {}).get(EXTENSION)
        return line

    @property
    def full(self) -> bool:
        """Whether the peer takes less than is written: then only `send` may write, which waits."""
        return self._flow.write_paused

    def write(self, chunk: bytes) -> bool:
        """A piece of the body, as `chunk_of` makes it; the response must have begun. It waits for
        nothing: what the peer does not take is kept. Returns False if the line is full now."""
        # uvloop raises for a connection that is closing, and others are still to be written to.
        if not self._transport.is_closing():
            self._transport.write(chunk)
        return not self._flow.write_paused

    def abort(self) -> None:
        """End the connection without waiting for the peer to take what is written."""
        self._transport.abort()

    def when_lost(self, tell: Callable[[], None]) -> None:
        """Call this when the peer has left, at once if it has already."""
        self._tell_lost = tell
        # uvicorn reads no further while requests wait behind this one, and would not hear of it.
        self._flow.resume_reading()
        if self._transport.is_closing():
            tell()

    def lose(self) -> None:
        """Called by the server when the connection is gone."""
        if self._tell_lost is not None:
            self._tell_lost()


def chunk_of(body: bytes) -> bytes:
    """A piece of a body, not empty, as HTTP/1.1 frames it."""
    return b"%x\r\n%b\r\n" % (len(body), body)
