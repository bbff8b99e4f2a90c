"""Sources that were understood, kept so that a job need not read its files' headers again.

The header of a GGUF language model alone takes a tenth of a second to read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from studio_worker.engine.families import FAMILIES, identify
from studio_worker.engine.families.family import Blueprint, Family
from studio_worker.errors import NotServed
from studio_worker.models import LocalFile

_KEPT = 32
"""More models than a box turns between; a kept one takes about a megabyte."""


class Sources:
    """Blueprints by their files, least recently used first. Safe from any thread.

    Args:
        families: those that are served.
    """

    def __init__(self, families: Sequence[Family] = FAMILIES) -> None:
        self._families = families
        self._known: OrderedDict[tuple[tuple[LocalFile, int, int], ...], Blueprint] = OrderedDict()
        self._guard = threading.Lock()

    def identify(self, files: Sequence[LocalFile]) -> Blueprint:
        """What the source of ``files`` is; files that have changed on disk are read again.

        Raises:
            JobError: as :func:`studio_worker.engine.families.identify`.
        """
        try:
            stats = [file.path.stat() for file in files]
        except OSError:
            return self._identified(files)  # says what is wrong
        key = tuple((file, s.st_size, s.st_mtime_ns) for file, s in zip(files, stats, strict=True))
        with self._guard:
            if key not in self._known:
                self._known[key] = self._identified(files)
                if len(self._known) > _KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            return self._known[key]

    def _identified(self, files: Sequence[LocalFile]) -> Blueprint:
        try:
            return identify(files, self._families)
        except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, RecursionError) as error:
            # A scalar where a matrix was expected: such a header was made up, or is of a model to come.
            names = ", ".join(file.path.name for file in files)
            raise NotServed(f"{names}: tensors of shapes that no known model has") from error
