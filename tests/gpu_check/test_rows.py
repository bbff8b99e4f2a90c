"""What gpu-check looks at: that its rows can fail, and what it asks of CUDA, on a stand-in for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from studio_worker.engine.families.family import Family
from studio_worker.engine.families.sdxl import SDXL
from studio_worker.engine.families.z_image import Z_IMAGE
from studio_worker.engine.files.gguf_files import open_gguf
from studio_worker.engine.loading import empty_model
from studio_worker.gpu_check.devices import Cpu, Cuda
from studio_worker.gpu_check.gpu import Shares
from studio_worker.gpu_check.rows import Missed, Skipped
from studio_worker.gpu_check.subjects import bench, full_size, lanes, matrix, returning
from studio_worker.gpu_check.subjects.lab import Lab
from studio_worker.gpu_check.subjects.random_weights import Drawn, shapes, write_plain, write_q4_k
from studio_worker.gpu_check.tiny import layouts
from studio_worker.gpu_check.tiny.z_image import language_model
from studio_worker.gpu_check.trace import MARK, Trace, judge

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


class Notes(dict[str, Any]):
    """What a row has told."""

    def tell(self, name: str, value: Any) -> None:
        self[name] = value


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def lab(tmp_path: Path, notes: Notes) -> Lab:
    """A rehearsal on the CPU."""
    return Lab(Cpu(), tmp_path, small=True, tell=notes.tell)


# --- pictures ---


def test_lora_that_the_device_leaves_out_is_found(
    lab: Lab, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that forgets a LoRA fails the row: its picture is nearer to the CPU's without."""
    make = matrix.make

    def forgetful(engine: Any, files: Any, kind: Any, **asked: Any) -> Any:
        # Only pictures on the device are told where to wait.
        kept = [file for file in files if file.role != "lora"] if "offload" in asked else files
        return make(engine, kept, kind, **asked)

    monkeypatch.setattr(matrix, "make", forgetful)
    with pytest.raises(Missed, match=r"1 of 2 pictures: whole, text with LoRA: .*levels from the CPU's"):
        matrix.compare(lab, "sd1", "safetensors", places=["whole"], kinds=["text"])
    assert notes["pictures"] == 2
    assert notes["levels"]["whole, text"] == 0.0 < notes["levels"]["whole, text with LoRA"]


