"""Families whose denoiser is a UNet: Stable Diffusion 1.x, 2.x, XL and their inpainting models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studio_worker.engine.families import clip_prompts
from studio_worker.engine.families.family import Family, Seen
from studio_worker.engine.parameters import Parameters


@dataclass(frozen=True, kw_only=True)
class UNetFamily(Family):
    """CLIP reads the prompt; a UNet of nine channels also sees the mask and what it leaves of the picture."""

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
