"""The `relay` command as a person uses it: all of it, as real processes."""

import asyncio
import os
import shlex
import shutil
import signal
import sys
import time
import tomllib
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
import typer

from cli import main
from cli.__main__ import run as run_relay
from cli.processes import base_url, end_with_parent, free_port, module, module_env
from cli.redis_server import find_redis_server
from emulator.script import prompt
from relay import keys
from relay.client import Client, Update
from relay.connection import connect
from relay.ids import new_stream_id
from relay.settings import Settings
from tests.conftest import ROOT, ask
from tests.redis_process import running_redis

ID = new_stream_id()


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    """`relay up` with no configuration at all."""
    async with asyncio.timeout(40):
        up, url, _ = await start_up(tmp_path)
        yield url
        await interrupt(up)


async def start_up(folder: Path, **variables: str) -> tuple[Process, str, str]:
    """`relay up`, its URL, and what it has printed when it is ready."""
    port = free_port("127.0.0.1", 0)
    up = await relay("up", "--port", str(port), folder=folder, **variables)
    assert up.stdout is not None
    printed = ""
    while "Ctrl-C stops everything" not in printed:
        line = await up.stdout.readline()
        assert line, printed
        printed += line.decode()
    return up, f"http://127.0.0.1:{port}", printed


async def relay(*words: str, folder: Path, **variables: str) -> Process:
    return await run("cli", *words, folder=folder, **variables)


async def run(name: str, *words: str, folder: Path, **variables: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", name, *words),
        preexec_fn=end_with_parent(),  # Where a test fails, it does not come to end it.
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **variables},
        stdout=PIPE,
        stderr=STDOUT,
    )


async def interrupt(up: Process) -> None:
    """Ctrl-C: everything has ended within 5 s, cleanly."""
    assert up.stdout is not None
    begun = time.monotonic()
    up.send_signal(signal.SIGINT)
    printed = (await up.stdout.read()).decode()
    assert await up.wait() == 0
    # The promise is 5 s; a loaded machine must not make it a flaky one.
    assert time.monotonic() - begun < 10
    assert "Traceback" not in printed


def ignores(process: Process, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(status.split("SigIgn:")[1].split()[0], 16) & 1 << number - 1)


async def output(process: Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.read()).decode()


async def test_up_needs_nothing_and_says_what_it_runs(tmp_path: Path) -> None:
    for name in ("api", "worker", "emulator"):  # Of the user, whose folder it is.
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not ours')")
    async with asyncio.timeout(40):
        up, url, printed = await start_up(tmp_path)
        second = await relay("up", "--port", url.rpartition(":")[2], folder=tmp_path)
        assert (await output(second)).startswith("relay: Another `relay up` ")
        assert await second.wait() == 2
        await interrupt(up)
    assert url in printed
    assert "demo upstream" in printed
    for variable in (
        "AZURE_OPENAI_ENDPOINT",
        "AZURE_OPENAI_KEY",
        "AZURE_OPENAI_CHATGPT_DEPLOYMENT",
        "OPENAI_BASE_URL",
    ):
        assert variable in printed
    assert (tmp_path / ".relay").is_dir()


@pytest.mark.parametrize("nohup", [True, False])
async def test_what_was_started_by_nohup_outlives_its_terminal(nohup: bool, tmp_path: Path) -> None:
    async with asyncio.timeout(40):
        # As nohup has it; children inherit it.
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        try:
            up, _, _ = await start_up(tmp_path)
        finally:
            signal.signal(signal.SIGHUP, before)
        assert ignores(up, signal.SIGHUP) == nohup
        if nohup:
            await interrupt(up)
        else:
            up.send_signal(signal.SIGHUP)
            await output(up)
            assert await up.wait() == 0


async def test_streams_survive_a_restart_of_everything(tmp_path: Path) -> None:
    async with asyncio.timeout(50):
        up, url, _ = await start_up(tmp_path)
        async with httpx2.AsyncClient(base_url=url, trust_env=False) as http:
            body = {"messages": [{"role": "user", "content": prompt(text=["kept"])}]}
            asked = await http.post("/chat", json=body)
            path = asked.json()["events_url"]
            whole = (await http.get(path)).text
        await interrupt(up)
        up, url, _ = await start_up(tmp_path)
        async with httpx2.AsyncClient(base_url=url, trust_env=False) as http:
            again = (await http.get(path)).text
        await interrupt(up)
    assert '"kept"' in again
    assert again.split("event: started")[1] == whole.split("event: started")[1]


