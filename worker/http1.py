"""HTTP/1.1 as a transport of httpx, by which a chunk costs little.

httpx' own spends more on a chunk than all the rest of a worker does. Here what the socket has is
parsed where it arrives, in C, and goes from there to whoever takes it. It knows no proxies (the
caller takes httpx' own then), no HTTP/2, and no request that is not all there at once.
"""

import asyncio
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Callable

import httptools
import httpx2

from worker.lookup import Lookups

Origin = tuple[str, str, int]
"""Scheme, host, port."""
Into = Callable[[bytes], None]
"""Takes a piece of a body."""
ADDRESS_SECONDS = 3.0
"""To connect to one address of a name that has more of them, at most."""
_PORTS = {"http": 80, "https": 443}
_POUR = "pour"
_HEAD_BYTES = 64 * 1024
"""Of an answer, until its last header is there; with more it fails."""


def pour(response: httpx2.Response, into: Into) -> asyncio.Future[None]:
    """Give the body of an answer, piece by piece, to `into`; by this transport in the very step in
    which a piece comes, and no task has to wake for it. The future ends with the body, or fails
    with the transport's error or what `into` raises for a later piece; what it raises for those
    that are there already, this raises."""
    poured: Callable[[Into], asyncio.Future[None]] | None = response.extensions.get(_POUR)
    if poured is None or "content-encoding" in response.headers:
        return asyncio.create_task(_pour_decoded(response, into))
    return poured(into)


async def _pour_decoded(response: httpx2.Response, into: Into) -> None:
    async for piece in response.aiter_bytes():
        into(piece)


class Http1(httpx2.AsyncBaseTransport):
    """Keeps a connection for the next request for `idle_seconds`. Raises httpx2.TransportError."""

    def __init__(self, *, connect_seconds: float, idle_seconds: float) -> None:
        self._connect_seconds = connect_seconds
        self._idle_seconds = idle_seconds
        self._idle: defaultdict[Origin, list[_Connection]] = defaultdict(list)
        self._ssl: ssl.SSLContext | None = None
        self._lookups = Lookups()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        if url.scheme not in _PORTS:
            raise httpx2.UnsupportedProtocol(f"it goes to {url.scheme}")  # By a redirect.
        # As the Host header has it: of url.host, where it is not ASCII, a lookup may make another.
        host = url.raw_host.decode("ascii")
        origin = (url.scheme, host, url.port or _PORTS[url.scheme])
        kept = self._of_idle(origin)
        connection = kept or await self._connect(origin)
        exchange = connection.ask(_head(request) + await request.aread())
        try:
            await exchange.headers_came()
        except BaseException as error:
            if kept and isinstance(error, httpx2.RemoteProtocolError):
                # Whoever dropped it has dropped the others, too, and each would cost a try.
                self._close_idle(origin)
            await exchange.aclose()
            raise
        return httpx2.Response(
            exchange.status,
            headers=exchange.headers,
            stream=exchange,
            request=request,
            extensions={_POUR: exchange.pour},
        )

    async def aclose(self) -> None:
        for origin in self._idle:
            self._close_idle(origin)

    def _close_idle(self, origin: Origin) -> None:
        while connections := self._idle[origin]:
            connections.pop().close()

    def _of_idle(self, origin: Origin) -> "_Connection | None":
        connections = self._idle[origin]
        # The one that came last is taken, so after a rush the first ones would stay for ever.
        while connections and not connections[0].usable(self._idle_seconds):
            connections.pop(0).close()
        while connections:
            connection = connections.pop()
            if connection.usable(self._idle_seconds):
                return connection
            connection.close()
        return None

    async def _connect(self, origin: Origin) -> "_Connection":
        scheme, host, _ = origin
        if scheme == "https" and self._ssl is None:
            self._ssl = httpx2.create_ssl_context()
        try:
            async with asyncio.timeout(self._connect_seconds):
                return await self._connect_to_any(await self._lookups.addresses(host), origin)
        except TimeoutError as error:
            raise httpx2.ConnectTimeout("nobody took the connection") from error
        except OSError as error:
            raise httpx2.ConnectError(str(error)) from error

    async def _connect_to_any(self, addresses: list[str], origin: Origin) -> "_Connection":
        """Raises the error of the first one if none takes it: what stands behind that may be out of
        reach from here at any time, as an address of IPv6 is, and says nothing of the server."""
        # One that does not answer, by a broken route, must leave time for all behind it.
        seconds = min(ADDRESS_SECONDS, self._connect_seconds / len(addresses))
        failure: OSError | None = None
        try:
            for address in addresses:
                try:
                    async with asyncio.timeout(seconds if address != addresses[-1] else None):
                        return await self._connect_to(address, origin)
                except OSError as error:
                    failure = failure or error
            raise failure or OSError("it has no address")
        finally:
            del failure  # With this frame it would be in a cycle.

    async def _connect_to(self, address: str, origin: Origin) -> "_Connection":
        scheme, host, port = origin
        context, name = (self._ssl, host) if scheme == "https" else (None, None)
        idle = self._idle[origin]
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(idle), address, port, ssl=context, server_hostname=name
        )
        return connection


