"""What goes wrong inside torch and the libraries, as the worker's own errors.

This module owns the translation: memory that ran out, a device that is lost, and everything else. No prompt
text leaves it, in a message or in a traceback.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from studio_worker.box.compatibility import no_code, no_cuda
from studio_worker.box.driver import Driver, find_driver, gpu_index, surroundings
from studio_worker.box.torch_build import TorchBuild, version
from studio_worker.engine.memory.machine import free_bytes, release_cached, total_bytes
from studio_worker.errors import DeviceError, JobCancelled, JobError, StudioWorkerError


class OutOfMemory(JobError):
    """Memory ran out while the picture was made. What it had itself has been freed, but for its weights.

    Args:
        in_ram: whether it was the machine's, while pictures are made elsewhere.
    """

    def __init__(self, message: str, *, in_ram: bool = False) -> None:
        super().__init__(message)
        self.in_ram = in_ram


_RAM_SIGNS = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")
_MEMORY_SIGNS = (*_RAM_SIGNS, "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""How a failed allocation is worded where it is a plain RuntimeError: in RAM, or inside a CUDA library
(``cublasStatus_t``, ``cudnnStatus_t``, ``cufftResult``)."""

_PRIVATE_CHARS = 8
"""Shorter prompts are found in any message by chance, and give nothing away."""


@contextmanager
def translated(device: torch.device, private: tuple[str, ...]) -> Iterator[None]:
    """Let only :exc:`StudioWorkerError` out of the block.

    Args:
        device: where the block computes.
        private: texts that must not appear in what is raised, i.e. the prompts.

    Raises:
        DeviceError: the device is lost; the process must end, since CUDA keeps failing after such an error.
        OutOfMemory: memory ran out.
        JobError: a library failed.
    """
    try:
        yield
    except JobCancelled as error:
        # They hold the tensors of the step it stopped at, for as long as anybody holds the error.
        _clear_frames(error)
        release_cached(device)
        raise
    except StudioWorkerError:
        raise
    except Exception as error:
        translation = _translate(error, device)
        # The cause is logged with its traceback; a library that quotes its input would put the prompt there.
        quoted = any(len(text) >= _PRIVATE_CHARS and text in str(error) for text in private)
        cause = None if quoted else error
        raise translation from cause


def _translate(error: Exception, device: torch.device) -> DeviceError | JobError:
    exhausted = is_exhausted(error)
    if exhausted:
        # They hold the very tensors that did not fit.
        _clear_frames(error)
    if is_device_lost(device):
        return DeviceError(
            f"{device} failed ({type(error).__name__}: {_first_line(error)}); the process must be restarted. "
            "If it happens again: look for Xid errors in the kernel log, reload the driver or reboot"
        )
    if exhausted:
        release_cached(device)
        in_ram = device.type != "cpu" and _is_of_ram(error)
        place = torch.device("cpu") if in_ram else device
        free_gb, total_gb = free_bytes(place) / 2**30, total_bytes(place) / 2**30
        return OutOfMemory(
            f"out of memory on {place}: {free_gb:.1f} of {total_gb:.1f} GiB free without this picture; "
            "a smaller picture or a machine with more memory is needed",
            in_ram=in_ram,
        )
    return JobError(f"the picture could not be made: {type(error).__name__}")


def _clear_frames(error: Exception) -> None:
    """Let go of what the frames of the error's traceback hold."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        try:
            frame.clear()
        except RuntimeError:  # still running: one of ours
            continue
        # Python 3.11 and 3.12 keep a copy where the code called locals(), as diffusers' pipelines do; looking
        # at it brings it up to date, which is empty.
        _ = frame.f_locals


def is_exhausted(error: Exception) -> bool:
    """Whether memory ran out, on the device or in RAM."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _MEMORY_SIGNS)


def _is_of_ram(error: Exception) -> bool:
    return isinstance(error, (MemoryError, OSError)) or any(sign in str(error) for sign in _RAM_SIGNS)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")


def is_device_lost(device: torch.device) -> bool:
    """Whether ``device`` computes nothing any more, found by asking it.

    No error's text says so: what CUDA and its libraries call an error may be one odd shape, or memory that
    ran out; and an error that stays (an illegal access, a card off the bus) comes again at every call.
    """
    try:
        ask(device)
    except Exception as error:
        return not is_exhausted(error)  # others have all its memory, and it is well
    return False


def ask(device: torch.device) -> None:
    """Let ``device`` compute a number and wait for it. Raises whatever torch does where it cannot."""
    torch.ones(1, device=device).add_(1).cpu()


def usable_device(name: str) -> torch.device:
    """The torch device ``name`` (``cpu``, ``cuda``, ``cuda:N``), tried out.

    Raises:
        DeviceError: torch cannot use it; the text names the cure. Nothing falls back to the CPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"unknown device {name!r}; write cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise DeviceError(f"device {name!r} is not supported; write cpu, cuda or cuda:N")
    if (driver := find_driver()) is not None:  # it says more clearly than torch what is in the way
        driver.start()
        driver.hold(gpu_index(name))
    _check_build(driver, gpu_index(name))
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        count = torch.cuda.device_count()
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= count:
            raise DeviceError(f"there is no {name}: this machine has {count} CUDA device(s), cuda:0 and up")
        torch.cuda.set_device(index)  # else what names no device touches GPU 0: a context there, streams
        torch.ones(1, device=f"cuda:{index}").add_(1).cpu()
    except RuntimeError as error:
        raise DeviceError(
            f"{name} cannot be used ({_first_line(error)}); check that nvidia-smi runs, that the driver "
            f"is new enough for CUDA {torch.version.cuda}, and reboot after a driver upgrade"
        ) from error
    return torch.device("cuda", index)


def _check_build(driver: Driver | None, index: int) -> None:
    """Whether this torch is one for GPU ``index``, by torch's own word, and before it touches the GPU."""
    build = TorchBuild(torch.__version__, version(torch.version.cuda), torch.version.hip or "")
    gpu = None if driver is None else driver.gpu(index)
    cuda = None if driver is None else driver.cuda()
    problem = no_cuda(build, None if gpu is None else gpu.capability, cuda, surroundings())
    if problem is None and gpu is not None:
        known = torch.cuda.get_arch_list()
        problem = no_code(
            gpu.name, gpu.capability, known, torch=build.version, cuda=cuda, here=surroundings()
        )
    if problem is not None:
        raise DeviceError(problem)
