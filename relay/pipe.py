"""Connections to Redis whose replies are taken as they come, by no task that waits for them."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import hiredis
from redis.connection import HiredisRespSerializer
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.typing import EncodableT

LOOK_AGAIN_SECONDS = 0.05
_packer = HiredisRespSerializer()
_INCOMPLETE = object()


def pack(*command: EncodableT) -> bytes:
    packed: bytes
    [packed] = _packer.pack(*command)  # type: ignore[arg-type]
    return packed


class Opened(Protocol):
    """A connection that redis-py has opened and signed in."""

    def hand_over(self, to: asyncio.Protocol) -> asyncio.Transport:
        """Let another protocol have all that comes from now on."""

    def let_go(self) -> None:
        """Close it."""

    def error(self, text: str) -> Exception:
        """What Redis means by an error reply."""


class Replies(asyncio.Protocol):
    """What comes on a connection goes to `take`, reply by reply; what is sent goes at once."""

    def __init__(self, connection: Opened) -> None:
        self._connection = connection
        self._reader = hiredis.Reader(replyError=connection.error, notEnoughData=_INCOMPLETE)
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport = connection.hand_over(self)
        if self.closed:
            # It broke before: whoever had it then was told, and we shall not be.
            connection.let_go()
            self.lost.set_result(None)

    def take(self, reply: Any) -> None:
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        return self._transport.is_closing()

    def send(self, *command: EncodableT) -> None:
        # uvloop raises for a connection that is closed; that it is, `lost` tells.
        if not self.closed:
            self._transport.write(pack(*command))

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not _INCOMPLETE:
            self.take(reply)

    def connection_lost(self, _: Exception | None) -> None:
        self._connection.let_go()
        if not self.lost.done():
            self.lost.set_result(None)


class Pipe(Replies):
    """Commands of many callers on one connection: each is sent at once, and Redis answers in their
    order. A caller that is cancelled costs nothing but its answer.

    When the one that waits longest has waited for `reply_seconds` the connection is given up: what
    was sent later would be answered later still.
    """

    def __init__(self, connection: Opened, *, reply_seconds: float) -> None:
        self._calls: deque[tuple[asyncio.Future[Any], float]] = deque()
        """Those that wait, and until when."""
        self._reply_seconds = reply_seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._late = False
        """Whether one was over its time when that was looked at last."""
        self.refused = False
        """Whether the other side is a replica, which takes no writes."""
        super().__init__(connection)

    def call(self, *command: EncodableT) -> asyncio.Future[Any]:
        """The answer. Its exception is a RedisError."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        if self.closed:
            answer.set_exception(_broken())
            return answer
        self.send(*command)
        self._calls.append((answer, self._loop.time() + self._reply_seconds))
        if self._timer is None:
            self._timer = self._loop.call_later(self._reply_seconds, self._look)
        return answer

    def take(self, reply: Any) -> None:
        answer, _ = self._calls.popleft()
        if isinstance(reply, ReadOnlyError):
            # It is the master no more; a new connection leads to the one that is.
            self.refused = True
            self.close()
        if answer.done():
            return  # Nobody waits for it any more.
        if isinstance(reply, Exception):
            answer.set_exception(reply)
        else:
            answer.set_result(reply)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._give_up(_broken)

    def _look(self) -> None:
        """When the one that waits longest could be over its time: to set a timer for each call
        would cost more than the call."""
        self._timer = None
        late, self._late = self._late, False
        if not self._calls:
            return
        _, until = self._calls[0]
        if until > self._loop.time():
            self._timer = self._loop.call_at(until, self._look)
        elif not late:
            # A loop that was busy has not read yet what may have come in time.
            self._late = True
            self._timer = self._loop.call_later(LOOK_AGAIN_SECONDS, self._look)
        else:
            self.close()
            self._give_up(_silent)

    def _give_up(self, error: Callable[[], RedisError]) -> None:
        for answer, _ in self._calls:
            if not answer.done():
                answer.set_exception(error())
        self._calls.clear()


def _silent() -> RedisTimeoutError:
    return RedisTimeoutError("Redis does not answer")


def _broken() -> RedisConnectionError:
    return RedisConnectionError("the connection broke")
