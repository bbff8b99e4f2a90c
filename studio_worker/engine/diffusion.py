"""The engine for ``sd-cpp`` sources: one image task to one picture, with torch and diffusers, offline.

This module owns the order of things: every input is checked before a model is loaded, cancellation is
looked at between stages and at every step, and what the libraries raise is translated. Which model it is,
which sampler, what stays loaded and how a picture is encoded are its neighbours' business.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import diffusers
import torch
import transformers
from PIL import Image

from studio_worker.engine import Inputs, Progress, Request
from studio_worker.engine.encoding import check_ext, encode, generation_meta
from studio_worker.engine.families import FAMILIES, identify
from studio_worker.engine.families.family import Blueprint, Family
from studio_worker.engine.faults import translated, usable_device
from studio_worker.engine.images import decode_mask, decode_picture
from studio_worker.engine.loading import load_part, weights_dtype
from studio_worker.engine.loras import Adapters, asked_loras
from studio_worker.engine.parameters import Parameters, printable, resolve
from studio_worker.engine.rendering import LoadedModel, Rendered, Starting
from studio_worker.engine.residency import Key, Residency, default_budget_bytes, free_bytes, total_bytes
from studio_worker.engine.weights import will_need
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel, ImageTask, Picture

_LOG = logging.getLogger(__name__)


class DiffusionEngine:
    """Makes pictures on one device. Called from one thread only.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        budget_bytes: how many bytes of weights may stay loaded; by default a share of the device's memory.
        families: the model families that it serves.

    Raises:
        DeviceError: torch cannot use ``device``.
    """

    def __init__(
        self, device: str, budget_bytes: int | None = None, families: Sequence[Family] = FAMILIES
    ) -> None:
        _silence_libraries()
        self._device = usable_device(device)
        self._families = families
        self._adapters = Adapters()
        self._residency = Residency(
            self._device, default_budget_bytes(self._device) if budget_bytes is None else budget_bytes
        )

    def generate(self, request: Request, progress: Progress, cancel: Cancel) -> Picture:
        """See :meth:`studio_worker.engine.Engine.generate`."""
        prompts = (printable(request.task.prompt), printable(request.task.negative_prompt or ""))
        with translated(self._device, prompts, on_exhausted=self._residency.clear):
            return self._generate(request, progress, cancel)

    def resident(self) -> Mapping[str, int]:
        """See :meth:`studio_worker.engine.KeepsModels.resident`."""
        return self._residency.models

    def used_bytes(self) -> int | None:
        """See :meth:`studio_worker.engine.KeepsModels.used_bytes`."""
        try:
            return total_bytes(self._device) - free_bytes(self._device)
        except RuntimeError:  # the device is lost: the job in hand says so, and why
            return None

    def _generate(self, request: Request, progress: Progress, cancel: Cancel) -> Picture:
        cancel.check()
        check_ext(request.task.ext)
        _check_inputs(request.task, request.inputs)
        prompt, loras = asked_loras(request.task.prompt, request.files)
        task = request.task.model_copy(update={"prompt": prompt})
        blueprint = identify([file for file in request.files if file.role != "lora"], self._families)
        family = blueprint.family
        from_image = request.inputs.init_image is not None
        parameters = resolve(task, request.defaults, family.defaults, from_image=from_image)
        family.check(parameters)
        starting = _starting(request.inputs, parameters)
        family.pipeline_class(starting.kind)

        dtype = weights_dtype(family, self._device)
        model, load_s = self._model(request.model, blueprint, dtype)
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
            dtype=str(dtype).removeprefix("torch."),
            **({"loras": {lora.name: lora.weight for lora in loras}} if loras else {}),
            **rendered.facts,
        )
        return Picture(data, parameters.ext, meta, timings_s)

    def _model(self, name: str, blueprint: Blueprint, dtype: torch.dtype) -> tuple[LoadedModel, float]:
        """The model that the studio calls ``name``, and the seconds that loading took: 0 where all of its
        components were resident.
        """
        family = blueprint.family
        started = time.perf_counter()
        keys = {
            part: Key(family.parts[part].identity, section.content, dtype)
            for part, section in blueprint.sections.items()
        }
        parts: dict[str, torch.nn.Module | None] = {
            part: self._residency.get(keys[part]) if part in keys else None for part in family.parts
        }
        missing = [part for part in keys if parts[part] is None]
        if missing:
            needed = sum(blueprint.sections[part].size_bytes(dtype.itemsize) for part in missing)
            self._residency.make_room(needed, keep=keys.values())
        for part in missing:
            will_need(blueprint.sections[part].checkpoint.path)
        for part in missing:
            section = blueprint.sections[part]
            component = load_part(family.parts[part], section, self._device, dtype)
            self._residency.add(keys[part], component)
            parts[part] = component
        self._residency.name(name, keys.values())
        model = LoadedModel(family, parts)
        if not missing:
            return model, 0.0
        load_s = time.perf_counter() - started
        _LOG.info(
            "model loaded",
            extra={
                "family": family.name,
                "components": missing,
                "load_s": load_s,
                "resident_bytes": self._residency.size_bytes,
            },
        )
        return model, load_s


def _render(
    model: LoadedModel, parameters: Parameters, starting: Starting, progress: Progress, cancel: Cancel
) -> Rendered:
    """The picture, of which nothing but what the task allows differs from the initial one."""
    if starting.picture is not None and parameters.denoise == 0:
        return Rendered(starting.picture)  # nothing may change, and diffusers cannot run zero steps
    rendered = model.render(parameters, starting, progress, cancel)
    if starting.picture is None or starting.mask is None:
        return rendered
    # Inpainting keeps what the mask protects only to within what the VAE does to it; here it stays exactly.
    return Rendered(Image.composite(rendered.picture, starting.picture, starting.mask), rendered.facts)


def _check_inputs(task: ImageTask, inputs: Inputs) -> None:
    """Whether the pictures fit the task and each other, before anything is decoded."""
    if task.ref_image_url is not None or inputs.ref_image is not None:
        raise JobError(
            "this model family cannot edit by reference (refImageUrl); use initImageUrl", retryable=False
        )
    for name, url, data in (
        ("initImageUrl", task.init_image_url, inputs.init_image),
        ("maskUrl", task.mask_url, inputs.mask),
    ):
        if (url is None) != (data is None):
            # Without this a picture that was never fetched would silently become text-to-image.
            raise JobError(f"{name} and the fetched inputs do not agree", retryable=True)
    if inputs.mask is not None and inputs.init_image is None:
        raise JobError("maskUrl without initImageUrl: there is no picture to change", retryable=False)


def _starting(inputs: Inputs, parameters: Parameters) -> Starting:
    size = (parameters.width, parameters.height)
    if inputs.init_image is None:
        return Starting()
    picture = decode_picture(inputs.init_image, "initial picture", *size)
    mask = None if inputs.mask is None else decode_mask(inputs.mask, *size)
    return Starting(picture, mask)


def _silence_libraries() -> None:
    """Keep prompts out of every log, and progress bars off standard error.

    The package sets the same in the environment, which holds only for libraries imported after it. Neither
    library says anything below ERROR that an operator could act on.
    """
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
