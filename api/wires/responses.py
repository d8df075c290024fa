"""OpenAI's Responses API: a log as the events of one response, or folded into that response.

The frames are numbered from the birth of the stream on. So a frame has one number for every
viewer, from every process and at any time, and is found again by it (`after`).

This wire cannot take back what it said. A new attempt closes the items of the one before it as
`incomplete`, and begins items of its own: within one item nothing is ever spliced, and the output
of the response is that of the newest attempt alone. Who would take all items together is told of a
failure in place of a new attempt (`interrupted`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from api.wires.chat_completions import INTERRUPTED
from relay.chunks import Chunk, Expander, call_key, goes_back, reasoning_of
from relay.events import (
    CANCELLED,
    COMPLETED,
    FAILED,
    QUEUED,
    STARTED,
    TEXT,
    Event,
    join_text,
    text_in,
    to_json,
)
from relay.ids import alias_of

GOES_BACK = "rs_c"
"""Before the id of a thought that the model service wants back: clients keep an item's id."""
_END = b"\n\n"
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
_ERROR_CODES = {
    "content_filter": "invalid_prompt",
    "upstream_rate_limited": "rate_limit_exceeded",
    "upstream_refused": "invalid_prompt",
}
"""The codes that this API knows; any other of ours is its `server_error`. The model service's own
goes before them."""

_Frames = Iterator[tuple[str, Chunk]]
"""Types of frames without their `response.`, and what each has beside its type and number."""


@dataclass(frozen=True)
class Born:
    """What is known of a response at its birth; as a wire, the encoder of its feed."""

    stream_id: str
    created_s: int
    model: str
    format: str | None = None
    """The type of the text that was asked for, where that is known."""

    def __call__(self) -> Callable[[Event], bytes]:
        response = _Response(self)
        number = 0

        def encode(event: Event) -> bytes:
            nonlocal number
            frames = []
            for kind, fields in response.take(event):
                frames.append(_frame(kind, number, fields))
                number += 1
            return b"".join(frames)

        return encode

    @property
    def id(self) -> str:
        return f"resp_{self.stream_id}"

    def item_id(self, prefix: str, index: int) -> str:
        """The same in every replay."""
        return f"{prefix}_{alias_of(self.stream_id)}_{index}"


def fold(born: Born, events: Iterable[Event]) -> Chunk:
    """The `response` as these events leave it; after the terminal one, that of the last frame.

    Prompts leave Redis when the answer ends, so nothing of the request is told, at no time: no
    instructions, tools, metadata or temperature. But whoever asks is told the type of text that he
    asked for: LangChain parses nothing without. `background` is true of every response here: none
    ends with the connection that asked for it.
    """
    response = _Response(born)
    for event in events:
        for _ in response.take(event):
            pass
    return response.whole()


def interrupted(born: Born, events: Sequence[Event]) -> bytes:
    """What follows the frames of these events where the next one would begin the answer anew."""
    encode = born()
    for event in events:
        encode(event)
    return encode(events[-1]._replace(kind=FAILED, data=to_json(INTERRUPTED)))


def after(body: bytes, skip: int) -> tuple[bytes, int]:
    """A piece of the body without its first `skip` frames, and how many of those it did not have.

    No line feed stands within JSON as it is encoded here, so an empty line ends a frame.
    """
    if not skip:
        return body, 0
    frames = body.split(_END)[:-1]
    return b"".join(frame + _END for frame in frames[skip:]), max(0, skip - len(frames))


class _Part:
    """A text that grows by deltas: a part of an item's content, or the arguments of a call."""

    def __init__(self, kind: str, field: str, place: Chunk) -> None:
        self._kind = kind
        self._field = field
        self._place = place
        self._texts: list[str] = []
        # Nobody can ask for them here, but the SDK's types have them as required.
        self._logprobs: Chunk = {"logprobs": []} if kind == "output_text" else {}

    def grow(self, text: str) -> _Frames:
        self._texts.append(text)
        yield f"{self._kind}.delta", {**self._place, "delta": text, **self._logprobs}

    def done(self) -> _Frames:
        yield f"{self._kind}.done", {**self._place, self._field: self.text, **self._logprobs}

    @property
    def text(self) -> str:
        return join_text(self._texts)

    def whole(self) -> Chunk:
        more: Chunk = {"annotations": []} if self._kind == "output_text" else {}
        return {"type": self._kind, self._field: self.text, **more, **self._logprobs}


