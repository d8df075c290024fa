"""The names by which this server lets itself be asked."""

import re
from ipaddress import ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from api.counters import REFUSED
from api.problems import problem

_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?")


class Hosts:
    """Pure ASGI: what asks for a name of the internet, other than the `allowed`, is refused.

    Where a server listens on its machine alone, that is the bound to who may ask. But a page of
    anybody's can let its own name lead to that machine, too; then it is of one origin with the
    server to the browser of whoever works there, and asks and reads at his cost (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, allowed: frozenset[str]) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allows(dict(scope["headers"]).get(b"host", b"")):
            await self._app(scope, receive, send)
            return
        REFUSED.labels("unknown_host").inc()
        detail = "Ask by an address or by localhost, or put the name into RELAY_ALLOWED_HOSTS."
        await problem(421, "unknown_host", detail)(scope, receive, send)

    def _allows(self, host: bytes) -> bool:
        match = _HOST.fullmatch(host.decode("latin-1").lower())
        name = match[1].removesuffix(".") if match else host.decode("latin-1")
        return _of_here(name) or name in self._allowed


def _of_here(name: str) -> bool:
    """An address leads nowhere else, and a name without a dot is none of the internet's."""
    return "." not in name or name.endswith(".localhost") or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
