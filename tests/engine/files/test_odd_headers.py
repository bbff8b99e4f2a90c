"""Odd headers of good weights files: metadata of any kind are passed over, and what nobody reads is refused
by name, for good.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio_worker.engine.families import identify
from studio_worker.engine.files.checkpoint import read_checkpoint
from studio_worker.engine.files.sections import read_sections
from studio_worker.engine.files.weights import read_tensors
from studio_worker.engine.loading import load_part
from studio_worker.errors import FileDamaged, JobError, JobImpossible, NotServed
from studio_worker.formats import header_problem
from studio_worker.gpu_check.tiny.z_image import language_model
from studio_worker.models import LocalFile
from tests.lab.headers import with_metadata
from tests.lab.tiny_z_image import Tiny, text_encoder_file, tiny_z_image, transformer_file, vae_file

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_z_image(tmp_path_factory.mktemp("z-image"))


# --- GGUF ---


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def word(key: bytes, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", 8) + text(value)


def number(key: bytes, kind: int, letter: str, value: float) -> bytes:
    return text(key) + struct.pack(f"<I{letter}", kind, value)


def several(key: bytes, kind: int, count: int, content: bytes) -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, count) + content


ARCHITECTURE = word(b"general.architecture", b"qwen3")


def write(path: Path, tensors: Mapping[str, torch.Tensor], *pairs: bytes, alignment: int = 32) -> LocalFile:
    """A GGUF file of version 3, with metadata that no library would write."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs)
    content = bytearray()
    for name, tensor in tensors.items():
        content += bytes(-len(content) % alignment)
        shape = struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *reversed(tensor.shape))
        header += text(name.encode()) + shape + struct.pack("<IQ", 0, len(content))
        content += tensor.contiguous().float().numpy().tobytes()
    path.write_bytes(header + bytes(-len(header) % alignment) + content)
    return LocalFile("text-encoder", path, str(path))


ODD: dict[str, tuple[list[bytes], int]] = {
    "nothing at all": ([], 32),
    "an architecture that is a number": ([number(b"general.architecture", 4, "I", 7)], 32),
    "an architecture of no known letters": ([word(b"general.architecture", b"\xff\xfe\x80")], 32),
    "texts and names of no known letters": ([word(b"general.\xff\xfe", b"\x80\x81")], 32),
    "one name twice": ([number(b"a", 4, "I", 1), number(b"a", 6, "f", 2.0)], 32),
    "every kind of number": (
        [number(bytes([65 + kind]), kind, letter, 1) for kind, letter in enumerate("BbHhIif?")]
        + [number(bytes([65 + kind]), kind, letter, 1) for kind, letter in ((10, "Q"), (11, "q"), (12, "d"))],
        32,
    ),
    "lists of flags": ([several(b"flags", 7, 3, b"\1\0\1"), several(b"many", 7, 5000, bytes(5000))], 32),
    "lists of lists": (
        [several(b"lists", 9, 2, struct.pack("<IQI", 4, 1, 5) + struct.pack("<IQ", 8, 1) + text(b"x"))],
        32,
    ),
    "an empty list of an unknown kind": ([several(b"none", 77, 0, b"")], 32),
    "pieces in words": ([word(b"split.count", b"two")], 32),
    "another alignment": ([number(b"general.alignment", 4, "I", 64)], 64),
    "an alignment of another kind": ([number(b"general.alignment", 10, "Q", 128)], 128),
    "an alignment in words": ([word(b"general.alignment", b"wide")], 32),
    "an alignment of nothing": ([number(b"general.alignment", 4, "I", 0)], 32),
    "a shape that is none": ([several(b"comfy.gguf.orig_shape.output_norm.weight", 8, 1, text(b"x"))], 32),
    "a shape of another size": (
        [several(b"comfy.gguf.orig_shape.output_norm.weight", 5, 2, struct.pack("<2i", 3, 5))],
        32,
    ),
    "a megabyte of text": ([word(b"tokenizer.chat_template", b"x" * 1_000_000)], 32),
}


@pytest.mark.parametrize("name", ODD)
def test_gguf_is_read_whatever_its_metadata(name: str, tmp_path: Path) -> None:
    """The tensors of a GGUF file are the same whatever metadata stand before them."""
    tensors = {"output_norm.weight": torch.arange(7.0), "a.weight": torch.arange(12.0).reshape(3, 4)}
    pairs, alignment = ODD[name]
    file = write(tmp_path / "odd.gguf", tensors, *pairs, alignment=alignment)
    (section,) = read_sections([file])
    found = read_tensors(section, CPU, torch.float32)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (found[key] == tensor).all()


