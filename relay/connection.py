"""Connections to Redis, and the Lua scripts that run in it."""

import asyncio
import re
import socket
import sys
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any, cast
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from relay.durations import BOUNDS_MS
from relay.pipe import Pipe

# So short that a worker whose connection hangs can renew its lease by another in time.
REPLY_SECONDS = 2.0
CONNECT_SECONDS = 1.0
WAIT_SECONDS = 2
KEEPALIVE_SECONDS = 30
_REASON_LENGTH = 200
_DATABASE = re.compile(r"/?|/[0-9]+")


def connect(url: str, *, connections: int = 50, reply_seconds: float = REPLY_SECONDS) -> Redis:
    """A client whose every call ends: few connections, each with time limits."""
    redis = Piped(connection_pool=_pool(url, connections, reply_seconds))
    redis.auto_close_connection_pool = True
    redis.reply_seconds = reply_seconds
    return redis


def reason(error: Exception) -> str:
    """For a log: what Redis refuses, such as a right that is missing, only its own words tell. They
    name commands and keys, never what is written."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:_REASON_LENGTH]


def check(url: str) -> None:
    """Raises ValueError for what is no URL of a Redis, and for options that redis-py cannot take:
    it would say so with the first connection, in a process that runs, and never that it takes a
    path which is no number for database 0."""
    place = urlsplit(url)
    if place.scheme != "unix" and not _DATABASE.fullmatch(place.path):
        raise ValueError("the path is no number of a database")
    try:
        pool = _pool(url, 1, REPLY_SECONDS)
        pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py tells no types of it
    except (TypeError, AttributeError, RedisError) as error:
        raise ValueError(str(error)) from error


def _pool(url: str, connections: int, reply_seconds: float) -> "_Pool":
    options: dict[str, Any] = dict(parse_url(url))
    options["connection_class"] = _LEAN[options.get("connection_class", Connection)]
    if options["connection_class"] is _Tls and options.get("ssl_cert_reqs") != "none":
        # redis-py would take any certificate that the authority ever signed.
        options.setdefault("ssl_check_hostname", True)
    # Whatever the URL says: leases count on the time limits, and replies are read in this one form.
    ours: dict[str, Any] = {
        "max_connections": connections,
        "timeout": WAIT_SECONDS,
        "socket_timeout": reply_seconds,
        "socket_connect_timeout": CONNECT_SECONDS,
        "protocol": 2,
        "decode_responses": False,
        # redis-py would name itself, which a user of least rights may not.
        "lib_name": None,
        "lib_version": None,
    }
    if options["connection_class"] is not _Unix:
        ours |= {"socket_keepalive": True, "socket_keepalive_options": _keepalive()}
    return _Pool(**(options | ours))


def _keepalive() -> dict[int, int]:
    """A network forgets what is idle for some minutes, as after a quiet night, and tells neither
    end: whoever came first then would wait for a time limit, and be refused."""
    if sys.platform != "linux":
        return {}
    return {
        socket.TCP_KEEPIDLE: KEEPALIVE_SECONDS,
        socket.TCP_KEEPINTVL: 10,
        socket.TCP_KEEPCNT: 3,
    }


def script(redis: Redis, name: str) -> AsyncScript:
    return redis.register_script(_source(name))


@cache
def _source(name: str) -> str:
    folder = resources.files("relay") / "lua"
    bounds = f"local bounds_ms = {{ {', '.join(map(str, BOUNDS_MS))} }}\n"
    return bounds + (folder / "_common.lua").read_text() + (folder / f"{name}.lua").read_text()


class _Pool(BlockingConnectionPool):
    async def release(self, connection: AbstractConnection) -> None:
        if not connection.is_connected:
            # What cut this one may have cut them all, and each would cost a time limit to find out.
            for idle in self._available_connections:
                await idle.disconnect()
        await super().release(connection)


class Piped(Redis):
    """A client whose commands share one connection, which is opened when it is needed.

    redis-py would take one from the pool for each command, by locks and timers that cost five times
    the command, and lose it with a caller that is cancelled. Its pool is left for pipelines.
    """

    _pipe: Pipe | None = None
    _opening: asyncio.Task[Pipe] | None = None
    reply_seconds = REPLY_SECONDS
    refused = False
    """As `was_refused` tells it."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Raises RedisError; TimeoutError among those if the answer takes too long."""
        pipe = self._pipe
        if pipe is None or pipe.closed:
            pipe = await self._open()
        try:
            response = await pipe.call(*args)
        except asyncio.CancelledError:
            if args[0] in _BLOCKING:
                # It would go on waiting, and take what is meant for others.
                pipe.close()
            raise
        options.pop("keys", None)  # For a cache that is not used here.
        callback = self.response_callbacks.get(args[0])
        return response if callback is None else callback(response, **options)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._pipe is not None:
            self._pipe.close()
            await asyncio.wait([self._pipe.lost])
        await super().aclose(close_connection_pool)

    async def _open(self) -> Pipe:
        """Whoever needs it while it is being opened waits for the same attempt."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._new_pipe())
            self._opening.add_done_callback(self._keep)
        return await asyncio.shield(self._opening)

    async def _new_pipe(self) -> Pipe:
        return Pipe(await open_connection(self), reply_seconds=self.reply_seconds)

    def _keep(self, opening: asyncio.Task[Pipe]) -> None:
        self._opening = None
        if not opening.cancelled() and opening.exception() is None:
            self.refused = self.refused or (self._pipe is not None and self._pipe.refused)
            self._pipe = opening.result()


def was_refused(redis: Redis) -> bool:
    """Whether a replica has refused this client a write since that was asked last; known when the
    next connection stands."""
    assert isinstance(redis, Piped)  # noqa: S101 - connect makes no other
    refused, redis.refused = redis.refused, False
    return refused


_BLOCKING = frozenset({"BLPOP"})


async def open_connection(redis: Redis) -> "Lean":
    """A connection of one's own, signed in, beside those of a client. Raises RedisError, also where
    Redis still loads its data: it would take a subscription, and nothing else."""
    connection: Lean = redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        await connection.send_command("PING")
        await connection.read_response()
    except BaseException:
        connection.let_go()
        raise
    return connection


class Lean(AbstractConnection):
    """A connection that can be handed over to a protocol of ours, and until then never forgets a
    cancel. redis-py's own bounds a write by asyncio.wait_for, which on Python 3.11 returns a result
    that came together with a cancel: a task in a loop of calls would never end."""

    def hand_over(self, to: asyncio.Protocol) -> asyncio.Transport:
        assert self._writer is not None  # noqa: S101
        transport: Any = self._writer.transport
        transport.set_protocol(to)
        return cast(asyncio.Transport, transport)

    def let_go(self) -> None:
        self._close()  # type: ignore[no-untyped-call]

    async def disconnect(self, nowait: bool = True) -> None:
        # redis-py would wait for the goodbye of TLS, and raise where a Redis that hangs says none.
        await super().disconnect(nowait=True)

    def error(self, text: str) -> Exception:
        if "-READONLY " in text:
            # Redis 6 puts that of a write in a script behind what it says of the script.
            return ReadOnlyError(text)
        meant: Exception = self._parser.parse_error(text)  # type: ignore[no-untyped-call]
        return meant

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)
        except ReadOnlyError:
            # It is the master no more; a new connection leads to the one that is.
            await self.disconnect()
            raise

    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        if not self.is_connected:
            await self.connect()  # type: ignore[no-untyped-call]
        if isinstance(command, str):
            command = command.encode()
        try:
            if self._writer is not None and self._writer.is_closing():
                # Python 3.12 would fail in writelines, and not with an OSError.
                raise ConnectionResetError("the other side has closed it")
            async with asyncio.timeout(self.socket_timeout):
                await self._send_packed_command(
                    [command] if isinstance(command, bytes) else command
                )
        except TimeoutError:
            await self.disconnect()
            raise RedisTimeoutError("Redis takes nothing in") from None
        except OSError as error:
            await self.disconnect()
            raise RedisConnectionError(f"the connection broke: {error}") from error
        except BaseException:
            # Half a command may be on its way: the connection cannot be used again.
            await self.disconnect()
            raise


class _Tcp(Lean, Connection):
    pass


class _Tls(Lean, SSLConnection):
    pass


class _Unix(Lean, UnixDomainSocketConnection):
    pass


_LEAN = {Connection: _Tcp, SSLConnection: _Tls, UnixDomainSocketConnection: _Unix}
