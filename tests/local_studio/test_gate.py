"""Who asks a database that does not answer, and until when."""

from __future__ import annotations

import threading

import pytest

from studio_worker.local_studio.storage.gate import Gate


def test_gate_that_finds_no_thread_to_ask_with_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gives no thread at the moment the database goes ends no studio for good."""

    def none_left(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    gate = Gate(lambda: None)
    monkeypatch.setattr(threading.Thread, "start", none_left)
    gate.shut("gone")
    gate.require_open()
    gate.end()
