"""Names of hosts, looked up: once at a time, however many ask for the same.

A lookup cannot be ended, and may go on for long after whoever asked has given up. So each has a
thread of its own: in a pool, names that are not answered would stand in the way of the others, and
the end of the process would wait for all of them, one after the other.
"""

import asyncio
import socket
from contextlib import suppress
from functools import partial
from threading import Thread


class Lookups:
    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Future[list[str]]] = {}

    async def addresses(self, host: str) -> list[str]:
        """In the order in which they are to be tried. Raises OSError if there are none to be had.
        An address is its own, and costs no thread."""
        if _is_address(host):
            return [host]
        # The future stands in no variable: its error would be in a cycle with this frame.
        return await asyncio.shield(self._under_way.get(host) or self._begin(host))

    def _begin(self, host: str) -> asyncio.Future[list[str]]:
        lookup: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        Thread(target=_look_up, args=(host, lookup), name="lookup", daemon=True).start()
        self._under_way[host] = lookup
        # All who asked may have left: an error that nobody takes would be told as one of ours.
        lookup.add_done_callback(lambda _: self._under_way.pop(host).exception())
        return lookup


def _is_address(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except OSError:
        return False
    return True


def _look_up(host: str, lookup: asyncio.Future[list[str]]) -> None:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        settle = partial(lookup.set_result, [str(address[0]) for *_, address in found])
    except Exception as error:  # noqa: BLE001 - it is raised where the addresses are waited for
        settle = partial(lookup.set_exception, error.with_traceback(None))
    with suppress(RuntimeError):  # The loop is closed, for the process ends.
        lookup.get_loop().call_soon_threadsafe(settle)
