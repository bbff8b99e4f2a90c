"""One ONNX graph that paints what a mask removes: loaded, held to its contract, run by onnxruntime.

This module owns the contract (names, shapes, ranges) and refuses by name what does not keep it. Nothing but
the graph's own file is read: weights in files beside it are refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studio_worker.engine.removal.holes import SIDE_PX, Levels, White
from studio_worker.errors import FileDamaged, JobError, JobImpossible, NotServed

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

_INPUTS = {"image": (1, 3, SIDE_PX, SIDE_PX), "mask": (1, 1, SIDE_PX, SIDE_PX)}
_OUTPUT = "output"
"""What is read where a graph has several outputs (protocol, section 4)."""

_TYPE = "tensor(float)"

_UNIT_RANGE = 2.0
"""Whose output is never brighter has white at 1, else at 255; the upstream worker's limit."""

_FATAL_ONLY = 4
"""What onnxruntime writes to stderr by itself: everything else is raised, too."""

_DAMAGED = ("InvalidProtobuf", "InvalidArgument", "InvalidGraph")
_NEWER = ("opset", "IR version", "is not a registered function/op")
"""How onnxruntime words that a graph wants what its version does not have."""
_EXHAUSTED = "Failed to allocate memory"
_BESIDE = "External data"
_BESIDE_WORDS = "keeps its weights in another file; a graph must be one file"


def _runtime() -> Any:
    """onnxruntime. Its own builds report their use to their maker, and keep an identity for it, unless the
    environment says otherwise when they are imported: so nobody imports it but by this.

    Raises:
        NotServed: it cannot be loaded.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        raise NotServed(f"onnxruntime cannot be loaded here: {error}") from error
    return onnxruntime


class RemovalGraph:
    """A graph that is ready to run. For one thread.

    Args:
        path: of its file.
        device: ``cpu`` or ``cuda:N``; the latter is used where onnxruntime's build has CUDA.

    Attributes:
        provider: what computes it, by onnxruntime's name.
        size_bytes: of its file.

    Raises:
        FileDamaged: the file is no graph, or a part of one.
        JobImpossible: the graph does not keep the contract.
        NotServed: it wants a newer onnxruntime.
    """

    def __init__(self, path: Path, device: str) -> None:
        self._session = _opened(path, device)
        self.size_bytes = path.stat().st_size
        self.provider = str(self._session.get_providers()[0])
        self._output = self._checked()
        # A picture that is nearly black would not show it: so white is painted once.
        self._highest = 1.0
        levels = np.full((SIDE_PX, SIDE_PX, 3), 255, dtype=np.uint8)
        middle = np.zeros((SIDE_PX, SIDE_PX), dtype=np.bool_)
        middle[SIDE_PX // 2 :, SIDE_PX // 2 :] = True
        self._highest = 255.0 if self._run(levels, middle).max() <= _UNIT_RANGE else 1.0

    def paint(self, levels: Levels, white: White) -> Levels:
        """``levels`` (512, 512, 3) with what is ``white`` painted anew.

        Raises:
            JobError: the graph computed what is no number.
        """
        painted = self._run(levels, white)
        highest = self._highest if painted.max() <= _UNIT_RANGE else 1.0
        rounded: Levels = np.rint((painted * highest).clip(0, 255)).astype(np.uint8)
        return rounded

    def _run(self, levels: Levels, white: White) -> NDArray[np.float32]:
        image = np.ascontiguousarray(levels.transpose(2, 0, 1)[None], dtype=np.float32) / 255
        mask = white[None, None].astype(np.float32)
        options = _runtime().RunOptions()
        if self.provider == CPU:  # what a run took is the machine's again
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        try:
            outputs = self._session.run([self._output], {"image": image, "mask": mask}, options)
        except Exception as error:
            if _EXHAUSTED in str(error):
                raise MemoryError(_EXHAUSTED) from error
            raise
        found = np.asarray(outputs[0], dtype=np.float32)
        if found.shape != _INPUTS["image"]:
            raise JobImpossible(f"the graph painted {_shape(found.shape)}, not {_shape(_INPUTS['image'])}")
        if not np.isfinite(found).all():
            raise JobError("the graph computed numbers that are not finite (NaN); its weights may be damaged")
        picture: NDArray[np.float32] = found[0].transpose(1, 2, 0)
        return picture

    def _checked(self) -> str:
        """The output to read."""
        inputs = {each.name: each for each in self._session.get_inputs()}
        outputs = {each.name: each for each in self._session.get_outputs()}
        if inputs.keys() != _INPUTS.keys():
            raise _not_kept(f"its inputs are {_listed(inputs)}; they must be {_listed(_INPUTS)}")
        if len(outputs) > 1 and _OUTPUT not in outputs:
            raise _not_kept(f"its outputs are {_listed(outputs)}; one must be {_OUTPUT}")
        name = _OUTPUT if len(outputs) > 1 else next(iter(outputs))
        for each, wanted in (
            *((inputs[key], _INPUTS[key]) for key in _INPUTS),
            (outputs[name], _INPUTS["image"]),
        ):
            if each.type != _TYPE or not _fits(each.shape, wanted):
                raise _not_kept(
                    f"{each.name} is {each.type} {_shape(each.shape)}; it must be {_TYPE} {_shape(wanted)}"
                )
        return name


def _opened(path: Path, device: str) -> Any:
    onnxruntime = _runtime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    # Threads that are named by number are not bound to cores, which a container may not have; and those that
    # wait sleep, for the reason that process.py gives.
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=_providers(device))
    except Exception as error:  # its errors have no common base
        kind, text = type(error).__name__, str(error)
        if _BESIDE in text:
            raise JobImpossible(f"{path.name} {_BESIDE_WORDS}") from error
        if kind == "NotImplemented" or (kind == "Fail" and any(sign in text for sign in _NEWER)):
            raise NotServed(
                f"{path.name} wants what onnxruntime {onnxruntime.__version__} does not have"
            ) from error
        if kind in _DAMAGED or kind == "Fail":
            raise FileDamaged(path, f"{path.name} is no ONNX graph, or a damaged one ({kind})") from error
        raise


def _providers(device: str) -> Sequence[Any]:
    onnxruntime, (kind, _, index) = _runtime(), device.partition(":")
    if kind != "cuda" or CUDA not in onnxruntime.get_available_providers():
        return [CPU]
    onnxruntime.preload_dlls()  # the CUDA libraries that torch brings
    return [(CUDA, {"device_id": int(index or 0)}), CPU]


def _fits(shape: Sequence[int | str | None], wanted: Sequence[int]) -> bool:
    """Whether a shape, of which some sides may be left open, can be ``wanted``."""
    return len(shape) == len(wanted) and all(
        not isinstance(side, int) or side == size for side, size in zip(shape, wanted, strict=True)
    )


def _not_kept(problem: str) -> JobImpossible:
    return JobImpossible(f"the graph is none that removes objects: {problem}")


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)) or "none"


def _shape(shape: Sequence[object]) -> str:
    return f"[{','.join(map(str, shape))}]"
