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
from typing import IO, Any, Self

from studio_worker.errors import StoreError

_MAX_MEMBERS = 20_000
"""More than the largest models folder has files; each takes some kB."""

_MAX_NOTE_BYTES = 2**20
"""Of a header that says more of the next one: a long name, notes. They are read into memory as they are."""

_DAMAGE = (
    *(tarfile.TarError, EOFError, zlib.error, lzma.LZMAError),
    *(ValueError, TypeError, LookupError, OverflowError, RecursionError, MemoryError),
)
"""What reading a tar file that someone made up may end in, beside what the disk says."""


class _Sparing:
    """``file``, of which nobody reads more at once than a header may say."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_NOTE_BYTES:
            raise tarfile.ReadError(f"a name or note of {size} bytes")
        data: bytes = self.file.read(size)
        return data


class _Header(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        # Here, since what has been unpacked is seen nowhere else.
        if tarfile.fileobj is not None and not isinstance(tarfile.fileobj, _Sparing):
            tarfile.fileobj = _Sparing(tarfile.fileobj)  # type: ignore[assignment]
        return super().fromtarfile(tarfile)


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
            if isinstance(tar.fileobj, _Sparing):
                tar.fileobj = tar.fileobj.file
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
