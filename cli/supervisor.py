"""Keeps processes alive, and ends them all together."""

import asyncio
import contextlib
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from cli.processes import send, spawn
from relay.errors import ConfigurationError

READY_SECONDS = 30.0
RESTART_SECONDS = 30.0
BACKOFF_SECONDS = (0.0, 0.25, 0.5, 1.0)  # one more death within RESTART_SECONDS ends it all
STOP_SECONDS = (1.0, 1.5, 2.0)  # when the children of each stage are killed, from the longest grace
FRONT, UPSTREAM, STORE = range(3)  # the stages, in the order in which they are stopped

Ready = Callable[[Process], Awaitable[None]]


async def at_once(_: Process) -> None:
    """For a child that nobody has to wait for."""


@dataclass(frozen=True)
class Child:
    """A process to keep alive. `ready` returns when the process it is given can be used."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(repr=False)  # it holds keys
    ready: Ready = at_once
    stage: int = FRONT
    pass_fds: Sequence[int] = ()
    piped: bool = False
    grace: float = 2.0  # seconds that it may need to end in order
    bounded: bool = True  # `ready` has no limit of its own
    log: Path | None = None  # where it says why it ends, if not on our stderr


class Ended(Exception):
    """Ends the supervisor; the message is the sentence that says why, empty after stop()."""


class Supervisor:
    """Starts the children in their order, keeps each alive, and ends them all together."""

    def __init__(self, children: Sequence[Child], report: Callable[[str], None]) -> None:
        self.children = children
        self.processes: dict[str, Process] = {}
        self._report = report
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """End every child in order, within 3 s and the longest grace among them; a second call
        kills what is left at once."""
        if self._stop.is_set():
            _send_all(self.processes.values(), signal.SIGKILL)
        self._stop.set()

    async def run(self, announce: Callable[[], None]) -> str | None:
        """Run until stop(): None. Or until a child cannot be kept alive: a sentence saying which.

        `announce` is called when all are ready. No child is left in any case.
        """
        reasons: list[str] = []
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._until_stopped())
                for child in self.children:
                    ready = asyncio.Event()
                    group.create_task(self._keep(child, ready))
                    await ready.wait()
                announce()
        except* Ended as ended:
            reasons = [str(reason) for reason in ended.exceptions if str(reason)]
        finally:
            await self._end_all()
        return " ".join(reasons) or None

    async def _until_stopped(self) -> None:
        await self._stop.wait()
        raise Ended

    async def _keep(self, child: Child, ready: asyncio.Event) -> None:
        deaths: deque[float] = deque(maxlen=len(BACKOFF_SECONDS) + 1)
        while True:
            ending = _ending(code := await self._run_once(child, ready))
            if child.log is not None:
                ending += f" ({child.log} says why)"
            if code == 2:
                raise Ended(f"{child.name} {ending}: its settings are wrong, so all is stopped.")
            now = asyncio.get_running_loop().time()
            deaths.append(now)
            recent = sum(now - death <= RESTART_SECONDS for death in deaths)
            if recent > len(BACKOFF_SECONDS):
                raise Ended(
                    f"{child.name} {ending}, {recent} times within {RESTART_SECONDS:.0f} s, "
                    "so all is stopped."
                )
            self._report(f"{child.name} {ending}; starting it again.")
            await asyncio.sleep(BACKOFF_SECONDS[recent - 1])

    async def _run_once(self, child: Child, ready: asyncio.Event) -> int:
        """One life of a child, from its start to its exit code."""
        try:
            stdout = PIPE if child.piped else None
            process = await spawn(child.argv, child.env, child.pass_fds, stdout)
        except OSError as error:
            raise Ended(f"{child.name} cannot be started: {error.strerror}.") from None
        self.processes[child.name] = process
        ended = asyncio.create_task(process.wait())
        answers = asyncio.create_task(_in_time(child, process))
        try:
            await asyncio.wait({ended, answers}, return_when=asyncio.FIRST_COMPLETED)
            if process.returncode is None:
                answers.result()
                ready.set()
                await _forward(process)
            return await ended
        finally:
            ended.cancel()
            answers.cancel()
            await asyncio.gather(ended, answers, return_exceptions=True)

    async def _end_all(self) -> None:
        grace = max((child.grace for child in self.children), default=0.0)
        latest = asyncio.get_running_loop().time() + grace
        for stage, seconds in enumerate(STOP_SECONDS):
            names = {child.name for child in self.children if child.stage == stage}
            stage_processes = [self.processes[name] for name in names & self.processes.keys()]
            left = latest + seconds - asyncio.get_running_loop().time()
            await _end(stage_processes, left)


def says(beginning: str) -> Ready:
    """Ready when a piped child prints a line that begins so; what it prints is passed on."""

    async def ready(process: Process) -> None:
        if not await _forward(process, beginning):
            await asyncio.Event().wait()  # It will never say so: it ends, or its time does.

    return ready


def answers_at(url: str) -> Ready:
    """Ready when GET answers 200."""

    async def ready(_: Process) -> None:
        # No trust_env: a proxy from the environment must not stand between us and our own child.
        async with httpx2.AsyncClient(trust_env=False, timeout=2.0) as client:
            while True:
                with contextlib.suppress(httpx2.TransportError):
                    if (await client.get(url)).status_code == 200:
                        return
                await asyncio.sleep(0.05)

    return ready


async def _end(processes: Sequence[Process], seconds: float) -> None:
    if not processes:
        return
    waits = [asyncio.create_task(process.wait()) for process in processes]
    _send_all(processes, signal.SIGTERM)
    _, late = await asyncio.wait(waits, timeout=max(seconds, 0))
    if late:
        _send_all(processes, signal.SIGKILL)
        await asyncio.wait(waits, timeout=0.5)


def _send_all(processes: Iterable[Process], number: signal.Signals) -> None:
    for process in processes:
        send(process, number)


async def _in_time(child: Child, process: Process) -> None:
    try:
        async with asyncio.timeout(READY_SECONDS if child.bounded else None):
            await child.ready(process)
    except TimeoutError:
        raise Ended(f"{child.name} was not ready within {READY_SECONDS:.0f} s.") from None
    except ConfigurationError as error:
        raise Ended(error.message) from None


async def _forward(process: Process, until: str | None = None) -> bool:
    """Pass on what a piped child prints, up to a line that begins with `until`, or to its end;
    whether there was such a line."""
    while process.stdout and (line := (await process.stdout.readline()).decode(errors="replace")):
        with contextlib.suppress(OSError):  # A full disk under it must not end what is served.
            sys.stdout.write(line)
            sys.stdout.flush()
        if until is not None and line.startswith(until):
            return True
    return False


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was ended by signal {-code} ({signal.strsignal(-code)})"
