"""The bytes of one response, in the shapes of Azure OpenAI and of OpenAI. No I/O."""

import json
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

from emulator.script import Script

Json = dict[str, Any]
Step = tuple[float, bytes, int]
"""Seconds to wait before, bytes to write, and how many pieces they hold."""

_SAFE = {
    name: {"filtered": False, "severity": "safe"}
    for name in ("hate", "self_harm", "sexual", "violence")
}
_SAFE_PROMPT = {**_SAFE, "jailbreak": {"filtered": False, "detected": False}}
_NOWHERE = {"id": "", "model": "", "object": "", "created": 0}
_DONE = b"data: [DONE]\n\n"
_GAP = "(the text)"

# json.dumps would build an encoder for each chunk.
_in_utf8 = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_escaped = json.JSONEncoder(separators=(",", ":")).encode


def dumps(value: object) -> bytes:
    """Compact JSON in UTF-8, as the services send it; escapes where UTF-8 cannot say it."""
    try:
        return _in_utf8(value).encode()
    except UnicodeEncodeError:
        return _escaped(value).encode()


def sse(value: object) -> bytes:
    return b"data: %b\n\n" % dumps(value)


def error(*, azure: bool, status: int, code: str | None, message: str) -> Json:
    if azure:
        return {"error": {"code": code or str(status), "message": message}}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def prompt_filtered() -> Json:
    result = {**_SAFE_PROMPT, "violence": {"filtered": True, "severity": "medium"}}
    inner = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": result}
    message = (
        "The response was filtered due to the prompt triggering Azure OpenAI's content management "
        "policy. Please modify your prompt and retry."
    )
    return {
        "error": {
            "message": message,
            "type": None,
            "param": "prompt",
            "code": "content_filter",
            "status": 400,
            "innererror": inner,
        }
    }


