"""What caches between here and a client may keep."""

from collections.abc import Awaitable
from functools import partial

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CacheControl:
    """Pure ASGI: says `default` to caches where a response says nothing to them itself. Left alone
    they may keep 200, 204, 404 and 410: a stream would run for ever, and an erased one be read."""

    def __init__(self, app: ASGIApp, default: str) -> None:
        self._app = app
        self._default = default

    # Neither is a coroutine: a viewer would hold one for as long as it watches, and each write of
    # one that does not ride (`riders.py`) would go through another.
    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        return self._app(scope, receive, partial(self._send, send))

    def _send(self, send: Send, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).setdefault("cache-control", self._default)
        return send(message)
