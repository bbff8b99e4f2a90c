"""The packages themselves: reproducible, by Debian's rules, complete."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.acceptance import figures
from tests.acceptance.bases import BUILT_ON, SUITE
from tests.acceptance.box import Box
from tests.acceptance.conftest import ROOT, Debs, sizes
from tests.acceptance.machine import Machine

said_once = pytest.mark.skipif(SUITE != BUILT_ON, reason=f"of the packages alone: checked with {BUILT_ON}")


@said_once
def test_sizes_are_known(debs: Debs) -> None:
    """The worker's package is a fraction of torch's; an upgrade fetches the former alone."""
    if build_s := os.environ.get("STUDIO_WORKER_BUILD_S"):
        figures.note("make deb", f"{build_s} s")
    for deb in (debs.worker, debs.torch, debs.farm):
        name = deb.name.partition("_")[0]
        packed, unpacked = sizes(deb)
        figures.note(f"size of {name}", f"{packed:.0f} MB, {unpacked:.0f} MB installed")
    assert debs.worker.stat().st_size < debs.torch.stat().st_size


@said_once
def test_build_is_reproducible(debs: Debs, work: Path) -> None:
    """A second build in another folder gives the same packages, to the byte."""
    began = time.monotonic()
    again = work / "another" / "place"
    again.mkdir(parents=True)
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.split(b"\0")  # fmt: skip
    for name in filter(None, names):
        source, target = ROOT / os.fsdecode(name), again / os.fsdecode(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    environment = {**os.environ, "TZ": "Pacific/Kiritimati", "LC_ALL": "C", "HOME": str(work)}
    environment.setdefault("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip"))
    done = subprocess.run(
        ["dpkg-buildpackage", "-us", "-uc", "-b"], cwd=again, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for deb in (debs.worker, debs.torch, debs.farm):
        other = again.parent / deb.name
        assert _sha256(other) == _sha256(deb), f"{deb} and {other} differ"
    figures.note("build again, all packages", f"{time.monotonic() - began:.0f} s, same bytes")
    shutil.rmtree(again.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@said_once
def test_lintian_has_nothing_to_say(debs: Debs, work: Path) -> None:
    """Debian's own checker finds neither errors nor warnings; what is overridden is explained beside it."""
    began = time.monotonic()
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on=error,warning", debs.worker, debs.torch, debs.farm],
        env={**os.environ, "TMPDIR": str(work)}, capture_output=True, text=True,  # it leaves files behind
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    figures.note("lintian", f"no errors, no warnings ({time.monotonic() - began:.0f} s)")


@said_once
def test_same_rules_build_torch_with_cuda() -> None:
    """Build profiles select the CUDA packages and their lock files, and all else of theirs is alike."""
    listed, plan = _planned("pkg.studio-worker.cuda pkg.studio-worker.nocpu")
    assert listed == ["studio-worker", "studio-worker-farm", "studio-worker-torch-cuda"]
    assert "-r packaging/lock/torch-cuda.txt" in plan
    assert "torch-cpu" not in plan
    locked = (ROOT / "packaging/lock/torch-cuda.txt").read_text()
    assert "\ntorch==2" in locked
    assert "+cpu" not in locked
    assert "\nnvidia-cudnn-cu13==" in locked
    listed, plan = _planned("pkg.studio-worker.cuda12 pkg.studio-worker.nocpu")
    assert listed == ["studio-worker", "studio-worker-farm", "studio-worker-torch-cuda12"]
    assert "-r packaging/lock/torch-cuda12.txt" in plan
    assert "-r packaging/lock/torch-cuda.txt" not in plan
    for suffix in ("install", "postinst", "prerm", "changelog", "lintian-overrides"):
        others = (ROOT / "debian" / f"studio-worker-torch-cuda.{suffix}").read_bytes()
        assert (ROOT / "debian" / f"studio-worker-torch-cuda12.{suffix}").read_bytes() == others
    listed, _ = _planned("")
    assert listed == ["studio-worker", "studio-worker-farm", "studio-worker-torch-cpu"]


def _planned(profiles: str) -> tuple[list[str], str]:
    """The packages that are built with these build profiles, and what make would run for it."""

    def said(*command: str) -> str:
        environment = {**os.environ, "DEB_BUILD_PROFILES": profiles}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout

    targets = ("override_dh_auto_build", "override_dh_auto_install")
    return said("dh_listpackages").split(), said("make", "--dry-run", "-f", "debian/rules", *targets)


@said_once
def test_piuparts_passes(debs: Debs, base: Path, work: Path) -> None:
    """Installed and purged in a bare system, the packages leave it as it was."""
    began = time.monotonic()
    chroot = work / "piuparts"
    shutil.copytree(base, chroot, symlinks=True)
    done = subprocess.run(
        [
            "piuparts", "--existing-chroot", str(chroot), f"--distribution={SUITE}", "--keep-sources-list",
            "--no-upgrade-test", "--warn-on-debsums-errors", "--tmpdir", str(work), "--no-eatmydata",
            "--ignore=/var/cache/debconf/tmp.ci/",  # apt-utils leaves it
            str(debs.worker), str(debs.torch), str(debs.farm),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    shutil.rmtree(chroot)
    assert done.returncode == 0, done.stdout[-6000:]
    figures.note("piuparts", f"passed ({time.monotonic() - began:.0f} s)")


@said_once
def test_autopkgtest_passes(debs: Debs, base: Path, installed: Path, work: Path) -> None:
    """The package's own tests for Debian's test runner pass in the booted machine."""
    began = time.monotonic()
    with Machine([installed, base], work / "autopkgtest") as machine:
        machine.copy_in(ROOT / "debian", "/opt/tree")
        machine.shell("apt-get update && apt-get install -y --no-install-recommends autopkgtest")
        command = ["autopkgtest", "--no-built-binaries", "/opt/tree", "--", "null"]
        done = machine.run(*command, check=False, limit_s=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    figures.note("autopkgtest", f"passed ({time.monotonic() - began:.0f} s)")


def test_packages_own_their_files(box: Box) -> None:
    """dpkg's own check finds every file as it was packaged, also after the service has worked."""
    box.start()
    job_id = box.queue_picture()
    box.await_job(job_id, "done")
    assert box.machine.run("dpkg", "--verify", "studio-worker", "studio-worker-torch-cpu").stdout == ""
