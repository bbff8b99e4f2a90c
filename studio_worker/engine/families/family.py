"""What a model family is: the components it is made of, how each is told and renamed, and how it renders.

**How to add a family.**

1. Its configuration into ``engine/configs/NAME/``: one folder with a ``config.json`` for each component, the
   scheduler's, the tokenizer's; sources and licences into ``configs/README.md``.
2. A module beside this one with a :class:`Part` for each component and a :class:`Family` of them. A part says
   by which tensor names and shapes it is told (one :class:`Layout` for each published naming) and how those
   names become the library's. Take the shapes from the configuration, so that tests can make the same family
   tiny. Parts that several families use stand in ``parts/``; a file that two models share is loaded once.
   What its layers are called in LoRA files, where that is not the class's word, is a table
   (``parts/layer_names.py``).
3. What its pipeline wants differently from the defaults, by overriding :class:`Family`'s methods.
4. The family into ``FAMILIES`` (``identification.py``), its row out of ``recognised.py``; what its denoiser
   has in memory into ``engine/rendering/needs.py``: the tests measure it.
5. A tiny random model of it, in the published file layout, into ``gpu_check/tiny/`` and its ``families.py``:
   the suite's matrix and ``gpu-check`` make its pictures in every way.
6. Tests beside those of the others: pixel for pixel like the library's own pipeline; the full size on the
   meta device against published names and shapes; a place in ``STAND`` of ``memory/test_precision.py``, which
   says in what numbers it is sound.

Nothing here imports torch: library classes are named as text, and what handles tensors uses their methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from studio_worker.engine.families.component import Part, Tokenizer
from studio_worker.engine.files.sections import Section
from studio_worker.engine.parameters import MAX_FLOW_SHIFT, EngineDefaults, Parameters
from studio_worker.engine.sampling.levels import Diffusion, Flow, Scale
from studio_worker.engine.sampling.samplers import sampler
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


@dataclass(frozen=True)
class Seen:
    """What a denoiser sees besides prompts and noise.

    Args:
        height: of the latents, in cells; so is ``width``.
        reference: a reference picture's latents.
        masked: where the denoiser sees the mask: latents of the picture without what is masked.
        cells: of the same, the mask by cell, 0 and 1 (1, 1, height, width).
        pixels: of the same, the mask by pixel.
    """

    height: int
    width: int
    reference: Any = None
    masked: Any = None
    cells: Any = None
    pixels: Any = None


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
        flow: whether the denoiser predicts a flow (rectified flow), not noise.
        flow_shift: for flows: how their noise levels are shifted where the source says nothing, in the words
            of ``flowShift``. stable-diffusion.cpp's, whatever the picture's size.
        reference_pixels: in how many pixels at most the denoiser sees a reference picture.
        reference_multiple: what the sides of that are rounded to.
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
    flow_shift: float = 3.0
    reference_pixels: int = 0
    reference_multiple: int = 16
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

    @property
    def sees_mask(self) -> bool:
        """Whether the denoiser itself sees the mask, and what it leaves of the picture: then it paints within
        masks and nothing else.
        """
        return self.pipelines.text is None

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

    def check_source(self, denoiser: Section) -> None:
        """
        Raises:
            NotServed: the file of ``denoiser`` says of itself what the family does not do.
        """

    def check(self, parameters: Parameters) -> None:
        """
        Raises:
            JobImpossible: parameters that the family does not know; called before anything is loaded.
        """
        sampler(parameters.sampler)
        given = parameters.flow_shift
        if self.flow and given is not None and self.shift(given) > MAX_FLOW_SHIFT:
            raise JobImpossible(
                f"flowShift {given:g} leaves every step at full noise: {self.name} takes its logarithm, "
                f"which is {math.log(MAX_FLOW_SHIFT):.1f} at most"
            )

    def assemble(self, components: dict[str, Any]) -> dict[str, Any]:
        """From parts, tokenizers and ``scheduler`` by name to what the pipelines' constructors take."""
        return components

    def scale(self, shipped: Any, parts: Mapping[str, Any], flow_shift: float | None) -> Scale:  # noqa: ARG002
        """What the timesteps of these loaded parts stand for.

        Args:
            shipped: the scheduler that the configuration ships.
            flow_shift: the source's, in place of the family's own.
        """
        if self.flow:
            return Flow(self.shift(self.flow_shift if flow_shift is None else flow_shift))
        config = shipped.config
        return Diffusion(tuple(shipped.alphas_cumprod.tolist()), config.prediction_type == "v_prediction")

    def shift(self, flow_shift: float) -> float:
        """What ``flowShift`` stands for: ``s`` in ``s * t / (1 + (s - 1) * t)``, which most mean by it.

        FLUX.1's kin mean its logarithm (stable-diffusion.cpp's ``flux_time_shift``).
        """
        return flow_shift

    def encode(
        self, pipeline: Any, parameters: Parameters, device: Any, reference: Any = None
    ) -> dict[str, dict[str, Any]]:
        """The prompts as the denoiser reads them: ``positive``, and ``negative`` where it counts.

        Args:
            device: where the text encoders compute.
            reference: the reference picture of an edit.
        """
        texts = [parameters.prompt, *([parameters.negative_prompt] if parameters.guidance != 1 else [])]
        found = self.read(pipeline, texts, device, reference)
        return dict(zip(("positive", "negative"), found, strict=False))

    def read(self, pipeline: Any, texts: Sequence[str], device: Any, reference: Any) -> list[dict[str, Any]]:
        """What the text encoders make of each of ``texts``, the prompt first."""
        raise NotImplementedError

    def prepare(
        self,
        pipeline: Any,  # noqa: ARG002
        parameters: Parameters,  # noqa: ARG002
        seen: Seen,  # noqa: ARG002
        prompts: Mapping[str, dict[str, Any]],
        device: Any,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        """The denoiser's arguments that stay for all steps of a job, for each of ``prompts``: by default what
        was read.
        """
        return list(prompts.values())

    def predict(
        self, pipeline: Any, x: Any, timestep: float, arguments: Sequence[dict[str, Any]]
    ) -> list[Any]:
        """The denoiser's output for the latents ``x`` with each of ``arguments``.

        Args:
            timestep: 0 to 1000.
        """
        raise NotImplementedError

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        """Whether the text encoder's window is too short for ``text``."""
        raise NotImplementedError

    def encoded_picture(self, vae: Any, pixels: Any, draw: Callable[[Any], Any]) -> Any:
        """A picture (1, 3, height, width) of -1 to 1 as latents.

        Args:
            draw: draws noise as large as its argument.
        """
        spread = vae.encode(pixels).latent_dist
        mean = spread.mean.float()
        latents = mean + spread.std.float() * draw(mean)
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decodable(self, vae: Any, latents: Any) -> Any:
        """Latents as the VAE's decoder takes them."""
        return latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)

    def latent_channels(self, vae: Any) -> int:
        """How many numbers a cell of latents has."""
        channels: int = vae.config.latent_channels
        return channels


@dataclass(frozen=True)
class Blueprint:
    """A source understood: its family, and for each of the family's parts the section that brings it."""

    family: Family
    sections: Mapping[str, Section]


def refused(problem: str) -> NotServed:
    """A source that this worker cannot serve."""
    return NotServed(problem)
