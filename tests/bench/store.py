"""How long the check of verified models takes at the start; a part of ``tests.bench.download``.

The files are sparse: their content is never read, which tests/store/test_store.py proves.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from studio_worker.models import ModelFile
from studio_worker.store import Store
from studio_worker.store.ledger import Verified, file_name
from studio_worker.store.terms import fixed


def large_models(root: Path, *, count: int, size_bytes: int) -> list[ModelFile]:
    """Files that the ledger in ``root`` takes for verified, without a byte of content."""
    files = []
    ledger = {}
    for number in range(count):
        file = ModelFile(
            role="model",
            url=f"https://models.example/{number}.gguf",
            filename=f"{number}.gguf",
            approx_bytes=size_bytes,
            sha256=f"{number:064x}",
        )
        path = root / file_name(file)
        path.parent.mkdir(parents=True)
        with path.open("wb") as empty:
            empty.truncate(size_bytes)
        stat = path.stat()
        entry = Verified(stat.st_size, stat.st_mtime_ns, stat.st_ino, f"{number:064x}", file.url)
        ledger[file_name(file)] = asdict(entry)
        files.append(file)
    (root / "ledger.json").write_text(json.dumps(ledger))
    return files


def check_s(root: Path, files: list[ModelFile]) -> float:
    """What a start does with models that are all here."""
    started = time.perf_counter()
    store = Store(root, fixed(required=files))
    store.clean_staging()
    for file in files:
        store.ensure([file], model=file.filename)
    return time.perf_counter() - started


def measure(rounds: int) -> Iterator[tuple[str, float]]:
    """What is measured, and the median of it in seconds."""
    for count, size_bytes in ((5, 4_000_000_000), (200, 100_000_000)):
        with tempfile.TemporaryDirectory() as folder:
            files = large_models(Path(folder), count=count, size_bytes=size_bytes)
            check_s(Path(folder), files)  # the first notes which model uses what, as a download does
            check = statistics.median(check_s(Path(folder), files) for _ in range(rounds))
        yield f"ledger check, {count} files, {count * size_bytes / 1e9:.0f} GB", check
