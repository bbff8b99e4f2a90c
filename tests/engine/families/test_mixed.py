"""Denoisers in GGUF files of several quantisations at once, as they are published (``Q4_K_M`` and others).

The widths are multiples of 256, since a K-quantisation's blocks have so many numbers; what is computed is
compared with the very numbers that gguf's own decoder gives, read by the same family from safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFParameter

from studio_worker.engine.families import chroma, flux, qwen_image, sd3
from studio_worker.engine.families.component import Part
from studio_worker.engine.families.parts.common import unet
from studio_worker.engine.files.sections import read_sections
from studio_worker.engine.loading import load_part
from studio_worker.engine.memory.machine import weight_bytes
from studio_worker.gpu_check.tiny import compvis
from studio_worker.gpu_check.tiny.layouts import black_forest, stability
from studio_worker.gpu_check.tiny.quantised import write_gguf
from studio_worker.gpu_check.tiny.sd3 import sd3_config
from studio_worker.gpu_check.tiny.weights import Tensors, config, drawn, state
from tests.lab.quantising import dequantised, mixed

torch.set_num_threads(1)

WIDTH = 256
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A wide denoiser: its configuration, the family's part, its published names, and a call of it."""

    config: Mapping[str, Any]
    part: Callable[[str, Path], Part]
    published: Callable[[Tensors], Mapping[str, torch.Tensor]]
    architecture: str
    call: Callable[[], dict[str, Any]]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


TIME = torch.tensor([0.5])
PACKED = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": [16, 56, 56],
}


def packed() -> dict[str, Any]:
    """Twelve patches of a picture and five words."""
    return {
        "hidden_states": numbers(1, 12, 64),
        "encoder_hidden_states": numbers(1, 5, WIDTH),
        "timestep": TIME,
        "img_ids": torch.arange(36.0).reshape(12, 3) % 4,
        "txt_ids": torch.zeros(5, 3),
    }


CASES = {
    "flux": Case(
        PACKED
        | {"_class_name": "FluxTransformer2DModel", "pooled_projection_dim": WIDTH, "guidance_embeds": True},
        flux.transformer,
        black_forest,
        "flux",
        lambda: packed() | {"pooled_projections": numbers(1, WIDTH), "guidance": torch.tensor([3.5])},
    ),
    "chroma": Case(
        PACKED
        | {
            "_class_name": "ChromaTransformer2DModel",
            "approximator_num_channels": 64,
            "approximator_hidden_dim": WIDTH,
            "approximator_layers": 2,
        },
        chroma.transformer,
        black_forest,
        "chroma",
        packed,
    ),
    "sd3.5": Case(
        sd3_config(sd3.SD35_MEDIUM)
        | {
            "attention_head_dim": 64,
            "num_attention_heads": 4,
            "caption_projection_dim": WIDTH,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
        },
        sd3.transformer,
        stability,
        "sd3",
        lambda: {
            "hidden_states": numbers(1, 16, 8, 8),
            "encoder_hidden_states": numbers(1, 5, WIDTH),
            "pooled_projections": numbers(1, WIDTH),
            "timestep": TIME,
        },
    ),
    "qwen-image": Case(
        {
            "_class_name": "QwenImageTransformer2DModel",
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 128,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": [16, 56, 56],
        },
        qwen_image.transformer,
        dict,
        "qwen_image",
        lambda: {
            "hidden_states": numbers(1, 12, 64),
            "encoder_hidden_states": numbers(1, 5, WIDTH),
            "encoder_hidden_states_mask": torch.ones(1, 5),
            "timestep": TIME,
            "img_shapes": [[(1, 3, 4)]],
        },
    ),
    "sdxl": Case(
        {
            "_class_name": "UNet2DConditionModel",
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [WIDTH, WIDTH],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 1,
            "use_linear_projection": True,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": [4, 4],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": WIDTH + 6 * 32,
        },
        unet,
        compvis.unet,
        "sdxl",
        lambda: {
            "sample": numbers(1, 4, 8, 8),
            "timestep": 500,
            "encoder_hidden_states": numbers(1, 5, WIDTH),
            "added_cond_kwargs": {"text_embeds": numbers(1, WIDTH), "time_ids": torch.full((1, 6), 64.0)},
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_mixed_quantisations_compute_with_the_numbers_they_decode_to(name: str, tmp_path: Path) -> None:
    """A denoiser whose layers have several quantisations, some of them fused in the file, computes what it
    does with the very numbers, to half a percent, and its matrices stay quantised in memory.
    """
    case = CASES[name]
    cls = getattr(diffusers, case.config["_class_name"])
    tensors = case.published(state(drawn(cls.from_config(case.config), 1)))
    file = write_gguf(tmp_path / "dit.gguf", "diffusion-model", tensors, case.architecture, mixed)
    part = case.part(name, config(tmp_path, case.config))
    (section,), (reference,) = read_sections([file]), read_sections([dequantised(file)])
    assert {"Q4_K", "Q5_K", "Q6_K", "Q8_0", "F32"} < set(section.checkpoint.types.values())
    quantised, plain = (load_part(part, each, CPU, torch.float32) for each in (section, reference))
    kinds = {each.quant_type.name for each in quantised.parameters() if isinstance(each, GGUFParameter)}
    assert kinds >= {"Q4_K", "Q5_K", "Q6_K", "Q8_0"}
    assert weight_bytes(quantised) == pytest.approx(section.size_bytes(4), rel=0.005)
    found, meant = (model(**case.call(), return_dict=False)[0] for model in (quantised, plain))
    assert meant.std() > 0.01
    assert (found - meant).abs().mean() < 5e-3 * meant.abs().mean()
