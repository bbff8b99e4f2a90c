"""Every quantisation that GGUF files are published in, beside the numbers that it decodes to."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES
from transformers import T5Config, T5EncoderModel

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.families.parts.t5 import t5
from studio_worker.engine.families.stable_diffusion import SAMPLE as SAMPLE_FAMILY
from studio_worker.engine.files.sections import read_sections
from studio_worker.engine.loading import load_part
from studio_worker.engine.memory.machine import weight_bytes
from studio_worker.gpu_check.tiny import layouts
from studio_worker.gpu_check.tiny.encoders import t5_config
from studio_worker.gpu_check.tiny.quantised import Kind, llama_cpp, write_eight_bit, write_gguf
from studio_worker.gpu_check.tiny.weights import config, drawn, prefixed
from studio_worker.models import LocalFile
from tests.fakes.played_gpu import played
from tests.lab.engine import SAMPLE, decoded
from tests.lab.memory import GIB, Fake, made
from tests.lab.quantising import DECODING, dequantised, widened
from tests.lab.tiny_z_image import Tiny, gguf_files, tiny_z_image, vae_file

torch.set_num_threads(1)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A model whose rows are whole blocks of 256 numbers, as K-quantisations want them."""
    return tiny_z_image(tmp_path_factory.mktemp("wide"), (32, 48, 48), text_width=256)


@pytest.fixture(scope="module")
def vae(tiny: Tiny) -> LocalFile:
    return vae_file(tiny)


@pytest.mark.parametrize("kind", SUPPORTED_GGUF_QUANT_TYPES, ids=lambda kind: kind.name)
def test_picture_is_that_of_the_numbers_it_decodes_to(tiny: Tiny, vae: LocalFile, kind: Kind) -> None:
    """Whatever quantisation denoiser and text encoder (Qwen3) have, the picture is that of the very numbers
    that gguf's own decoder gives: within 2 grey levels anywhere, a fifth of one on average.
    """
    files = gguf_files(tiny, kind, kind.name)
    found, meant = tiny.picture(*files, vae), tiny.picture(*map(dequantised, files), vae)
    apart = np.abs(found - meant)
    assert apart.mean() <= DECODING
    assert apart.max() <= 2
    assert meant.std() > 10  # no flat picture


@pytest.mark.parametrize("kind", SUPPORTED_GGUF_QUANT_TYPES, ids=lambda kind: kind.name)
def test_t5_reads_as_with_the_numbers_it_decodes_to(kind: Kind, tmp_path: Path) -> None:
    """T5 in any quantisation gives the embeddings of the very numbers that gguf's own decoder gives, to half
    a percent (half precision, of which T5's attention makes more), and its matrices stay quantised.
    """
    wide = t5_config(256) | {"vocab_size": 256}
    library = drawn(T5EncoderModel(T5Config(**wide)), 1)
    names = llama_cpp(library.state_dict(), gguf.MODEL_ARCH.T5ENCODER, wide["num_layers"])
    file = write_gguf(tmp_path / "t5.gguf", "text-encoder", names, "t5encoder", kind)
    part = t5("T5", config(tmp_path, wide))
    words = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))

    quantised, plain = (
        load_part(part, read_sections([each])[0], CPU, torch.float32) for each in (file, dequantised(file))
    )
    found, meant = (model(words).last_hidden_state for model in (quantised, plain))
    assert (found - meant).abs().mean() < 5e-3 * meant.abs().mean()
    elements, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    matrices = sum(each.numel() for name, each in names.items() if each.ndim == 2 and "blk" in name)
    saved = weight_bytes(plain) - weight_bytes(quantised)
    assert saved == pytest.approx(matrices * (4 - size_bytes / elements), rel=0.01)


