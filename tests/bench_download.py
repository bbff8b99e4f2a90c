"""The downloader beside curl, aria2c and huggingface_hub, from one server on loopback; sha256 included.

``python -m tests.bench_download`` prints medians; ``REPEATS=3`` and ``SIZE_MIB=512`` in the environment make
it shorter. A peer that is not installed is left out with a note.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPEATS = int(os.environ.get("REPEATS", "5"))
SIZE_MIB = int(os.environ.get("SIZE_MIB", "2048"))

OURS = """
import sys
from pathlib import Path
from studio_worker.download import download_file
download_file(sys.argv[1], Path(sys.argv[2]), sha256=sys.argv[3])
"""
HUB = """
import sys
from huggingface_hub.file_download import http_get
with open(sys.argv[2], "wb") as file:
    http_get(sys.argv[1], file)
"""


def main() -> None:
    """Run every case with everybody and print one table."""
    table = Table(
        "case", "who", "wall s", "ours / theirs", "CPU s", "peak MiB", title=f"{os.cpu_count()} cores"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, large = _file(folder / "small", 256), _file(folder / "large", SIZE_MIB)
        cases = (
            ("256 MiB, 20 MB/s a connection, 80 ms", small, ("20", "80"), REPEATS),
            (f"{SIZE_MIB} MiB, no cap", large, ("0", "0"), REPEATS),
            ("256 MiB, dropped every 32 MiB", small, ("0", "0", "32"), REPEATS),
            (f"{SIZE_MIB} MiB, 20 MB/s a connection, 80 ms", large, ("20", "80"), 1),
        )
        for title, path, server, repeats in cases:
            digest = _sha256(path)
            is_patient = path == small or server[0] == "0"
            ours = 0.0
            for who, command in _commands(folder / "out", digest).items():
                if command is None or ("32" in server and who != "ours"):
                    if command is None:
                        table.add_row(title, who, "not installed", "", "", "")
                    continue
                if not is_patient and who in {"curl + openssl", "aria2c -x1", "huggingface_hub"}:
                    continue  # known: as long as one connection takes
                walls, cpus, peaks = [], [], []
                with _server(path, server) as url:
                    for _ in range(repeats):
                        wall, cpu, peak = _run(url, command, folder / "out", digest)
                        walls.append(wall)
                        cpus.append(cpu)
                        peaks.append(peak)
                wall = statistics.median(walls)
                ours = wall if who == "ours" else ours
                ratio = "" if who == "ours" else f"{ours / wall:.2f}"
                cells = (f"{wall:.2f}", ratio, f"{statistics.median(cpus):.2f}", f"{max(peaks):.0f}")
                table.add_row(title, who, *cells)
    Console(width=120).print(table)


def _commands(out: Path, digest: str) -> dict[str, list[list[str]] | None]:
    """What each runs, ``URL`` in the place of the address; all but ours hash afterwards."""
    check = ["openssl", "dgst", "-sha256", str(out)]
    aria = ["aria2c", "-q", "--allow-overwrite=true", "--file-allocation=none", "-d", str(out.parent)]
    aria += ["-o", out.name, "URL"]
    has_aria = shutil.which("aria2c") is not None
    has_hub = subprocess.run([sys.executable, "-c", "import huggingface_hub"], check=False).returncode == 0
    return {
        "ours": [[sys.executable, "-c", OURS, "URL", str(out), digest]],
        "curl + openssl": [["curl", "-s", "-o", str(out), "URL"], check],
        "aria2c -x1": [[*aria, "-x1", "-s1"], check] if has_aria else None,
        "aria2c -x16": [[*aria, "-x16", "-s16"], check] if has_aria else None,
        "huggingface_hub": [[sys.executable, "-c", HUB, "URL", str(out)], check] if has_hub else None,
    }


def _run(url: str, commands: list[list[str]], out: Path, digest: str) -> tuple[float, float, float]:
    """Wall and CPU seconds of all ``commands``, and the peak memory of the largest in MiB."""
    out.unlink(missing_ok=True)
    started, cpu, peak = time.perf_counter(), 0.0, 0.0
    for command in commands:
        words = [url if word == "URL" else word for word in command]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, command
        cpu += used.ru_utime + used.ru_stime
        peak = max(peak, used.ru_maxrss / 1024)
    wall = time.perf_counter() - started
    assert _sha256(out) == digest
    return wall, cpu, peak


@contextlib.contextmanager
def _server(path: Path, options: tuple[str, ...]) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.bench_server", str(path), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/file"
        process.terminate()


def _file(path: Path, size_mib: int) -> Path:
    with path.open("wb") as file:
        for _ in range(size_mib):
            file.write(os.urandom(2**20))
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    main()
