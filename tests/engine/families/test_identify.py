"""Weights files: which are weights at all, which family they are, and which are refused by name."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from studio_worker import sample_model
from studio_worker.engine.families import identify
from studio_worker.engine.files.checkpoint import read_checkpoint
from studio_worker.errors import FileDamaged, JobError, NotServed
from studio_worker.gpu_check.tiny import compvis
from studio_worker.models import FileRole, LocalFile
from tests.lab.engine import write_header
from tests.lab.weightless import SD1, sd1_parts


def shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def name_of(path: Path, role: FileRole = "model") -> str:
    """The family of a source of this one file."""
    return identify([LocalFile(role, path, path.name)]).family.name


SD1_KEYS = {
    "model.diffusion_model.time_embed.0.weight": (1280, 320),
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
    "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "first_stage_model.encoder.conv_out.weight": (8, 512, 3, 3),
    "first_stage_model.encoder.down.0.block.0.norm1.weight": (128,),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
    "cond_stage_model.transformer.text_model.encoder.layers.11.layer_norm1.weight": (768,),
    "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
}
"""Some tensors of the published Stable Diffusion 1.x checkpoints (v1-5-pruned-emaonly), as their headers
have them.
"""


def test_sample_model_is_known() -> None:
    """The embedded model is recognised by its tensors."""
    assert name_of(sample_model.WEIGHTS) == "sample"


def test_sd1_checkpoint_is_known(tmp_path: Path) -> None:
    """A Stable Diffusion 1.x checkpoint is recognised by its tensors."""
    assert name_of(write_header(tmp_path / "x.safetensors", SD1_KEYS)) == "sd1"


def test_file_name_is_not_looked_at(tmp_path: Path) -> None:
    """A checkpoint called after another family is still what its tensors say."""
    path = write_header(tmp_path / "sd_xl_base_1.0.safetensors", SD1_KEYS)
    assert name_of(path) == "sd1"


def test_sd1_configuration_builds_the_published_model() -> None:
    """The carried configuration builds the 859,520,964 UNet parameters of Stable Diffusion 1.x, and its
    other parts.
    """
    unet, vae, text_encoder = sd1_parts()
    counts = [sum(p.numel() for p in part.parameters()) for part in (unet, vae, text_encoder)]
    assert counts == [859_520_964, 83_653_863, 123_060_480]


def test_sd1_configuration_is_what_a_checkpoint_fills() -> None:
    """The tensors of a checkpoint, renamed by diffusers, are exactly those that the configuration builds."""
    unet, vae, text_encoder = sd1_parts()
    checkpoint = compvis.single_file(
        unet.state_dict(), vae.state_dict(), text_encoder.state_dict(), vae_levels=4
    )
    assert {name: tuple(checkpoint[name].shape) for name in SD1_KEYS} == SD1_KEYS

    renamed_unet = convert_ldm_unet_checkpoint(dict(checkpoint), config=dict(unet.config))
    renamed_vae = convert_ldm_vae_checkpoint(dict(checkpoint), config=dict(vae.config))
    renamed_text = convert_ldm_clip_checkpoint(dict(checkpoint))
    assert shapes(renamed_unet) == shapes(unet.state_dict())
    assert shapes(renamed_vae) == shapes(vae.state_dict())
    assert {
        name.removeprefix("text_model."): shape for name, shape in shapes(renamed_text).items()
    } == shapes(text_encoder.state_dict())


def test_clip_tokenizer_knows_its_words() -> None:
    """The tokenizer carried for Stable Diffusion 1.x gives OpenAI CLIP's ids, lower-cased, within 77
    tokens.
    """
    tokenizer = CLIPTokenizer.from_pretrained(SD1, subfolder="tokenizer", local_files_only=True)
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77
    assert tokenizer("A photo of a CAT").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("hello world!").input_ids == [49406, 3306, 1002, 256, 49407]


PREFIX = "model.diffusion_model."
FOREIGN = {
    "Stable Diffusion XL refiner": {
        PREFIX + "input_blocks.0.0.weight": (384, 4, 3, 3),
        PREFIX + "label_emb.0.0.weight": (1536, 2560),
        PREFIX + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (768, 1280),
        "conditioner.embedders.0.model.text_projection": (1280, 1280),
    },
    "InstructPix2Pix": SD1_KEYS | {PREFIX + "input_blocks.0.0.weight": (320, 8, 3, 3)},
    "Stable Diffusion 3 of another kind": {
        PREFIX + "joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,)
    },
    "FLUX.1 of another kind": {
        "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
        "img_in.weight": (3072, 64),
    },
    "FLUX.2": {"single_stream_modulation.lin.weight": (18432, 6144)},
    "Chroma of another kind": {
        "distilled_guidance_layer.in_proj.bias": (5120,),
        "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
    },
    "Lumina Image 2": {"cap_embedder.0.weight": (2304,), "layers.0.adaLN_modulation.1.weight": (9216, 1024)},
    "Qwen-Image of another kind": {
        "transformer_blocks.0.img_mod.1.weight": (18432, 3072),
        "txt_norm.weight": (3584,),
    },
    "FLUX.3": {"early_stream_modulations.image.lin.weight": (18432, 6144)},
    "Stable Video Diffusion": SD1_KEYS
    | {
        PREFIX + "input_blocks.0.0.weight": (320, 8, 3, 3),
        PREFIX + "input_blocks.1.0.time_stack.in_layers.0.weight": (320,),
    },
    "HunyuanVideo": {"txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": (6144,)},
    "LTX-Video": {PREFIX + "patchify_proj.weight": (2048, 128)},
    "Wan": {"head.modulation": (1, 2, 1536), "patch_embedding.weight": (1536, 16, 1, 2, 2)},
    "Mochi": {"blocks.0.attn.qkv_x.weight": (9216, 3072)},
    "Cosmos": {"net.x_embedder.proj.1.weight": (4096, 72)},
    "Stable Cascade": {"clip_txt_mapper.weight": (8192, 1280)},
    "PixArt": {"t_block.1.weight": (6912, 1152)},
    "Hunyuan-DiT": {"mlp_t5.0.weight": (8192, 2048)},
    "AuraFlow": {"double_layers.0.attn.w1q.weight": (3072, 3072), "cond_seq_linear.weight": (3072, 2048)},
    "HiDream": {"double_stream_blocks.0.block.adaLN_modulation.1.bias": (30720,)},
    "Sana": {"blocks.0.cross_attn.q_linear.weight": (2240, 2240)},
    "Qwen-Image 2.1": {"txt_in.text_norm.weight": (3584,)},
    "Krea 2": {"txtfusion.projector.weight": (3072, 3072)},
    "a VAE alone": {"decoder.conv_in.weight": (512, 4, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)},
    "a ControlNet": {"control_model.time_embed.0.weight": (1280, 320)},
}
"""Telling tensors of the published checkpoints of families that are not served."""


@pytest.mark.parametrize(("name", "tensors"), FOREIGN.items())
def test_foreign_family_is_refused_by_name(
    name: str, tensors: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    """A checkpoint of a known family that is not served is refused by that family's name."""
    path = write_header(tmp_path / "model.safetensors", tensors)
    with pytest.raises(JobError, match=f"is {name}.*does not serve; it serves sd1, .*z-image") as caught:
        name_of(path)
    assert caught.value.is_final_here


