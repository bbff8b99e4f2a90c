"""What the fuzzer's targets are tried with: good inputs, and strategies that change them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import math
import socket
import struct
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

import gguf
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from studio_worker.models import ModelFile
from studio_worker.store import Store
from studio_worker.store.ledger import file_name
from tests.lab import published
from tests.lab.frames import CLAIM

Draw = Any

# --- any bytes ---

_NUMBERS = (0, 1, 2**7 - 1, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


@st.composite
def changed_bytes(draw: Draw, goods: Sequence[bytes | str], reach: int = 2**30) -> bytes:
    """One of ``goods``, changed at some places of its first ``reach`` bytes."""
    known = [good.encode() if isinstance(good, str) else good for good in goods]
    data = bytearray(draw(st.sampled_from(known)))
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, min(len(data), reach)))
        size = draw(st.sampled_from([1, 2, 4, 8, 16, 64, 512, 1024]))
        match draw(st.sampled_from(["byte", "number", "cut", "end", "again", "other"])):
            case "byte":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "number":
                width, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["big", "little"]))
                number = draw(st.sampled_from(_NUMBERS)) % 256**width
                data[at : at + width] = number.to_bytes(width, order)
            case "cut":
                del data[at : at + size]
            case "end":
                del data[at:]
            case "again":
                at = at // size * size
                data[at:at] = data[at : at + size] * draw(st.sampled_from([1, 2, 40, 600]))
            case "other":
                other = draw(st.sampled_from(known))
                data[at : at + size] = other[at : at + size]
    return bytes(data)


def readable(data: bytes) -> str:
    return data.decode("utf-8", "replace")


# --- any JSON ---


def _nested(depth: int) -> Any:
    return [_nested(depth - 1)] if depth else []


_ODD = (
    *(None, True, 0, -1, 2**31, 2**63, 10**400, 1e308, -0.5, float("nan"), float("inf"), [], {}),
    *("", "x", "x" * 300, " " * 50_000, "<lora:" * 2000, "\ud800", "\x1b]0;x\x07", "\u202e", "0\n", "1e999"),
    *("http://[::1", "https://user:pw@h/x", "file:///x", "data:image/png;base64,AAAA", "../x", "ß" * 200),
    *("<lora:x:1e999>", "(" * 2000, "a:1.5)" * 500, _nested(300), {"a": {"b": []}}, ["x"] * 300),
)
_ODD_TEXTS = [json.dumps(odd) for odd in _ODD]


def _places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield from _places(document[key], (*path, key))


@st.composite
def changed_json(draw: Draw, goods: Sequence[str]) -> str:
    """One of ``goods``, some of whose fields have other values, are missing, or are there as another."""
    document = json.loads(draw(st.sampled_from(goods)))
    for _ in range(draw(st.integers(0, 4))):
        if not (places := list(_places(document))):
            break
        *path, last = draw(st.sampled_from(places[:2000]))
        parent = document
        for key in path:
            parent = parent[key]
        match draw(st.sampled_from(["odd", "odd", "text", "gone", "other"])):
            case "odd":
                parent[last] = json.loads(draw(st.sampled_from(_ODD_TEXTS)))
            case "text":
                parent[last] = draw(st.text(max_size=20) | st.integers() | st.floats())
            case "gone":
                del parent[last]
            case "other":
                text = json.dumps(parent[last])
                key = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
                parent[key] = json.loads(text)
    return json.dumps(document)


# --- frames and offers ---

CONTENT = bytes(range(256)) * 20
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def _file(role: str, name: str) -> dict[str, Any]:
    return {
        "role": role,
        "url": f"https://models.example/{name}",
        "filename": name,
        "sha256": hashlib.sha256(_model_bytes(name)).hexdigest(),
        "approxBytes": 1000,
    }


def _model_bytes(name: str) -> bytes:
    return _lora() if name.startswith("lora") else _gguf()[0] if name.endswith("gguf") else b"no model"


@cache
def _lora() -> bytes:
    head, size = _safetensors({"unet.x.lora_A.weight": (4, 8), "unet.x.lora_B.weight": (8, 4)})
    return head + bytes(size - len(head))


def adopted(store: Store, file: ModelFile, new: Path) -> None:
    """``file`` is on the box, verified."""
    new.write_bytes(_model_bytes(file.filename))
    (store.root / file_name(file)).parent.mkdir(parents=True, exist_ok=True)
    store.adopt(file_name(file), new, str(file.sha256), file.url, ())


_DEFAULTS = {"cfgScale": 4.0, "steps": 20, "width": 64, "height": 64, "flowShift": 3.0, "maxVramGib": 8.0}
_DEFAULTS |= {"samplingMethod": "euler"}  # type: ignore[dict-item]


@cache
def _gguf() -> tuple[bytes, int]:
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "m.gguf", "flux")
        writer.add_string("general.name", "x")
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
        writer.add_array("comfy.gguf.orig_shape.img_in.weight", [64, 64])
        for name, shape in list(published.flux1(double=1, single=1).items()):
            small = tuple(min(size, 64) for size in shape)
            writer.add_tensor(name, np.zeros(small, np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        data = (Path(folder) / "m.gguf").read_bytes()
    return data, len(data)


def _safetensors(shapes: Mapping[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """The header of a file with these tensors, and how long the file is."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "modelspec.title": "x"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + end


