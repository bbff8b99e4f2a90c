"""The engine for ``onnx`` sources: object removal. A picture and a mask to the picture without what is white.

This module owns the order of things: the inputs are checked before a graph is loaded, cancellation is looked
at before every hole, and the picture keeps its size unless the task names another. Prompt, seed, steps and
sampler mean nothing here. One graph stays loaded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from studio_worker.box.process import giving_memory_back
from studio_worker.box.ram import available_ram_bytes
from studio_worker.engine.contract import Engine, Request, Resident, StepProgress
from studio_worker.engine.faults import translated
from studio_worker.engine.images import MAX_PIXELS, any_white, decode_upright
from studio_worker.engine.parameters import Parameters, printable
from studio_worker.engine.pictures.encoding import Unencoded, check_ext
from studio_worker.engine.removal.graph import CUDA, RemovalGraph
from studio_worker.engine.removal.holes import Levels, White, holes, lay_in, shown
from studio_worker.engine.rendering.estimate import removal_bytes
from studio_worker.errors import JobError, JobImpossible
from studio_worker.jobs import Cancel, ImageTask
from studio_worker.models import CliDefaults, LocalFile

_LOG = logging.getLogger(__name__)

MAX_SIDE_PX = 16_383
"""WebP's limit, and so many pixels a side are beyond any picture of a game."""

WHITE_ABOVE = 128
"""What is brighter in a mask is removed; the upstream worker's threshold."""

_CPU = torch.device("cpu")


class RemovalEngine(Engine):
    """Removes objects. Called from one thread only.

    Args:
        device: ``cpu`` or ``cuda:N``. A GPU is used where onnxruntime's build has CUDA, which the one in the
            package has not; else the CPU is, which takes seconds a hole.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._graph: RemovalGraph | None = None
        self._content = ""
        self._resident: dict[str, Resident] = {}

    @giving_memory_back()
    def make(self, request: Request, progress: StepProgress, cancel: Cancel) -> Unencoded:
        """See :meth:`studio_worker.engine.contract.Engine.make`."""
        task = request.task
        private = (printable(task.prompt), printable(task.negative_prompt or ""))
        cancel.check()
        with translated(self._torch_device, private):
            job = request.prepared if isinstance(request.prepared, Asked) else asked(request, cancel.check)
            levels, mask = job
            found = holes(mask)
            progress(0, len(found))
            started = time.perf_counter()
            graph = self._loaded(request.model, request.files)
            loaded = time.perf_counter()
            painted = levels.copy()
            for index, hole in enumerate(found):
                cancel.check()
                lay_in(painted, graph.paint(*shown(levels, mask, hole)), hole)
                progress(index + 1, len(found))
            made = time.perf_counter()
            cancel.check()
            return Unencoded(
                Image.fromarray(painted),
                _parameters(task, levels),
                model=request.model,
                engine="onnx",
                family="object-removal",
                timings_s={"load": loaded - started, "generate": made - loaded},
                facts={
                    "device": str(self._torch_device),
                    "provider": graph.provider,
                    "holes": len(found),
                },
                lossless=True,  # what is kept is kept to the bit, as far as the format can
            )

    def preload(
        self,
        model: str,
        files: Sequence[LocalFile],
        defaults: CliDefaults,  # noqa: ARG002  (a graph has no parameters)
        go_on: Callable[[], bool],
    ) -> bool:
        """See :meth:`studio_worker.engine.contract.KeepsModels.preload`."""
        if self._graph is not None or not go_on():  # another one would have to leave
            return False
        with translated(self._torch_device, ()):
            self._loaded(model, files)
        return True

    def release(self) -> None:
        """See :meth:`studio_worker.engine.contract.KeepsModels.release`."""
        self._graph, self._content, self._resident = None, "", {}

    def resident(self) -> Mapping[str, Resident]:
        """See :meth:`studio_worker.engine.contract.KeepsModels.resident`."""
        return self._resident

    def used_bytes(self) -> int | None:
        """See :meth:`studio_worker.engine.contract.KeepsModels.used_bytes`."""
        return None

    def available_bytes(self) -> int | None:
        """See :meth:`studio_worker.engine.contract.KeepsModels.available_bytes`."""
        return None

    @property
    def _torch_device(self) -> torch.device:
        """What the graph is computed on."""
        on_gpu = self._graph is not None and self._graph.provider == CUDA
        return torch.device(self._device) if on_gpu else _CPU

    def _loaded(self, model: str, files: Sequence[LocalFile]) -> RemovalGraph:
        file = next((each for each in files if each.role == "model"), None)
        if file is None:
            roles = ", ".join(each.role for each in files) or "none"
            raise JobImpossible(f"the source has no file of role model, which the graph is (roles: {roles})")
        if self._graph is None or self._content != file.content:
            self.release()
            needed, available = removal_bytes(file.path), available_ram_bytes()
            if needed > available:
                raise JobError(
                    f"the graph needs {needed / 2**30:.1f} GiB of RAM, {available / 2**30:.1f} GiB are free"
                )
            self._graph, self._content = RemovalGraph(file.path, self._device), file.content
            _LOG.info("graph loaded", extra={"provider": self._graph.provider})
        place = "device" if self._torch_device.type != "cpu" or self._device == "cpu" else "ram"
        self._resident = {model: Resident(self._graph.size_bytes, place)}
        return self._graph


class Asked(NamedTuple):
    """The picture in the size that is asked for, and what of it is removed."""

    levels: Levels
    mask: White


def asked(request: Request, check: Callable[[], None]) -> Asked:
    """
    Args:
        check: called while pictures are decoded; what it raises ends that.

    Raises:
        JobError: what is asked cannot be done, or a picture is not whole.
    """
    task, inputs = request.task, request.inputs
    check_ext(task.ext)
    for name, url in (("initImageUrl", task.init_image_url), ("maskUrl", task.mask_url)):
        if url is None:
            raise JobImpossible(f"{name} is missing: removing an object takes a picture and a mask of it")
    if inputs.init_image is None or inputs.mask is None:
        raise JobError("initImageUrl and maskUrl do not agree with the fetched inputs")
    picture = decode_upright(inputs.init_image, "initial picture", check=check)
    size = (task.width or picture.width, task.height or picture.height)
    if max(size) > MAX_SIDE_PX or size[0] * size[1] > MAX_PIXELS:
        raise JobImpossible(
            f"bad parameters: {size[0]}x{size[1]} px; at most {MAX_SIDE_PX} px a side and {MAX_PIXELS} in all"
        )
    # Of another size, all of it is made to fit, as upstream does: the studio lays the result over its own.
    grey = decode_upright(inputs.mask, "mask", "black", check).convert("L")
    mask = np.asarray(grey) > WHITE_ABOVE
    if grey.size != size:
        mask = any_white(mask, size)  # so that thin lines are removed
    if not mask.any():
        raise JobImpossible("the mask is black everywhere: white marks what is removed")
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return Asked(np.asarray(picture), mask)


def _parameters(task: ImageTask, levels: Levels) -> Parameters:
    """What the picture says of itself: nothing is drawn by chance, and nothing is guided."""
    height, width = levels.shape[:2]
    return Parameters(
        prompt=printable(task.prompt),
        negative_prompt=printable(task.negative_prompt or ""),
        width=width,
        height=height,
        steps=1,
        guidance=1.0,
        sampler="none",
        seed=task.seed or 0,
        denoise=None,
        ext=task.ext,
        asked_size=(width, height),
    )
