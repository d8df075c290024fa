"""The server, by real sockets: no connection harms the others or stays for ever."""

import asyncio
import json
import logging
import random
import resource
import signal
import socket
import sys
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

import api.server
from api.app import create_app
from api.server import SEND_BYTES, SPARE_DESCRIPTORS, Connection, Server, create_server
from cli.processes import free_port, module, module_env
from cli.redis_server import RedisServer
from relay import keys
from relay.events import STARTED, TEXT, entry
from relay.settings import MIB, Settings
from tests.conftest import (
    FEW,
    append,
    asking,
    changed,
    events_of,
    few_descriptors,
    given_up,
    make_claims,
    make_log,
    running_worker,
    until,
    warning_of_few_descriptors,
)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="an option of Linux' sockets")


class Served:
    """A running server and how to reach it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.port = int(server.servers[0].sockets[0].getsockname()[1])

    @property
    def connections(self) -> set[Connection]:
        return {c for c in self.server.server_state.connections if isinstance(c, Connection)}

    async def gone(self) -> None:
        """Return when there is no connection in the process any more."""

        async def none() -> bool:
            return not self.connections

        await until(none, 10)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Served]:
    server = create_server(create_app(settings), settings)
    running = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    try:
        yield Served(server)
    finally:
        server.should_exit = True
        await running


@asynccontextmanager
async def connected(port: int, **options: int) -> AsyncIterator[tuple[StreamReader, StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: x", *headers, "\r\n"]).encode()


def post(body: bytes) -> bytes:
    length = f"content-length: {len(body)}\r\ncontent-type: application/json"
    return f"POST /chat HTTP/1.1\r\nhost: x\r\n{length}\r\n\r\n".encode() + body


def offering(request: bytes) -> bytes:
    """The same request, with the offer that Java's client makes by itself."""
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAQAAP__\r\n"
    return request.replace(b"host: x\r\n", b"host: x\r\n" + offer, 1)


def in_chunks(request: bytes) -> bytes:
    """The same request, its body in two chunks with a trailer."""
    head, body = request.split(b"\r\n\r\n", 1)
    head = head.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in (body[:5], body[5:]))
    return head + b"\r\n\r\n" + chunks + b"0\r\nx: y\r\n\r\n"


async def exchange(port: int, request: bytes) -> bytes:
    """What the server says to this request, up to the end that it makes."""
    async with connected(port) as (reader, writer), asyncio.timeout(30):
        writer.write(request)
        return await reader.read()


async def ask(port: int, **script: object) -> str:
    request = post(json.dumps(asking(**script)).encode())
    said = await exchange(port, request.replace(b"host: x", b"host: x\r\nconnection: close"))
    assert said.startswith(b"HTTP/1.1 202"), said
    return str(json.loads(said.split(b"\r\n\r\n", 1)[1])["stream_id"])


def events(stream_id: str, *headers: str) -> bytes:
    return get(f"/streams/{stream_id}/events", *headers)


def ids(body: bytes) -> list[bytes]:
    """The cursors of the events that came."""
    return [line[4:] for line in body.split(b"\n") if line.startswith(b"id: ")]


def text_of(body: bytes) -> str:
    """The text that came, whose answer was completed at the first attempt."""
    assert body.count(b"event: started") == body.count(b"event: completed") == 1
    data = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: ")]
    return "".join(value.get("text", "") for value in data)


# Requests that do not come.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.server, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(api.server, "BODY_SECONDS", 0.3)


@pytest.mark.parametrize("names", ["evil.example localhost", "localhost evil.example"])
async def test_of_two_names_both_count_and_are_refused_in_the_shape_of_the_api(
    settings: Settings, names: str
) -> None:
    hosts = "\r\n".join(f"host: {name}" for name in names.split())
    request = get("/v1/models", "connection: close").replace(b"host: x", hosts.encode())
    async with serving(settings) as served:
        said = await exchange(served.port, request)
    assert said.startswith(b"HTTP/1.1 421")
    assert json.loads(said.split(b"\r\n\r\n")[1])["error"]["code"] == "unknown_host"


