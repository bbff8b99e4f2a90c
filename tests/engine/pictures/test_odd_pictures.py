"""Good pictures with odd things in them: metadata that nobody needs, and numbers beyond eight bits."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.images import decode_mask, decode_picture
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel
from tests.lab.engine import decoded, encoded, request, scene

WIDTH, HEIGHT = 64, 48

Entry = tuple[int, int, int, bytes]
"""Of a TIFF's directory: tag, type, count, value."""


def read(data: bytes) -> np.ndarray:
    return np.asarray(decode_picture(data, "initial picture", WIDTH, HEIGHT), dtype=int)


def shown(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=int)


def grey() -> np.ndarray:
    """Grey levels from 0 to 255, another one in each column."""
    return np.tile(np.linspace(0, 255, WIDTH).round().astype(np.uint8), (HEIGHT, 1))


def as_grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, axis=2).astype(int)


# --- metadata ---


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def beside(png: bytes, *chunks: bytes) -> bytes:
    """``png`` with further ``chunks`` after its header."""
    return png[:33] + b"".join(chunks) + png[33:]


WORKFLOW = b'{"nodes": [' + b'{"id": 1, "type": "KSampler"},' * 70_000 + b"]}"

CHUNKS: dict[str, bytes] = {
    "2 MB of workflow": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(WORKFLOW)),
    "the same, international": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(WORKFLOW)),
    "text that would unpack to 128 MB": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**27), 9)),
    "another compression": chunk(b"zTXt", b"Comment\0\7" + b"abc"),
    "a profile of 2 MB": chunk(b"iCCP", b"icc\0\0" + zlib.compress(random.Random(0).randbytes(2_000_000))),
    "a damaged profile": chunk(b"iCCP", b"icc\0\1abc"),
    "a wrong checksum": chunk(b"tEXt", b"parameters\0a cat", checksum=0),
    "gamma without a number": chunk(b"gAMA", b""),
    "no places": chunk(b"pHYs", b"\0"),
    "chromaticities cut short": chunk(b"cHRM", b"\0" * 7),
    "an animation's control": chunk(b"acTL", b"\0"),
    "EXIF that is none": chunk(b"eXIf", b"not a TIFF header"),
    "EXIF with a wrong checksum": chunk(b"eXIf", b"II*\0", checksum=0),
    "a kind of its own": chunk(b"prVt", random.Random(1).randbytes(3000)),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_png_is_read_whatever_is_beside_the_picture(name: str) -> None:
    """A PNG is a picture whatever text, profile or other metadata it carries."""
    found = read(beside(encoded(scene(WIDTH, HEIGHT)), CHUNKS[name]))
    assert (found == shown(scene(WIDTH, HEIGHT))).all()


