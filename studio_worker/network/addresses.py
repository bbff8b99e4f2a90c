"""Which addresses what a job names may come from: public ones, and the servers that are trusted by name.

Such a URL comes from whoever wrote the job. Without this rule it could make a worker read from its own
machine, its local network or a cloud's metadata service (server-side request forgery). Names are resolved
once, every address is checked, and the connection goes to a checked address: a name that changes its answer
in between (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from studio_worker.errors import DownloadRefused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Server = tuple[str, int]
"""A host, as it stands in a URL, and its port."""

_HERE = "this machine itself"
_PRIVATE = "a private network"

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
        this_machine: whether this machine alone is.
        trusted: servers, see :func:`server_of`, whatever network they are in.
    """

    private: bool = False
    this_machine: bool = False
    trusted: frozenset[Server] = frozenset()

    def problem(self, server: Server, address: Address) -> str | None:
        """Why ``server``, which resolves to ``address``, must not be connected to, or ``None``."""
        kind = network_kind(address)
        allowed = {_PRIVATE, _HERE} if self.private else {_HERE} if self.this_machine else set()
        if server in self.trusted or not kind or kind in allowed:
            return None
        return (
            f"{server[0]} is an address of {kind}; what a job names comes from public addresses and from the "
            "studio's own host and port, or with allow_insecure_urls = true under [models] from private "
            "networks too"
        )

    def literal_problem(self, url: str) -> str | None:
        """:meth:`problem` of an address that is no name; names are resolved when they are connected to, by a
        proxy where there is one.
        """
        server = server_of(url)
        try:
            return self.problem(server, ipaddress.ip_address(server[0]))
        except ValueError:
            return None

    def check(self, host: str, port: int, address: str) -> None:
        """Raises DownloadRefused where :meth:`problem` finds something."""
        if problem := self.problem((host, port), ipaddress.ip_address(address)):
            raise DownloadRefused("request error", f"GET {problem}")


def server_of(url: str) -> Server:
    """Host and port that ``url`` leads to, for a URL that is known to be one."""
    parts = urlsplit(url)
    return (parts.hostname or "").rstrip("."), parts.port or (443 if parts.scheme == "https" else 80)


def network_kind(address: Address) -> str:
    """What kind of network ``address`` belongs to; empty for a public one."""
    address = _embedded(address)
    if address.is_loopback or address.is_unspecified:
        return _HERE
    if address.is_link_local:
        return "the local link"
    if address.is_multicast:
        return "a group of machines (multicast)"
    # is_global follows IANA's special-purpose registries (RFC 1918, unique local, …) as they were when
    # this Python was made; whatever it does not know there, nothing outside _GLOBAL_V6 is public.
    is_public = address.is_global and (isinstance(address, ipaddress.IPv4Address) or address in _GLOBAL_V6)
    return "" if is_public else _PRIVATE


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for (mapped, 6to4, NAT64), else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
