"""The limit of connections: who goes when one more comes."""

from __future__ import annotations

import resource

import pytest

from studio_worker.network.crowd import Crowd, most_connections, origin_of


class Visitor:
    def __init__(self, origin: str, waits_since: float | None) -> None:
        self.origin = origin
        self.waits_since = waits_since
        self.is_gone = False

    def drop(self) -> None:
        self.is_gone = True


def test_the_longest_waiting_of_the_most_numerous_goes() -> None:
    """Whoever holds most connections loses the one that we have waited for longest; others keep theirs."""
    crowd = Crowd(4)
    alone, first, second, third = (
        Visitor("a", 1.0),
        Visitor("b", 3.0),
        Visitor("b", 2.0),
        Visitor("b", None),
    )
    for each in (alone, first, second, third):
        assert crowd.enter(each) is None
    assert crowd.enter(Visitor("c", 9.0)) is second
    assert crowd.enter(Visitor("c", 9.5)) is first
    assert not alone.is_gone


def test_nobody_who_is_served_goes() -> None:
    """Where all others are being served, the newcomer goes."""
    crowd = Crowd(1)
    served, newcomer = Visitor("a", None), Visitor("b", None)
    crowd.enter(served)
    assert crowd.enter(newcomer) is newcomer
    assert not served.is_gone


def test_closed_connections_take_no_room() -> None:
    """A connection that has ended without a word is not counted."""
    crowd = Crowd(1)
    ended, newcomer = Visitor("a", None), Visitor("b", None)
    crowd.enter(ended)
    ended.is_gone = True
    assert crowd.enter(newcomer) is None


def test_ipv6_customer_is_one_sender() -> None:
    """An address more of one's own /64 is no other sender, and a mapped address is what it stands for."""
    assert origin_of("2001:db8:1:2::1") == origin_of("2001:db8:1:2:ffff::9")
    assert origin_of("2001:db8:1:2::1") != origin_of("2001:db8:1:3::1")
    assert origin_of("::ffff:10.0.0.1") == origin_of("10.0.0.1") != origin_of("10.0.0.2")


def test_connections_stay_below_the_limit_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual limit of 1,024 descriptors is never reached by connections and what they open."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    assert most_connections(512, each=2) * 2 < 1024 - 60
    assert most_connections(100) == 100