async def test_workers_have_all_of_their_grace_and_hand_over_what_outlasts_it(
    tmp_path: Path,
) -> None:
    async with asyncio.timeout(40):
        up, url, _ = await start_up(tmp_path, RELAY_GRACE_SECONDS="3.2")
        async with httpx2.AsyncClient(base_url=url, trust_env=False) as http:
            stream_id = await ask(http, chunks=1, end="stall")
            async with http.sse(f"/streams/{stream_id}/events") as events:
                await anext(event async for event in events if event.event == "chunk")
        await interrupt(up)
    async with (
        running_redis(find_redis_server(), tmp_path / ".relay") as server,
        connect(server.url) as redis,
    ):
        state: Any = redis.hget(keys.state(stream_id), "tries")
        assert await state == b"0"
        assert await redis.zcard(keys.QUEUE) == 1
        assert await redis.zcard(keys.LEASES) == 0


@pytest.mark.parametrize(("closed", "printed"), [("2>&-", b"Hello\n"), (">&-", b"")])
async def test_what_stands_closed_costs_no_trace_and_nothing_goes_elsewhere(
    url: str, tmp_path: Path, closed: str, printed: bytes
) -> None:
    words = shlex.join([*module("cli"), "chat", prompt(text=["Hello"])])
    env = module_env() | {"RELAY_URL": url}
    chat = await asyncio.create_subprocess_shell(
        f"{words} {closed}", env=env, cwd=tmp_path, stdout=PIPE, stderr=PIPE
    )
    out, err = await chat.communicate()
    assert (chat.returncode, out) == (0, printed)
    assert b"Traceback" not in err


async def test_chat_prints_the_answer_and_watch_prints_it_again(url: str, tmp_path: Path) -> None:
    question = prompt(text=["Hé", "llo"])
    chat = await relay("chat", question, folder=tmp_path, RELAY_URL=url)
    printed = await output(chat)
    assert await chat.wait() == 0
    assert printed.endswith("Héllo\n")
    stream_id = printed.split("stream ")[1].split()[0]
    watch = await relay("watch", stream_id, folder=tmp_path, RELAY_URL=url)
    assert await output(watch) == "Héllo\n"
    cyrillic = {"RELAY_URL": url, "PYTHONIOENCODING": "iso8859-5"}
    elsewhere = await relay("watch", stream_id, folder=tmp_path, **cyrillic)
    assert await output(elsewhere) == "H?llo\n"
    link = f"{url}/#{stream_id}"
    cancel = await relay("cancel", link, folder=tmp_path, RELAY_URL=url)
    assert await output(cancel) == "completed\n"


async def test_whoever_leaves_a_chat_is_told_that_the_answer_goes_on(
    url: str, tmp_path: Path
) -> None:
    question = prompt(text=["left "], chunks=1, end="stall")
    chat = await relay("chat", question, folder=tmp_path, RELAY_URL=url)
    assert chat.stdout is not None
    printed = (await chat.stdout.readuntil(b"left ")).decode()
    stream_id = printed.split("stream ")[1].split()[0]
    chat.send_signal(signal.SIGINT)
    told = await output(chat)
    assert f"the answer goes on: `relay watch {stream_id}`" in told
    assert f"`relay cancel {stream_id}` ends it" in told
    assert await chat.wait() == 130
    cancel = await relay("cancel", stream_id, folder=tmp_path, RELAY_URL=url)
    assert await output(cancel) == "cancelling\n"
    watch = await relay("watch", stream_id, folder=tmp_path, RELAY_URL=url)
    assert await output(watch) == "left \nrelay: cancelled\n"
    assert await watch.wait() == 1


async def test_the_python_of_the_guide_prints_the_answer(url: str, tmp_path: Path) -> None:
    [_, guide] = (ROOT / "docs" / "integrate.md").read_text().split("\n## Python\n")
    code = guide.split("```python\n")[1].split("```")[0].replace("http://127.0.0.1:8000", url)
    code = code.replace('"Hello"', repr(prompt(text=["Hé", "llo"])))
    run = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), cwd=ROOT, stdout=PIPE, stderr=STDOUT
    )
    assert await output(run) == "completed Héllo\n"


