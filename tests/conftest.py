"""What tests stand on: a real Redis, the emulated upstream, and the whole stack in one loop."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import hypothesis
import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.exceptions import RedisError
from structlog.testing import capture_logs

from api.app import create_app
from api.counters import GIVEN_UP
from api.server import Server, create_server
from cli.processes import end_with_parent
from cli.redis_server import RedisServer, find_redis_server
from emulator.app import Emulator
from emulator.script import prompt
from emulator.serve import serve
from relay import keys
from relay.claim import Claim, Claims, Released
from relay.connection import connect
from relay.events import Entry
from relay.log import Appended, Batch, Log
from relay.logs import configure_logs
from relay.settings import Settings, variables
from tests.receiver import Names
from worker.claiming import ClaimingWorker
from worker.main import create_worker

ROOT = Path(__file__).parent.parent
T = TypeVar("T")

# By a clock no example is wrong: a busy machine may stand still within any, and in a fresh clone
# the first one waits for the tables of Unicode.
hypothesis.settings.register_profile(
    "no clock",
    hypothesis.settings(),
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("no clock")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the environment nor a `.env` of whoever runs the tests has a say in them."""
    for variable in variables():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setitem(Settings.model_config, "env_file", None)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """Whatever a script starts by `&` ignores Ctrl-C, and so would the commands under test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _logs() -> None:
    configure_logs("test", "text")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real redis-server for the whole run; RELAY_REDIS_SERVER chooses which."""
    binary = find_redis_server(os.environ.get("RELAY_REDIS_SERVER"))
    server = RedisServer(binary, Path(tmp_path_factory.mktemp("redis")))
    server.open()
    process = subprocess.Popen(
        server.argv,
        pass_fds=server.pass_fds,
        preexec_fn=end_with_parent(),  # noqa: PLW1509 - before there is any thread
    )
    try:
        with SyncRedis.from_url(server.url) as redis:
            for _ in range(500):
                with suppress(RedisError):
                    redis.ping()
                    break
                time.sleep(0.02)
        yield server
    finally:
        process.terminate()
        process.wait(10)
        server.close()


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """A client of the real server, which is empty."""
    async with connect(redis_server.url) as redis:
        await redis.flushall()
        yield redis


@asynccontextmanager
async def redis_user(redis: Redis, server: RedisServer, *rules: str) -> AsyncIterator[str]:
    """The URL for a user of Redis to whom these rules of its ACL apply."""
    admin: Any = redis
    await admin.execute_command("ACL", "SETUSER", "us", "on", ">PASSWORD", *rules)
    try:
        yield f"{server.url}&username=us&password=PASSWORD"
    finally:
        await admin.execute_command("ACL", "DELUSER", "us")


def make_log(redis: Redis, **changes: int) -> Log:
    return Log(redis, **({"open_ms": 60_000, "retention_ms": 60_000, "queue_limit": 100} | changes))


def make_claims(redis: Redis, worker: str = "w", **changes: int) -> Claims:
    limits = {
        "lease_ms": 5_000,
        "open_ms": 60_000,
        "retention_ms": 60_000,
        "queue_limit": 100,
        "max_attempts": 3,
    }
    return Claims(redis, worker, **(limits | changes))


async def claim_one(redis: Redis, worker: str = "w") -> Claim:
    [claim] = await make_claims(redis, worker).claim(1)
    return claim


async def set_state(redis: Any, stream_id: str, name: str, value: int) -> None:
    await redis.hset(keys.state(stream_id), name, value)


def ends(released: Iterable[Released]) -> list[tuple[str, str]]:
    """Streams that were let go of, and the kind of their terminal events."""
    return [(each.stream_id, each.ended) for each in released]


def flat(entries: Sequence[Entry]) -> list[str | bytes]:
    """As a Batch has them."""
    return [part for entry in entries for part in entry]


async def append(log: Log, claim: Claim, first: int, entries: Sequence[Entry]) -> Appended:
    """What one attempt appends, alone in its call."""
    batch = Batch(claim.stream_id, claim.attempt, claim.owner, first, flat(entries))
    [outcome] = await log.append([batch])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@pytest.fixture
def log(redis: Redis) -> Log:
    return make_log(redis)


@pytest.fixture
def claims(redis: Redis) -> Claims:
    return make_claims(redis)


@pytest.fixture
async def emulator() -> Emulator:
    return Emulator()


@pytest.fixture
async def emulator_url(emulator: Emulator) -> AsyncIterator[str]:
    async with serve(emulator) as url:
        yield url


def stack_settings(redis_url: str, emulator_url: str, **changes: Any) -> Settings:
    return Settings(
        redis_url=redis_url,
        port=0,
        drain_seconds=0,
        azure_endpoint=emulator_url,
        azure_key="key",
        azure_deployment="demo",
        **changes,
    )


@pytest.fixture
def settings(redis: Redis, redis_server: RedisServer, emulator_url: str) -> Settings:
    """Those of a stack on the real Redis and the emulated upstream."""
    return stack_settings(redis_server.url, emulator_url)


def given_up() -> float:
    """How many viewers an operator is told of that took nothing for too long."""
    [family] = GIVEN_UP.collect()
    return family.samples[0].value


@pytest.fixture
def said() -> Iterator[list[Any]]:
    """What our own lines say, each as its parts."""
    with capture_logs() as lines:
        yield lines


def events_of(lines: list[Any]) -> list[str]:
    """What they say has happened."""
    return [line["event"] for line in lines]


def changed(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update=changes)


