"""What a process says of itself: one line per lifecycle step, never with prompt or answer text."""

import logging
import sys
import time
import traceback
from typing import Literal

import structlog

Logger = structlog.stdlib.BoundLogger

REPEAT_SECONDS = 5.0


def configure_logs(process: str, log_format: Literal["text", "json"]) -> None:
    """Send the process' own steps and the warnings of its libraries to stderr, one line each."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(log_format),
            ],
        )
    )
    handler.addFilter(_NotAgain())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("relay").setLevel(logging.INFO)
    # At DEBUG these two would write what passes through them: prompts and answers.
    logging.getLogger("sse_starlette").setLevel(logging.WARNING)
    logging.getLogger("openai").setLevel(logging.WARNING)


def get_logger(name: str) -> Logger:
    logger: Logger = structlog.get_logger(f"relay.{name}")
    return logger


class _NotAgain(logging.Filter):
    """A line of ours that names no stream is not written again for a while, though its numbers
    differ: with Redis away, each part of a process would say so five times a second."""

    def __init__(self) -> None:
        super().__init__()
        self._written: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.msg
        if record.levelno > logging.WARNING or not isinstance(said, dict) or "stream" in said:
            return True
        words = {k: v for k, v in said.items() if isinstance(v, str) and k != "timestamp"}
        line, now = str(words), time.monotonic()
        self._written = {
            each: when for each, when in self._written.items() if now - when < REPEAT_SECONDS
        }
        return self._written.setdefault(line, now) == now


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
