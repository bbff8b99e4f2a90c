"""Every fault a download may meet, what became of it, and what it cost.

``python -m tests.transfer.fault_matrix`` prints it. A real client, a real server on loopback, real
processes and a real full disk. Bytes are counted at the server. While a fault runs the final name is looked
at again and again: what is seen there must be whole. ``test_fault_matrix.py`` runs the same list;
``--kills 50`` kills more often than the suite does.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from studio_worker.download import download_file
from studio_worker.errors import DownloadError
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import FileServer, ServedFile

SMALL = random.Random(1).randbytes(1_000_000)
LARGE = random.Random(2).randbytes(24 * 1024 * 1024)
"""Large enough for several connections."""
HTML = b"<!DOCTYPE html><html><body>Bandwidth limit exceeded</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 25165824\n"
RATE = 6_000_000
"""Bytes a second of one connection, so that several of them pay."""
QUICK = Policy(connect_s=5, stall_s=1, slow_s=0.5, delays_s=(0.0, 0.0, 0.0))
KILLS = 8

CHILD = """
import sys
from pathlib import Path
from studio_worker.download import ensure_file
from studio_worker.models import ModelFile
dest = Path(sys.argv[2])
print("started", flush=True)
ensure_file(dest.parent, ModelFile("model", sys.argv[1], dest.name, None, sys.argv[3]))
"""


class Lab:
    """One folder, one server, and the eye on the final name."""

    def __init__(self, folder: Path, server: FileServer, kills: int) -> None:
        self.dest = folder / "models" / "model.bin"
        self.server = server
        self.kills = kills
        self.right: set[str] = set()
        """Hashes of what may be seen under the final name."""
        self.was_wrong = False
        self._seen: object = None

    def serve(self, content: bytes, **faults: Any) -> ServedFile:
        rate = RATE if len(content) == len(LARGE) else None
        file = self.server.serve("/model.bin", content, **({"rate": rate} | faults))
        self.right.add(_sha256(content))
        return file

    def fetch(self, file: ServedFile, sha256: str | None, policy: Policy = QUICK, **options: Any) -> str:
        """The outcome in words: ``verified``, or the error's reason and text."""
        try:
            download_file(
                file.url,
                self.dest,
                sha256=sha256,
                policy=policy,
                progress=lambda *_: self.look(),
                **options,
            )
        except DownloadError as error:
            return f"{error.reason}: {error}"
        return "verified"

    def look(self) -> None:
        """Whether what is visible under the final name, if anything, is right."""
        try:
            stat = self.dest.stat()
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if seen != self._seen:
                self.was_wrong |= _sha256(self.dest.read_bytes()) not in self.right
                self._seen = seen
        except FileNotFoundError:
            pass

    @contextmanager
    def watched(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.002):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.look()


@dataclass(frozen=True)
class Ended:
    """How a fault ended; ``files`` is how many whole files were asked for."""

    file: ServedFile
    outcome: str
    files: int = 1


@dataclass(frozen=True)
class Fault:
    """``outcome``: what the outcome begins with; ``share``: so many bytes for each byte wanted, at most."""

    name: str
    run: Callable[[Lab], Ended]
    outcome: str
    share: float


@dataclass(frozen=True)
class Result:
    """What became of one fault; ``share`` is bytes fetched for each byte wanted."""

    outcome: str
    fetched: int
    share: float
    requests: int
    was_wrong: bool
    leftovers: tuple[str, ...]


def measure(fault: Fault, folder: Path, kills: int = KILLS) -> Result:
    """Let ``fault`` happen in the empty ``folder``."""
    with FileServer() as server:
        lab = Lab(folder, server, kills)
        with lab.watched():
            ended = fault.run(lab)
        file = ended.file
        left = (path for path in folder.rglob("*") if path.is_file() and path != lab.dest)
        return Result(
            ended.outcome,
            file.bytes_sent,
            file.bytes_sent / (len(file.content) * ended.files),
            len(file.requests),
            lab.was_wrong,
            tuple(sorted(path.suffix for path in left)),
        )


