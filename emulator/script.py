"""What the emulator says: one `Script` describes one response.

A request chooses its own script: when the text of its last user message is `emulate ` and a JSON
object, the object's keys are the fields of `Script`. Anything else gets the demo's answer.
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

End = Literal["done", "no_done", "eof", "reset", "error", "garbage", "stall", "hang"]
Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0)]

_MARK = "emulate "
_PIECE_LENGTH = 4


class BadScript(ValueError):
    """The object after `emulate ` is no script; the message names the key at fault."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """One response. Pieces are the chunks that carry reasoning, text, refusal or tool calls.

    The order is: wait `first_ms`, then an HTTP error if one is due, else the pieces `delay_ms`
    apart (give or take `jitter_ms`, the same each time) up to `after`, then `end`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    # What is said. `text` overrides `chunks`; without both, 16 chunks if nothing else is said.
    chunks: Count | None = None
    text: list[str] | None = None
    stamp: bool = False
    """Each of the `chunks` is "<number>:<time.monotonic_ns()> ", taken as it is written."""
    pad: Count = 0
    """So many letters more in each of them."""
    label: bool = False
    """Each of the `chunks` is "<request>.<number> ": which upstream request it is from."""
    surrogate: bool = False
    """An emoji at the end of the text, as two lone surrogates in two chunks."""
    empty: bool = False
    reasoning: str = ""
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    """Each {"name": str, "arguments": str or object, "id": str if it matters}."""
    raw: list[dict[str, Any]] | None = None
    """Chunks sent as they stand instead of all others; [DONE] follows if `end` is "done"."""

    # When.
    first_ms: Milliseconds = 0
    delay_ms: Milliseconds = 0
    jitter_ms: Milliseconds = 0
    hold_after: Count | None = None
    """Nothing more after so many pieces until `POST /emulator/release/KEY`, which counts for every
    request with this `key`."""

    # An HTTP error instead: for ever, or `status_times` times for one `key`.
    status: Annotated[int, Field(ge=400, le=599)] | None = None
    status_times: Count | None = None
    key: str = ""
    error_code: str | None = None
    retry_after_ms: int | None = None
    retry_after: int | float | str | None = None
    prompt_filter: bool = False

    # How it ends.
    end: End = "done"
    after: Count | None = None
    finish_reason: str | None = None
    late_filter: Literal["annotations", "blocked"] | None = None
    usage: bool = True

    @property
    def finish(self) -> str:
        return self.finish_reason or ("tool_calls" if self.tool_calls else "stop")

    def deltas(self, request: int) -> Iterator[dict[str, Any]]:
        """The pieces in order, each made when it is asked for: a stamp is of its own moment.

        `request` is the number of the upstream request that they answer.
        """
        for text in _split(self.reasoning):
            yield {"reasoning_content": text}
        for text in self._texts(request):
            yield {"content": text}
        for text in _split(self.refusal or ""):
            yield {"refusal": text}
        for index, call in enumerate(self.tool_calls or []):
            yield from _call_deltas(index, call)

    def _texts(self, request: int) -> Iterator[str]:
        if self.empty:
            return
        if self.text is not None:
            yield from self.text
        else:
            silent = self.surrogate or self.refusal is not None or self.tool_calls is not None
            count = self.chunks if self.chunks is not None else 0 if silent else 16
            for number in range(count):
                yield self._numbered(number, request) + "x" * self.pad
        if self.surrogate:
            yield from ("\ud83d", "\ude00")

    def _numbered(self, number: int, request: int) -> str:
        if self.label:
            return f"{request}.{number} "
        return f"{number}:{time.monotonic_ns()} " if self.stamp else f"{number} "


def prompt(**fields: Any) -> str:
    """The user message that asks for `Script(**fields)`."""
    Script(**fields)
    return _MARK + json.dumps(fields)


def parse(text: str) -> Script:
    """The script that a user's message asks for, or the demo's. Raises BadScript."""
    if not text.startswith(_MARK + "{"):
        return demo(text)
    try:
        return _ADAPTER.validate_python(json.loads(text[len(_MARK) :]))
    except json.JSONDecodeError as error:
        raise BadScript(f"The script is no JSON: {error}.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise BadScript(f"The script's key {key!r} is not usable: {first['msg']}.") from None


def demo(asked: str) -> Script:
    """A few paragraphs at the pace of a model: some seconds, so that a person can reload."""
    asked = " ".join(asked.split())
    echo = asked if len(asked) <= 80 else asked[:79].rstrip() + "…"
    prose = f"You wrote: “{echo}”\n\n{_PROSE}"
    return Script(text=_as_model_pieces(prose), first_ms=200, delay_ms=25, jitter_ms=12)


def _as_model_pieces(prose: str) -> list[str]:
    """Short words whole with their leading space, long ones cut, punctuation apart."""
    return re.findall(r"\n+| ?[^\W_]{1,8}(?![^\W_])| ?[^\W_]{1,6}| ?.", prose)


def _call_deltas(index: int, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    function = {"name": call.get("name", "lookup"), "arguments": ""}
    name = {"id": call.get("id", f"call_{index}"), "type": "function", "function": function}
    yield {"tool_calls": [{"index": index, **name}]}
    arguments = call.get("arguments", {})
    for text in _split(arguments if isinstance(arguments, str) else json.dumps(arguments)):
        yield {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _split(text: str) -> Iterator[str]:
    for start in range(0, len(text), _PIECE_LENGTH):
        yield text[start : start + _PIECE_LENGTH]


_ADAPTER = TypeAdapter(Script)

_PROSE = """\
I am the demo upstream: no model, only a small local process that speaks the same wire as Azure \
OpenAI. The words are canned, but the way they took to reach you is the real one.

Your question did not wait on this connection. It was put into a queue as a job, and a worker took \
it within a few milliseconds. The worker now reads me chunk by chunk and appends every piece to a \
log in Redis, and with the same step it is announced to every viewer of this answer. Your browser \
is one of those viewers, and nothing more than that.

So please be unkind to it. Reload this page now, in the middle of a sentence: what you had comes \
back at once from the log, and then the answer continues where it is. Open the link in a second \
window and both will show the same words at the same time. Close both, count to three, and come \
back.

You can also stop the worker. Another one takes over, says so, and begins the answer afresh, so \
that two attempts are never mixed. And if you have read enough, press Stop: that reaches all \
the way down to me, and I stop talking."""
