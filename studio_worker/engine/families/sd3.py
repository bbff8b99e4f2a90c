"""Stable Diffusion 3: 3 medium, 3.5 large and large turbo, 3.5 medium. T5 reads long prompts and is optional.

3.5 large and its turbo have the same shapes, so that cliDefaults tell them apart (steps, cfgScale).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from studio_worker.engine.families.component import CONFIGS, Layout, Part, read_json
from studio_worker.engine.families.family import Family, Pipelines
from studio_worker.engine.families.parts import clip_prompts
from studio_worker.engine.families.parts.common import clip, clip_tokenizer, kl_vae
from studio_worker.engine.families.parts.layer_names import by_table
from studio_worker.engine.families.parts.packing import padded
from studio_worker.engine.families.parts.t5 import T5_TOKENIZER, is_t5_truncated, t5, t5_states
from studio_worker.engine.files.sections import Tensors
from studio_worker.engine.parameters import EngineDefaults, Parameters
from studio_worker.errors import JobImpossible

_T5_TOKENS = 256
"""How many of T5's tokens the models were trained with (their model cards)."""


@dataclass(frozen=True, kw_only=True)
class StableDiffusion3(Family):
    """Two CLIPs side by side, then T5's tokens, or zeros in their place, as the models were trained too."""

    def check(self, parameters: Parameters) -> None:
        super().check(parameters)
        config = read_json(self.parts["transformer"].config / "config.json")
        limit = config["pos_embed_max_size"] * config["patch_size"] * self.defaults.size_multiple
        if max(parameters.width, parameters.height) > limit:
            raise JobImpossible(
                f"{self.name} has places for pictures of {limit}x{limit} px at most, not for "
                f"{parameters.width}x{parameters.height} px"
            )

    def read(
        self,
        pipeline: Any,
        texts: Sequence[str],
        device: Any,
        reference: Any,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        import torch

        clips = [
            clip_prompts.embeddings([encoder], texts, device, layer=-2, max_windows=1)
            for encoder in (
                (pipeline.tokenizer, pipeline.text_encoder),
                (pipeline.tokenizer_2, pipeline.text_encoder_2),
            )
        ]
        width = pipeline.transformer.config.joint_attention_dim
        read = []
        for text, (left, pooled_left), (right, pooled_right) in zip(texts, *clips, strict=True):
            both = torch.cat([left, right], dim=-1)
            both = torch.nn.functional.pad(both, (0, width - both.shape[-1]))
            if pipeline.text_encoder_3 is None:
                long = both.new_zeros(1, _T5_TOKENS, width)
            else:
                long, _ = t5_states(pipeline.tokenizer_3, pipeline.text_encoder_3, text, _T5_TOKENS, device)
            read.append(
                {
                    "encoder_hidden_states": torch.cat([both, long.to(both.dtype)], dim=1),
                    "pooled_projections": torch.cat([pooled_left, pooled_right], dim=-1),
                }
            )
        return read

    def predict(
        self, pipeline: Any, x: Any, timestep: float, arguments: Sequence[dict[str, Any]]
    ) -> list[Any]:
        import torch

        height, width = x.shape[-2:]
        count = len(arguments)
        both = {name: torch.cat([each[name] for each in arguments]) for name in arguments[0]}
        outputs = pipeline.transformer(
            hidden_states=padded(x).to(both["encoder_hidden_states"].dtype).repeat(count, 1, 1, 1),
            timestep=torch.full((count,), timestep, device=x.device),
            return_dict=False,
            **both,
        )[0]
        return list(outputs[..., :height, :width].chunk(count))

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        if pipeline.text_encoder_3 is not None:
            return is_t5_truncated(pipeline.tokenizer_3, text, _T5_TOKENS)
        return clip_prompts.is_truncated(pipeline.tokenizer, text, max_windows=1)


_PUBLISHED: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    **{
        f"{theirs}_embedder.mlp.{number}": (f"time_text_embed.{ours}_embedder.linear_{1 + number // 2}",)
        for theirs, ours in (("t", "timestep"), ("y", "text"))
        for number in (0, 2)
    },
    **{
        f"joint_blocks.N.x_block.{attention}.{theirs}": tuple(
            f"transformer_blocks.N.{attention}.{each}" for each in ours
        )
        for attention in ("attn", "attn2")
        for theirs, ours in {
            "qkv": ("to_q", "to_k", "to_v"),
            "ln_q": ("norm_q",),
            "ln_k": ("norm_k",),
            "proj": ("to_out.0",),
        }.items()
    },
    **{
        f"joint_blocks.N.context_block.attn.{theirs}": tuple(
            f"transformer_blocks.N.attn.{each}" for each in ours
        )
        for theirs, ours in {
            "qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
            "ln_q": ("norm_added_q",),
            "ln_k": ("norm_added_k",),
            "proj": ("to_add_out",),
        }.items()
    },
    **{
        f"joint_blocks.N.{stream}_block.{theirs}": (f"transformer_blocks.N.{ours}",)
        for stream, norm, feed in (("x", "norm1", "ff"), ("context", "norm1_context", "ff_context"))
        for theirs, ours in {
            "adaLN_modulation.1": f"{norm}.linear",
            "mlp.fc1": f"{feed}.net.0.proj",
            "mlp.fc2": f"{feed}.net.2",
        }.items()
    },
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
"""Layers whose names in Stability AI's files are not diffusers' (https://github.com/Stability-AI/sd3.5,
mmditx.py).
"""


def transformer(kind: str, config_dir: Path) -> Part:
    """Stable Diffusion 3's denoiser, in Stability AI's naming (GGUF files keep it) and in diffusers'."""
    config = read_json(config_dir / "config.json")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = (width, config["in_channels"], config["patch_size"], config["patch_size"])
    positions = (1, config["pos_embed_max_size"] ** 2, width)
    context, last = (width, config["joint_attention_dim"]), config["num_layers"] - 1
    original: dict[str, tuple[int | None, ...]] = {
        "x_embedder.proj.weight": patch,
        "pos_embed": positions,
        "context_embedder.weight": context,
        f"joint_blocks.{last}.x_block.attn.qkv.weight": (3 * width, width),
    }
    diffusers: dict[str, tuple[int | None, ...]] = {
        "pos_embed.proj.weight": patch,
        "pos_embed.pos_embed": positions,
        "context_embedder.weight": context,
        f"transformer_blocks.{last}.attn.to_q.weight": (width, width),
    }
    # What 3.5 has and 3 has not, and what 3.5 medium alone has.
    only: list[tuple[bool, str, str, tuple[int, ...]]] = [
        (bool(config["qk_norm"]), "attn.ln_q.weight", "attn.norm_q.weight", (config["attention_head_dim"],)),
        (bool(config["dual_attention_layers"]), "attn2.proj.weight", "attn2.to_out.0.weight", (width, width)),
    ]
    absent: tuple[list[str], list[str]] = ([], [])
    for is_there, published, ours, shape in only:
        names = (f"joint_blocks.0.x_block.{published}", f"transformer_blocks.0.{ours}")
        for layout, missing, name in zip((original, diffusers), absent, names, strict=True):
            if is_there:
                layout[name] = shape
            else:
                missing.append(name)

    def from_stability(tensors: Tensors) -> Tensors:
        from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

        renamed: Tensors = convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors))
        return renamed

    return Part(
        kind=kind,
        role="diffusion-model",
        cls="diffusers.SD3Transformer2DModel",
        config=config_dir,
        layouts=(
            Layout("original", original, from_stability, tuple(absent[0])),
            Layout("diffusers", diffusers, without=tuple(absent[1])),
        ),
        # diffusers has scale before shift where nothing follows.
        other_names=by_table(
            _PUBLISHED,
            {"final_layer.adaLN_modulation.1", f"joint_blocks.{last}.context_block.adaLN_modulation.1"},
        ),
    )


