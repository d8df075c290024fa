"""How long it takes to begin (target 10)."""

import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

from bench.machine import free_port, median, python, wait_until
from bench.report import Report, Target
from cli.processes import module_env

RUNS = 5


@dataclass
class StartUp:
    """Medians, in seconds."""

    import_api: float
    import_worker: float
    up_ready: float
    """From `relay up` to the first 200 of /readyz."""


def report(quick: bool) -> Report:
    found = StartUp(_import("api.app"), _import("worker.main"), median([_up() for _ in range(3)]))
    return Report(
        "until it is there, s",
        ["import api.app", "import worker.main", "relay up ready"],
        {
            "relay": [
                f"{found.import_api:.2f}",
                f"{found.import_worker:.2f}",
                f"{found.up_ready:.2f}",
            ]
        },
        [
            Target("10 import api.app, s", found.import_api, 0.8),
            Target("10 import worker.main, s", found.import_worker, 0.8),
            Target("10 relay up ready, s", found.up_ready, 3),
        ],
        asdict(found),
    )


def _import(name: str) -> float:
    """What the import takes beyond starting Python."""
    return median([_timed(f"import {name}") - _timed("pass") for _ in range(RUNS)])


def _timed(code: str) -> float:
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", code], env=module_env(), check=True)
    return time.monotonic() - begun


def _up() -> float:
    port = free_port()
    with tempfile.TemporaryDirectory() as data:
        begun = time.monotonic()
        argv = [*python("cli"), "up", "--port", str(port), "--data", data]
        running = subprocess.Popen(
            argv,
            env=module_env() | {"COLUMNS": "80"},
            cwd=data,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(port, "/readyz")
            return time.monotonic() - begun
        finally:
            running.terminate()
            running.wait()
