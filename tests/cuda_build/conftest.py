"""These run on torch's CUDA build and need no GPU; `make cuda-build` installs it."""

from __future__ import annotations

import pytest

from studio_worker.box.torch_build import installed_torch


def pytest_sessionstart() -> None:
    """With another torch they would prove nothing."""
    torch = installed_torch()
    if torch is None or torch.cuda is None:
        pytest.exit("run it by: make cuda-build (it installs torch's CUDA build)", 2)
