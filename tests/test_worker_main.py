import asyncio
import resource
import signal
import sys
from asyncio.subprocess import Process
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from cli.processes import module
from emulator.app import Emulator
from relay import keys
from relay.log import Log
from relay.settings import Settings
from tests.conftest import (
    asking,
    few_descriptors,
    warning_of_few_descriptors,
    worker_env,
    worker_process,
)
from worker.main import SPARE_DESCRIPTORS

PRLIMIT = pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="only Linux lets one see the limits of another process"
)


@pytest.fixture
def env(settings: Settings) -> dict[str, str]:
    # At this level the SDK would write every request it makes.
    return worker_env(settings) | {"RELAY_LEASE_SECONDS": "60", "OPENAI_LOG": "debug"}


async def ended(process: Process, seconds: float = 30) -> tuple[int | None, str]:
    async with asyncio.timeout(seconds):
        _, written = await process.communicate()
    return process.returncode, written.decode()


async def ready(process: Process) -> str:
    """What it wrote until then."""
    assert process.stderr is not None
    written = b""
    async with asyncio.timeout(10):
        while b"worker_ready" not in written:
            line = await process.stderr.readline()
            assert line, "it ended before it was ready"
            written += line
    return written.decode()


async def create(log: Log, **script: Any) -> str:
    return (await log.create(asking(**script))).stream_id


async def status_when_ended(redis: Redis, log: Log, stream_id: str) -> str:
    async with asyncio.timeout(10):
        while not (events := await log.read(stream_id))[-1].terminal:
            await redis.xread({keys.log(stream_id): str(events[-1].cursor)}, block=1000)
    return events[-1].kind


async def test_half_a_configuration_ends_the_start_with_a_sentence_that_names_it(
    env: dict[str, str], tmp_path: Path
) -> None:
    cases = [
        ({"AZURE_OPENAI_CHATGPT_DEPLOYMENT": ""}, "AZURE_OPENAI_CHATGPT_DEPLOYMENT"),
        ({"RELAY_CONCURRENCY": "none"}, "RELAY_CONCURRENCY"),
        ({name: "" for name in env if name.startswith("AZURE")}, "AZURE_OPENAI_ENDPOINT"),
    ]

    async def outcome(change: dict[str, str]) -> tuple[int | None, str]:
        async with worker_process(env | change, tmp_path) as process:
            return await ended(process, 30)

    # Side by side, for most of it is the start of Python.
    outcomes = await asyncio.gather(*(outcome(change) for change, _ in cases))
    for (change, variable), (code, written) in zip(cases, outcomes, strict=True):
        assert code == 2, change
        [sentence] = [line for line in written.splitlines() if line]
        assert sentence.startswith("relay: ")
        assert variable in sentence


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_worker_ends_within_two_seconds_of_the_signal(
    number: int, redis: Redis, log: Log, env: dict[str, str], tmp_path: Path
) -> None:
    stream_id = await create(log, chunks=3, text=["the-marker"])
    async with worker_process(env, tmp_path) as process:
        assert await status_when_ended(redis, log, stream_id) == "completed"
        process.send_signal(number)
        code, written = await ended(process, 2)
    assert code == 0
    assert stream_id in written
    assert "the-marker" not in written
    assert "Traceback" not in written


SIGNALLED_AS_IT_IS_MADE = """
import os, signal, sys
import worker.main
from worker.__main__ import main

create = worker.main.create_worker

def create_worker(settings):
    made = create(settings)
    os.kill(os.getpid(), signal.SIGTERM)
    return made

worker.main.create_worker = create_worker
sys.argv[1:] = []
sys.exit(main())
"""


async def test_a_signal_that_comes_before_the_worker_is_ready_is_not_lost(
    env: dict[str, str], tmp_path: Path
) -> None:
    argv = (sys.executable, "-c", SIGNALLED_AS_IT_IS_MADE)
    async with worker_process(env, tmp_path, argv=argv) as process:
        assert (await ended(process, 10))[0] == 0


