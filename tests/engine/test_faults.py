"""What goes wrong inside the libraries, and what the worker and the studio are told."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.faults import OutOfMemory, is_device_lost, translated, usable_device
from studio_worker.errors import DeviceError, JobCancelled, JobError, StudioWorkerError
from studio_worker.jobs import Cancel
from tests.lab.engine import request, write_header

CPU = torch.device("cpu")
SECRET = "a dragon that nobody may know of"


def raised_by(error: Exception) -> StudioWorkerError:
    with (
        pytest.raises(StudioWorkerError) as caught,
        translated(CPU, (SECRET, "")),
    ):
        raise error
    return caught.value


SHORT_OF_RAM = """
import contextlib, json, resource, sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.faults import translated
from studio_worker.engine.files.checkpoint import read_checkpoint
from studio_worker.models import LocalFile
from tests.lab.engine import request, write_header
from tests.lab.memory import made

def job(path):
    made(engine, LocalFile("model", path, "a"))

large = [Path(name) for name in sys.argv[1:]]
ways = {
    "tensor": lambda: torch.empty(2**32, dtype=torch.uint8),
    "array": lambda: np.zeros(2**32, dtype=np.uint8),
    "picture": lambda: Image.new("RGB", (40_000, 40_000)),
    "mapped tensor": lambda: torch.from_file(str(large[0]), size=2**32, dtype=torch.uint8),
    "mapped array": lambda: np.memmap(large[0]),
    **{f"header of {path.suffix}": lambda path=path: read_checkpoint(path) for path in large},
    **{f"job of {path.suffix}": lambda path=path: job(path) for path in large},
}
engine = DiffusionEngine("cpu")
used = int(open("/proc/self/status").read().partition("VmSize:")[2].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, -1))
for name, take in ways.items():
    try:
        with translated(torch.device("cpu"), ()):
            take()
        print(json.dumps([name, "nothing", ""]))
    except Exception as error:
        print(json.dumps([name, type(error).__name__, str(error)]))
"""


def test_system_that_refuses_memory_is_understood_whoever_asked_it(tmp_path: Path) -> None:
    """When the system really refuses memory, the job fails with the figures so that another worker may try:
    whichever library had asked, for numbers or for the mapping of a file; and no file is called damaged.
    """
    shapes = {"model.diffusion_model.input_blocks.0.0.weight": (2**31,)}
    safetensors = write_header(tmp_path / "large.safetensors", shapes)
    gguf = tmp_path / "large.gguf"
    gguf.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    os.truncate(gguf, 2**32)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHORT_OF_RAM, str(safetensors), str(gguf)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    told = {name: (kind, text) for name, kind, text in map(json.loads, done.stdout.splitlines())}
    assert len(told) == 9
    assert {name: kind for name, (kind, _) in told.items() if kind != "OutOfMemory"} == {}
    figures = re.compile(r"out of memory on cpu: \d+\.\d of \d+\.\d GiB free")
    assert all(figures.search(text) for _, text in told.values())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    ],
)
def test_gpu_that_refuses_memory_is_understood(error: Exception) -> None:
    """CUDA and its libraries say it in their own words (cublas_api.h, cudnn_graph.h, cufft.h): the job fails
    so that a leaner way is tried, or another worker.
    """
    translation = raised_by(error)
    assert isinstance(translation, OutOfMemory)
    assert translation.retryable
    assert not translation.in_ram


def gone(device: torch.device) -> None:
    """What a GPU answers after an error that stays."""
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        torch.AcceleratorError("CUDA error: out of memory"),
        TypeError("something that only followed"),
    ],
)
def test_lost_device_ends_the_process_with_a_cure(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that answers no more is lost, whatever error told of it: the text says to restart, and what to
    look at.
    """
    monkeypatch.setattr("studio_worker.engine.faults.ask", gone)
    translation = raised_by(error)
    assert isinstance(translation, DeviceError)
    assert "must be restarted" in str(translation)
    assert "driver" in str(translation)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: invalid argument"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a …"),
    ],
)
def test_device_that_still_answers_is_not_lost(error: Exception) -> None:
    """What CUDA's libraries call an error, after which the device computes as before, fails one job alone."""
    translation = raised_by(error)
    assert type(translation) is JobError
    assert translation.retryable


def test_device_whose_memory_others_have_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has not even room for one number is full, not gone."""

    def full(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr("studio_worker.engine.faults.ask", full)
    assert isinstance(raised_by(torch.OutOfMemoryError("CUDA out of memory")), OutOfMemory)


def test_device_without_hardware_does_not_answer() -> None:
    """The question is put to the device itself."""
    assert not is_device_lost(CPU)
    if not torch.cuda.is_available():
        assert is_device_lost(torch.device("cuda", 0))


def test_other_errors_are_the_jobs() -> None:
    """Whatever else a library raises fails the job by its type, keeps the cause for the log, and may be
    retried.
    """
    error = TypeError("something inside")
    translation = raised_by(error)
    assert isinstance(translation, JobError)
    assert translation.retryable
    assert "TypeError" in str(translation)
    assert translation.__cause__ is error


def test_own_errors_pass_through() -> None:
    """The worker's own errors are not wrapped."""
    error = JobCancelled("enough")
    assert raised_by(error) is error


def test_prompt_in_an_error_is_not_passed_on() -> None:
    """A library that quotes the prompt in its error does not get it into a log or to the studio."""
    translation = raised_by(ValueError(f"cannot tokenize {SECRET!r}"))
    assert SECRET not in "".join(traceback.format_exception(translation))


@pytest.mark.parametrize("name", ["mps", "gpu", "", "cuda:x", "meta"])
def test_unknown_device_is_refused(name: str) -> None:
    """A device that is no CPU and no CUDA device is refused, saying what to write."""
    with pytest.raises(DeviceError, match="write cpu, cuda or cuda:N"):
        usable_device(name)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_cuda_is_an_error_with_a_cure(name: str) -> None:
    """A GPU that this torch cannot use is an error that names the package to install, never the CPU
    instead.
    """
    with pytest.raises(DeviceError, match=r"it has none; .*install .*studio-worker-torch-cuda"):
        usable_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_torch_for_amd_is_told_as_what_it_is(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """ROCm's torch calls its devices cuda; it is told by name, with what to install."""
    monkeypatch.setattr("torch.version.hip", "7.1.25424")
    with pytest.raises(
        DeviceError, match=r"for AMD's GPUs \(ROCm 7\.1\.25424\).*install .*studio-worker-torch"
    ):
        usable_device(name)


def test_cpu_is_usable() -> None:
    """The CPU is used where the CPU was asked for."""
    assert usable_device("cpu") == CPU


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
def test_engine_asks_its_device_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd shape in a library of CUDA fails one picture, and the next is made as before; where the device
    answers no more, the process has to end.
    """
    engine = DiffusionEngine("cpu")
    before = engine.generate(request(), lambda done, total: None, Cancel()).data
    decode = AutoencoderKL.decode

    def odd(*_: object, **__: object) -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(AutoencoderKL, "decode", odd)
    with pytest.raises(JobError, match="could not be made"):
        engine.generate(request(), lambda done, total: None, Cancel())
    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    assert engine.generate(request(), lambda done, total: None, Cancel()).data == before
    monkeypatch.setattr(AutoencoderKL, "decode", odd)
    monkeypatch.setattr("studio_worker.engine.faults.ask", gone)
    with pytest.raises(DeviceError, match="must be restarted"):
        engine.generate(request(), lambda done, total: None, Cancel())