@asynccontextmanager
async def running_api(settings: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    """A real uvicorn in this loop, and a client of it."""
    server: Server = create_server(create_app(settings), settings)
    running = asyncio.create_task(server.serve())
    while not server.started:
        if running.done():
            running.result()
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        async with httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False
        ) as http:
            await until_ready(http)
            yield http
    finally:
        server.should_exit = True
        await running


async def make_due(redis: Redis, stream_id: str) -> None:
    """As if the time until its webhook's next try, or the lease of this one, were over."""
    await redis.zadd(keys.WEBHOOKS, {stream_id: 1}, xx=True)


async def due_in_ms(redis: Redis, stream_id: str) -> float:
    """How long it is until its webhook is tried; negative if it is not to be, or is due."""
    seconds, micros = await redis.time()
    due_ms: float = await redis.zscore(keys.WEBHOOKS, stream_id) or 0
    return due_ms - (int(seconds) * 1000 + int(micros) / 1000)


async def until_ready(http: httpx2.AsyncClient) -> None:
    async def ready() -> bool:
        return (await http.get("/readyz")).status_code == 200

    await until(ready)


async def until(holds: Callable[[], Awaitable[bool]], seconds: float = 5) -> None:
    """Wait for what only asking can tell."""
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running_worker(settings: Settings) -> AsyncIterator[ClaimingWorker]:
    """A worker in this loop. Leaving the block is a SIGTERM without grace."""
    worker = create_worker(settings, handle_signals=False)
    running = asyncio.create_task(worker.async_run())
    try:
        yield worker
    finally:
        running.cancel()
        await asyncio.wait([running])
        await worker.close()


def worker_env(settings: Settings) -> dict[str, str]:
    """What a worker process needs from its environment to be one of this stack."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "REDIS_URL": settings.redis_url,
        "AZURE_OPENAI_ENDPOINT": str(settings.azure_endpoint),
        "AZURE_OPENAI_KEY": "key",
        "AZURE_OPENAI_CHATGPT_DEPLOYMENT": "demo",
    } | {name: value for name, value in os.environ.items() if name.startswith("COVERAGE")}


FEW = 64


def few_descriptors(argv: Sequence[str]) -> list[str]:
    """The same process with a soft limit that is FEW, and the hard one as it is."""
    return ["sh", "-c", f'ulimit -S -n {FEW} && exec "$@"', "sh", *argv]


async def warning_of_few_descriptors(process: Process) -> bytes:
    """The first one, when it has hardly more than it has taken already; and the limit stands in
    it."""
    taken = len(os.listdir(f"/proc/{process.pid}/fd"))
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (taken + 1, taken + 1))
    assert process.stderr is not None
    async with asyncio.timeout(10):
        while b"descriptors_low" not in (line := await process.stderr.readline()):
            assert line
    assert f"most={taken + 1}\n".encode() in line
    return line


@asynccontextmanager
async def worker_process(
    env: dict[str, str],
    tmp_path: Path,
    *arguments: str,
    argv: Sequence[str] = (sys.executable, "-m", "worker"),
) -> AsyncIterator[Process]:
    """`python -m worker` where no `.env` lies; killed if it still runs at the end."""
    process = await asyncio.create_subprocess_exec(
        *argv, *arguments, env=env, cwd=tmp_path, stderr=PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """What names lead to, in this process."""
    names = Names()
    monkeypatch.setattr("socket.getaddrinfo", names.getaddrinfo)
    return names


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    async with running_api(settings) as http:
        yield http


@pytest.fixture
async def worker(settings: Settings) -> AsyncIterator[ClaimingWorker]:
    async with running_worker(settings) as worker:
        yield worker


@pytest.fixture
def stack(api: httpx2.AsyncClient, worker: ClaimingWorker) -> httpx2.AsyncClient:
    """API, worker, upstream and Redis; its value is a client of the API."""
    return api


def asking(**script: Any) -> dict[str, Any]:
    """The body of a request to which the upstream answers by this emulator script."""
    return {"messages": [{"role": "user", "content": prompt(**script)}]}


async def ask(http: httpx2.AsyncClient, **script: Any) -> str:
    response = await http.post("/chat", json=asking(**script))
    assert response.status_code == 202, response.text
    return str(response.json()["stream_id"])


async def watch(
    http: httpx2.AsyncClient,
    stream_id: str,
    after: str = "",
    *,
    watching: asyncio.Event | None = None,
) -> list[httpx2.ServerSentEvent]:
    """All events until the server closes; `watching` is set at the first."""
    headers = {"last-event-id": after} if after else {}
    events = []
    async with http.sse(f"/streams/{stream_id}/events", headers=headers) as source:
        async for event in source:
            if event.data:
                events.append(event)
                if watching is not None:
                    watching.set()
    return events


async def until_broken_off(arriving: AsyncIterator[T]) -> list[T]:
    """What still came on a connection that did not get its proper end."""
    came = []
    try:
        async for each in arriving:
            came.append(each)
    except httpx2.RemoteProtocolError:
        return came
    pytest.fail("It ended as if that had been all.")


async def reported_before(redis: Redis, stream_id: str, process: str, seconds: int) -> None:
    """As if that process had reported so many seconds ago, and not again."""
    now, _ = await redis.time()
    noted: Any = redis.hset(keys.viewers(stream_id), process, f"[9, {now - seconds}]")
    await noted


def text_of(events: list[httpx2.ServerSentEvent]) -> str:
    """What a viewer that keeps the one rule has on its screen."""
    text = ""
    for event in events:
        data: Any = event.json()
        text = "" if event.event == "started" else text + data.get("text", "")
    return text
