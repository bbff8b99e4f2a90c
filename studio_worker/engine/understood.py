"""What a request asks for, understood and checked before anything is loaded.

In two parts: what needs no device (:func:`asked`), which any thread may do while another picture is made; and
where LoRAs go (:func:`understood`), which looks at torch's modules.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from studio_worker.engine.contract import Inputs, Request
from studio_worker.engine.families.family import Blueprint
from studio_worker.engine.families.sources import Sources
from studio_worker.engine.images import decode_mask, decode_picture, decode_reference
from studio_worker.engine.loras.places import LoraPlaces, PlacedLora
from studio_worker.engine.loras.wanted import Lora, asked_loras
from studio_worker.engine.parameters import Parameters, resolve
from studio_worker.engine.pictures.encoding import check_ext
from studio_worker.engine.rendering.canvas import Starting
from studio_worker.errors import JobError, JobImpossible
from studio_worker.jobs import ImageTask

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A job: what makes it, how, and from what. ``unknown`` are LoRAs that the prompt names in vain."""

    blueprint: Blueprint
    parameters: Parameters
    starting: Starting
    loras: tuple[Lora, ...]
    unknown: tuple[str, ...]

    @property
    def pixels(self) -> int:
        return self.parameters.width * self.parameters.height

    @property
    def is_guided(self) -> bool:
        """Whether a negative prompt counts."""
        return self.parameters.guidance != 1


@dataclass(frozen=True)
class Understood(Asked):
    """A job whose LoRAs have found their places."""

    placed: tuple[PlacedLora, ...]


def asked(request: Request, sources: Sources, check: Callable[[], None]) -> Asked:
    """
    Args:
        check: called while pictures are decoded; what it raises ends that.

    Raises:
        JobError: what is asked cannot be done, or a file or picture of it is not whole.
    """
    check_ext(request.task.ext)
    _check_inputs(request.task, request.inputs)
    prompt, loras, unknown = asked_loras(request.task.prompt, request.files)
    task = request.task.model_copy(update={"prompt": prompt})
    blueprint = sources.identify([file for file in request.files if file.role != "lora"])
    family = blueprint.family
    from_image = request.inputs.init_image is not None
    parameters = resolve(task, request.defaults, family.defaults, from_image=from_image)
    family.check(parameters)
    starting = _starting(request.inputs, parameters, check)
    family.check_job(starting.kind, blueprint.sections)
    return Asked(blueprint, parameters, starting, loras, unknown)


def understood(job: Asked, places: LoraPlaces) -> Understood:
    """
    Raises:
        JobError: a LoRA does not fit the model, or its file is not whole.
    """
    family, sections = job.blueprint.family, job.blueprint.sections
    placed = tuple(places.place(lora, family, sections) for lora in job.loras)
    return Understood(job.blueprint, job.parameters, job.starting, job.loras, job.unknown, placed)


def lora_facts(placed: Sequence[PlacedLora]) -> dict[str, Any]:
    """What ``generationMeta`` says of LoRAs: their weights, and of which only a part could be used."""
    if not placed:
        return {}
    told: dict[str, Any] = {"loras": {each.lora.name: each.lora.weight for each in placed}}
    partly = {each.lora.name: each for each in placed if each.left_out}
    if partly:
        told["lorasLeftOut"] = {
            name: {
                "layers": len(each.left_out),
                "of": len(each.left_out) + len(each.adapters),
                "first": each.left_out[0],
            }
            for name, each in partly.items()
        }
    for each in partly.values():
        _LOG.warning(
            "a LoRA is used in part",
            extra={
                "file": each.lora.file.path.name,
                "left_out": len(each.left_out),
                "first": each.left_out[0],
            },
        )
    return told


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


def _starting(inputs: Inputs, parameters: Parameters, check: Callable[[], None]) -> Starting:
    picture = reference = mask = None
    size = (parameters.width, parameters.height)
    if inputs.init_image is not None:
        picture = decode_picture(inputs.init_image, "initial picture", *size, check)
    if inputs.ref_image is not None:
        reference = decode_reference(inputs.ref_image, check)
    if inputs.mask is not None:
        mask = decode_mask(inputs.mask, *size, check)
    return Starting(picture, mask, reference)
