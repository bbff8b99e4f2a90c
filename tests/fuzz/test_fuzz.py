"""The fuzzer's targets, each with a few hundred inputs; ``make fuzz`` tries them for longer."""

from __future__ import annotations

import subprocess
import sys

import pytest

INPUTS = {"frames": 300, "offers": 300, "headers": 200, "bundles": 300, "http": 300, "images": 300}


@pytest.mark.parametrize("target", INPUTS)
def test_odd_input_leads_to_nothing_unexpected(target: str) -> None:
    """Whatever comes from outside, only documented errors follow, within limits of memory and time."""
    command = [sys.executable, "-m", "tests.fuzz.run", target, "--inputs", str(INPUTS[target])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{target}: {INPUTS[target]} inputs" in done.stdout
