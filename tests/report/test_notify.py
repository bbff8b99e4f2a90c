"""What systemd hears: real datagrams on a real socket."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio_worker.report.notify import EXTEND_S, Notifier, ReadyLine, watchdog_interval_s


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The service manager's end of the notify socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def heard(systemd: socket.socket) -> list[str]:
    """The assignments of the next datagram."""
    return systemd.recv(65536).decode("utf-8").split("\n")


def test_ready_comes_with_its_status(systemd: socket.socket) -> None:
    """READY=1 and the first status line arrive in one message."""
    Notifier().ready("ready, waiting for approval")
    assert heard(systemd) == ["READY=1", "STATUS=ready, waiting for approval"]


def test_status_is_one_line_of_systemctl(systemd: socket.socket) -> None:
    """A status goes out as STATUS= and nothing else."""
    Notifier().status("sd15: 42% of 4265.1 MB")
    assert heard(systemd) == ["STATUS=sd15: 42% of 4265.1 MB"]


def test_extend_timeout_asks_for_microseconds(systemd: socket.socket) -> None:
    """The extension of a start is told in microseconds, as systemd counts."""
    Notifier().extend_timeout()
    assert heard(systemd) == [f"EXTEND_TIMEOUT_USEC={EXTEND_S * 1_000_000}"]


def test_watchdog_and_stopping_are_told(systemd: socket.socket) -> None:
    """Signs of life and the beginning of the end arrive in order, each as its own message."""
    notifier = Notifier()
    notifier.watchdog()
    notifier.stopping("finishing the job in hand")
    assert heard(systemd) == ["WATCHDOG=1"]
    assert heard(systemd) == ["STOPPING=1", "STATUS=finishing the job in hand"]


def test_stop_that_takes_long_is_asked_for(systemd: socket.socket) -> None:
    """A job that may be finished gets its time, whatever TimeoutStopSec says."""
    Notifier().stopping("finishing the job in hand", within_s=360.5)
    assert heard(systemd)[2:] == ["EXTEND_TIMEOUT_USEC=360500000"]


def test_status_of_a_stopping_service_stays(systemd: socket.socket) -> None:
    """A reconnect while the job in hand is being finished does not make the line say that all is ready."""
    notifier = Notifier()
    notifier.stopping("finishing the job in hand")
    notifier.status("ready, connected")
    notifier.stopping()
    assert heard(systemd) == ["STOPPING=1", "STATUS=finishing the job in hand"]
    assert heard(systemd) == ["STOPPING=1", "STATUS=stopping"]


def test_manager_that_does_not_read_stops_nothing(systemd: socket.socket) -> None:
    """Status lines that nobody reads are dropped; the service goes on, and says the next one that fits."""
    notifier = Notifier()
    for number in range(1000):
        notifier.status(f"number {number}")
    told = 0
    systemd.settimeout(0.0)
    with contextlib.suppress(BlockingIOError):
        while heard(systemd):
            told += 1
    assert 0 < told < 1000
    notifier.ready("ready")
    assert heard(systemd) == ["READY=1", "STATUS=ready"]


@pytest.mark.parametrize("text", ["café: 1%", "模型: 1%", "\N{ARTIST PALETTE} ready"])
def test_status_may_hold_any_language(systemd: socket.socket, text: str) -> None:
    """A model's name in any script reaches systemctl status, as UTF-8; READY is never lost to it."""
    Notifier().ready(text)
    assert heard(systemd) == ["READY=1", f"STATUS={text}"]


def test_status_survives_an_undecodable_name(systemd: socket.socket) -> None:
    """A host name or path that is no valid text is shown with marks instead of being lost."""
    Notifier().status("approve box\udcff")
    assert heard(systemd) == ["STATUS=approve box?"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\u2028"])
def test_status_cannot_smuggle_in_another_assignment(systemd: socket.socket, end: str) -> None:
    """A line end inside a status, from a name given by others, does not begin a second assignment."""
    Notifier().status(f"waiting{end}READY=1")
    assert heard(systemd) == ["STATUS=waiting READY=1"]


def test_notifier_reaches_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket address that begins with @ (containers use them) is understood."""
    name = f"studio-worker-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        Notifier().watchdog()
        assert heard(listener) == ["WATCHDOG=1"]


def test_notifier_is_quiet_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by hand, the service says nothing to nobody and does not fail."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier()
    notifier.ready("ready")
    notifier.stopping()


def test_notifier_outlives_its_listener(systemd: socket.socket) -> None:
    """A service manager that went away (its socket closed) does not end the service."""
    notifier = Notifier()
    systemd.close()
    notifier.watchdog()


@pytest.mark.parametrize(
    ("usec", "pid", "interval_s"),
    [
        ("30000000", "", 15.0),
        ("30000000", "own", 15.0),
        ("30000000", "1", None),
        ("", "", None),
        ("0", "", None),
        ("soon", "", None),
        ("\N{SUPERSCRIPT TWO}", "", None),
    ],
)
def test_watchdog_interval_is_half_of_the_limit(
    monkeypatch: pytest.MonkeyPatch, usec: str, pid: str, interval_s: float | None
) -> None:
    """Signs of life are due at half of WATCHDOG_USEC, and only where this process is the one watched."""
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    assert watchdog_interval_s() == interval_s


def test_ready_line_holds_what_is_to_be_known_until_it_is_over() -> None:
    """State and notes share one line; a note that says nothing new is not said again."""
    said: list[str] = []
    line = ReadyLine(Notifier(said.append))
    line.say("connected")
    line.note("offers", "")
    line.note("offers", "the last offer was refused: the disk is full")
    line.note("offers", "the last offer was refused: the disk is full")
    line.note("offers", "")
    assert said == [
        "ready, connected",
        "ready, connected; the last offer was refused: the disk is full",
        "ready, connected",
    ]


def test_ready_line_is_read_while_others_write_it() -> None:
    """Whoever asks for the line (a reload does, on the thread that hears SIGTERM) is disturbed by nobody."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            line = ReadyLine(Notifier())
            others = threading.Thread(target=lambda to=line: [to.note(f"topic {n}", "x") for n in range(300)])
            others.start()
            while others.is_alive():
                str(line)
            assert str(line).count("x") == 300
    finally:
        sys.setswitchinterval(interval_s)
