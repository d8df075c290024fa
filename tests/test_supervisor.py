import asyncio
import os
import signal
import sys
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from cli.processes import module_env, spawn
from cli.redis_server import RedisServer, find_redis_server
from cli.supervisor import FRONT, STORE, UPSTREAM, Child, Supervisor, answers_at, says
from tests.listening import listening
from tests.receiver import answer
from tests.test_redis_server import watch

SLEEPS = "import time; time.sleep(60)"

# Prints `up` once it notes its name at SIGTERM; with an exit code, or staying if there is none.
NOTES = """
import signal, sys, time
name, file, code = sys.argv[1:]
def note(number, frame):
    with open(file, "a") as notes:
        print(name, file=notes)
    if code:
        raise SystemExit(int(code))
signal.signal(signal.SIGTERM, note)
print("up", flush=True)
while True:
    time.sleep(60)
"""

OWNER = """
import asyncio, os
from cli.supervisor import Child, Supervisor

async def print_pid(process):
    print("pid", process.pid, flush=True)

child = Child("sleeper", ["sleep", "60"], os.environ, print_pid)
asyncio.run(Supervisor([child], print).run(lambda: None))
"""


class Run:
    """A supervisor at work: its reports, and what came of it."""

    def __init__(self, *children: Child) -> None:
        self.reports: asyncio.Queue[str] = asyncio.Queue()
        self.ready = asyncio.Event()
        self.supervisor = Supervisor(children, self.reports.put_nowait)
        self.outcome = asyncio.create_task(self.supervisor.run(self.ready.set))

    def pid(self, name: str) -> int:
        return self.supervisor.processes[name].pid


@asynccontextmanager
async def running(*children: Child) -> AsyncIterator[Run]:
    run = Run(*children)
    try:
        async with asyncio.timeout(15):
            await run.ready.wait()
            yield run
    finally:
        run.supervisor.stop()
        await run.outcome


async def outcome(*children: Child) -> str | None:
    async with asyncio.timeout(15):
        return await Run(*children).outcome


def python(name: str, code: str) -> Child:
    return Child(name, [sys.executable, "-c", code], os.environ)


def notes(name: str, file: Path, code: str = "0", stage: int = FRONT) -> Child:
    argv = [sys.executable, "-c", NOTES, name, str(file), code]
    return Child(name, argv, os.environ, says("up"), stage, piped=True)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_each_child_waits_until_the_one_before_it_is_ready() -> None:
    order: list[str] = []

    def child(name: str) -> Child:
        async def ready(_: Process) -> None:
            order.append(f"{name} begins")
            await asyncio.sleep(0)
            order.append(f"{name} ready")

        return Child(name, [sys.executable, "-c", SLEEPS], os.environ, ready)

    async with running(child("a"), child("b")):
        assert order == ["a begins", "a ready", "b begins", "b ready"]


async def test_what_a_piped_child_prints_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    code = "print('hello'); print('ready now'); print('and more'); raise SystemExit(2)"
    argv = [sys.executable, "-c", code]
    await outcome(Child("talker", argv, os.environ, says("ready"), piped=True))
    assert capsys.readouterr().out == "hello\nready now\nand more\n"


async def test_a_child_that_dies_is_reported_and_restarted() -> None:
    pids: asyncio.Queue[int] = asyncio.Queue()

    async def note(process: Process) -> None:
        pids.put_nowait(process.pid)

    async with running(Child("sleeper", [sys.executable, "-c", SLEEPS], os.environ, note)) as run:
        first = await pids.get()
        os.kill(first, signal.SIGKILL)
        assert await run.reports.get() == (
            "sleeper was ended by signal 9 (Killed); starting it again."
        )
        assert await pids.get() != first


async def test_a_child_that_dies_five_times_brings_everything_down() -> None:
    run = Run(python("sleeper", SLEEPS), python("mayfly", "raise SystemExit(3)"))
    async with asyncio.timeout(15):
        sentence = await run.outcome
    assert sentence == "mayfly ended with exit code 3, 5 times within 30 s, so all is stopped."
    assert run.reports.qsize() == 4
    assert not alive(run.pid("sleeper"))


async def test_a_child_that_keeps_a_log_is_reported_with_it() -> None:
    log = Path("/nowhere/redis.log")
    run = Run(Child("redis", [sys.executable, "-c", "raise SystemExit(1)"], os.environ, log=log))
    async with asyncio.timeout(15):
        sentence = await run.outcome
    assert sentence is not None
    for told in (sentence, await run.reports.get()):
        assert told.startswith("redis ended with exit code 1 (/nowhere/redis.log says why)")


