"""uvicorn, taught to let its viewers go before it waits for them."""

import logging
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from relay.settings import Settings

DRAIN_SECONDS = 3
HEAD_BYTES = 65536
"""Of a request's line and headers; the read that goes over it is the last."""


class Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn would wait for every open response, and a live stream does not end by itself.
        app = self.config.app
        assert isinstance(app, FastAPI)  # noqa: S101
        app.state.parts.hub.drain()
        await super().shutdown(sockets)


class BoundedHead(HttpToolsProtocol):
    """uvicorn bounds no request's head: one header of many MB would stall every viewer here."""

    _head_bytes = 0
    _in_head = True

    def data_received(self, data: bytes) -> None:
        if self._in_head and self._head_bytes > HEAD_BYTES:
            self.transport.abort()
            return
        was_in_head = self._in_head
        super().data_received(data)
        if was_in_head and self._in_head:
            self._head_bytes += len(data)

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        super().on_headers_complete()


def create_server(app: FastAPI, settings: Settings) -> Server:
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=BoundedHead,
        log_config=None,
        # A line per request would hold its query string.
        access_log=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        server_header=False,
    )
    return Server(config)


def _is_news(record: logging.LogRecord) -> bool:
    # A viewer that is broken off on purpose is no error of the application, and an error of the
    # application has been logged by the application.
    text = record.getMessage()
    return not text.startswith(("ASGI callable returned without", "Exception in ASGI application"))
