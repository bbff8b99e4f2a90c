"""The system's libraries that torch asks for, held from the start of a process that imports it later.

A worker's torch comes with its first job, which may be weeks after the start. Where the distribution was
upgraded under it meanwhile, the process has the old C library, and the new C++ library on disk wants a newer
one: no torch could be imported any more, until a restart.
"""

from __future__ import annotations

import contextlib
import ctypes

_WANTED = ("libstdc++.so.6",)
"""What no library of the worker's own brings into the process, nor the interpreter."""


def hold() -> None:
    """Load them, for as long as this process lives; what is missing is left to torch to tell."""
    for name in _WANTED:
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
