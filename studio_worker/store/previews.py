"""The headers of files that are not here yet, so that a model can be judged before it is fetched.

Owns how much such a look may cost: seconds, bytes, what is remembered. What it shows are files of full length
of which only the headers are there, in a folder of their own that is gone afterwards: no download goes on
from them, and nothing of them is verified.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from studio_worker.models import LocalFile, ModelFile
from studio_worker.network.uplink import Uplink
from studio_worker.store.at_once import do_all
from studio_worker.store.ledger import content_key
from studio_worker.store.terms import AskTerms
from studio_worker.transfer.beginning import Beginning, fetch_beginning

WITHIN_S = 5.0
"""For all files of a model together; some ten requests one after the other, over an ocean."""

_AT_ONCE = 4

MOST_BYTES = 16 * 2**20
"""Of one file: the vocabulary of a language model, in a GGUF file's header, has 6 to 13 MB."""

MOST_OF_MODEL_BYTES = 64 * 2**20
"""Of all files of a model, in equal shares; so much is remembered too."""

_REMEMBERED_S = 600.0
"""Whoever rejects a job is offered it, and others of the model, again."""


class Preview(NamedTuple):
    """The files, and how many bytes were fetched for that."""

    files: tuple[LocalFile, ...]
    received_bytes: int


class Previews:
    """Asks the files' servers. Safe from any thread.

    Args:
        terms: by which of them files are fetched.
        here: where a file is, if it is here and verified.
        within_s: a look that takes longer is given up.
    """

    def __init__(
        self, terms: AskTerms, here: Callable[[ModelFile], Path | None], *, within_s: float = WITHIN_S
    ) -> None:
        self._terms = terms
        self._here = here
        self._within_s = within_s
        self._known: OrderedDict[str, tuple[float, Beginning]] = OrderedDict()
        self._guard = threading.Lock()

    def are_of_use(self, files: Iterable[ModelFile]) -> bool:
        """Whether some of ``files`` are not here. Required ones are being fetched, whatever they are."""
        required = {content_key(file) for file in self._terms().required}
        missing = [content_key(file) for file in files if self._here(file) is None]
        return bool(missing) and required.isdisjoint(missing)

    @contextlib.contextmanager
    def shown(self, files: Sequence[ModelFile]) -> Iterator[Preview]:
        """Every one of ``files`` as if it were here, as far as its header goes, while this lasts.

        Raises:
            DownloadError: a server does not give that, or not soon enough.
            OSError: there is no room for them.
        """
        here = {content_key(file): self._here(file) for file in files}
        beginnings, received_bytes = self._beginnings(
            [file for file in files if here[content_key(file)] is None]
        )
        with tempfile.TemporaryDirectory(prefix="studio-worker-headers-") as folder:
            shown = []
            for number, file in enumerate(files):
                path = here[content_key(file)]
                if path is None:
                    path = Path(folder, str(number), file.filename)
                    _lay_out(path, beginnings[content_key(file)])
                shown.append(LocalFile(file.role, path, content_key(file)))
            yield Preview(tuple(shown), received_bytes)

    def _beginnings(self, files: Sequence[ModelFile]) -> tuple[dict[str, Beginning], int]:
        """By the files' contents, and how many bytes came for them now."""
        wanted = {content_key(file): file for file in files}
        found = self._remembered(wanted)
        missing = {key: file for key, file in wanted.items() if key not in found}
        if missing:
            share = min(MOST_BYTES, MOST_OF_MODEL_BYTES // len(wanted))
            at_once = min(_AT_ONCE, self._terms().policy.connections.most)
            over = threading.Event()
            deadline = threading.Timer(self._within_s, over.set)
            deadline.daemon = True
            deadline.start()
            try:
                do_all([partial(self._fetch, file, share, found) for file in missing.values()], over, at_once)
            finally:
                deadline.cancel()
            self._remember({key: found[key] for key in missing})
        return found, sum(len(found[key].content) for key in missing)

    def _fetch(
        self, file: ModelFile, most_bytes: int, found: dict[str, Beginning], over: threading.Event
    ) -> None:
        policy = self._terms().policy_for(file.url)
        hurried = dataclasses.replace(
            policy,
            connect_s=min(policy.connect_s, self._within_s),
            first_byte_s=min(policy.first_byte_s, self._within_s),
            stall_s=min(policy.stall_s, self._within_s),
            uplink=Uplink(),  # an offer waits for it: it gives way to no upload
        )
        found[content_key(file)] = fetch_beginning(file.url, hurried, over, most_bytes=most_bytes)

    def _remembered(self, keys: Iterable[str]) -> dict[str, Beginning]:
        now = time.monotonic()
        with self._guard:
            return {
                key: known[1]
                for key in keys
                if (known := self._known.get(key)) is not None and now - known[0] < _REMEMBERED_S
            }

    def _remember(self, found: Mapping[str, Beginning]) -> None:
        with self._guard:
            for key, begun in found.items():
                self._known.pop(key, None)
                self._known[key] = (time.monotonic(), begun)
            while sum(len(begun.content) for _, begun in self._known.values()) > MOST_OF_MODEL_BYTES:
                self._known.popitem(last=False)


def _lay_out(path: Path, begun: Beginning) -> None:
    path.parent.mkdir()
    path.write_bytes(begun.content)
    with path.open("r+b") as hollow:
        hollow.truncate(begun.size_bytes)  # takes no room
