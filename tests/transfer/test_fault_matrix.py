"""Every fault of the matrix ends as it should, costs few bytes, and never shows a wrong file."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.transfer.fault_matrix import FAULTS, Fault, measure


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_ends_as_it_should(fault: Fault, tmp_path: Path) -> None:
    """The file is whole or there is a clear error; few bytes come twice; nothing wrong was ever visible."""
    try:
        result = measure(fault, tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("a file system of 40 MB cannot be mounted here")

    assert result.outcome.startswith(fault.outcome)
    assert not result.was_wrong
    assert result.share <= fault.share
    if result.outcome == "verified":
        assert result.leftovers == ()
