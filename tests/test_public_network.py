"""Where webhooks may connect to. Where addresses are told public and private apart, the loopback
addresses of this machine play both."""

import asyncio
import gc
import socket
import threading
import weakref

import httpcore2
import pytest

from tests.conftest import until
from tests.listening import silent
from tests.receiver import Names, receiving
from worker.public_network import NotPublic, PublicNetwork, is_public

PUBLIC = [
    *("8.8.8.8", "168.63.129.17", "::ffff:8.8.8.8", "64:ff9b::808:808"),
    *("2001:4860:4860::8888", "3fff:1000::1"),
]
NOT_PUBLIC = [
    *("0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1"),  # noqa: S104
    *("192.0.0.8", "192.0.2.1", "192.168.0.1", "198.18.0.1", "203.0.113.1"),
    *("168.63.129.16", "::ffff:168.63.129.16", "192.88.99.1", "3fff::1", "3fff:fff:ffff::1"),
    *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::10.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:0:a00:1"),
    *("64:ff9b::a00:1", "64:ff9b::7f00:1", "64:ff9b:1::808:808", "100::1", "5f00::1"),
    *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:0:808:808::", "2001:db8::1"),
    *("2002:a00:1::", "2002:808:808::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%2"),
    *("fec0::1", "ff02::1", "ff0e::1"),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_an_address_on_the_internet_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_no_other_is_whatever_it_is_wrapped_in(address: str) -> None:
    assert not is_public(address)


@pytest.fixture
def network() -> PublicNetwork:
    return PublicNetwork(private=False)


@pytest.fixture
def public_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 is on the internet, and no other address is."""
    monkeypatch.setattr("worker.public_network.is_public", lambda address: address == "127.0.0.1")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001"])
async def test_nothing_is_sent_to_a_private_address_however_it_is_written(
    network: PublicNetwork, host: str
) -> None:
    async with receiving() as receiver:
        with pytest.raises(NotPublic):
            await network.connect_tcp(host, receiver.port)
        assert receiver.connections == 0


@pytest.mark.usefixtures("public_loopback")
async def test_one_private_address_makes_a_name_private(
    network: PublicNetwork, names: Names
) -> None:
    async with receiving() as receiver:
        for addresses in (["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"], []):
            names["hooks.test"] = addresses
            with pytest.raises(NotPublic):
                await network.connect_tcp("hooks.test", receiver.port)
        assert receiver.connections == 0


@pytest.mark.usefixtures("public_loopback")
async def test_a_name_that_changes_after_the_check_leads_nowhere_else(
    network: PublicNetwork, names: Names
) -> None:
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]])
    names["hooks.test"] = lambda: next(answers)
    async with receiving() as public, receiving(host="127.0.0.2", port=public.port) as private:
        stream = await network.connect_tcp("hooks.test", public.port)
        assert stream.get_extra_info("server_addr")[0] == "127.0.0.1"
        await stream.aclose()
        assert names.lookups == ["hooks.test"]
        with pytest.raises(NotPublic):
            await network.connect_tcp("hooks.test", public.port)
        assert private.connections == 0


async def test_of_several_addresses_the_first_that_can_be_reached_is_taken(
    names: Names,
) -> None:
    network = PublicNetwork(private=True)
    names["hooks.test"] = ["127.0.0.3", "127.0.0.2"]
    async with receiving(host="127.0.0.2") as receiver:
        stream = await network.connect_tcp("hooks.test", receiver.port)
        assert stream.get_extra_info("server_addr")[0] == "127.0.0.2"
        await stream.aclose()
    with pytest.raises(httpcore2.ConnectError) as failure:
        await network.connect_tcp("hooks.test", receiver.port)
    assert not isinstance(failure.value, NotPublic)


async def test_an_address_that_does_not_answer_in_time_leads_to_the_next(names: Names) -> None:
    network = PublicNetwork(private=True)
    names["hooks.test"] = ["127.0.0.3", "127.0.0.2"]
    async with receiving(host="127.0.0.2") as receiver:
        with silent("127.0.0.3", receiver.port):
            stream = await network.connect_tcp("hooks.test", receiver.port, 0.1)
            assert stream.get_extra_info("server_addr")[0] == "127.0.0.2"
            await stream.aclose()


async def test_a_name_that_is_not_known_is_an_error_of_the_network(
    network: PublicNetwork, names: Names
) -> None:
    def unknown() -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "not known")

    names["hooks.test"] = unknown
    with pytest.raises(httpcore2.ConnectError):
        await network.connect_tcp("hooks.test", 443)


@pytest.mark.usefixtures("public_loopback")
async def test_names_that_are_not_answered_hold_up_neither_others_nor_the_loop(
    network: PublicNetwork, names: Names
) -> None:
    answered = threading.Event()

    def stall() -> list[str]:
        answered.wait()
        return []

    async def all_asked() -> bool:
        return len(names.lookups) == len(stalled)

    wildcard = [f"{number}.stalled.test" for number in range(60)]
    for name in wildcard:
        names[name] = stall
    names["hooks.test"] = ["127.0.0.1"]
    stalled = [asyncio.create_task(network.connect_tcp(name, 1)) for name in wildcard]
    try:
        async with asyncio.timeout(5), receiving() as receiver:
            await until(all_asked)
            await (await network.connect_tcp("hooks.test", receiver.port)).aclose()
            await asyncio.get_running_loop().getaddrinfo("localhost", 1)
    finally:
        answered.set()
    for task in stalled:
        with pytest.raises(NotPublic):
            await task


async def test_a_failure_leaves_nothing_to_the_garbage_collector() -> None:
    """With its frames it would hold the whole delivery, and the collector hardly ever looks."""
    network = PublicNetwork(private=True)
    left: weakref.ref[Exception] | None = None
    gc.disable()
    try:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))  # And does not listen.
            try:
                await network.connect_tcp(*nobody.getsockname())
            except httpcore2.ConnectError as error:
                left = weakref.ref(error)
        assert left is not None
        assert left() is None
    finally:
        gc.enable()
