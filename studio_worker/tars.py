"""Tar files that come from elsewhere, opened within limits.

Python's reader trusts their headers: it goes round for ever where a size is below zero, takes as much memory
as a name says it is long, and raises whatever an odd note leads it to. Every header is looked at before any
content.
"""

from __future__ import annotations

import contextlib
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

from studio_worker.errors import StoreError

_MAX_MEMBERS = 20_000
"""More than the largest models folder has files; each takes some kB."""

_MAX_NOTE_BYTES = 2**20
"""Of a header that says more of the next one: a long name, notes. They are read into memory as they are."""

_NOTES = {
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
}

_DAMAGE = (
    *(tarfile.TarError, EOFError, zlib.error, lzma.LZMAError),
    *(ValueError, TypeError, LookupError, OverflowError, RecursionError, MemoryError),
)
"""What reading a tar file that someone made up may end in, beside what the disk says."""


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _NOTES and header.size > _MAX_NOTE_BYTES:
            raise tarfile.ReadError(f"a name or note of {header.size} bytes")
        return header


@contextlib.contextmanager
def open_tar(source: Path, file: IO[bytes] | None = None) -> Iterator[tarfile.TarFile]:
    """The tar file ``source``, compressed or not; ``file`` where the caller has opened it.

    Raises:
        StoreError: it is none, is damaged, or has headers beyond what any bundle has; while it is open, too.
        OSError: the disk does not give it.
    """
    try:
        # Packed again by hand, it may be compressed.
        with tarfile.open(source, "r:*", fileobj=file, tarinfo=_Header) as tar:
            _check(tar)
            yield tar
    except _DAMAGE as error:
        why = str(error) or type(error).__name__
        raise StoreError(f"{source}: is no bundle, or a damaged one: {why}") from error


def _check(tar: tarfile.TarFile) -> None:
    at = -1
    for count, header in enumerate(tar):
        if header.offset <= at or header.size < 0:
            raise tarfile.ReadError("its members do not follow each other")
        if count >= _MAX_MEMBERS:
            raise tarfile.ReadError(f"it has more than {_MAX_MEMBERS} members")
        at = header.offset
