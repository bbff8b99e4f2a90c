"""What the studio asks of whatever keeps its bytes, and how that says no.

Bytes are there before a row names them, and go after it has gone: a crash in between leaves a picture too
many, never a row without its picture.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import IO, Protocol

from studio_worker.errors import ProtocolError

MARK = "studio"
"""The file or object that says whose pictures lie in a place; of one name everywhere, so that copies have it
too.
"""

_KEY_BYTES = 8
"""Two deliveries of one job may come at the same moment; each has a key of its own."""
_KEY = re.compile(rf".+-[0-9a-f]{{{2 * _KEY_BYTES}}}\.[a-z0-9]+")


class CannotStore(ProtocolError):
    """What the studio keeps its data in takes or gives none now; nothing of this step was kept.

    Its text is for the log: it may name servers. ``for_strangers`` is what may be said to anybody.
    """

    for_strangers = "the studio cannot store anything now"


class StorageFull(CannotStore):
    """The disk takes no more of the studio's data."""

    for_strangers = "the studio's disk is full or cannot be written"


class StorageAway(CannotStore):
    """A storage on the network does not answer, or says that it cannot now."""

    for_strangers = "what the studio keeps its data in does not answer"


class PictureGone(ProtocolError):
    """Nothing lies under a key that a row names: somebody took it away."""


class RangeRefused(ProtocolError):
    """The picture is shorter than the part that was asked for."""


@dataclass(frozen=True)
class StoredBytes:
    """Where some bytes lie, and how many they are."""

    key: str
    size_bytes: int


@dataclass(frozen=True)
class Reading:
    """Bytes on their way. Whoever has it closes ``content``.

    Args:
        content_range: as the header of that name has it, where this is a part of the whole.
    """

    content: IO[bytes]
    size_bytes: int
    content_range: str | None = None


class Pictures(Protocol):
    """Bytes by keys that the database holds. All methods may be called from any thread, and may block."""

    @property
    def is_shared(self) -> bool:
        """Whether other studio processes put pictures here at the same time."""

    def mark(self) -> str | None:
        """What says whose pictures lie there: see :mod:`marks`. Raises ConfigError."""

    def check(self, owner: str, /) -> bool:
        """Try out at the start what pictures will need; whether they are marked as this owner's.

        Args:
            owner: what only the studio of this database says; pictures of another owner are not shared.

        Raises:
            ConfigError: a mistake of the operator, or another's mark; StateUnavailable for what may pass.
        """

    def claim(self, owner: str, newest_key: str | None, *, is_first: bool) -> None:
        """Mark what lies there as this owner's, unless that could be another's. Raises ConfigError.

        Args:
            newest_key: of the pictures that its database names.
            is_first: the database has no place for pictures yet.
        """

    def put(self, content: IO[bytes], name: str, ext: str) -> StoredBytes:
        """Keep what ``content`` has from where it stands, piece by piece. Raises CannotStore.

        Args:
            content: can be wound back, for another try.
            name: what people who look into the storage may know it by.
        """

    def open(self, key: str, asked: str | None = None, /) -> Reading:
        """The bytes of a key, piece by piece.

        Args:
            asked: a ``Range`` header, of which a storage may know one form or none.

        Raises:
            PictureGone: they are not there.
            RangeRefused: they are fewer.
            CannotStore: the storage does not answer.
        """

    def has(self, key: str, /) -> bool:
        """Whether the bytes are there. Raises CannotStore."""

    def address(self, key: str, /) -> str | None:
        """Where a worker gets the bytes by itself, without credentials and for a while; ``None`` where only
        the studio can give them.
        """

    def delete(self, key: str) -> None:
        """Forget the bytes, or leave them to :meth:`remove_unnamed` where a storage does not answer; they may
        be gone already. Raises StorageFull where the disk is read-only.
        """

    def clear_unfinished(self) -> None:
        """Remove what a crash left half-written. Only while no other studio has the storage."""

    def remove_unnamed(self, named: Collection[str], since: float, until: float = float("inf")) -> int:
        """Remove pictures that no row names and that were put here between two times; returns how many. Only
        those that no delivery can be about to name.
        """


def new_key(name: str, ext: str) -> str:
    """A key that nothing has yet."""
    return f"{name}-{secrets.token_hex(_KEY_BYTES)}.{ext}"


def is_key(name: str) -> bool:
    """Whether :func:`new_key` can have made it; whatever else lies in a storage is not the studio's."""
    return _KEY.fullmatch(name) is not None
