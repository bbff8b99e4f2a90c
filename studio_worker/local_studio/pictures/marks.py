"""Whose a place of pictures is: what its mark says, and which database may put its own there.

A mark is a database's name. Behind it stand the names of those that this one was carried from while their
pictures stayed in the place: they may not come back to it, and find out why.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from studio_worker.errors import ConfigError

_NAME = re.compile(r"[0-9a-f]{64}")
"""As :func:`places.owner_of` makes them."""


def is_mark(text: str) -> bool:
    """Whether a studio has written it."""
    names = text.split()
    return bool(names) and all(map(_NAME.fullmatch, names))


class Standing(Enum):
    """What a mark is to a database."""

    FREE = auto()
    """There is none."""
    OWN = auto()
    INHERITED = auto()
    """Of a database that this one was carried from."""
    CARRIED = auto()
    """Of one that this one was carried to."""
    ANOTHERS = auto()


def standing(mark: str | None, owner: str) -> Standing:
    """What the mark of a place is to the database that would write ``owner`` there."""
    if mark is None:
        return Standing.FREE
    name, *before = owner.split()
    marked, *marked_before = mark.split() or [""]
    if marked == name:
        return Standing.OWN
    if marked in before:
        return Standing.INHERITED
    return Standing.CARRIED if name in marked_before else Standing.ANOTHERS


@dataclass(frozen=True)
class Spot:
    """A place, as an operator knows it.

    Args:
        kind: ``folder`` or ``prefix``.
        source: the folder, or its address.
    """

    kind: str
    source: str

    def is_own(self, mark: str | None, owner: str) -> bool:
        """Whether it is marked as this owner's; not where it may become so. Raises ConfigError where it is
        another's.
        """
        found = standing(mark, owner)
        if found is Standing.CARRIED:
            raise self.refused(
                "this studio was carried to another database, and these pictures are that one's now",
                "start the studio with the --database that it was carried to: this one would remove pictures"
                " of it",
            )
        if found is Standing.ANOTHERS:
            raise self.refused(
                "the pictures there belong to another studio's database",
                f"choose another {self.kind}: the one would remove the other's pictures",
            )
        return found is Standing.OWN

    def require_unclaimed(
        self,
        newest_key: str | None,
        has: Callable[[str], bool],
        is_unused: Callable[[], bool],
        is_first: bool,
    ) -> None:
        """A place without a mark is a database's that names a picture in it, or that has no place yet and
        finds it empty. Raises ConfigError for any other.
        """
        if newest_key is not None and has(newest_key):
            return
        if not is_unused():
            raise self.refused(
                "has pictures that this database does not know", f"choose another {self.kind}, best a new one"
            )
        if not is_first or newest_key is not None:
            raise self.refused(
                "this database's pictures are in another place",
                f"name the {self.kind} that it was started with, or its copy with all that is in it",
            )

    def refused(self, problem: str, cure: str) -> ConfigError:
        """What is said of the option that names it."""
        return ConfigError(problem, cure=cure, key="--pictures", source=self.source)