async def test_trailers_of_a_request_are_not_kept(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers: list[list[tuple[bytes, bytes]]] = []

    def on_message_complete(self: Connection) -> None:
        headers.append(list(self.scope["headers"]))
        complete(self)

    complete = Connection.on_message_complete
    monkeypatch.setattr(Connection, "on_message_complete", on_message_complete)
    head = b"POST /nothing HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    async with serving(settings) as server, connected(server.port) as (reader, writer):
        writer.write(head + b"0\r\n" + b"x: y\r\n" * 1000 + b"\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 404")
    assert headers == [[(b"host", b"x"), (b"transfer-encoding", b"chunked")]]


async def test_a_cookie_that_is_slow_to_parse_holds_up_nobody(settings: Settings) -> None:
    cookie = b'a="' + b"\\" * 60_000 + b'"'
    async with serving(settings) as server, connected(server.port) as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\nCookie: %b\r\n\r\n" % cookie)
        async with asyncio.timeout(3):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "half",
    [
        b"",
        b"GET /healthz HTT",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\n",
        post(b'{"messages":[]}')[:-1],
        offering(post(b'{"messages":[]}'))[:-1],
    ],
)
async def test_a_request_that_stays_half_is_answered_408_and_its_connection_closed(
    settings: Settings, half: bytes
) -> None:
    async with serving(settings) as served:
        said = await exchange(served.port, half)
        assert said.startswith(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n")
        await served.gone()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("begin", "drop"),
    [
        (b"GET /healthz HTTP/1.1\r\n", b"x-y: z\r\n"),
        (post(b" " * 1000)[:-1000], b" "),
        (b"", b"\r\n"),
    ],
)
@pytest.mark.parametrize("kept_alive", [False, True])
async def test_a_request_that_comes_drop_by_drop_does_not_live_longer_for_that(
    settings: Settings, begin: bytes, drop: bytes, kept_alive: bool
) -> None:
    async with serving(settings) as served, connected(served.port) as (reader, writer):
        if kept_alive:
            writer.write(get("/healthz"))
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.write(begin)

        async def drip() -> None:
            while True:
                writer.write(drop)
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        async with asyncio.timeout(4):
            with suppress(ConnectionResetError):  # What still dripped in was not read any more.
                await reader.read()
        dripping.cancel()
        await served.gone()


@pytest.mark.usefixtures("impatient")
async def test_a_request_may_follow_late_on_a_kept_connection_but_must_then_come_whole(
    settings: Settings,
) -> None:
    async with serving(settings) as served, connected(served.port) as (reader, writer):
        for _ in range(2):
            writer.write(get("/healthz"))
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(2 * api.server.HEAD_SECONDS)
        writer.write(get("/healthz")[:-2])
        async with asyncio.timeout(5):
            assert (await reader.read()).startswith(b"HTTP/1.1 408")


async def test_an_idle_connection_outlives_the_minute_for_which_a_balancer_keeps_it(
    settings: Settings,
) -> None:
    async with serving(settings) as served, connected(served.port) as (reader, writer):
        writer.write(get("/healthz"))
        await reader.readuntil(b"}")
        [connection] = served.connections
        timer = connection.timeout_keep_alive_task
        assert timer is not None
        assert timer.when() - asyncio.get_running_loop().time() > 60


async def test_a_body_has_more_time_than_a_head(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.server, "HEAD_SECONDS", 0.1)
    async with serving(settings) as served, connected(served.port) as (reader, writer):
        request = post(json.dumps(asking()).encode())
        writer.write(request[:-1])
        await asyncio.sleep(3 * api.server.HEAD_SECONDS)
        writer.write(request[-1:])
        async with asyncio.timeout(5):
            assert b" 202 " in await reader.readline()


@pytest.mark.usefixtures("impatient")
async def test_a_viewer_has_no_time_limit_and_no_timer(settings: Settings) -> None:
    async with (
        serving(changed(settings, heartbeat_seconds=0.05)) as served,
        connected(served.port) as (reader, writer),
    ):
        writer.write(events(await ask(served.port)))
        async with asyncio.timeout(10):
            for _ in range(20):
                await reader.readuntil(b"\n:\n\n" if _ else b":\n\n")
        (connection,) = served.connections
        assert connection._deadline is None


@pytest.mark.usefixtures("impatient")
async def test_a_request_that_waits_behind_a_response_is_not_blamed_for_it(
    settings: Settings,
) -> None:
    async with (
        serving(settings) as served,
        running_worker(settings),
        connected(served.port) as (reader, writer),
    ):
        stream_id = await ask(served.port, chunks=40, delay_ms=25)
        second = post(json.dumps(asking(chunks=1)).encode())
        writer.write(events(stream_id) + second[:-5])
        async with asyncio.timeout(10):
            assert b"completed" in await reader.readuntil(b"0\r\n\r\n")
            writer.write(second[-5:])
            assert b" 202 " in await reader.readline()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("answered", ["in part", "whole"])