async def test_a_running_answer_is_finished_within_the_grace(
    redis: Redis, log: Log, env: dict[str, str], tmp_path: Path, emulator: Emulator
) -> None:
    async with worker_process(env, tmp_path) as process:
        stream_id = await create(log, chunks=20, delay_ms=25)
        await emulator.request(0)
        process.terminate()
        code, _ = await ended(process, 5)
    assert code == 0
    assert (await log.state(stream_id)).status == "completed"
    assert (await log.state(stream_id)).claims == 1


@pytest.mark.parametrize("grace", ["0", "1"])
async def test_what_outlasts_the_grace_is_handed_over_at_no_cost_of_a_try(
    grace: str, redis: Redis, log: Log, env: dict[str, str], tmp_path: Path, emulator: Emulator
) -> None:
    async with worker_process(env | {"RELAY_GRACE_SECONDS": grace}, tmp_path) as process:
        ids = [await create(log, chunks=1, end="stall") for _ in range(20)]
        async with asyncio.timeout(10):
            await emulator.request(19)
        process.terminate()
        code, written = await ended(process, 5)
    assert code == 0
    assert "Traceback" not in written
    client: Any = redis
    tries = [await client.hget(keys.state(stream_id), "tries") for stream_id in ids]
    assert tries == [b"0"] * 20
    assert await redis.zcard(keys.QUEUE) == 20
    assert await redis.zcard(keys.LEASES) == 0


async def test_the_check_tells_by_its_code_whether_a_worker_is_alive(
    redis: Redis, env: dict[str, str], tmp_path: Path
) -> None:
    async with worker_process(env, tmp_path, "check") as check:
        code, written = await ended(check)
    assert code == 1
    assert "event=worker_silent" in written
    async with worker_process(env, tmp_path) as process:
        await ready(process)
        async with asyncio.timeout(5):
            while not await redis.keys("relay:health:*"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        async with worker_process(env, tmp_path, "check") as check:
            assert await ended(check) == (0, "")


async def test_the_check_without_redis_says_so_in_a_line(
    env: dict[str, str], tmp_path: Path
) -> None:
    async with worker_process(
        env | {"REDIS_URL": "redis://127.0.0.1:1"}, tmp_path, "check"
    ) as check:
        code, written = await ended(check)
    assert code == 1
    [line] = written.splitlines()
    assert "redis_away" in line


async def test_a_worker_that_starts_before_redis_waits_for_it(
    env: dict[str, str], tmp_path: Path
) -> None:
    async with worker_process(env | {"REDIS_URL": "redis://127.0.0.1:1"}, tmp_path) as process:
        assert process.stderr is not None
        async with asyncio.timeout(10):
            while b"redis_lost" not in await process.stderr.readline():
                pass
        process.terminate()
        assert (await ended(process, 2))[0] == 0


@PRLIMIT
async def test_a_worker_allows_itself_all_the_descriptors_that_it_may_have(
    env: dict[str, str], tmp_path: Path
) -> None:
    async with worker_process(env, tmp_path, argv=few_descriptors(module("worker"))) as process:
        await ready(process)
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard


async def test_a_worker_takes_no_more_answers_at_once_than_it_has_descriptors_for(
    env: dict[str, str], tmp_path: Path
) -> None:
    argv = ["sh", "-c", f'ulimit -n {SPARE_DESCRIPTORS + 7} && exec "$@"', "sh", *module("worker")]
    many = env | {"RELAY_CONCURRENCY": "500"}
    async with worker_process(many, tmp_path, argv=argv) as process:
        written = await ready(process)
    assert "event=concurrency_lowered wanted=500 allowed=7\n" in written
    assert written.endswith(" concurrency=7\n")


@PRLIMIT
async def test_a_worker_tells_that_its_descriptors_run_out(
    env: dict[str, str], tmp_path: Path
) -> None:
    async with worker_process(env, tmp_path) as process:
        await ready(process)
        assert b"level=warning" in await warning_of_few_descriptors(process)