def _served(content: bytes, *, is_hash_known: bool = True, **faults: Any) -> Callable[[Lab], Ended]:
    """One download from a server that does ``faults``."""

    def run(lab: Lab) -> Ended:
        file = lab.serve(content, **faults)
        return Ended(file, lab.fetch(file, _sha256(content) if is_hash_known else None))

    return run


def _instead(content: bytes, wanted: bytes, *, is_hash_known: bool) -> Callable[[Lab], Ended]:
    """The server has ``content`` where ``wanted`` should be."""

    def run(lab: Lab) -> Ended:
        file = lab.serve(content)
        lab.right = {_sha256(wanted)}
        lab.dest = lab.dest.with_suffix(".safetensors")
        return Ended(file, lab.fetch(file, _sha256(wanted) if is_hash_known else None))

    return run


def _stalled(lab: Lab) -> Ended:
    """Every fourth connection is silent, the first one among them."""
    file = lab.serve(LARGE, hold_every=4)
    return Ended(file, lab.fetch(file, file.sha256))


def _flipped_once(lab: Lab) -> Ended:
    """A byte is wrong until the whole is fetched again by one connection."""
    file = lab.serve(LARGE, flip_at=9_000_000)
    file.on_request = lambda _: setattr(file, "flip_at", None) if file.bytes_sent >= len(LARGE) else None
    return Ended(file, lab.fetch(file, _sha256(LARGE)))


def _changed(lab: Lab) -> Ended:
    """The file on the server is another one from the third request on."""
    file = lab.serve(LARGE)
    lab.right = {_sha256(LARGE[::-1])}
    file.on_request = lambda earlier: setattr(file, "content", LARGE[::-1]) if earlier == 2 else None
    return Ended(file, lab.fetch(file, None))


def _full_disk(lab: Lab) -> Ended:
    """Somebody else fills the disk while several connections write; then there is room again."""
    with _small_disk(lab.dest.parent) as disk:
        file = lab.serve(LARGE)
        ballast = disk / "ballast"
        writes = threading.Lock()

        def fill(earlier: int) -> None:
            with writes:
                if earlier == 2:
                    free = shutil.disk_usage(disk).free
                    ballast.write_bytes(bytes(max(0, free - 4_000_000)))

        file.on_request = fill
        first = lab.fetch(file, file.sha256)
        file.on_request = None
        ballast.unlink()
        second = lab.fetch(file, file.sha256)
        lab.look()
        return Ended(file, f"{first.partition(' of ')[0]}, then {second}")


def _too_large_for_the_disk(lab: Lab) -> Ended:
    """The disk is too small from the beginning."""
    with _small_disk(lab.dest.parent) as disk:
        file = lab.serve(LARGE)
        (disk / "ballast").write_bytes(bytes(30_000_000))
        return Ended(file, lab.fetch(file, file.sha256))


def _two_processes(content: bytes) -> Callable[[Lab], Ended]:
    """Two processes want one file at the same moment."""

    def run(lab: Lab) -> Ended:
        file = lab.serve(content)
        children = [_child(file, lab.dest) for _ in range(2)]
        for child in children:
            child.communicate()
        ends = [child.returncode for child in children]
        return Ended(file, "verified" if ends == [0, 0] and lab.dest.exists() else f"ended with {ends}")

    return run


def _killed(lab: Lab) -> Ended:
    """SIGKILL at random moments, again and again; a whole file is taken away, so that it goes on."""
    chance = random.Random(3)
    file = lab.serve(LARGE)
    files = 1
    for _ in range(lab.kills):
        child = _child(file, lab.dest)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(chance.uniform(0.0, 1.0))  # a random moment, not a wait for something
        child.send_signal(signal.SIGKILL)
        child.communicate()
        lab.look()
        if lab.dest.exists():
            lab.dest.unlink()
            files += 1
    return Ended(file, lab.fetch(file, file.sha256), files)