def test_png_that_ends_within_its_text_is_whole() -> None:
    """A PNG that was cut short after its pixels is the picture; cut within them it is damaged."""
    noise = Image.effect_noise((WIDTH, HEIGHT), 90).convert("RGB")
    png = encoded(noise)
    pixels_end = png.index(b"IEND") - 4
    text = chunk(b"tEXt", b"parameters\0" + bytes(1000))
    assert (read(png[:pixels_end] + text[:500]) == shown(noise)).all()
    with pytest.raises(JobError, match="damaged"):
        read(png[: pixels_end // 2])


def directory(entries: list[Entry], order: str, at: int) -> bytes:
    """A TIFF's directory, to stand at ``at``, and what its entries point to after it."""
    body, after = struct.pack(f"{order}H", len(entries)), b""
    behind = at + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        body += struct.pack(f"{order}HHI", tag, kind, count)
        body += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(f"{order}I", behind + len(after))
        after += value if len(value) > 4 else b""
    return body + bytes(4) + after


ODD: dict[str, list[Entry]] = {
    "a rational of nothing": [(0x011A, 5, 1, struct.pack("<ii", -1, 0))],
    "a resolution in words": [(0x011A, 2, 5, b"abcd\0")],
    "two resolutions": [(0x011A, 5, 2, struct.pack("<IIII", 72, 1, 72, 1))],
    "an unknown type": [(0x010F, 99, 4, b"abcd")],
    "text that is bytes": [(0x010E, 2, 6, b"\xff\xfe\x80a\0\0")],
    "a negative unit": [(0x0128, 8, 1, struct.pack("<hH", -3, 0))],
    "places that are nowhere": [(0x8825, 4, 1, struct.pack("<I", 60_000))],
    "a directory that is nowhere": [(0x8769, 9, 1, struct.pack("<i", -5))],
    "a maker's note beyond the end": [(0x927C, 7, 100, struct.pack("<I", 50_000))],
    "XMP as text": [(0x02BC, 2, 5, b"<x/>\0")],
    "XMP as numbers": [(0x02BC, 3, 3, struct.pack("<HHH", 1, 2, 3))],
    "a profile as numbers": [(0x8773, 3, 3, struct.pack("<HHH", 1, 2, 3))],
    "a profile beyond the end": [(0x8773, 7, 3_000_000, struct.pack("<I", 50_000))],
}

ON_ITS_SIDE: Entry = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


def odd_exif(entries: list[Entry]) -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory([ON_ITS_SIDE, *entries], "<", 8)


def odd_tiff(entries: list[Entry]) -> bytes:
    """The scene on its side as a TIFF of plain numbers, with ``entries`` beside what it needs."""
    sideways = np.asarray(scene(WIDTH, HEIGHT).transpose(Image.Transpose.ROTATE_90))
    pixels = sideways.tobytes()
    numbers = {256: HEIGHT, 257: WIDTH, 259: 1, 262: 2, 273: 8, 277: 3, 278: WIDTH, 279: len(pixels)}
    needed = [(tag, 4, 1, struct.pack("<I", number)) for tag, number in numbers.items()]
    needed.append((258, 3, 3, struct.pack("<HHH", 8, 8, 8)))
    at = 8 + len(pixels)
    return b"II*\0" + struct.pack("<I", at) + pixels + directory([*needed, ON_ITS_SIDE, *entries], "<", at)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photo_is_turned_upright_whatever_else_it_says(name: str, format_: str) -> None:
    """A photo on its side is turned upright, however odd its other tags are."""
    sideways = scene(WIDTH, HEIGHT).transpose(Image.Transpose.ROTATE_90)  # orientation 6 turns it back
    if format_ == "TIFF":
        data = odd_tiff(ODD[name])
    else:
        options = {"lossless": True} if format_ == "WEBP" else {"quality": 95} if format_ == "JPEG" else {}
        data = encoded(sideways, format_, exif=odd_exif(ODD[name]), **options)
    assert np.abs(read(data) - shown(scene(WIDTH, HEIGHT))).mean() < (3 if format_ == "JPEG" else 0.01)


@pytest.mark.parametrize("format_", ["JPEG", "WEBP", "TIFF"])
def test_profile_of_megabytes_is_passed_over(format_: str) -> None:
    """A colour profile of 2 MB, or one that is none, does not keep a picture from being read."""
    for profile in (random.Random(0).randbytes(2_000_000), b"none"):
        data = encoded(scene(WIDTH, HEIGHT), format_, icc_profile=profile)
        assert np.abs(read(data) - shown(scene(WIDTH, HEIGHT))).mean() < 8


def test_tiffs_of_every_kind_are_read() -> None:
    """Compressed, tiled, of a palette, in other colours and in the other byte order: TIFFs keep what they
    need.
    """
    picture = scene(WIDTH, HEIGHT)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd"):
        assert np.abs(read(encoded(picture, "TIFF", compression=compression)) - shown(picture)).mean() < 8
    for mode in ("L", "1", "P", "CMYK", "YCbCr", "LAB", "RGBA"):
        assert (
            np.abs(
                read(encoded(picture.convert(mode), "TIFF")) - shown(picture.convert(mode).convert("RGB"))
            ).mean()
            < 3
        )
    other = encoded(picture, "TIFF", big_tiff=True)
    assert (read(other) == shown(picture)).all()
    first = encoded(picture, "TIFF", save_all=True, append_images=[Image.new("RGB", picture.size)])
    assert (read(first) == shown(picture)).all()


# --- numbers ---


def tiff_of(levels: np.ndarray, order: str = "<") -> bytes:
    """A TIFF of these greys as they are: Pillow writes not all kinds."""
    kind = {"u": 1, "i": 2, "f": 3}[levels.dtype.kind]
    pixels = levels.astype(levels.dtype.newbyteorder(order)).tobytes()
    numbers = {256: WIDTH, 257: HEIGHT, 258: 8 * levels.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: HEIGHT}
    numbers |= {279: len(pixels), 339: kind}
    entries = [(tag, 4, 1, struct.pack(f"{order}I", number)) for tag, number in numbers.items()]
    at = 8 + len(pixels)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", at) + pixels + directory(entries, order, at)


def share(top: float, dtype: type) -> Callable[[], np.ndarray]:
    """The greys from 0 to ``top``."""
    return lambda: (grey().astype(np.float64) / 255 * top).astype(dtype)


NUMBERS: dict[str, Callable[[], np.ndarray]] = {
    "floats to 1": share(1, np.float32),
    "floats to 255": share(255, np.float32),
    "floats to 65535": share(65535, np.float32),
    "floats to 3 million": share(3e6, np.float32),
    "32 bits to 1": lambda: np.where(grey() > 127, 1, 0).astype(np.int32),
    "32 bits to 255": share(255, np.int32),
    "32 bits to 65535": share(65535, np.int32),
    "32 bits to the last": share(2**31 - 1, np.int32),
    "unsigned 32 bits to the last": share(2**32 - 1, np.uint32),
    "16 bits": share(65535, np.uint16),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("order", ["<", ">"])
def test_greys_of_any_range_are_read_by_it(name: str, order: str) -> None:
    """Greys in floats, or of 16 or 32 bits, come in with all their shades, neither black nor burnt out; what
    no decoder here reads is called so.
    """
    levels = NUMBERS[name]()
    if (levels.dtype, order) == (np.uint32, ">"):
        with pytest.raises(JobError, match="a TIFF of a kind that is not read"):
            read(tiff_of(levels, order))
        return
    expected = np.where(grey() > 127, 255, 0) if name == "32 bits to 1" else grey()
    assert np.abs(read(tiff_of(levels, order)) - as_grey(expected)).max() <= 1


def test_dark_sixteen_bit_picture_stays_dark() -> None:
    """16 bits say which number is white, so that a picture of small ones is dark and not stretched."""
    assert read(encoded(Image.fromarray(grey().astype(np.uint16)))).max() == 1


def test_floats_beyond_white_and_no_numbers_at_all() -> None:
    """Where a rendering shines beyond white it is white; where it is no number it is black."""
    levels = share(1, np.float32)()
    levels[0, :4] = [4.0, np.inf, -np.inf, np.nan]
    found = read(tiff_of(levels))
    assert found[0, :4, 0].tolist() == [255, 255, 0, 0]
    assert np.abs(found[1:] - as_grey(grey()[1:])).max() <= 1


def test_floats_in_colours_are_refused_by_name() -> None:
    """A TIFF that no decoder here reads is called one, instead of unknown."""
    data = tiff_of(share(1, np.float32)())
    at = data.index(struct.pack("<HHII", 277, 4, 1, 1))
    data = data[:at] + struct.pack("<HHII", 277, 4, 1, 3) + data[at + 12 :]
    with pytest.raises(JobError, match="is a TIFF of a kind that is not read"):
        read(data)


def png_of(depth: int, colours: int, rows: list[bytes], key: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", WIDTH, len(rows), depth, colours, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, body)
        for kind, body in ((b"IHDR", header), (b"tRNS", key), (b"IDAT", pixels), (b"IEND", b""))
    )


@pytest.mark.parametrize(("depth", "colours"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_colour_that_stands_for_transparency(depth: int, colours: int) -> None:
    """A PNG one of whose colours stands for transparency is laid onto white there, and nowhere else."""
    top = 2**depth - 1
    samples = 3 if colours == 2 else 1
    key = top // 3 if depth > 1 else 0  # on the left: a dark grey
    half = WIDTH * samples // 2
    if depth < 8:
        bits = "".join(f"{key:0{depth}b}" for _ in range(half)) + "1" * half * depth
        row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    else:
        row = b"".join(value.to_bytes(depth // 8, "big") for value in (key, 0) for _ in range(half))
    found = read(png_of(depth, colours, [row] * HEIGHT, struct.pack(">H", key) * samples))
    assert (found[:, : WIDTH // 2] == 255).all()
    assert (found[:, WIDTH // 2 :] == (255 if depth < 8 else 0)).all()
    opaque = read(
        png_of(depth, colours, [row] * HEIGHT, struct.pack(">H", top if depth > 1 else 1) * samples)
    )
    assert (opaque[:, : WIDTH // 2] < 128).all()


def test_mask_of_floats_with_all_metadata_paints() -> None:
    """A job with a picture that carries a workflow, and a mask in floats, is done within the mask alone."""
    mask = np.zeros((64, 64), np.float32)
    mask[:, 32:] = 1
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "TIFF")
    picture = beside(encoded(scene()), CHUNKS["2 MB of workflow"])
    asked = request(inputs=Inputs(picture, buffer.getvalue()), denoise=1.0)
    made = DiffusionEngine("cpu").generate(asked, lambda _done, _total: None, Cancel())
    found = shown(decoded(made.data))
    assert (found[:, :32] == shown(scene())[:, :32]).all()
    assert (found[:, 32:] != shown(scene())[:, 32:]).any()
    assert decode_mask(buffer.getvalue(), 64, 64).getbbox() == (32, 0, 64, 64)
