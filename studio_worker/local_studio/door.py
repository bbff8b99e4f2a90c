"""Where a studio listens, and under which conditions it does so beyond this machine.

There it wants a token, and that what people and workers say cannot be read on the way: a certificate of its
own, or a proxy in front that has one. Whoever owns the whole network may say that it needs neither.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from studio_worker.errors import ConfigError
from studio_worker.local_studio.tls import Tls
from studio_worker.local_studio.web.access import is_loopback

ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that stand for all of this machine's, and the one that this machine itself calls."""

DRAIN_S = 5.0
"""Load balancers that ask every 2 s have heard twice by then that a studio leaves."""


@dataclass(frozen=True)
class Door:
    """Where a studio listens, and what people must know to use its page and ``/api``.

    ``port`` 0 takes a free one. With ``tls`` it speaks https. ``proxies`` are addresses or networks that are
    believed what they say of their own clients. ``is_plain`` lets it speak plain http to a network. For
    ``drain_s`` a studio that is to end says so first and serves on; without one behind proxies alone.
    """

    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = field(default=None, repr=False)
    tls: Tls | None = None
    proxies: tuple[str, ...] = ()
    is_plain: bool = False
    drain_s: float | None = None

    @property
    def leaves_after_s(self) -> float:
        """How long it serves on once it is to end."""
        if self.drain_s is not None:
            return self.drain_s
        return DRAIN_S if self.proxies else 0.0

    def check(self) -> None:
        """Raises ConfigError where strangers could come in, or read along."""
        for proxy in self.proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise ConfigError(
                    f"{proxy!r} is neither an address nor a network",
                    cure="name the proxy's address, e.g. 10.0.0.5, or its network, e.g. 10.0.0.0/24",
                    key="--behind-proxy",
                ) from error
        if not self.token and self.proxies:
            raise ConfigError(
                "a proxy opens the studio to the network without a token",
                cure="give a token with --token-file",
                key="--behind-proxy",
            )
        if is_loopback(self.host):
            return
        if not self.token:
            raise ConfigError(
                f"listening on {self.host} opens the studio to the network without a token",
                cure="give a token with --token-file, or listen on 127.0.0.1",
                key="--host",
            )
        if not (self.tls or self.proxies or self.is_plain):
            raise ConfigError(
                f"on {self.host} tokens and pictures would go over the network for everybody to read",
                cure="give a certificate with --certificate and --key, name the proxy that has one with"
                " --behind-proxy ADDRESS, or say --plain-http where the network is all your own",
                key="--host",
            )

    def address(self, port: int) -> str:
        """The studio's for programs of this machine, without a path."""
        host = ANY.get(self.host, self.host)
        if self.tls is not None and self.host in ANY:
            host = self.tls.name or host
        return f"{'https' if self.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    def told(self, port: int) -> str:
        """The same for people, who need not be at this machine."""
        address = self.address(port)
        if self.proxies:
            return f"at its proxy's address, for people and workers; on this machine {address}"
        if self.host in ANY and self.tls is None:
            return f"at port {port} of this machine's addresses; on this machine {address}"
        return address


LOOPBACK = Door()
"""A free port, for whoever is at this machine."""
