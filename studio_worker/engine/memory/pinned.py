"""RAM that the GPU reads and writes by itself: pinned, so that copies are twice as fast and nobody waits.

Pages that are pinned are nobody else's until they are let go, so there is a limit. torch pins, too, but
rounds every size up to a power of two and keeps what was freed (``CachingHostAllocator``): a model's weights
would take up to twice their size, for ever. Here a block has its size, and goes with its last tensor.
"""

from __future__ import annotations

import logging
import mmap
import weakref

import torch

_LOG = logging.getLogger(__name__)


class PinnedMemory:
    """Blocks of pinned RAM for copies to and from ``device``; none where that is no GPU. For one thread.

    Args:
        limit_bytes: how much is pinned at most.
    """

    def __init__(self, device: torch.device, limit_bytes: int) -> None:
        self._device = device
        self._limit_bytes = limit_bytes
        self.used_bytes = 0

    def block(self, size_bytes: int) -> torch.Tensor | None:
        """So many bytes, or ``None`` where there is no room or the driver does not pin them. They are given
        back when no tensor in them is left.
        """
        if self._device.type != "cuda" or not 0 < size_bytes <= self._limit_bytes - self.used_bytes:
            return None
        try:
            memory = mmap.mmap(-1, size_bytes)  # whole pages, which are no other's
        except OSError:
            return None
        block = torch.frombuffer(memory, dtype=torch.uint8)
        address = block.data_ptr()
        if torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0) != 0:  # type: ignore[no-untyped-call]
            _LOG.warning("RAM cannot be pinned, copies to the device are slower", extra={"bytes": size_bytes})
            self._forget_error()
            return None
        self.used_bytes += size_bytes
        weakref.finalize(memory, self._let_go, address, size_bytes).atexit = False
        return block

    def _let_go(self, address: int, size_bytes: int) -> None:
        self.used_bytes -= size_bytes
        # Whichever thread drops the last tensor: it would get a context on the GPU that is its current one.
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]

    def _forget_error(self) -> None:
        # CUDA says an error of such a call again at the next one, whoever makes it.
        try:
            torch.ones(1, device=self._device).add_(1).cpu()
        except RuntimeError:
            _LOG.debug("an error of pinning was told again")
