"""How many files and sockets a process may have open."""

import resource
from contextlib import suppress


def allow_every_descriptor() -> None:
    """Call it at the start. Each viewer and each answer is a socket, and who starts us often allows
    1,024: what comes above that is refused without a word."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # Some systems call it unlimited, and then allow less.
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
