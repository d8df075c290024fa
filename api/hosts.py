"""The names by which this server lets itself be asked."""

import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from api.counters import REFUSED
from api.problems import Shape, shape_of

_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?")


class Hosts:
    """Pure ASGI: what asks for a name of the internet, other than the `allowed`, is refused.

    Where a server listens on its machine alone, that is the bound to who may ask. But a page of
    anybody's can let its own name lead to that machine, too; then it is of one origin with the
    server to the browser of whoever works there, and asks and reads at his cost (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, allowed: frozenset[str], shapes: Mapping[str, Shape]) -> None:
        self._app = app
        self._allowed = allowed
        self._shapes = shapes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope.get("headers", ())
        if all(self._allows(value) for name, value in headers if name == b"host"):
            await self._app(scope, receive, send)
            return
        REFUSED.labels("unknown_host").inc()
        detail = "Ask by an address or by localhost, or put the name into RELAY_ALLOWED_HOSTS."
        refusal = shape_of(scope["path"], self._shapes).refuse(421, "unknown_host", detail)
        await refusal(scope, receive, send)

    def _allows(self, host: bytes) -> bool:
        text = host.decode("latin-1").lower()
        match = _HOST.fullmatch(text)
        name = match[1].removesuffix(".") if match else text
        return name in self._allowed or _of_here(name)


def _of_here(name: str) -> bool:
    """An address leads nowhere else, and a name without a dot is none of the internet's."""
    return "." not in name or name.endswith(".localhost") or _address(name.strip("[]")) is not None


def is_loopback(host: str) -> bool:
    """Whether a server that listens there is reached from its own machine alone."""
    if (address := _address(host)) is not None:
        return address.is_loopback
    return host.lower().removesuffix(".") in {"localhost", "ip6-localhost"}


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None