async def test_a_failed_answer_and_an_unknown_stream_are_told_in_a_sentence(
    url: str, tmp_path: Path
) -> None:
    chat = await relay("chat", prompt(prompt_filter=True), folder=tmp_path, RELAY_URL=url)
    printed = await output(chat)
    assert "filter refused the prompt" in printed
    assert await chat.wait() == 1
    for nothing in ("nonsense", "", "..", f"{url}/#", "a" * 32):
        watch = await relay("watch", nothing, folder=tmp_path, RELAY_URL=url)
        assert await output(watch) == "relay: There is no stream with this id: check it.\n"
        assert await watch.wait() == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_two_attempts_are_never_taken_for_one_answer(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def watch(_: Client, __: str) -> Iterator[Update]:
        for text in ("old", "new"):
            yield Update("started", "", {})
            yield Update("chunk", text, {})
            yield Update("chunk", "", {})

    monkeypatch.setattr(Client, "watch", watch)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    if terminal:
        main.watch("ID", "http://127.0.0.1")
        assert capsys.readouterr().out == "old\n--- a new attempt: forget the text above ---\nnew"
        return
    with pytest.raises(typer.Exit) as ended:
        main.watch("ID", "http://127.0.0.1")
    assert ended.value.exit_code == 1
    out, err = capsys.readouterr()
    assert out == "old"
    assert "`relay watch ID` has it whole" in err


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_model_writes_commands_no_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "a\tb\r\n\x00\x7f\x1b]0;title\x07\x1b[2J\x9bcé😀"
    monkeypatch.setattr(Client, "watch", lambda *_: iter([Update("chunk", text, {})]))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    main.watch("ID", "http://127.0.0.1")
    shown = capsys.readouterr().out
    assert shown == ("a\tb\n]0;title[2Jcé😀" if terminal else text)


@pytest.mark.parametrize("words", [["chat", "Hello"], ["watch", ID], ["cancel", ID]])
async def test_whoever_finds_no_api_is_told_that_it_is_tried_again_and_what_may_be_missing(
    words: list[str], tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1', 0)}"
    process = await relay(*words, folder=tmp_path, RELAY_URL=url)
    again, given_up = (await output(process)).splitlines()
    assert await process.wait() == 1
    assert again == f"relay: {url} does not answer, trying again"
    assert given_up == f"relay: {url} does not answer: is `relay up` running?"


def test_an_api_is_looked_for_where_up_has_it() -> None:
    settings = Settings()
    assert base_url(settings.host, settings.port) == main.HERE


async def test_a_question_that_is_no_text_is_refused_in_a_sentence(tmp_path: Path) -> None:
    process = await relay("chat", os.fsdecode(b"\xff"), folder=tmp_path)
    assert "it is not UTF-8" in await output(process)
    assert await process.wait() == 2


async def test_without_a_word_the_words_are_told(tmp_path: Path) -> None:
    process = await relay(folder=tmp_path)
    told = await output(process)
    await process.wait()
    for word in ("up", "api", "worker", "chat", "watch", "cancel", "--version"):
        assert f" {word} " in told


def test_a_ctrl_c_while_all_is_still_imported_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(ModuleType):
        def __getattr__(self, _: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "cli.main", Interrupted("cli.main"))
    with pytest.raises(SystemExit) as ended:
        run_relay()
    assert ended.value.code == 130


async def test_a_disk_that_is_full_is_one_sentence_and_exit_code_1() -> None:
    words = shlex.join([*module("cli"), "--version"])
    process = await asyncio.create_subprocess_shell(
        f"{words} >/dev/full", env=module_env(), stderr=PIPE
    )
    _, err = await process.communicate()
    assert (process.returncode, err) == (1, b"relay: [Errno 28] No space left on device\n")


async def test_a_full_disk_under_its_output_does_not_end_what_is_served(tmp_path: Path) -> None:
    port = free_port("127.0.0.1", 0)
    words = shlex.join([*module("cli"), "up", "--port", str(port)])
    async with asyncio.timeout(40):
        up = await asyncio.create_subprocess_shell(
            f"exec {words} >/dev/full",
            preexec_fn=end_with_parent(),
            cwd=tmp_path,
            env=module_env(),
            stderr=PIPE,
        )
        assert up.stderr is not None
        told = b""
        while b"event=api_ready" not in told:
            told += (line := await up.stderr.readline())
            assert line, told.decode()
        url = f"http://127.0.0.1:{port}"
        chat = await relay("chat", prompt(text=["Hello"]), "--url", url, folder=tmp_path)
        assert (await output(chat)).endswith("Hello\n")
        assert await chat.wait() == 0
        up.send_signal(signal.SIGINT)
        told += await up.stderr.read()
        await up.wait()
    assert b"Traceback" not in told


async def test_the_version_is_told_and_nothing_else(tmp_path: Path) -> None:
    process = await relay("--version", folder=tmp_path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert await output(process) == f"{project['version']}\n"
    assert await process.wait() == 0


@pytest.mark.parametrize(
    ("words", "variables", "named"),
    [
        (["up"], {"AZURE_OPENAI_ENDPOINT": "https://x.example"}, "AZURE_OPENAI_CHATGPT_DEPLOYMENT"),
        (["up"], {"RELAY_PORT": "high"}, "RELAY_PORT"),
        (["up", "--host", "192.0.2.1"], {}, "192.0.2.1"),
        (["up", "--workers", "0"], {}, "RELAY_WORKERS"),
        (["up", "--data", os.devnull], {}, os.devnull),
        (["api", "--port", "70000"], {}, "RELAY_PORT"),
        (["up"], {"RELAY_WEBHOOK_HOSTS": "hooks.test"}, "RELAY_WEBHOOK_SECRET"),
        (["chat", "Hello"], {"RELAY_URL": "localhost:8000"}, "localhost:8000"),
        (["api"], {"REDIS_URL": "nonsense"}, "REDIS_URL"),
        (["api"], {"RELAY_LEASE_SECONDS": "-1"}, "RELAY_LEASE_SECONDS"),
        (["api"], {"RELAY_BODY_BYTES": "much"}, "RELAY_BODY_BYTES"),
        (["api"], {"AZURE_OPENAI_ENDPOINT": "http://x.y"}, "AZURE_OPENAI_CHATGPT_DEPLOYMENT"),
        (["api"], {"RELAY_WEBHOOK_HOSTS": "hooks.example.com"}, "RELAY_WEBHOOK_SECRET"),
        (["worker"], {}, "AZURE_OPENAI_ENDPOINT"),
        (["worker"], {"OPENAI_API_KEY": "k"}, "OPENAI_MODEL"),
    ],
)
async def test_a_wrong_configuration_ends_the_start_with_one_sentence_that_names_the_variable(
    words: list[str], variables: dict[str, str], named: str, tmp_path: Path
) -> None:
    async with asyncio.timeout(20):
        process = await relay(*words, folder=tmp_path, **variables)
        printed = await output(process)
        assert await process.wait() == 2
    assert printed.startswith("relay: ")
    assert printed.count("\n") == 1
    assert named in printed


async def test_an_api_listens_where_its_option_says_and_nowhere_else(tmp_path: Path) -> None:
    async with asyncio.timeout(20):
        api = await relay(
            *("api", "--host", "192.0.2.1", "--port", "0"),
            folder=tmp_path,
            REDIS_URL="unix:///nowhere/redis.sock",
        )
        assert "('192.0.2.1', 0)" in await output(api)  # Of no machine: so it cannot.
        assert await api.wait() == 3


async def test_up_ends_with_an_error_where_a_process_cannot_be_kept_alive(tmp_path: Path) -> None:
    never = shutil.which("false")
    assert never is not None
    async with asyncio.timeout(20):
        up = await relay("up", "--port", "0", folder=tmp_path, RELAY_REDIS_SERVER=never)
        assert (await output(up)).endswith("so all is stopped.\n")
        assert await up.wait() == 1


@pytest.mark.parametrize(
    ("words", "meant"), [(["api", "--port", "9000"], "RELAY_PORT"), (["worker", "chek"], "`check`")]
)
async def test_a_process_passes_over_no_argument(
    words: list[str], meant: str, tmp_path: Path
) -> None:
    async with asyncio.timeout(20):
        process = await run(*words, folder=tmp_path)
        printed = await output(process)
        assert await process.wait() == 2
    assert printed.startswith(f"relay: python -m {words[0]} ")
    assert meant in printed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["up"], "relay: RELAY_PROT is no setting; is RELAY_PORT meant?"),
        (["api"], "process=api event=unknown_setting name=RELAY_PROT nearest=RELAY_PORT"),
        (["worker"], "process=worker event=unknown_setting name=RELAY_PROT nearest=RELAY_PORT"),
    ],
)
async def test_a_misspelt_variable_is_told_before_what_may_come_of_it(
    words: list[str], told: str, tmp_path: Path
) -> None:
    variables = {"RELAY_PROT": "9", "AZURE_OPENAI_ENDPOINT": "https://x.example"}
    async with asyncio.timeout(20):
        process = await relay(*words, folder=tmp_path, **variables)
        first, second = (await output(process)).splitlines()
        assert await process.wait() == 2
    assert first.endswith(told)
    assert second.startswith("relay: Set AZURE_OPENAI_")
