"""The upstream's chunks as compact entries, and back, with nothing lost. Pure.

A chunk that differs from an earlier one only in its text is stored as that text alone. Everything
else is stored whole. To read a log back is a fold from its `started`: `Expander` keeps what the
later entries leave unsaid, the envelope (id, model, created, …) and the latest whole text chunk.
"""

import hashlib
import json
import re
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relay.errors import Garbled, UpstreamError, identifier
from relay.events import (
    STARTED,
    TEXT,
    WHOLE,
    Entry,
    Event,
    entry,
    first_choice_text,
    from_json,
    join_text,
    parts_of,
    text_in,
    to_json,
)

Chunk = dict[str, Any]

_ENVELOPE = frozenset({"id", "object", "created", "model", "system_fingerprint", "service_tier"})
# Random padding against traffic analysis; noise by its own definition.
_NOISE = frozenset({"obfuscation"})
# With these escapes alone a JSON string is about as long as its text.
_COMPACT_STRING = re.compile(rb'"[^"\\\x00-\x1f]*(?:\\["\\/bfnrt][^"\\\x00-\x1f]*)*"')
_GAP = "(the text)"


def parse(data: bytes) -> Chunk:
    """Raises UpstreamError for what is no chunk, and for an error in the place of one."""
    try:
        chunk: Chunk = _load(data)
        _WellFormed.model_validate(chunk)
    except ValidationError as wrong:
        place = ".".join(map(str, wrong.errors(include_input=False)[0]["loc"]))
        raise Garbled(identifier(place) or "no object") from None
    except (ValueError, RecursionError):
        raise Garbled("no JSON") from None
    if (error := chunk.get("error")) or chunk.get("object") == "error":
        raise UpstreamError(
            "upstream_failed",
            "The model service broke the answer off.",
            retryable=True,
            cause=identifier((error if isinstance(error, dict) else chunk).get("code")),
        )
    return chunk


def speaks(chunk: Chunk) -> bool:
    """Whether it has a piece of the answer, and does not only announce one: as the role does, or
    what a filter found in the prompt."""
    return any(
        choice.get("finish_reason")
        or any(value for name, value in (choice.get("delta") or {}).items() if name != "role")
        for choice in chunk.get("choices") or ()
    )


def _load(data: bytes) -> Any:
    return from_json(data.decode(errors="replace"))


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


_AT_FIRST = Field(fail_fast=True)
"""One error tells enough, and an event may have a million that are wrong."""


class _WellFormed(_Strict):
    """What the wires count on, where it is there."""

    model: str | None = None
    choices: "Annotated[list[_Choice], _AT_FIRST] | None" = None
    usage: "_Usage | None" = None


class _Usage(_Strict):
    prompt_tokens_details: dict[str, Any] | None = None
    completion_tokens_details: dict[str, Any] | None = None


class _Choice(_Strict):
    index: int = 0
    delta: "_Delta | None" = None
    finish_reason: str | None = None
    content_filter_results: dict[str, Any] | None = None


class _Delta(_Strict):
    tool_calls: "Annotated[list[_Call], _AT_FIRST] | None" = None


class _Call(_Strict):
    index: int | None = None
    id: str | None = None
    function: "_Function | None" = None


class _Function(_Strict):
    name: str | None = None
    arguments: str | None = None


class _Around(NamedTuple):
    """The bytes around the text of a chunk. Another chunk with the same bytes around another string
    differs in its text alone; nearly all of an answer is told so, without being parsed."""

    before: bytes
    after: bytes

    @classmethod
    def of(cls, data: bytes, chunk: Chunk) -> Self | None:
        """None where it is not certain which string is the text."""
        text = to_json(first_choice_text(chunk))
        for name in (b'"content":', b'"content": '):
            before, found, after = data.partition(name + text)
            if found:
                around = cls(before + name, after)
                probe = around.before + to_json(_GAP) + around.after
                return around if _load(probe) == _with_text(chunk, _GAP) else None
        return None

    def text_in(self, data: bytes) -> bytes | None:
        """The JSON string in the place of the text; None if this is not such a chunk."""
        if not (data.startswith(self.before) and data.endswith(self.after)):
            return None
        text = data[len(self.before) : len(data) - len(self.after)]
        return text if _COMPACT_STRING.fullmatch(text) else None


