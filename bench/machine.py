"""Processes on cores of their own, and what they take of the machine."""

import bisect
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self
from urllib.error import HTTPError
from urllib.request import urlopen

import cli.processes
from cli.processes import end_with_parent, module, module_env

CORES = sorted(os.sched_getaffinity(0))
FRONT = {CORES[0]}
"""For the process that clients talk to, which is what is measured."""
REST = {CORES[1]} if len(CORES) > 1 else FRONT
"""For everything else."""
READY_SECONDS = 30.0
STOP_SECONDS = 2.0
_TICK = os.sysconf("SC_CLK_TCK")


class Process:
    """One that runs for as long as the block is."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        self._popen = popen
        self.pid = popen.pid

    def cpu_seconds(self) -> float:
        """Its own, and that of its children, as nginx has one."""
        return sum(_cpu_seconds(pid) for pid in [self.pid, *_children(self.pid)])

    def rss_kib(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1])
        raise LookupError(f"the memory of process {self.pid} is not told")


@contextmanager
def process(
    argv: Sequence[str], cores: set[int], env: Mapping[str, str] | None = None
) -> Iterator[Process]:
    popen = subprocess.Popen(
        argv,
        env={**module_env(), **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=None if os.environ.get("BENCH_LOUD") else subprocess.DEVNULL,
        preexec_fn=on(cores),
    )
    try:
        yield Process(popen)
    finally:
        popen.terminate()
        try:
            popen.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            popen.kill()  # A worker whose answer is not finished would wait for it.
            popen.wait()


def python(name: str, *arguments: object) -> list[str]:
    return [*module(name), *map(str, arguments)]


def on(cores: set[int]) -> Callable[[], None]:
    """For preexec_fn: a child on these cores, which ends when we do."""
    end_with_us = end_with_parent()

    def in_child() -> None:
        os.sched_setaffinity(0, cores)
        if end_with_us is not None:
            end_with_us()

    return in_child


def free_port() -> int:
    return cli.processes.free_port("127.0.0.1", 0)


def wait_for(what: str, is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + READY_SECONDS
    while not is_so():
        if time.monotonic() > until:
            raise TimeoutError(f"waited in vain: {what}")
        time.sleep(0.02)


def wait_until(port: int, path: str = "") -> None:
    """Return when somebody listens there, or answers `path` by a status below 500."""
    wait_for(f"port {port}", lambda: _answers(port, path) if path else _listens(port))


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def _answers(port: int, path: str) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=2):
            return True
    except HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def describe() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown processor",
    )
    return f"{model}, {len(CORES)} cores, Python {sys.version.split()[0]}"


def percentile(values: Sequence[float], percent: int) -> float:
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Meter:
    """How much processor a process takes, and when."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def cpu_seconds(self, begun: float, ended: float) -> float:
        """Between two moments of time.monotonic."""
        return self._at(ended) - self._at(begun)

    def _at(self, moment: float) -> float:
        after = bisect.bisect(self._samples, (moment, 0.0))
        if after in (0, len(self._samples)):
            return self._samples[min(after, len(self._samples) - 1)][1]
        (early, less), (late, more) = self._samples[after - 1 : after + 1]
        return less + (more - less) * (moment - early) / (late - early)

    def _sample(self) -> None:
        while True:
            self._samples.append((time.monotonic(), self._process.cpu_seconds()))
            if self._stop.wait(0.05):
                return
