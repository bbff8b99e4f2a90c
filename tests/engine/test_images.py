"""Input pictures: what is read, how it is laid on the job's size, and what is refused."""

from __future__ import annotations

import contextlib
import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from studio_worker.engine import images
from studio_worker.engine.images import cells, decode_mask, decode_picture
from studio_worker.errors import JobError
from tests.lab.engine import encoded, scene

WHOLE = encoded(scene())


@pytest.mark.parametrize("format_", images.FORMATS)
def test_format_is_told_from_content(format_: str) -> None:
    """Every supported format is read, whatever name or type it came with."""
    picture = decode_picture(encoded(scene(), format_), "initial picture", 64, 64)
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture, int) - np.asarray(scene(), int)).mean() < 8


def test_picture_is_resized_to_the_job() -> None:
    """An initial picture of another size comes in at the job's."""
    assert decode_picture(encoded(scene(300, 100)), "initial picture", 128, 64).size == (128, 64)


AS_STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What a camera does to an upright picture for each orientation that it then states (Exif 2.3, 4.6.4)."""


@pytest.mark.parametrize("orientation", AS_STORED)
def test_orientation_of_a_photo_is_applied(orientation: int) -> None:
    """A photo that says in its EXIF data which side is up is turned that way."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = AS_STORED[orientation]
    photo = scene(64, 48) if turn is None else scene(64, 48).transpose(turn)
    upright = decode_picture(encoded(photo, "JPEG", exif=exif, quality=95), "initial picture", 64, 48)
    assert np.abs(np.asarray(upright, int) - np.asarray(scene(64, 48), int)).mean() < 3


def test_photo_with_a_second_picture_is_its_first() -> None:
    """A phone's photo that holds depths or a brighter version as a second picture (MPO) is its first one."""
    data = encoded(scene(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))], quality=95)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    picture = decode_picture(data, "initial picture", 64, 64)
    assert np.abs(np.asarray(picture, int) - np.asarray(scene(), int)).mean() < 3


@pytest.mark.parametrize("size", [(8, 8), (2000, 10), (9, 3000)])
def test_reference_of_any_shape_keeps_its_size(size: tuple[int, int]) -> None:
    """A reference picture, however small or long, is given on in its own size."""
    assert images.decode_reference(encoded(Image.new("RGB", size, (1, 200, 3)))).size == size


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode: str) -> None:
    """What is transparent in an asset becomes white, not whatever colour hid beneath."""
    picture = Image.new("RGBA", (64, 64), (0, 0, 255, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 32, 64))
    flat = decode_picture(encoded(picture.convert(mode)), "initial picture", 64, 64)
    assert flat.getpixel((48, 32)) == (255, 255, 255)
    assert max(flat.getpixel((16, 32))) < 10