class Answer:
    """What `script` makes of the chat request `body`, the `number`-th that came, answered as Azure
    does or as OpenAI does."""

    def __init__(self, script: Script, body: Json, *, azure: bool, number: int, model: str) -> None:
        self.script = script
        self.azure = azure
        self.messages = body.get("messages")
        self.n = int(body.get("n") or 1)
        self.logprobs = bool(body.get("logprobs"))
        self.top = int(body.get("top_logprobs") or 0)
        self.include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self.number = number
        self.id = f"chatcmpl-emulator{number:08}"
        self.pieces = 0
        self.characters = 0
        self.head: Json = {
            "created": int(time.time()),
            "id": self.id,
            "model": model,
            "object": "chat.completion.chunk",
            "system_fingerprint": "fp_emulator",
        }
        if not azure:
            self.head["service_tier"] = "default"
            if self.include_usage:
                self.head["usage"] = None

    def steps(self) -> Iterator[Step]:
        """The event stream up to the end that the script wants."""
        if self.script.raw is not None:
            yield from self._paced((sse(chunk), 1) for chunk in self.script.raw)
        else:
            yield from self._opening()
            yield from self._paced(self._pieces())
        match self.script.end:
            case "done" | "no_done":
                yield 0.0, self._closing(), 0
            case "error":
                yield 0.0, sse(self._late_error()), 0
            case "garbage":
                yield 0.0, b'data: {"choices":[{"delta":{"content":"brok\n\n', 0

    def whole(self) -> bytes:
        """The answer to a request that does not stream, as one JSON object."""
        deltas = list(islice(self.script.deltas(self.number), self.script.after))
        text = "".join(delta.get("content", "") for delta in deltas)
        calls = _join_calls(deltas)
        message: Json = {
            "role": "assistant",
            "content": None if calls else text,
            "refusal": "".join(delta.get("refusal", "") for delta in deltas) or None,
        }
        if calls:
            message["tool_calls"] = calls
        if self.script.reasoning:
            message["reasoning_content"] = self.script.reasoning
        finish = "content_filter" if self.script.late_filter == "blocked" else self.script.finish
        choices = [
            self._choice(index, "message", message, finish, _SAFE)
            | {"logprobs": self._whole_logprobs(deltas)}
            for index in range(self.n)
        ]
        head = {**self.head, "object": "chat.completion"}
        if self.azure:
            head["prompt_filter_results"] = _prompt_filter_results()
        return dumps({"choices": choices, **head, "usage": self._usage(len(deltas))})

    def _whole_logprobs(self, deltas: list[Json]) -> Json | None:
        if not self.logprobs:
            return None
        kinds = ("content", "refusal")
        said = {kind: [delta[kind] for delta in deltas if kind in delta] for kind in kinds}
        return {kind: [_logprob(text, self.top) for text in said[kind]] or None for kind in kinds}

    def _opening(self) -> Iterator[Step]:
        if self.azure:
            results = {"prompt_filter_results": _prompt_filter_results()}
            yield 0.0, sse({"choices": [], **_NOWHERE, **results}), 0
        role = {
            "role": "assistant",
            "content": None if self.script.tool_calls else "",
            "refusal": None,
        }
        for index in range(self.n):
            yield 0.0, self._chunk(self._choice(index, "delta", role)), 0

    def _paced(self, pieces: Iterator[tuple[bytes, int]]) -> Iterator[Step]:
        script = self.script
        for number in islice(count(), script.after):
            # The pause is a step of its own, so that the piece after it is made after it.
            swing = script.jitter_ms * (number * 37 % 101 / 50 - 1)
            if (pause := script.delay_ms + swing) > 0:
                yield pause / 1000, b"", 0
            if (piece := next(pieces, None)) is None:
                return
            yield 0.0, *piece

    def _pieces(self) -> Iterator[tuple[bytes, int]]:
        """Each piece for every choice, side by side."""
        writers = [self._text_writer(index) for index in range(self.n)]
        for delta in self.script.deltas(self.number):
            self.pieces += 1
            text = delta.get("content")
            if text is None or self.logprobs:
                chunks = [self._piece(index, delta) for index in range(self.n)]
            else:
                self.characters += len(text)
                chunks = [write(text) for write in writers]
            yield b"".join(chunks), self.n

    def _piece(self, index: int, delta: Json) -> bytes:
        filtered = _SAFE if "content" in delta else {}
        choice = self._choice(index, "delta", delta, filtered=filtered)
        if self.logprobs and "tool_calls" not in delta:
            kinds = ("content", "refusal")
            choice["logprobs"] = {
                kind: [_logprob(delta[kind], self.top)] if kind in delta else None for kind in kinds
            }
        return self._chunk(choice)

    def _text_writer(self, index: int) -> Callable[[str], bytes]:
        """All of a text chunk but its text is the same each time, and rendered once."""
        before, _, after = self._piece(index, {"content": _GAP}).partition(dumps(_GAP))
        return lambda text: before + dumps(text) + after

    def _closing(self) -> bytes:
        parts = []
        if self.script.raw is None:
            for index in range(self.n):
                parts.append(self._chunk(self._choice(index, "delta", {}, self.script.finish)))
            parts += [sse(chunk) for chunk in self._late_chunks()]
            if self.include_usage and self.script.usage:
                usage = {"usage": self._usage(self.pieces)}
                parts.append(sse({"choices": [], **self.head, **usage}))
        if self.script.end == "done":
            parts.append(_DONE)
        return b"".join(parts)

    def _late_chunks(self) -> Iterator[Json]:
        """What the asynchronous filter says after the end, with no delta."""
        if self.script.late_filter is None:
            return
        half = self.characters // 2
        found: Json = {"protected_material_text": {"detected": True, "filtered": True}}
        for start, end in ((0, half), (half, self.characters)):
            blocked = start == half and self.script.late_filter == "blocked"
            choice = {
                "index": 0,
                "finish_reason": "content_filter" if blocked else None,
                "content_filter_results": found if blocked else _SAFE,
                "content_filter_offsets": {
                    "check_offset": start,
                    "start_offset": start,
                    "end_offset": end,
                },
            }
            yield {"choices": [choice], **_NOWHERE}

    def _late_error(self) -> Json:
        code = self.script.error_code or "server_error"
        message = "The server had an error while processing your request. Sorry about that!"
        return error(azure=False, status=500, code=code, message=message)

    def _chunk(self, choice: Json) -> bytes:
        return sse({"choices": [choice], **self.head})

    def _choice(
        self,
        index: int,
        kind: str,
        content: Json,
        finish_reason: str | None = None,
        filtered: Json | None = None,
    ) -> Json:
        choice = {
            kind: content,
            "finish_reason": finish_reason,
            "index": index,
            "logprobs": None,
        }
        return {"content_filter_results": filtered or {}, **choice} if self.azure else choice

    def _usage(self, pieces: int) -> Json:
        prompt = 8 + len(dumps(self.messages)) // 4
        completion = pieces * self.n
        return {
            "completion_tokens": completion,
            "completion_tokens_details": {"audio_tokens": 0, "reasoning_tokens": 0},
            "prompt_tokens": prompt,
            "prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": 0},
            "total_tokens": prompt + completion,
        }


def _prompt_filter_results() -> list[Json]:
    return [{"prompt_index": 0, "content_filter_results": _SAFE_PROMPT}]


def _logprob(text: str, top: int) -> Json:
    def entry(rank: int) -> Json:
        other = text if rank == 0 else f"{text}{rank}"
        raw = list(other.encode(errors="surrogatepass"))
        return {"token": other, "logprob": -0.01 - rank, "bytes": raw}

    return {**entry(0), "top_logprobs": [entry(rank) for rank in range(top)]}


def _join_calls(deltas: list[Json]) -> list[Json]:
    calls: dict[int, Json] = {}
    for delta in deltas:
        for part in delta.get("tool_calls", []):
            if "id" in part:
                call = {"id": part["id"], "type": "function", "function": dict(part["function"])}
                calls[part["index"]] = call
            else:
                arguments = part["function"]["arguments"]
                calls[part["index"]]["function"]["arguments"] += arguments
    return list(calls.values())