async def test_who_owes_a_body_for_which_no_answer_waits_is_cut_off_without_another_answer(
    settings: Settings, answered: str
) -> None:
    async with serving(settings) as served:
        if answered == "whole":
            request, said = post(b"{}").replace(b"/chat", b"/nothing")[:-1], b"}"
        else:
            request, said = events(await ask(served.port), "content-length: 1"), b"queued"
        async with connected(served.port) as (reader, writer), asyncio.timeout(5):
            writer.write(request)
            await reader.readuntil(said)
            rest = b""
            with suppress(ConnectionResetError):
                rest = await reader.read()
        assert b"HTTP/1.1" not in rest


@pytest.mark.usefixtures("impatient")
async def test_who_neither_takes_an_answer_nor_sends_its_next_request_is_cut_off(
    settings: Settings, redis: Redis
) -> None:
    async with serving(settings) as served:
        with await stuck_at(served.port, get(f"/streams/{await much_said(redis)}")) as stuck:

            async def answered_in_vain() -> bool:
                return any(c.transport.get_write_buffer_size() for c in served.connections)

            await until(answered_in_vain)
            stuck.send(b"GET /")
            await served.gone()


async def test_a_question_that_is_broken_off_is_not_asked_even_if_it_could_be(
    settings: Settings, redis: Redis
) -> None:
    async with serving(settings) as served:
        async with connected(served.port) as (_, writer):
            writer.write(post(json.dumps(asking()).encode() + b" ")[:-1])
            await until(lambda: under_way(served, 1))
        await until(lambda: under_way(served, 0))
        assert await redis.keys("relay:*") == []


async def under_way(served: Served, requests: int) -> bool:
    return len(served.server.server_state.tasks) == requests


# Requests that offer another protocol.


