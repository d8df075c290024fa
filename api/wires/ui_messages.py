"""The AI SDK's UI message stream: parts of one assistant message, as useChat puts it together."""

from collections.abc import Callable, Iterator
from typing import Any

from api.wires import sse
from relay.chunks import Chunk, Expander, call_key, goes_back, reasoning_of
from relay.events import (
    CANCELLED,
    COMPLETED,
    STARTED,
    TEXT,
    Event,
    from_json,
    join_text,
    text_in,
    to_json,
)

HEADERS = {"x-vercel-ai-ui-message-stream": "v1"}
DONE = b"data: [DONE]\n\n"

FINISH_REASONS = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content-filter",
    "tool_calls": "tool-calls",
}
"""The upstream's name -> the SDK's, which raises at any other than its own."""

Part = dict[str, Any]

GOES_BACK: Part = {"relay": {"name": "reasoning_content"}}
"""The `providerMetadata` of a thought that the model service wants back: the SDK keeps it with the
part, and sends it with the next question."""
_GAP = "(the text)"


def encoder() -> Callable[[Event], bytes]:
    return _Encoder()


def encode_start(message_id: str) -> bytes:
    """What every viewer is told first, once: whose parts they are. The same id in a replay makes
    the client put it in the place of what it has."""
    return sse.frame({"type": "start", "messageId": message_id}) + sse.frame({"type": "start-step"})


def encode_error(message: str) -> bytes:
    """The client raises it, and keeps what it has."""
    return sse.frame({"type": "error", "errorText": message}) + DONE


class _Call:
    """A tool call of which pieces have come."""

    def __init__(self, call_id: str, name: str) -> None:
        self.id = call_id
        self.name = name
        self.pieces: list[str] = []

    def frame(self) -> bytes:
        """What lets the client run the tool, or tells that nobody can."""
        part = {"toolCallId": self.id, "toolName": self.name}
        text = join_text(self.pieces)
        try:
            given = from_json(text or "{}")
            return sse.frame({"type": "tool-input-available", **part, "input": given})
        except (ValueError, RecursionError):
            told = "The model's arguments are not valid JSON."
            return sse.frame({"type": "tool-input-error", **part, "input": text, "errorText": told})


class _Encoder:
    """The frames of one step. Nothing for `queued`; a later `started` takes the step back."""

    def __init__(self) -> None:
        self._expander = Expander()
        self._begin()

    def _begin(self) -> None:
        self._open: str | None = None
        self._opened = 0
        self._calls: dict[int | str, _Call] = {}
        self._newest_call: int | str = 0
        self._refused = False
        self._around: tuple[bytes, bytes] | None = None

    def __call__(self, event: Event) -> bytes:
        if event.kind == TEXT and self._around is not None:
            # All of it but the text is the same each time, and rendered once.
            before, after = self._around
            return before + event.data + after
        chunk = self._expander.chunk(event)
        if event.kind == STARTED:
            return self._take_back()
        if event.terminal:
            return b"".join(map(sse.frame, self._close())) + self._end(event)
        parts = list(self._parts(chunk or {}))
        plain = event.kind == TEXT and [part["type"] for part in parts] == ["text-delta"]
        self._around = _around(parts[0]) if plain else None
        return b"".join(map(sse.frame, parts))

    def _take_back(self) -> bytes:
        written = self._opened or self._calls
        self._begin()
        return sse.frame({"type": "reset-step"}) if written else b""

    def _parts(self, chunk: Chunk) -> Iterator[Part]:
        """Of the first choice alone."""
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0) == 0:
                delta = choice.get("delta") or {}
                more = {"providerMetadata": GOES_BACK} if goes_back(delta) else {}
                yield from self._say("reasoning", reasoning_of(delta), **more)
                yield from self._say("text", text_in(delta, "content"))
                yield from self._say("text", text_in(delta, "refusal"))
                self._refused = self._refused or bool(text_in(delta, "refusal"))
                for piece in delta.get("tool_calls") or ():
                    yield from self._call(piece)

    def _say(self, kind: str, text: str, **more: Part) -> Iterator[Part]:
        if not text:
            return
        if self._open is None or not self._open.startswith(kind):
            yield from self._close()
            self._opened += 1
            self._open = f"{kind}-{self._opened}"
            yield {"type": f"{kind}-start", "id": self._open, **more}
        yield {"type": f"{kind}-delta", "id": self._open, "delta": text}

    def _close(self) -> Iterator[Part]:
        """An open part would look as if more of it were to come."""
        if self._open is not None:
            yield {"type": f"{self._open.partition('-')[0]}-end", "id": self._open}
            self._open = None

    def _call(self, piece: Part) -> Iterator[Part]:
        key = self._newest_call = call_key(piece, self._newest_call)
        function = piece.get("function") or {}
        call = self._calls.get(key)
        if call is None:
            yield from self._close()
            call = _Call(piece.get("id") or f"call_{key}", function.get("name") or "")
            self._calls[key] = call
            yield {"type": "tool-input-start", "toolCallId": call.id, "toolName": call.name}
        if text := function.get("arguments"):
            call.pieces.append(text)
            yield {"type": "tool-input-delta", "toolCallId": call.id, "inputTextDelta": text}

    def _end(self, event: Event) -> bytes:
        if event.kind == COMPLETED:
            # Not before: a client runs the tool at once, and an attempt that is taken back has
            # called for nothing.
            reason = FINISH_REASONS.get(event.value().get("finish_reason"), "other")
            # By this the SDK's own providers tell a refusal from a text.
            reason = "content-filter" if self._refused and reason == "stop" else reason
            calls = b"".join(call.frame() for call in self._calls.values())
            finish = sse.frame({"type": "finish", "finishReason": reason})
            return calls + sse.frame({"type": "finish-step"}) + finish + DONE
        if event.kind == CANCELLED:
            return sse.frame({"type": "abort", "reason": "cancelled"}) + DONE
        return encode_error(event.value()["message"])


def _around(delta: Part) -> tuple[bytes, bytes]:
    before, _, after = sse.frame({**delta, "delta": _GAP}).partition(to_json(_GAP))
    return before, after
