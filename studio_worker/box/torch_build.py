"""Which torch is installed and what it was built for, read without importing it.

Importing torch takes seconds, and where it does not fit the driver it fails in words that name no cure.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path

Version = tuple[int, int]
"""Of CUDA, or a compute capability: major and minor."""


@dataclass(frozen=True)
class TorchBuild:
    """``cuda`` is the CUDA version it was built for; ``hip`` that of ROCm, AMD's, empty in other builds."""

    version: str
    cuda: Version | None = None
    hip: str = ""


def installed_torch() -> TorchBuild | None:
    """The torch that an import would find; ``None`` where there is none, or it does not say what it is."""
    try:
        found = importlib.util.find_spec("torch")
    except ValueError:  # what stands in its place in this process is no installed module
        return None
    if found is None or found.origin is None:
        return None
    try:
        # Every build writes it (pytorch/pytorch, tools/generate_torch_version.py).
        return read_build(Path(found.origin).with_name("version.py").read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):  # half written, where an installation was broken off
        return None


def read_build(text: str) -> TorchBuild:
    """What a torch's ``version.py`` says.

    Raises:
        SyntaxError, ValueError: it is none.
    """
    told = {}
    for node in ast.parse(text).body:
        # cuda: Optional[str] = '13.0', and before 2.0 without the type
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            told[ast.unparse(target)] = node.value.value
    return TorchBuild(str(told.get("__version__", "")), version(told.get("cuda")), str(told.get("hip") or ""))


def version(text: object) -> Version | None:
    """``13.0`` as ``(13, 0)``; ``None`` for what is no version."""
    parts = str(text).split(".")
    if len(parts) < 2 or not (parts[0].isdecimal() and parts[1].isdecimal()):
        return None
    return int(parts[0]), int(parts[1])
