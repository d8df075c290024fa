"""A redis-server that a test runs, kills and starts again."""

import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cli.processes import send, spawn
from cli.redis_server import RedisServer


class RedisProcess(RedisServer):
    process: Process

    async def start(self) -> None:
        """Also again after kill(), on the same data and socket."""
        self.process = await spawn(self.argv, pass_fds=self.pass_fds)
        await self.ready(self.process)

    async def kill(self) -> None:
        send(self.process, signal.SIGKILL)
        await self.process.wait()


@asynccontextmanager
async def running_redis(binary: str, data: Path, *options: str) -> AsyncIterator[RedisProcess]:
    """One on this folder, which is stopped in order at the end."""
    server = RedisProcess(binary, data)
    server.open()
    server.argv += options
    try:
        await server.start()
        yield server
    finally:
        send(server.process, signal.SIGTERM)
        await server.process.wait()
        server.close()
