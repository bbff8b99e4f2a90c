"""Which addresses an input picture may be fetched from: public ones, and the hosts that are trusted by name.

An input's URL comes from whoever wrote the job. Without this rule it could make a worker read from its own
machine, its local network or a cloud's metadata service (server-side request forgery). Names are resolved
once, every address is checked, and the connection goes to a checked address: a name that changes its answer
in between (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from studio_worker.errors import DownloadRefused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""RFC 6052: the last 32 bits are the IPv4 address that is reached."""

_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
"""All that IANA has given out for public IPv6 addresses (RFC 4291, 2.4; its address space registry)."""


@dataclass(frozen=True)
class Networks:
    """Where connections may go.

    Args:
        private: whether private networks and this machine itself are allowed. Link-local addresses, where
            clouds keep credentials, never are.
        trusted_hosts: names or addresses as they stand in URLs, whatever network they are in.
    """

    private: bool = False
    trusted_hosts: frozenset[str] = frozenset()

    def problem(self, host: str, address: Address) -> str | None:
        """Why ``host``, which resolves to ``address``, must not be connected to, or ``None``."""
        if host in self.trusted_hosts:
            return None
        kind = network_kind(address)
        if not kind or (self.private and kind in {"a private network", "this machine itself"}):
            return None
        return (
            f"{host} is an address of {kind}; input pictures come from public addresses and the studio's own "
            "host, or with allow_insecure_urls = true under [models] from private networks too"
        )

    def literal_problem(self, host: str) -> str | None:
        """:meth:`problem` of a host that is an address itself; names are resolved when they are connected to,
        by a proxy where there is one.
        """
        try:
            return self.problem(host, ipaddress.ip_address(host))
        except ValueError:
            return None

    def check(self, host: str, address: str) -> None:
        """Raises DownloadRefused where :meth:`problem` finds something."""
        if problem := self.problem(host, ipaddress.ip_address(address)):
            raise DownloadRefused("request error", f"GET {problem}")


def network_kind(address: Address) -> str:
    """What kind of network ``address`` belongs to; empty for a public one."""
    address = _embedded(address)
    if address.is_loopback or address.is_unspecified:
        return "this machine itself"
    if address.is_link_local:
        return "the local link"
    if address.is_multicast:
        return "a group of machines (multicast)"
    # is_global follows IANA's special-purpose registries (RFC 1918, unique local, …) as they were when
    # this Python was made; whatever it does not know there, nothing outside _GLOBAL_V6 is public.
    is_public = address.is_global and (isinstance(address, ipaddress.IPv4Address) or address in _GLOBAL_V6)
    return "" if is_public else "a private network"


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for (mapped, 6to4, NAT64), else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
