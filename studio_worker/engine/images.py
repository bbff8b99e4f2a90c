"""Input pictures: from untrusted bytes to RGB pictures and masks of the job's size.

This module owns what may come in (formats, bytes, pixels) and how it is laid onto the picture to be made. It
imports no torch. Nothing here trusts a file name or a content type. Bytes are decoded (:func:`read`) in a
process of its own (``decoder``); only what it makes of them is laid out here.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from studio_worker.engine.pictures.bare_pictures import bare
from studio_worker.engine.pictures.decoder import Decoder
from studio_worker.engine.pictures.grey import eight_bit, is_deep
from studio_worker.errors import JobError, JobImpossible

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Only these of Pillow's decoders are tried, by what the bytes say they are: each further one is attack
surface, and some need minutes for a small file (those written in Python) or start a program (EPS)."""

_OTHERS = (
    (rb"\s*(<\?xml.*)?<svg", "an SVG drawing"),
    (rb"\s*[{\[]", "JSON text"),
    (rb"%PDF", "a PDF document"),
    (rb"8BPS", "a Photoshop document"),
    (rb"PK\x03\x04", "a zip archive"),
    (rb".{4}ftyp(hei|mif1)", "a HEIC photo"),
    (rb".{4}ftyp(isom|mp4)|\x1a\x45\xdf\xa3", "a video"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (rb"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (rb"II[*+]\0|MM\0[*+]", "a TIFF of a kind that is not read (colours in floats, say)"),
)
"""What people send in a picture's place, by how it begins, to name it in the error."""

_PAGE = rb"\s*<(!doctype )?html"
"""What a captive portal or a login sends, which another worker may not meet."""

_BOM = b"\xef\xbb\xbf"
_MARK_BYTES = 512

MIN_SIDE_PX = 8
"""One cell of the latent grid: a smaller picture or mask says nothing about where anything is."""

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000
"""192 MB decoded: beyond any sensible input, and below what would hurt a worker (decompression bombs)."""

_STRIP_ROWS = 64
"""So many rows of a picture are numbers with fractions at once."""

MASK_THRESHOLD = 128
"""Grey level from which a mask pixel counts as white, i.e. may change."""


_DECODER = Decoder()


def close() -> None:
    """End the process that decodes; the next picture starts another."""
    _DECODER.close()


def _goes_on() -> None:
    """Nobody asks for an end."""


def decode_picture(
    data: bytes, what: str, width: int, height: int, check: Callable[[], None] = _goes_on
) -> Image.Image:
    """The picture in ``data`` upright, without alpha, as RGB of ``width`` x ``height`` px.

    Transparent parts become white: the background that game assets are drawn on. Of another shape, what is
    beyond it is cut off on both sides.

    Args:
        what: what the picture is for, to name it in errors.
        check: called while the picture is decoded; what it raises ends that.

    Raises:
        JobImpossible: not a picture of a known format, damaged, too large, or too costly to decode.
        JobError: a web page came in its place: another worker may get the picture.
    """
    picture = decode_upright(data, what, check=check)
    return picture if picture.size == (width, height) else _box_filtered(picture, width, height)


def decode_reference(data: bytes, check: Callable[[], None] = _goes_on) -> Image.Image:
    """The reference picture in ``data``, as :func:`decode_upright` gives it."""
    return decode_upright(data, "reference picture", check=check)


def decode_upright(
    data: bytes, what: str, background: str = "white", check: Callable[[], None] = _goes_on
) -> Image.Image:
    """The picture in ``data``, upright, laid onto ``background``, as RGB of its own size. As :func:`read`,
    within limits of memory and time.

    Raises:
        JobError: as :func:`decode_picture`.
    """
    if not data:
        raise _bad(what, "is empty")
    if len(data) > MAX_BYTES:
        raise _bad(what, f"has {len(data)} bytes; at most {MAX_BYTES} are read")
    return _DECODER.decode(data, what, background, check)


def decode_mask(data: bytes, width: int, height: int, check: Callable[[], None] = _goes_on) -> Image.Image:
    """The mask in ``data`` as a picture of mode L, ``width`` x ``height`` px, of 0 (keep) and 255 (may
    change).

    Transparent parts keep. A mask of another size is cut as its picture is; where it is made smaller, what
    has any white in it is white, so that thin lines paint.

    Raises:
        JobError: as :func:`decode_picture`, or no pixel is white.
    """
    grey = decode_upright(data, "mask", "black", check).convert("L")
    mask = grey.point([255 if level >= MASK_THRESHOLD else 0 for level in range(256)])
    if mask.size != (width, height):
        share = _means(mask, np.arange(256) > 0, (width, height), _centre(mask.size, width, height))
        mask = Image.fromarray(np.where(share > 0, 255, 0).astype(np.uint8))
    if mask.getbbox() is None:
        raise JobImpossible("the mask is black everywhere: white marks what may change")
    return mask


def any_white(white: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask in another ``size`` (width, height): white where any of it is."""
    height, width = white.shape
    mask = Image.fromarray(white.astype(np.uint8))
    return _means(mask, np.arange(256) > 0, size, (0, 0, width, height)) > 0


def _means(
    grey: Image.Image, values: NDArray[Any], size: tuple[int, int], box: tuple[int, int, int, int]
) -> NDArray[np.float32]:
    """The part of ``grey`` within ``box`` in another ``size``: means of its levels' ``values``.

    With fractions: rounded to grey levels a thin line in a large mask would vanish. In strips, since numbers
    with fractions take four times the memory; a strip is made narrower by itself, as Pillow makes all rows
    before it makes columns shorter.
    """
    left, top, right, bottom = box
    values = values.astype(np.float32)
    narrow = []
    for begin in range(top, bottom, _STRIP_ROWS):
        strip = values[np.asarray(grey.crop((left, begin, right, min(begin + _STRIP_ROWS, bottom))))]
        height = len(strip)
        narrow.append(np.asarray(Image.fromarray(strip).resize((size[0], height), Image.Resampling.BOX)))
    means = Image.fromarray(np.concatenate(narrow)).resize(size, Image.Resampling.BOX)
    return np.asarray(means)


def cells(mask: Image.Image, width: int, height: int) -> np.ndarray:
    """``mask`` by cell of latents: 1 where any of a cell's pixels is white, else 0 (height, width)."""
    white = np.asarray(mask) > 0
    by_cell = white.reshape(height, mask.height // height, width, mask.width // width).any(axis=(1, 3))
    return np.asarray(by_cell, dtype=np.float32)


def in_area(picture: Image.Image, pixels: int, multiple: int) -> Image.Image:
    """``picture`` in its proportions in about ``pixels``, its sides rounded to ``multiple``."""
    width = math.sqrt(pixels * picture.width / picture.height)
    sides = width, width * picture.height / picture.width
    size = [max(1, round(side / multiple)) * multiple for side in sides]
    return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _centre(size: tuple[int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """The box within a picture of ``size`` that has the shape of ``width`` x ``height``, in its middle."""
    wide, high = size
    if wide * height > width * high:
        wide = max(1, high * width // height)
    else:
        high = max(1, wide * height // width)
    left, top = (size[0] - wide) // 2, (size[1] - high) // 2
    return left, top, left + wide, top + high


def _box_filtered(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of ``picture`` as ``width`` x ``height`` px: the mean of what falls into each, as light.

    stable-diffusion.cpp's way, so that the latents of a picture are the same here and there.
    """
    box = _centre(picture.size, width, height)
    levels = np.arange(256) / 255
    light = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    bands = []
    for band in range(3):
        mixed = _means(picture.getchannel(band), light, (width, height), box).clip(0, 1)
        grey = np.where(mixed <= 0.0031308, mixed * 12.92, 1.055 * mixed ** (1 / 2.4) - 0.055)
        bands.append(Image.fromarray((grey * 255).round().astype(np.uint8)))
    return Image.merge("RGB", bands)


def read(data: bytes, what: str, background: str) -> Image.Image:
    """The picture in ``data`` upright, as RGB of its own size, laid onto ``background``. Only for the process
    that may take any time and memory over it.

    Raises:
        JobError: as :func:`decode_picture`.
    """
    try:
        with warnings.catch_warnings():
            # Of sizes, which are checked below, and of what is odd in a file that can be read all the same.
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(bare(data)), formats=FORMATS)
            _check_size(picture, what)
            picture.load()
            flat, turn = _flatten(picture, background), _turn(picture)
            return flat if turn is None else flat.transpose(turn)
    except (JobError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        if re.match(_PAGE, data.removeprefix(_BOM)[:_MARK_BYTES], re.IGNORECASE):
            raise JobError(
                f"bad input: the {what} is a web page; the address may want a login, or the network one"
            ) from error
        kind = _kind(data)
        known = ", ".join(FORMATS)
        raise _bad(what, f"is {kind or 'not a picture that is known'}; read are {known}") from error
    except Image.DecompressionBombError as error:
        raise _bad(what, f"has more than {MAX_PIXELS} pixels") from error
    # Pillow's decoders raise whatever a damaged file leads them to; there is no common base.
    except Exception as error:
        raise _bad(what, "is damaged or cut short") from error


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its orientation (Exif 2.32, 4.6.4)."""


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """How ``picture`` is to be turned. Nothing else in its EXIF data matters, odd as it may be."""
    try:
        return _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None


def _check_size(picture: Image.Image, what: str) -> None:
    """Before decoding: what a picture announces is what decoding would take."""
    size = f"{picture.width}x{picture.height} px"
    if min(picture.size) < MIN_SIDE_PX:
        raise _bad(what, f"has {size}; it needs {MIN_SIDE_PX} px a side at least")
    if picture.width * picture.height > MAX_PIXELS:
        raise _bad(what, f"has {size}; at most {MAX_PIXELS} pixels are read")


def _kind(data: bytes) -> str:
    """What ``data``, which is none of the formats that are read, seems to be; empty where nobody knows."""
    start = data.removeprefix(_BOM)[:_MARK_BYTES]
    matches = (name for mark, name in _OTHERS if re.match(mark, start, re.IGNORECASE | re.DOTALL))
    return next(matches, "")


def _flatten(picture: Image.Image, background: str) -> Image.Image:
    """``picture`` as RGB, laid onto ``background`` where it is transparent."""
    if is_deep(picture):
        picture = eight_bit(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    with_alpha = picture.convert("RGBA")
    ground = Image.new("RGBA", with_alpha.size, background)
    return Image.alpha_composite(ground, with_alpha).convert("RGB")


def _bad(what: str, problem: str) -> JobImpossible:
    return JobImpossible(f"bad input: the {what} {problem}")
