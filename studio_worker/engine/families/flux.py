"""FLUX.1: dev, schnell and Fill; and Kontext, whose weights are shaped like dev's: an edit is what tells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from studio_worker.engine.families.component import CONFIGS, Layout, Part, read_json
from studio_worker.engine.families.family import Family, Pipelines, Seen
from studio_worker.engine.families.parts import clip_prompts
from studio_worker.engine.families.parts.black_forest import black_forest_names, from_black_forest
from studio_worker.engine.families.parts.common import clip, clip_tokenizer, kl_vae
from studio_worker.engine.families.parts.packing import packed, places, unpacked
from studio_worker.engine.families.parts.t5 import T5_TOKENIZER, is_t5_truncated, t5, t5_states
from studio_worker.engine.parameters import EngineDefaults, Parameters
from studio_worker.engine.sampling.levels import TIMESTEPS

DISTILLED_GUIDANCE = 3.5
"""What dev and Kontext are told their guidance is (their model cards, and stable-diffusion.cpp's default)."""

FILL_GUIDANCE = 30.0
"""What Fill is told (its model card)."""

DEV_SHIFT, SCHNELL_SHIFT = 1.15, 1.0
"""stable-diffusion.cpp's flowShift for models that are told a guidance, and for those that are not."""

REFERENCE_PIXELS = 1024 * 1024
"""What Kontext sees of a reference picture at most; of a smaller picture's reference no more than that is."""


@dataclass(frozen=True, kw_only=True)
class Flux(Family):
    """CLIP's pooled prompt and T5's tokens; packed latents; guidance that the model was distilled with.

    A task's cfgScale is true classifier-free guidance, as in stable-diffusion.cpp: 1 means none, and takes
    half the time. The distilled guidance is the model card's.

    Args:
        distilled_guidance: what the model is told.
        prompt_tokens: how many of T5's tokens the model was trained with.
    """

    flow: bool = True
    halves: tuple[str, ...] = ("bfloat16", "float16")
    distilled_guidance: float = DISTILLED_GUIDANCE
    prompt_tokens: int = 512

    def read(
        self,
        pipeline: Any,
        texts: Sequence[str],
        device: Any,
        reference: Any,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        clips = [(pipeline.tokenizer, pipeline.text_encoder)]
        pooled = [each for _, each in clip_prompts.embeddings(clips, texts, device, max_windows=1)]
        read = []
        for text, each in zip(texts, pooled, strict=True):
            states, _ = t5_states(
                pipeline.tokenizer_2, pipeline.text_encoder_2, text, self.prompt_tokens, device
            )
            read.append({"encoder_hidden_states": states, "pooled_projections": each})
        return read

    def prepare(
        self,
        pipeline: Any,
        parameters: Parameters,  # noqa: ARG002
        seen: Seen,
        prompts: Mapping[str, dict[str, Any]],
        device: Any,
    ) -> list[dict[str, Any]]:
        import torch

        common: dict[str, Any] = {"img_ids": places(seen.height, seen.width, 0, device)}
        if pipeline.transformer.config.guidance_embeds:
            common["guidance"] = torch.full((1,), self.distilled_guidance, device=device)
        if seen.reference is not None:
            common["reference"] = packed(seen.reference)
            height, width = seen.reference.shape[-2:]
            beside = places(height, width, 1, device)
            common["img_ids"] = torch.cat([common["img_ids"], beside])
        arguments = []
        for index, each in enumerate(prompts.values()):
            words = torch.zeros(each["encoder_hidden_states"].shape[1], 3, device=device)
            more = {"txt_ids": words}
            if seen.masked is not None:
                # The negative prompt sees nothing of the picture, as in stable-diffusion.cpp.
                masked = torch.zeros_like(seen.masked) if index else seen.masked
                more["beside"] = torch.cat([packed(masked), packed(_by_cell(seen))], dim=-1)
            arguments.append(each | common | more)
        return arguments

    def predict(
        self, pipeline: Any, x: Any, timestep: float, arguments: Sequence[dict[str, Any]]
    ) -> list[Any]:
        return predict_packed(pipeline.transformer, x, timestep, arguments)

    def shift(self, flow_shift: float) -> float:
        return math.exp(flow_shift)

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        return is_t5_truncated(pipeline.tokenizer_2, text, self.prompt_tokens)


@dataclass(frozen=True, kw_only=True)
class Fill(Flux):
    """FLUX.1 Fill: paints within a mask and nothing else, with more guidance built in."""

    halves: tuple[str, ...] = ("bfloat16",)
    distilled_guidance: float = FILL_GUIDANCE


def predict_packed(
    transformer: Any, x: Any, timestep: float, arguments: Sequence[dict[str, Any]]
) -> list[Any]:
    """The outputs of a transformer that reads packed latents, for each of ``arguments``.

    Of these, ``reference`` are further tokens, and ``beside`` what stands in a row with each token.
    """
    import torch

    height, width = x.shape[-2:]
    own = packed(x).to(arguments[0]["encoder_hidden_states"].dtype)
    outputs = []
    for each in arguments:
        given = dict(each)
        tokens = own
        if "beside" in given:
            tokens = torch.cat([tokens, given.pop("beside").to(own.dtype)], dim=-1)
        if "reference" in given:
            tokens = torch.cat([tokens, given.pop("reference").to(own.dtype)], dim=1)
        output = transformer(
            hidden_states=tokens,
            timestep=torch.full((1,), timestep / TIMESTEPS, device=x.device),
            return_dict=False,
            **given,
        )[0]
        outputs.append(unpacked(output[:, : own.shape[1]], height, width))
    return outputs


def _by_cell(seen: Seen) -> Any:
    """The mask's pixels as latents: those of each cell are its channels."""
    import torch

    return torch.nn.functional.pixel_unshuffle(seen.pixels, seen.pixels.shape[-1] // seen.width)


def transformer(kind: str, config_dir: Path) -> Part:
    """FLUX.1's denoiser, in Black Forest Labs' naming (GGUF files keep it) and in diffusers'."""
    config = read_json(config_dir / "config.json")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    reads, layers, single = config["in_channels"], config["num_layers"], config["num_single_layers"]
    context, pooled = (width, config["joint_attention_dim"]), (width, config["pooled_projection_dim"])
    modulation = (6 * width, width)
    original = {
        "img_in.weight": (width, reads),
        "txt_in.weight": context,
        "vector_in.in_layer.weight": pooled,
        f"double_blocks.{layers - 1}.img_mod.lin.weight": modulation,
        f"single_blocks.{single - 1}.modulation.lin.weight": (3 * width, width),
    }
    diffusers = {
        "x_embedder.weight": (width, reads),
        "context_embedder.weight": context,
        "time_text_embed.text_embedder.linear_1.weight": pooled,
        f"transformer_blocks.{layers - 1}.norm1.linear.weight": modulation,
        f"single_transformer_blocks.{single - 1}.norm.linear.weight": (3 * width, width),
    }
    told = {
        "original": "guidance_in.in_layer.weight",
        "diffusers": "time_text_embed.guidance_embedder.linear_1.weight",
    }
    absent = {layout: () if config["guidance_embeds"] else (name,) for layout, name in told.items()}
    if config["guidance_embeds"]:
        original[told["original"]] = diffusers[told["diffusers"]] = (width, None)
    return Part(
        kind=kind,
        role="diffusion-model",
        cls="diffusers.FluxTransformer2DModel",
        config=config_dir,
        layouts=(
            Layout("original", original, from_black_forest, absent["original"]),
            Layout("diffusers", diffusers, without=absent["diffusers"]),
        ),
        other_names=black_forest_names,
    )


_PIPELINES = Pipelines(
    text="FluxPipeline",
    image="FluxImg2ImgPipeline",
    inpaint="FluxInpaintPipeline",
    edit="FluxKontextPipeline",
)
_DEFAULTS = EngineDefaults(width=1024, height=1024, guidance=1.0, sampler="euler")


def flux(name: str, folders: Mapping[str, Path], cls: type[Flux] = Flux, **options: Any) -> Flux:
    """A family of FLUX.1 models.

    Args:
        name: what operators call it.
        folders: of the configurations of its parts, scheduler and tokenizers, by the pipelines' names.
        options: what of :class:`Flux` is not as dev's.
    """
    guided = read_json(folders["transformer"] / "config.json")["guidance_embeds"]
    return cls(
        **{
            "name": name,
            "parts": {
                "transformer": transformer(f"{name} transformer", folders["transformer"]),
                "text_encoder": clip("text encoder (CLIP-L)", folders["text_encoder"]),
                "text_encoder_2": t5("text encoder (T5-XXL)", folders["text_encoder_2"]),
                "vae": kl_vae("16-channel VAE (ae.safetensors)", folders["vae"]),
            },
            "tokenizers": {
                "tokenizer": clip_tokenizer(folders["tokenizer"], folders["text_encoder"]),
                "tokenizer_2": T5_TOKENIZER,
            },
            "scheduler": folders["scheduler"],
            "pipelines": _PIPELINES,
            "reference_pixels": REFERENCE_PIXELS,
            "flow_shift": DEV_SHIFT if guided else SCHNELL_SHIFT,
            "defaults": _DEFAULTS,
            **options,
        }
    )


FOLDERS: Mapping[str, Path] = {
    "transformer": CONFIGS / "flux1" / "dev",
    "scheduler": CONFIGS / "flux1" / "scheduler",
    "text_encoder": CONFIGS / "sd1" / "text_encoder",
    "text_encoder_2": CONFIGS / "t5" / "text_encoder",
    "tokenizer": CONFIGS / "sd1" / "tokenizer",
    "vae": CONFIGS / "vae-16",
}
"""dev's; CLIP-L is Stable Diffusion 1's text encoder."""

FLUX_DEV = flux("flux1-dev", FOLDERS)
FLUX_SCHNELL = flux(
    "flux1-schnell",
    {
        **FOLDERS,
        "transformer": CONFIGS / "flux1" / "schnell",
        "scheduler": CONFIGS / "flux1" / "scheduler_schnell",
    },
    pipelines=replace(_PIPELINES, edit=None),
    prompt_tokens=256,
)
FLUX_FILL = flux(
    "flux1-fill",
    {**FOLDERS, "transformer": CONFIGS / "flux1" / "fill"},
    Fill,
    pipelines=Pipelines(text=None, inpaint="FluxFillPipeline"),
)
FLUX_FAMILIES = (FLUX_DEV, FLUX_SCHNELL, FLUX_FILL)
