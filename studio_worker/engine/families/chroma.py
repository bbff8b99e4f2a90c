"""Chroma: FLUX.1 schnell with its modulation computed by one small network, and true guidance; T5 alone reads
the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_worker.engine.families.component import CONFIGS, Layout, Part, read_json
from studio_worker.engine.families.family import Family, Pipelines, Seen
from studio_worker.engine.families.flux import predict_packed
from studio_worker.engine.families.parts.black_forest import black_forest_names, from_black_forest
from studio_worker.engine.families.parts.common import kl_vae
from studio_worker.engine.families.parts.packing import places
from studio_worker.engine.families.parts.t5 import T5_TOKENIZER, is_t5_truncated, t5, t5_states
from studio_worker.engine.parameters import EngineDefaults, Parameters

_PROMPT_TOKENS = 512
"""The pipelines' window."""


@dataclass(frozen=True, kw_only=True)
class Chroma(Family):
    """T5's tokens, of whose padding all but one are masked out; packed latents."""

    def read(
        self,
        pipeline: Any,
        texts: Sequence[str],
        device: Any,
        reference: Any,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        read = []
        for text in texts:
            states, filled = t5_states(
                pipeline.tokenizer, pipeline.text_encoder, text, _PROMPT_TOKENS, device, masked=True
            )
            read.append({"encoder_hidden_states": states, "filled": filled})
        return read

    def prepare(
        self,
        pipeline: Any,  # noqa: ARG002
        parameters: Parameters,  # noqa: ARG002
        seen: Seen,
        prompts: Mapping[str, dict[str, Any]],
        device: Any,
    ) -> list[dict[str, Any]]:
        import torch

        img_ids = places(seen.height, seen.width, 0, device)
        arguments = []
        for each in prompts.values():
            states, filled = each["encoder_hidden_states"], each["filled"]
            attended = torch.ones(1, states.shape[1] + len(img_ids), dtype=states.dtype, device=device)
            attended[:, filled + 1 : states.shape[1]] = 0  # one token of padding is seen
            arguments.append(
                {
                    "encoder_hidden_states": states,
                    "attention_mask": attended,
                    "txt_ids": torch.zeros(states.shape[1], 3, device=device),
                    "img_ids": img_ids,
                }
            )
        return arguments

    def predict(
        self, pipeline: Any, x: Any, timestep: float, arguments: Sequence[dict[str, Any]]
    ) -> list[Any]:
        return predict_packed(pipeline.transformer, x, timestep, arguments)

    def shift(self, flow_shift: float) -> float:
        return math.exp(flow_shift)

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        return is_t5_truncated(pipeline.tokenizer, text, _PROMPT_TOKENS)


def _keep_guidance_still(denoiser: Any) -> None:
    """It has no guidance, which diffusers embeds on the CPU at every step: the device would be waited for."""
    import torch

    from studio_worker.engine.families.parts.still import keep_still

    keep_still(denoiser.time_text_embed, "guidance_proj", torch.zeros(1, dtype=torch.long))


def transformer(kind: str, config_dir: Path) -> Part:
    """Chroma's denoiser, in its own naming, which is FLUX.1's (GGUF files keep it), and in diffusers'."""
    config = read_json(config_dir / "config.json")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    guidance = (config["approximator_hidden_dim"], config["approximator_num_channels"])
    reads, context = (width, config["in_channels"]), (width, config["joint_attention_dim"])
    layers, single = config["num_layers"] - 1, config["num_single_layers"] - 1
    told = {"distilled_guidance_layer.in_proj.weight": guidance}
    original = told | {
        "img_in.weight": reads,
        "txt_in.weight": context,
        f"double_blocks.{layers}.img_attn.qkv.weight": (3 * width, width),
        f"single_blocks.{single}.linear2.weight": (width, 5 * width),
    }
    diffusers = told | {
        "x_embedder.weight": reads,
        "context_embedder.weight": context,
        f"transformer_blocks.{layers}.attn.to_q.weight": (width, width),
        f"single_transformer_blocks.{single}.proj_out.weight": (width, 5 * width),
    }
    return Part(
        kind=kind,
        role="diffusion-model",
        cls="diffusers.ChromaTransformer2DModel",
        config=config_dir,
        layouts=(Layout("original", original, from_black_forest), Layout("diffusers", diffusers)),
        finish=_keep_guidance_still,
        other_names=black_forest_names,
    )


def chroma(
    name: str = "chroma",
    denoiser: Path = CONFIGS / "chroma" / "transformer",
    text_encoder: Path = CONFIGS / "t5" / "text_encoder",
    vae: Path = CONFIGS / "vae-16",
) -> Chroma:
    """The family of the sizes that the configurations say."""
    return Chroma(
        name=name,
        parts={
            "transformer": transformer(f"{name} transformer", denoiser),
            "text_encoder": t5("text encoder (T5-XXL)", text_encoder),
            "vae": kl_vae("16-channel VAE (ae.safetensors)", vae),
        },
        tokenizers={"tokenizer": T5_TOKENIZER},
        scheduler=CONFIGS / "flux1" / "scheduler",
        pipelines=Pipelines(
            text="ChromaPipeline", image="ChromaImg2ImgPipeline", inpaint="ChromaInpaintPipeline"
        ),
        flow=True,
        flow_shift=1.0,  # stable-diffusion.cpp's
        halves=("bfloat16", "float16"),
        defaults=EngineDefaults(width=1024, height=1024, guidance=4.0, sampler="euler"),
    )


CHROMA = chroma()
