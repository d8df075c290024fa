"""Connections to Redis, and the Lua scripts that run in it."""

import asyncio
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.commands.core import AsyncScript
from redis.connection import HiredisRespSerializer
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.typing import EncodableT

# So short that a worker whose connection hangs can renew its lease by another in time.
ANSWER_SECONDS = 2.0
CONNECT_SECONDS = 1.0
WAIT_SECONDS = 2


def connect(url: str, *, connections: int = 50, answer_seconds: float = ANSWER_SECONDS) -> Redis:
    """A client whose every call ends: bounded connections, each with time limits."""
    options: dict[str, Any] = dict(parse_url(url))
    kind = options.pop("connection_class", Connection)
    pool = _Pool(
        **options,
        connection_class=_LEAN[kind],
        max_connections=connections,
        timeout=WAIT_SECONDS,
        socket_timeout=answer_seconds,
        socket_connect_timeout=CONNECT_SECONDS,
    )
    return Redis.from_pool(pool)


def script(redis: Redis, name: str) -> AsyncScript:
    return redis.register_script(_source(name))


@cache
def _source(name: str) -> str:
    folder = resources.files("relay") / "lua"
    return (folder / "_common.lua").read_text() + (folder / f"{name}.lua").read_text()


class _Pool(BlockingConnectionPool):
    async def release(self, connection: AbstractConnection) -> None:
        if not connection.is_connected:
            # What cut this one may have cut them all, and each would cost a time limit to find out.
            for idle in self._available_connections:
                await idle.disconnect(nowait=True)
        await super().release(connection)


class Lean(AbstractConnection):
    """redis-py bounds a write by asyncio.wait_for, which on Python 3.11 returns a result that came
    together with a cancel, and forgets the cancel: a task in a loop of calls would never end."""

    def pack_command(self, *args: EncodableT) -> list[bytes]:
        """By hiredis, as the synchronous redis-py has it: an append has many arguments."""
        return _packer.pack(*args)  # type: ignore[no-any-return, arg-type]

    async def read_message(self) -> Any:
        """The next thing that Redis says, however long that takes: a time limit of its own would
        cost each message of a channel more than all else."""
        parser: Any = self._parser
        try:
            return await parser.read_response()
        except OSError as error:
            raise RedisConnectionError(f"the connection broke: {error}") from error

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
            await self.disconnect(nowait=True)
            raise RedisTimeoutError("Redis takes nothing in") from None
        except OSError as error:
            await self.disconnect(nowait=True)
            raise RedisConnectionError(f"the connection broke: {error}") from error
        except BaseException:
            # Half a command may be on its way: the connection cannot be used again.
            await self.disconnect(nowait=True)
            raise


_packer = HiredisRespSerializer()


class _Tcp(Lean, Connection):
    pass


class _Tls(Lean, SSLConnection):
    pass


class _Unix(Lean, UnixDomainSocketConnection):
    pass


_LEAN = {Connection: _Tcp, SSLConnection: _Tls, UnixDomainSocketConnection: _Unix}
