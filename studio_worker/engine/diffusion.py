"""The engine for ``sd-cpp`` sources: one image task to one picture, with torch and diffusers, offline.

This module owns the order of things: every input is checked before a model is loaded, cancellation is
looked at between stages and at every step, and what the libraries raise is translated. Which model it is,
which sampler, what stays loaded and how a picture is encoded are its neighbours' business.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from studio_worker.engine import Inputs, Progress, Request, Resident
from studio_worker.engine.canvas import Starting
from studio_worker.engine.encoding import check_ext, encode, generation_meta
from studio_worker.engine.families import FAMILIES
from studio_worker.engine.families.family import Family
from studio_worker.engine.faults import OutOfMemory, translated, usable_device
from studio_worker.engine.images import decode_mask, decode_picture, decode_reference
from studio_worker.engine.libraries import settle
from studio_worker.engine.loader import Loader
from studio_worker.engine.loading import computed_in
from studio_worker.engine.loras import Adapters, asked_loras
from studio_worker.engine.memory import MachineMemory, Memory, free_bytes, total_bytes
from studio_worker.engine.parameters import Parameters, printable, resolve
from studio_worker.engine.placement import Footprint, Plan
from studio_worker.engine.rendering import LoadedModel, Rendered
from studio_worker.engine.residency import Residency
from studio_worker.engine.sources import Sources
from studio_worker.errors import JobError, JobImpossible
from studio_worker.jobs import Cancel, ImageTask, Picture
from studio_worker.models import CliDefaults, LocalFile
from studio_worker.process import giving_memory_back

_LOG = logging.getLogger(__name__)


@dataclass
class Attempt:
    """One try at a picture: what it needed and how it was made, as far as it came; ``plan`` may be given."""

    needed: Footprint | None = None
    plan: Plan | None = None


class DiffusionEngine:
    """Makes pictures on one device. Called from one thread only.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        budget_bytes: how many bytes of weights may stay on the device; by default as many as fit, on the CPU
            half of what is free.
        families: the model families that it serves.
        memory: what there is to decide with; by default this machine's.
        compiles: whether denoisers are compiled (compiling.py).

    Raises:
        DeviceError: torch cannot use ``device``.
    """

    def __init__(
        self,
        device: str,
        budget_bytes: int | None = None,
        families: Sequence[Family] = FAMILIES,
        memory: Memory | None = None,
        *,
        compiles: bool = False,
    ) -> None:
        settle()
        self._device = usable_device(device)
        self._sources = Sources(families)
        self._adapters = Adapters()
        self._memory = memory or MachineMemory(self._device)
        self._residency = Residency(self._device, self._memory, budget_bytes)
        self._loader = Loader(self._device, self._memory, self._residency, compiles=compiles)

    @giving_memory_back()  # between jobs, whatever else runs here may want it
    def generate(self, request: Request, progress: Progress, cancel: Cancel) -> Picture:
        """See :meth:`studio_worker.engine.Engine.generate`."""
        prompts = (printable(request.task.prompt), printable(request.task.negative_prompt or ""))
        attempt = Attempt()
        try:
            with translated(self._device, prompts, on_exhausted=self._residency.clear):
                return self._generate(request, progress, cancel, attempt)
        except OutOfMemory as error:
            if attempt.needed is None or attempt.plan is None:
                raise
            leaner = self._loader.leaner_plan(attempt.needed, attempt.plan)
            if leaner is None:
                raise
            cancel.check()
            _LOG.warning("out of memory, trying a leaner way", extra={"error": str(error)})
        with translated(self._device, prompts, on_exhausted=self._residency.clear):
            return self._generate(request, progress, cancel, Attempt(plan=leaner))

    def preload(
        self, model: str, files: Sequence[LocalFile], defaults: CliDefaults, go_on: Callable[[], bool]
    ) -> bool:
        """See :meth:`studio_worker.engine.KeepsModels.preload`."""
        with translated(self._device, (), on_exhausted=self._residency.clear):
            blueprint = self._sources.identify([file for file in files if file.role != "lora"])
            own = blueprint.family.defaults
            pixels = (defaults.width or own.width) * (defaults.height or own.height)
            return self._loader.preload(model, blueprint, pixels, defaults, go_on)

    def release(self) -> None:
        """See :meth:`studio_worker.engine.KeepsModels.release`."""
        with translated(self._device, (), on_exhausted=self._residency.clear):
            self._residency.release()

    def resident(self) -> Mapping[str, Resident]:
        """See :meth:`studio_worker.engine.KeepsModels.resident`."""
        return self._residency.models

    def used_bytes(self) -> int | None:
        """See :meth:`studio_worker.engine.KeepsModels.used_bytes`."""
        try:
            return total_bytes(self._device) - free_bytes(self._device)
        except RuntimeError:  # the device is lost: the job in hand says so, and why
            return None

    def available_bytes(self) -> int | None:
        """See :meth:`studio_worker.engine.KeepsModels.available_bytes`."""
        try:
            return self._memory.on_device(self._residency.size_bytes())
        except RuntimeError:
            return None

    def _generate(self, request: Request, progress: Progress, cancel: Cancel, attempt: Attempt) -> Picture:
        cancel.check()
        check_ext(request.task.ext)
        _check_inputs(request.task, request.inputs)
        prompt, loras, unknown = asked_loras(request.task.prompt, request.files)
        task = request.task.model_copy(update={"prompt": prompt})
        blueprint = self._sources.identify([file for file in request.files if file.role != "lora"])
        family = blueprint.family
        from_image = request.inputs.init_image is not None
        parameters = resolve(task, request.defaults, family.defaults, from_image=from_image)
        family.check(parameters)
        starting = _starting(request.inputs, parameters)
        family.check_job(starting.kind, blueprint.sections)

        attempt.needed = self._loader.footprint(
            blueprint,
            parameters.width * parameters.height,
            kind=starting.kind,
            guided=parameters.guidance != 1,
            loras=loras,
        )
        attempt.plan = attempt.plan or self._loader.plan(attempt.needed, request.defaults)

        def goes_on() -> bool:
            progress(0, parameters.steps)
            return not cancel.is_set

        model, load_s = self._loader.load(request.model, blueprint, attempt.plan, loras, goes_on)
        started = time.perf_counter()
        self._adapters.set(model.lora_pipeline(), loras)
        if loras:
            load_s += time.perf_counter() - started
        cancel.check()
        started = time.perf_counter()
        rendered = _render(model, parameters, starting, progress, cancel)
        generated = time.perf_counter()
        cancel.check()
        data = encode(rendered.picture, parameters, request.model)
        timings_s = {
            "load": load_s,
            "generate": generated - started,
            "encode": time.perf_counter() - generated,
        }
        meta = generation_meta(
            parameters,
            model=request.model,
            engine="sd-cpp",
            family=family.name,
            timings_s=timings_s,
            device=str(self._device),
            dtype=computed_in(family, self._device),
            **({"loras": {lora.name: lora.weight for lora in loras}} if loras else {}),
            **({"unknownLoras": list(unknown)} if unknown else {}),
            **rendered.facts,
        )
        return Picture(data, parameters.ext, meta, timings_s)


def _render(
    model: LoadedModel, parameters: Parameters, starting: Starting, progress: Progress, cancel: Cancel
) -> Rendered:
    """The picture, of which nothing but what the task allows differs from the initial one."""
    if starting.picture is not None and parameters.denoise == 0:
        return Rendered(starting.picture)  # nothing may change, and diffusers cannot run zero steps
    rendered = model.render(parameters, starting, progress, cancel)
    given = starting.picture or starting.reference
    if given is None or starting.mask is None:
        return rendered
    # Inpainting keeps what the mask protects only to within what the VAE does to it, and an edit not even so;
    # here it stays exactly.
    kept = given.resize(rendered.picture.size, Image.Resampling.LANCZOS)  # a reference has its own size
    return Rendered(Image.composite(rendered.picture, kept, starting.mask), rendered.facts)


def _check_inputs(task: ImageTask, inputs: Inputs) -> None:
    """Whether the pictures fit the task and each other, before anything is decoded."""
    for name, url, data in (
        ("initImageUrl", task.init_image_url, inputs.init_image),
        ("refImageUrl", task.ref_image_url, inputs.ref_image),
        ("maskUrl", task.mask_url, inputs.mask),
    ):
        if (url is None) != (data is None):
            # Without this a picture that was never fetched would silently become text-to-image.
            raise JobError(f"{name} and the fetched inputs do not agree")
    if inputs.init_image is not None and inputs.ref_image is not None:
        raise JobImpossible(
            "initImageUrl and refImageUrl in one task: a picture is either changed (image-to-image) or read "
            "(edit by reference)"
        )
    if inputs.mask is not None and inputs.init_image is None and inputs.ref_image is None:
        raise JobImpossible("maskUrl without initImageUrl or refImageUrl: there is no picture to change")


def _starting(inputs: Inputs, parameters: Parameters) -> Starting:
    size = (parameters.width, parameters.height)
    picture = (
        None if inputs.init_image is None else decode_picture(inputs.init_image, "initial picture", *size)
    )
    reference = None if inputs.ref_image is None else decode_reference(inputs.ref_image)
    mask = None if inputs.mask is None else decode_mask(inputs.mask, *size)
    return Starting(picture, mask, reference)