class _Item:
    """An item of the output: a `message`, or with its own kind of part the `reasoning`."""

    def __init__(self, kind: str, item_id: str, index: int, fields: Chunk) -> None:
        self._head = {"type": kind, "id": item_id}
        self._fields = fields
        self._place = {"item_id": item_id, "output_index": index}
        self._parts: dict[str, _Part] = {}
        self.status = "in_progress"

    def added(self) -> _Frames:
        yield "output_item.added", self._as_item()

    def grow(self, kind: str, text: str) -> _Frames:
        if kind not in self._parts:
            place = {**self._place, "content_index": len(self._parts)}
            field = "refusal" if kind == "refusal" else "text"
            part = self._parts[kind] = _Part(kind, field, place)
            yield "content_part.added", {**place, "part": part.whole()}
        yield from self._parts[kind].grow(text)

    def close(self, status: str) -> _Frames:
        self.status = status
        for index, part in enumerate(self._parts.values()):
            yield from part.done()
            place = {**self._place, "content_index": index}
            yield "content_part.done", {**place, "part": part.whole()}
        yield "output_item.done", self._as_item()

    def whole(self) -> Chunk:
        content = [part.whole() for part in self._parts.values()]
        return {**self._head, "status": self.status, **self._fields, "content": content}

    def _as_item(self) -> Chunk:
        return {"output_index": self._place["output_index"], "item": self.whole()}


class _Call(_Item):
    """A `function_call`. It has arguments where other items have content."""

    def __init__(self, item_id: str, index: int, fields: Chunk) -> None:
        super().__init__("function_call", item_id, index, fields)
        self._arguments = _Part("function_call_arguments", "arguments", self._place)

    def grow(self, kind: str, text: str) -> _Frames:
        yield from self._arguments.grow(text)

    def close(self, status: str) -> _Frames:
        self.status = status
        yield from self._arguments.done()
        yield "output_item.done", self._as_item()

    def whole(self) -> Chunk:
        arguments = {"arguments": self._arguments.text}
        return {**self._head, "status": self.status, **self._fields, **arguments}


