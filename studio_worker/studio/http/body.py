"""What a request sends: read piece by piece while it is sent, a picture from its file.

So an upload takes no more memory than a piece of it, however large the picture and slow the link. And one
write of everything would have to be through within the time limit.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO


class Body:
    """Some bytes and open files, one after the other.

    Args:
        parts: in the order in which they are sent. Files are the caller's to close.
        on_sent: called when all of it was taken for sending.
    """

    def __init__(
        self, parts: Sequence[bytes | BinaryIO], on_sent: Callable[[], object] = lambda: None
    ) -> None:
        self._parts = [io.BytesIO(part) if isinstance(part, bytes) else part for part in parts]
        self.len = sum(part.seek(0, os.SEEK_END) for part in self._parts)
        """By this name requests asks for it."""
        self._on_sent = on_sent
        self.failure: OSError | None = None
        """Why a part could not be read. The libraries take that for the connection's."""
        self.seek(0)

    def is_sent(self) -> bool:
        """Whether all of it was taken for sending: without its end no studio takes a request for whole."""
        return self._taken == self.len

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """To its beginning, and nowhere else."""
        if (place, whence) != (0, os.SEEK_SET):
            raise io.UnsupportedOperation("it is sent from its beginning")
        for part in self._parts:
            part.seek(0)
        self._left, self._taken = list(self._parts), 0
        return 0

    def tell(self) -> int:
        return self._taken

    def read(self, size: int) -> bytes:
        """The next piece, of ``size`` at most; an empty one at the end.

        Raises:
            OSError: a file cannot be read, or has become shorter.
        """
        try:
            while self._left:
                if piece := self._left[0].read(size):
                    self._taken += len(piece)
                    return piece
                self._left.pop(0)
            if not self.is_sent():
                raise OSError(errno.EIO, "a file has become shorter while it was sent")
        except OSError as error:
            self.failure = error
            raise
        self._on_sent()
        return b""

    def __iter__(self) -> Iterator[bytes]:
        """For requests, which takes nothing else for a stream."""
        return iter(lambda: self.read(io.DEFAULT_BUFFER_SIZE), b"")
