"""The engine for ``sd-cpp`` sources: one image task to one picture, with torch and diffusers, offline.

This module owns the order of things: every input is checked before a model is loaded, cancellation is
looked at between stages and at every step, and what the libraries raise is translated. Which model it is,
which sampler, what stays loaded and how a picture is encoded are its neighbours' business.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image

from studio_worker.box.process import giving_memory_back
from studio_worker.engine.contract import Engine, Request, Resident, StepProgress
from studio_worker.engine.families import FAMILIES
from studio_worker.engine.families.family import Family
from studio_worker.engine.families.sources import Sources
from studio_worker.engine.faults import OutOfMemory, translated, usable_device
from studio_worker.engine.libraries import settle
from studio_worker.engine.loading import computed_in
from studio_worker.engine.loras.adapters import Adapters
from studio_worker.engine.loras.places import LoraPlaces
from studio_worker.engine.memory.machine import MachineMemory, Memory, free_bytes, total_bytes
from studio_worker.engine.memory.peaks import Peaks
from studio_worker.engine.memory.placement import Footprint, Plan
from studio_worker.engine.memory.residency import Residency
from studio_worker.engine.parameters import Parameters, printable
from studio_worker.engine.pictures.encoding import Unencoded
from studio_worker.engine.rendering.canvas import Starting
from studio_worker.engine.rendering.loader import Loader
from studio_worker.engine.rendering.pipeline import LoadedModel, Rendered
from studio_worker.engine.understood import Asked, Understood, asked, lora_facts, understood
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults, LocalFile

_LOG = logging.getLogger(__name__)


_TRIES = 3
"""At one picture, as long as memory runs out: each takes as long as the picture does."""


class DiffusionEngine(Engine):
    """Makes pictures on one device. Called from one thread only.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        budget_bytes: how many bytes of weights may stay on the device; by default as many as fit, on the CPU
            half of what is free.
        families: the model families that it serves.
        memory: what there is to decide with; by default this machine's.
        compiles: whether denoisers are compiled (compiling.py).
        peaks: what is known of the memory that pictures take.

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
        peaks: Peaks | None = None,
    ) -> None:
        settle()
        self._device = usable_device(device)
        self._sources = Sources(families)
        self._places = LoraPlaces()
        self._adapters = Adapters()
        self._memory = memory or MachineMemory(self._device)
        self._peaks = peaks or Peaks()
        self._residency = Residency(self._device, self._memory, budget_bytes)
        self._loader = Loader(self._device, self._memory, self._residency, compiles=compiles)
        self._at_rest_bytes: int | None = None
        """What there was for a job before the one in hand; ``None`` while there is none."""

    @giving_memory_back()  # between jobs, whatever else runs here may want it
    def make(self, request: Request, progress: StepProgress, cancel: Cancel) -> Unencoded:
        """See :meth:`studio_worker.engine.contract.Engine.make`."""
        prompts = (printable(request.task.prompt), printable(request.task.negative_prompt or ""))
        cancel.check()
        with translated(self._device, prompts):
            self._at_rest_bytes = self._available()
        try:
            return self._made(request, prompts, progress, cancel)
        finally:
            self._at_rest_bytes = None

    def _made(
        self, request: Request, prompts: tuple[str, ...], progress: StepProgress, cancel: Cancel
    ) -> Unencoded:
        """The picture, on as many ways as it takes."""
        with translated(self._device, prompts):
            job = request.prepared
            if not isinstance(job, Asked):
                job = asked(request, self._sources, cancel.check)
            job = understood(job, self._places)
            needed = self._needed(job)
            plan = self._plan(job, needed, request.defaults)
        tries = _TRIES
        while True:
            available = self._available()
            try:
                with translated(self._device, prompts):
                    return self._make(request, job, needed, plan, progress, cancel)
            except OutOfMemory as error:
                tries -= 1
                if error.in_ram:
                    other = self._with_ram_freed(job, plan)
                else:
                    others_bytes = self._loader.others_bytes(job.blueprint)
                    self._peaks.ran_out(needed, plan, min(available, self._available()) - others_bytes)
                    other = self._other_plan(job, needed, plan, request.defaults)
                if other is None or not tries:
                    self._residency.clear()
                    raise
                cancel.check()
                plan = other
                _LOG.warning(
                    "out of memory, trying another way", extra={"error": str(error), "mode": plan.mode.value}
                )

    def preload(
        self, model: str, files: Sequence[LocalFile], defaults: CliDefaults, go_on: Callable[[], bool]
    ) -> bool:
        """See :meth:`studio_worker.engine.contract.KeepsModels.preload`."""
        with translated(self._device, ()):
            blueprint = self._sources.identify([file for file in files if file.role != "lora"])
            own = blueprint.family.defaults
            pixels = (defaults.width or own.width) * (defaults.height or own.height)
            needed = self._peaks.corrected(self._loader.footprint(blueprint, pixels))
            return self._loader.preload(model, blueprint, needed, defaults, go_on)

    def release(self) -> None:
        """See :meth:`studio_worker.engine.contract.KeepsModels.release`."""
        try:
            with translated(self._device, ()):
                self._residency.release()
        except JobError:  # RAM has no room for them after all
            self._residency.clear()

    def resident(self) -> Mapping[str, Resident]:
        """See :meth:`studio_worker.engine.contract.KeepsModels.resident`."""
        return self._residency.models

    def components(self, model: str) -> tuple[torch.nn.Module, ...]:
        """The library's modules that a model is made of, for measurements; none where it is not loaded."""
        return self._residency.components(model)

    def used_bytes(self) -> int | None:
        """See :meth:`studio_worker.engine.contract.KeepsModels.used_bytes`."""
        try:
            return total_bytes(self._device) - free_bytes(self._device)
        except RuntimeError:  # the device is lost: the job in hand says so, and why
            return None

    def available_bytes(self) -> int | None:
        """See :meth:`studio_worker.engine.contract.KeepsModels.available_bytes`."""
        if (at_rest_bytes := self._at_rest_bytes) is not None:
            return at_rest_bytes  # what the picture in hand takes is there again for the next one
        try:
            return self._available()
        except RuntimeError:
            return None

    def _available(self) -> int:
        return self._memory.on_device(self._residency.size_bytes())

    def _needed(self, job: Understood) -> Footprint:
        kind, loras = job.starting.kind, job.loras
        return self._loader.footprint(job.blueprint, job.pixels, kind=kind, guided=job.is_guided, loras=loras)

    def _plan(self, job: Understood, needed: Footprint, defaults: CliDefaults) -> Plan:
        return self._loader.plan(job.blueprint, self._peaks.corrected(needed), defaults)

    def _other_plan(
        self, job: Understood, needed: Footprint, failed: Plan, defaults: CliDefaults
    ) -> Plan | None:
        """What to try after a way for which the device's memory ran out: the same once others have left, or a
        leaner one; else the leanest, once everything has left. ``None`` where that was it.
        """
        try:
            plan = self._plan(job, needed, defaults)
        except JobError:
            plan = failed
        if plan.way != failed.way or plan.peak_bytes > failed.peak_bytes:
            return plan
        leanest = self._loader.leanest(needed)
        if leanest.way == failed.way and self._loader.is_alone(job.blueprint):
            return None
        self._residency.clear()
        return leanest

    def _with_ram_freed(self, job: Understood, failed: Plan) -> Plan | None:
        """What to try after a way for which RAM ran out: the same, once nothing else waits there."""
        if self._loader.is_alone(job.blueprint):
            return None
        self._residency.clear()
        return failed

    def _make(
        self,
        request: Request,
        job: Understood,
        needed: Footprint,
        plan: Plan,
        progress: StepProgress,
        cancel: Cancel,
    ) -> Unencoded:
        family, parameters, loras = job.blueprint.family, job.parameters, job.loras

        def goes_on() -> bool:
            progress(0, parameters.steps)
            cancel.check()
            return True

        read = self._adapters.read(job.placed)
        model, load_s = self._loader.load(request.model, job.blueprint, plan, loras, goes_on)
        goes_on()
        started = time.perf_counter()
        if self._adapters.set(model.parts, job.placed, read):
            self._residency.weigh()
        if loras:
            load_s += time.perf_counter() - started
        cancel.check()
        started = time.perf_counter()
        self._memory.start_counting()
        rendered = _render(model, parameters, job.starting, progress, cancel)
        peak = self._memory.peak()
        if peak is not None and rendered.facts:  # else nothing was computed
            self._peaks.took(needed, plan, peak - self._loader.others_bytes(job.blueprint))
        generated = time.perf_counter()
        cancel.check()
        return Unencoded(
            rendered.picture,
            parameters,
            model=request.model,
            engine="sd-cpp",
            family=family.name,
            timings_s={"load": load_s, "generate": generated - started},
            facts={
                "device": str(self._device),
                "dtype": computed_in(family, self._device),
                **lora_facts(job.placed),
                **({"unknownLoras": list(job.unknown)} if job.unknown else {}),
                **rendered.facts,
            },
        )


def _render(
    model: LoadedModel, parameters: Parameters, starting: Starting, progress: StepProgress, cancel: Cancel
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
