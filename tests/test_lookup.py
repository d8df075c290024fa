"""Lookups of names, by a resolver that a test holds up as long as it likes."""

import asyncio
import gc
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import until
from tests.receiver import Names
from worker.lookup import Lookups


class Stalled:
    """A name that is answered when the test says so, and not known without addresses."""

    def __init__(self, addresses: list[str]) -> None:
        self._addresses = addresses
        self.answered = threading.Event()

    def __call__(self) -> list[str]:
        self.answered.wait()
        if not self._addresses:
            raise socket.gaierror(socket.EAI_NONAME, "not known")
        return self._addresses


@pytest.fixture
def known(names: Names) -> Iterator[Stalled]:
    names["known.test"] = stalled = Stalled(["127.0.0.3", "127.0.0.2"])
    yield stalled
    stalled.answered.set()


@pytest.fixture
def unknown(names: Names) -> Iterator[Stalled]:
    names["unknown.test"] = stalled = Stalled([])
    yield stalled
    stalled.answered.set()


@pytest.mark.parametrize("address", ["127.0.0.1", "8.8.8.8", "::1", "2001:db8::1"])
async def test_an_address_is_not_looked_up(address: str, names: Names) -> None:
    assert await Lookups().addresses(address) == [address]
    assert names.lookups == []


async def test_all_who_ask_for_a_name_share_the_lookup_that_is_under_way_and_none_that_is_over(
    known: Stalled, names: Names
) -> None:
    lookups = Lookups()
    asking = [asyncio.create_task(lookups.addresses("known.test")) for _ in range(3)]
    await asyncio.sleep(0)  # In which all of them begin.
    asking.pop(0).cancel()
    asking.append(asyncio.create_task(lookups.addresses("known.test")))
    await asyncio.sleep(0)  # In which the last one begins.
    known.answered.set()
    async with asyncio.timeout(5):
        assert await asyncio.gather(*asking) == [["127.0.0.3", "127.0.0.2"]] * 3
        assert names.lookups == ["known.test"]
        await lookups.addresses("known.test")
    assert names.lookups == ["known.test"] * 2


async def test_of_a_name_that_is_not_known_all_who_ask_are_told(unknown: Stalled) -> None:
    lookups = Lookups()
    asking = [asyncio.create_task(lookups.addresses("unknown.test")) for _ in range(2)]
    await asyncio.sleep(0)  # In which both begin.
    unknown.answered.set()
    for each in asking:
        with pytest.raises(socket.gaierror, match="not known"):
            await each


async def test_a_lookup_that_fails_when_all_who_asked_have_left_disturbs_nobody(
    unknown: Stalled,
) -> None:
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    lookups = Lookups()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await lookups.addresses("unknown.test")
    unknown.answered.set()

    async def is_over() -> bool:
        return not lookups._under_way

    await until(is_over)
    gc.collect()
    assert told == []


def test_a_lookup_that_is_answered_after_the_end_of_its_loop_disturbs_nobody(
    known: Stalled,
) -> None:
    """An error in its thread would stand under what the process said last."""

    async def ask() -> None:
        async with asyncio.timeout(0):
            await Lookups().addresses("known.test")

    with pytest.raises(TimeoutError):
        asyncio.run(ask())
    known.answered.set()
    for thread in threading.enumerate():
        if thread.name == "lookup":
            thread.join(5)


async def test_a_failure_leaves_nothing_to_the_garbage_collector(unknown: Stalled) -> None:
    """With its frames it would hold whoever asked, and the collector hardly ever looks."""
    left: list[weakref.ref[Exception]] = []

    async def is_gone() -> bool:  # When loop and thread have let go of it.
        return [each() for each in left] == [None]

    unknown.answered.set()
    gc.disable()
    try:
        try:
            await Lookups().addresses("unknown.test")
        except OSError as error:
            left.append(weakref.ref(error))
        await until(is_gone)
    finally:
        gc.enable()


ABANDONED = """
import asyncio, socket, threading
from worker.lookup import Lookups

socket.getaddrinfo = lambda *_, **__: threading.Event().wait()

async def ask():
    await asyncio.wait_for(Lookups().addresses("stalled.test"), 0.01)

try:
    asyncio.run(ask())
except TimeoutError:
    print("given up")
"""


def test_the_end_of_the_process_waits_for_no_lookup() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ABANDONED], timeout=20, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "given up\n", "")
