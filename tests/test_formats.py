"""What a file without a known hash must show to pass for a model, and what it is called where it is none."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save

from studio_worker import formats
from studio_worker.download import download_file
from studio_worker.errors import DownloadError
from studio_worker.formats import header_bytes, header_problem, impostor
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import FileServer

HTML = b"\n<!DOCTYPE html><html><body>Not found, but 200 all the same</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"
QUICK = Policy(delays_s=(0.0,))


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


def safetensors() -> bytes:
    return bytes(save({"a": np.zeros((4, 8), np.float32), "b": np.ones(3, np.float16)}))


def gguf_bytes(folder: Path) -> bytes:
    path = folder / "made.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("scale", 0.5)
    writer.add_tensor("plain", np.zeros((2, 32), np.float32))
    blocks = gguf.quants.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("packed", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def problem(folder: Path, name: str, content: bytes) -> str | None:
    path = folder / "content"
    path.write_bytes(content)
    return header_problem(path, name)


def test_headers_of_real_files_hold(tmp_path: Path) -> None:
    """Files as the formats' own libraries write them pass."""
    assert problem(tmp_path, "a.safetensors", safetensors()) is None
    assert problem(tmp_path, "a.gguf", gguf_bytes(tmp_path)) is None


def test_length_of_a_header_is_told_from_the_beginning_of_a_file(tmp_path: Path) -> None:
    """From any beginning is told how much has to be read for the whole header, never less than that."""
    tensors = safetensors()
    end = 8 + struct.unpack_from("<Q", tensors)[0]
    assert {header_bytes(tensors[:length]) for length in range(9, len(tensors))} == {end}
    whole = gguf_bytes(tmp_path)
    end = len(whole) - 2 * 32 * 4 - 2 * 2 * 18 - (-2 * 2 * 18) % 32
    assert header_bytes(whole[:end]) == end
    assert all((header_bytes(whole[:length]) or 0) > length for length in range(24, end))
    assert header_bytes(b"GGUF" + b"\xff" * 100) is None
    assert header_bytes(HTML) == len(HTML)


def test_header_that_disagrees_with_the_length_is_found(tmp_path: Path) -> None:
    """A truncation that every length agrees with is seen by the header."""
    assert "bytes, the file has" in str(problem(tmp_path, "a.safetensors", safetensors()[:-8]))
    assert "bytes, the file has" in str(problem(tmp_path, "A.SafeTensors", safetensors() + b"x"))
    whole = gguf_bytes(tmp_path)
    assert "bytes, the file has" in str(problem(tmp_path, "a.gguf", whole[:-64]))
    assert "header" in str(problem(tmp_path, "a.gguf", whole[:100]))


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 100,
        b'{"error": "there is no such model here"}' * 3,
        struct.pack("<Q", 40) + b"[" * 60,
        struct.pack("<Q", 40) + json.dumps({"a": {"data_offsets": "no numbers"}}).encode().ljust(60),
        struct.pack("<Q", 20) + b'["a list of things"]'.ljust(60),
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1) + bytes(80),
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**62) + bytes(80),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 2**40) + bytes(80),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.gguf"])
def test_headers_of_garbage_do_not_hold(tmp_path: Path, name: str, content: bytes) -> None:
    """Whatever else comes is refused with a reason, and never an error of the check itself."""
    assert "header" in str(problem(tmp_path, name, content))


def test_other_names_are_not_judged(tmp_path: Path) -> None:
    """A format that is not known here is trusted by its length, unless it is plainly an error page."""
    assert problem(tmp_path, "a.bin", b"whatever") is None
    assert problem(tmp_path, "README.html", HTML) is None
    assert "HTML page" in str(problem(tmp_path, "a.bin", HTML))


def test_impostors_are_called_what_they_are(tmp_path: Path) -> None:
    """An error page and a pointer to a file are named, a model is not."""
    for content, name in ((HTML, "HTML page"), (POINTER, "git-lfs pointer")):
        (tmp_path / "x").write_bytes(content)
        assert name in str(impostor(tmp_path / "x"))
    (tmp_path / "x").write_bytes(safetensors())
    assert impostor(tmp_path / "x") is None


@pytest.mark.parametrize(("content", "name"), [(HTML, "an HTML page"), (POINTER, "a git-lfs pointer")])
@pytest.mark.parametrize("is_hash_known", [True, False])
def test_download_says_what_came_instead_of_a_model(
    server: FileServer, tmp_path: Path, content: bytes, name: str, is_hash_known: bool
) -> None:
    """A mirror's error page never becomes a model, and the error says what it is."""
    file = server.serve("/model.safetensors", content)
    sha256 = hashlib.sha256(b"the model").hexdigest() if is_hash_known else None

    with pytest.raises(DownloadError, match=f"this is {name}") as failure:
        download_file(file.url, tmp_path / "model.safetensors", sha256=sha256, policy=QUICK)

    assert failure.value.reason == ("sha256 mismatch" if is_hash_known else "size mismatch")
    assert "size mismatch" not in str(failure.value), "it is as long as it was said to be"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_download_refuses_a_shorter_file_that_looks_whole(server: FileServer, tmp_path: Path) -> None:
    """A file that was cut on the server, and is served with its new length, is refused without a hash too."""
    file = server.serve("/model.safetensors", safetensors()[:-2])

    with pytest.raises(DownloadError, match="its header is wrong"):
        download_file(file.url, tmp_path / "model.safetensors", policy=QUICK)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_formats_know_the_sizes_of_quantised_tensors() -> None:
    """The table of block sizes is that of the gguf library."""
    theirs = {int(kind): sizes for kind, sizes in gguf.constants.GGML_QUANT_SIZES.items()}
    assert {kind: theirs[kind] for kind in formats._GGUF_BLOCKS} == formats._GGUF_BLOCKS