def test_gguf_states_what_its_model_predicts(tmp_path: Path) -> None:
    """What a GGUF file says of itself in ModelSpec's words is known, as of a safetensors file."""
    said = word(b"modelspec.prediction_type", b"v")
    file = write(tmp_path / "v.gguf", {"a": torch.ones(2)}, ARCHITECTURE, said)
    assert read_checkpoint(file.path).stated == {"modelspec.prediction_type": "v"}


def test_gguf_with_odd_metadata_makes_the_same_picture(tiny: Tiny) -> None:
    """A text encoder whose metadata are of other kinds than usual, and whose positions are stretched by
    nothing, makes its usual picture.
    """
    file = write(
        tiny.folder / "odd.gguf",
        language_model(tiny.stock.text_encoder),
        ARCHITECTURE,
        number(b"qwen3.attention.head_count", 6, "f", 4.0),
        number(b"qwen3.attention.head_count_kv", 10, "Q", 2),
        number(b"qwen3.attention.layer_norm_rms_epsilon", 12, "d", 1e-6),
        word(b"qwen3.rope.scaling.type", b"linear"),
        number(b"qwen3.rope.scaling.factor", 6, "f", 1.0),
        several(b"qwen3.lists", 9, 1, struct.pack("<IQI", 4, 1, 5)),
    )
    denoiser, encoder = transformer_file(tiny, "original"), text_encoder_file(tiny)
    vae = vae_file(tiny)
    assert (tiny.picture(denoiser, file, vae) == tiny.picture(denoiser, encoder, vae)).all()


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (word(b"qwen3.attention.head_count", b"four"), r"states its attention\.head_count as 'four'"),
        (number(b"qwen3.attention.head_count", 6, "f", 4.5), r"attention\.head_count as 4\.5"),
        (number(b"qwen3.attention.head_count", 5, "i", -4), r"attention\.head_count as -4"),
        (number(b"qwen3.attention.layer_norm_rms_epsilon", 6, "f", float("nan")), r"epsilon as nan"),
        (number(b"qwen3.rope.scaling.type", 4, "I", 2), r"rope scaling '2'"),
    ],
    ids=["word", "fraction", "negative", "none", "scaling"],
)
def test_numbers_that_are_none_are_refused_by_name(
    tiny: Tiny, pair: bytes, says: str, tmp_path: Path
) -> None:
    """A file that states of itself what cannot be is refused with what it states, for good."""
    file = write(tmp_path / "x.gguf", language_model(tiny.stock.text_encoder), ARCHITECTURE, pair)
    blueprint = identify([transformer_file(tiny, "original"), file, vae_file(tiny)], [tiny.family])
    with pytest.raises(NotServed, match=says):
        load_part(tiny.family.parts["text_encoder"], blueprint.sections["text_encoder"], CPU, torch.float32)


def big_endian(version: int) -> bytes:
    return b"GGUF" + struct.pack(">IQQ", version, 1, 1) + bytes(100)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"GGUF" + struct.pack("<III", 1, 0, 0) + bytes(64), JobImpossible, "of version 1, which no program"),
        (big_endian(2), JobImpossible, "big-endian GGUF file"),
        (big_endian(3), JobImpossible, "big-endian GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0) + bytes(64), NotServed, r"a version that .* \(version 4\)"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"key") + struct.pack("<I", 13) + bytes(64),
            NotServed,
            r"metadata of a type that .* \(GGUF's number 13\)",
        ),
        (b"GGUF" + struct.pack("<IQQ", 77_777_777, 0, 0) + bytes(64), FileDamaged, "not a whole GGUF file"),
    ],
    ids=["version 1", "big-endian 2", "big-endian", "newer version", "newer metadata", "damage"],
)
def test_what_nobody_reads_is_refused_by_name(
    content: bytes, error: type[Exception], says: str, tmp_path: Path
) -> None:
    """A GGUF file of a kind that no program reads fails its job for good, a newer one is left to another
    worker, and only damage is tried again.
    """
    path = tmp_path / "old.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=rf"old\.gguf .*{says}"):
        read_checkpoint(path)