def test_sixteen_bit_grey_is_scaled() -> None:
    """A 16-bit picture comes in with all its shades instead of burnt out."""
    levels = np.full((64, 64), 0x8000, np.uint16)
    assert decode_picture(encoded(Image.fromarray(levels)), "p", 64, 64).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing"),
        (b'{"error": "gone"}', "is JSON text"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIC photo"),
        (b"%PDF-1.7", "is a PDF document"),
        (b"\x80\x04\x95pickle", "not a picture that is known; read are PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "not a picture that is known"),
        (WHOLE[: len(WHOLE) // 2], "damaged"),
        (encoded(Image.new("RGB", (1, 1))), "has 1x1 px; it needs 8 px"),
    ],
)
def test_no_picture_is_refused(data: bytes, says: str) -> None:
    """What is no picture, or half of one, is refused in words that say which input it was."""
    with pytest.raises(JobError, match=f"initial picture .*{says}") as caught:
        decode_picture(data, "initial picture", 64, 64)
    assert not caught.value.retryable


def test_page_in_a_pictures_place_may_be_this_boxs_own_trouble() -> None:
    """A page in a picture's place is what a captive portal sends: another worker may get the picture."""
    with pytest.raises(JobError, match=r"initial picture is a web page; .* login, or the network") as caught:
        decode_picture(b"<!DOCTYPE html><html>login</html>", "initial picture", 64, 64)
    assert caught.value.retryable


def test_decompression_bomb_is_refused_before_decoding() -> None:
    """A small file that would decode to gigabytes is refused by the size it announces."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    side = (100_000).to_bytes(4, "big")
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", side + side + b"\x08\x02\0\0\0") + chunk(b"IEND", b"")
    with pytest.raises(JobError, match="pixels"):
        decode_picture(bomb, "initial picture", 64, 64)
    side = (9_000).to_bytes(4, "big")
    large = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", side + side + b"\x08\x02\0\0\0") + chunk(b"IEND", b"")
    with pytest.raises(JobError, match="9000x9000 px"):
        decode_picture(large, "initial picture", 64, 64)


def test_first_picture_of_an_animation_is_taken() -> None:
    """Of an animation the first picture counts."""
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_picture(data, "initial picture", 64, 64).getpixel((5, 5)) == (255, 0, 0)


def test_mask_of_one_pixel_is_refused() -> None:
    """A mask too small to say where anything is, is an error and not a picture changed all over."""
    with pytest.raises(JobError, match="the mask has 1x1 px"):
        decode_mask(encoded(Image.new("L", (1, 1), 255)), 64, 64)


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An input larger than the limit is not even looked at."""
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(JobError, match="at most 100"):
        decode_picture(WHOLE, "initial picture", 64, 64)


@settings(max_examples=60, deadline=None)
@given(format_=st.sampled_from(images.FORMATS), draw=st.data())
def test_damage_is_an_error_or_a_picture(format_: str, draw: st.DataObject) -> None:
    """Whatever bytes come in, the outcome is a picture of the right size or a clear error, never a crash."""
    data = bytearray(encoded(scene(16, 16), format_))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    data = data[: draw.draw(st.integers(0, len(data)))]
    with contextlib.suppress(JobError):
        assert decode_picture(bytes(data), "initial picture", 16, 16).size == (16, 16)


def test_white_may_change() -> None:
    """Of a mask only black and white remain, cut at half grey."""
    mask = Image.new("L", (64, 64), 0)
    mask.paste(127, (0, 0, 16, 64))
    mask.paste(128, (16, 0, 32, 64))
    mask.paste(255, (32, 0, 48, 64))
    read = decode_mask(encoded(mask), 64, 64)
    assert [read.getpixel((x, 5)) for x in (8, 24, 40, 56)] == [0, 255, 255, 0]


def test_mask_of_another_size_stays_sharp() -> None:
    """A mask of another size is resized without grey edges."""
    mask = Image.new("L", (10, 10), 0)
    mask.paste(255, (0, 0, 5, 10))
    read = decode_mask(encoded(mask), 64, 48)
    assert read.size == (64, 48)
    assert set(np.unique(np.asarray(read))) == {0, 255}


def test_thin_line_in_a_large_mask_still_paints() -> None:
    """A line one pixel wide in a mask four times too large is white in the job's size; so are its cells."""
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (101, 0, 102, 256))
    read = decode_mask(encoded(mask), 64, 64)
    assert read.getbbox() == (25, 0, 26, 64)
    painted = cells(read, 8, 8)
    assert painted.sum() == 8
    assert painted[:, 3].all()


def test_finest_line_in_the_largest_mask_still_paints() -> None:
    """However much smaller a mask is made, no white pixel of it is lost."""
    mask = Image.new("L", (6000, 6000), 0)
    mask.putpixel((3001, 2999), 255)
    assert decode_mask(encoded(mask), 8, 8).getbbox() == (4, 3, 5, 4)


def test_cell_of_latents_is_painted_if_any_of_its_pixels_is() -> None:
    """One white pixel paints the cell that it is in, and no other."""
    mask = Image.new("L", (64, 48), 0)
    mask.putpixel((15, 8), 255)
    assert [tuple(place) for place in np.argwhere(cells(mask, 8, 6))] == [(1, 1)]


def test_picture_and_mask_of_another_shape_are_cut_to_their_middle() -> None:
    """What a picture and its mask have beyond the job's shape is cut off on both sides, not squeezed in."""
    wide = Image.new("RGB", (128, 32), "black")
    wide.paste("white", (48, 0, 80, 32))
    picture = decode_picture(encoded(wide), "initial picture", 64, 64)
    assert np.asarray(picture).min() == 255
    high = Image.new("L", (32, 128), 0)
    high.paste(255, (0, 48, 32, 80))
    assert np.asarray(decode_mask(encoded(high), 64, 64)).min() == 255


def test_picture_is_made_smaller_as_light_mixes() -> None:
    """Black and white mix to the grey that looks half as bright, as in stable-diffusion.cpp."""
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    picture = decode_picture(encoded(Image.fromarray(stripes)), "initial picture", 64, 64)
    assert np.abs(np.asarray(picture, dtype=int) - 188).max() <= 1  # sRGB's grey of half the light


@pytest.mark.parametrize("form", ["L", "1", "P", "RGB", "LA", "RGBA", "16 bits", "JPEG", "WEBP"])
def test_mask_may_be_kept_in_any_form(form: str) -> None:
    """What is white in a mask may change, in whatever numbers, colours or file the mask is kept."""
    half = Image.new("L", (64, 48), 0)
    half.paste(255, (32, 0, 64, 48))
    if form == "16 bits":
        data = encoded(Image.fromarray(np.asarray(half).astype(np.uint16) * 257))
    elif form in {"JPEG", "WEBP"}:
        data = encoded(half.convert("RGB"), form)
    else:
        data = encoded(half.convert(form))
    assert decode_mask(data, 64, 48).tobytes() == half.tobytes()


def test_transparent_mask_keeps() -> None:
    """White that is transparent in a mask protects: nobody painted there."""
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 8, 8))
    read = decode_mask(encoded(mask), 64, 64)
    assert read.getbbox() == (0, 0, 8, 8)


def test_black_mask_is_refused() -> None:
    """A mask that allows no change at all is an error, not a job for nothing."""
    with pytest.raises(JobError, match="black everywhere"):
        decode_mask(encoded(Image.new("L", (64, 64), 0)), 64, 64)
