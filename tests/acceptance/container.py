"""The container image, built by buildah from its Containerfile, and containers of it without an engine.

A container here is what an engine makes of an image and its configuration: namespaces for processes, mounts
and System V, the image's environment and user, no capability, a read-only root, a small /dev/shm. It shares
its host's network.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.acceptance.bases import CACHE
from tests.acceptance.machine import DIES_WITH_PARENT

ROOT = Path(__file__).parents[2]
STEPS = [ROOT / "packaging" / "container" / name for name in ("Containerfile", "install")]
SUITE = "trixie"
START_S, END_S = 60.0, 60.0

_BUILD = """
set -eu
cd "$1"; tree=$2 version=$3
buildah="buildah --root $1/store --runroot $1/run --storage-driver overlay"
$buildah add -q "$($buildah from scratch)" "$4" / >&2
$buildah commit -q --rm "$($buildah containers -q)" base >&2
$buildah bud --isolation chroot --network host --format docker --pull-never --tag image \\
    --build-arg BASE=base --build-arg TORCH=cpu --build-arg VERSION="$version" \\
    --file "$tree/packaging/container/Containerfile" "$tree" >&2
made=$($buildah from image)
cp -a "$($buildah mount "$made")" root
$buildah inspect --type image image >config.json
"""

_CONTAIN = """
layers=$1 root=$2 user=$3; shift 3
mount -t overlay -o "$layers" overlay "$root"
while [ "$1" != -- ]; do
    mkdir -p "$root$1"
    mount --bind "$2" "$root$1"
    shift 2
done
shift
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777,size=64m shm "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mount -o remount,ro "$root"
exec chroot "$root" setpriv --reuid="${user%:*}" --regid="${user#*:}" --clear-groups --bounding-set=-all \\
    --inh-caps=-all --no-new-privs -- "$@"
"""


class Image(NamedTuple):
    """A root file system, and what the image's configuration says of running it (as Docker writes it)."""

    root: Path
    config: dict[str, Any]


def built_image(*packages: Path, version: str) -> Image:
    """The image of ``packages``, which are in build/packages; built once for them and these steps."""
    CACHE.mkdir(parents=True, exist_ok=True)
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in (*STEPS, *packages)]
    key = hashlib.sha256(b"".join(digests)).hexdigest()[:12]
    made = CACHE / f"image-{key}"
    with (CACHE / "lock-image").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_dir():
            for old in CACHE.glob("image-*"):
                shutil.rmtree(old)
            _build(made, version)
    return Image(made / "root", json.loads((made / "config.json").read_text())["Docker"]["config"])


def _build(made: Path, version: str) -> None:
    base = CACHE / f"base-image-{SUITE}.tar"
    if not base.exists():
        part = base.with_suffix(".part.tar")
        command = [
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            "--dpkgopt=force-unsafe-io",
            SUITE,
            str(part),
        ]
        subprocess.run(command, check=True)
        part.rename(base)
    part = made.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    # Mounts and processes of its own, which end with it.
    apart = [*DIES_WITH_PARENT, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [*apart, "sh", "-c", _BUILD, "sh", str(part), str(ROOT), version, str(base)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    for scratch in ("store", "run"):
        shutil.rmtree(part / scratch)
    part.rename(made)


class Container:
    """One container, from its start to its end; a context manager.

    Args:
        work: a folder for its own layer and its output; made, and removed in the end.
        environment: beyond what the image sets.
        volumes: what lies outside, by where it is mounted inside.
        user: in the place of the image's, ``uid:gid``.
        command: in the place of the image's, behind its entry point.
    """

    def __init__(
        self,
        image: Image,
        work: Path,
        environment: Mapping[str, str],
        volumes: Mapping[str, Path],
        user: str = "",
        command: Sequence[str] = (),
    ) -> None:
        self.image = image
        self.user = user or image.config["User"]
        self._work = work
        self._command = [*image.config["Entrypoint"], *(command or image.config["Cmd"])]
        self.environment = dict(pair.split("=", 1) for pair in image.config["Env"]) | dict(environment)
        self._volumes = volumes

    def __enter__(self) -> Self:
        upper, scratch, root = (self._work / name for name in ("upper", "scratch", "root"))
        for folder in (upper, scratch, root):
            folder.mkdir(parents=True)
        layers = f"lowerdir={self.image.root},upperdir={upper},workdir={scratch}"
        volumes = [str(part) for pair in self._volumes.items() for part in pair]
        apart = ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child"]
        told = [layers, str(root), self.user, *volumes, "--", *self._command]
        with (self._work / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*DIES_WITH_PARENT, *apart, "sh", "-euc", _CONTAIN, "sh", *told],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._await_first()
        return self

    def _await_first(self) -> None:
        """Until process 1 is the entry point, unless it has ended already."""
        deadline = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError, ValueError):
                if Path(f"/proc/{self.first}/cmdline").read_text().startswith(f"{self._command[0]}\0"):
                    return
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            # With process 1 all of the namespace ends; --kill-child's wish is lost when the user is changed.
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(self.first, signal.SIGKILL)
        self.process.wait(END_S)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._work)

    @property
    def first(self) -> int:
        """Process 1, as this host counts."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (pid,) = children.read_text().split()
        return int(pid)

    def processes(self) -> list[str]:
        """The states (proc_pid_stat(5)) and names of all processes inside but process 1."""
        found = []
        pids = Path(f"/proc/{self.first}/task/{self.first}/children").read_text().split()
        while pids:
            pid = pids.pop()
            with contextlib.suppress(FileNotFoundError):
                name, rest = Path(f"/proc/{pid}/stat").read_text().split("(", 1)[1].rsplit(") ", 1)
                found.append(f"{rest[0]} {name}")
                pids += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return found

    def stop(self) -> None:
        """As an engine stops it: the image's signal to process 1, and nobody else."""
        os.kill(self.first, signal.Signals[self.image.config["StopSignal"]])

    def wait(self, limit_s: float = END_S) -> int:
        """The exit status."""
        return self.process.wait(limit_s)

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as ``docker exec``, ``kubectl exec`` and their probes do."""
        user, _, group = self.user.partition(":")
        inside = ["nsenter", f"--target={self.first}", "--mount", "--pid", "--ipc", "--root", "--wd=/"]
        inside += ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--"]
        return subprocess.run(
            [*inside, *command], capture_output=True, text=True, env=self.environment, timeout=60
        )

    def log(self) -> list[dict[str, Any]]:
        """What it has said so far: JSON, line by line, and nothing else."""
        return [
            json.loads(line)
            for line in (self._work / "log").read_text().splitlines(keepends=True)
            if line[-1] == "\n"
        ]

    def await_that(self, what: str, condition: Any, limit_s: float = START_S) -> None:
        """Until ``condition()`` holds.

        Raises:
            AssertionError: it does not in time, or the container ends before.
        """
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}\n{self.output()}"
            assert self.process.poll() is None, f"ended before: {what}\n{self.output()}"
            time.sleep(0.05)

    def output(self) -> str:
        """Whatever it has said."""
        return (self._work / "log").read_text()
