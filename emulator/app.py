"""The emulator as an ASGI application: bare, because thousands of chunks a second go through it.

It must be served by `emulator.serve`, which lets it reset a connection.
"""

import asyncio
import json
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs

from emulator.answers import Answer, Json, dumps, error, prompt_filtered
from emulator.script import BadScript, Script, parse

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Outcome = Literal["completed", "disconnected", "failed"]
_Events = defaultdict[str, asyncio.Event]

RESET = "emulator.reset"
"""The extension in the scope through which the server offers to reset the connection."""

_CLASSIC = re.compile(r"/openai/deployments/[^/]+/chat/completions")
_AZURE_V1 = "/openai/v1/chat/completions"
_OPENAI = "/v1/chat/completions"
_RELEASE = "/emulator/release/"
_BATCH = 16
"""Chunks without a pause share a write, but not so many that one stream starves the loop."""


@dataclass(eq=False)
class Record:
    """The `number`-th chat request, from 1. `outcome` is set, then `over`, when its response has
    ended:

    completed     all was sent that belongs to a whole answer
    failed        the emulator refused it or broke it off, as its script said
    disconnected  the client left first
    """

    number: int
    path: str
    headers: dict[str, str]
    body: Json
    key: str = ""
    """The script's, as soon as the script is read."""
    started: float = field(default_factory=time.monotonic)
    sent: int = 0
    outcome: Outcome | None = None
    ended: float | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.ended = time.monotonic()
        self.over.set()

    def public(self) -> Json:
        names = ("number", "key", "path", "body", "started", "sent", "outcome", "ended")
        return {name: getattr(self, name) for name in names}