class _Exchange(httpx2.AsyncByteStream):
    """One request's answer. What has come is kept until it is read: whoever reads waits for nothing
    else in between, so that it never is much."""

    def __init__(self, connection: "_Connection") -> None:
        self._connection = connection
        self._came: list[bytes] = []
        self._into: Into | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.head_bytes = 0
        self.begun = False
        """All headers are there."""
        self.ended = False

    async def headers_came(self) -> None:
        while not self.begun:
            await self._more()

    def pour(self, into: Into) -> asyncio.Future[None]:
        if self._came:
            into(self._taken())
        self._into = into
        poured = self._more()
        self._wake()  # It may have ended before.
        return poured

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._came:
            if self.ended:
                raise StopAsyncIteration
            await self._more()
        return self._taken()

    def _taken(self) -> bytes:
        came, self._came = self._came, []
        return b"".join(came)

    async def aclose(self) -> None:
        self._into = None
        if not self.ended:
            self._connection.close()

    def _more(self) -> asyncio.Future[None]:
        """Of news; once it is poured, of its end alone."""
        self._waiter = asyncio.get_running_loop().create_future()
        if self._error is not None:
            self._waiter.set_exception(self._error)
        return self._waiter

    # As the connection sees it.

    def begin(self) -> None:
        self.begun = True
        self._wake()

    def add(self, data: bytes) -> None:
        if self._error is not None:
            return
        if self._into is None:
            self._came.append(data)
            self._wake()
            return
        try:
            self._into(data)
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is waited for
            self.fail(error)
            self._connection.close()

    # Only the first of end and error counts.

    def end(self) -> None:
        self.ended = self._error is None
        self._wake()

    def fail(self, error: Exception) -> None:
        if not self.ended:
            self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._error is not None:
            waiter.set_exception(self._error)
        elif self._into is None or self.ended:
            waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """One exchange at a time; afterwards it stands among the idle ones, if it may be used again."""

    def __init__(self, idle: "list[_Connection]") -> None:
        self._idle = idle
        self._idle_since = 0.0
        self._loop = asyncio.get_running_loop()
        self._exchange: _Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._ends_by_length = False

    def ask(self, request: bytes) -> _Exchange:
        exchange = self._exchange = _Exchange(self)
        self._ends_by_length = False
        if self._transport.is_closing():
            exchange.fail(httpx2.RemoteProtocolError("the connection ended before a request"))
        else:
            self._transport.write(request)
        return exchange

    def usable(self, idle_seconds: float) -> bool:
        fresh = self._loop.time() - self._idle_since < idle_seconds
        return fresh and not self._transport.is_closing()

    def close(self) -> None:
        self._transport.abort()

    # As the loop sees it.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            self.close()  # Nobody asked.
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.close()  # No change to another protocol was asked for.
            exchange.fail(httpx2.RemoteProtocolError(str(error)))
        if not exchange.begun:
            exchange.head_bytes += len(data)
            if exchange.head_bytes > _HEAD_BYTES:
                self.close()
                exchange.fail(httpx2.RemoteProtocolError("the headers are too long"))

    def connection_lost(self, error: Exception | None) -> None:
        # Both hold this connection, too.
        del self._parser
        exchange, self._exchange = self._exchange, None
        if self in self._idle:
            self._idle.remove(self)
        if exchange is None:
            return
        if exchange.begun and not self._ends_by_length and error is None:
            exchange.end()
        else:
            exchange.fail(httpx2.RemoteProtocolError("the connection ended within an answer"))

    # As the parser sees it.

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._exchange is not None  # noqa: S101
        if self._exchange.begun:
            return  # A trailer, which nobody reads.
        self._exchange.headers.append((name, value))
        if name.lower() in {b"content-length", b"transfer-encoding"}:
            self._ends_by_length = True

    def on_headers_complete(self) -> None:
        assert self._exchange is not None  # noqa: S101
        self._exchange.status = self._parser.get_status_code()
        if self._exchange.status >= 200:
            self._exchange.begin()
        else:
            self._exchange.headers.clear()  # Of a notice; the answer is yet to come.
            self._ends_by_length = False

    def on_body(self, data: bytes) -> None:
        assert self._exchange is not None  # noqa: S101
        self._exchange.add(data)

    def on_message_complete(self) -> None:
        exchange = self._exchange
        if exchange is None or not exchange.begun:
            return
        exchange.end()
        self._exchange = None
        # Half a request may still wait to be sent: another one behind it would never be answered.
        if self._parser.should_keep_alive() and not self._transport.get_write_buffer_size():
            self._idle_since = self._loop.time()
            self._idle.append(self)
        else:
            self.close()


def _head(request: httpx2.Request) -> bytes:
    lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%b: %b" % header for header in request.headers.raw]
    return b"\r\n".join([*lines, b"", b""])
