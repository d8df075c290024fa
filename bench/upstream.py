"""`python -m bench.upstream PORT`: an upstream that costs next to nothing.

The emulator can do everything and takes 35 µs a chunk for it, which would be a good part of what
is measured. This one speaks Azure's wire and knows four keys of a script: `chunks`, `first_ms`
(before the first), `delay_ms` (between them) and `pad` (more bytes in each). Each chunk says when
it was written: "<number>:<time.monotonic_ns()> ".
"""

import asyncio
import gc
import json
import sys
import time
from functools import cache

import uvloop

from emulator.answers import Answer
from emulator.script import Script, prompt

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
FLAT_OUT_BATCH = 16


def question(chunks: int, delay_ms: float = 0, first_ms: float = 0, pad: int = 0) -> str:
    """The user message to which it answers so."""
    return prompt(chunks=chunks, delay_ms=delay_ms, first_ms=first_ms, pad=pad, stamp=True)


class Answering(asyncio.Protocol):
    """One connection, one request after another."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_lost(self, _: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        lines = dict(line.split(b":", 1) for line in head.lower().split(b"\r\n")[1:])
        if len(body) < int(lines.get(b"content-length", b"0")):
            return
        self._received = b""
        self._answer(json.loads(body))

    def _answer(self, request: dict[str, object]) -> None:
        messages = request["messages"]
        assert isinstance(messages, list)
        script = json.loads(messages[-1]["content"].partition(" ")[2])
        self._left, self._number = int(script["chunks"]), 0
        self._seconds = script.get("delay_ms", 0) / 1000
        self._pad = b"x" * script.get("pad", 0)
        options = request.get("stream_options") or {}
        assert isinstance(options, dict)
        opening, self._before, self._after, self._closing = _rendered(
            include_usage=bool(options.get("include_usage"))
        )
        self._transport.write(opening)
        self._due = self._loop.time() + script.get("first_ms", 0) / 1000
        self._timer = self._loop.call_at(self._due, self._write)

    def _write(self) -> None:
        """The chunks that are due. Against a schedule, so that a late one delays no other."""
        self._timer = None
        batch = 1 if self._seconds else FLAT_OUT_BATCH
        count = min(batch, self._left)
        self._transport.write(b"".join(self._piece() for _ in range(count)))
        self._left -= count
        if not self._left:
            self._transport.write(self._closing)
            return
        self._due += self._seconds
        self._timer = self._loop.call_at(self._due, self._write)

    def _piece(self) -> bytes:
        text = b"%d:%d " % (self._number, time.monotonic_ns())
        self._number += 1
        return _framed(self._before + text + self._pad + self._after)


@cache
def _rendered(*, include_usage: bool) -> tuple[bytes, bytes, bytes, bytes]:
    """The opening, what stands before and behind the text of a chunk, and the closing."""
    request = {"messages": [], "stream_options": {"include_usage": include_usage}}
    answer = Answer(Script(text=["|"]), request, azure=True, number=1, model="demo")
    *opening, chunk, closing = [data for _, data, _ in answer.steps() if data]
    before, _, after = chunk.partition(b"|")
    return HEAD + _framed(b"".join(opening)), before, after, _framed(closing) + b"0\r\n\r\n"


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(
        Answering, "127.0.0.1", port, backlog=4096
    )
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    gc.disable()  # What it stands still for would count as a delay of the server's.
    uvloop.run(main(int(sys.argv[1])))