def test_model_that_is_placed_otherwise_than_asked_is_found(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row about layers that come one by one fails where the whole model was there."""
    make = matrix.make

    def deaf(engine: Any, files: Any, kind: Any, **asked: Any) -> Any:
        return make(engine, files, kind, **asked | {"offload": False})

    monkeypatch.setattr(matrix, "make", deaf)
    with pytest.raises(Missed, match="component, text: it was placed whole"):
        matrix.compare(lab, "sd1", "safetensors", ["component"], kinds=["text"], loras=[False])


def test_picture_that_fails_does_not_keep_the_others_from_being_made(
    lab: Lab, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a family's pictures those that can be made are compared, whatever becomes of the others."""
    make = matrix.make

    def broken(engine: Any, files: Any, kind: Any, **asked: Any) -> Any:
        if "offload" in asked and kind == "image":
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return make(engine, files, kind, **asked)

    monkeypatch.setattr(matrix, "make", broken)
    with pytest.raises(Missed, match="1 of 3 pictures: whole, image: RuntimeError: CUBLAS_"):
        matrix.compare(lab, "sd1", "safetensors", ["whole"], loras=[False])
    assert set(notes["levels"]) == {"whole, text", "whole, mask"}


# --- what must be left behind ---


class Leaking(Cpu):
    """A device on which half a MiB more is taken each time that somebody looks."""

    def __init__(self, each_bytes: int) -> None:
        self._each_bytes = each_bytes
        self._taken = 0

    def allocated_bytes(self) -> int | None:
        self._taken += self._each_bytes
        return self._taken


@pytest.mark.parametrize(("each_mib", "fails"), [(0.5, False), (2.0, True)])
def test_memory_that_does_not_come_back_is_found(
    tmp_path: Path, notes: Notes, each_mib: float, fails: bool
) -> None:
    """A mebibyte that is left on the device after cancelled jobs is too much."""
    gpu = Leaking(int(each_mib * (1 << 20)))
    lab = Lab(gpu, tmp_path, small=False, tell=notes.tell)
    if fails:
        with pytest.raises(Missed, match=r"left_behind_mib is 2\.000, and should be 1 at most"):
            returning.cancelled(lab)
    else:
        returning.cancelled(lab)
    assert notes["left_behind_mib"] == each_mib


def test_memory_that_was_not_scarce_is_no_proof(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row about memory that runs out fails where there was enough."""
    monkeypatch.setattr(returning, "SPARE_BYTES", 4 << 30)
    with pytest.raises(Missed, match="memory was scarce and nothing came of it"):
        returning.exhausted(lab)


# --- what is timed ---


def test_goals_count_on_a_gpu_alone(tmp_path: Path, notes: Notes) -> None:
    """A goal that is missed fails the row, but for rehearsals; the figure is told in any case."""
    goals: list[tuple[str, float, dict[str, float]]] = [
        ("ratio", 1.04, {"most": 1.03}),
        ("gpu_share", 0.9, {"least": 0.97}),
    ]
    for name, value, bound in goals:
        Lab(Cpu(), tmp_path, small=True, tell=notes.tell).goal(name, value, **bound)
        with pytest.raises(Missed, match=f"{name} is {value:.3f}, and should be"):
            Lab(Cpu(), tmp_path, small=False, tell=notes.tell).goal(name, value, **bound)
    assert notes == {"ratio": 1.04, "gpu_share": 0.9}


def test_host_that_waits_inside_the_steps_is_found(lab: Lab, notes: Notes) -> None:
    """A host that waits for the device between two steps fails the row, with what it waits in and where."""

    class Waiting(Cpu):
        def profiled(self) -> Any:
            return _Given([Trace(2, {"aten::item > cudaStreamSynchronize": 2}, 40, 0.8)])

    lab = Lab(Waiting(), lab.folder, small=True, tell=notes.tell)
    with pytest.raises(Missed, match="the host waits 2 times in 2 steps: aten::item >"):
        full_size.inside(lab, "sdxl")
    assert (notes["launches_per_step"], notes["gpu_share_inside"]) == (20.0, 0.8)


def test_device_that_waits_for_the_link_is_found(
    lab: Lab, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two lanes leave the device idle the row fails, with the share of the time that it worked."""
    monkeypatch.setattr(lanes, "SENDING_SHARE", 3.0)  # which two lanes cannot hide
    monkeypatch.setattr(lanes, "JOBS", 4)
    bench.bench(lab, "z-image")
    lab.small = False
    with pytest.raises(Missed, match=r"two_lanes_share is 0\.\d+, and should be 0\.98 at least"):
        lanes.slow_link(lab, "z-image")
    assert notes["one_lane_share"] < notes["two_lanes_share"]


class _Given:
    """A context that gives ``value``."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __enter__(self) -> Any:
        return self._value

    def __exit__(self, *_: object) -> None:
        pass


def test_model_that_has_no_room_is_skipped(tmp_path: Path, notes: Notes) -> None:
    """A card that is too small for a model of full size skips its rows, and says what they need."""

    class Small(Cpu):
        def total_bytes(self) -> int:
            return 6 << 30

    lab = Lab(Small(), tmp_path, small=False, tell=notes.tell)
    with pytest.raises(Skipped, match="it needs 14 GB of the device's memory, which has 6 GB"):
        bench.Bench(lab, "z-image")


def test_full_size_files_are_the_families() -> None:
    """Names and shapes that are written in full size are those by which the families are told."""
    for family in (SDXL, Z_IMAGE):
        _assert_told(family, {name: shapes(part) for name, part in family.parts.items()})
    transformer, text_encoder = (Z_IMAGE.parts[name] for name in ("transformer", "text_encoder"))
    quantised = {
        "transformer": layouts.z_image(shapes(transformer)),
        "text_encoder": language_model(empty_model(text_encoder)),
    }
    _assert_told(Z_IMAGE, quantised)


def _assert_told(family: Family, named: dict[str, Any]) -> None:
    for name, tensors in named.items():
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        assert any(layout.fits(found) for layout in family.parts[name].layouts), name


def test_random_blocks_keep_lengths(tmp_path: Path) -> None:
    """Random Q4_K blocks decode, by gguf's own code, to numbers that keep lengths."""
    named = {"a.weight": torch.empty(64, 512, device="meta"), "a.bias": torch.empty(64, device="meta")}
    file = write_q4_k(tmp_path / "a.gguf", "diffusion-model", "flux", named, Drawn("cpu"))
    weight, bias = open_gguf(file.path).tensors
    numbers = gguf.quants.dequantize(weight.data, weight.tensor_type)
    assert (weight.tensor_type.name, numbers.shape, bias.data.shape) == ("Q4_K", (64, 512), (64,))
    assert numbers.std() * 512**0.5 == pytest.approx(0.8, rel=0.05)
    assert abs(float(numbers.mean())) < 0.1 * numbers.std()


def test_random_files_are_read_as_they_were_drawn(tmp_path: Path) -> None:
    """A file that is written as it is drawn is a whole safetensors file, the same in every run."""
    part = SDXL.parts["vae"]
    small = {"decoder.a.weight": torch.empty(4, 9), "decoder.norm.weight": torch.empty(4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("studio_worker.gpu_check.subjects.random_weights.shapes", lambda _part: small)
        first, second = (
            load_file(write_plain(tmp_path / name, part, torch.float16, Drawn("cpu")).path) for name in "ab"
        )
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == {
        name: tuple(tensor.shape) for name, tensor in small.items()
    }
    assert all(torch.equal(first[name], second[name]) for name in small)
    assert float(first["decoder.norm.weight"].mean()) == pytest.approx(1.0, abs=0.2)


# --- traces ---


def span(name: str, cat: str, at: float, dur: float = 1.0, tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": at, "dur": dur, "tid": tid}


def test_trace_tells_waits_between_the_steps_alone() -> None:
    """Counted are waits between the first mark and the last, with the operations they are in; how busy the
    device is counts overlapping kernels once.
    """
    marks = [span(MARK, "user_annotation", at) for at in (100, 200, 300)]
    events = [
        *marks,
        span(MARK, "gpu_user_annotation", 90),
        span("cudaStreamSynchronize", "cuda_runtime", 50),
        span("cudaStreamSynchronize", "cuda_runtime", 350),
        span("aten::where", "cpu_op", 110, 20),
        span("aten::item", "cpu_op", 112, 10),
        span("aten::elsewhere", "cpu_op", 110, 20, tid=2),
        span("cudaStreamSynchronize", "cuda_runtime", 115),
        span("cudaStreamWaitEvent", "cuda_runtime", 210),
        span("cudaMemcpyAsync", "cuda_runtime", 220),
        *(span("cudaLaunchKernel", "cuda_runtime", at) for at in (101, 201, 301)),
        span("gemm", "kernel", 90, 60),
        span("softmax", "kernel", 120, 60),
        span("copy", "gpu_memcpy", 290, 40),
        {"ph": "M", "name": "process_name"},
    ]
    assert judge(events) == Trace(
        steps=2,
        waits={"aten::where > aten::item > cudaStreamSynchronize": 1},
        launches=2,
        busy_share=(80 + 10) / 200,
    )
    assert judge(marks[:1]) == Trace(0, {}, 0, None)


def test_profile_of_torch_is_read(lab: Lab) -> None:
    """What torch's own profiler exports has the marks that are looked for."""
    with lab.gpu.profiled() as traces:
        for _ in range(3):
            with torch.profiler.record_function(MARK):
                pass
            torch.ones(8).sum().item()
    assert (traces[0].steps, traces[0].waits) == (2, {})


# --- what is asked of CUDA ---


class FakeCuda:
    """Stands for what ``torch.cuda`` is asked."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.fractions: list[float] = []
        self.modes: list[str] = []
        patch.setattr(torch.cuda, "memory_reserved", lambda _device: 2 << 30)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda _device: (3 << 30, 8 << 30))
        patch.setattr(torch.cuda, "memory_allocated", lambda _device: 1 << 30)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 5 << 30)
        patch.setattr(torch.cuda, "get_device_properties", lambda _device: self)
        patch.setattr(torch.cuda, "set_sync_debug_mode", self.modes.append)
        patch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda share, _device: self.fractions.append(share)
        )
        self.total_memory = 8 << 30


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_memory_is_scarce_inside_alone(cuda: FakeCuda) -> None:
    """Memory is limited to what is reserved and a little, and whole again after it, however it ends."""
    gpu = Cuda("cuda:0")
    assert (gpu.total_bytes(), gpu.free_bytes(), gpu.allocated_bytes(), gpu.peak_bytes()) == (
        8 << 30,
        3 << 30,
        1 << 30,
        5 << 30,
    )
    inside: list[float] = []

    def run_out() -> None:
        with gpu.scarce(1 << 30):
            inside.extend(cuda.fractions)
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        run_out()
    assert inside == [3 / 8]
    assert cuda.fractions == [3 / 8, 1.0]


def test_places_where_the_host_waits_are_told(cuda: FakeCuda) -> None:
    """torch's warnings about operations that wait are told by file and line; other warnings are not."""
    import warnings

    with Cuda("cuda:0").waits() as places:
        assert cuda.modes == ["warn"]
        warnings.warn_explicit(
            "called a synchronizing CUDA operation", UserWarning, "/x/scheduling_euler.py", 12
        )
        warnings.warn_explicit("something else", UserWarning, "/x/other.py", 1)
    assert cuda.modes == ["warn", "default"]
    assert places == ["scheduling_euler.py:12"]


def test_device_that_is_lost_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a sticky error every call to CUDA fails: the next row needs another process."""

    def fail(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", fail)
    assert not Cuda("cuda:0").works()


def test_shares_have_no_mean_where_nothing_was_told() -> None:
    """A driver that does not tell the GPU's use gives no figure instead of a wrong one."""
    shares = Shares()
    assert shares.mean is None
    shares.seen += [0.5, 1.0]
    assert shares.mean == 0.75