class _Refused(Exception):
    def __init__(self, status: int, body: Json, headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.body = body
        self.headers = headers


class Emulator:
    """`requests` is the journal: the last `journal` chat requests, oldest first."""

    def __init__(self, journal: int = 1000) -> None:
        self.requests: deque[Record] = deque(maxlen=journal)
        self.total = 0
        self._arrived = asyncio.Event()
        self._refusals: Counter[str] = Counter()
        self._released: _Events = defaultdict(asyncio.Event)

    async def request(self, index: int) -> Record:
        """The chat request at `index`, from 0, as soon as it has come."""
        while self.total <= index:
            await self._arrived.wait()
        return self.requests[index - self.total]

    def release(self, key: str) -> None:
        """Let what is held, and what comes with this key, go on to its end."""
        self._released[key].set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        match scope["method"]:
            case "GET" if path == "/healthz":
                await _reply(send, 200, {"status": "ok"})
            case "GET" if path == "/emulator/requests":
                await _reply(send, 200, [record.public() for record in self.requests])
            case "POST" if path.startswith(_RELEASE):
                self.release(path.removeprefix(_RELEASE))
                await _reply(send, 200, {"status": "ok"})
            case "POST" if path in (_AZURE_V1, _OPENAI) or _CLASSIC.fullmatch(path):
                await self._chat(scope, receive, send)
            case _:
                missing = error(azure=True, status=404, code=None, message="Resource not found")
                await _reply(send, 404, missing)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer until done, or until the client is gone, whichever comes first."""
        if (raw := await _read_body(receive)) is None:
            return
        record = self._note(scope, raw)
        answering = asyncio.create_task(self._answer(record, scope, send))
        gone = asyncio.ensure_future(receive())
        outcome: Outcome = "failed"
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            outcome = answering.result() if answering.done() else "disconnected"
            # Comes at once, except after a reset: uvicorn would log a return before that.
            await gone
        finally:
            answering.cancel()
            gone.cancel()
            record.end(outcome)
            await asyncio.wait({answering, gone})

    def _note(self, scope: Scope, raw: bytes) -> Record:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        self.total += 1
        body = body if isinstance(body, dict) else {}
        record = Record(self.total, scope["path"], headers, body)
        self.requests.append(record)
        self._arrived.set()
        self._arrived = asyncio.Event()
        return record

    async def _answer(self, record: Record, scope: Scope, send: Send) -> Outcome:
        azure = record.path != _OPENAI
        try:
            _check_access(record, scope)
            script = parse(_check_body(record))
            record.key = script.key
            await asyncio.sleep(script.first_ms / 1000)
            self._check_refusal(script, azure=azure)
        except BadScript as bad:
            message = str(bad)
            await _reply(send, 400, error(azure=azure, status=400, code=None, message=message))
            return "failed"
        except _Refused as refused:
            await _reply(send, refused.status, refused.body, refused.headers)
            return "failed"
        model = str(record.body.get("model") or "emulator")
        answer = Answer(script, record.body, azure=azure, number=record.number, model=model)
        if record.body.get("stream"):
            return await _stream(record, answer, scope, send, self._released)
        return await _whole(record, answer, scope, send)

    def _check_refusal(self, script: Script, *, azure: bool) -> None:
        if script.prompt_filter:
            raise _Refused(400, prompt_filtered())
        if script.status is None:
            return
        if script.status_times is not None:
            if self._refusals[script.key] >= script.status_times:
                return
            self._refusals[script.key] += 1
        waits = {"retry-after-ms": script.retry_after_ms, "retry-after": script.retry_after}
        headers = {name: str(value) for name, value in waits.items() if value is not None}
        message = f"The script answers with {script.status}."
        body = error(azure=azure, status=script.status, code=script.error_code, message=message)
        raise _Refused(script.status, body, headers)


def _check_access(record: Record, scope: Scope) -> None:
    azure = record.path != _OPENAI
    bearer = record.headers.get("authorization", "").startswith("Bearer ")
    if not bearer and not (azure and record.headers.get("api-key")):
        code = "401" if azure else "invalid_api_key"
        message = "Access denied due to invalid subscription key or wrong API endpoint."
        raise _Refused(401, error(azure=azure, status=401, code=code, message=message))
    query = parse_qs(scope["query_string"].decode("latin-1"))
    if _CLASSIC.fullmatch(record.path) and not query.get("api-version"):
        message = "Resource not found"
        raise _Refused(404, error(azure=True, status=404, code=None, message=message))


def _check_body(record: Record) -> str:
    """The text of the last user message."""
    body, azure = record.body, record.path != _OPENAI
    messages, n = body.get("messages"), body.get("n") or 1
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        message = "'messages' must be a list of objects."
        raise _Refused(400, error(azure=azure, status=400, code=None, message=message))
    if not isinstance(n, int) or not 1 <= n <= 128:
        message = "'n' must be an integer from 1 to 128."
        raise _Refused(400, error(azure=azure, status=400, code=None, message=message))
    content = next(
        (each.get("content") for each in reversed(messages) if each.get("role") == "user"), ""
    )
    if isinstance(content, list):
        content = " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")


async def _stream(
    record: Record, answer: Answer, scope: Scope, send: Send, released: _Events
) -> Outcome:
    end = answer.script.end
    if end == "hang":
        await _for_ever()
    await _start(send, 200, b"text/event-stream; charset=utf-8", {"x-request-id": answer.id})
    unsent = await _play(record, answer, send, released)
    if end in ("stall", "reset"):
        await send({"type": "http.response.body", "body": unsent, "more_body": True})
        if end == "stall":
            await _for_ever()
        scope["extensions"][RESET]["reset"]()
    else:
        await send({"type": "http.response.body", "body": unsent})
    return "completed" if end == "done" else "failed"


async def _play(record: Record, answer: Answer, send: Send, released: _Events) -> bytes:
    """Send the steps at their times; what is left for the last write comes back."""
    due = time.monotonic()
    unsent: list[bytes] = []
    for pause, data, pieces in answer.steps():
        unsent.append(data)
        record.sent += pieces
        held = record.sent == answer.script.hold_after
        if pause or held or len(unsent) >= _BATCH:
            await send({"type": "http.response.body", "body": b"".join(unsent), "more_body": True})
            unsent.clear()
            # Against a schedule, so that 50 chunks a second are 50 on a busy machine too.
            due += pause
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        if held:
            await released[record.key].wait()
            due = time.monotonic()
    return b"".join(unsent)


async def _whole(record: Record, answer: Answer, scope: Scope, send: Send) -> Outcome:
    end = answer.script.end
    if end in ("hang", "stall"):
        await _for_ever()
    if end == "reset":
        scope["extensions"][RESET]["reset"]()
        return "failed"
    await _reply(send, 200, answer.whole(), {"x-request-id": answer.id})
    return "completed"


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def _read_body(receive: Receive) -> bytes | None:
    """None if the client left in the middle of it."""
    parts = []
    while (event := await receive())["type"] == "http.request":
        parts.append(event.get("body", b""))
        if not event.get("more_body"):
            return b"".join(parts)
    return None


async def _reply(
    send: Send, status: int, body: object, headers: dict[str, str] | None = None
) -> None:
    data = body if isinstance(body, bytes) else dumps(body)
    length = {"content-length": str(len(data))}
    await _start(send, status, b"application/json", {**length, **(headers or {})})
    await send({"type": "http.response.body", "body": data})


async def _start(send: Send, status: int, kind: bytes, headers: dict[str, str]) -> None:
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    pairs.append((b"content-type", kind))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