def test_download_without_a_hash_says_what_nobody_reads(tmp_path: Path) -> None:
    """A download whose hash is not known is refused with the same words."""
    path = tmp_path / "old.gguf"
    for content, says in (
        (b"GGUF" + struct.pack("<III", 1, 0, 0), "version 1"),
        (big_endian(3), "big-endian"),
    ):
        path.write_bytes(content + bytes(64))
        assert says in str(header_problem(path, path.name))


# --- safetensors ---


METADATA: dict[str, Any] = {
    "a number": {"epoch": 5, "modelspec.title": "a model"},
    "a recipe": {"sd_merge_recipe": {"weights": [0.5, 0.5]}, "modelspec.title": "a model"},
    "nothing": {"hash": None},
    "a list": ["a", 1],
    "a word": "a model",
    "no number": b'{"loss": NaN}',
    "letters of no known kind": b'{"author": "\xff\xfe"}',
    "half a letter": b'{"author": "\\ud800"}',
    "lines": b'{"notes": "one\ntwo"}',
    "20 MB of words": {"ss_bucket_info": "x" * 20_000_000},
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("padding", [0, 3])
def test_safetensors_are_read_whatever_their_metadata(name: str, padding: int, tmp_path: Path) -> None:
    """The tensors of a safetensors file are the same whatever metadata stand before them."""
    drawn = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    tensors = {f"{kind}.bias": drawn.to(kind) for kind in kinds} | {"none": torch.empty(0, 3)}
    said = METADATA[name]
    file = with_metadata(tmp_path / "odd.safetensors", tensors, said, padding)
    (section,) = read_sections([file])
    found = read_tensors(section, CPU, torch.float32)
    title = said.get("modelspec.title") if isinstance(said, dict) else None
    assert section.checkpoint.stated.get("modelspec.title") == title
    for key, tensor in tensors.items():
        assert found[key].shape == tensor.shape
        assert (found[key].float() == tensor.float()).all()


def test_safetensors_with_odd_metadata_make_the_same_picture(tiny: Tiny) -> None:
    """A VAE whose metadata hold a number and a recipe makes its usual picture."""
    from safetensors.torch import load_file

    usual = vae_file(tiny)
    odd = with_metadata(tiny.folder / "odd-vae.safetensors", load_file(usual.path), METADATA["a recipe"])
    denoiser, encoder = transformer_file(tiny, "original"), text_encoder_file(tiny)
    assert (tiny.picture(denoiser, encoder, odd) == tiny.picture(denoiser, encoder, usual)).all()


@pytest.mark.parametrize(
    "change", [lambda whole: whole[:-4], lambda whole: whole + b"x", lambda whole: whole[:60]]
)
def test_safetensors_with_odd_metadata_and_damage_are_damaged(change: Any, tmp_path: Path) -> None:
    """A file with odd metadata that is not whole besides is damaged, and another copy may be whole."""
    file = with_metadata(tmp_path / "odd.safetensors", {"a": torch.ones(9)}, METADATA["a number"])
    file.path.write_bytes(change(file.path.read_bytes()))
    with pytest.raises(FileDamaged, match="not a whole safetensors file"):
        read_checkpoint(file.path)


def test_numbers_of_a_large_file_are_where_they_belong(tmp_path: Path) -> None:
    """Every tensor of a file with odd metadata is its own, whatever the order of the header."""
    tensors = {f"layer.{index}.weight": torch.full((index + 1,), float(index)) for index in range(50)}
    file = with_metadata(tmp_path / "odd.safetensors", tensors, METADATA["a number"])
    (section,) = read_sections([file])
    found = read_tensors(section, CPU, torch.float32)
    assert all(np.array_equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_disk_that_does_not_give_a_header_is_no_damage(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails while a header is read does not blame the file, which would be fetched once more."""

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / f"m.{form}"
    path.write_bytes(
        b"GGUF" + bytes(60) if form == "gguf" else struct.pack("<Q", 16) + b"{" + b" " * 14 + b"}"
    )
    name = "open_gguf" if form == "gguf" else "safe_open"
    monkeypatch.setattr(f"studio_worker.engine.files.checkpoint.{name}", failing)
    with pytest.raises(JobError, match=rf"m\.{form} cannot be read: Input/output error") as caught:
        read_checkpoint(path)
    assert not isinstance(caught.value, FileDamaged)
    assert not caught.value.is_jobs_fault
