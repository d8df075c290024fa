"""HTTP/1.1 with a client that offers another protocol: the offer is ignored, as RFC 9110 allows.

Java's client makes it with every request.
"""

from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_FRAMING = {b"content-length", b"transfer-encoding"}


class NoUpgrade(HttpToolsProtocol):
    """The parser takes what follows an offer for the other protocol, body and all. So a new one
    goes on, under a head of ours that says where the body ends and of which nobody is told."""

    _own_head = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.parser = _Parser(self)

    def go_on(self, rest: bytes) -> None:
        framing = [b"%b: %b\r\n" % each for each in self.headers if each[0] in _FRAMING]
        self._own_head = True
        self.parser = _Parser(self)
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n" + rest)

    def on_message_begin(self) -> None:
        if not self._own_head:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._own_head:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._own_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._own_head:
            super().on_headers_complete()
        self._own_head = False

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():  # Else the body is still to come.
            super().on_message_complete()


class _Parser(httptools.HttpRequestParser):
    def __init__(self, connection: NoUpgrade) -> None:
        super().__init__(connection)
        # As uvicorn has it: without, what follows a `connection: close` would be answered 400.
        self.set_dangerous_leniencies(lenient_data_after_close=True)
        self._connection = connection

    def feed_data(self, data: Any) -> None:
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._connection.go_on(data[offer.args[0] :])
