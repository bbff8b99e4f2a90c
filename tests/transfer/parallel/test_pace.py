"""How many connections a download uses: more while more of them bring more, fewer when the server says so."""

from __future__ import annotations

import pytest

from studio_worker.transfer.parallel.pace import Pace, Work

MB = 1_000_000


class RangeReader:
    """A pace with a clock, fed by connections that each bring so many MB/s, up to what the line takes."""

    def __init__(self, *, each: float, line: float = 10_000, busy: float = 0.0, late: float = 0.0) -> None:
        self.pace = Pace()
        self.each, self.line, self.busy, self.late = each, line, busy, late
        self.now = self.received = self.busy_s = 0.0
        self.reads = self.late_reads = 0.0
        self.pace.allow(0.0, 32)

    def run(self, seconds: float) -> int:
        """Time passes in ticks; returns the number of connections at its end."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.02
            self.received += 0.02 * min(self.line, self.pace.target * self.each) * MB
            self.busy_s += 0.02 * self.busy
            self.reads += 100
            self.late_reads += 100 * self.late
            work = Work(self.busy_s, int(self.reads), int(self.late_reads))
            self.pace.note(self.now, int(self.received), self.pace.target, work)
        return self.pace.target


def test_pace_grows_to_all_where_each_connection_is_capped() -> None:
    """A server that caps connections is met with as many as are allowed, within a second."""
    assert RangeReader(each=20).run(1.0) == 32


def test_pace_stays_with_one_where_one_brings_all() -> None:
    """More connections that bring nothing are given up, and not tried again at once."""
    line = RangeReader(each=100, line=110)
    assert line.run(2.0) == 1
    assert line.run(10.0) == 1


@pytest.mark.parametrize("limit", [{"busy": 0.9}, {"late": 0.9}])
def test_pace_adds_none_where_this_machine_is_what_limits(limit: dict[str, float]) -> None:
    """Connections do not help a machine that cannot keep up with one, or gets no time to."""
    assert RangeReader(each=20, **limit).run(5.0) == 1


def test_pace_goes_back_when_the_server_refuses_and_rests_as_long_as_it_asks() -> None:
    """After a refusal only those that deliver stay, for the time the server names."""
    line = RangeReader(each=20)
    line.run(1.0)
    line.pace.refused(line.now, 4, rest_s=60)
    assert line.run(55.0) == 4
    assert line.run(10.0) == 32


def test_pace_keeps_within_what_is_allowed_now() -> None:
    """Where another download joins, some connections are given up at once; they come back later."""
    line = RangeReader(each=20)
    line.run(1.0)
    line.pace.allow(line.now, 16)
    assert line.pace.target == 16
    line.pace.allow(line.now, 32)
    assert line.run(1.0) == 32


def test_pace_stays_with_one_where_ranges_are_ignored() -> None:
    """A server without ranges is never asked for more, whatever is allowed."""
    line = RangeReader(each=20)
    line.pace.hold_at_one()
    line.pace.allow(line.now, 32)
    assert line.run(5.0) == 1


def test_pace_judges_no_step_by_what_came_during_an_upload() -> None:
    """Downloads that rest while a picture is uploaded find their number of connections afterwards."""
    line = RangeReader(each=20)
    assert line.run(0.2) == 8
    line.now += 3.0
    line.pace.interrupted()
    assert line.run(1.0) == 32
