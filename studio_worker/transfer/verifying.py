"""Whether staged bytes are the file that is wanted: its length, and its hash or, without one, its header."""

from __future__ import annotations

from studio_worker.errors import DownloadError, PageInPlace
from studio_worker.formats import header_problem, impostor, is_page
from studio_worker.transfer.staging import Staged
from studio_worker.transfer.wanted import Wanted


def verify(staged: Staged, wanted: Wanted) -> None:
    """Raises DownloadError (``size mismatch`` or ``sha256 mismatch``) where they are not."""
    if wanted.size not in {None, staged.length}:
        raise wanted.wrong_size(staged.length, wanted.size)
    if wanted.sha256 not in {None, digest := staged.hexdigest()}:
        what = impostor(staged.path)
        problem = f"this is {what}" if what else f"{digest} instead of {wanted.sha256}"
        raise _wrong(staged, "sha256 mismatch", f"GET {wanted.name}: sha256 mismatch: {problem}")
    if wanted.sha256 is None and (found := header_problem(staged.path, wanted.dest.name)):
        # Of a kind with a wrong length, which may well be right; so it is not said.
        raise _wrong(staged, "size mismatch", f"GET {wanted.name}: not the file that is wanted: {found}")


def _wrong(staged: Staged, reason: str, message: str) -> DownloadError:
    kind = PageInPlace if is_page(staged.path) else DownloadError
    return kind(reason, message)
