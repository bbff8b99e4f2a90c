"""Families whose denoiser is a UNet: Stable Diffusion 1.x, 2.x, XL and their inpainting models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studio_worker.engine.families.component import read_json
from studio_worker.engine.families.family import Family, Seen, refused
from studio_worker.engine.families.parts import clip_prompts
from studio_worker.engine.files.sections import Section
from studio_worker.engine.parameters import Parameters

_PREDICTION = ("modelspec.prediction_type", "modelspec.predict_key")
"""Where the metadata say what a model predicts: in Stability AI's ModelSpec (1.0.1), and as some wrote it."""

_NOISE = {"epsilon", "eps"}
_V = {"v", "v_prediction", "v-prediction", "vpred", "v_pred"}

_ZERO_SNR = "ss_zero_terminal_snr"
"""Where kohya's trainers say it."""


@dataclass(frozen=True, kw_only=True)
class UNetFamily(Family):
    """CLIP reads the prompt; a UNet of nine channels also sees the mask and what it leaves of the picture.

    Args:
        markers: names of tensors that tell this variant, anywhere in the source; a file's metadata may say
            the same.
    """

    markers: frozenset[str] = frozenset()

    def fits(self, sections: Iterable[Section]) -> bool:
        sections = list(sections)
        found = {name for section in sections for name in section.shapes}
        part = self.parts[self.denoiser]
        return any(self.markers <= found | _told(each) for each in sections if part.fits(each))

    def check_source(self, denoiser: Section) -> None:
        said = predicts(denoiser)
        if said is None or said in _NOISE or (said in _V and self.predicts_v):
            return
        raise refused(f"{denoiser} says that it predicts {said[:40]!r}, which is not served for {self.name}")

    @property
    def predicts_v(self) -> bool:
        """Whether models of this kind may predict v."""
        config = read_json(self.scheduler / "scheduler_config.json")
        return bool(config.get("prediction_type") == "v_prediction")

    def prepare(
        self,
        pipeline: Any,  # noqa: ARG002
        parameters: Parameters,  # noqa: ARG002
        seen: Seen,
        prompts: Mapping[str, dict[str, Any]],
        device: Any,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        arguments = [dict(each) for each in prompts.values()]
        if seen.masked is not None:
            import torch

            for index, each in enumerate(arguments):
                # The negative prompt sees nothing of the picture, as in stable-diffusion.cpp.
                masked = torch.zeros_like(seen.masked) if index else seen.masked
                each["beside"] = torch.cat([seen.cells, masked], dim=1)
        return arguments

    def predict(
        self, pipeline: Any, x: Any, timestep: float, arguments: Sequence[dict[str, Any]]
    ) -> list[Any]:
        import torch

        context = torch.cat([each["prompt_embeds"] for each in arguments])
        inputs = [
            torch.cat([x, *([each["beside"]] if "beside" in each else [])], dim=1) for each in arguments
        ]
        outputs = pipeline.unet(
            torch.cat(inputs).to(context.dtype),
            torch.full((), timestep, device=x.device),
            encoder_hidden_states=context,
            added_cond_kwargs=self.added(arguments),
            return_dict=False,
        )[0]
        return list(outputs.chunk(len(arguments)))

    def added(self, arguments: Sequence[dict[str, Any]]) -> dict[str, Any] | None:  # noqa: ARG002
        """What else the UNet is told."""
        return None

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        return clip_prompts.is_truncated(pipeline.tokenizer, text)


def predicts(section: Section) -> str | None:
    """What the file of ``section`` says that its model predicts; ``None`` where it says nothing."""
    stated = section.checkpoint.stated
    return next((str(stated[name]).lower() for name in _PREDICTION if name in stated), None)


def _told(section: Section) -> set[str]:
    """The markers that the metadata of the file of ``section`` amount to."""
    if predicts(section) not in _V:
        return set()
    is_zero = str(section.checkpoint.stated.get(_ZERO_SNR)).lower() == "true"
    return {"v_pred", "ztsnr"} if is_zero else {"v_pred"}
