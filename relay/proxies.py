"""Proxies that the environment names, as httpx goes through them."""

from collections.abc import Iterator
from contextlib import contextmanager

from relay.errors import ConfigurationError

HERE = frozenset({"localhost", "127.0.0.1", "::1"})
"""Hosts that are this machine. To a proxy they would be another one."""


@contextmanager
def usable() -> Iterator[None]:
    """While a client is made. Raises ConfigurationError if a proxy is none of HTTP's."""
    try:
        yield
    except (ImportError, ValueError):
        raise ConfigurationError(
            "The environment names a proxy that is none of HTTP's: set HTTP_PROXY and HTTPS_PROXY "
            "to one such as http://HOST:3128, and unset ALL_PROXY."
        ) from None
