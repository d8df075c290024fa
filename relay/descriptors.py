"""How many files and sockets a process may have open, and whether that is enough."""

import asyncio
import os
import resource
from contextlib import suppress

from relay.logs import get_logger

logger = get_logger()

WATCH_SECONDS = 1.0
SCARCE = 0.9
"""Of all: from there on it is told."""


def allow_every_descriptor() -> None:
    """Call it at the start. Each viewer and each answer is a socket, and who starts us often allows
    1,024: what comes above that is refused without a word."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # Some systems call it unlimited, and then allow less.
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def room_for(wanted: int, *, spare: int) -> int:
    """So many of them, a descriptor each, are allowed now beside those that are spared."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if allowed == resource.RLIM_INFINITY else min(wanted, allowed - spare)


async def warn_when_scarce() -> None:
    """Until cancelled. The log is the only place for it: who cannot be connected with cannot be
    asked for its metrics either."""
    while True:
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if most != resource.RLIM_INFINITY and _lowest_free(most) > SCARCE * most:
            logger.warning("descriptors_low", most=most)
        await asyncio.sleep(WATCH_SECONDS)


def _lowest_free(most: int) -> int:
    """All below it are taken, so that nothing has to be counted; `most` if none is free."""
    try:
        pipe = os.pipe()
    except OSError:
        return most
    for number in pipe:
        os.close(number)
    return min(pipe)
