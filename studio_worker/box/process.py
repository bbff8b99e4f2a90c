"""What this process is to the C library and to torch: environment and memory, settled before either is used.

Whoever runs torch calls :func:`prepare` first: the service, ``generate``, the probe, the tests. Nothing is
settled at import, so that importing a module of this package changes nothing. Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_FIRM = {
    # No hub access at run time, ever. Loading from local folders alone needs none of them; they are the
    # second lock.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    # onnxruntime's own builds report their use to their maker, by default.
    "ORT_DISABLE_TELEMETRY": "1",
    # Prompts must never reach a log: diffusers warns with the very words that it cuts off a long one.
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    # The engine runs in one thread of a process with others; tokenizers would warn about forks it never
    # makes.
    "TOKENIZERS_PARALLELISM": "false",
    # What cannot be compiled runs uncompiled, and a warning says so (engine/compiling.py).
    "TORCHDYNAMO_SUPPRESS_ERRORS": "1",
    # Else processes that compile stay beside the service for as long as it runs, with torch in each.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
"""Read when the libraries are imported."""

_UNLESS_SET = {
    # On the CPU torch's threads meet hundreds of times a step, and by default wait for each other by
    # spinning. On a machine that has anything else to do, the waiting one then keeps the awaited one off its
    # core: measured on two busy cores, 41 s for a picture that takes 0.4 s when they sleep instead.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Else CUDA counts the fastest GPU first, and nvidia-smi does not.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    # Models of many sizes that come and go leave holes in torch's memory, where its segments cannot grow.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
"""glibc's malloc.h."""


def prepare() -> None:
    """Settle environment and memory of this process, before torch is imported and a GPU is asked for."""
    os.environ.update(_FIRM)
    for name, value in _UNLESS_SET.items():
        os.environ.setdefault(name, value)
    _do_without_closed_cache()
    keep_freed_memory()


def _do_without_closed_cache() -> None:
    """torch makes the folder for what it compiles when it is imported; where it cannot, no job succeeds.
    Without the variable it takes one in the folder for temporary files.
    """
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/"))
    there = next(each for each in (folder, *folder.absolute().parents) if os.access(each, os.F_OK))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)


@cache
def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for whoever wants memory next, until it is given back.

    Else it returns large blocks to the system again and again, and each gets its memory page by page anew: on
    a CPU 300,000 pages a denoising step, a quarter of the time of a picture; a tenth of all time of a
    download. For all threads; see mallopt(3).
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_MAX, 0)  # large blocks, too, come from the memory that is kept
        mallopt(_M_TRIM_THRESHOLD, -1)  # and stay in it
        # Which is one for all threads: what a thread of its own has kept is not given back by malloc_trim(3).
        mallopt(_M_ARENA_MAX, 1)


@contextmanager
def giving_memory_back() -> Iterator[None]:
    """Afterwards the system has what was freed inside, however it ends. Also decorates functions."""
    try:
        yield
    finally:
        give_memory_back()


def give_memory_back() -> None:
    """Return what was kept to the system, wherever in the process it lies (malloc_trim(3))."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
