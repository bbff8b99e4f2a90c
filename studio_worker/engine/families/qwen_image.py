"""Qwen-Image and Qwen-Image-Edit. Their weights are shaped alike: an edit by reference is what tells."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_worker.engine.families.component import CONFIGS, Layout, Part, read_json
from studio_worker.engine.families.family import Family, JobKind, Pipelines, Seen, refused
from studio_worker.engine.families.flux import predict_packed
from studio_worker.engine.families.parts.packing import packed, tokens_a_side
from studio_worker.engine.families.qwen import (
    QWEN_TOKENIZER,
    framed,
    language_states,
    qwen25_language,
    qwen25_vision,
)
from studio_worker.engine.files.sections import Tensors
from studio_worker.engine.images import in_area
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

_REFERENCE_MULTIPLE = 32
"""What the sides of a reference picture are rounded to, for both of its readers."""


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
        from studio_worker.engine.families.parts.qwen_vl import PictureProcessor, join

        vision = components.pop("vision", None)
        processor = None if vision is None else PictureProcessor(components["tokenizer"], vision.config)
        return {
            **components,
            "text_encoder": join(components["text_encoder"], vision),
            "processor": processor,
        }

    def read(self, pipeline: Any, texts: Sequence[str], device: Any, reference: Any) -> list[dict[str, Any]]:
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE

        from studio_worker.engine.families.parts.qwen_vl import PICTURE_TOKEN

        tokenizer, drop = pipeline.tokenizer, pipeline.prompt_template_encode_start_idx
        before, after = pipeline.prompt_template_encode.split("{}")
        pictures = {}
        if reference is not None:
            shown = in_area(reference, CONDITION_IMAGE_SIZE, _REFERENCE_MULTIPLE)
            before += f"Picture 1: <|vision_start|>{PICTURE_TOKEN}<|vision_end|>"
            inputs = pipeline.processor(text=[before], images=[shown], padding=True, return_tensors="pt")
            before = inputs["input_ids"][0].tolist()
            pictures = {name: inputs[name].to(device) for name in ("pixel_values", "image_grid_thw")}
        read = []
        for text in texts:
            # A picture's place in somebody's prompt would be one without a picture.
            ids, weights = framed(tokenizer, before, text.replace(PICTURE_TOKEN, ""), after)
            window = drop + _PROMPT_TOKENS if reference is None else len(ids)
            states = language_states(
                pipeline.text_encoder, ids[:window], weights[:window], device, layer=-1, **pictures
            )
            read.append({"encoder_hidden_states": states[:, drop:]})
        return read

    def prepare(
        self,
        pipeline: Any,
        parameters: Parameters,
        seen: Seen,
        prompts: Mapping[str, dict[str, Any]],
        device: Any,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        denoiser = pipeline.transformer
        told = denoiser.config.zero_cond_t  # by the file
        zero = bool(told if parameters.zero_cond_t is None else parameters.zero_cond_t)
        zero = zero and seen.reference is not None  # else it does nothing but keep the device waiting
        for module in (denoiser, *denoiser.transformer_blocks):
            module.zero_cond_t = zero
        sizes = [(seen.height, seen.width)]
        common: dict[str, Any] = {}
        if seen.reference is not None:
            common["reference"] = packed(seen.reference)
            sizes.append(seen.reference.shape[-2:])
        common["img_shapes"] = [[(1, tokens_a_side(high), tokens_a_side(wide)) for high, wide in sizes]]
        return [each | common for each in prompts.values()]

    def predict(
        self, pipeline: Any, x: Any, timestep: float, arguments: Sequence[dict[str, Any]]
    ) -> list[Any]:
        return predict_packed(pipeline.transformer, x, timestep, arguments)

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        return len(framed(pipeline.tokenizer, "", text, "")[0]) > _PROMPT_TOKENS

    def encoded_picture(self, vae: Any, pixels: Any, draw: Callable[[Any], Any]) -> Any:  # noqa: ARG002
        mean, deviation = _spread(vae, pixels)
        latents = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()  # a film of one frame
        return ((latents.float() - mean) / deviation)[:, :, 0]

    def decodable(self, vae: Any, latents: Any) -> Any:
        mean, deviation = _spread(vae, latents)
        # As the pipelines round it: by the reciprocal.
        return latents.unsqueeze(2) / (1.0 / deviation) + mean

    def latent_channels(self, vae: Any) -> int:
        channels: int = vae.config.z_dim
        return channels


def _spread(vae: Any, like: Any) -> tuple[Any, Any]:
    """Mean and deviation of the VAE's latents by channel."""
    mean, deviation = (
        like.new_tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, deviation


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
        reference_pixels=1024 * 1024,  # the edit pipeline's VAE_IMAGE_SIZE
        reference_multiple=_REFERENCE_MULTIPLE,
        defaults=EngineDefaults(width=1024, height=1024, guidance=4.0, sampler="euler"),
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
