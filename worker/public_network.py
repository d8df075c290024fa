"""The network as webhooks see it: public addresses alone, and those very ones that were checked."""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import httpcore2

from worker.lookup import Lookups

_NAT64 = ip_network("64:ff9b::/96")
_UNICAST = ip_network("2000::/3")
_DOCUMENTATION = ip_network("3fff::/20")
_PROTOCOLS = ip_network("192.0.0.0/24")
_RELAYS_6TO4 = ip_network("192.88.99.0/24")
_AZURE = ip_address("168.63.129.16")
"""By which each machine there reaches what manages it; nobody else has this address."""


class NotPublic(httpcore2.ConnectError):
    """One of the addresses of a name is not public, or the name has none."""


class PublicNetwork(httpcore2.AsyncNetworkBackend):
    """Connects only to names of which every address is public, and without a second lookup, which
    could give another answer. What stands above it goes on by the name: Host, SNI, certificate.
    """

    def __init__(self, *, private: bool) -> None:
        """`private`: every address is taken for public."""
        self._private = private
        self._network = httpcore2.AnyIOBackend()
        self._lookups = Lookups()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - as the base class has it
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """`timeout` is for one address of the name, then the next is tried. Raises NotPublic;
        ConnectError or ConnectTimeout if none lets itself be reached."""
        failure: Exception = NotPublic(host)
        for address in await self._addresses(host):
            try:
                return await self._network.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        try:
            raise failure
        finally:
            del failure  # With this frame it would be in a cycle.

    async def _addresses(self, host: str) -> list[str]:
        try:
            addresses = await self._lookups.addresses(host)
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        if not (self._private or all(map(is_public, addresses))):
            raise NotPublic(host)
        return addresses


def is_public(address: str) -> bool:
    """Whether an IP address can be that of a host on the internet. One that stands for an IPv4
    address is as public as that; the tunnels 6to4 and Teredo are not, for nobody has them now."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        within = IPv4Address(int(ip) % 2**32) if ip in _NAT64 else ip.ipv4_mapped
        if within is None:
            special = ip.sixtofour or ip in _DOCUMENTATION
            return ip in _UNICAST and ip.is_global and not special
        ip = within
    special = ip.is_multicast or ip in _PROTOCOLS or ip in _RELAYS_6TO4 or ip == _AZURE
    return ip.is_global and not special
