"""What is compared: each way of serving chat answers, as processes that run for a block."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.load import Load, post
from bench.machine import FRONT, REST, Process, free_port, process, python, wait_for, wait_until
from bench.peers import nchan as peer
from cli.redis_server import find_redis_server

PEERS = Path(__file__).parent / "peers"


@dataclass
class System:
    """One that runs."""

    port: int
    front: Process
    rest: dict[str, Process]
    redis_url: str = ""
    path: str = "/chat"
    follows: bool = False
    """Whether it is asked in two requests, of which the second streams."""
    publish: str = ""
    """Where chunks are to be sent, if it does not ask for an answer itself."""

    def load(self, asked: str, chunks: int, count: int, **more: Any) -> Load:
        """`count` clients that ask each, and follow the answer."""
        body = {"messages": [{"role": "user", "content": asked}]}
        accept = "*/*" if self.follows else "text/event-stream"
        request = post(self.path, body, accept).decode()
        options = {"follow": self.follows, **more}
        return Load(port=self.port, count=count, request=request, chunks=chunks, **options)


@dataclass(frozen=True)
class Cores:
    front: set[int] = field(default_factory=lambda: FRONT)
    rest: set[int] = field(default_factory=lambda: REST)
    """Of worker and Redis; the upstream and the clients are on REST always."""


Start = Callable[[], AbstractContextManager[System]]
ALL_ON_ONE = Cores(FRONT, FRONT)


@contextmanager
def upstream(_: Cores = Cores()) -> Iterator[System]:
    """Nothing at all between the client and the upstream: what the measuring itself costs."""
    port = free_port()
    with process(python("bench.upstream", port), REST) as front:
        wait_until(port)
        path = "/openai/deployments/demo/chat/completions?api-version=1"
        yield System(port, front, {}, path=path)


@contextmanager
def direct(cores: Cores = Cores(), name: str = "direct") -> Iterator[System]:
    with ExitStack() as stack:
        model = stack.enter_context(upstream())
        url, port = f"http://127.0.0.1:{model.port}", free_port()
        front = stack.enter_context(process(python(f"bench.peers.{name}", port, url), cores.front))
        wait_until(port, "/docs")
        yield System(port, front, {"upstream": model.front})


@contextmanager
def tutorial(cores: Cores = Cores()) -> Iterator[System]:
    with direct(cores, "tutorial") as system:
        yield system


@contextmanager
def redis(cores: set[int]) -> Iterator[tuple[Process, str]]:
    """As the compose file has it, and its URL."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        socket = f"{folder}/redis.sock"
        argv = [find_redis_server(), "--port", "0", "--unixsocket", socket, "--dir", folder]
        argv += ["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]
        with process(argv, cores) as running:
            wait_for("a Redis", Path(socket).exists)
            yield running, f"unix://{socket}"


@contextmanager
def relay(cores: Cores = Cores(), *, follows: bool = False) -> Iterator[System]:
    """API, worker and Redis of this project."""
    with ExitStack() as stack:
        model = stack.enter_context(upstream())
        store, url = stack.enter_context(redis(cores.rest))
        port = free_port()
        env = relay_env(url, model, concurrency=1000) | {"RELAY_PORT": str(port)}
        worker = stack.enter_context(process(python("worker"), cores.rest, env))
        front = stack.enter_context(process(python("api"), cores.front, env))
        wait_until(port, "/readyz")
        rest = {"worker": worker, "redis": store, "upstream": model.front}
        yield System(port, front, rest, url, follows=follows)


def relay_env(redis_url: str, model: System, *, concurrency: int) -> dict[str, str]:
    """For API and worker, over this Redis and this upstream."""
    return {
        "REDIS_URL": redis_url,
        "RELAY_CONCURRENCY": str(concurrency),
        "AZURE_OPENAI_ENDPOINT": f"http://127.0.0.1:{model.port}",
        "AZURE_OPENAI_KEY": "k",
        "AZURE_OPENAI_CHATGPT_DEPLOYMENT": "demo",
    }


@contextmanager
def relay_in_two(cores: Cores = Cores()) -> Iterator[System]:
    with relay(cores, follows=True) as system:
        yield system


@contextmanager
def naive(cores: Cores = Cores()) -> Iterator[System]:
    with ExitStack() as stack:
        model = stack.enter_context(upstream())
        store, url = stack.enter_context(redis(cores.rest))
        port = free_port()
        env = {"REDIS_URL": url, "UPSTREAM": f"http://127.0.0.1:{model.port}"}
        argv = python("arq", "bench.peers.naive.Worker")
        worker = stack.enter_context(process(argv, cores.rest, env))
        argv = python("bench.peers.naive", port)
        front = stack.enter_context(process(argv, cores.front, env))
        wait_until(port, "/docs")
        rest = {"worker": worker, "redis": store, "upstream": model.front}
        yield System(port, front, rest, url, follows=True)


@contextmanager
def resumable_stream(cores: Cores = Cores(), *, follows: bool = False) -> Iterator[System]:
    """The npm package of that name. Raises LookupError without Node and npm."""
    folder = PEERS / "resumable"
    if (npm := shutil.which("npm")) is None:
        raise LookupError("npm is not installed")
    if not (folder / "node_modules").exists():
        argv = [npm, "ci", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(argv, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with ExitStack() as stack:
        model = stack.enter_context(upstream())
        store, url = stack.enter_context(redis(cores.rest))
        port = free_port()
        argv = ["node", str(folder / "server.mjs"), str(port)]
        argv += [f"http://127.0.0.1:{model.port}", url.removeprefix("unix://")]
        front = stack.enter_context(process(argv, cores.front))
        wait_until(port)
        rest = {"redis": store, "upstream": model.front}
        yield System(port, front, rest, path="/follow" if follows else "/chat", follows=follows)


@contextmanager
def nchan(cores: Cores = Cores()) -> Iterator[System]:
    """A fan-out alone. Raises LookupError where it cannot be had."""
    with peer.nchan(cores.front) as (front, port):
        yield System(port, front, {}, path=peer.WATCH, publish=peer.PUBLISH)
