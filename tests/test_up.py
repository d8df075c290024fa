import asyncio
import os
import socket
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest
from redis.asyncio import Redis

from cli.processes import module, module_env, spawn
from cli.redis_server import RedisServer, find_redis_server
from cli.up import plan, tell_if_away
from relay.settings import load_settings
from tests.redis_process import running_redis
from tests.test_supervisor import running


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without settings, in a folder without .env."""
    for name in os.environ:
        if name.startswith(("RELAY_", "AZURE_OPENAI_", "OPENAI_")) or name == "REDIS_URL":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("bare")
def test_without_an_upstream_the_workers_get_the_demo_upstream(tmp_path: Path) -> None:
    redis = RedisServer("/bin/true", tmp_path)
    redis.open()
    children = plan(load_settings(), 8123, redis)
    redis.close()
    assert [child.name for child in children] == ["redis", "demo upstream", "worker 1", "api"]
    _, demo, worker, api = children
    assert worker.env["AZURE_OPENAI_ENDPOINT"] == f"http://127.0.0.1:{demo.argv[-1]}"
    assert worker.env["AZURE_OPENAI_KEY"] == "demo"
    assert worker.env["AZURE_OPENAI_CHATGPT_DEPLOYMENT"] == "demo"
    assert worker.env["REDIS_URL"] == api.env["REDIS_URL"] == redis.url
    assert api.env["RELAY_PORT"] == "8123"
    assert worker.env["RELAY_GRACE_SECONDS"] == "2"
    assert api.env["RELAY_DRAIN_SECONDS"] == "0"


@pytest.mark.usefixtures("bare")
def test_what_the_user_has_is_used_instead_of_starting_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere")
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setenv("OPENAI_MODEL", "model")
    monkeypatch.setenv("RELAY_WORKERS", "2")
    monkeypatch.setenv("RELAY_GRACE_SECONDS", "9")
    monkeypatch.setenv("RELAY_DRAIN_SECONDS", "8")
    children = plan(load_settings(), 8123, None)
    assert [child.name for child in children] == ["worker 1", "worker 2", "api"]
    assert {child.env["REDIS_URL"] for child in children} == {"redis://elsewhere"}
    assert {child.env["RELAY_GRACE_SECONDS"] for child in children} == {"9"}
    assert {child.env["RELAY_DRAIN_SECONDS"] for child in children} == {"8"}
    assert not any("AZURE_OPENAI_ENDPOINT" in child.env for child in children)
    first, second, api = children
    assert (first.grace, second.grace) == (9, 9)
    assert api.grace > 8


@pytest.mark.usefixtures("bare")
def test_a_misspelt_variable_is_told_by_none_of_the_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere")
    monkeypatch.setenv("RELAY_PROT", "9")
    children = plan(load_settings(), 8123, None)
    assert {child.env["RELAY_PROT"] for child in children} == {""}


@pytest.mark.usefixtures("bare")
async def test_a_redis_that_loads_its_data_is_waited_for_without_a_limit_and_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = find_redis_server()
    async with running_redis(binary, tmp_path) as server, Redis.from_url(server.url) as redis:
        pipeline = redis.pipeline(transaction=False)
        for number in range(20480):  # It answers after each 1,024 of them.
            pipeline.set(str(number), 1)
        await pipeline.execute()
    monkeypatch.setattr("cli.redis_server.READY_SECONDS", 1.5)
    monkeypatch.setattr("cli.supervisor.READY_SECONDS", 1.5)
    told: list[str] = []
    loading = RedisServer(binary, tmp_path, told.append)
    loading.open()
    loading.argv += ["--key-load-delay", "100"]
    async with running(plan(load_settings(), 8123, loading)[0]) as run:
        async with Redis.from_url(loading.url) as redis:
            assert await redis.dbsize() == 20480
        assert run.reports.empty()
    loading.close()
    assert [sentence.partition(" in ")[0] for sentence in told] == ["Redis loads its data"]


async def relay(folder: Path, *args: str, **variables: str) -> tuple[int, str]:
    """Run the command; its exit code and what it wrote to stderr."""
    process = await asyncio.create_subprocess_exec(
        *module("cli"), *args, cwd=folder, env=module_env() | variables, stdout=PIPE, stderr=PIPE
    )
    async with asyncio.timeout(15):
        _, stderr = await process.communicate()
    assert process.returncode is not None
    return process.returncode, stderr.decode()


@pytest.mark.usefixtures("bare")
async def test_an_upstream_configured_by_half_is_one_sentence_and_nothing_is_started(
    tmp_path: Path,
) -> None:
    code, said = await relay(tmp_path, "up", AZURE_OPENAI_ENDPOINT="https://name.openai.azure.com")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("relay: Set AZURE_OPENAI_CHATGPT_DEPLOYMENT")
    assert not (tmp_path / ".relay").exists()


@pytest.mark.usefixtures("bare")
async def test_up_on_a_taken_port_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, said = await relay(tmp_path, "up", "--port", port)
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith(f"relay: Port {port} ")


@pytest.mark.usefixtures("bare")
async def test_that_the_redis_of_the_user_does_not_answer_is_told_once_and_without_its_password(
    tmp_path: Path,
) -> None:
    env = module_env() | {"REDIS_URL": "redis://:secret@127.0.0.1:1", "RELAY_PORT": "0"}
    process = await spawn([*module("cli"), "up"], env, stderr=PIPE, cwd=tmp_path)
    assert process.stderr is not None
    said = b""
    async with asyncio.timeout(20):
        while b"relay: " not in said:
            said += await process.stderr.readline()
        process.terminate()
        said += await process.stderr.read()
    assert await process.wait() == 0
    assert said.count(b"relay: Redis at 127.0.0.1:1 does not answer, waiting for it: ") == 1
    assert b"secret" not in said


async def test_a_redis_of_the_user_that_answers_is_not_told_of_and_one_that_refuses_is(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cli.up.PATIENCE_SECONDS", 0)
    await tell_if_away(redis_server.url)
    assert capsys.readouterr().err == ""
    await tell_if_away(f"{redis_server.url}&username=nobody&password=secret")
    [told] = capsys.readouterr().err.splitlines()
    assert "/redis.sock does not answer, waiting for it: invalid username-password pair" in told
    assert "secret" not in told


@pytest.mark.usefixtures("bare")
async def test_a_folder_of_the_user_is_not_taken_for_one_of_our_modules(tmp_path: Path) -> None:
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "__main__.py").write_text("raise SystemExit('not ours')")
    assert (await relay(tmp_path, "--help"))[0] == 0
