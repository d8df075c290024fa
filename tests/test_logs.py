import json
import logging
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Literal

import pytest
import structlog

from relay.logs import configure_logs, get_logger

TOUCHED = [None, "sse_starlette", "openai", "httpx2"]


@contextmanager
def configured(process: str, log_format: Literal["text", "json"]) -> Iterator[None]:
    """The logs of a process that has just begun; afterwards as before."""
    config, bound = structlog.get_config(), structlog.contextvars.get_contextvars()
    loggers = [logging.getLogger(name) for name in TOUCHED]
    before = [(logger.handlers, logger.level) for logger in loggers]
    try:
        configure_logs(process, log_format)
        yield
    finally:
        for logger, (handlers, level) in zip(loggers, before, strict=True):
            logger.handlers = handlers
            logger.setLevel(level)
        structlog.configure(**config)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(**bound)


def test_a_step_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with configured("api", "text"):
        get_logger().info("claimed", stream="abc", attempt=2, again=True)
    out, err = capsys.readouterr()
    time, _, rest = err.partition(" ")
    assert out == ""
    assert datetime.fromisoformat(time.removeprefix("timestamp=")).tzinfo is not None
    assert rest == "level=info process=api event=claimed stream=abc attempt=2 again=true\n"


def test_as_json_each_line_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    with configured("worker", "json"):
        get_logger().warning("claimed", stream="abc", attempt=2, again=True)
        logging.getLogger("uvicorn").warning("port %d\nis taken", 80)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("timestamp") <= second.pop("timestamp")
    assert first == {
        "level": "warning",
        "process": "worker",
        "event": "claimed",
        "stream": "abc",
        "attempt": 2,
        "again": True,
    }
    assert second == {"level": "warning", "process": "worker", "event": "port 80\nis taken"}


def test_a_warning_whose_numbers_alone_differ_is_not_repeated_either(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with configured("worker", "json"):
        for streams in (1, 2, 3):
            get_logger().warning("append_refused", streams=streams, error="OOM")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_line_is_not_repeated_for_a_while_unless_it_is_of_a_stream(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with configured("worker", "json"):
        log = get_logger()
        for _ in range(3):
            log.warning("claim_failed", error="ConnectionError")
            log.info("redis_back", seconds=0.2)
            log.error("part_died")
        log.warning("claim_failed", error="TimeoutError")
        log.warning("lease_lapsed", stream="a")
        log.warning("lease_lapsed", stream="a")
        monkeypatch.setattr("relay.logs.REPEAT_SECONDS", 0)
        log.warning("claim_failed", error="ConnectionError")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line.get("error")) for line in lines] == [
        ("claim_failed", "ConnectionError"),
        ("redis_back", None),
        ("part_died", None),
        ("part_died", None),
        ("part_died", None),
        ("claim_failed", "TimeoutError"),
        ("lease_lapsed", None),
        ("lease_lapsed", None),
        ("claim_failed", "ConnectionError"),
    ]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_is_told_in_the_same_line_without_what_it_quotes(
    capsys: pytest.CaptureFixture[str], log_format: Literal["text", "json"]
) -> None:
    with configured("api", log_format):
        try:
            raise RuntimeError("two\nlines")
        except RuntimeError:
            get_logger().exception("failed")
            logging.getLogger("asyncio").exception("failed too")
    first, second = capsys.readouterr().err.splitlines()
    for line in (first, second):
        assert "RuntimeError < " in line
        assert "test_logs.py" in line
        assert "two" not in line


@pytest.mark.parametrize(
    ("name", "lowest"),
    [
        ("uvicorn", logging.WARNING),
        ("httpx2", logging.WARNING),
        ("sse_starlette.sse", logging.WARNING),
        ("openai._base_client", logging.WARNING),
    ],
)
def test_libraries_tell_only_their_warnings(
    capsys: pytest.CaptureFixture[str], name: str, lowest: int
) -> None:
    with configured("api", "text"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(level, "level %d", level)
    lines = capsys.readouterr().err.splitlines()
    told = [line.partition("event=")[2] for line in lines]
    assert told == [f'"level {level}"' for level in (10, 20, 30) if level >= lowest]


def test_who_turns_on_debug_still_sees_no_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    with configured("worker", "text"):
        logging.getLogger().setLevel(logging.DEBUG)
        logging.getLogger("openai._base_client").debug("Request options: %s", "a prompt")
        logging.getLogger("sse_starlette.sse").debug("chunk: %s", "an answer")
        logging.getLogger("uvicorn").debug("other")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "other" in lines[0]


@pytest.mark.parametrize("stderr", ["/dev/full", "&-"])
def test_who_has_something_to_tell_does_not_fail_for_a_full_disk_or_without_a_place_for_it(
    stderr: str,
) -> None:
    tell = "configure_logs('api', 'text'); get_logger().error('told'); print('goes on')"
    program = f"from relay.logs import configure_logs, get_logger; {tell}"
    command = ["sh", "-c", f'exec "$@" 2>{stderr}', "sh", sys.executable, "-c", program]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert shown.stdout == "goes on\n"


UNREAD = """
import logging, sys
from relay.logs import configure_logs, get_logger
configure_logs("worker", "text")
for number in range(10_000):
    get_logger().info("step", stream="abc", number=number)
logging.getLogger("uvicorn").warning("other")
print("goes on", flush=True)
sys.stdin.readline()
get_logger().info("last")
"""


def test_nobody_waits_for_who_reads_the_logs_and_the_next_line_tells_what_was_lost() -> None:
    reading, writing = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", UNREAD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=writing,
    ) as process:
        os.close(writing)
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], 10)[0]:
            process.kill()
        assert process.stdout.readline() == b"goes on\n"
        written = os.read(reading, 2**20).splitlines()
        process.communicate(b"\n")
    with open(reading, "rb") as rest:
        [last] = rest.readlines()
    assert b"number=0" in written[0]
    steps_and_other = 10_000 + 1
    assert b"event=last lines_lost=%d\n" % (steps_and_other - len(written)) in last


def test_to_configure_again_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with configured("api", "text"):
        configure_logs("worker", "text")
        get_logger().info("once")
    [line] = capsys.readouterr().err.splitlines()
    assert "process=worker" in line


def test_to_import_it_configures_nothing() -> None:
    look = "import logging, structlog; print(structlog.is_configured(), logging.root.handlers)"
    command = [sys.executable, "-c", f"import relay.logs; {look}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout == "False []\n"
