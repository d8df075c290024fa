"""Those who ride on a feed: one loop writes to all of them."""

import asyncio

from api.line import Line, chunk_of
from api.settle import settle


class Riders:
    """The viewers of one wire that have everything and ride along: each chunk is written to them as
    it comes, while their own coroutines sleep on. Who gets off is told the index to go on from."""

    def __init__(self, heartbeat: bytes, seconds: float) -> None:
        self._lines: dict[asyncio.Future[int], Line] = {}
        self._heartbeat = chunk_of(heartbeat) if heartbeat else b""
        self._seconds = seconds
        self._index = 0
        self._wrote = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __bool__(self) -> bool:
        return bool(self._lines)

    def get_on(self, line: Line, index: int) -> asyncio.Future[int]:
        """`index` is that of all who are on already: nobody lacks anything."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[int] = loop.create_future()
        self._lines[waiter] = line
        self._index = index
        if self._timer is None:
            self._wrote = loop.time()
            self._beat()
        return waiter

    def get_off(self, waiter: asyncio.Future[int], _: object = None) -> None:
        if self._lines.pop(waiter, None) is not None:
            settle(waiter, self._index)
        if not self._lines and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def all_get_off(self) -> None:
        for waiter in tuple(self._lines):
            self.get_off(waiter)

    def carry(self, body: bytes, index: int) -> None:
        """On to an index, by what stands before it. Whose line is full gets off there."""
        self._index = index
        if body:
            self._wrote = asyncio.get_running_loop().time()
            self._write(chunk_of(body))

    def _write(self, chunk: bytes) -> None:
        full = []
        for waiter, line in self._lines.items():
            if not line.write(chunk):
                full.append(waiter)
        for waiter in full:
            self.get_off(waiter)

    def _beat(self) -> None:
        """Not set anew with each chunk: it looks when it is due."""
        loop = asyncio.get_running_loop()
        left = self._wrote + self._seconds - loop.time()
        if left <= 0:
            left, self._wrote = self._seconds, loop.time()
            if self._heartbeat:
                self._write(self._heartbeat)
        if self._lines:
            self._timer = loop.call_later(left, self._beat)
