"""`python -m bench.load`: many clients in one process that costs little and says what it cost.

Reads one JSON `Load` from its input, writes one JSON `Seen`. A chunk says when it was written
(bench.upstream), so its delay is known where it is read; reading is all that these clients do.
"""

import asyncio
import gc
import json
import re
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop

from bench.machine import REST, on
from cli.processes import module, module_env

STAMP = re.compile(rb"(\d+):(\d{12,}) ")
_EVENTS_URL = re.compile(rb'"events_url": ?"([^"]+)"')


@dataclass(kw_only=True)
class Load:
    """`count` clients at once, each of which sends `request` and leaves when it has seen the last
    of `chunks`, or when `seconds` are over."""

    port: int
    count: int
    request: str
    chunks: int
    follow: bool = False
    """The answer to `request` names an `events_url`, where the chunks are."""
    share: bool = False
    """So it does, but only one client asks, and all follow."""
    seconds: float = 60.0
    arrive_seconds: float = 0.0
    """Over this time the clients come, instead of as soon as the one before is connected."""
    rounds: int = 1
    """So often, one round after the other."""
    every: int = 1
    """Of a client's reads every so many-th is looked into. All, they would cost more than the
    rest where there are a hundred thousand in a second."""


@dataclass(kw_only=True)
class Seen:
    """Times are in ms."""

    first: list[float] = field(default_factory=list)
    """From when a client begins to connect to its first chunk."""
    whole: list[float] = field(default_factory=list)
    """To its last."""
    delays: list[float] = field(default_factory=list)
    """Of the oldest chunk in a read that came live: of each, when they come one by one."""
    whole_bytes: int = 0
    """That all clients have read."""
    begun: float = 0.0
    """When the first chunk was written that came live, and when the last one was read: by
    time.monotonic, which is one for all processes of a machine."""
    ended: float = 0.0
    broken: int = 0
    """Clients that did not see the last chunk."""
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0


class Client(asyncio.Protocol):
    def __init__(self, load: Load, request: bytes, seen: Seen, *, follow: bool) -> None:
        self._request = request
        self._seen = seen
        self._follow = follow
        self._every = load.every
        self._reads = 0
        self._rest = b""
        self._last = b"%d:" % (load.chunks - 1)
        self._started = False
        self._transport: asyncio.Transport
        self._begun = time.monotonic_ns()
        self.over: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def ask(self) -> None:
        self._transport.write(self._request)

    def connection_lost(self, _: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(False)

    def data_received(self, data: bytes) -> None:
        self._seen.whole_bytes += len(data)
        self._reads += 1
        if self._follow:
            self._go_on(data)
        elif not self._started or self._reads % self._every == 0:
            self._look_into(data)
        if self._last in data and STAMP.search(data, data.rfind(self._last)):
            self._end()

    def _go_on(self, data: bytes) -> None:
        """The answer to the first request: the address of the second."""
        self._rest += data
        if found := _EVENTS_URL.search(self._rest):
            self._follow, self._rest = False, b""
            self._transport.write(get(found[1].decode()))

    def _look_into(self, data: bytes) -> None:
        now = time.monotonic_ns()
        stamp = STAMP.search(data)
        if stamp is None:
            return
        written = int(stamp[2])
        if not self._started:
            self._started = True
            self._seen.first.append((now - self._begun) / 1e6)
        if written > self._begun:
            self._seen.delays.append((now - written) / 1e6)
            self._seen.begun = self._seen.begun or written / 1e9

    def _end(self) -> None:
        if not self.over.done():
            now = time.monotonic_ns()
            self._seen.ended = now / 1e9
            self._seen.whole.append((now - self._begun) / 1e6)
            self.over.set_result(True)
            self._transport.close()

    def leave(self) -> None:
        self._transport.close()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n\r\n".encode()


def post(path: str, body: Any, accept: str = "*/*") -> bytes:
    data = json.dumps(body)
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\napi-key: k\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n{data}"
    ).encode()


def run(load: Load, cores: set[int] = REST) -> Seen:
    """The clients, in a process of their own."""
    done = subprocess.run(
        module("bench.load"),
        input=json.dumps(asdict(load)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=module_env(),
        preexec_fn=on(cores),
    )
    return Seen(**json.loads(done.stdout))


async def _run(load: Load) -> Seen:
    seen = Seen()
    for _ in range(load.rounds):
        await _round(load, seen)
    seen.broken = load.count * load.rounds - len(seen.whole)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seen.cpu_seconds = usage.ru_utime + usage.ru_stime
    return seen


async def _round(load: Load, seen: Seen) -> None:
    loop = asyncio.get_running_loop()
    request = load.request.encode()
    if load.share:
        request = get(await events_url(load.port, request))
    clients: list[Client] = []
    over: list[asyncio.Future[Any]]

    async def connect() -> Client:
        client = Client(load, request, seen, follow=load.follow and not load.share)
        await loop.create_connection(lambda: client, "127.0.0.1", load.port)
        clients.append(client)
        return client

    async def come(number: int) -> None:
        await asyncio.sleep(number * load.arrive_seconds / load.count)
        client = await connect()
        client.ask()
        await client.over

    begun = time.monotonic()
    if load.arrive_seconds:
        over = [asyncio.ensure_future(come(number)) for number in range(load.count)]
    else:
        for _ in range(load.count):
            (await connect()).ask()
        over = [client.over for client in clients]
    await asyncio.wait(over, timeout=load.seconds)
    seen.wall_seconds += time.monotonic() - begun
    for each in over:
        each.cancel()
    for client in clients:
        client.leave()


async def events_url(port: int, request: bytes) -> str:
    """Ask by this request, and return where the events of the answer are."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = b""
    while not (found := _EVENTS_URL.search(answer)):
        received = await reader.read(65536)
        assert received, "the server ended it"
        answer += received
    writer.close()
    return found[1].decode()


if __name__ == "__main__":
    gc.disable()  # What it stands still for would count as a delay of the server's.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    json.dump(asdict(uvloop.run(_run(Load(**json.load(sys.stdin))))), sys.stdout)
