"""What a job will need of the device's memory, told from its files' headers before it is accepted.

Imports no torch, reads no weights, and loads what reads headers when it is first asked: the service starts
without it. Asked by the thread that judges offers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from studio_worker.box.device import Device
from studio_worker.box.ram import total_ram_bytes
from studio_worker.engine.memory.peaks import Peaks
from studio_worker.engine.memory.precision import numbers
from studio_worker.engine.parameters import resolve
from studio_worker.errors import JobError, NotServed
from studio_worker.jobs import ImageTask
from studio_worker.models import CliDefaults, LocalFile

JUDGED = frozenset({"sd-cpp", "onnx"})
"""The engines of whose files it is known what they need."""

_GRAPH_COPIES = 2
"""onnxruntime has a graph's weights twice while it loads it: as read, and as its kernels want them."""

_REMOVAL_BYTES = 1_100_000_000
"""What 512 px take beside them. Measured with random weights in layers like LaMa's (182 MB): 1.38 GB at the
peak in all, and no more than the weights between jobs."""


def removal_bytes(graph: Path) -> int:
    """What removing an object needs of RAM.

    Raises:
        OSError: the file cannot be looked at.
    """
    return _GRAPH_COPIES * graph.stat().st_size + _REMOVAL_BYTES


class Estimates:
    """For one device and one thread.

    Args:
        device: where the jobs are made.
        peaks: what the engine has learnt of them.
    """

    def __init__(self, device: Device, peaks: Peaks | None = None) -> None:
        self._device = device
        self._peaks = peaks or Peaks()

    @cached_property
    def _sources(self) -> Any:
        from studio_worker.engine.families.sources import Sources

        return Sources()

    def needed_bytes(
        self, files: Sequence[LocalFile], task: ImageTask, defaults: CliDefaults, engine: str = "sd-cpp"
    ) -> int | None:
        """The least that the picture can be made with: on a GPU layer by layer, if RAM can hold the others;
        else, and on the CPU, whole.

        ``None`` where it cannot be told: the job's own run says what is wrong with it; and where nothing of
        the device is needed.

        Raises:
            NotServed: this worker lacks the family, or reads no such files; another worker may do the job.
        """
        if engine == "onnx":
            graphs = [file.path for file in files if file.role == "model"]
            return removal_bytes(graphs[0]) if graphs and not self._device.is_gpu else None
        if engine not in JUDGED:
            return None
        from studio_worker.engine.memory.placement import leanest
        from studio_worker.engine.rendering.needs import footprint

        kind: Literal["text", "image", "inpaint", "edit"] = "text"
        if task.ref_image_url:
            kind = "edit"
        elif task.init_image_url:
            kind = "inpaint" if task.mask_url else "image"
        try:
            blueprint = self._sources.identify([file for file in files if file.role != "lora"])
            family = blueprint.family
            parameters = resolve(task, defaults, family.defaults, from_image=kind in {"image", "inpaint"})
            needed = footprint(
                blueprint,
                numbers(family.halves, self._device.capability, self._device.description),
                parameters.width * parameters.height,
                kind=kind,
                guided=parameters.guidance != 1,
                loras=[file for file in files if file.role == "lora"],
            )
        except NotServed:
            raise
        except JobError:
            return None
        host = total_ram_bytes() if self._device.is_gpu else 0
        return leanest(self._peaks.corrected(needed), host=host).peak_bytes
