"""``[worker] compile``: the repeated blocks of denoisers, compiled by torch where that is of use.

Compiled once for a class of blocks, not once for a model of dozens of them (diffusers' regional compilation).
What was compiled is kept in ``$TORCHINDUCTOR_CACHE_DIR`` for the next start. Left as they are: quantised
blocks, and classes in which diffusers names none. Jobs with LoRAs and with offload run the blocks uncompiled:
adapters and hooks inside them would have to be compiled for every job anew. Whether torch can compile at all
is tried out before READY (probe.py); where it fails later, a warning says so and everything runs uncompiled.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch

from studio_worker.engine.files.packed import is_in_blocks
from studio_worker.engine.loras.adapters import is_adapted
from studio_worker.errors import DeviceError

_LOG = logging.getLogger(__name__)

_KINDS = 64
"""How many compiled variants of one class of blocks are kept: several models of it, at several sizes each."""

_COMPILED: WeakSet[torch.nn.Module] = WeakSet()


class _Warnings(logging.Handler):
    """torch's pages of text about what it could not compile, as one line of ours each."""

    failure = ""
    """What could not be compiled, and why. (That too many variants were asked for is another warning.)"""

    def emit(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().splitlines()
        # A traceback's last lines begin with the error's name; what follows it may be the compiler's output.
        told = next((line for line in lines if re.match(r"[\w.]+(Error|Exception|Failed)\b", line)), lines[0])
        if "WON'T CONVERT" in lines[0]:
            self.failure = told
        _LOG.warning("a block runs uncompiled", extra={"op": "compile", "error": told[:300]})


_WARNINGS = _Warnings(logging.WARNING)


def compile_blocks(denoiser: torch.nn.Module) -> None:
    """Have the repeated blocks of ``denoiser`` compiled when they are next used, if they can be."""
    if denoiser in _COMPILED:
        return None
    if is_in_blocks(denoiser):
        return _leave(denoiser, "quantised")
    _settle()
    try:
        denoiser.compile_repeated_blocks()  # type: ignore[operator]
    except ValueError:
        return _leave(denoiser, "no repeated blocks")
    _COMPILED.add(denoiser)


def _leave(denoiser: torch.nn.Module, reason: str) -> None:
    _LOG.info("denoiser not compiled", extra={"component": type(denoiser).__name__, "reason": reason})


@contextmanager
def compiled(denoiser: torch.nn.Module | None, *, is_offloaded: bool) -> Iterator[bool]:
    """Inside, the blocks of ``denoiser`` run compiled where they were and may be; gives whether so."""
    if denoiser is None or denoiser not in _COMPILED:
        yield False
    elif is_offloaded or _WARNINGS.failure or is_adapted(denoiser) or is_in_blocks(denoiser):
        with torch.compiler.set_stance("force_eager"):
            yield False
    else:
        yield True


def try_out(device: torch.device) -> None:
    """
    Raises:
        DeviceError: torch cannot compile for ``device`` on this machine; the text names the cure.
    """
    _settle()
    with tempfile.TemporaryDirectory() as folder:  # nothing that was compiled before must help
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            computed = torch.compile(lambda x: (x * 2 + 1).relu())(torch.ones(64, device=device))
            if float(computed.sum()) != 3 * 64.0:
                raise RuntimeError("compiled code computes wrong numbers")
            if _WARNINGS.failure:
                raise RuntimeError(_WARNINGS.failure)
        except Exception as error:  # a compiler, Triton, dlopen: each has errors of its own
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise DeviceError(
                f"[worker] compile is on and torch cannot compile for {device} ({problem}); "
                "apt install g++ (from source python3-dev too), or set compile = false"
            ) from error


def _settle() -> None:
    for name in ("torch._dynamo", "torch._inductor"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [_WARNINGS]
        logger.setLevel(logging.WARNING)  # the service wants errors alone of torch
    torch.compiler.config.recompile_limit = _KINDS
