"""What the Debian packages are made of, as far as it can be told without building them."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from studio_worker.cli.options import as_instance

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "packaging" / "lock"


def _pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_lock_is_what_the_tests_ran_with() -> None:
    """The packages carry the versions of packaging/constraints.txt; where they differ: make lock."""
    tested = _pins((ROOT / "packaging" / "constraints.txt").read_text())
    locked = _pins((LOCK / "libraries.txt").read_text())
    assert locked.items() <= tested.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.match(r"[A-Za-z0-9._-]+", line)[0].lower() for line in project["dependencies"]}  # type: ignore[index]
    assert wanted <= locked.keys() | {"torch"}


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_lock_of_torch_is_the_version_that_was_tested(build: str) -> None:
    """Both builds of torch are the tested version, and share nothing with the worker's own libraries."""
    tested = _pins((ROOT / "packaging" / "constraints.txt").read_text())
    locked = _pins((LOCK / f"torch-{build}.txt").read_text())
    assert locked["torch"].partition("+")[0] == tested["torch"]
    assert not locked.keys() & _pins((LOCK / "libraries.txt").read_text()).keys()
    changelog = (ROOT / "debian" / "torch.changelog").read_text()
    assert changelog.startswith(f"studio-worker ({tested['torch']}-")


def test_lock_of_the_farm_is_what_was_tested_and_nothing_of_the_worker() -> None:
    """The drivers that a package carries are those that the tests ran with, beside the worker's libraries."""
    tested = _pins((ROOT / "packaging" / "constraints.txt").read_text())
    locked = _pins((LOCK / "farm.txt").read_text())
    assert locked.items() <= tested.items()
    assert {"boto3", "psycopg", "psycopg-binary"} <= locked.keys()
    assert not locked.keys() & _pins((LOCK / "libraries.txt").read_text()).keys()


@pytest.mark.parametrize("lock", ["build", "farm", "libraries", "release", "torch-cpu", "torch-cuda"])
def test_lock_has_a_hash_for_everything(lock: str) -> None:
    """No byte comes into a package that is not known beforehand."""
    lines = [line for line in (LOCK / f"{lock}.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines
    assert [line for line in lines if not re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line)] == []


POLICY = """{package}:
  Installed: {installed}
  Candidate: {candidate}
  Version table:
"""
SECURITY = "     release v=12,o=Debian,a=oldstable-security,n=bookworm-security,l=Debian-Security,c=main\n"


@pytest.mark.parametrize(
    ("installed", "candidate", "lists", "profiles", "said"),
    [
        ("3.11.2-6+deb12u9", "3.11.2-6+deb12u9", SECURITY, "", None),
        ("3.11.2-6+deb12u6", "3.11.2-6+deb12u9", SECURITY, "", "Debian has 3.11.2-6+deb12u9"),
        ("3.11.2-6+deb12u6", "3.11.2-6+deb12u6", "", "", "no lists of Debian's security archive"),
        ("3.11.2-6+deb12u6", "3.11.2-6+deb12u9", "", "nodoc pkg.studio-worker.anyinterpreter", None),
    ],
    ids=["newest", "older", "unknown", "wanted all the same"],
)
def test_build_refuses_an_interpreter_without_its_fixes(
    tmp_path: Path, installed: str, candidate: str, lists: str, profiles: str, said: str | None
) -> None:
    """A package never carries a Python that Debian has mended since; who builds it is told the cure."""
    policy = POLICY.format(package="$2", installed=installed, candidate=candidate)
    apt_cache = tmp_path / "apt-cache"
    apt_cache.write_text(f"#!/bin/sh\n[ $# = 1 ] && printf '%s' '{lists}' || cat <<END\n{policy}END\n")
    apt_cache.chmod(0o755)
    done = subprocess.run(
        [sys.executable, ROOT / "packaging/system/interpreter.py", "check"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "DEB_BUILD_PROFILES": profiles},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == (0 if said is None else 1), done.stderr
    if said is None:
        assert done.stderr == ""
    else:
        assert said in done.stderr
        assert "apt-get update && apt-get install python3.11 " in done.stderr


def test_package_has_the_version_of_the_project() -> None:
    """What dpkg shows is what `studio-worker version` says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (ROOT / "debian" / "changelog").read_text().startswith(f"studio-worker ({project['version']})")


def test_unit_for_one_instance_a_gpu_is_the_unit() -> None:
    """studio-worker@.service differs from studio-worker.service only in what is an instance's own."""
    one = (ROOT / "packaging" / "studio-worker.service").read_text().splitlines()
    many = (ROOT / "packaging" / "studio-worker@.service").read_text().splitlines()
    changed = [line for line in difflib.ndiff(one, many) if line[0] in "+-" and not line[2:].startswith("#")]
    assert [line[:2] + line[2:].partition("=")[0] for line in changed] == [
        "- Description",
        "+ Description",
        "- StateDirectory",
        "+ StateDirectory",
        "- RuntimeDirectory",
        "+ RuntimeDirectory",
        "+ Environment",
        "+ Environment",
    ]
    assert all("%i" in line for line in changed if line.startswith("+"))


@pytest.mark.parametrize("unit", ["studio-worker.service", "studio-worker@.service"])
def test_units_set_what_cuda_reads(unit: str) -> None:
    """GPUs are counted as nvidia-smi counts, memory may grow in place, and caches are where they may be."""
    text = (ROOT / "packaging" / unit).read_text()
    lines = re.findall(r"^Environment=(.*)$", text, re.MULTILINE)
    environment = dict(word.split("=", 1) for line in lines for word in line.split())
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    cache = re.search(r"^CacheDirectory=(.*)$", text, re.MULTILINE)
    assert cache is not None
    # ~/.nv, ~/.triton, and what goes by the XDG specification.
    assert environment["HOME"] == environment["XDG_CACHE_HOME"] == f"/var/cache/{cache[1]}"


def test_commands_for_an_instance_see_what_its_unit_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """--instance N finds state, socket and device where studio-worker@N.service has them."""
    names = ["STUDIO_WORKER_STATE__DIR", "STUDIO_WORKER_WORKER__DEVICE", "CUDA_VISIBLE_DEVICES"]
    for name in (*names, "STUDIO_WORKER_STATE__RUNTIME_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back in the end
        monkeypatch.delenv(name)
    as_instance(3)
    unit = (ROOT / "packaging" / "studio-worker@.service").read_text().replace("%i", "3")
    for name in names:
        assert re.search(rf"^Environment=(.* )?{name}={os.environ[name]}( .*)?$", unit, re.MULTILINE)
    runtime = re.search(r"^RuntimeDirectory=(.*)$", unit, re.MULTILINE)
    assert runtime is not None
    assert os.environ["STUDIO_WORKER_STATE__RUNTIME_DIR"] == f"/run/{runtime[1]}"


def test_unit_that_makes_device_files_may_do_little_else() -> None:
    """Root's helper for NVIDIA's modules and device files runs in the sandbox that it can bear."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = ROOT / "packaging" / "studio-worker-devices.service"
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=25", "--no-pager", unit],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    needed = {"CAP_SYS_MODULE", "CAP_MKNOD"}
    (capabilities,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit.read_text(), re.MULTILINE)
    assert needed <= set(capabilities.split())


def test_onnxruntime_has_no_code_that_reports_its_use() -> None:
    """The onnxruntime of the package is a build without an uploader of telemetry, as 1.29 and later have."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    libraries = list(Path(spec.origin).parent.rglob("*.so*"))
    assert libraries
    assert [each.name for each in libraries if b".events.data.microsoft.com" in each.read_bytes()] == []
