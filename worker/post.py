"""A POST to a server that a caller has chosen: by the public network, bounded, without detours."""

import asyncio
from collections.abc import Mapping
from contextlib import aclosing, suppress
from typing import NamedTuple

import httpcore2

from relay.webhooks import Target
from worker.public_network import PublicNetwork

ANSWER_SECONDS = 10.0
"""From the lookup of the name to the end of the answer."""
CONNECT_SECONDS = 3.0
"""For one address of the name, and then for TLS."""
BODY_BYTES = 64 * 1024
BODY_SECONDS = 1.0
"""So much and so long of an answer's body is passed over, that it may end in good order."""

_FAILURES = (
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.TimeoutException,
    OSError,  # Our own time limits, and TLS that breaks off later than in its handshake.
)


class NoAnswer(Exception):
    """The message is the name of what went wrong, and nothing of what the other side sent."""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]


class Post:
    """Knows no proxy, cookie or redirect, and verifies the certificate for the name. Each request
    has a connection of its own: its address was checked for it."""

    def __init__(self, *, private: bool, most: int) -> None:
        """`private` addresses are allowed; `most`: so many at a time."""
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpcore2.default_ssl_context(),
            network_backend=PublicNetwork(private=private),
            max_connections=most,
        )

    async def send(self, target: Target, headers: Mapping[str, str], body: bytes) -> Answer:
        """The answer, whatever its status. Raises NoAnswer."""
        url = httpcore2.URL(
            scheme=target.scheme, host=target.host, port=target.port, target=target.target
        )
        with_ours = [*headers.items(), ("user-agent", "chat-relay"), ("connection", "close")]
        try:
            async with (
                asyncio.timeout(ANSWER_SECONDS),
                self._pool.stream(
                    "POST",
                    url,
                    headers=with_ours,
                    content=body,
                    extensions={"timeout": {"connect": CONNECT_SECONDS}},
                ) as response,
            ):
                await _pass_over(response)
                return Answer(response.status, _text(response.headers))
        except _FAILURES as failure:
            raise NoAnswer(type(failure).__name__) from failure


async def _pass_over(response: httpcore2.Response) -> None:
    """The body tells nothing that the status does not."""
    taken = 0
    with suppress(*_FAILURES):
        async with asyncio.timeout(BODY_SECONDS), aclosing(response.aiter_stream()) as parts:
            async for part in parts:
                taken += len(part)
                if taken >= BODY_BYTES:
                    break


def _text(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