SOURCES = [
    {"engine": "sd-cpp", "files": [_file("model", "m.gguf"), _file("lora", "lora.safetensors")]},
    {"engine": "sd-cpp", "files": [_file("diffusion-model", "m.gguf"), _file("vae", "v.safetensors")]},
]
CLAIMS = [
    json.dumps({**CLAIM, "task": task, "modelSource": {**source, "cliDefaults": _DEFAULTS}})
    for source in SOURCES
    for task in (
        {"kind": "image", "prompt": "a castle <lora:lora:0.8>, (red:1.2)", "seed": 7, "ext": "png"},
        {
            **{"kind": "image", "prompt": "x", "negativePrompt": "y", "denoise": 0.5, "cfgScale": 2.0},
            **{"initImageUrl": "https://h/i.png", "maskUrl": "https://h/m.png", "width": 64, "height": 64},
            **{"steps": 4, "samplingMethod": "euler"},
        },
    )
]
FRAMES = [
    json.dumps(frame)
    for frame in (
        *({"type": "offer", "claim": json.loads(claim)} for claim in CLAIMS[:2]),
        {"type": "welcome", "workerId": "w", "serverTime": "2026-01-02T03:04:05Z"},
        {"type": "heartbeatAck"},
        {"type": "completeAck", "jobId": "j"},
        {"type": "failAck", "jobId": "j"},
        {"type": "error", "code": "internal_error", "message": "m"},
        {"type": "error", "code": "duplicate_worker", "message": "m"},
    )
]


# --- weights: what is written of a file, how long it is, and what it is called ---


@cache
def _headers() -> list[tuple[bytes, int]]:
    shapes = (
        published.flux1(double=1, single=1),
        published.chroma(double=1, single=1),
        published.sd3(blocks=1),
        published.qwen_image(blocks=1),
    )
    return [*map(_safetensors, shapes), (_lora(), len(_lora()))]


@st.composite
def weights(draw: Draw) -> tuple[bytes, int, str]:
    if draw(st.booleans()):
        return draw(changed_bytes([_gguf()[0]], reach=3000)), 0, "gguf"
    good, size = draw(st.sampled_from(_headers()))
    length = struct.unpack("<Q", good[:8])[0]
    if draw(st.booleans()):
        return draw(changed_bytes([good], reach=8 + length)), size, "safetensors"
    text = draw(changed_json([good[8 : 8 + length].decode()])).encode()
    return struct.pack("<Q", len(text)) + text, size - length + len(text), "safetensors"


# --- bundles ---


def _manifest() -> str:
    files = [
        {
            "content": SHA256,
            "filename": "a.bin",
            "sha256": SHA256,
            "size": len(CONTENT),
            "url": "https://h/a",
        },
        {"content": "url-0123456789abcdef", "filename": "b.bin", "sha256": SHA256, "size": len(CONTENT)}
        | {"url": "https://h/b", "models": ["m"]},
    ]
    return json.dumps({"format": 1, "models": [{"id": "m"}], "files": files})


def _tar(manifest: str, kind: int, notes: Mapping[str, str]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=kind) as tar:
        long = "x" * 120 if notes else "x"
        for name, content in (
            (long, b""),
            ("manifest.json", manifest.encode()),
            (f"files/{SHA256}", CONTENT),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), dict(notes)
            tar.addfile(member, io.BytesIO(content))
    return made.getvalue()


_NOTES = {
    **{"path": "x", "size": "10", "mtime": "1.5", "uid": "7", "hdrcharset": "BINARY", "linkpath": "y"},
    **{
        "GNU.sparse.map": "0,1,5,2",
        "GNU.sparse.size": "10",
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
    },
    **{"GNU.sparse.numblocks": "2", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "1"},
    **{"GNU.sparse.name": "z", "GNU.sparse.realsize": "20"},
}
_VALUES = ("", "-1", "-2048", "x", "1e999", "9" * 30, "\0", "files/" + SHA256)