OK = "verified"
FAULTS = (
    Fault("none", _served(LARGE), OK, 1.1),
    Fault("dropped after 5 MB", _served(LARGE, drop_after=5_000_000), OK, 1.1),
    Fault("dropped after 70 kB, no hash", _served(SMALL, is_hash_known=False, drop_after=70_000), OK, 1.0),
    Fault("every fourth connection stalls", _stalled, OK, 1.4),
    Fault(
        "cut below its Content-Length", _served(SMALL, declared_extra=9, ranges=False), "streaming body", 9
    ),
    Fault("cut, no length", _served(LARGE, no_length=True, drop_after=9_000_000, ranges=False), "sha256", 1),
    Fault("well-formed, 1 MiB short", _instead(LARGE[2**20 :], LARGE, is_hash_known=True), "sha256", 2.4),
    Fault("flipped byte", _served(LARGE, flip_at=9_000_000), "sha256 mismatch", 2.4),
    Fault("flipped byte, once", _flipped_once, OK, 2.4),
    Fault("200 for a range", _served(LARGE, ranges=False), OK, 1.1),
    Fault("wrong Content-Range", _served(LARGE, range_shift=7), OK, 1.1),
    Fault("416 for ranges", _served(LARGE, range_answers=[(416, {})] * 40), OK, 1.1),
    Fault("429 with Retry-After", _served(LARGE, range_answers=[(429, {"Retry-After": "1"})] * 9), OK, 1.1),
    Fault("429 at first", _served(SMALL, answers=[(429, {"Retry-After": "0"})]), OK, 1.0),
    Fault("503 for ranges", _served(LARGE, range_answers=[(503, {})] * 9), OK, 1.1),
    Fault("503 twice", _served(SMALL, answers=[(503, {})] * 2), OK, 1.0),
    Fault("403 for ranges", _served(LARGE, range_answers=[(403, {})] * 40), OK, 1.1),
    Fault("redirect loop", _served(SMALL, redirect="/model.bin"), "request error", 0),
    Fault("changed file, no hash", _changed, OK, 1.5),
    Fault("ranges shorter than asked", _served(LARGE, range_cap=1_000_000), OK, 1.1),
    Fault("no validator", _served(LARGE, etag=None), OK, 1.1),
    Fault("gzip", _served(SMALL, extra_headers={"Content-Encoding": "gzip"}), "request error", 1),
    Fault("HTML page", _instead(HTML, LARGE, is_hash_known=True), "sha256 mismatch", 1),
    Fault("HTML page, no hash", _instead(HTML, LARGE, is_hash_known=False), "size mismatch", 1),
    Fault("git-lfs pointer", _instead(POINTER, LARGE, is_hash_known=False), "size mismatch", 1),
    Fault("disk full in the middle", _full_disk, "streaming body", 1.1),
    Fault("disk too small", _too_large_for_the_disk, "streaming body", 0.1),
    Fault("two processes", _two_processes(SMALL), OK, 1.0),
    Fault("two processes, large file", _two_processes(LARGE), OK, 1.1),
    Fault("kill -9", _killed, OK, 1.4),
)


def main() -> None:
    """Let everything happen and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=KILLS, help="how often the process is killed")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    options = parser.parse_args()
    table = Table("fault", "outcome", "fetched MB", "of the size", "requests", "wrong file visible", "left")
    is_right = True
    for fault in (each for each in FAULTS if options.only in each.name):
        with tempfile.TemporaryDirectory() as folder:
            result = measure(fault, Path(folder), options.kills)
        is_right &= result.outcome.startswith(fault.outcome) and not result.was_wrong
        name = f"{fault.name} x {options.kills}" if fault.run is _killed else fault.name
        table.add_row(
            name,
            re.sub(r"GET http\S+: ", "", result.outcome).replace(str(folder), "")[:90],
            f"{result.fetched / 1e6:.2f}",
            f"{100 * result.share:.1f}%",
            str(result.requests),
            "YES" if result.was_wrong else "never",
            " ".join(result.leftovers),
        )
    Console(width=150).print(table)
    sys.exit(0 if is_right else 1)


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 40 MB at ``folder``. Raises CalledProcessError where nothing may be mounted."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield folder
    finally:
        # Lazily: whoever watches the folder may be reading there at this moment.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _child(file: ServedFile, dest: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, file.url, str(dest), file.sha256],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main()
