"""The downloader beside curl, aria2c, huggingface_hub and hf_transfer, from one server on loopback.

``python -m tests.bench.download`` prints medians, the sha256 of the result included, with the ratio to every
peer of the same run. ``--rounds 1``, ``--case NAME`` and ``--size-mib`` make it shorter. A peer that is not
installed is left out with a note; hf_transfer works with an old huggingface_hub only, so both get a virtual
environment of their own in the user's cache. Files lie in memory where there is room, because the peers do
not wait for the disk (ours does).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench import store as bench_store

OLD_HUB = ("huggingface_hub==0.36.2", "hf_transfer==0.1.9", "requests")
"""The last of huggingface_hub that works with hf_transfer."""

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

CURL, ARIA_1, ARIA_16, HUB_NAME, HF = (
    "curl + openssl",
    "aria2c -x1",
    "aria2c -x16",
    "huggingface_hub",
    "hf_transfer",
)


@dataclass(frozen=True)
class Case:
    """One way the server behaves, who is measured with it, and the most that ours may take of a peer's time.

    ``is_large``: ``--size-mib`` instead of 256 MiB.
    """

    name: str
    title: str
    server: tuple[str, ...]
    goals: dict[str, float]
    peers: tuple[str, ...] = (CURL, ARIA_1, ARIA_16, HUB_NAME, HF)
    is_large: bool = False
    cpu_goal: float | None = None
    """The most of curl's and openssl's CPU seconds."""


CAPPED = ("--cap-mb-s", "20", "--delay-ms", "80")
CASES = (
    Case("capped", "20 MB/s a connection, 80 ms", CAPPED, {CURL: 1 / 9, HUB_NAME: 1 / 9, ARIA_16: 1.0}),
    # One connection would take minutes here.
    Case("capped-large", "20 MB/s a connection, 80 ms", CAPPED, {HF: 1.1}, (ARIA_16, HF), is_large=True),
    Case(
        "plain",
        "no cap",
        (),
        {CURL: 0.6, ARIA_1: 0.5, ARIA_16: 0.5, HUB_NAME: 0.4},
        is_large=True,
        cpu_goal=1.0,
    ),
    Case("tls", "no cap, TLS", ("--tls", "PEM"), {CURL: 0.85}, is_large=True),
    # Everybody else gives up.
    Case("dropped", "dropped every 32 MiB", ("--drop-mib", "32"), {}, ()),
)


@dataclass
class Measured:
    """What one program took, run by run."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    twice: list[float] = field(default_factory=list)
    """The share of bytes that were sent beyond one of each."""


