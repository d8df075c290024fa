"""Processes of ours: how they are started and signalled, and where they listen."""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import sysconfig
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from relay.errors import ConfigurationError


def module(name: str) -> list[str]:
    """The argv of `python -m NAME`, with our NAME even where the user's folder has one too."""
    return [sys.executable, "-P", "-m", name]


def module_env() -> dict[str, str]:
    """The environment in which module() finds our packages, also in a checkout not installed."""
    root = str(Path(__file__).resolve().parent.parent)
    if root == sysconfig.get_path("purelib"):
        return dict(os.environ)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


async def spawn(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    stdout: int | None = None,
    stderr: int | None = None,
    cwd: Path | None = None,
    ended_by: signal.Signals = signal.SIGTERM,
) -> Process:
    """Start a child that the terminal's Ctrl-C does not reach and that on Linux does not outlive
    us: when we die it is sent `ended_by`."""
    return await asyncio.create_subprocess_exec(
        *argv,
        env=env,
        stdin=DEVNULL,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        pass_fds=pass_fds,
        start_new_session=True,
        preexec_fn=end_with_parent(ended_by),
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


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises ConfigurationError if it cannot be bound."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # As the API binds it: a port that only has old connections in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            bound: int = probe.getsockname()[1]
            return bound
    except (OSError, UnicodeError) as error:  # The latter of a name that is none.
        reason = getattr(error, "strerror", error)
        raise ConfigurationError(
            f"Port {port} of {host} cannot be used ({reason}): choose another with "
            "--port, RELAY_PORT or RELAY_HOST."
        ) from None


def base_url(host: str, port: int) -> str:
    """Where a client on this machine reaches an API that is bound to `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
