"""The devices that rows are looked at on: a GPU, and for rehearsals a CPU.

The CPU answers ``None`` to what it does not know; its memory is made scarce by the process's address space.
"""

from __future__ import annotations

import resource
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from studio_worker.box.device import find_device
from studio_worker.box.nvml import Nvml, NvmlError
from studio_worker.box.ram import available_ram_bytes, total_ram_bytes
from studio_worker.engine.memory.machine import release_cached
from studio_worker.gpu_check.gpu import Gpu, Shares
from studio_worker.gpu_check.trace import Trace, read_trace

_LOOK_EVERY_S = 0.2


def gpu_for(name: str, *, threads: int = 0) -> Gpu:
    """The device that torch calls ``name``; ``threads`` that torch may use on the CPU, 0 for its choice."""
    if threads:
        torch.set_num_threads(threads)
    return Cpu() if name == "cpu" else Cuda(name)


class Cuda:
    """An NVIDIA GPU."""

    is_cuda = True

    def __init__(self, name: str) -> None:
        self.name = name
        self._device = torch.device(name)

    def works(self) -> bool:
        try:
            return float(torch.ones(1, device=self._device).add_(1).cpu()) == 2.0
        except RuntimeError:
            return False

    def release_cached(self) -> None:
        release_cached(self._device)

    def total_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(self._device).total_memory)

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])

    def allocated_bytes(self) -> int | None:
        return int(torch.cuda.memory_allocated(self._device))

    def begin_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int | None:
        return int(torch.cuda.max_memory_allocated(self._device))

    @contextmanager
    def scarce(self, spare_bytes: int) -> Iterator[None]:
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved(self._device) + spare_bytes
        torch.cuda.set_per_process_memory_fraction(limit / self.total_bytes(), self._device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    @contextmanager
    def watched(self) -> Iterator[Shares]:
        shares, over = Shares(), threading.Event()
        nvml = Nvml(find_device(self.name).pci_bus_id or "")

        def look() -> None:
            while not over.wait(_LOOK_EVERY_S):
                try:
                    share = nvml.read().utilization_ratio
                except NvmlError:
                    return
                if share is not None:
                    shares.seen.append(share)

        watcher = threading.Thread(target=look, name="use of the GPU", daemon=True)
        watcher.start()
        try:
            yield shares
        finally:
            over.set()
            watcher.join(_LOOK_EVERY_S * 10)

    @contextmanager
    def profiled(self) -> Iterator[list[Trace]]:
        both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with _profiled(both) as traces:
            yield traces

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        places: list[str] = []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield places
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places += [
            f"{Path(each.filename).name}:{each.lineno}" for each in said if "synchroniz" in str(each.message)
        ]


class Cpu:
    """The CPU, for a rehearsal."""

    name = "cpu"
    is_cuda = False

    def works(self) -> bool:
        return True

    def release_cached(self) -> None:
        release_cached(torch.device("cpu"))

    def total_bytes(self) -> int:
        return total_ram_bytes()

    def free_bytes(self) -> int:
        return available_ram_bytes()

    def allocated_bytes(self) -> int | None:
        return None

    def begin_peak(self) -> None:
        pass

    def peak_bytes(self) -> int | None:
        return None

    @contextmanager
    def scarce(self, spare_bytes: int) -> Iterator[None]:
        self.release_cached()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    @contextmanager
    def watched(self) -> Iterator[Shares]:
        yield Shares()

    @contextmanager
    def profiled(self) -> Iterator[list[Trace]]:
        with _profiled([torch.profiler.ProfilerActivity.CPU]) as traces:
            yield traces

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        yield []


@contextmanager
def _profiled(activities: list[torch.profiler.ProfilerActivity]) -> Iterator[list[Trace]]:
    traces: list[Trace] = []
    with torch.profiler.profile(activities=activities) as profiler:
        yield traces
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        traces.append(read_trace(path))
