"""What a model family is: the components it is made of, how each is told and renamed, and how it renders.

**How to add a family.**

1. Its configuration into ``engine/configs/NAME/``: one folder with a ``config.json`` for each component, the
   scheduler's, the tokenizer's; sources and licences into ``configs/README.md``.
2. A module beside this one with a :class:`Part` for each component and a :class:`Family` of them. A part says
   by which tensor names and shapes it is told (one :class:`Layout` for each published naming) and how those
   names become the library's. Take the shapes from the configuration, so that tests can make the same family
   tiny. Parts that several families use stand in ``parts.py``; a file that two models share is loaded once.
3. What its pipeline wants differently from the defaults, by overriding :class:`Family`'s methods.
4. The family into ``FAMILIES`` (``families/__init__.py``), its row out of ``recognised.py``.
5. Tests: a tiny random model in the published file layout, pixel for pixel like the library's own pipeline;
   the full size on the meta device against published names and shapes.

Nothing here imports torch: library classes are named as text, and what handles tensors uses their methods.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from studio_worker.engine.families.component import Part, Tokenizer
from studio_worker.engine.parameters import MAX_FLOW_SHIFT, EngineDefaults, Parameters
from studio_worker.engine.sections import Section
from studio_worker.errors import JobImpossible, NotServed


@dataclass(frozen=True)
class Pipelines:
    """The diffusers pipeline class, by name, for each kind of job; ``None`` where the family has none.

    ``text`` starts from nothing, ``image`` from a picture, ``inpaint`` from a picture within a mask, ``edit``
    from a reference picture and an instruction (refImageUrl).
    """

    text: str | None
    image: str | None = None
    inpaint: str | None = None
    edit: str | None = None


JobKind = Literal["text", "image", "inpaint", "edit"]

_GIVEN: Mapping[JobKind, str] = {
    "text": "a prompt alone",
    "image": "initImageUrl",
    "inpaint": "initImageUrl with maskUrl",
    "edit": "refImageUrl",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: how its models are told, what they are made of, and how they render.

    Args:
        name: what operators and ``generationMeta`` call it.
        parts: its components by the name the pipelines give them. By the first, the denoiser, it is told.
        optional: names of parts that a source may leave out; the pipelines then get ``None``.
        tokenizers: by the name the pipelines give them.
        scheduler: the folder of its ``scheduler_config.json``.
        pipelines: the library's classes.
        fixed: further arguments of every pipeline's constructor, by name; one a class does not know is left
            out.
        flow: whether the denoiser predicts a flow (rectified flow), not noise; decides which samplers exist.
        reference_pixels: in how many pixels the denoiser sees a reference picture, whatever size it has.
        halves: torch's names of the types of half precision in which its values are sound, the best first.
        defaults: parameters where neither the task nor the model says anything, and the size multiple.
    """

    name: str
    parts: Mapping[str, Part]
    optional: frozenset[str] = frozenset()
    tokenizers: Mapping[str, Tokenizer]
    scheduler: Path
    pipelines: Pipelines
    fixed: Mapping[str, Any] = field(default_factory=dict)
    flow: bool = False
    reference_pixels: int = 0
    halves: tuple[str, ...] = ("float16",)
    defaults: EngineDefaults = field(default_factory=EngineDefaults)

    @property
    def denoiser(self) -> str:
        """The name of the part by which the family is told."""
        return next(iter(self.parts))

    def pipeline_class(self, kind: JobKind) -> str:
        """The name of diffusers' class for a job of ``kind``.

        Raises:
            NotServed: the family has none.
        """
        name: str | None = getattr(self.pipelines, kind)
        if name is None:
            served = ", ".join(what for each, what in _GIVEN.items() if getattr(self.pipelines, each))
            raise refused(f"{self.name} works only with {served}, not with {_GIVEN[kind]}")
        return name

    # --- what families override ---

    def check_job(self, kind: JobKind, brought: Collection[str]) -> None:  # noqa: ARG002
        """
        Args:
            brought: the names of the parts that the source brings.

        Raises:
            NotServed: a job of ``kind`` cannot be done with them; called before anything is loaded.
        """
        self.pipeline_class(kind)

    def fits(self, sections: Iterable[Section]) -> bool:
        """Whether a source of these sections is of this family; its denoiser is among them."""
        return any(self.parts[self.denoiser].fits(section) for section in sections)

    def check(self, parameters: Parameters) -> None:
        """
        Raises:
            JobImpossible: parameters that the family does not know; called before anything is loaded.
        """
        from studio_worker.engine.samplers import sampler

        sampler(parameters.sampler, flow=self.flow)
        given = parameters.flow_shift
        if self.flow and given is not None and self.shift(given) > MAX_FLOW_SHIFT:
            raise JobImpossible(
                f"flowShift {given:g} leaves every step at full noise: {self.name} takes its logarithm, "
                f"which is {math.log(MAX_FLOW_SHIFT):.1f} at most"
            )

    def assemble(self, components: dict[str, Any]) -> dict[str, Any]:
        """From parts, tokenizers and ``scheduler`` by name to what the pipelines' constructors take."""
        return components

    def schedule(self, shipped: Any, parts: Mapping[str, Any]) -> Any:  # noqa: ARG002
        """The scheduler for these loaded parts, from the one that the configuration ships."""
        return shipped

    def encode(self, pipeline: Any, parameters: Parameters) -> dict[str, Any]:
        """The prompts as arguments of the pipeline's call: embeddings, so that they can be kept."""
        raise NotImplementedError

    def guidance(self, parameters: Parameters) -> dict[str, Any]:
        """The guidance, where 1 means none, as arguments of the pipeline's call."""
        return {"guidance_scale": parameters.guidance}

    def prepare(self, pipeline: Any, parameters: Parameters) -> dict[str, Any]:  # noqa: ARG002
        """What else the pipeline needs for a job: done to it here, or returned as arguments of its call."""
        return {}

    def strength(self, parameters: Parameters) -> float:
        """diffusers' word for ``denoise``; at least one step is made."""
        return strength(parameters.steps, parameters.denoise or 1.0)

    def shift(self, flow_shift: float) -> float:
        """diffusers' word for ``flowShift``: ``s`` in ``s * t / (1 + (s - 1) * t)``, which most mean by it.

        FLUX.1's kin mean its logarithm (stable-diffusion.cpp's ``flux_time_shift``).
        """
        return flow_shift

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        """Whether the text encoder's window is too short for ``text``."""
        tokenizer = pipeline.tokenizer
        return bool(len(tokenizer(text, verbose=False).input_ids) > tokenizer.model_max_length)

    def latents(self, pipeline: Any, latents: Any, parameters: Parameters) -> Any:  # noqa: ARG002
        """What the pipeline gave with ``output_type="latent"`` as what the VAE's decoder takes."""
        config = pipeline.vae.config
        return latents / config.scaling_factor + (config.shift_factor or 0.0)


def unpacked(pipeline: Any, latents: Any, parameters: Parameters) -> Any:
    """The latents (batch, channels, height, width) of what FLUX.1 and those after it compute with: a row of
    squares, two by two latents each (black-forest-labs/flux, ``unpack`` in src/flux/sampling.py).
    """
    side = 2 * pipeline.vae_scale_factor
    squares = latents.unflatten(1, (parameters.height // side, parameters.width // side))
    return squares.unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def strength(steps: int, denoise: float) -> float:
    """What diffusers must be told so that ``denoise`` of ``steps`` steps run, but at least one.

    diffusers runs ``int(steps * strength)`` steps and fails where that is none.
    """
    # One and a half steps, so that rounding cannot make it none again.
    return denoise if int(steps * denoise) >= 1 else min(1.0, 1.5 / steps)


@dataclass(frozen=True)
class Blueprint:
    """A source understood: its family, and for each of the family's parts the section that brings it."""

    family: Family
    sections: Mapping[str, Section]


def refused(problem: str) -> NotServed:
    """A source that this worker cannot serve."""
    return NotServed(problem)
