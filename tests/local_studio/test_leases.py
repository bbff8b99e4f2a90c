"""Whose a claim is, whatever sessions begin and end in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio_worker.local_studio import leases
from studio_worker.local_studio.leases import LEASE_S, STUDIO_LEFT, WORKER_LEFT, Replaced, Session
from studio_worker.studio import wire

PROCESSES = ("north", "south")
EVENTS = ("hello", "heartbeat", "stop", "dismiss")

histories = st.lists(
    st.tuples(st.sampled_from(EVENTS), st.sampled_from(PROCESSES), st.floats(0.0, 60.0)), max_size=30
)


def walk(history: list[tuple[str, str, float]]) -> list[tuple[str, float, Session | None, Session | None]]:
    """Every event with its time and the session before and after it; heartbeats are the present one's."""
    now, session = 0.0, None
    walked: list[tuple[str, float, Session | None, Session | None]] = []
    for event, process_id, waited_s in history:
        now, before = now + waited_s, session
        if event == "hello":
            session = leases.begun(session, process_id, now)
        elif session is not None and event == "heartbeat":
            session = leases.renewed(session, session.number, now)
        elif session is not None and event == "stop":
            session = leases.handed_over(session, now)
        elif session is not None:
            session = leases.dismissed(session, "worker_deleted")
        walked.append((event, now, before, session))
    return walked


@given(histories)
def test_lease_numbers_only_go_up(history: list[tuple[str, str, float]]) -> None:
    """A session's number is never given twice, so that of two sessions the later one is always known."""
    for event, _, before, after in walk(history):
        if before is not None and after is not None:
            assert after.number - before.number == (event in {"hello", "dismiss"})


@given(histories, st.integers(1, 40))
def test_lease_is_renewed_by_the_present_session_only(
    history: list[tuple[str, str, float]], number: int
) -> None:
    """A heartbeat over any session but the worker's present one renews nothing, and says how it ended."""
    for _, now, _, session in walk(history):
        if session is not None and session.number == number:
            after = leases.renewed(session, number, now)
            assert (after.number, after.lease_until) == (number, now + LEASE_S)
            continue
        with pytest.raises(Replaced) as over:
            leases.renewed(session, number, now)
        assert over.value.code == ("worker_deleted" if session and session.end_code else "duplicate_worker")


@given(histories, st.sets(st.sampled_from(PROCESSES)), st.floats(0.0, 200.0))
def test_lease_holds_a_claim_until_it_runs_out(
    history: list[tuple[str, str, float]], living: set[str], later_s: float
) -> None:
    """While the lease runs, no claim of the present session is lost, whichever processes died; afterwards
    every one is, and it counts as an attempt only where the process that had the session is alive.
    """
    for _, now, _, session in walk(history):
        if session is None:
            continue
        at = now + later_s
        loss = leases.loss_by(session.number, session, living, at)
        if at <= session.lease_until:
            assert loss is None
        else:
            assert loss == (WORKER_LEFT if session.process_id in living else STUDIO_LEFT)


@given(histories, st.sets(st.sampled_from(PROCESSES)))
def test_lease_of_a_stopped_process_costs_nobody_an_attempt(
    history: list[tuple[str, str, float]], living: set[str]
) -> None:
    """Who comes back without its job after its studio process was stopped, or died, loses no attempt."""
    for event, _, before, after in walk(history):
        if event == "stop" and before is not None:
            for is_accepted in (False, True):
                said = {"is_accepted": is_accepted}
                assert leases.loss_on_return(after, living, **said) == STUDIO_LEFT
                assert leases.loss_on_return(before, living - {before.process_id}, **said) == STUDIO_LEFT


def test_lease_of_a_worker_that_forgot_its_job_counts() -> None:
    """A worker that says hello again while its session stands, and knows nothing of its job, has crashed; but
    where it had not accepted the job it may never have heard of it.
    """
    session = leases.begun(None, "north", 0.0)
    assert leases.loss_on_return(session, {"north"}, is_accepted=True) == WORKER_LEFT
    assert not leases.loss_on_return(session, {"north"}, is_accepted=False).counts


def test_lease_of_an_older_session_is_lost() -> None:
    """A claim that a session made after it was replaced is let go, and nobody is to blame."""
    first = leases.begun(None, "north", 0.0)
    second = leases.begun(first, "south", 1.0)
    assert leases.loss_by(first.number, second, set(PROCESSES), 2.0) == STUDIO_LEFT
    assert leases.loss_by(second.number, second, set(PROCESSES), 2.0) is None


def test_lease_outlasts_a_silent_session_and_a_late_return() -> None:
    """A session is closed as silent, and a worker dials again, before its claims go to somebody else."""
    assert leases.LEASE_S > wire.STUDIO_HEARTBEAT_TIMEOUT_S
    assert leases.DEAD_S > 2 * leases.BEAT_S
