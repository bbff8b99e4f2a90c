"""What a picture needs of a device's memory, told from its files' headers and the models' configurations.

Rules without torch, so that they can be asked before a job is accepted. Figures of what lives beside weights
were measured on the meta device with the libraries' own code, and its test measures them anew: every tensor
that is alive at the peak, attention fused. What kernels take for themselves (workspaces of convolutions, say)
is in none of them; it is learnt from pictures that were made (peaks.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from studio_worker.engine.families.component import read_json
from studio_worker.engine.families.family import Blueprint, Family, JobKind
from studio_worker.engine.files.sections import Section
from studio_worker.engine.loras.files import read_lora
from studio_worker.engine.memory.placement import Footprint
from studio_worker.engine.memory.precision import SIZE_BYTES
from studio_worker.models import LocalFile


class _Maps(NamedTuple):
    """How many feature maps of a transformer's width are alive at its peak.

    Attributes:
        picture: for each token of the picture.
        text: for each token of the prompt, its embeddings included.
        tokens: of a prompt, with what is put around it: what T5 always has, and more than most prompts have.
        both: whether a prompt and its negative one are computed at once.
        masks: whether it makes a mask of all tokens by all tokens.
    """

    picture: float
    text: float
    tokens: int
    both: bool = False
    masks: bool = False


_TRANSFORMERS = {
    "diffusers.FluxTransformer2DModel": _Maps(17.5, 20.0, 512),
    "diffusers.ChromaTransformer2DModel": _Maps(16.5, 20.0, 512, masks=True),
    "diffusers.SD3Transformer2DModel": _Maps(13.3, 8.6, 333, both=True),
    "diffusers.ZImageTransformer2DModel": _Maps(16.1, 16.6, 512, both=True),
    "diffusers.QwenImageTransformer2DModel": _Maps(17.3, 9.0, 512),
}
_SECOND_ATTENTION = 2.0
"""Further maps of the picture where a transformer has ``dual_attention_layers``."""

_PROMPT_MAPS = 3
"""What of the prompts is there until the picture is decoded, likewise."""

_PATCH = 2
"""Along each side of a token, in pixels of the latents, for all of these transformers."""

_UNET_MAPS, _UNET_MAPS_A_LAYER, _UNET_MAPS_ATTENDING = 7.8, 4.1, 26.1
"""Likewise for a level of a UNet, in its own width: without attention, for each of its layers (they are kept
for the way up), and with attention."""

_CLIP_TOKENS = 4 * 77
"""Windows of CLIP that a prompt has, and some more than most prompts do."""

_CLIP_MAPS = 3
"""How many times a UNet has the embeddings of a prompt."""

_READERS = {"CLIP": (18, _CLIP_TOKENS), "T5": (26, 512)}
_READS = (22, 1400)
"""What a text encoder has beside its weights: how many maps of its own width for each token (T5's attention
is not fused), and how many tokens it reads at a time (Qwen a small picture, too).
"""

_PICTURE_COPIES = 16
"""Bytes for each pixel of a reference picture while an edit works: it and what it was made from, in single
precision."""

UNPACKING = {
    "IQ4_NL": 12.0,
    "IQ4_XS": 12.3,
    "BF16": 8.0,
    "Q8_0": 4.0,
    "Q5_1": 10.0,
    "Q5_0": 10.0,
    "Q4_1": 5.0,
    "Q4_0": 4.0,
    "Q6_K": 5.2,
    "Q5_K": 7.2,
    "Q4_K": 5.2,
    "Q3_K": 5.4,
    "Q2_K": 5.3,
}
"""Bytes for each weight that are alive for a moment while a matrix of GGUF blocks is multiplied out, the
numbers that it becomes among them; for numbers of two bytes."""


def footprint(
    blueprint: Blueprint,
    computed_in: str,
    pixels: int,
    *,
    kind: JobKind = "text",
    guided: bool = True,
    loras: Sequence[LocalFile] = (),
) -> Footprint:
    """What a picture of ``pixels`` of this model needs.

    Args:
        computed_in: torch's name of the type of its plain weights (precision.py).
        guided: whether there is a negative prompt to compute too.
        loras: the files of the LoRAs that are brought into it.

    Raises:
        JobError: a LoRA's file is damaged, or none.
    """
    family, itemsize = blueprint.family, SIZE_BYTES[computed_in]
    sections = blueprint.sections
    weights = {name: section.size_bytes(itemsize) for name, section in sections.items()}
    # A VAE may decode in wider numbers than its own, which are not those that it would be unpacked to.
    plain = {n: section.size_bytes(itemsize, unpacked=True) for n, section in sections.items() if n != "vae"}
    vae = _Vae(family, weights.get("vae", 0), computed_in)
    seen = min(family.reference_pixels, pixels) if kind == "edit" else 0
    copies = _PICTURE_COPIES * seen
    return Footprint(
        weights=weights,
        denoiser=family.denoiser,
        vae="vae",
        denoising=_denoising(family, pixels + seen, itemsize, guided=guided) + copies,
        decoding=max(vae.decoding(pixels), vae.encoding(seen) + copies) + _prompts(family, itemsize),
        tile=vae.in_tiles(max(pixels, seen)) + _prompts(family, itemsize),
        reading={
            name: _reading(family, name, itemsize) for name in weights if name not in {family.denoiser, "vae"}
        },
        layers={name: section.largest_bytes(2, itemsize) for name, section in sections.items()},
        unpacking={name: _unpacking(section, itemsize) for name, section in sections.items()},
        unpacked={name: size for name, size in plain.items() if size > weights[name]},
        loras=sum(read_lora(lora).size_bytes(itemsize) for lora in loras),
        model=(
            tuple(section.content for section in sections.values()),
            tuple(lora.content for lora in loras),
            (computed_in, kind, guided),
        ),
        pixels=pixels,
    )


def _config(family: Family, part: str) -> dict[str, Any]:
    return read_json(family.parts[part].config / "config.json") if part in family.parts else {}


class _Vae:
    """What a VAE has in memory beside its weights.

    Args:
        size_bytes: of its weights.
    """

    def __init__(self, family: Family, size_bytes: int, computed_in: str) -> None:
        self._config = _config(family, "vae")
        # In half precision many overflow, so that they decode in single precision, in a wider copy.
        is_widened = computed_in == "float16"
        self._itemsize = 4 if is_widened else SIZE_BYTES[computed_in]
        self._copy = size_bytes if is_widened else 0
        if "base_dim" in self._config:  # of a video: AutoencoderKLQwenImage
            self._decodes, self._encodes = (maps * int(self._config["base_dim"]) for maps in (18, 10))
            self._tile = 256
        else:  # AutoencoderKL: the last block but one and the last are the widest at full size
            last, before = (*self._config.get("block_out_channels", (128, 256)), 256)[:2]
            self._decodes, self._encodes = max(3 * before, before + 4 * last), 5 * last
            self._tile = int(self._config.get("sample_size") or 512)

    @property
    def reduction(self) -> int:
        """Pixels of the picture to one of the latents, along each side."""
        levels = self._config.get("block_out_channels") or self._config.get("dim_mult") or [1] * 4
        return int(2 ** (len(levels) - 1))

    def decoding(self, pixels: int) -> int:
        return self._decodes * self._itemsize * pixels + self._copy

    def encoding(self, pixels: int) -> int:
        return self._encodes * self._itemsize * pixels + self._copy

    def in_tiles(self, pixels: int) -> int:
        """Decoding piece by piece: the largest tile, and the picture twice, in pieces and put together."""
        return self.decoding(min(pixels, self._tile**2)) + 2 * 3 * 4 * pixels


def _denoising(family: Family, pixels: int, itemsize: int, *, guided: bool) -> int:
    config, cls = _config(family, family.denoiser), family.parts[family.denoiser].cls
    maps = _TRANSFORMERS.get(cls)
    latents = pixels / _Vae(family, 0, "float32").reduction ** 2
    if maps is None:
        assert cls == "diffusers.UNet2DConditionModel", f"_TRANSFORMERS says nothing of {cls}"
        plain = _UNET_MAPS + _UNET_MAPS_A_LAYER * config["layers_per_block"]
        levels = enumerate(zip(config["block_out_channels"], config["down_block_types"], strict=True))
        widest = max(
            (_UNET_MAPS_ATTENDING if kind.startswith("CrossAttn") else plain) * width / 4**level
            for level, (width, kind) in levels
        )
        prompt = _CLIP_MAPS * _CLIP_TOKENS * config["cross_attention_dim"]
        return int((latents * widest + prompt) * itemsize * (1 + guided))
    seen, text = latents / _PATCH**2, _tokens(family, maps)
    each = maps.picture + (_SECOND_ATTENTION if config.get("dual_attention_layers") else 0)
    alive = (each * seen + maps.text * text) * _width(config) * itemsize
    mask = (seen + text) ** 2 * itemsize if maps.masks else 0
    return int(alive * (1 + (guided and maps.both)) + mask)


def _prompts(family: Family, itemsize: int) -> int:
    maps = _TRANSFORMERS.get(family.parts[family.denoiser].cls)
    if maps is None:
        return 0
    return _PROMPT_MAPS * _tokens(family, maps) * _width(_config(family, family.denoiser)) * itemsize


def _tokens(family: Family, maps: _Maps) -> int:
    return getattr(family, "prompt_tokens", maps.tokens)


def _width(config: Mapping[str, Any]) -> int:
    return int(config.get("dim") or config["num_attention_heads"] * config["attention_head_dim"])


def _reading(family: Family, part: str, itemsize: int) -> int:
    config, cls = _config(family, part), family.parts[part].cls.rpartition(".")[2]
    width: int = config.get("hidden_size") or config["d_model"]
    maps, tokens = next((found for name, found in _READERS.items() if cls.startswith(name)), _READS)
    return maps * tokens * width * itemsize


def _unpacking(section: Section, itemsize: int) -> int:
    """What multiplying out the largest of a section's packed matrices takes for a moment."""
    return max(
        (int(elements * _unpacking_rate(type_, itemsize)) for elements, type_ in section.packed()), default=0
    )


def _unpacking_rate(type_: str, itemsize: int) -> float:
    return max(UNPACKING.get(type_, 0), itemsize + 2) if not type_.startswith("F8") else itemsize
