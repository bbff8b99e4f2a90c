"""How a download behaves: its patience, its limits, and the ways it may take. Holds values, does nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from studio_worker.network.addresses import Networks
from studio_worker.network.connecting import Reached
from studio_worker.network.uplink import Uplink

_BURST_S = 0.1


class Limit:
    """So many bytes a second over everything that shares this object."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._paid_until = 0.0

    def take(self, count: int, given_up: threading.Event) -> None:
        """Wait until ``count`` bytes that have come are within the limit, or ``given_up`` is set."""
        with self._lock:
            now = time.monotonic()
            self._paid_until = max(self._paid_until, now - _BURST_S) + count / self.bytes_per_s
            wait_s = self._paid_until - now
        if wait_s > 0:
            given_up.wait(wait_s)


class Connections:
    """So many connections at most over all downloads that share this object, in equal shares.

    A download has at least one, so no more downloads should run at once than there are connections.
    """

    def __init__(self, most: int = 32) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._downloads = 0

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """While this lasts one more download shares the connections."""
        with self._lock:
            self._downloads += 1
        try:
            yield
        finally:
            with self._lock:
                self._downloads -= 1

    @property
    def share(self) -> int:
        """How many one download may have now."""
        return max(1, self.most // max(1, self._downloads))


@dataclass(frozen=True)
class Policy:
    """How patient a download is, and which ways it may take. Times are seconds.

    ``delays_s`` are the waits between tries; a try that brought new bytes starts them again, so that a
    mirror which drops every connection is outlasted as long as it gives something each time. ``wait``
    waits for that long and says whether the event was set meanwhile; tests put their own there.

    ``connect_s``: for a connection, all addresses of the host together. ``first_byte_s``: for the answer's
    head, which a cache in between may first have to fetch the file for. ``stall_s``: a connection without a
    byte of the body for so long is replaced. ``slow_s``: so often is one compared
    with the others, and replaced where it is much slower. There is no limit to the whole. ``sync_s``: so
    often is what has come made to outlast a power cut. ``other_s``: so long is another process waited for
    that has the same download and brings nothing; it may be reading back what it has, which takes minutes.

    ``mirrors`` are pairs of URL prefixes: what begins with the first is asked with the second in its place,
    before it is asked as it is. ``tokens`` are bearer tokens by host name, each sent to its host alone.
    ``on_end`` is told of each download's end: whether it succeeded, and how many bytes came for it.
    ``on_wait`` is told of each wait before another try: why it is needed, and its seconds.
    ``ca_bundle`` and ``proxy`` come before what the usual variables of the environment say.

    ``networks``: where connections may go; ``None`` = anywhere. ``offered``: the same for files that an offer
    brings, which the configuration does not name.

    ``uplink``: the uploads that are given way to.
    """

    connect_s: float = 15.0
    first_byte_s: float = 60.0
    stall_s: float = 15.0
    slow_s: float = 3.0
    sync_s: float = 30.0
    other_s: float = 600.0
    delays_s: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    retry_after_cap_s: float = 120.0
    allow_insecure: bool = False
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait
    connections: Connections = field(default_factory=Connections)
    limit: Limit | None = None
    mirrors: tuple[tuple[str, str], ...] = ()
    tokens: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    ca_bundle: Path | None = None
    proxy: str | None = field(default=None, repr=False)  # may hold a password
    on_end: Callable[[bool, int], None] = field(default=lambda _succeeded, _size_bytes: None, repr=False)
    on_wait: Callable[[str, float], None] = field(default=lambda _why, _seconds: None, repr=False)
    networks: Networks | None = None
    offered: Networks | None = None
    reached: Reached = field(default_factory=Reached, repr=False)
    uplink: Uplink = field(default_factory=Uplink, repr=False)

    @property
    def silence_s(self) -> float:
        """So long may nothing at all come, whatever is tried."""
        return self.connect_s + self.first_byte_s + self.stall_s

    def ways(self, url: str) -> tuple[str, ...]:
        """The addresses to try for ``url``, in order; the last is ``url`` itself."""
        mirrored = (there + url.removeprefix(here) for here, there in self.mirrors if url.startswith(here))
        return (*dict.fromkeys(way for way in mirrored if way != url), url)
