"""The stack under test: one Redis, one emulated upstream, API and worker processes, each of which
reaches Redis through a proxy of its own."""

import asyncio
import os
import random
import shutil
import signal
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import httpx2
from redis.asyncio import Redis
from redis.exceptions import RedisError

from chaos.proxy import Proxy
from cli.processes import free_port, module, module_env, spawn
from cli.redis_server import OPTIONS, find_redis_server
from relay.connection import connect
from relay.errors import ConfigurationError

APIS = 2
WORKERS = 3
JOURNAL = 1_000_000
READY_SECONDS = 30.0
TERM_SECONDS = 20.0
"""For a SIGTERM: three times what grace and drain take on a busy machine."""
SETTINGS = {
    "AZURE_OPENAI_KEY": "key",
    "AZURE_OPENAI_CHATGPT_DEPLOYMENT": "demo",
    "RELAY_GRACE_SECONDS": "2",
    "RELAY_LEASE_SECONDS": "5",
}
# Below the ports that the machine gives to connections: a process that starts again must not find
# its port taken by one of them.
_PORTS = (20_000, 30_000)
_KILL_CODE = -signal.SIGKILL


class Child:
    """A process that is started again at once whenever it ends, and says so if nobody meant it to.

    Its output is appended to `output`. `name` is unique in the run.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        folder: Path,
        env: Mapping[str, str],
        *,
        is_ready: Callable[["Child"], Awaitable[bool]],
        complain: Callable[[str, str], None],
        proxy: Proxy | None = None,
    ) -> None:
        self.name = name
        self.proxy = proxy
        self.output = folder / f"{name}.log"
        self.process: Process | None = None
        self._argv, self._folder, self._env = argv, folder, env
        self._is_ready = is_ready
        self._complain = complain
        self._said_before = 0
        self._meant_to_end: Process | None = None
        self._wanted = asyncio.Event()
        self._wanted.set()

    async def run(self) -> None:
        """Keep it running until cancelled; then it is killed."""
        try:
            while True:
                await self._wanted.wait()
                with self.output.open("ab") as output:
                    self._said_before = output.tell()
                    self.process = await spawn(
                        self._argv,
                        self._env,
                        stdout=output.fileno(),
                        stderr=output.fileno(),
                        # Where no `.env` is.
                        cwd=self._folder,
                        # Which ends a stopped process, too.
                        ended_by=signal.SIGKILL,
                    )
                code = await self.process.wait()
                if self.process is not self._meant_to_end:
                    self._complain(self.name, f"exited by itself with code {code}: {self._last()}")
                    await asyncio.sleep(1)
        finally:
            if self.process is not None:
                with suppress(ProcessLookupError):
                    self.process.kill()
                await self.process.wait()

    def send(self, number: signal.Signals) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL; returns when it is dead."""
        if process := self.process:
            self._meant_to_end = process
            self.send(signal.SIGKILL)
            await process.wait()

    async def terminate(self) -> None:
        """SIGTERM; returns when it has ended, and complains if it does not in time or not well."""
        process = self.process
        if process is None:
            return
        self._meant_to_end = process
        self.send(signal.SIGTERM)
        try:
            async with asyncio.timeout(TERM_SECONDS):
                code = await process.wait()
        except TimeoutError:
            self._complain(self.name, f"still runs {TERM_SECONDS} s after SIGTERM: {self._last()}")
            self.send(signal.SIGKILL)
        else:
            # uvicorn ends by the signal that it was sent.
            if code not in {0, -signal.SIGTERM, _KILL_CODE}:
                self._complain(self.name, f"SIGTERM made it exit with code {code}: {self._last()}")

    def hold(self) -> None:
        """Do not start it again before release()."""
        self._wanted.clear()

    def release(self) -> None:
        self._wanted.set()

    async def ready(self) -> None:
        """Return when the process that runs now can do its work; complains if that takes 30 s."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                while self.process is None or self.process.returncode is not None:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                while not await self._is_ready(self):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        except TimeoutError:
            self._complain(self.name, f"not ready after {READY_SECONDS} s: {self._last()}")

    def said(self) -> str:
        """What the process that runs now has written."""
        with self.output.open("rb") as output:
            output.seek(self._said_before)
            return output.read().decode(errors="replace")

    def _last(self) -> str:
        lines = self.said().strip().splitlines()
        return lines[-1] if lines else "it said nothing"


class Stack:
    """`complaints` are those of the processes, each with its time.monotonic(), the process' name
    and a sentence."""

    def __init__(
        self,
        folder: Path,
        *,
        apis: int = APIS,
        workers: int = WORKERS,
        settings: Mapping[str, str] = SETTINGS,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.redis_binary = find_redis_server(os.environ.get("RELAY_REDIS_SERVER"))
        self.redis_data = folder / "redis"
        self.redis_port = _free_port()
        self.redis_url = f"redis://127.0.0.1:{self.redis_port}/0"
        self.complaints: list[tuple[float, str, str]] = []
        self.urls = [f"http://127.0.0.1:{_free_port()}" for _ in range(apis)]
        self.upstream_url = f"http://127.0.0.1:{_free_port()}"
        self._workers = workers
        self.apis: list[Child] = []
        self.workers: list[Child] = []
        self.redis = self._child("redis", self._redis_argv(), {}, _answers_ping(self.redis_url))
        emulator = [*module("emulator"), "--port", self.upstream_url.rpartition(":")[2]]
        self.emulator = self._child(
            "emulator", [*emulator, "--journal", str(JOURNAL)], {}, _says("emulator ready")
        )

    @asynccontextmanager
    async def running(self, http: httpx2.AsyncClient) -> AsyncIterator[Redis]:
        """All processes run in the block; its value is a client of Redis, past all proxies."""
        self.redis_data.mkdir()
        async with AsyncExitStack() as leaving:
            redis = await leaving.enter_async_context(connect(self.redis_url))
            for number in range(len(self.urls) + self._workers):
                proxy = await leaving.enter_async_context(Proxy(self.redis_port))
                self._add(number, proxy, http)
            runs = [asyncio.create_task(child.run()) for child in self.children]
            leaving.push_async_callback(_end, runs)
            for child in self.children:
                await child.ready()
            yield redis

    @property
    def children(self) -> list[Child]:
        return [self.redis, self.emulator, *self.apis, *self.workers]

    async def heal(self, redis: Redis) -> None:
        """End every fault that lasts, and return when all processes are ready again."""
        for child in self.children:
            child.release()
            child.send(signal.SIGCONT)
            if child.proxy is not None:
                child.proxy.heal()
        await self.redis.ready()
        await redis.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call]
        await redis.config_set("maxmemory", 0)
        for child in self.children:
            await child.ready()

    def _add(self, number: int, proxy: Proxy, http: httpx2.AsyncClient) -> None:
        env = {"REDIS_URL": f"redis://127.0.0.1:{proxy.port}/0"}
        if number < len(self.urls):
            url = self.urls[number]
            env["RELAY_PORT"] = url.rpartition(":")[2]
            ready = _answers_http(http, f"{url}/readyz")
            self.apis.append(self._child(f"api-{number + 1}", module("api"), env, ready, proxy))
        else:
            name = f"worker-{number - len(self.urls) + 1}"
            ready = _says("worker_ready")
            self.workers.append(self._child(name, module("worker"), env, ready, proxy))

    def _child(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        is_ready: Callable[[Child], Awaitable[bool]],
        proxy: Proxy | None = None,
    ) -> Child:
        env = {**_outside(), **self.settings, "AZURE_OPENAI_ENDPOINT": self.upstream_url, **env}
        return Child(
            name,
            argv,
            self.folder,
            env,
            is_ready=is_ready,
            complain=self._complain,
            proxy=proxy,
        )

    def _complain(self, name: str, what: str) -> None:
        self.complaints.append((time.monotonic(), name, what))

    def _redis_argv(self) -> list[str]:
        options = {
            **{name: value for name, value in OPTIONS.items() if name != "unixsocketperm"},
            "port": str(self.redis_port),
            "bind": "127.0.0.1",
            "dir": str(self.redis_data),
            # A rewrite would move what the loss of the last second takes away.
            "auto-aof-rewrite-percentage": "0",
        }
        return [self.redis_binary, *(part for k, v in options.items() for part in (f"--{k}", v))]


def empty(folder: Path) -> None:
    """Remove all that is in a folder."""
    shutil.rmtree(folder)
    folder.mkdir()


def _free_port() -> int:
    while True:
        with suppress(ConfigurationError):
            return free_port("127.0.0.1", random.randrange(*_PORTS))  # noqa: S311


def _outside() -> dict[str, str]:
    """Our environment without what would configure the stack."""
    ours = ("RELAY_", "AZURE_", "OPENAI_", "REDIS_")
    return {name: value for name, value in module_env().items() if not name.startswith(ours)}


def _says(words: str) -> Callable[[Child], Awaitable[bool]]:
    async def is_ready(child: Child) -> bool:
        return words in child.said()

    return is_ready


def _answers_http(http: httpx2.AsyncClient, url: str) -> Callable[[Child], Awaitable[bool]]:
    async def is_ready(_: Child) -> bool:
        with suppress(httpx2.TransportError):
            return (await http.get(url)).status_code == 200
        return False

    return is_ready


def _answers_ping(url: str) -> Callable[[Child], Awaitable[bool]]:
    async def is_ready(_: Child) -> bool:
        async with Redis.from_url(url, socket_timeout=1) as redis:
            with suppress(RedisError, OSError):
                return bool(await redis.ping())
        return False

    return is_ready


async def _end(runs: list["asyncio.Task[None]"]) -> None:
    for run in runs:
        run.cancel()
    await asyncio.wait(runs)