@pytest.fixture(params=[1, 7, 100, 65536])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes is read in pieces of so many bytes."""

    def in_pieces(self: Connection, data: bytes) -> None:
        for start in range(0, len(data), request.param):
            received(self, data[start : start + request.param])

    received = Connection.data_received
    monkeypatch.setattr(Connection, "data_received", in_pieces)


async def statuses(port: int, requests: bytes) -> list[bytes]:
    """Of the responses to these requests and to a last one."""
    said = await exchange(port, requests + get("/healthz", "connection: close"))
    return [response[:3] for response in said.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("framed", [lambda request: request, in_chunks])
async def test_a_request_that_offers_another_protocol_is_answered_as_any_other(
    settings: Settings, framed: Callable[[bytes], bytes]
) -> None:
    async with serving(settings) as served:
        asked = framed(offering(post(json.dumps(asking()).encode())))
        requests = asked + offering(get("/nothing")) + asked
        assert await statuses(served.port, requests) == [b"202", b"404", b"202", b"200"]


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("framed", [lambda request: request, in_chunks])
async def test_a_body_behind_such_an_offer_is_never_taken_for_a_request(
    settings: Settings, framed: Callable[[bytes], bytes]
) -> None:
    async with serving(settings) as served:
        request = framed(offering(post(get("/healthz"))))
        assert await statuses(served.port, request) == [b"400", b"200"]


@pytest.mark.usefixtures("cut")
async def test_a_last_request_with_such_an_offer_has_its_body_too(settings: Settings) -> None:
    async with serving(settings) as served:
        asked = offering(post(json.dumps(asking()).encode()))
        said = await exchange(served.port, asked.replace(b": Upgrade", b": close, Upgrade"))
        assert said.startswith(b"HTTP/1.1 202")


async def test_who_asks_for_a_websocket_is_answered_by_http(settings: Settings) -> None:
    offer = ("connection: Upgrade", "upgrade: websocket", "sec-websocket-version: 13")
    request = get("/healthz", *offer, "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==")
    async with serving(settings) as served:
        assert await statuses(served.port, request) == [b"200", b"200"]


# What is told.


async def test_a_response_does_not_say_what_serves_it(settings: Settings) -> None:
    async with serving(settings) as served:
        said = await exchange(served.port, get("/healthz", "connection: close"))
    assert said.startswith(b"HTTP/1.1 200")
    assert b"\r\nserver:" not in said.lower()


async def test_no_line_of_the_log_holds_the_query_of_a_request(
    settings: Settings, caplog: pytest.LogCaptureFixture, said: list[Any]
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(settings) as served:
        await exchange(served.port, get("/healthz?word=SECRET", "connection: close"))
    assert "api_ready" in events_of(said)
    assert "SECRET" not in caplog.text + str(said)


# Peers that do not take what they asked for.


async def stuck_at(port: int, request: bytes) -> socket.socket:
    """A client that asks and then never reads."""
    stuck = socket.socket()
    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stuck.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(stuck, ("127.0.0.1", port))
    await loop.sock_sendall(stuck, request)
    return stuck


async def much_said(redis: Redis) -> str:
    """A stream that goes on, with more in it than a connection holds."""
    log = make_log(redis)
    stream_id = (await log.create({"messages": []})).stream_id
    [claim] = await make_claims(redis).claim(1)
    start = entry(STARTED, {"attempt": 1, "model": "m"})
    await append(log, claim, 0, [start, *[entry(TEXT, "x" * 20_000)] * 100])
    return stream_id


@pytest.mark.parametrize("found_by", ["us", pytest.param("the kernel", marks=LINUX)])
async def test_one_of_a_hundred_viewers_never_reads_and_is_gone_while_the_others_get_everything(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, found_by: str
) -> None:
    def bound(peer: socket.socket, write_seconds: float) -> None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        if found_by == "the kernel":
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000)

    monkeypatch.setattr(api.server, "_bound", bound)
    write_seconds = 1.0 if found_by == "us" else 60.0
    patient = changed(settings, write_seconds=write_seconds, body_bytes=64 * MIB)
    before = given_up()
    async with serving(patient) as served, running_worker(patient):
        stream_id = await ask(served.port, text=["x" * 20_000] * 100, delay_ms=5)
        with await stuck_at(served.port, events(stream_id)):
            request = events(stream_id, "connection: close")
            others = await asyncio.gather(*(exchange(served.port, request) for _ in range(99)))
            await served.gone()
    assert given_up() == before + 1
    assert {len(text_of(body)) for body in others} == {2_000_000}
    assert all(body.endswith(b"0\r\n\r\n") for body in others)


@LINUX
async def test_a_response_whose_rest_is_never_taken_does_not_keep_its_connection(
    settings: Settings,
) -> None:
    """Nothing of ours waits for it any more: it is the kernel that finds it."""
    settings = changed(settings, write_seconds=1.0, body_bytes=64 * MIB)
    async with serving(settings) as served, running_worker(settings):
        stream_id = await ask(served.port, text=["x" * 20_000] * 100)
        await exchange(served.port, events(stream_id, "connection: close"))
        request = get(f"/streams/{stream_id}", "connection: close")
        with await stuck_at(served.port, request):

            async def being_sent() -> bool:
                return any(c.transport.is_closing() for c in served.connections)

            await until(being_sent)
            await served.gone()


@LINUX
@pytest.mark.parametrize(
    ("write_seconds", "milliseconds"), [(7.5, 7500), (1e308, 2**31 - 1), (1e-308, 1)]
)
async def test_the_kernel_is_told_to_find_peers_that_vanished_and_to_hold_little_for_them(
    settings: Settings, write_seconds: float, milliseconds: int
) -> None:
    async with (
        serving(changed(settings, write_seconds=write_seconds)) as served,
        connected(served.port) as (reader, writer),
    ):
        writer.write(get("/healthz"))
        await reader.readuntil(b"}")
        (connection,) = served.connections
        peer = connection.transport.get_extra_info("socket")
        assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == milliseconds
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * SEND_BYTES


@pytest.mark.parametrize("behind", [b"", get("/healthz"), 3 * get("/healthz")])
async def test_a_viewer_with_requests_behind_it_is_let_go_when_its_connection_is(
    settings: Settings, behind: bytes
) -> None:
    async with serving(settings) as served:
        stream_id = await ask(served.port)
        async with connected(served.port) as (reader, writer):
            writer.write(events(stream_id) + behind)
            await reader.readuntil(b"queued")
        await until(lambda: nobody_watches(served), 5)


async def test_a_viewer_that_sends_what_nobody_asked_for_is_let_go_all_the_same(
    settings: Settings,
) -> None:
    async with serving(settings) as served:
        stream_id = await ask(served.port)
        async with connected(served.port) as (reader, writer):
            writer.write(events(stream_id, f"content-length: {2 * settings.body_bytes}"))
            await reader.readuntil(b"\r\n\r\n")
        await until(lambda: nobody_watches(served), 5)


async def test_requests_without_end_behind_a_response_end_the_connection(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = 0

    def counted(self: Connection) -> None:
        nonlocal heads
        heads += 1
        complete(self)

    complete = Connection.on_headers_complete
    monkeypatch.setattr(Connection, "on_headers_complete", counted)
    async with serving(settings) as served:
        stream_id = await ask(served.port)
        asked = heads
        async with connected(served.port) as (reader, writer):
            writer.write(events(stream_id) + 1000 * get("/healthz"))
            with suppress(ConnectionResetError):
                await reader.read()
        await until(lambda: nobody_watches(served), 5)
        assert heads - asked < 20


async def test_nonsense_behind_a_response_is_never_answered_in_the_midst_of_it(
    settings: Settings,
) -> None:
    async with serving(settings) as served:
        stream_id = await ask(served.port)
        async with connected(served.port) as (reader, writer):
            writer.write(events(stream_id))
            await reader.readuntil(b"queued")
            writer.write(b"nonsense\r\n\r\n")
            rest = b""
            with suppress(ConnectionResetError):
                rest = await reader.read()
            assert b"HTTP/1.1" not in rest
        await until(lambda: nobody_watches(served), 5)


async def test_what_is_no_http_is_refused_and_leaves_no_line_in_the_log(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(settings) as server:
        of_tls = b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n"
        assert (await exchange(server.port, of_tls)).startswith(b"HTTP/1.1 400")
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []


async def nobody_watches(served: Served) -> bool:
    app: Any = served.server.config.app
    return not app.state.parts.hub.viewers()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@LINUX
async def test_ten_thousand_connections_that_drop_leave_nothing_behind(
    settings: Settings, redis: Redis
) -> None:
    async with serving(settings) as served:
        stream_id = await ask(served.port)
        requests = [b"", b"GET / HT", events(stream_id), post(b'{"messages":[]}')[:-1]]

        async def drop(request: bytes) -> None:
            async with connected(served.port) as (reader, writer):
                writer.write(request)
                if request.endswith(b"\r\n\r\n"):
                    await reader.readuntil(b"queued")

        async def counted() -> tuple[int, int, int]:
            return open_files(), len(asyncio.all_tasks()), len(await redis.client_list())

        await asyncio.gather(*map(drop, 20 * requests))
        await served.gone()
        before = await counted()
        for _ in range(125):
            await asyncio.gather(*map(drop, 20 * requests))

        async def as_before() -> bool:
            files, tasks, clients = (
                now - then for now, then in zip(await counted(), before, strict=True)
            )
            # The crowd may have made the pool open a few more, which it keeps.
            return (files, tasks) == (clients, 0) and clients <= 3

        await until(as_before, 10)


# A deploy.


async def last_words(
    port: int, request: bytes, first: asyncio.Barrier | None = None
) -> tuple[bytes, float]:
    """All that a viewer got, and when it came to an end."""
    async with connected(port) as (reader, writer), asyncio.timeout(30):
        writer.write(request)
        body = await reader.readuntil(b"started")
        if first is not None:
            await first.wait()
        return body + await reader.read(), asyncio.get_running_loop().time()


async def test_a_deploy_lets_viewers_go_one_by_one_and_another_process_goes_on(
    settings: Settings,
) -> None:
    settings = changed(settings, drain_seconds=1.0)
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(serving(settings))
        new = await stack.enter_async_context(serving(settings))
        await stack.enter_async_context(running_worker(settings))
        stream_id = await ask(old.port, chunks=60, delay_ms=40)
        there = asyncio.Barrier(21)
        request = events(stream_id)
        viewers = [asyncio.create_task(last_words(old.port, request, there)) for _ in range(20)]
        await there.wait()
        old.server.should_exit = True

        async def not_ready() -> bool:
            said = await exchange(old.port, get("/readyz", "connection: close"))
            return said.startswith(b"HTTP/1.1 503")

        await until(not_ready)
        assert await ask(old.port)
        late = await exchange(old.port, request)
        ends = await asyncio.gather(*viewers)

        async def refused() -> bool:
            with suppress(ConnectionError):
                async with connected(old.port):
                    return False
            return True

        await until(refused)
        whole = ids(await exchange(new.port, events(stream_id, "connection: close")))
        resumed = [
            ids(body) + ids(await exchange(new.port, resume(stream_id, body))) for body, _ in ends
        ]
    assert late.startswith(b"HTTP/1.1 200")
    assert not ids(late)
    for body in (late, *(body for body, _ in ends)):
        assert b"retry: " in body[-30:]
        assert not body.endswith(b"0\r\n\r\n")
    times = [time for _, time in ends]
    assert max(times) - min(times) > 0.3
    assert max(len(ids(body)) for body, _ in ends) > min(len(ids(body)) for body, _ in ends)
    assert all([cursor for cursor in seen if cursor != b"0-1"] == whole for seen in resumed)


def resume(stream_id: str, body: bytes) -> bytes:
    return events(stream_id, f"last-event-id: {ids(body)[-1].decode()}", "connection: close")


async def test_an_answer_that_ends_in_a_deploy_ends_cleanly(settings: Settings) -> None:
    settings = changed(settings, drain_seconds=3600)
    async with serving(settings) as served, running_worker(settings):
        stream_id = await ask(served.port, chunks=20, delay_ms=25)
        there = asyncio.Barrier(2)
        viewer = asyncio.create_task(
            last_words(served.port, events(stream_id, "connection: close"), there)
        )
        await there.wait()
        served.server.should_exit = True
        body, _ = await viewer
        served.server.force_exit = True
    assert b"completed" in body
    assert body.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("watches", [True, False])
async def test_whom_a_draining_process_refuses_is_told_when_to_ask_again(
    settings: Settings, watches: bool
) -> None:
    async with serving(settings) as served:
        path = f"/streams/{await ask(served.port)}/events" if watches else "/readyz"
        app: Any = served.server.config.app
        app.state.parts.hub.drain()
        said = await exchange(served.port, get(path, "accept: text/plain", "connection: close"))
    assert said.startswith(b"HTTP/1.1 503")
    assert b"\r\nretry-after: 2\r\n" in said
    assert b'"code":"draining"' in said


HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
COMPLETION = {"model": "demo", **HELLO}
RESPONSE = {"model": "demo", "input": "Hello"}
SAID = {"id": "m", "role": "user", "parts": [{"type": "text", "text": "Hello"}]}
CHAT = {"id": "c", "messages": [SAID]}


def asking_at(path: str, body: object, *headers: str) -> bytes:
    """A POST of JSON, on a connection that ends with its response."""
    start = "\r\n".join([f"{path} HTTP/1.1", "connection: close", *headers])
    return post(json.dumps(body).encode()).replace(b"/chat HTTP/1.1", start.encode(), 1)


async def asked_while_draining(
    settings: Settings, redis: Redis, path: str, body: object, accept: str
) -> tuple[bytes, int]:
    """What is said to this question, and how many answers it has queued."""
    async with serving(settings) as served:
        app: Any = served.server.config.app
        app.state.parts.hub.drain()
        said = await exchange(served.port, asking_at(path, body, f"accept: {accept}"))
    return said, await redis.zcard(keys.QUEUE)


@pytest.mark.parametrize(
    ("path", "body", "accept"),
    [
        ("/chat", HELLO, "text/plain"),
        ("/v1/chat/completions", COMPLETION, "*/*"),
        ("/v1/chat/completions", {**COMPLETION, "stream": True}, "*/*"),
        ("/v1/responses", RESPONSE, "*/*"),
        ("/v1/responses", {**RESPONSE, "stream": True}, "*/*"),
        ("/v1/responses", {**RESPONSE, "stream": True, "background": True}, "*/*"),
        ("/api/chat", CHAT, "*/*"),
    ],
)
async def test_a_draining_process_has_no_answer_made_that_it_could_not_give(
    settings: Settings, redis: Redis, path: str, body: object, accept: str
) -> None:
    said, queued = await asked_while_draining(settings, redis, path, body, accept)
    assert said.startswith(b"HTTP/1.1 503")
    assert b"\r\nretry-after: 2\r\n" in said
    assert b'"code":"draining"' in said
    assert queued == 0


@pytest.mark.parametrize(
    ("path", "body", "accept"),
    [
        ("/chat", HELLO, "*/*"),
        ("/chat", HELLO, "text/event-stream"),
        ("/v1/responses", {**RESPONSE, "background": True}, "*/*"),
    ],
)
async def test_a_draining_process_takes_what_is_to_be_had_from_another(
    settings: Settings, redis: Redis, path: str, body: object, accept: str
) -> None:
    said, queued = await asked_while_draining(settings, redis, path, body, accept)
    assert said.startswith(b"HTTP/1.1 20")
    assert b"\r\nx-stream-id: " in said
    assert queued == 1


def waiting(*headers: str, **script: object) -> bytes:
    """Asks for a whole answer."""
    return asking_at("/v1/chat/completions", {"model": "demo", **asking(**script)}, *headers)


@pytest.mark.parametrize(
    "asked", [waiting(), asking_at("/v1/responses", {**RESPONSE, "stream": True})]
)
async def test_who_waits_for_an_answer_is_sent_away_by_a_process_that_drains(
    settings: Settings, asked: bytes
) -> None:
    async with serving(settings) as served:
        app: Any = served.server.config.app
        async with connected(served.port) as (reader, writer), asyncio.timeout(10):
            writer.write(asked)
            await until(lambda: watched(served))
            app.state.parts.hub.drain()
            said = await reader.read()
    assert said.startswith(b"HTTP/1.1 503")
    assert b"\r\nx-stream-id: " in said
    assert b'"code":"draining"' in said


async def test_a_whole_answer_that_ends_in_a_deploy_is_given(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of all the moments at which it may be sent away, the first.
    monkeypatch.setattr(random, "uniform", lambda first, _: first)
    settings = changed(settings, drain_seconds=3600)
    async with serving(settings) as served, connected(served.port) as (reader, writer):
        writer.write(waiting(text=["Hello"]))
        await until(lambda: watched(served))
        served.server.should_exit = True
        await until(lambda: answers(served.port, b"HTTP/1.1 503"))
        async with running_worker(settings), asyncio.timeout(10):
            said = await reader.read()
        served.server.force_exit = True
    assert said.startswith(b"HTTP/1.1 200")
    assert b'"content":"Hello"' in said


@pytest.mark.parametrize("leaves", [True, False])
async def test_who_leaves_in_a_deploy_cancels_a_whole_answer_and_one_sent_away_does_not(
    settings: Settings, redis: Redis, leaves: bool
) -> None:
    async with serving(changed(settings, drain_seconds=3600 if leaves else 0)) as served:
        app: Any = served.server.config.app
        async with connected(served.port) as (reader, writer), asyncio.timeout(10):
            writer.write(waiting("x-on-disconnect: cancel"))
            await until(lambda: watched(served))
            app.state.parts.hub.drain()
            if not leaves:
                await reader.read()
        await until(lambda: nobody_watches(served))
        queued = await redis.zcard(keys.QUEUE)
        served.server.force_exit = True
    assert queued == (0 if leaves else 1)


async def watched(served: Served) -> bool:
    return not await nobody_watches(served)


def api_env(redis_server: RedisServer, port: int) -> dict[str, str]:
    where = {"RELAY_HOST": "127.0.0.1", "RELAY_PORT": str(port)}
    return module_env() | {"REDIS_URL": redis_server.url} | where


@asynccontextmanager
async def api_process(
    redis_server: RedisServer, argv: Sequence[str] = tuple(module("api")), *, drain_seconds: int = 0
) -> AsyncIterator[tuple[Process, int]]:
    """`python -m api`, ready, and its port; killed if it still runs at the end."""
    port = free_port("127.0.0.1", 0)
    env = api_env(redis_server, port) | {"RELAY_DRAIN_SECONDS": str(drain_seconds)}
    process = await asyncio.create_subprocess_exec(*argv, env=env, stderr=PIPE)
    try:
        await until(lambda: answers(port, b"HTTP/1.1 200"), 20)
        yield process, port
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_at_once_whether_viewers_take_what_they_are_sent_or_not(
    redis: Redis, redis_server: RedisServer, number: signal.Signals
) -> None:
    async with (
        api_process(redis_server, drain_seconds=3600) as (process, port),
        connected(port) as (reader, writer),
        asyncio.timeout(20),
    ):
        stream_id = await much_said(redis)
        with await stuck_at(port, events(stream_id)):
            await until(lambda: watches(port, stream_id))
            writer.write(events(await ask(port)))
            await reader.readuntil(b"queued")
            process.send_signal(number)
            await until(lambda: answers(port, b"HTTP/1.1 503"))
            assert process.returncode is None
            process.send_signal(number)
            async with asyncio.timeout(5):
                _, written = await process.communicate()
    assert b"level=error" not in written


async def watches(port: int, stream_id: str) -> bool:
    return b'"viewers":1' in await exchange(port, get(f"/streams/{stream_id}", "connection: close"))


@pytest.mark.parametrize("path", ["/chat", "/v1/responses"])
async def test_an_upload_that_outlasts_the_drain_is_sent_elsewhere_and_is_no_error(
    redis: Redis, redis_server: RedisServer, path: str
) -> None:
    async with (
        api_process(redis_server) as (process, port),
        connected(port) as (reader, writer),
        asyncio.timeout(20),
    ):
        writer.write(post(b"{" + b" " * 500 + b"}").replace(b"/chat", path.encode(), 1)[:-100])
        await until(lambda: answers(port, b"HTTP/1.1 200"))
        process.send_signal(signal.SIGTERM)
        said = await reader.read()
        _, written = await process.communicate()
    assert said.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 2\r\n" in said
    assert b"level=error" not in written
    assert b"Traceback" not in written


async def test_it_says_that_it_is_ready_when_it_listens_and_where(
    redis: Redis, redis_server: RedisServer
) -> None:
    async def started(port: int) -> Process:
        env = api_env(redis_server, port)
        return await asyncio.create_subprocess_exec(*module("api"), env=env, stderr=PIPE)

    async with asyncio.timeout(20):
        first = await started(0)
        try:
            assert first.stderr is not None
            ready = await first.stderr.readuntil(b"event=api_ready") + await first.stderr.readline()
            port = int(ready.split(b" port=")[1].split()[0])
            assert await answers(port, b"HTTP/1.1 200")
            second = await started(port)
            _, written = await second.communicate()
        finally:
            first.kill()
            await first.communicate()
    assert b"address already in use" in written
    assert b"api_ready" not in written
    assert second.returncode != 0


async def test_ctrl_c_ends_it_in_good_order_and_without_a_traceback(
    redis: Redis, redis_server: RedisServer
) -> None:
    async with api_process(redis_server) as (process, _), asyncio.timeout(10):
        process.send_signal(signal.SIGINT)
        _, written = await process.communicate()
    assert process.returncode == 0
    assert b"Traceback" not in written


async def test_a_process_that_may_have_few_descriptors_by_default_serves_more_viewers_than_those(
    redis: Redis, redis_server: RedisServer
) -> None:
    async with (
        api_process(redis_server, few_descriptors(module("api"))) as (_, port),
        AsyncExitStack() as stack,
        asyncio.timeout(20),
    ):
        request = events(await ask(port))
        for _ in range(2 * FEW):
            reader, writer = await stack.enter_async_context(connected(port))
            writer.write(request)
            await reader.readuntil(b"queued")


@LINUX
async def test_that_descriptors_run_out_is_told_before_nobody_is_let_in_any_more(
    redis: Redis, redis_server: RedisServer
) -> None:
    async with api_process(redis_server) as (process, _):
        assert b"level=warning" in await warning_of_few_descriptors(process)


@LINUX
async def test_clients_are_turned_away_while_there_are_descriptors_left_for_redis(
    redis: Redis, redis_server: RedisServer
) -> None:
    async with (
        api_process(redis_server) as (process, port),
        AsyncExitStack() as stack,
        asyncio.timeout(20),
    ):
        stream_id = await ask(port)
        most = SPARE_DESCRIPTORS + 3
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (most, most))
        connections = [await stack.enter_async_context(connected(port)) for _ in range(40)]
        let_in = []
        for reader, writer in connections:
            with suppress(OSError, asyncio.IncompleteReadError):
                writer.write(events(stream_id))
                await reader.readuntil(b"queued")
                let_in.append(reader)
        assert len(let_in) == 3
        # All of its connections to Redis, and new ones can be made.
        await redis.client_kill_filter(skipme=True)
        await make_log(redis).cancel(stream_id)
        for reader in let_in:
            await reader.readuntil(b"cancelled")


async def answers(port: int, beginning: bytes) -> bool:
    with suppress(OSError):
        said = await exchange(port, get("/readyz", "connection: close"))
        return said.startswith(beginning)
    return False


async def test_with_nobody_there_a_deploy_still_says_for_a_while_that_it_is_not_ready(
    settings: Settings,
) -> None:
    async with serving(changed(settings, drain_seconds=1.0)) as served:
        served.server.should_exit = True
        await until(lambda: answers(served.port, b"HTTP/1.1 503"))

        async def refused() -> bool:
            return not await answers(served.port, b"HTTP")

        await until(refused)
