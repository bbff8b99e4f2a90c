"""What the engine's tests share: small requests, pictures, weights files, and a network that is not there."""

from __future__ import annotations

import io
import json
import math
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
from PIL import Image

from studio_worker import sample_model
from studio_worker.engine import Inputs, Request
from studio_worker.jobs import ImageTask
from studio_worker.models import CliDefaults, LocalFile

SAMPLE = LocalFile("model", sample_model.WEIGHTS, sample_model.SHA256)
PROMPT = sample_model.prompt("red", "potion", "grass")
SMALL = CliDefaults(width=64, height=64, steps=4, cfg_scale=4.0)
"""What a source of the sample model would say, but for fewer steps."""


def refuse_network(patch: pytest.MonkeyPatch) -> None:
    """Make every attempt to reach the network fail the test."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("the network was touched")

    patch.setattr(socket.socket, "connect", refuse)
    patch.setattr(socket, "getaddrinfo", refuse)


def request(
    *,
    files: tuple[LocalFile, ...] = (SAMPLE,),
    inputs: Inputs = Inputs(),  # noqa: B008 (immutable)
    defaults: CliDefaults = SMALL,
    **task: Any,
) -> Request:
    """A request for one picture of the sample model; the URLs that belong to ``inputs`` are added."""
    urls = {
        "init_image_url": inputs.init_image,
        "mask_url": inputs.mask,
        "ref_image_url": inputs.ref_image,
    }
    given = {name: "https://studio/picture" for name, data in urls.items() if data is not None}
    fields = {"prompt": PROMPT, "ext": "png", "seed": 7} | given | task
    return Request("job", "sample-model", ImageTask(**fields), defaults, files, inputs)


def encoded(picture: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format_, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def scene(width: int = 64, height: int = 64) -> Image.Image:
    """A picture whose corners differ: a gradient from left to right under a red square at the top left."""
    picture = Image.linear_gradient("L").rotate(90).resize((width, height)).convert("RGB")
    picture.paste((200, 30, 30), (0, 0, width // 4, height // 4))
    return picture


def write_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A safetensors file of half-precision zeros with these tensors, which takes no room on disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def changed_sample(path: Path, change: Callable[[dict[str, Any]], None]) -> LocalFile:
    """The sample model's weights with some change, as a file of its own."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(sample_model.WEIGHTS)
    change(tensors)
    save_file(tensors, path)
    return LocalFile("model", path, str(path))
