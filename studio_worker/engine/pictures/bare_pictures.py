"""Pictures without what is not the picture: text, profiles and other metadata never reach the decoder.

What no picture needs must not make a good one unreadable: a workflow of megabytes, a profile, a tag of the
wrong kind. Pillow gives up over some of it in PNG and TIFF, which are rewritten here without looking at their
pixels; its readers of the other formats leave such things alone. Works on bytes, and refuses nothing: what is
damaged comes out damaged.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}
"""eXIf says which side is up. Without acTL an animation is its first picture."""

_TIFF_KEPT = {
    *range(254, 260),  # kind, size, bits, compression
    *(262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 332),  # colours, strips, orientation
    *range(322, 326),  # tiles
    *(338, 339, 347),  # alpha, kind of numbers, JPEG's tables
    *range(512, 533),  # old JPEG; YCbCr
}
"""Tags by which a picture is read (TIFF 6.0; Technical Notes 1 and 2). Of several pictures one stays."""


def bare(data: bytes) -> bytes:
    """The picture in ``data``, as far as its format is rewritten here."""
    if data.startswith(_PNG):
        return b"".join((_PNG, *_png(data)))
    for mark, order in ((b"II*\0", "<"), (b"MM\0*", ">")):
        if data.startswith(mark):
            return _tiff(data, order)
    return data


def _png(data: bytes) -> Iterator[bytes]:
    at = len(_PNG)
    scale = 0
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):  # cut short: within the picture, or only beside it
            yield data[at:] if kind in _PNG_KEPT else b""
            return
        if kind == b"IHDR" and length >= 10:
            scale = _key_scale(data[at + 16], data[at + 17])
        if kind == b"tRNS" and scale:
            yield _chunk(kind, _key(data[at + 8 : end - 4], scale))
        elif kind == b"eXIf":  # with a checksum of its own: a wrong one matters to no picture
            yield _chunk(kind, data[at + 8 : end - 4])
        elif kind in _PNG_KEPT:
            yield data[at:end]
        at = end
        if kind == b"IEND":
            return
    yield data[at:]


def _key_scale(depth: int, colours: int) -> int:
    """What makes of a transparent sample of ``depth`` bits one as Pillow reads it: of 8 bits, but for grey of
    16. A negative number is how many bits it loses; 0 where nothing has to be done.
    """
    if colours == 0:
        return {2: 85, 4: 17}.get(depth, 0)
    return -8 if (colours, depth) == (2, 16) else 0


def _key(samples: bytes, scale: int) -> bytes:
    numbers = struct.unpack(f">{len(samples) // 2}H", samples[: len(samples) // 2 * 2])
    scaled = (each >> -scale if scale < 0 else each * scale for each in numbers)
    return b"".join(struct.pack(">H", each & 0xFFFF) for each in scaled)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _tiff(data: bytes, order: str) -> bytes:
    """``data`` with another directory at its end, which lists what the picture needs of the first one."""
    try:
        (first,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, first)
        places = range(first + 2, first + 2 + 12 * count, 12)
        entries = [data[at : at + 12] for at in places]
        kept = [each for each in entries if struct.unpack_from(f"{order}H", each)[0] in _TIFF_KEPT]
    except struct.error:
        return data
    padding = b"\0" * (len(data) % 2)
    header = data[:4] + struct.pack(f"{order}I", len(data) + len(padding))
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return header + data[8:] + padding + directory