def main() -> None:
    """Run the cases with everybody and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each case; medians are shown")
    parser.add_argument("--size-mib", type=int, default=2048, help="of the large cases")
    parser.add_argument("--case", action="append", choices=[*(case.name for case in CASES), "ledger"])
    parser.add_argument("--who", action="append", help="these peers only")
    options = parser.parse_args()
    chosen = options.case or [*(case.name for case in CASES), "ledger"]
    cases = [case for case in CASES if case.name in chosen]
    place = _place(2 * options.size_mib * 2**20)
    table = Table(
        *("case", "who", "wall s", "ours / theirs", "goal", "CPU s", "ours / theirs", "peak MiB", "twice"),
        title=f"downloads: medians of {options.rounds}, {os.cpu_count()} cores, files in {place}",
    )
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        pem = _certificate(folder) if any("PEM" in case.server for case in cases) else None
        for case in cases:
            path = _file(folder, options.size_mib if case.is_large else 256)
            _measure(case, path, folder / "out", pem, options, table)
    if "ledger" in chosen:
        for what, seconds in bench_store.measure(options.rounds):
            table.add_row(what, "ours", f"{seconds:.4f}", "", "0.0500", "", "", "", "")
    Console(width=150).print(table)


def _measure(
    case: Case, path: Path, out: Path, pem: Path | None, options: argparse.Namespace, table: Table
) -> None:
    digest = _sha256(path)
    wanted = [who for who in case.peers if options.who is None or who in options.who]
    commands = {
        who: command for who, command in _commands(out, digest, pem).items() if who in ("ours", *wanted)
    }
    words = [str(pem) if word == "PEM" else word for word in case.server]
    found = {who: Measured() for who, command in commands.items() if command}
    with _server(path, words) as port:
        url = f"{'http' if pem is None or 'PEM' not in case.server else 'https'}://127.0.0.1:{port}/file"
        for _ in range(options.rounds):
            for who, command in commands.items():
                if command:
                    _run(url, command, out, digest, pem, found[who])
                    print(f"{case.name:14}{who:18}{found[who].wall_s[-1]:8.2f} s", file=sys.stderr)
    mib = path.stat().st_size // 2**20
    ours = found["ours"]
    wall, cpu = statistics.median(ours.wall_s), statistics.median(ours.cpu_s)
    for who in commands:
        title = f"{mib} MiB, {case.title}"
        if who not in found:
            table.add_row(title, who, "not installed", *[""] * 6)
            continue
        theirs = found[who]
        their_wall, their_cpu = statistics.median(theirs.wall_s), statistics.median(theirs.cpu_s)
        is_ours = who == "ours"
        goal = case.goals.get(who)
        cpu_ratio = "" if is_ours else f"{cpu / their_cpu:.2f}"
        if who == CURL and case.cpu_goal:
            cpu_ratio += f" (goal {case.cpu_goal:.1f})"
        table.add_row(
            title,
            who,
            f"{their_wall:.2f}",
            "" if is_ours else f"{wall / their_wall:.3f}",
            f"{goal:.3f}" if goal else "",
            f"{their_cpu:.2f}",
            cpu_ratio,
            f"{max(theirs.peak_mib):.0f}" + (" (goal 80)" if is_ours else ""),
            f"{100 * statistics.median(theirs.twice):.2f}%"
            + (" (goal 2%)" if case.name == "dropped" else ""),
        )


def _commands(out: Path, digest: str, pem: Path | None) -> dict[str, list[list[str]] | None]:
    """What each runs, ``URL`` in the place of the address; all but ours hash afterwards."""
    check = ["openssl", "dgst", "-sha256", str(out)]
    aria = ["aria2c", "-q", "--allow-overwrite=true", "--file-allocation=none", "-d", str(out.parent)]
    aria += [f"--ca-certificate={pem}"] * (pem is not None) + ["-o", out.name, "URL"]
    has_aria = shutil.which("aria2c") is not None
    has_hub = subprocess.run([sys.executable, "-c", "import huggingface_hub"], check=False).returncode == 0
    old_hub = _old_hub()
    return {
        "ours": [[sys.executable, "-c", OURS, "URL", str(out), digest]],
        CURL: [["curl", "-s", "-o", str(out), "URL"], check],
        ARIA_1: [[*aria, "-x1", "-s1"], check] if has_aria else None,
        ARIA_16: [[*aria, "-x16", "-s16"], check] if has_aria else None,
        HUB_NAME: [[sys.executable, "-c", HUB, "URL", str(out)], check] if has_hub else None,
        HF: [[str(old_hub), "-c", HUB, "URL", str(out)], check] if old_hub else None,
    }


def _run(
    url: str, commands: list[list[str]], out: Path, digest: str, pem: Path | None, measured: Measured
) -> None:
    """Add what all ``commands`` take together, and the peak memory of the largest."""
    out.unlink(missing_ok=True)
    environment = {**os.environ, "HF_HUB_ENABLE_HF_TRANSFER": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    if pem is not None:
        environment |= dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), str(pem))
    started, cpu, peak = time.perf_counter(), 0.0, 0.0
    for command in commands:
        words = [url if word == "URL" else word for word in command]
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, command
        cpu += used.ru_utime + used.ru_stime
        peak = max(peak, used.ru_maxrss / 1024)
    measured.wall_s.append(time.perf_counter() - started)
    measured.cpu_s.append(cpu)
    measured.peak_mib.append(peak)
    assert _sha256(out) == digest, commands
    size = out.stat().st_size
    measured.twice.append(_sent(url, pem) / size - 1)


def _sent(url: str, pem: Path | None) -> int:
    context = ssl.create_default_context(cafile=pem) if url.startswith("https") else None
    with urllib.request.urlopen(url.replace("/file", "/sent"), context=context) as answer:
        return int(answer.read())


@contextlib.contextmanager
def _server(path: Path, options: list[str]) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.bench.server", str(path), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def _old_hub() -> Path | None:
    """An interpreter with hf_transfer, or ``None`` where it cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "studio-worker" / "bench-peers"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *OLD_HUB]
        if subprocess.run(install, check=False).returncode != 0:
            return None
        (folder / "complete").touch()
    return python


def _place(need_bytes: int) -> str:
    """Memory, where it has room."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 1.5 * need_bytes:
        return str(memory)
    return tempfile.gettempdir()


def _certificate(folder: Path) -> Path:
    """A certificate for 127.0.0.1 and its key, in one file."""
    pem, key = folder / "server.pem", folder / "key.pem"
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
    ]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(pem)]
    subprocess.run(make, check=True, capture_output=True)
    pem.write_bytes(pem.read_bytes() + key.read_bytes())
    return pem


def _file(folder: Path, size_mib: int) -> Path:
    path = folder / f"{size_mib}"
    if not path.exists():
        block = os.urandom(2**20)
        with path.open("wb") as file:
            for number in range(size_mib):
                file.write(number.to_bytes(8, "little") + block[8:])
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
