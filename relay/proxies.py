"""Proxies and certificates that the environment names, as httpx takes them."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2

from relay.errors import ConfigurationError

HERE = frozenset({"localhost", "127.0.0.1", "::1"})
"""Hosts that are this machine. To a proxy they would be another one."""


@contextmanager
def usable() -> Iterator[None]:
    """While a client is made. Raises ConfigurationError if a proxy is none of HTTP's, or if the
    certificates that are to be trusted cannot be read."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"SSL_CERT_FILE or SSL_CERT_DIR leads to no certificates ({error.strerror}): "
            "set it to a file of them, or unset it."
        ) from None
    except (ImportError, ValueError, httpx2.InvalidURL):
        raise ConfigurationError(
            "The environment names a proxy that is none of HTTP's: set HTTP_PROXY and HTTPS_PROXY "
            "to one such as http://HOST:3128, and unset ALL_PROXY."
        ) from None
