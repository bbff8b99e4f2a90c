"""Qwen-Image and Qwen-Image-Edit. Their weights are shaped alike: an edit by reference is what tells."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_worker.engine.families.component import CONFIGS, Layout, Part, Tensors, read_json
from studio_worker.engine.families.family import Family, JobKind, Pipelines, refused, unpacked
from studio_worker.engine.families.qwen import QWEN_TOKENIZER, qwen25_language, qwen25_vision
from studio_worker.engine.parameters import EngineDefaults, Parameters

ZERO_COND_T = "__index_timestep_zero__"
"""By this empty tensor ComfyUI's files of Qwen-Image-Edit-2511 say what ``zeroCondT`` says: the reference
picture is modulated as at time step zero (https://github.com/huggingface/diffusers/pull/12839). GGUF files
lack it.
"""

_LAYERED = "time_text_embed.addition_t_embedding.weight"
"""Qwen-Image-Layered has it besides, and makes several pictures at once."""

_PROMPT_TOKENS = 1024
"""The pipelines' window, without the template around the prompt."""


@dataclass(frozen=True, kw_only=True)
class QwenImage(Family):
    """A vision language model reads the prompt, and a reference picture with it; a video VAE, packed."""

    flow: bool = True
    halves: tuple[str, ...] = ("bfloat16",)

    def check_job(self, kind: JobKind, brought: Collection[str]) -> None:
        super().check_job(kind, brought)
        if kind == "edit" and "vision" not in brought:
            raise refused(
                f"{self.name} reads a reference picture with a vision encoder, which the source lacks: "
                "register it with role text-encoder-vision (the mmproj GGUF file), or as text-encoder the "
                "safetensors file that holds both"
            )

    def assemble(self, components: dict[str, Any]) -> dict[str, Any]:
        from studio_worker.engine.qwen_vl import PictureProcessor, join

        vision = components.pop("vision", None)
        processor = None if vision is None else PictureProcessor(components["tokenizer"], vision.config)
        return {
            **components,
            "text_encoder": join(components["text_encoder"], vision),
            "processor": processor,
        }

    def encode(self, pipeline: Any, parameters: Parameters) -> dict[str, Any]:
        guided = parameters.guidance > 1
        if "Edit" in type(pipeline).__name__:
            # The pipeline encodes the prompt itself, since it has the picture in the size that it wants.
            negative = {"negative_prompt": parameters.negative_prompt} if guided else {}
            return {"prompt": parameters.prompt, **negative}
        encoded: dict[str, Any] = {}
        prompts = {"": parameters.prompt} | ({"negative_": parameters.negative_prompt} if guided else {})
        for prefix, text in prompts.items():
            embeddings, mask = pipeline.encode_prompt(prompt=text, max_sequence_length=_PROMPT_TOKENS)
            encoded |= {f"{prefix}prompt_embeds": embeddings, f"{prefix}prompt_embeds_mask": mask}
        return encoded

    def guidance(self, parameters: Parameters) -> dict[str, Any]:
        return {"true_cfg_scale": parameters.guidance}

    def prepare(self, pipeline: Any, parameters: Parameters) -> dict[str, Any]:
        denoiser = pipeline.transformer
        told = denoiser.config.zero_cond_t  # by the file
        zero = bool(told if parameters.zero_cond_t is None else parameters.zero_cond_t)
        for module in (denoiser, *denoiser.transformer_blocks):
            module.zero_cond_t = zero
        return {}

    def strength(self, parameters: Parameters) -> float:
        return parameters.denoise or 1.0  # diffusers' flow pipelines round up to a whole step by themselves

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        return len(pipeline.tokenizer(text, verbose=False).input_ids) > _PROMPT_TOKENS

    def latents(self, pipeline: Any, latents: Any, parameters: Parameters) -> Any:
        config = pipeline.vae.config
        frame = unpacked(pipeline, latents, parameters).unsqueeze(2)  # the VAE is one for films
        mean, deviation = (
            frame.new_tensor(values).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        # As the pipelines round it: by the reciprocal.
        return frame / (1.0 / deviation) + mean


def transformer(kind: str, config_dir: Path) -> Part:
    """Qwen-Image's denoiser: published under diffusers' names everywhere, GGUF included."""
    config = read_json(config_dir / "config.json")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    last = config["num_layers"] - 1
    tells: dict[str, tuple[int, ...]] = {
        "img_in.weight": (width, config["in_channels"]),
        "txt_in.weight": (width, config["joint_attention_dim"]),
        "txt_norm.weight": (config["joint_attention_dim"],),
        f"transformer_blocks.{last}.img_mod.1.weight": (6 * width, width),
        "proj_out.weight": (config["patch_size"] ** 2 * config["out_channels"], width),
    }
    without = [_LAYERED]
    if config.get("zero_cond_t"):
        tells[ZERO_COND_T] = (0,)
    else:
        without.append(ZERO_COND_T)
    return Part(
        kind=kind,
        role="diffusion-model",
        cls="diffusers.QwenImageTransformer2DModel",
        config=config_dir,
        layouts=(Layout("diffusers", tells, without=tuple(without)),),
    )


def vae(kind: str, config_dir: Path) -> Part:
    """Qwen-Image's VAE, in Wan's naming (``qwen_image_vae.safetensors``) and in diffusers'."""
    config = read_json(config_dir / "config.json")
    first, latent = config["base_dim"], config["z_dim"]
    last = first * config["dim_mult"][-1]

    def original(tensors: Tensors) -> Tensors:
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        renamed: Tensors = convert_wan_vae_to_diffusers(tensors)
        return renamed

    reads, decodes = (first, config["input_channels"], 3, 3, 3), (last, latent, 3, 3, 3)
    return Part(
        kind=kind,
        role="vae",
        cls="diffusers.AutoencoderKLQwenImage",
        config=config_dir,
        layouts=(
            Layout("Wan", {"encoder.conv1.weight": reads, "decoder.conv1.weight": decodes}, original),
            Layout("diffusers", {"encoder.conv_in.weight": reads, "decoder.conv_in.weight": decodes}),
        ),
    )


def qwen_image(name: str, folders: Mapping[str, Path]) -> QwenImage:
    """A family of Qwen-Image models.

    Args:
        name: what operators call it.
        folders: of the configurations of its parts and scheduler, by the pipelines' names.
    """
    return QwenImage(
        name=name,
        parts={
            "transformer": transformer(f"{name} transformer", folders["transformer"]),
            "text_encoder": qwen25_language("text encoder (Qwen2.5-VL)", folders["text_encoder"]),
            "vision": qwen25_vision("vision encoder (Qwen2.5-VL)", folders["vision"]),
            "vae": vae("Qwen-Image VAE", folders["vae"]),
        },
        optional=frozenset({"vision"}),
        tokenizers={"tokenizer": QWEN_TOKENIZER},
        scheduler=folders["scheduler"],
        pipelines=Pipelines(
            text="QwenImagePipeline",
            image="QwenImageImg2ImgPipeline",
            inpaint="QwenImageInpaintPipeline",
            # The template of Qwen-Image-Edit-2509 and later, in which pictures have numbers; what
            # stable-diffusion.cpp does for all of them.
            edit="QwenImageEditPlusPipeline",
        ),
        reference_pixels=1024 * 1024,  # the pipeline's VAE_IMAGE_SIZE
        defaults=EngineDefaults(width=1024, height=1024, guidance=4.0, sampler="euler", size_multiple=16),
    )


FOLDERS: Mapping[str, Path] = {
    "transformer": CONFIGS / "qwen-image" / "transformer",
    "scheduler": CONFIGS / "qwen-image" / "scheduler",
    "text_encoder": CONFIGS / "qwen2.5-vl" / "text_encoder",
    "vision": CONFIGS / "qwen2.5-vl" / "vision",
    "vae": CONFIGS / "qwen-image" / "vae",
}

QWEN_IMAGE = qwen_image("qwen-image", FOLDERS)
QWEN_IMAGE_EDIT_2511 = qwen_image(
    "qwen-image-edit-2511", {**FOLDERS, "transformer": CONFIGS / "qwen-image" / "transformer_2511"}
)
QWEN_FAMILIES = (QWEN_IMAGE, QWEN_IMAGE_EDIT_2511)
