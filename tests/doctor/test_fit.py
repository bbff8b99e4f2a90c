"""Which package of torch a box needs, as doctor says it: the installed one fits, or the other is named.

The driver is the tests' own; of torch there is the file that says what it was built for.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from studio_worker import config
from studio_worker.doctor import Box, Check, Finding, examine
from studio_worker.doctor.fit import check_torch
from tests.fakes.driver import build_driver
from tests.fakes.servers import refused_url

BUILDS = {
    "cuda": "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n",
    "cuda12": "__version__ = '2.13.0+cu126'\ncuda: Optional[str] = '12.6'\nhip: Optional[str] = None\n",
    "cpu": "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n",
    "rocm": "__version__ = '2.13.0+rocm7.1'\ncuda: Optional[str] = None\nhip = '7.1.25424'\n",
    "own": "__version__ = '2.14.0a0+git1f2e3d4'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n",
}
"""What torch's version.py says, by package."""

DRIVERS = {"520": 11080, "535": 12020, "550": 12040, "580": 13000}
"""As cuDriverGetVersion says it."""

CARDS = {
    "GTX 1080": ("61", "Pascal", {"535": "cuda12", "550": "cuda12", "580": "cuda12"}),
    "V100": ("70", "Volta", {"535": "cuda12", "550": "cuda12", "580": "cuda12"}),
    "RTX 2080": ("75", "Turing", {"535": "cuda12", "550": "cuda12", "580": "cuda cuda12"}),
    "A100": ("80", "Ampere", {"535": "cuda12", "550": "cuda12", "580": "cuda cuda12"}),
    "RTX 3090": ("86", "Ampere", {"535": "cuda12", "550": "cuda12", "580": "cuda cuda12"}),
    "RTX 4090": ("89", "Ada", {"535": "cuda12", "550": "cuda12", "580": "cuda cuda12"}),
    "H100": ("90", "Hopper", {"535": "cuda12", "550": "cuda12", "580": "cuda cuda12"}),
    "B200": ("100", "Blackwell", {"580": "cuda"}),
    "RTX 5090": ("120", "Blackwell", {"580": "cuda"}),
}
"""Compute capability, generation, and the packages that run there, the one to install first; by driver."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine on Debian 12 whose driver is where containers have it, for that is looked for by its path."""
    folder = tmp_path_factory.mktemp("root")
    build_driver(folder / "usr/local/nvidia/lib64", "535.309.01")
    (folder / "etc").mkdir()
    (folder / "etc/os-release").write_text('ID=debian\nVERSION_ID="12"\n')
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the installed torch is looked for, in place of the tests' own."""
    (tmp_path / "site/torch").mkdir(parents=True)
    (tmp_path / "site/torch/__init__.py").write_text("raise AssertionError('torch was touched')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("FAKE_COUNT", "1")
    return tmp_path / "site/torch/version.py"


def of_torch(root: Path, etc: Path, device: str = "cuda") -> Finding:
    """What doctor's line says."""
    etc.mkdir(exist_ok=True)
    (etc / "config.toml").write_text(
        f'[studio]\napi_base_url = "{refused_url("")}"\n[worker]\ndevice = "{device}"\n'
    )
    (found,) = examine(Box(etc, config.load(etc), root=root), [Check("torch", check_torch)])
    return found


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_package_that_fits_the_box_is_named(
    root: Path, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: str, driver: str
) -> None:
    """For each card and driver: what fits is fine, what does not is told with a command that installs what
    does, after a newer driver where this one is too old for any.
    """
    capability, generation, fitting = CARDS[card]
    fits = fitting.get(driver, "").split()
    monkeypatch.setenv("FAKE_CAPABILITY", capability)
    monkeypatch.setenv("FAKE_CUDA", str(DRIVERS[driver]))
    for package in ("cuda", "cuda12", "cpu"):
        site.write_text(BUILDS[package])
        found = of_torch(root, tmp_path / "etc")
        if package in fits:
            assert found.level == "ok"
            assert f"(studio-worker-torch-{package}) fits Fake GPU A ({generation}, compute" in found.text
            continue
        assert found.level == "failure"
        ways = found.cure.split(", or ")
        if fits:
            assert ways[-1] == f"apt install studio-worker-torch-{fits[0]}"
        else:
            branch = (
                "580" if generation == "Blackwell" or (package == "cuda" and capability >= "75") else "525"
            )
            assert ways[-1].startswith(f"install driver {branch} or newer (")


@pytest.mark.parametrize(
    ("build", "device", "level", "text", "cure"),
    [
        (
            "rocm",
            "cuda",
            "failure",
            "a build for AMD's GPUs (ROCm 7.1.25424), which are not supported",
            "-cuda",
        ),
        ("cpu", "cuda", "failure", "is a build for the CPU", "apt install studio-worker-torch-cuda"),
        ("own", "cuda", "ok", "torch 2.14.0a0+git1f2e3d4 fits Fake GPU A", ""),
        ("cpu", "cpu", "ok", 'any fits: device = "cpu"', ""),
        (None, "cuda", "failure", "torch is not installed", "apt install studio-worker-torch-cuda"),
    ],
)
def test_torch_that_is_none_of_ours_is_told_as_what_it_is(
    root: Path, site: Path, tmp_path: Path, build: str | None, device: str, level: str, text: str, cure: str
) -> None:
    """AMD's build, the CPU's, none at all: told by name with the package to install; of somebody's own build
    only torch itself can say which cards it is for.
    """
    if build:
        site.write_text(BUILDS[build])
    found = of_torch(root, tmp_path / "etc", device)
    assert found.level == level
    assert text in found.text
    assert found.cure.endswith(cure)