PACKED: dict[str, dict[str, torch.Tensor]] = {
    "NVFP4": {
        "a.weight": torch.zeros(4, 32, dtype=torch.uint8),
        "a.weight_scale": torch.zeros(4, 4).to(torch.float8_e4m3fn),
        "a.weight_scale_2": torch.tensor(1.0),
    },
    "MXFP8": {
        "a.weight": torch.zeros(4, 64).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.zeros(4, 2, dtype=torch.uint8),
        "a.comfy_quant": torch.zeros(20, dtype=torch.uint8),
    },
    "block by block": {
        "a.weight": torch.zeros(4, 64).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.zeros(1, 1),
    },
    "NF4": {
        "a.weight": torch.zeros(128, 1, dtype=torch.uint8),
        "a.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    },
    "SVDQuant": {"transformer_blocks.0.qkv_proj.qweight": torch.zeros(4, 2, dtype=torch.int8)},
}
"""What lies in files of that kind: of ComfyUI, of Qwen's and DeepSeek's FP8, of bitsandbytes, of nunchaku."""


@pytest.mark.parametrize("kind", PACKED)
def test_packing_that_is_not_read_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    """Kinds of small numbers that are not read are refused by their names, whatever the family, saying what
    to register instead.
    """
    save_file(PACKED[kind], tmp_path / "model.safetensors")
    with pytest.raises(
        JobError, match=rf"weights in .*{kind}.*register it in BF16 or F16, .*fp8_scaled.* GGUF"
    ) as caught:
        name_of(tmp_path / "model.safetensors", "diffusion-model")
    assert caught.value.is_final_here


def test_unknown_family_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    """A checkpoint of no known family is refused, saying what was looked for among how many tensors."""
    path = write_header(tmp_path / "model.safetensors", {"encoder.weight": (3, 3)})
    with pytest.raises(
        JobError, match=r"no known model family.* 1 tensors, among them encoder\.weight"
    ) as caught:
        name_of(path)
    assert caught.value.is_final_here


def test_another_size_of_a_family_is_refused_with_the_shapes(tmp_path: Path) -> None:
    """A denoiser with a served family's names and another size is refused with the shapes that tell it."""
    tensors = {
        "layers.0.adaLN_modulation.0.weight": (64, 16),
        "cap_embedder.0.weight": (8,),
        "x_embedder.weight": (16, 64),
        "layers.29.attention.qkv.weight": (48, 16),
    }
    path = write_header(tmp_path / "small.safetensors", tensors)
    with pytest.raises(JobError, match=r"is like z-image, but .*\[8\], not \[2560\]"):
        name_of(path, "diffusion-model")


def test_strange_shapes_are_refused_with_the_shapes(tmp_path: Path) -> None:
    """A checkpoint with Stable Diffusion's names and other shapes is refused with the shapes that were
    found.
    """
    tensors = SD1_KEYS | {"first_stage_model.decoder.conv_in.weight": (512, 16, 3, 3)}
    with pytest.raises(JobError, match=r"\[512, 16, 3, 3\]"):
        name_of(write_header(tmp_path / "model.safetensors", tensors))


def test_gguf_is_read_and_named(tmp_path: Path) -> None:
    """A GGUF file of a family that is not served is refused by that family's name too."""
    path = tmp_path / "z.gguf"
    writer = gguf.GGUFWriter(path, "lumina2")
    for name in ("layers.0.adaLN_modulation.1.weight", "cap_embedder.0.weight"):
        writer.add_tensor(name, np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = read_checkpoint(path)
    assert checkpoint.shapes["cap_embedder.0.weight"] == (2, 32)
    with pytest.raises(JobError, match="is Lumina Image 2"):
        name_of(path)


class Payload:
    """A pickle that runs code when loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the pickle was loaded",))


def torch_archive() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": Payload()}, buffer)
    return buffer.getvalue()


def tar_archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (pickle.dumps(Payload()), "a Python pickle"),
        (torch_archive(), "a torch pickle archive"),
        (torch_archive()[:100], "a zip archive"),
        (tar_archive(), "a tar archive"),
        (b"<!DOCTYPE html><title>Sign in</title>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b'{"error": "not found"}', "JSON text"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"just some words that are no weights", "neither a safetensors nor a GGUF file"),
    ],
)
def test_wrong_kind_of_file_is_refused_by_name(content: bytes, says: str, tmp_path: Path) -> None:
    """Pickle in any wrapping, and whatever else is no weights file, is refused by name and never loaded."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises((NotServed, FileDamaged), match=says):
        read_checkpoint(path)


@pytest.mark.parametrize("length", [0x7B, 0x5B, 0x7B20, 0x3C])
def test_safetensors_is_known_whatever_its_first_byte_is(length: int, tmp_path: Path) -> None:
    """A header as long as the number of a brace, so that the file begins as JSON does, is a header all the
    same.
    """
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert read_checkpoint(path).shapes == {"a": (1,)}


@settings(max_examples=40, deadline=None)
@example(length=0)
@example(length=5)
@given(length=st.integers(0, sample_model.WEIGHTS.stat().st_size - 1))
def test_checkpoint_cut_short_is_an_error(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Weights cut short anywhere are a clear error that another copy may mend."""
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    with sample_model.WEIGHTS.open("rb") as whole:
        path.write_bytes(whole.read(length))
    with pytest.raises(JobError, match=r"model\.safetensors is not a whole safetensors file") as caught:
        read_checkpoint(path)
    assert caught.value.retryable


def test_bytes_behind_the_end_are_damage(tmp_path: Path) -> None:
    """Weights with bytes behind their end, as of two copies in one, are an error that another may mend."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(sample_model.WEIGHTS.read_bytes() + bytes(100))
    with pytest.raises(JobError, match=r"model\.safetensors is not a whole safetensors file") as caught:
        read_checkpoint(path)
    assert caught.value.retryable


def test_gguf_cut_short_is_an_error(tmp_path: Path) -> None:
    """A damaged GGUF file is a clear error that another copy may mend."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 40)
    with pytest.raises(JobError, match="not a whole GGUF file") as caught:
        read_checkpoint(path)
    assert caught.value.retryable


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    """A weights file that is gone is a clear error that another try may mend."""
    with pytest.raises(JobError, match="cannot be read") as caught:
        read_checkpoint(tmp_path / "gone.safetensors")
    assert caught.value.retryable
