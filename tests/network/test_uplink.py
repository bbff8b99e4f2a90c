"""The order of uploads."""

from __future__ import annotations

import queue
import threading

from studio_worker.network.uplink import LONGEST_S, REST_S, ROUND_S, Uplink
from tests.fakes.scripted import LIMIT_S


class Clock:
    """Seconds that a test counts."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_uploads_have_the_uplink_in_the_order_of_their_coming() -> None:
    """One upload at a time, first come first served; the next begins when all of the last one was sent, and
    its answer is not waited for.
    """
    uplink = Uplink()
    order: queue.SimpleQueue[str] = queue.SimpleQueue()
    may_send, may_end = threading.Event(), threading.Event()

    def upload(name: str) -> None:
        with uplink.turn() as turn:
            order.put(name)
            may_send.wait(LIMIT_S)
            uplink.sent(turn)
            may_end.wait(LIMIT_S)

    threads = []
    for name in "abc":
        threads.append(threading.Thread(target=upload, args=(name,)))
        threads[-1].start()
        while len(uplink.line) < len(threads):
            threading.Event().wait(0.001)
    assert order.get(timeout=LIMIT_S) == "a"
    assert order.empty()
    may_send.set()
    assert [order.get(timeout=LIMIT_S), order.get(timeout=LIMIT_S)] == ["b", "c"]
    may_end.set()
    for thread in threads:
        thread.join(LIMIT_S)


def test_upload_that_stalls_holds_the_others_back_for_a_while_only() -> None:
    """After its time the next upload begins beside it; what it says later ends nobody else's turn."""
    clock = Clock()
    uplink = Uplink(clock)
    with uplink.turn() as stalled:
        clock.now = LONGEST_S
        with uplink.turn() as second:
            uplink.sent(stalled)
            assert list(uplink.line) == [second]
    assert not uplink.line


def test_upload_that_fails_gives_its_turn_up() -> None:
    """The next one has the uplink, whatever became of the last."""
    uplink = Uplink()
    try:
        with uplink.turn():
            raise OSError
    except OSError:
        pass
    with uplink.turn() as turn:
        assert turn.waited_s < LONGEST_S


def test_downloads_wait_for_an_upload() -> None:
    """While one is under way they rest, and go on when all of it is sent."""
    asked = threading.Event()

    def clock() -> float:
        if threading.current_thread() is not threading.main_thread():
            asked.set()
        return 0.0

    uplink = Uplink(clock)
    order: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        uplink.give_way()
        order.put("read")

    with uplink.turn() as turn:
        reading = threading.Thread(target=read)
        reading.start()
        assert asked.wait(LIMIT_S)
        order.put("sent")
        uplink.sent(turn)
        reading.join(LIMIT_S)
        assert [order.get(timeout=LIMIT_S), order.get(timeout=LIMIT_S)] == ["sent", "read"]


def test_downloads_have_their_share_where_uploads_never_end() -> None:
    """At the end of each round they go on, whatever is being uploaded."""
    clock = Clock()
    uplink = Uplink(clock)
    with uplink.turn():
        clock.now = ROUND_S + REST_S
        uplink.give_way()
        assert uplink.is_taken
        clock.now = LONGEST_S
        uplink.give_way()  # also one that stalls is not given way to for ever
        assert not uplink.is_taken
