"""uvicorn, taught to let its viewers go before it waits for them."""

import logging
import socket

import uvicorn
from fastapi import FastAPI

from relay.settings import Settings

DRAIN_SECONDS = 3


class Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn would wait for every open response, and a live stream does not end by itself.
        app = self.config.app
        assert isinstance(app, FastAPI)  # noqa: S101
        app.state.parts.hub.drain()
        await super().shutdown(sockets)


def create_server(app: FastAPI, settings: Settings) -> Server:
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        # A line per request would hold its query string.
        access_log=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        server_header=False,
    )
    return Server(config)


def _is_news(record: logging.LogRecord) -> bool:
    # A viewer that is broken off on purpose is no error of the application.
    return "returned without completing response" not in record.getMessage()
