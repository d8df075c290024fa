"""OpenAI's chat completions: the upstream's own chunks again, one by one or folded into an object.

What the upstream said comes out as it went in, but for `obfuscation`, which is random padding.
"""

from collections.abc import Callable, Iterable
from typing import Any

from api.wires import sse
from relay.chunks import Chunk, Expander, call_key
from relay.errors import StreamGone
from relay.events import CANCELLED, COMPLETED, FAILED, STARTED, TEXT, Event, join_text, to_json

INTERRUPTED = {
    "code": "interrupted",
    "message": "The answer was begun anew: watch it by its X-Stream-Id, or ask again.",
}
CANCELLED_MESSAGE = "The answer was cancelled: ask again if that was not meant."
STATUSES = {
    "answer_timeout": 504,
    "cancelled": 400,
    "content_filter": 400,
    "internal": 500,
    "interrupted": 503,
    "queue_timeout": 503,
    "stream_gone": 410,
    "upstream_rate_limited": 429,
    "upstream_refused": 400,
    "upstream_timeout": 504,
    "upstream_unavailable": 503,
}
"""Of an answer that failed, by its code. One that has begun has its status already, but the type of
its error is the same. Any other is 502."""
_GAP = "(the text)"
# Said again, whole, by each part that has it; everything else that is text goes on where it was.
_REPEATED = frozenset({"id", "type", "role", "index", "format"})


def encoder() -> Callable[[Event], bytes]:
    """Without usage, which a client did not ask for that did not send `stream_options`."""
    return _Encoder(include_usage=False)


def encoder_with_usage() -> Callable[[Event], bytes]:
    return _Encoder(include_usage=True)