def _clip_l(config_dir: Path) -> Part:
    """CLIP-L with its projection, which files made for FLUX.1 leave out.

    Stability AI's hold the identity there, and diffusers puts it there likewise
    (loaders/single_file_utils.py, create_diffusers_clip_model_from_ldm).
    """
    part = clip("text encoder CLIP-L", config_dir, projected=True)
    width = read_json(config_dir / "config.json")["projection_dim"]

    def completed(layout: Layout) -> Layout:
        def rename(tensors: Tensors) -> Tensors:
            import torch

            return {"text_projection.weight": torch.eye(width)} | layout.rename(tensors)

        return replace(layout, rename=rename)

    return replace(part, layouts=tuple(completed(layout) for layout in part.layouts))


@dataclass(frozen=True)
class Folders:
    """Where the configurations of one size of the family are."""

    transformer: Path
    text_encoder: Path = CONFIGS / "sd1" / "text_encoder"
    text_encoder_2: Path = CONFIGS / "sdxl" / "text_encoder_2"
    text_encoder_3: Path = CONFIGS / "t5" / "text_encoder"
    vae: Path = CONFIGS / "sd3" / "vae"
    tokenizer: Path = CONFIGS / "sd1" / "tokenizer"
    scheduler: Path = CONFIGS / "sd3" / "scheduler"


def sd3(name: str, folders: Folders) -> StableDiffusion3:
    """The family of the sizes that the configurations say."""
    return StableDiffusion3(
        name=name,
        parts={
            "transformer": transformer(f"{name} transformer", folders.transformer),
            "text_encoder": _clip_l(folders.text_encoder),
            "text_encoder_2": clip("text encoder CLIP-G", folders.text_encoder_2, projected=True),
            "text_encoder_3": t5("text encoder (T5-XXL)", folders.text_encoder_3),
            "vae": kl_vae("Stable Diffusion 3 VAE", folders.vae),
        },
        optional=frozenset({"text_encoder_3"}),
        tokenizers={
            "tokenizer": clip_tokenizer(folders.tokenizer, folders.text_encoder),
            # open_clip pads with the token of number 0.
            "tokenizer_2": clip_tokenizer(folders.tokenizer, folders.text_encoder_2, pad_token="!"),
            "tokenizer_3": T5_TOKENIZER,
        },
        scheduler=folders.scheduler,
        pipelines=Pipelines(
            text="StableDiffusion3Pipeline",
            image="StableDiffusion3Img2ImgPipeline",
            inpaint="StableDiffusion3InpaintPipeline",
        ),
        flow=True,
        halves=("bfloat16", "float16"),
        defaults=EngineDefaults(width=1024, height=1024, guidance=4.5, sampler="euler"),
    )


SD3_MEDIUM = sd3("sd3-medium", Folders(CONFIGS / "sd3" / "medium"))
SD35_LARGE = sd3("sd3.5-large", Folders(CONFIGS / "sd3" / "large-3.5"))
SD35_MEDIUM = sd3("sd3.5-medium", Folders(CONFIGS / "sd3" / "medium-3.5"))
SD3_FAMILIES = (SD35_LARGE, SD35_MEDIUM, SD3_MEDIUM)
