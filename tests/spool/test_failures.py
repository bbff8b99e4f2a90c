"""Failures that could not be reported: known here all the same, also after a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from studio_worker.spool.failures import Failures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


def test_failure_for_good_is_known_after_a_restart(folder: Path) -> None:
    """A job that cannot be done here is not tried again, also where nobody could be told at the time."""
    Failures(folder).add("job-1", "no such sampler", retryable=False)
    Failures(folder).add("job-2", "out of memory", retryable=True)

    failures = Failures(folder)

    assert failures.final("job-1") == "no such sampler"
    assert failures.final("job-2") is None
    assert failures.final("job-3") is None
    assert json.loads((folder / "failures.json").read_text())["job-2"]["error"] == "out of memory"


def test_failure_that_may_pass_replaces_one_for_good(folder: Path) -> None:
    """What counts is how the job ended last."""
    failures = Failures(folder)
    failures.add("job-1", "no", retryable=False)
    failures.add("job-1", "later", retryable=True)

    assert failures.final("job-1") is None


@pytest.mark.parametrize("content", [b"", b"[]", b'{"job-1": "no"}', b'{"job-1": null}', b"\0\0\0"])
def test_failures_survive_a_corrupt_file(folder: Path, content: bytes) -> None:
    """A damaged list stops no start and refuses no job."""
    folder.mkdir()
    (folder / "failures.json").write_bytes(content)

    failures = Failures(folder)

    assert failures.final("job-1") is None
    failures.add("job-1", "no", retryable=False)
    assert Failures(folder).final("job-1") == "no"


def test_failures_list_stays_short(folder: Path) -> None:
    """Only the latest failures are remembered."""
    failures = Failures(folder)
    for number in range(250):
        failures.add(f"job-{number}", "no", retryable=False)

    assert failures.final("job-49") is None
    assert failures.final("job-50") == "no"
