"""Z-Image and Z-Image-Turbo: a single-stream flow transformer, Qwen3-4B as text encoder, the FLUX.1 VAE.

Both have the same shapes, so that a source's cliDefaults tell them apart: steps, cfgScale and flowShift (3
for Turbo, which is the default here as in stable-diffusion.cpp; 6 for the base model).

What the transformer's tensors are called: ``all_x_embedder.2-1``, ``attention.to_q`` in diffusers' files;
``x_embedder``, ``attention.qkv`` (fused) in the original ones and in GGUF files, with or without
``model.diffusion_model.`` before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_worker.engine.families.component import CONFIGS, Layout, Part, Tokenizer, read_json
from studio_worker.engine.families.family import Family, Pipelines
from studio_worker.engine.families.parts.common import kl_vae
from studio_worker.engine.families.parts.layer_names import by_table
from studio_worker.engine.families.parts.packing import padded
from studio_worker.engine.families.qwen import QWEN_TOKENIZER, framed, language_states, qwen3
from studio_worker.engine.files.sections import Tensors
from studio_worker.engine.parameters import EngineDefaults
from studio_worker.engine.sampling.levels import TIMESTEPS

_ADALN_WIDTH = 256
"""How wide the timestep's embedding is at most (diffusers' ADALN_EMBED_DIM)."""

_BLOCK = 32
"""How many tokens of text are filled up together (diffusers' SEQ_MULTI_OF)."""


@dataclass(frozen=True, kw_only=True)
class ZImage(Family):
    """One language model's last but one hidden state conditions the transformer."""

    def read(
        self,
        pipeline: Any,
        texts: Sequence[str],
        device: Any,
        reference: Any,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        read = []
        for text in texts:
            ids, weights = _in_template(pipeline.tokenizer, text)
            window = _window(pipeline.transformer)
            states = language_states(pipeline.text_encoder, ids[:window], weights[:window], device, layer=-2)
            read.append({"cap_feats": states[0]})
        return read

    def predict(
        self, pipeline: Any, x: Any, timestep: float, arguments: Sequence[dict[str, Any]]
    ) -> list[Any]:
        import torch

        height, width = x.shape[-2:]
        count = len(arguments)
        prompts = [each["cap_feats"] for each in arguments]
        frame = padded(x).to(prompts[0].dtype)[0].unsqueeze(1)
        # It counts time upwards, from noise to picture, and predicts the other direction.
        time = torch.full((count,), 1 - timestep / TIMESTEPS, device=x.device)
        outputs = pipeline.transformer([frame] * count, time, prompts, return_dict=False)[0]
        return [-output[:, 0, :height, :width].unsqueeze(0) for output in outputs]

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        return len(_in_template(pipeline.tokenizer, text)[0]) > _window(pipeline.transformer)


def _window(transformer: Any) -> int:
    """How many tokens of text have places: whole blocks, after the first place and before the picture's."""
    places: int = transformer.config.axes_lens[0]
    return (places - 2) // _BLOCK * _BLOCK


def _in_template(tokenizer: Any, text: str) -> tuple[list[int], list[float]]:
    """The tokens of ``text`` within the model's chat template, and what they count."""
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": _PLACE}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,
    )
    before, _, after = template.partition(_PLACE)
    return framed(tokenizer, before, text, after)


_PLACE = "PROMPT"

_PUBLISHED = {
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    **{
        f"{block}.N.attention.{theirs}": tuple(f"{block}.N.attention.{each}" for each in ours)
        for block in ("layers", "noise_refiner", "context_refiner")
        for theirs, ours in {
            "qkv": ("to_q", "to_k", "to_v"),
            "out": ("to_out.0",),
            "q_norm": ("norm_q",),
            "k_norm": ("norm_k",),
        }.items()
    },
}
"""Layers whose names in the original files are not diffusers'."""


def z_image(
    name: str = "z-image",
    transformer: Path = CONFIGS / "z-image" / "transformer",
    text_encoder: Path = CONFIGS / "qwen3-4b",
    vae: Path = CONFIGS / "vae-16",
    tokenizer: Tokenizer = QWEN_TOKENIZER,
) -> ZImage:
    """The family of the sizes that the configurations say."""
    return ZImage(
        name=name,
        parts={
            "transformer": _transformer(f"{name} transformer", transformer),
            "text_encoder": qwen3("Qwen3-4B text encoder", text_encoder),
            "vae": kl_vae("16-channel VAE (ae.safetensors)", vae),
        },
        tokenizers={"tokenizer": tokenizer},
        scheduler=CONFIGS / "z-image" / "scheduler",
        pipelines=Pipelines(
            text="ZImagePipeline", image="ZImageImg2ImgPipeline", inpaint="ZImageInpaintPipeline"
        ),
        flow=True,
        halves=("bfloat16",),
        defaults=EngineDefaults(width=1024, height=1024, steps=8, guidance=1.0, sampler="euler"),
    )


def _transformer(kind: str, config_dir: Path) -> Part:
    config = read_json(config_dir / "config.json")
    dim, last = config["dim"], config["n_layers"] - 1
    patch = config["in_channels"] * config["all_patch_size"][0] ** 2
    common: dict[str, tuple[int | None, ...]] = {
        "cap_embedder.0.weight": (config["cap_feat_dim"],),
        "layers.0.adaLN_modulation.0.weight": (4 * dim, min(dim, _ADALN_WIDTH)),
    }

    def original(tensors: Tensors) -> Tensors:
        from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

        renamed: Tensors = convert_z_image_transformer_checkpoint_to_diffusers(tensors)
        return renamed

    return Part(
        kind=kind,
        role="diffusion-model",
        cls="diffusers.ZImageTransformer2DModel",
        config=config_dir,
        layouts=(
            Layout(
                "original",
                common
                | {
                    "x_embedder.weight": (dim, patch),
                    f"layers.{last}.attention.qkv.weight": (3 * dim, dim),
                },
                original,
            ),
            Layout(
                "diffusers",
                common
                | {
                    "all_x_embedder.2-1.weight": (dim, patch),
                    f"layers.{last}.attention.to_q.weight": (dim, dim),
                },
            ),
        ),
        other_names=by_table(_PUBLISHED),
    )


Z_IMAGE = z_image()