class _Response:
    """One response as its log grows. Items stay open until their attempt is over, since the pieces
    of several may come in turn; but a thought ends where something else begins."""

    def __init__(self, born: Born) -> None:
        self._born = born
        self._expander = Expander()
        self._output: list[_Item] = []
        self._open: dict[str, _Item] = {}
        self._newest_call: int | str = 0
        self._begun = 0
        self._status = QUEUED
        self._ending: Chunk = {}

    def take(self, event: Event) -> _Frames:
        """What this event adds, to be taken to its end."""
        chunk = None if event.kind == TEXT else self._expander.chunk(event)
        if event.kind == TEXT:
            yield from self._message("output_text", event.value())
        elif chunk is not None:
            yield from self._grow(chunk)
        elif event.kind == QUEUED:
            yield "created", {"response": self.whole()}
            yield "queued", {"response": self.whole()}
        elif event.kind == STARTED:
            yield from self._close("incomplete")
            self._output = []
            self._status = "in_progress"
            yield "in_progress", {"response": self.whole()}
        elif event.terminal:
            yield from self._end(event)

    def whole(self) -> Chunk:
        return {
            "id": self._born.id,
            "object": "response",
            "created_at": self._born.created_s,
            "status": self._status,
            "background": True,
            "error": self._ending.get("error"),
            "incomplete_details": self._ending.get("incomplete_details"),
            "instructions": None,
            "metadata": {},
            "model": self._born.model,
            "output": [item.whole() for item in self._output],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            **({"text": {"format": {"type": self._born.format}}} if self._born.format else {}),
            "usage": self._ending.get("usage"),
        }

    def _grow(self, chunk: Chunk) -> _Frames:
        """By the first choice, which is the only one that can be asked for here."""
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            delta = choice.get("delta") or {}
            if text := reasoning_of(delta):
                prefix = GOES_BACK if goes_back(delta) else "rs"
                yield from self._item("reasoning", prefix, "reasoning", {"summary": []})
                yield from self._open["reasoning"].grow("reasoning_text", text)
            yield from self._message("output_text", text_in(delta, "content"))
            yield from self._message("refusal", text_in(delta, "refusal"))
            for call in delta.get("tool_calls") or ():
                yield from self._call(call)

    def _message(self, kind: str, text: str) -> _Frames:
        if text:
            yield from self._item("message", "msg", "message", {"role": "assistant"})
            yield from self._open["message"].grow(kind, text)

    def _call(self, call: Chunk) -> _Frames:
        function = call.get("function") or {}
        # Each call has its name and id in its first piece.
        self._newest_call = call_key(call, self._newest_call)
        name, key = function.get("name") or "", f"call {self._newest_call}"
        call_id = call.get("id") or self._born.item_id("call", self._begun)
        yield from self._item(key, "fc", "function_call", {"call_id": call_id, "name": name})
        if text := function.get("arguments"):
            yield from self._open[key].grow("arguments", text)

    def _item(self, key: str, prefix: str, kind: str, fields: Chunk) -> _Frames:
        """Begin an item, if it has not begun. Its index is never another attempt's."""
        if key in self._open:
            return
        if thought := self._open.pop("reasoning", None):
            yield from thought.close("completed")
        item_id, index = self._born.item_id(prefix, self._begun), self._begun
        is_call = kind == "function_call"
        item = _Call(item_id, index, fields) if is_call else _Item(kind, item_id, index, fields)
        self._output.append(item)
        self._open[key] = item
        self._begun += 1
        yield from item.added()

    def _close(self, status: str) -> _Frames:
        for item in self._open.values():
            yield from item.close(status)
        self._open = {}

    def _end(self, event: Event) -> _Frames:
        value = event.value()
        self._status, self._ending = _ending(event.kind, value)
        yield from self._close("completed" if self._status == COMPLETED else "incomplete")
        self._ending["usage"] = _usage(value.get("usage"))
        # There is no frame for a cancelled response; it is one that was not completed.
        kind = "incomplete" if self._status == CANCELLED else self._status
        yield kind, {"response": self.whole()}


def _ending(kind: str, value: Chunk) -> tuple[str, Chunk]:
    """The status of an ended response, and what it tells of its end."""
    if kind == FAILED:
        ours = _ERROR_CODES.get(value["code"], "server_error")
        code = value.get("upstream", {}).get("code", ours)
        return FAILED, {"error": {"code": code, "message": value["message"], "type": value["code"]}}
    reason = _INCOMPLETE.get(value.get("finish_reason") or "")
    if kind == COMPLETED and reason:
        return "incomplete", {"incomplete_details": {"reason": reason}}
    return kind, {}


def _usage(usage: Chunk | None) -> Chunk | None:
    """What a chat completion says of its tokens, in the names of this API."""
    if not usage:
        return None
    asked: dict[str, Any] = usage.get("prompt_tokens_details") or {}
    said: dict[str, Any] = usage.get("completion_tokens_details") or {}
    return {
        "input_tokens": usage.get("prompt_tokens") or 0,
        "input_tokens_details": {
            "cached_tokens": asked.get("cached_tokens") or 0,
            "cache_write_tokens": asked.get("cache_write_tokens") or 0,
        },
        "output_tokens": usage.get("completion_tokens") or 0,
        "output_tokens_details": {"reasoning_tokens": said.get("reasoning_tokens") or 0},
        "total_tokens": usage.get("total_tokens") or 0,
    }


def _frame(kind: str, number: int, fields: Chunk) -> bytes:
    name = f"response.{kind}"
    data = to_json({"type": name, "sequence_number": number, **fields})
    return b"event: %b\ndata: %b%b" % (name.encode(), data, _END)
