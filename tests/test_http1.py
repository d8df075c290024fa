"""The transport to the upstream, on real sockets."""

import asyncio
import gc
import gzip
import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trustme
import uvloop

from tests.conftest import until
from tests.listening import listening, silent
from tests.receiver import Names
from worker.http1 import Http1, _Connection, pour

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


class Server:
    """What has come to it."""

    def __init__(self) -> None:
        self.port = 0
        self.connections = 0
        self.asked: list[bytes] = []
        self.left = asyncio.Event()

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        body = await reader.readexactly(int(lines.get(b"Content-Length", b"0")))
        self.asked.append(head + body)
        return body


@asynccontextmanager
async def serving(
    answer: Callable[[Server, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    context: ssl.SSLContext | None = None,
) -> AsyncIterator[Server]:
    server = Server()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        try:
            await answer(server, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            server.left.set()

    async with listening(on_connection, tls=context) as server.port:
        yield server


@asynccontextmanager
async def client(server: Server, **options: float) -> AsyncIterator[httpx2.AsyncClient]:
    transport = Http1(**{"connect_seconds": 2.0, "idle_seconds": 2.0} | options)
    url = f"http://127.0.0.1:{server.port}"
    async with httpx2.AsyncClient(transport=transport, base_url=url) as http:
        yield http


def answering(*pieces: bytes, keep: bool = True) -> Callable[..., Awaitable[None]]:
    async def answer(
        server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while True:
            await server.request(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            if not keep:
                return

    return answer


@pytest.mark.parametrize(
    ("pieces", "keep"),
    [
        ([OK + b"content-length: 11\r\n\r\nhello world"], True),
        ([CHUNKED, b"6\r\nhello \r\n", b"5\r\nworld\r\n0\r\n\r\n"], True),
        ([CHUNKED + b"6\r\nhel", b"lo \r\n5\r", b"\nworld\r\n0\r\n", b"\r\n"], True),
        ([OK + b"\r\nhello ", b"world"], False),
        ([b"HTTP/1.0 200 OK\r\n\r\nhello world"], False),
        ([b"HTTP/1.1 103 Early Hints\r\nlink: x\r\ncontent-length: 0\r\n\r\n", CHUNKED,
          b"b\r\nhello world\r\n0\r\n\r\n"], True),
        ([b"HTTP/1.1 103 Early Hints\r\ncontent-length: 0\r\n\r\n",
          OK + b"\r\nhello world"], False),
    ],
    ids=["by length", "chunked", "cut anywhere", "to the end", "HTTP/1.0", "after a notice",
         "to the end after a notice"],
)  # fmt: skip
async def test_an_answer_comes_whole_however_it_is_framed(pieces: list[bytes], keep: bool) -> None:
    async with serving(answering(*pieces, keep=keep)) as server, client(server) as http:
        response = await http.post("/chat", content=b"question")
        assert (response.status_code, response.text) == (200, "hello world")
        assert "link" not in response.headers
        [asked] = server.asked
        assert asked.startswith(b"POST /chat HTTP/1.1\r\n")
        assert asked.endswith(b"\r\n\r\nquestion")
        assert f"Host: 127.0.0.1:{server.port}".encode() in asked


def answering_in_two(go_on: asyncio.Event, *rest: bytes) -> Callable[..., Awaitable[None]]:
    """An `a` at once, the rest when it is to go on, and then it waits until the client leaves."""

    async def answer(
        server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await server.request(reader)
        writer.write(CHUNKED + b"1\r\na\r\n")
        await go_on.wait()
        for piece in rest:
            writer.write(piece)
            await writer.drain()
        assert await reader.read() == b""
        server.left.set()

    return answer


async def test_a_piece_is_there_when_it_comes() -> None:
    go_on = asyncio.Event()

    async with (
        serving(answering_in_two(go_on, b"1\r\nb\r\n0\r\n\r\n")) as server,
        client(server) as http,
        http.stream("POST", "/") as response,
    ):
        pieces = response.aiter_bytes()
        assert await anext(pieces) == b"a"
        go_on.set()
        assert [piece async for piece in pieces] == [b"b"]


async def test_an_answer_is_poured_whole_from_its_first_piece_on() -> None:
    go_on = asyncio.Event()

    pieces: list[bytes] = []
    async with (
        serving(answering_in_two(go_on, b"1\r\nb\r\n", b"1\r\nc\r\n0\r\n\r\n")) as server,
        client(server) as http,
        http.stream("POST", "/") as response,
        asyncio.timeout(5),
    ):
        pouring = pour(response, pieces.append)
        await until_poured(pieces, b"a")
        go_on.set()
        await pouring
    assert b"".join(pieces) == b"abc"


async def until_poured(pieces: list[bytes], text: bytes) -> None:
    async def is_there() -> bool:
        return b"".join(pieces) == text

    await until(is_there)


async def test_a_compressed_answer_is_poured_as_what_it_was() -> None:
    body = gzip.compress(b"hello world")
    head = OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(body)
    pieces: list[bytes] = []
    async with (
        serving(answering(head + body)) as server,
        client(server) as http,
        http.stream("POST", "/") as response,
    ):
        await pour(response, pieces.append)
    assert b"".join(pieces) == b"hello world"


async def test_what_comes_together_with_the_end_of_an_answer_does_not_spoil_it() -> None:
    pieces: list[bytes] = []
    async with (
        serving(answering(OK + b"content-length: 2\r\n\r\nok\r\nand more")) as server,
        client(server) as http,
        http.stream("POST", "/") as response,
    ):
        await pour(response, pieces.append)
    assert pieces == [b"ok"]


async def test_an_answer_that_breaks_off_is_poured_to_there_and_is_an_error() -> None:
    pieces: list[bytes] = []
    async with (
        serving(answering(CHUNKED + b"5\r\nhello\r\n", keep=False)) as server,
        client(server) as http,
        http.stream("POST", "/") as response,
    ):
        with pytest.raises(httpx2.RemoteProtocolError):
            await pour(response, pieces.append)
    assert pieces == [b"hello"]


@pytest.mark.parametrize("rest", [b"1\r\nc\r\n", b"0\r\n\r\n"], ids=["more", "its end"])
async def test_what_cannot_be_poured_ends_the_answer_and_is_its_error(rest: bytes) -> None:
    go_on = asyncio.Event()

    answer = answering_in_two(go_on, b"1\r\nb\r\n" + rest)
    pieces: list[bytes] = []

    def into(piece: bytes) -> None:
        if piece == b"b":
            raise LookupError("no room for it")
        pieces.append(piece)

    async with serving(answer) as server, client(server) as http, asyncio.timeout(5):
        async with http.stream("POST", "/") as response:
            pouring = pour(response, into)
            await until_poured(pieces, b"a")
            go_on.set()
            with pytest.raises(LookupError, match="no room for it"):
                await pouring
        await server.left.wait()
    assert pieces == [b"a"]


async def test_a_connection_is_used_again() -> None:
    async with (
        serving(answering(OK + b"content-length: 2\r\n\r\nok")) as server,
        client(server) as http,
    ):
        for _ in range(3):
            assert (await http.post("/")).text == "ok"
        assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        answering(OK + b"connection: close\r\ncontent-length: 2\r\n\r\nok"),
        answering(OK + b"content-length: 2\r\n\r\nok", keep=False),
        answering(OK + b"content-length: 2\r\n\r\nok", b"and more"),
    ],
    ids=["that says so", "that ends", "that says more than was asked"],
)
async def test_a_connection_is_not_used_again(answer: Callable[..., Awaitable[None]]) -> None:
    async with serving(answer) as server, client(server) as http:
        assert (await http.post("/")).text == "ok"
        transport = http._transport
        assert isinstance(transport, Http1)

        async def none_is_kept() -> bool:
            return not any(transport._idle.values())

        await until(none_is_kept)
        assert (await http.post("/")).text == "ok"
        assert server.connections == 2


async def test_a_kept_connection_on_which_something_comes_unasked_is_not_used_again() -> None:
    kept = asyncio.Event()

    async def answer(
        server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await server.request(reader)
        writer.write(OK + b"content-length: 2\r\n\r\nok")
        await kept.wait()
        writer.write(b"and more")
        await server.request(reader)

    async with asyncio.timeout(5), serving(answer) as server, client(server) as http:
        assert (await http.post("/")).text == "ok"
        kept.set()
        await server.left.wait()
        assert (await http.post("/")).text == "ok"
        assert server.connections == 2


async def test_after_a_kept_connection_that_was_dropped_the_next_try_connects_anew() -> None:
    async def answer_once(
        server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await server.request(reader)
        writer.write(OK + b"content-length: 2\r\n\r\nok")
        await server.request(reader)
        writer.transport.abort()

    async with serving(answer_once) as server, client(server) as http:
        await asyncio.gather(*(http.post("/") for _ in range(3)))
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.post("/")
        assert (await http.post("/")).text == "ok"
        assert server.connections == 4


async def test_an_answer_that_ends_with_its_connection_may_come_on_one_that_was_used() -> None:
    async def answer(
        server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        for said in (b"content-length: 2\r\n\r\nok", b"\r\nhello"):
            await server.request(reader)
            writer.write(OK + said)

    async with serving(answer) as server, client(server) as http:
        assert [(await http.post("/")).text for _ in range(2)] == ["ok", "hello"]
        assert server.connections == 1


async def test_a_connection_that_still_has_a_request_to_send_is_not_used_again() -> None:
    async def refuse(
        server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n")
        await server.left.wait()

    async with serving(refuse) as server, client(server) as http, asyncio.timeout(5):
        for _ in range(2):
            assert (await http.post("/", content=b"x" * 16_000_000)).status_code == 401
        assert server.connections == 2
        server.left.set()


async def test_of_many_idle_connections_those_that_nobody_needs_are_closed() -> None:
    answer = answering(OK + b"content-length: 2\r\n\r\nok")
    async with serving(answer) as server, client(server, idle_seconds=0.2) as http:
        await asyncio.gather(*(http.post("/") for _ in range(5)))
        assert isinstance(http._transport, Http1)
        [idle] = http._transport._idle.values()
        assert len(idle) == 5

        async def one_is_left() -> bool:
            await http.post("/")
            return len(idle) == 1

        await until(one_is_left)


@pytest.mark.parametrize("end", [b"", b"\r\n"], ids=["one without an end", "many"])
async def test_headers_without_end_are_an_error(end: bytes) -> None:
    async def answer(
        server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await server.request(reader)
        writer.write(OK)
        while True:
            writer.write(b"x: " + b"y" * 1000 + end)
            await writer.drain()

    async with serving(answer) as server, client(server) as http, asyncio.timeout(5):
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.post("/")


async def test_trailers_are_passed_over() -> None:
    pieces = [CHUNKED, b"2\r\nok\r\n0\r\n", b"x: y\r\n" * 20_000, b"\r\n"]
    async with serving(answering(*pieces)) as server, client(server) as http:
        response = await http.post("/")
        assert response.text == "ok"
        assert len(response.headers) == 1


async def test_a_redirect_to_another_protocol_is_an_error() -> None:
    away = b"HTTP/1.1 307 Away\r\nlocation: ftp://host/\r\ncontent-length: 0\r\n\r\n"
    async with serving(answering(away)) as server, client(server) as http:
        with pytest.raises(httpx2.UnsupportedProtocol):
            await http.post("/", follow_redirects=True)


async def test_an_idle_connection_is_kept_only_so_long() -> None:
    async with (
        serving(answering(OK + b"content-length: 2\r\n\r\nok")) as server,
        client(server, idle_seconds=0.0) as http,
    ):
        for _ in range(2):
            assert (await http.post("/")).text == "ok"
        assert server.connections == 2


@pytest.mark.parametrize("begun", [False, True], ids=["before its head", "within its body"])
async def test_an_answer_that_breaks_off_is_an_error(begun: bool) -> None:
    pieces = [CHUNKED + b"5\r\nhello\r\n"] if begun else []
    async with serving(answering(*pieces, keep=False)) as server, client(server) as http:
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.post("/")


async def test_what_came_before_an_answer_broke_off_is_read_first() -> None:
    answer = answering(CHUNKED + b"5\r\nhello\r\n", keep=False)
    async with (
        serving(answer) as server,
        client(server) as http,
        http.stream("POST", "/") as response,
    ):
        pieces = response.aiter_bytes()
        assert await anext(pieces) == b"hello"
        with pytest.raises(httpx2.RemoteProtocolError):
            await anext(pieces)


async def test_a_reset_is_not_the_end_of_an_answer_that_ends_with_its_connection() -> None:
    go_on = asyncio.Event()

    async def answer(
        server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await server.request(reader)
        writer.write(OK + b"\r\nhello")
        await go_on.wait()
        at_once = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)

    async with (
        serving(answer) as server,
        client(server) as http,
        http.stream("POST", "/") as response,
    ):
        pieces = response.aiter_bytes()
        assert await anext(pieces) == b"hello"
        go_on.set()
        with pytest.raises(httpx2.RemoteProtocolError):
            await anext(pieces)


@pytest.mark.parametrize(
    "answer",
    [
        answering(OK + b"\r\nhello", keep=False),
        answering(CHUNKED + b"5\r\nhello\r\n", keep=False),
        answering(keep=False),
    ],
    ids=["in order", "within its body", "before its head"],
)
async def test_a_connection_that_ends_goes_with_its_answer_and_without_a_collector(
    answer: Callable[..., Awaitable[None]],
) -> None:
    async def none_is_left() -> bool:
        return not any(type(each) is _Connection for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        async with serving(answer) as server, client(server) as http:
            await ask_once(http)
            await until(none_is_left)
    finally:
        gc.enable()


async def ask_once(http: httpx2.AsyncClient) -> None:
    try:
        await http.post("/")
    except httpx2.RemoteProtocolError as error:
        error.__traceback__ = None  # Its frames hold the answer, which holds it.


async def test_what_is_no_http_is_an_error() -> None:
    async with serving(answering(b"SSH-2.0-OpenSSH_9.2\r\n")) as server, client(server) as http:
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.post("/")


async def test_a_change_to_another_protocol_is_an_error_and_leaves_the_loop_alone() -> None:
    broken: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
    answer = answering(b"HTTP/1.1 101 X\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nhello")
    async with serving(answer) as server, client(server) as http:
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.post("/")
    assert broken == []


async def test_whoever_leaves_an_answer_closes_its_connection() -> None:
    async def answer(
        server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await server.request(reader)
        writer.write(CHUNKED + b"1\r\na\r\n")
        assert await reader.read() == b""
        server.left.set()

    async with serving(answer) as server, client(server) as http, asyncio.timeout(2):
        async with http.stream("POST", "/") as response:
            await anext(response.aiter_bytes())
        await server.left.wait()


async def test_whoever_is_cancelled_before_the_answer_closes_its_connection() -> None:
    asked = asyncio.Event()

    async def answer(
        server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await server.request(reader)
        asked.set()
        assert await reader.read() == b""
        server.left.set()

    async with serving(answer) as server, client(server) as http, asyncio.timeout(2):
        asking = asyncio.create_task(http.post("/"))
        await asked.wait()
        asking.cancel()
        await server.left.wait()


def test_a_connection_that_ends_before_the_request_is_an_error() -> None:
    """By uvloop, which raises where asyncio's own loop says nothing."""

    async def ask() -> None:
        async with serving(answering(b"")) as server, asyncio.timeout(5):
            transport = Http1(connect_seconds=2, idle_seconds=2)
            connection = await transport._connect(("http", "127.0.0.1", server.port))
            connection.close()
            await asyncio.sleep(0)  # In which the loop closes it.
            await asyncio.sleep(0)
            with pytest.raises(httpx2.RemoteProtocolError):
                await connection.ask(b"").headers_came()

    uvloop.run(ask())


async def test_nobody_there_is_a_connect_error() -> None:
    async with serving(answering(b"")) as server:
        pass
    async with client(server) as http:
        with pytest.raises(httpx2.ConnectError):
            await http.post("/")


async def test_a_connection_that_nobody_takes_is_a_connect_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "create_connection", never)
    async with client(Server(), connect_seconds=0.01) as http:
        with pytest.raises(httpx2.ConnectTimeout):
            await http.post("/")


@pytest.mark.parametrize(("each", "all_"), [(0.05, 60.0), (60.0, 0.5)])
async def test_an_address_that_does_not_answer_leaves_time_for_those_behind_it(
    each: float, all_: float, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.http1.ADDRESS_SECONDS", each)
    names["model.test"] = ["127.0.0.4", "127.0.0.3", "127.0.0.1"]
    async with (
        asyncio.timeout(5),
        serving(answering(OK + b"content-length: 2\r\n\r\nok")) as server,
        client(server, connect_seconds=all_) as http,
    ):
        # Nobody is at the first one, and the second one says nothing.
        with silent("127.0.0.3", server.port):
            assert (await http.post(f"http://model.test:{server.port}/")).text == "ok"


async def test_an_only_address_has_all_the_time_there_is(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.http1.ADDRESS_SECONDS", 0.0)
    names["model.test"] = ["127.0.0.1"]
    async with (
        serving(answering(OK + b"content-length: 2\r\n\r\nok")) as server,
        client(server) as http,
    ):
        assert (await http.post(f"http://model.test:{server.port}/")).text == "ok"


async def test_a_name_that_is_not_answered_is_a_connect_timeout(names: Names) -> None:
    answered = threading.Event()

    def stall() -> list[str]:
        answered.wait()
        return []

    names["model.test"] = stall
    try:
        async with client(Server(), connect_seconds=0.01) as http:
            for _ in range(3):
                with pytest.raises(httpx2.ConnectTimeout):
                    await http.post("http://model.test/")
    finally:
        answered.set()
    assert names.lookups == ["model.test"]


async def test_a_host_that_is_not_ascii_has_one_name_for_resolver_tls_and_server(
    tmp_path: Path, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an older standard, which Python's own lookup has, faß.de is fass.de."""
    name = "xn--fa-hia.de"
    names[name] = ["127.0.0.1"]
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    answer = answering(OK + b"content-length: 2\r\n\r\nok")
    async with serving(answer, context) as server, client(server) as http:
        assert (await http.post(f"https://faß.de:{server.port}/")).text == "ok"
        assert f"Host: {name}:{server.port}".encode() in server.asked[0]
    assert names.lookups == [name]


async def test_tls_is_checked_for_the_name(
    tmp_path: Path, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    another = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(ours)
    authority.issue_cert("elsewhere.test").configure_cert(another)
    names["elsewhere.test"] = ["127.0.0.1"]
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    answer = answering(OK + b"content-length: 2\r\n\r\nok")
    async with serving(answer, ours) as server, client(server) as http:
        url = f"https://127.0.0.1:{server.port}/"
        for _ in range(2):
            assert (await http.post(url)).text == "ok"
        assert server.connections == 1
    async with serving(answer, another) as server, client(server) as http:
        with pytest.raises(httpx2.ConnectError, match="certificate"):
            await http.post(f"https://127.0.0.1:{server.port}/")
        url = f"https://elsewhere.test:{server.port}/"
        assert (await http.post(url)).text == "ok"


async def test_of_several_addresses_the_error_of_the_first_one_is_told(
    tmp_path: Path, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("model.test").configure_cert(context)
    # Nobody is at the second one, which is no news of the service.
    names["model.test"] = ["127.0.0.1", "127.0.0.4"]
    async with serving(answering(OK), context) as server, client(server) as http:
        with pytest.raises(httpx2.ConnectError, match="certificate"):
            await http.post(f"https://model.test:{server.port}/")
