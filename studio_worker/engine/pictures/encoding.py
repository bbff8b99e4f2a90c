"""Finished pictures: encoded bytes that carry what made them, and the ``generationMeta`` sent beside them.

This module owns the file formats that go out and the metadata in them. The bytes depend on the picture and
its parameters alone: no date, duration or job id goes into a file, so that the same seed gives the same
bytes. It imports no torch.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from studio_worker import __version__
from studio_worker.engine.parameters import Parameters, printable
from studio_worker.errors import JobError, JobImpossible, StudioWorkerError
from studio_worker.jobs import Picture

WEBP_QUALITY = 90

WEBP_METHOD = 0
"""The fastest. While a picture is encoded its lane waits, since the studio offers the next job only when this
one is delivered; at 1024 px the default takes 3.6 times as long for a file of the same size."""

LOSSLESS_EFFORT = 0
"""Of 100, where nothing is lost: likewise the fastest."""

JPEG_QUALITY = 90

SOFTWARE = f"studio-worker {__version__}"

_USER_COMMENT_UTF16 = b"UNICODE\0"
"""Exif 2.3 §4.6.5: the character code that precedes a UTF-16 UserComment."""

_JPEG_EXIF_CHARS = 30_000
"""A JPEG segment holds 65,533 bytes, UTF-16 needs two a character, and names and numbers need room too."""


@dataclass(frozen=True)
class Unencoded:
    """A picture (RGB) as it leaves the device, and what made it.

    ``timings_s`` are the stages so far; ``facts`` are more that ``generationMeta`` says of it; ``lossless``
    as of :func:`encode`.
    """

    picture: Image.Image
    parameters: Parameters
    model: str
    engine: str
    family: str
    timings_s: Mapping[str, float]
    facts: Mapping[str, object] = field(default_factory=dict)
    lossless: bool = False

    def encoded(self) -> Picture:
        """See :meth:`studio_worker.engine.contract.Made.encoded`."""
        started = time.perf_counter()
        try:
            data = encode(self.picture, self.parameters, self.model, lossless=self.lossless)
        except StudioWorkerError:
            raise
        except MemoryError:
            raise JobError("out of memory while the picture was encoded") from None
        except Exception as error:  # without its text, which may quote the prompt
            raise JobError(f"the picture could not be made: {type(error).__name__}") from None
        timings_s = {**self.timings_s, "encode": time.perf_counter() - started}
        meta = generation_meta(
            self.parameters,
            model=self.model,
            engine=self.engine,
            family=self.family,
            timings_s=timings_s,
            **self.facts,
        )
        return Picture(data, self.parameters.ext, meta, timings_s)


def check_ext(ext: str) -> None:
    """
    Raises:
        JobImpossible: ``ext`` is no format that is written here.
    """
    if ext not in _ENCODERS:
        raise JobImpossible(f"unknown ext {ext!r}; this worker writes {', '.join(_ENCODERS)}")


def encode(picture: Image.Image, parameters: Parameters, model: str, *, lossless: bool = False) -> bytes:
    """``picture`` (RGB) in the format ``parameters.ext`` names, with its parameters as metadata; ``lossless``
    where that format can be.
    """
    check_ext(parameters.ext)
    encoder = _lossless_webp if lossless and parameters.ext == "webp" else _ENCODERS[parameters.ext]
    return encoder(picture, parameters_text(parameters, model))


def parameters_text(parameters: Parameters, model: str) -> str:
    """The parameters in the form that AUTOMATIC1111's web UI writes and most tools for pictures read."""
    settings: dict[str, object] = {
        "Steps": parameters.steps,
        "Sampler": parameters.sampler,
        "CFG scale": f"{parameters.guidance:g}",
        "Seed": parameters.seed,
        "Size": f"{parameters.width}x{parameters.height}",
        "Model": _quoted(printable(model)),
    }
    if parameters.denoise is not None:
        settings["Denoising strength"] = f"{parameters.denoise:g}"
    settings["Version"] = SOFTWARE
    lines = [parameters.prompt]
    if parameters.negative_prompt:
        lines.append(f"Negative prompt: {parameters.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def generation_meta(
    parameters: Parameters,
    *,
    model: str,
    engine: str,
    family: str,
    timings_s: Mapping[str, float],
    **more: object,
) -> dict[str, Any]:
    """``generationMeta`` of one picture; ``times`` are seconds. ``more`` are facts that only some engines
    have.
    """
    meta: dict[str, Any] = {
        "seed": parameters.seed,
        "steps": parameters.steps,
        "sampler": parameters.sampler,
        "guidance": parameters.guidance,
        "width": parameters.width,
        "height": parameters.height,
        "model": model,
        "workerVersion": __version__,
        "engine": engine,
        "family": family,
        "times": {stage: round(seconds, 4) for stage, seconds in timings_s.items()},
    }
    if parameters.denoise is not None:
        meta["denoise"] = parameters.denoise
    if parameters.asked_size != (parameters.width, parameters.height):
        meta["askedWidth"], meta["askedHeight"] = parameters.asked_size
    return meta | more


def _quoted(name: str) -> str:
    """A name that could be taken for further settings, in quotes, as the web UI does."""
    return json.dumps(name, ensure_ascii=False) if any(c in name for c in ',:"\n') else name


def _png(picture: Image.Image, text: str) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", text) if _needs_unicode(text) else chunks.add_text("parameters", text)
    chunks.add_text("Software", SOFTWARE)
    return _saved(picture, "PNG", pnginfo=chunks)


def _webp(picture: Image.Image, text: str) -> bytes:
    return _saved(picture, "WEBP", quality=WEBP_QUALITY, method=WEBP_METHOD, exif=_exif(text))


def _lossless_webp(picture: Image.Image, text: str) -> bytes:
    return _saved(
        picture, "WEBP", lossless=True, quality=LOSSLESS_EFFORT, method=WEBP_METHOD, exif=_exif(text)
    )


def _jpg(picture: Image.Image, text: str) -> bytes:
    if len(text.encode("utf-16-be")) // 2 > _JPEG_EXIF_CHARS:
        # The prompt gives way, never the settings at its end; the upload carries the prompt in full.
        head, _, settings = text.rpartition("\n")
        room = (_JPEG_EXIF_CHARS - len(settings)) // 2  # a character may be two units of UTF-16
        text = f"{head[:room]}…\n{settings}"
    return _saved(picture, "JPEG", quality=JPEG_QUALITY, exif=_exif(text))


def _exif(text: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = SOFTWARE
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _USER_COMMENT_UTF16 + text.encode(
        "utf-16-be"
    )
    return exif.tobytes()


def _needs_unicode(text: str) -> bool:
    """Whether a PNG tEXt chunk, which is Latin-1, cannot hold ``text``."""
    return any(ord(character) > 0xFF for character in text)


def _saved(picture: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=format_, **options)
    return buffer.getvalue()


_ENCODERS: dict[str, Callable[[Image.Image, str], bytes]] = {
    "webp": _webp,
    "png": _png,
    "jpg": _jpg,
    "jpeg": _jpg,
}
