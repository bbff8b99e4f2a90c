"""What the system's libraries are to a process whose torch comes late."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from pathlib import Path
from studio_worker import service
from studio_worker.box import system_libraries

def of_the_system():
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    return {file for file in files if file.startswith(("/lib", "/usr/lib")) and "site-packages" not in file}

system_libraries.hold()
before = of_the_system()
import torch
torch.nn.functional.conv2d(torch.ones(1, 3, 8, 8), torch.ones(1, 3, 3, 3))
print(*sorted(of_the_system() - before))
"""


def test_torch_wants_no_library_of_the_system_that_is_not_held() -> None:
    """Whatever becomes of the system's files under a service, torch can be imported for its first job."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert [file for file in done.stdout.split() if "/python3" not in file] == []
