"""Weights files: every number type that is published, and the damaged and the foreign among them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from studio_worker.engine.files.checkpoint import read_checkpoint
from studio_worker.engine.files.eight_bit import EightBitMatrix
from studio_worker.engine.files.sections import Section, read_sections
from studio_worker.engine.files.weights import dequantised, plain, read_tensors
from studio_worker.errors import JobError
from studio_worker.gpu_check.tiny.quantised import drawn_blocks, write_gguf
from studio_worker.models import LocalFile

Type = gguf.GGMLQuantizationType
CPU = torch.device("cpu")


def section(path: Path) -> Section:
    (only,) = read_sections([LocalFile("diffusion-model", path, str(path))])
    return only


def write_blocks(path: Path, type_: Type, blocks: np.ndarray, rows: int = 4) -> Path:
    writer = gguf.GGUFWriter(path, "test")
    writer.add_tensor("a.weight", blocks.reshape(rows, -1), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "type_", [t for t in SUPPORTED_GGUF_QUANT_TYPES if t != Type.BF16], ids=lambda t: t.name
)
def test_every_served_quantisation_means_what_ggml_says(type_: Type, tmp_path: Path) -> None:
    """Blocks of every quantisation that is served decode to what the gguf library's own code says."""
    blocks = drawn_blocks(type_, (4, 512), seed=0)
    found = read_tensors(section(write_blocks(tmp_path / "x.gguf", type_, blocks)), CPU, torch.float32)
    expected = gguf.quants.dequantize(blocks, type_)
    tolerance = np.abs(expected).max() * 2e-3  # diffusers decodes in half precision
    np.testing.assert_allclose(dequantised(found["a.weight"], torch.float32), expected, atol=tolerance)


@pytest.mark.parametrize("type_", [Type.IQ2_XS, Type.IQ1_S, Type.TQ2_0, Type.MXFP4], ids=lambda t: t.name)
def test_other_quantisations_are_refused_by_name(type_: Type, tmp_path: Path) -> None:
    """A quantisation that is not served is named, with those to register instead."""
    blocks = np.zeros((8, gguf.GGML_QUANT_SIZES[type_][1]), np.uint8)
    path = write_blocks(tmp_path / "x.gguf", type_, blocks)
    with pytest.raises(JobError, match=rf"weights of type {type_.name}.* one of BF16, .*Q4_K") as caught:
        read_tensors(section(path), CPU, torch.float32)
    assert caught.value.is_final_here