@pytest.mark.parametrize("kind", [None, Kind.Q8_0], ids=["plain", "Q8_0"])
def test_t5_in_half_precision_does_not_overflow(kind: Kind | None, tmp_path: Path) -> None:
    """T5, whose last matrices give numbers that float16 does not hold, reads in float16 (RTX 20, V100) as it
    does in single precision, quantised or not.
    """
    wide = t5_config(256) | {"vocab_size": 256}
    library = drawn(T5EncoderModel(T5Config(**wide)), 1)
    for name, parameter in library.named_parameters():
        if name.endswith("wo.weight"):
            parameter.data *= 100_000
    names = llama_cpp(library.state_dict(), gguf.MODEL_ARCH.T5ENCODER, wide["num_layers"])
    file = write_gguf(tmp_path / "t5.gguf", "text-encoder", names, "t5encoder", kind)
    part, (section,) = t5("T5", config(tmp_path, wide)), read_sections([file])
    words = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    half, single = (
        load_part(part, section, CPU, dtype)(words).last_hidden_state.float()
        for dtype in (torch.float16, torch.float32)
    )
    assert (half - single).abs().mean() < 5e-3 * single.abs().mean()


def eight_bit_files(tiny: Tiny, scale: str) -> tuple[LocalFile, LocalFile]:
    """Denoiser and text encoder as ``z_image_turbo_fp8_scaled.safetensors`` and ``qwen_3_4b_fp8_scaled``."""
    return (
        write_eight_bit(
            tiny.folder / "dit-fp8.safetensors",
            "diffusion-model",
            layouts.z_image(tiny.stock.transformer.state_dict()),
            scale,
        ),
        write_eight_bit(
            tiny.folder / "text-fp8.safetensors",
            "text-encoder",
            prefixed(tiny.stock.text_encoder.state_dict(), "model."),
            scale,
        ),
    )


@pytest.mark.parametrize("scale", ["{}.scale_weight", ""], ids=["scaled", "as they are"])
def test_eight_bit_floats_make_the_picture_of_their_numbers(tiny: Tiny, vae: LocalFile, scale: str) -> None:
    """8-bit floats, with a scale for each matrix and without, make the picture of the very numbers they are,
    pixel for pixel.
    """
    files = eight_bit_files(tiny, scale)
    meant = tiny.picture(*map(widened, files), vae)
    assert (tiny.picture(*files, vae) == meant).all()
    assert meant.std() > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_eight_bit_floats_stay_so(tiny: Tiny, part: str, dtype: torch.dtype) -> None:
    """Matrices of 8-bit floats take no more memory once loaded than in the file, what they take is known
    before, and what they compute is what they would if they had been widened.
    """
    file = eight_bit_files(tiny, "{}.scale_weight")[part == "text_encoder"]
    plain = widened(file, dtype)
    (section,), (reference,) = read_sections([file]), read_sections([plain])
    loaded, wide = (load_part(tiny.family.parts[part], each, CPU, dtype) for each in (section, reference))
    assert weight_bytes(loaded) == pytest.approx(section.size_bytes(dtype.itemsize), rel=0.01)
    assert weight_bytes(loaded) < 0.6 * weight_bytes(wide)
    layers = [name for name, layer in wide.named_modules() if type(layer) is torch.nn.Linear]
    assert layers
    for name in layers:
        layer = wide.get_submodule(name)
        numbers = torch.randn(3, layer.in_features, dtype=dtype)
        assert (loaded.get_submodule(name)(numbers) == layer(numbers)).all()


def test_quantised_vae_decodes_in_wider_numbers(tmp_path: Path) -> None:
    """On a GPU a VAE of half precision decodes in single precision, and so does one of quantised matrices."""
    part, section = SAMPLE_FAMILY.parts["vae"], identify([SAMPLE]).sections["vae"]
    state = load_part(part, section, CPU, torch.float32).state_dict()
    vae = write_gguf(tmp_path / "vae.gguf", "vae", state, "vae", gguf.GGMLQuantizationType.Q8_0)
    with played("cuda:1") as gpu:
        engine = DiffusionEngine(str(gpu.device), memory=Fake(GIB))
        pictures = [made(engine, *files).data for files in ((SAMPLE, vae), (SAMPLE,))]
    found, expected = (np.asarray(decoded(picture), int) for picture in pictures)
    assert np.abs(found - expected).mean() < 2
    assert expected.std() > 10