class Compactor:
    """Turns one attempt's chunks into entries, and keeps what its terminal event will tell."""

    def __init__(self, ordinal: int, model: str) -> None:
        """As `Claim.ordinal`; `model` is named where the upstream names none."""
        self._ordinal = ordinal
        self._model = model
        self._envelope: Chunk | None = None
        self._shape: bytes | None = None
        self._around: _Around | None = None
        """Of chunks that are stored as their text; to parse them gives the same."""
        self._texts: list[str] = []
        self._finished: dict[int, bool] = {}
        """Of each choice that began."""
        self.chunks = 0
        self.finish_reason: str | None = None
        self.usage: Chunk | None = None

    def entries(self, data: bytes) -> list[Entry]:
        """The entries for one chunk: `started` before the first, then one per chunk.

        Raises UpstreamError for what is no chunk.
        """
        text = self._around.text_in(data) if self._around is not None else None
        if text is not None and (told := _utf8(text)) is not None:
            self.chunks += 1
            self._texts.append(told[1:-1] if "\\" not in told else json.loads(told))
            return [Entry(TEXT, text)]
        chunk = parse(data)
        entries = self._entries(chunk)
        if self._around is None and entries[-1].kind == TEXT:
            self._around = _Around.of(data, chunk)
        return entries

    def _entries(self, chunk: Chunk) -> list[Entry]:
        envelope = {key: value for key, value in chunk.items() if key in _ENVELOPE}
        rest = {k: v for k, v in chunk.items() if k not in _ENVELOPE and k not in _NOISE}
        self._note(rest)
        if self._envelope is None:
            self._envelope = envelope
            model = envelope.get("model") or self._model
            started = {"attempt": self._ordinal, "model": model, "envelope": envelope}
            return [entry(STARTED, started), self._compact(rest)]
        if envelope == self._envelope:
            return [self._compact(rest)]
        self._envelope, self._shape, self._around = envelope, None, None
        return [entry(WHOLE, {"chunk": rest, "envelope": envelope})]

    def summary(self) -> Chunk:
        """What a terminal event tells of its attempt: number of chunks, SHA-256 of the text."""
        text = join_text(self._texts).encode()
        return {"chunks": self.chunks, "sha256": hashlib.sha256(text).hexdigest()}

    @property
    def complete(self) -> bool:
        """Whether each choice that began also gave its finish_reason."""
        return self.finish_reason is not None and all(self._finished.values())

    def _compact(self, rest: Chunk) -> Entry:
        text = _plain_text(rest)
        if text is None:
            return entry(WHOLE, {"chunk": rest})
        # Compared as JSON: to Python, True and 1 would be the same.
        shape = to_json(_with_text(rest, ""))
        if shape == self._shape:
            return entry(TEXT, text)
        self._shape, self._around = shape, None
        return entry(WHOLE, {"chunk": rest})

    def _note(self, rest: Chunk) -> None:
        self.chunks += 1
        self._texts.append(first_choice_text(rest))
        self.usage = rest.get("usage") or self.usage
        for choice in rest.get("choices") or ():
            index, reason = choice.get("index", 0), choice.get("finish_reason")
            if not reason:
                if choice.get("delta"):
                    # A choice that has finished stays so: usage may come beside an empty delta.
                    self._finished.setdefault(index, False)
                continue
            self._finished[index] = True
            if index == 0 or self.finish_reason is None:
                self.finish_reason = reason


class Expander:
    """The upstream's chunks again, from a log's events in order."""

    def __init__(self) -> None:
        self._envelope: Chunk = {}
        self._shape: Chunk = {}

    def chunk(self, event: Event) -> Chunk | None:
        """The chunk that this event stands for; None where it stands for none."""
        if event.kind == STARTED:
            self._envelope = event.value()["envelope"]
        elif event.kind == TEXT:
            return {**self._envelope, **_with_text(self._shape, event.value())}
        elif event.kind == WHOLE:
            value = event.value()
            self._envelope = value.get("envelope", self._envelope)
            if _plain_text(value["chunk"]) is not None:
                self._shape = value["chunk"]
            return {**self._envelope, **value["chunk"]}
        return None


def reasoning_of(delta: Chunk) -> str:
    """What the model thinks before it answers. Servers have two names for it; some send both.
    Mistral has it in parts of the content."""
    return (
        text_in(delta, "reasoning_content")
        or text_in(delta, "reasoning")
        or "".join(text_in(part, "thinking") for part in parts_of(delta.get("content"), "thinking"))
    )


def goes_back(delta: Chunk) -> bool:
    """Whether what was thought stands in the next question, as `reasoning_content`. Services that
    name it so want that, and refuse a tool's output without; those that do not refuse the name."""
    return bool(text_in(delta, "reasoning_content"))


def call_key(piece: Chunk, newest: int | str) -> int | str:
    """Which of an attempt's tool calls this is a piece of. Some servers do not number them: then an
    id is a call's own, and what has none goes on with the newest."""
    index = piece.get("index")
    return index if index is not None else piece.get("id") or newest


def _plain_text(rest: Chunk) -> str | None:
    """The text of a chunk with one unfinished first choice that says nothing else; None for others:
    a piece of a tool call or of reasoning may come twice, and beside an empty text."""
    match rest.get("choices"):
        case [{"delta": {"content": str(text), **others}} as choice]:
            others.pop("role", None)
            more = (choice.get("finish_reason"), choice.get("logprobs"), *others.values())
            return text if not any(more) and choice.get("index") == 0 else None
    return None


def _with_text(shape: Chunk, text: str) -> Chunk:
    choice = shape["choices"][0]
    return {**shape, "choices": [{**choice, "delta": {**choice["delta"], "content": text}}]}


def _utf8(text: bytes) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None