def test_newer_quantisation_is_refused_as_such(tmp_path: Path) -> None:
    """A quantisation newer than the library is no damaged file: the error says what to register."""
    path = write_blocks(tmp_path / "x.gguf", Type.Q8_0, np.zeros((8, 34), np.uint8))
    content = path.read_bytes()
    name = b"a.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # after the name: dimensions, their sizes
    path.write_bytes(content[:at] + (99).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(JobError, match=r"does not know \(ggml's number 99\); register another one") as caught:
        section(path)
    assert caught.value.is_final_here


@pytest.mark.parametrize(("shape", "stays"), [((40, 96), True), ((64, 40), False)])
def test_matrix_laid_out_anew_has_its_own_shape(shape: tuple[int, int], stays: bool, tmp_path: Path) -> None:
    """Matrices that ComfyUI-GGUF laid out in rows of 256 come out as they were, and stay quantised where
    their rows are whole blocks; what they take is known before.
    """
    numbers = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "sdxl")
    writer.add_array("comfy.gguf.orig_shape.a.weight", list(shape))
    rows = gguf.quants.quantize(numbers.reshape(-1, 256) if numbers.size % 256 == 0 else numbers, Type.Q8_0)
    writer.add_tensor("a.weight", rows, raw_dtype=Type.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = section(tmp_path / "x.gguf")
    assert read.shapes == {"a.weight": shape}
    found = read_tensors(read, CPU, torch.float32)["a.weight"]
    assert hasattr(found, "quant_type") is stays
    plain = dequantised(found, torch.float32)
    assert read.size_bytes(4) == (found if stays else plain).nbytes
    np.testing.assert_allclose(plain, numbers, atol=0.03)


def test_vocabularies_are_passed_over(tmp_path: Path) -> None:
    """A language model's file gives the same tensors as the gguf library reads, whatever else is in it."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen3")
    writer.add_token_list([f"word {index} é" for index in range(500)])
    writer.add_token_types([1] * 500)
    writer.add_token_scores([0.5] * 500)
    writer.add_array("test.short", [1, 2, 3])
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("a", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_tensors(section(tmp_path / "x.gguf"), CPU, torch.float32)
    (expected,) = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    assert (plain(found["a"]).numpy() == expected.data).all()


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_gguf_cut_short_anywhere_is_an_error(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A GGUF file that ends too early is a clear error that another copy may mend."""
    folder = tmp_path_factory.mktemp("cut")
    state = {f"layer.{index}.weight": torch.ones(4, 32) for index in range(5)}
    whole = write_gguf(folder / "whole.gguf", "vae", state, "test", Type.Q8_0).path.read_bytes()
    path = folder / "cut.gguf"
    path.write_bytes(whole[: max(4, int(share * (len(whole) - 31)))])  # 31: padding at the end is nothing
    with pytest.raises(JobError, match=r"cut\.gguf is not a whole GGUF file") as caught:
        read_checkpoint(path)
    assert caught.value.retryable


@pytest.mark.parametrize("note", ["{}.scale_weight", "{}.weight_scale"])
@pytest.mark.parametrize("type_", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_scaled(note: str, type_: torch.dtype, tmp_path: Path) -> None:
    """8-bit weights are multiplied by their scale, in both of ComfyUI's namings, and never widened before
    they are wanted.
    """
    weight = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    notes = {note.format("a"): torch.tensor(3.0), "scaled_fp8": torch.zeros(2, dtype=type_)}
    save_file(
        {"a.weight": weight.to(type_), "b.weight": weight.to(type_)} | notes, tmp_path / "x.safetensors"
    )
    found = read_tensors(section(tmp_path / "x.safetensors"), CPU, torch.bfloat16)
    assert found.keys() == {"a.weight", "b.weight"}
    assert [found[name].element_size() for name in found] == [1, 1]
    assert (dequantised(found["a.weight"], torch.bfloat16) == 3 * weight.bfloat16()).all()
    assert (dequantised(found["b.weight"], torch.bfloat16) == weight.bfloat16()).all()


def test_eight_bit_floats_with_a_scale_for_each_row_are_widened(tmp_path: Path) -> None:
    """8-bit weights whose rows have scales of their own are multiplied by them when they are read."""
    weight = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    rows = torch.tensor([[2.0], [3.0]])
    tensors = {"a.weight": weight.to(torch.float8_e4m3fn), "a.weight_scale": rows}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_tensors(section(tmp_path / "x.safetensors"), CPU, torch.bfloat16)
    assert (found["a.weight"] == (rows * weight).bfloat16()).all()


def test_eight_bit_matrix_is_taken_apart_and_joined(tmp_path: Path) -> None:
    """Renaming takes matrices apart and joins them: with one scale they stay as they are, with two the result
    is right too.
    """
    weight = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    one, other = (EightBitMatrix.of(weight.to(torch.float8_e4m3fn), scale) for scale in (3.0, 5.0))
    first, second = one.chunk(2)
    again = torch.cat([second, first])
    assert isinstance(again, EightBitMatrix)
    assert (dequantised(again.T, torch.float32) == 3 * weight.flip(0).T).all()
    assert (dequantised(one.roll(1, 0)[:1], torch.float32) == 3 * weight[1:]).all()
    mixed = torch.cat([one, other])
    assert (dequantised(mixed, torch.float32) == torch.cat([3 * weight, 5 * weight])).all()
    assert (one + 1 == 3 * weight + 1).all()


def test_wide_numbers_are_narrowed_while_they_are_read(tmp_path: Path) -> None:
    """A file of wider numbers than are computed with never lies in memory as it is."""
    save_file({"a.weight": torch.ones(2, 2, dtype=torch.float64)}, tmp_path / "x.safetensors")
    found = read_tensors(section(tmp_path / "x.safetensors"), CPU, torch.bfloat16)
    assert found["a.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("type_", [torch.uint8, torch.int8, torch.int32])
def test_whole_numbers_are_no_weights(type_: torch.dtype, tmp_path: Path) -> None:
    """Weights packed in whole numbers, as bitsandbytes and others do, are refused by that type."""
    save_file({"a.weight": torch.ones(2, 2, dtype=type_)}, tmp_path / "x.safetensors")
    with pytest.raises(JobError, match=r"weights of type [UI]\d+, .* one of BF16, F16, F32") as caught:
        read_tensors(section(tmp_path / "x.safetensors"), CPU, torch.float32)
    assert caught.value.is_final_here


def test_file_that_changed_is_read_again(tmp_path: Path) -> None:
    """A file's header is kept for the next job, but not once the file is another one."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    first = section(path)
    assert section(path) is first
    save_file({"b": torch.zeros(2)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert section(path).shapes == {"b": (2,)}