async def test_a_configuration_error_of_a_child_brings_everything_down_at_once() -> None:
    run = Run(python("sleeper", SLEEPS), python("worker 1", "raise SystemExit(2)"))
    async with asyncio.timeout(15):
        sentence = await run.outcome
    assert sentence == "worker 1 ended with exit code 2: its settings are wrong, so all is stopped."
    assert run.reports.empty()
    assert not alive(run.pid("sleeper"))


async def test_a_child_that_cannot_be_started_brings_everything_down() -> None:
    sentence = await outcome(Child("ghost", ["/nowhere/ghost"], {}))
    assert sentence == "ghost cannot be started: No such file or directory."


@pytest.mark.parametrize("code", [SLEEPS, "import os; os.close(1);" + SLEEPS])
async def test_a_child_that_is_never_ready_brings_everything_down(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.supervisor.READY_SECONDS", 0.4)
    child = Child("mute", [sys.executable, "-c", code], os.environ, says("up"), piped=True)
    assert await outcome(child) == "mute was not ready within 0 s."


async def test_a_child_is_not_ready_while_it_answers_that_it_is_not() -> None:
    statuses = [503, 404, 200]

    async def talk(reader: StreamReader, writer: StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(statuses.pop(0)))

    async with listening(talk) as port:
        ready = answers_at(f"http://127.0.0.1:{port}")
        async with running(Child("api", [sys.executable, "-c", SLEEPS], os.environ, ready)):
            assert statuses == []


async def test_stop_ends_the_children_in_the_order_of_their_stages(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    stages = {"redis": STORE, "demo upstream": UPSTREAM, "api": FRONT}
    async with running(*(notes(name, file, stage=stage) for name, stage in stages.items())) as run:
        run.supervisor.stop()
        assert await run.outcome is None
    assert file.read_text().splitlines() == ["api", "demo upstream", "redis"]
    assert not any(alive(run.pid(name)) for name in stages)


async def test_stop_while_a_child_is_not_yet_ready_leaves_nothing() -> None:
    asked = asyncio.Event()

    async def never(_: Process) -> None:
        asked.set()
        await asyncio.Event().wait()

    mute = Child("mute", [sys.executable, "-c", SLEEPS], os.environ, never)
    run = Run(mute, python("never", SLEEPS))
    await asked.wait()
    run.supervisor.stop()
    assert await run.outcome is None
    assert not alive(run.pid("mute"))
    assert "never" not in run.supervisor.processes


async def test_a_child_that_ignores_sigterm_is_killed_and_redis_still_ends_in_order(
    tmp_path: Path,
) -> None:
    file, loop = tmp_path / "notes", asyncio.get_running_loop()
    stubborn, redis = notes("stubborn", file, code=""), notes("redis", file, stage=STORE)
    async with running(redis, stubborn) as run:
        begun = loop.time()
        run.supervisor.stop()
        await run.outcome
        assert loop.time() - begun < 5
    assert run.supervisor.processes["stubborn"].returncode == -signal.SIGKILL
    assert run.supervisor.processes["redis"].returncode == 0
    assert file.read_text().splitlines() == ["stubborn", "redis"]


async def test_a_second_stop_kills_at_once(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with running(notes("stubborn", tmp_path / "notes", code="")) as run:
        begun = loop.time()
        run.supervisor.stop()
        run.supervisor.stop()
        assert await run.outcome is None
        assert loop.time() - begun < 2


async def test_redis_that_dies_comes_back_on_its_socket_with_its_data(tmp_path: Path) -> None:
    server = RedisServer(find_redis_server(), tmp_path)
    server.open()
    lives: asyncio.Queue[int] = asyncio.Queue()

    async def ready(process: Process) -> None:
        await server.ready(process)
        lives.put_nowait(process.pid)

    child = Child("redis", server.argv, os.environ, ready, STORE, server.pass_fds)
    async with running(child), Redis.from_url(server.url, decode_responses=True) as redis:
        await redis.set("word", "kept")
        os.kill(await lives.get(), signal.SIGKILL)
        await lives.get()
        await redis.connection_pool.disconnect()
        assert await redis.get("word") == "kept"
    server.close()


@pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent by prctl")
async def test_children_do_not_outlive_a_supervisor_that_was_killed() -> None:
    owner = await spawn([sys.executable, "-c", OWNER], module_env(), stdout=PIPE)
    assert owner.stdout is not None
    child = watch(int((await owner.stdout.readline()).split()[1]))
    owner.kill()
    async with asyncio.timeout(10):
        await child.wait()
        await owner.wait()