class _Encoder:
    """`data:` and a chunk each, `data: [DONE]` at the end; nothing for `queued` and `started`."""

    def __init__(self, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._expander = Expander()
        self._around: tuple[bytes, bytes] | None = None

    def __call__(self, event: Event) -> bytes:
        if event.kind == TEXT:
            # All of it but the text is the same each time, and rendered once.
            before, after = self._around or self._render_around(event)
            return before + event.data + after
        self._around = None
        if event.kind == COMPLETED:
            return b"data: [DONE]\n\n"
        if event.kind == FAILED:
            return encode_error(event.value())
        if event.kind == CANCELLED:
            return encode_error({"code": CANCELLED, "message": CANCELLED_MESSAGE})
        chunk = self._expander.chunk(event)
        return b"" if chunk is None else self._encode(chunk)

    def _encode(self, chunk: Chunk) -> bytes:
        if not self._include_usage and "usage" in chunk:
            # As null it may be on every chunk, also on one that says something else.
            if chunk["usage"] and not chunk.get("choices"):
                return b""
            chunk = {key: value for key, value in chunk.items() if key != "usage"}
        return sse.frame(chunk)

    def _render_around(self, event: Event) -> tuple[bytes, bytes]:
        chunk = self._expander.chunk(event._replace(data=to_json(_GAP)))
        assert chunk is not None  # noqa: S101
        before, _, after = self._encode(chunk).partition(to_json(_GAP))
        self._around = before, after
        return self._around


def status_of(code: str) -> int:
    return STATUSES.get(code, 502)


def encode_error(value: dict[str, Any]) -> bytes:
    """How this wire says in the middle of a stream that it will not be finished."""
    code = value["code"]
    return sse.frame({"error": error(code, value["message"], status=status_of(code))})


def encode_gone(gone: StreamGone) -> bytes:
    return encode_error({"code": gone.code, "message": gone.message})


def error(code: str, message: str, *, status: int, param: str | None = None) -> Chunk:
    kind = "invalid_request_error" if 400 <= status < 500 and status != 429 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    return {"message": message, "type": kind, "param": param, "code": code}


def fold(events: Iterable[Event]) -> Chunk:
    """One `chat.completion` of the chunks of the newest attempt."""
    expander = Expander()
    completion: Chunk = {}
    choices: dict[int, Chunk] = {}
    for event in events:
        if event.kind == STARTED:
            completion, choices = {}, {}
        chunk = expander.chunk(event)
        if chunk is not None:
            # The filter's own chunks have an empty id, model and time.
            completion |= {k: v for k, v in chunk.items() if v or k not in completion}
            for choice in chunk.get("choices") or ():
                _add(choices.setdefault(choice.get("index", 0), {}), choice)
    whole = [_whole_choice(choices[index]) for index in sorted(choices)]
    return {**completion, "object": "chat.completion", "choices": whole}


def _whole_choice(choice: Chunk) -> Chunk:
    said = choice.pop("delta", None) or {}
    message = {"role": "assistant", "content": None, "refusal": None, **said}
    if isinstance(message["content"], str):
        message["content"] = join_text([message["content"]])
    for call in message.get("tool_calls") or ():
        call.pop("index", None)
    choice.pop("content_filter_offsets", None)
    return {"logprobs": None, **choice, "message": message}


def _add(whole: Chunk, choice: Chunk) -> None:
    """What is said grows piece by piece; what is said about it, as the filter's results, is each
    time the whole of it."""
    said = {key: value for key, value in choice.items() if key in {"delta", "logprobs"}}
    about = {key: value for key, value in choice.items() if key not in said and value is not None}
    if calls := (said.get("delta") or {}).get("tool_calls"):
        said["delta"] = {**said["delta"], "tool_calls": _numbered(calls, whole)}
    results = whole.get("content_filter_results", {}) | about.get("content_filter_results", {})
    whole.update(about)
    if results:
        whole["content_filter_results"] = results
    _merge(whole, said)


def _numbered(calls: list[Chunk], whole: Chunk) -> list[Chunk]:
    """Pieces of tool calls by the key of the call that each goes on with."""
    known = (whole.get("delta") or {}).get("tool_calls")
    newest = known[-1]["index"] if known else 0
    return [{**call, "index": (newest := call_key(call, newest))} for call in calls]


def _merge(whole: Chunk, part: Chunk) -> None:
    for key, value in part.items():
        known = whole.get(key)
        if known is None:
            whole[key] = _own(value)
        elif value is None or key in _REPEATED:
            whole[key] = value or known  # Some servers repeat it as an empty string.
        elif isinstance(known, str) and isinstance(value, str):
            whole[key] = known + value
        elif isinstance(known, dict) and isinstance(value, dict):
            _merge(known, value)
        elif isinstance(known, list) and isinstance(value, list):
            _merge_lists(known, value)
        elif isinstance(known, str | list) and isinstance(value, str | list):
            whole[key] = _as_parts(known)
            _merge_lists(whole[key], _as_parts(value))
        else:
            whole[key] = value


def _as_parts(content: str | list[Any]) -> list[Any]:
    """Mistral sends strings and lists as the content of one answer."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content


def _merge_lists(known: list[Any], parts: list[Any]) -> None:
    """By their `index` where they have one, as the pieces of tool calls; else one after another."""
    # Made at the first that has one: most lists have none.
    numbered: dict[int | str, Any] | None = None
    for part in parts:
        index = _index(part)
        if index is not None and numbered is None:
            numbered = {number: each for each in known if (number := _index(each)) is not None}
        if index is None or numbered is None:
            known.append(_own(part))
        elif index in numbered:
            _merge(numbered[index], part)
        else:
            numbered[index] = _own(part)
            known.append(numbered[index])


def _index(part: Any) -> int | str | None:
    index = part.get("index") if isinstance(part, dict) else None
    return index if isinstance(index, int | str) else None


def _own(value: Any) -> Any:
    """A copy, since what is merged into belongs to nobody else."""
    if isinstance(value, dict):
        return {key: _own(each) for key, each in value.items()}
    if isinstance(value, list):
        owned: list[Any] = []
        _merge_lists(owned, value)
        return owned
    return value
