"""The connections of one server of ours: how many there may be, and which one goes when there are too many.

Whoever can reach a port can open connections and say nothing. Without a limit they take every descriptor of
the process, and nobody else is heard. With one, the connection goes that has kept us waiting longest, of
whoever has the most of them, so that others still come in. Knows no protocol: its visitors say since when
they keep us waiting.
"""

from __future__ import annotations

import collections
import ipaddress
import resource
from typing import Protocol

_KEPT_BACK = 64
"""Descriptors for everything but connections: database, log, listening sockets, libraries."""
_FEWEST = 8


class Visitor(Protocol):
    """One connection."""

    origin: str
    """Whom it comes from, see :func:`origin_of`."""

    @property
    def waits_since(self) -> float | None:
        """Since when we have waited for the other side (monotonic), ``None`` while it waits for us."""

    @property
    def is_gone(self) -> bool:
        """Whether it is closed already."""

    def drop(self) -> None:
        """Close it at once."""


class Crowd:
    """All connections of one server, at most ``most``. For one thread."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._present: set[Visitor] = set()

    def enter(self, visitor: Visitor) -> Visitor | None:
        """One more has come; returns the one that was dropped for it, perhaps itself."""
        self._present.add(visitor)
        if len(self._present) <= self.most:
            return None
        self._present = {each for each in self._present if not each.is_gone}
        if len(self._present) <= self.most:
            return None
        goes = self._most_dispensable() or visitor
        self.leave(goes)
        goes.drop()
        return goes

    def leave(self, visitor: Visitor) -> None:
        """It is closed."""
        self._present.discard(visitor)

    def drop_all(self) -> None:
        """Close every one of them."""
        for each in list(self._present):
            each.drop()

    def _most_dispensable(self) -> Visitor | None:
        counts = collections.Counter(each.origin for each in self._present)
        waiting = [(since, each) for each in self._present if (since := each.waits_since) is not None]
        if not waiting:
            return None
        return min(waiting, key=lambda pair: (-counts[pair[1].origin], pair[0]))[1]


def origin_of(host: str) -> str:
    """What counts as one sender: an IPv4 address, or the /64 that a provider gives to each IPv6 customer."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    address = getattr(address, "ipv4_mapped", None) or address
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


def most_connections(wanted: int, each: int = 1) -> int:
    """``wanted``, or as many as this process's limit of descriptors has room for.

    Args:
        each: descriptors that one connection may take, its own included.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted
    return max(_FEWEST, min(wanted, (limit - _KEPT_BACK) // each))
