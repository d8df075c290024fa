"""What a process says of itself: one line per lifecycle step, never with prompt or answer text."""

import logging
import os
import select
import sys
import time
import traceback
from contextlib import suppress
from typing import Literal

import structlog

Logger = structlog.typing.FilteringBoundLogger

REPEAT_SECONDS = 5.0


def open_closed_streams() -> None:
    """To nowhere, for what was closed when Python began: it is None then, which fails, and for
    stderr `print` takes stdout, where it would stand among an answer."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the process ends


def configure_logs(process: str, log_format: Literal["text", "json"]) -> None:
    """Send the process' own steps and the warnings of its libraries to stderr, one line each."""
    open_closed_streams()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    unread = _Unread()
    # Not by way of logging, which would double what a line costs: each question writes three.
    structlog.configure(
        processors=[_NotAgain(), unread, *shared, *_renderers(log_format)],
        logger_factory=_Stderr,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(lambda _: unread.takes())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(log_format),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    # At DEBUG these two would write what passes through them: prompts and answers.
    logging.getLogger("sse_starlette").setLevel(logging.WARNING)
    logging.getLogger("openai").setLevel(logging.WARNING)


def get_logger() -> Logger:
    logger: Logger = structlog.get_logger()
    return logger


class _Stderr:
    """Whoever has something to tell must not fail because nobody reads it, or because the disk is
    full to which it goes."""

    def info(self, line: str) -> None:
        with suppress(OSError):
            sys.stderr.write(line + "\n")

    warning = error = critical = info


def _is_taken() -> bool:
    """Whether a line can be written without waiting. A pipe that is not full has room for 4 KiB."""
    with suppress(OSError, ValueError):  # What is no file never waits.
        poll = select.poll()
        poll.register(sys.stderr, select.POLLOUT)
        return bool(poll.poll(0))
    return True


class _Unread:
    """What reads the logs of all processes may hang, and who waited for it would hang, too, deaf
    even to a SIGTERM. How much was lost meanwhile the next line tells."""

    def __init__(self) -> None:
        self._lost = 0

    def __call__(
        self, _: object, __: str, said: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        if not self.takes():
            raise structlog.DropEvent
        if self._lost:
            said["lines_lost"], self._lost = self._lost, 0
        return said

    def takes(self) -> bool:
        """Whether a line can be written now; if not, it counts as lost."""
        taken = _is_taken()
        self._lost += not taken
        return taken


class _NotAgain:
    """A line that names no stream is not written again for a while, though its numbers differ: with
    Redis away, each part of a process would say so five times a second."""

    def __init__(self) -> None:
        self._written: dict[str, float] = {}

    def __call__(
        self, _: object, level: str, said: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        if level not in {"info", "warning"} or "stream" in said:
            return said
        words = {name: value for name, value in said.items() if isinstance(value, str)}
        line, now = str(words), time.monotonic()
        self._written = {
            each: when for each, when in self._written.items() if now - when < REPEAT_SECONDS
        }
        if self._written.setdefault(line, now) != now:
            raise structlog.DropEvent
        return said


def _without_message(exc_info: structlog.typing.ExcInfo) -> str:
    """Where an exception came from, without what it says: that may quote a prompt or an answer."""
    kind, _, trace = exc_info
    frames = traceback.extract_tb(trace)
    return " < ".join([kind.__name__, *(f"{f.filename}:{f.lineno}" for f in reversed(frames))])


def _renderers(log_format: Literal["text", "json"]) -> list[structlog.typing.Processor]:
    exceptions = structlog.processors.ExceptionRenderer(_without_message)
    if log_format == "json":
        return [exceptions, structlog.processors.JSONRenderer()]
    order = ["timestamp", "level", "process", "event"]
    return [exceptions, structlog.processors.LogfmtRenderer(key_order=order, bool_as_flag=False)]
