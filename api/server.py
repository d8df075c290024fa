"""uvicorn, taught to let its viewers go before it waits for them, and to wait for no client."""

import asyncio
import logging
import socket
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.counters import GIVEN_UP
from api.line import EXTENSION, Line
from api.parts import Parts
from api.problems import RETRY_SECONDS
from api.upgrade import NoUpgrade
from relay.descriptors import room_for
from relay.logs import get_logger
from relay.settings import Settings

logger = get_logger()

CLOSE_SECONDS = 2
"""For what is still open after the drain: requests that wait for Redis, buffers to be flushed."""
HEAD_BYTES = 65536
"""Of a request's line and headers; the read that goes over it is the last."""
HEAD_SECONDS = 10.0
"""From the connection, or from the first byte of its next request, to the end of the head."""
REQUESTS_BEHIND = 16
"""That may wait on one connection for the response before them. No browser sends any; a buffer
that is read at once holds ten thousand."""
BODY_SECONDS = 30.0
"""From the end of a request's head to the end of its body."""
IDLE_SECONDS = 75
"""That a connection is kept for its next request: longer than the minute after which most balancers
let go of it, else they would send one to a connection that is just being closed."""
KEEPALIVE_SECONDS = 30
"""Of silence until the kernel asks whether the peer still lives, three times 10 s apart."""
SEND_BYTES = 256 * 1024
"""Of what a peer does not take, the kernel would hold some 4 MB; Linux makes twice this of it."""
SPARE_DESCRIPTORS = 96
"""Beside one for each client: what the process has at its start, and the pool to Redis."""
_BARE = b"connection: close\r\ncontent-length: 0\r\n\r\n"
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\n" + _BARE
SENT_AWAY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: %d\r\n" % RETRY_SECONDS + _BARE


class Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # Not before: the port may be taken, and where any was asked for nobody else tells which.
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        logger.info("api_ready", version=_app(self.config).version, host=host, port=port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn would wait for every open response, and a live stream does not end by itself.
        parts = _parts(self.config)
        parts.hub.drain()
        await self._stay(parts.settings.drain_seconds)
        for connection in list(self.server_state.connections):
            if isinstance(connection, Bounded):
                connection.take_no_more()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn takes a second Ctrl-C for that, but no second SIGTERM.
        self.force_exit = self.force_exit or self.should_exit
        super().handle_exit(sig, frame)

    async def _stay(self, seconds: float) -> None:
        """Go on listening while viewers leave: a balancer has to hear that we are not ready, and
        what it sends until then must not be refused."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while loop.time() < until and not self.force_exit:  # noqa: ASYNC110 - a signal sets it
            await asyncio.sleep(0.05)


class Bounded(HttpToolsProtocol):
    """One client's connection, which can neither stall the others nor stay for ever: uvicorn bounds
    a request in neither size nor time, and waits without end for a peer to take what it sends."""

    _head_bytes = 0
    _in_head = True
    _cycles: tuple[RequestResponseCycle, ...] = ()
    """Those whose response was not complete when the newest began: more than one only if the client
    pipelines."""
    _deadline: asyncio.TimerHandle | None = None

    @property
    def _open_cycles(self) -> list[RequestResponseCycle]:
        return [cycle for cycle in self._cycles if not cycle.response_complete]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        clients = len(self.connections)
        if clients > max(1, room_for(clients, spare=SPARE_DESCRIPTORS)):
            # They would take the last one, too, and none be left to connect with Redis again.
            logger.warning("descriptors_low", clients=clients)
            transport.abort()
            return
        with suppress(OSError):  # One that is gone again already may not take options.
            _bound(transport.get_extra_info("socket"), _parts(self.config).settings.write_seconds)
        self._expect_within(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)
        # uvicorn tells the newest one alone, and an older one is the one that is being answered.
        open_cycles = self._open_cycles
        for cycle in open_cycles:
            cycle.disconnected = True
            cycle.message_event.set()
            _line(cycle).lose()
        if open_cycles and isinstance(exc, TimeoutError):
            GIVEN_UP.inc()  # The kernel has found it before we did.

    def data_received(self, data: bytes) -> None:
        if self._in_head and self._head_bytes > HEAD_BYTES:
            self.transport.abort()
            return
        # The next request begins. Not so while a response is under way: it is not to be cut off.
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_within(HEAD_SECONDS)
        was_in_head = self._in_head
        super().data_received(data)
        if was_in_head and self._in_head:
            self._head_bytes += len(data)

    def send_400_response(self, msg: str) -> None:
        if self._open_cycles:
            self.transport.abort()  # In the midst of a response it would pass for a piece of it.
        else:
            super().send_400_response(msg)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= REQUESTS_BEHIND:
            raise _TooMany
        self._in_head = True
        super().on_message_begin()
        extensions: Any = {EXTENSION: Line(self.transport, self.flow)}
        self.scope["extensions"] = extensions

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # A trailer: nobody reads it, and there is no end to them.
        # Nor does anybody read cookies, and Python before 3.11.10 and 3.12.6 parses them in a time
        # that grows by the square of their length.
        if name.lower() != b"cookie":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._expect_within(BODY_SECONDS)
        super().on_headers_complete()
        self._cycles = (*self._open_cycles, self.cycle)

    def on_message_complete(self) -> None:
        self._expect_nothing()
        super().on_message_complete()

    def _expect_within(self, seconds: float) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(seconds, self._give_up, seconds)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self, seconds: float) -> None:
        """The peer has not sent in time what it owes."""
        if self.pipeline:
            # It could not: nothing is read while an earlier request has its response.
            self._expect_within(seconds)
        else:
            self._refuse(TIMED_OUT)

    def take_no_more(self) -> None:
        """A body that is still on its way had better go elsewhere; uvicorn would wait for it, and
        say that something went wrong here."""
        if self._deadline is not None and not self._in_head and not self.pipeline:
            self._refuse(SENT_AWAY)

    def _refuse(self, answer: bytes) -> None:
        under_way = not self._in_head and self.cycle.response_started
        if under_way or self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.write(answer)
            self.transport.close()


class Connection(NoUpgrade, Bounded):
    """As the server has it: an upgrade is ignored before a bound could take notice of it."""


class _TooMany(Exception):
    """To the parser, which then reads no further."""


def _line(cycle: RequestResponseCycle) -> Line:
    scope: Any = cycle.scope
    line = Line.of(scope)
    assert line is not None  # noqa: S101
    return line


def _bound(peer: socket.socket, write_seconds: float) -> None:
    """Let the kernel find peers that vanished without a word. What we write to them fits into its
    buffer for hours, so that no write of ours would ever wait."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        milliseconds = max(1, int(min(write_seconds * 1000, 2**31 - 1)))  # 0 would be no bound.
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _app(config: uvicorn.Config) -> FastAPI:
    assert isinstance(config.app, FastAPI)  # noqa: S101
    return config.app


def _parts(config: uvicorn.Config) -> Parts:
    parts: Parts = _app(config).state.parts
    return parts


def create_server(app: FastAPI, settings: Settings) -> Server:
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Connection,
        # No route speaks it, and it would take the connection out of these hands.
        ws="none",
        log_config=None,
        # A line per request would hold its query string.
        access_log=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        timeout_keep_alive=IDLE_SECONDS,
        server_header=False,
        # Nothing here asks where a request comes from.
        proxy_headers=False,
    )
    return Server(config)


_NO_NEWS = (
    "ASGI callable returned without",
    "Exception in ASGI application",
    "Invalid HTTP request received",
)


def _is_news(record: logging.LogRecord) -> bool:
    # A viewer that is broken off on purpose is no error of the application, and an error of the
    # application has been logged by the application. What is no HTTP anybody may send. At a second
    # signal the lifespan is cut off.
    message = record.getMessage()
    return not message.startswith(_NO_NEWS) and not message.endswith("CancelledError\n")
