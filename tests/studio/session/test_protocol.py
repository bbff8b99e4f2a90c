"""The session's rules, without a socket and without a clock."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio_worker.errors import DuplicateWorker, FrameError, ProtocolError, RefusedByStudio
from studio_worker.studio.backoff import Backoff
from studio_worker.studio.session.protocol import (
    Acknowledged,
    BeatAcknowledged,
    Offered,
    SessionProtocol,
    State,
    Welcomed,
    error_for_code,
)
from tests.lab.frames import CAPABILITIES

WELCOME = '{"type":"welcome","workerId":"w","serverTime":"2026-01-01T00:00:00Z"}'


def opened() -> SessionProtocol:
    """A session that has been welcomed at time 0."""
    protocol = SessionProtocol(0.0)
    protocol.hello("token", CAPABILITIES)
    assert protocol.receive(WELCOME, 0.0) == Welcomed("w")
    return protocol


def test_session_says_nothing_between_hello_and_welcome() -> None:
    """No frame leaves before welcome: the studio would call a heartbeat a protocol violation."""
    protocol = SessionProtocol(0.0)
    hello = protocol.hello("token", CAPABILITIES)
    assert hello.auth_token == "token"
    assert protocol.state is State.AWAITING_WELCOME
    with pytest.raises(AssertionError):
        protocol.heartbeat(CAPABILITIES, None)
    with pytest.raises(AssertionError):
        protocol.log_batch(())
    protocol.receive(WELCOME, 1.0)
    assert protocol.heartbeat(CAPABILITIES, "j").current_job_id == "j"


def test_session_reports_offers_and_acknowledgements() -> None:
    """Offers and acknowledgements become events; heartbeat acknowledgements mean nothing more."""
    protocol = opened()
    assert protocol.receive('{"type":"offer","claim":{"jobId":"j"}}', 1.0) == Offered({"jobId": "j"})
    assert protocol.receive('{"type":"completeAck","jobId":"j"}', 1.0) == Acknowledged("j")
    assert protocol.receive('{"type":"failAck","jobId":"j"}', 1.0) == Acknowledged("j")
    assert protocol.receive('{"type":"heartbeatAck"}', 1.0) == BeatAcknowledged()


def test_session_drops_frames_out_of_order() -> None:
    """An offer before welcome and a second welcome are errors of one frame, not of the session."""
    fresh = SessionProtocol(0.0)
    fresh.hello("token", CAPABILITIES)
    with pytest.raises(FrameError):
        fresh.receive('{"type":"offer","claim":{"jobId":"j"}}', 0.0)
    with pytest.raises(FrameError):
        opened().receive(WELCOME, 1.0)


def test_session_counts_only_frames_of_the_protocol_as_signs_of_life() -> None:
    """A studio that sends only rubbish is as dead as a silent one."""
    protocol = opened()
    assert protocol.dead_at == 20.0
    with pytest.raises(FrameError):
        protocol.receive("rubbish", 15.0)
    assert protocol.dead_at == 20.0
    protocol.receive('{"type":"heartbeatAck"}', 15.0)
    assert protocol.dead_at == 35.0


def test_session_reports_a_failure_only_for_a_job_that_this_connection_holds() -> None:
    """A job accepted over an earlier connection is not failed over a new one: the studio has put it back."""
    protocol = opened()
    protocol.accept("j")
    frame = protocol.fail("j", "bad", retryable=True)
    assert frame is not None
    assert frame.retryable
    assert protocol.fail("j", "bad", retryable=True) is None
    assert opened().fail("j", "bad", retryable=True) is None


def test_session_holds_no_job_that_was_delivered() -> None:
    """A delivered job can no longer be failed."""
    protocol = opened()
    protocol.accept("j")
    protocol.delivered("j")
    assert protocol.fail("j", "late", retryable=True) is None


@pytest.mark.parametrize(
    ("code", "kind", "cure"),
    [
        ("auth_failed", RefusedByStudio, "register --reset"),
        ("duplicate_worker", DuplicateWorker, "stop it"),
        ("worker_deleted", RefusedByStudio, "register --reset"),
        ("protocol_violation", ProtocolError, "protocol_violation"),
        ("internal_error", ProtocolError, "internal_error"),
        ("something_new", ProtocolError, "something_new"),
    ],
)
def test_error_frame_says_whether_the_session_is_over_for_good(
    code: str, kind: type[ProtocolError], cure: str
) -> None:
    """Each error code leads to a reconnect, or to an end that names the cure."""
    with pytest.raises(ProtocolError) as caught:
        opened().receive(f'{{"type":"error","code":"{code}","message":"m"}}', 1.0)
    assert type(caught.value) is kind
    assert cure in str(caught.value)


@pytest.mark.parametrize(
    ("code", "kind"),
    [(4001, RefusedByStudio), (4002, ProtocolError), (4003, DuplicateWorker), (4004, RefusedByStudio),
     (1000, ProtocolError), (1006, ProtocolError)],
)  # fmt: skip
def test_close_code_says_whether_to_reconnect(code: int, kind: type[ProtocolError]) -> None:
    """4001, 4003 and 4004 are final; after anything else the worker reconnects."""
    assert type(error_for_code(code, "")) is kind


@given(st.integers(0, 200), st.integers())
def test_backoff_doubles_to_thirty_seconds_and_jitter_only_shortens(failures: int, seed: int) -> None:
    """Waits are 1, 2, 4 … 30 s, shortened by at most half."""
    backoff = Backoff(random.Random(seed))
    backoff.failures = failures
    whole = min(30.0, 2.0 ** min(failures, 20))
    assert whole / 2 <= backoff.next_s() <= whole
    backoff.reset()
    assert 0.5 <= backoff.next_s() <= 1.0