@st.composite
def bundles(draw: Draw) -> bytes:
    """A tar file, perhaps compressed; its headers' checksums are right whatever was changed."""
    manifest = draw(changed_json([_manifest()])) if draw(st.booleans()) else _manifest()
    names = draw(st.lists(st.sampled_from(list(_NOTES)), max_size=4))
    notes = {name: draw(st.sampled_from([_NOTES[name], *_VALUES])) for name in names}
    kind = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    is_longer = kind != tarfile.USTAR_FORMAT and bool(notes)
    made = _tar(manifest, kind, notes if is_longer else {})
    data = bytearray(draw(changed_bytes([made], reach=draw(st.sampled_from([1024, 2**20])))))
    heads = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if heads and draw(st.booleans()):
        at = draw(st.sampled_from(heads))
        size = draw(st.sampled_from([-2048, -1024, -512, 0, 2**31, 2**45, 2**80]))
        data[at + 124 : at + 136] = (size % 2**96 | 2**95).to_bytes(12, "big")  # as GNU tar has large ones
    for at in heads:
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    pack = draw(st.sampled_from([bytes, bytes, gzip.compress, bz2.compress, lzma.compress]))
    packed = pack(bytes(data))
    return packed if pack is bytes else draw(changed_bytes([packed]))


# --- answers to HTTP calls ---


class Answering:
    """A server on loopback that answers every request with the same bytes, and closes."""

    answer = b""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
                with connection:
                    connection.settimeout(5)
                    heard = connection.recv(65536)
                    if heard.startswith(b"POST") and heard.endswith(b"\r\n\r\n"):
                        connection.recv(65536)
                    connection.sendall(self.answer)
            except ConnectionError:  # it had heard enough
                continue
            except OSError:
                return


def _answer(status: str, body: bytes, *fields: str, length: bool = True) -> bytes:
    head = [f"HTTP/1.1 {status}", *fields, *([f"Content-Length: {len(body)}"] if length else [])]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


_JSON = "Content-Type: application/json"
_APPROVED = {"status": "approved", "workerId": "w", "authToken": "t"}
_BODIES = [
    json.dumps(body)
    for body in ({"requestId": "r", "status": "pending"}, _APPROVED, {"status": "rejected", "reason": "no"})
]
_TAG = 'ETag: "a"'
_DONE = "Content-Range: bytes 0-5119/5120"
_CHUNKED = b"1400\r\n" + CONTENT + b"\r\n0\r\n\r\n"
_ANSWERS = [
    *(_answer("200 OK", body.encode(), _JSON) for body in _BODIES),
    _answer("401 Unauthorized", b"{}", _JSON, "WWW-Authenticate: Bearer"),
    _answer("503 Busy", b"", "Retry-After: 1", "Date: Fri, 02 Jan 2026 03:04:05 GMT"),
    _answer("302 Found", b"", "Location: http://127.0.0.1:9/x", "Set-Cookie: a=b; Path=/"),
    _answer("200 OK", CONTENT, _TAG, "Accept-Ranges: bytes", "Last-Modified: Fri, 02 Jan 2026 03:04:05 GMT"),
    _answer("206 Partial Content", CONTENT, _TAG, _DONE),
    _answer("200 OK", _CHUNKED, "Transfer-Encoding: chunked", length=False),
    _answer("200 OK", gzip.compress(CONTENT), "Content-Encoding: gzip"),
    b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" + _answer("200 OK", CONTENT),
]


@st.composite
def responses(draw: Draw) -> tuple[str, bytes]:
    """Which call, and what is answered."""
    call = draw(st.sampled_from(["register", "poll", "upload", "download", "download unknown"]))
    if draw(st.integers(0, 3)) == 0:
        return call, _answer("200 OK", draw(changed_json(_BODIES)).encode(), _JSON)
    return call, draw(changed_bytes(_ANSWERS, reach=draw(st.sampled_from([20, 200, 2**20]))))


# --- pictures ---


@cache
def _pictures() -> list[bytes]:
    grey = Image.linear_gradient("L").resize((40, 40))
    plain = Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180)))
    alpha = plain.copy()
    alpha.putalpha(grey)
    turned = Image.Exif()
    turned[0x0112] = 6
    made = []
    for picture, kind, options in (
        (plain, "PNG", {}),
        (alpha, "PNG", {}),
        (grey.convert("I;16"), "PNG", {}),
        (plain.quantize(16), "PNG", {"transparency": 3}),
        (plain, "JPEG", {"exif": turned}),
        (plain, "JPEG", {"progressive": True}),
        (plain.convert("CMYK"), "JPEG", {}),
        (alpha, "WEBP", {}),
        (plain, "WEBP", {"lossless": True}),
        (plain.quantize(16), "GIF", {"save_all": True, "append_images": [grey]}),
        (plain, "BMP", {}),
        (plain, "TIFF", {"compression": "tiff_lzw"}),
        (alpha, "TIFF", {"compression": "tiff_deflate"}),
        (grey, "TIFF", {}),
        (alpha, "AVIF", {}),
    ):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        made.append(buffer.getvalue())
    return made


@st.composite
def images(draw: Draw) -> bytes:
    """A picture; a PNG's checksums are right whatever was changed."""
    data = bytearray(draw(changed_bytes(_pictures(), reach=draw(st.sampled_from([120, 2**20])))))
    at = 8
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(data)
