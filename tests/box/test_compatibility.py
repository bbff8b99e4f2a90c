"""Which driver, GPU and torch fit each other, and what an operator is told to install where they do not."""

from __future__ import annotations

import re

import pytest

from studio_worker.box.compatibility import (
    Surroundings,
    driver_to_install,
    misfit,
    no_code,
    package_to_install,
)
from studio_worker.box.torch_build import TorchBuild, Version, read_build

CUDA_13 = TorchBuild("2.13.0+cu130", (13, 0))
CUDA_12 = TorchBuild("2.13.0+cu126", (12, 6))
CPU = TorchBuild("2.13.0+cpu")
ROCM = TorchBuild("2.13.0+rocm7.1", hip="7.1.25424")

BOOKWORM = Surroundings({"ID": "debian", "VERSION_ID": "12"})
JAMMY = Surroundings({"ID": "ubuntu", "ID_LIKE": "debian", "VERSION_ID": "22.04"})
FOCAL = Surroundings({"ID": "ubuntu", "VERSION_ID": "20.04"})
ROCKY = Surroundings({"ID": "rocky", "ID_LIKE": "rhel", "VERSION_ID": "9.4"})
CONTAINER = Surroundings({"ID": "ubuntu", "VERSION_ID": "24.04"}, is_container=True)

PASCAL, VOLTA, TURING, ADA, BLACKWELL = (6, 1), (7, 0), (7, 5), (8, 9), (12, 0)

CUDA_13_ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_12_ARCHITECTURES = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("driver_knows", "torch"),
    [
        ((13, 0), CUDA_13),
        ((13, 1), CUDA_13),
        ((13, 0), TorchBuild("2.14.1+cu132", (13, 2))),
        ((12, 2), CUDA_12),
        ((12, 9), CUDA_12),
        ((13, 0), CUDA_12),
        ((12, 2), CPU),
        ((12, 2), ROCM),
    ],
)
def test_driver_that_knows_enough_is_not_complained_of(driver_knows: Version, torch: TorchBuild) -> None:
    """A driver runs torch for older CUDA, and for newer of the same major number; without CUDA none is
    needed.
    """
    assert misfit(driver_knows, "580.95.05", ADA, torch, BOOKWORM) is None


@pytest.mark.parametrize(
    ("driver_knows", "capability", "torch", "told"),
    [
        (
            (12, 2),
            ADA,
            CUDA_13,
            "install driver 580 or newer (…), or install the package studio-worker-torch-cuda12",
        ),
        (
            (12, 2),
            None,
            CUDA_13,
            "install driver 580 or newer (…), or install the package studio-worker-torch-cuda12",
        ),
        ((12, 2), PASCAL, CUDA_13, "install the package studio-worker-torch-cuda12"),
        ((12, 8), BLACKWELL, CUDA_13, "install driver 580 or newer (…)"),
        ((11, 4), ADA, CUDA_13, "install driver 580 or newer (…)"),
        ((11, 4), ADA, CUDA_12, "install driver 525 or newer (…)"),
        (
            (11, 4),
            VOLTA,
            CUDA_13,
            "install driver 525 or newer (…), then install the package studio-worker-torch-cuda12",
        ),
        ((13, 0), ADA, TorchBuild("3.0", (14, 0)), "install the package studio-worker-torch-cuda"),
        ((11, 4), (3, 5), CUDA_13, "no torch of today has code for it: use another GPU"),
    ],
)
def test_driver_that_is_too_old_is_told_with_what_helps(
    driver_knows: Version, capability: Version | None, torch: TorchBuild, told: str
) -> None:
    """A newer driver, another package of torch, or both: what would work on this GPU, and nothing else."""
    said = misfit(driver_knows, "535.309.01", capability, torch, ROCKY)
    assert said is not None
    problem, _, cure = said.partition("; ")
    assert re.sub(r"\(.*?\)", "(…)", cure) == told
    assert problem.startswith(
        f"the NVIDIA driver 535.309.01 knows CUDA {driver_knows[0]}.{driver_knows[1]}, and"
    )
    assert f"torch {torch.version} here needs CUDA" in problem


@pytest.mark.parametrize(
    ("here", "capability", "cuda_major", "told"),
    [
        (
            BOOKWORM,
            ADA,
            13,
            "driver 580 or newer (cuda-drivers from NVIDIA's own repository, since Debian's ",
        ),
        (BOOKWORM, BLACKWELL, 13, "driver 580 or newer (nvidia-open from NVIDIA's own repository"),
        (BOOKWORM, PASCAL, 12, "driver 525 or newer (apt install nvidia-driver)"),
        (JAMMY, ADA, 13, "driver 580 or newer (apt install nvidia-driver-580-server)"),
        (JAMMY, BLACKWELL, 13, "driver 580 or newer (apt install nvidia-driver-580-server-open)"),
        (JAMMY, None, 13, "driver 580 or newer (apt install nvidia-driver-580-server)"),
        (FOCAL, ADA, 13, "driver 580 or newer (cuda-drivers from NVIDIA's own repository)"),
        (ROCKY, VOLTA, 12, "driver 525 or newer (cuda-drivers-580 from NVIDIA's own repository)"),
        (CONTAINER, ADA, 13, "driver 580 or newer (on the machine that runs this container)"),
        (
            Surroundings({}),
            ADA,
            14,
            "a driver that knows CUDA 14 (cuda-drivers from NVIDIA's own repository)",
        ),
    ],
)
def test_driver_comes_from_where_the_distribution_has_it(
    here: Surroundings, capability: Version | None, cuda_major: int, told: str
) -> None:
    """The cure is a package that the distribution has, with the kernel modules that the GPU needs."""
    assert driver_to_install(cuda_major, capability, here).startswith(told)


@pytest.mark.parametrize(
    ("capability", "architectures"),
    [
        *(
            (each, CUDA_13_ARCHITECTURES)
            for each in (TURING, (8, 0), (8, 6), ADA, (9, 0), (10, 0), BLACKWELL)
        ),
        *((each, CUDA_12_ARCHITECTURES) for each in ((5, 2), PASCAL, VOLTA, ADA)),
        ((12, 1), ["sm_120"]),
        ((12, 0), ["sm_80", "compute_90"]),
        ((9, 0), ["sm_90a"]),
        ((10, 3), ["sm_100f"]),
        (PASCAL, []),
    ],
)
def test_gpu_that_the_torch_has_code_for_is_not_complained_of(
    capability: Version, architectures: list[str]
) -> None:
    """Machine code of the same major number and PTX of any earlier one run; a build that says nothing may."""
    assert no_code("GPU", capability, architectures, torch="2.13.0", cuda=(13, 0), here=BOOKWORM) is None


@pytest.mark.parametrize(
    ("name", "capability", "architectures", "driver_knows", "generation", "cure"),
    [
        ("NVIDIA GeForce GTX 1080", PASCAL, CUDA_13_ARCHITECTURES, (13, 0), "Pascal", "torch-cuda12"),
        ("NVIDIA GeForce GTX 1080", PASCAL, CUDA_13_ARCHITECTURES, None, "Pascal", "torch-cuda12"),
        ("Tesla V100-SXM2-16GB", VOLTA, CUDA_13_ARCHITECTURES, (13, 0), "Volta", "torch-cuda12"),
        ("NVIDIA GeForce GTX 980", (5, 2), CUDA_13_ARCHITECTURES, (12, 2), "Maxwell", "torch-cuda12"),
        ("NVIDIA GeForce RTX 5090", BLACKWELL, CUDA_12_ARCHITECTURES, (13, 0), "Blackwell", "torch-cuda"),
        ("NVIDIA H100", (9, 0), ["sm_100a"], (13, 0), "Hopper", "torch-cuda"),
        ("NVIDIA A100", (8, 0), ["sm_86", "compute_86"], (13, 0), "Ampere", "torch-cuda"),
        ("NVIDIA B300", (10, 3), ["sm_100a"], (13, 0), "Blackwell", "torch-cuda"),
    ],
)
def test_gpu_that_the_torch_has_no_code_for_is_told_by_name(
    name: str,
    capability: Version,
    architectures: list[str],
    driver_knows: Version | None,
    generation: str,
    cure: str,
) -> None:
    """An old or too new GPU is told by name and generation, with the package that has code for it."""
    said = no_code(name, capability, architectures, torch="2.13.0+cu130", cuda=driver_knows, here=ROCKY)
    assert said is not None
    told, _, done = said.partition("; ")
    major, minor = capability
    assert told.startswith(
        f"{name} ({generation}, compute capability {major}.{minor}): torch 2.13.0+cu130 here"
    )
    assert ", ".join(architectures) in told
    assert done == f"install the package studio-worker-{cure}"


def test_gpu_that_no_torch_has_code_for_is_told_so() -> None:
    """For a card older than all builds the only cure is a newer one."""
    said = no_code("Tesla K80", (3, 7), CUDA_12_ARCHITECTURES, torch="2.13.0", cuda=(11, 4), here=ROCKY)
    assert said is not None
    assert said.startswith("Tesla K80 (Kepler, compute capability 3.7)")
    assert said.endswith("; no torch of today has code for it: use another GPU")


# --- which torch is installed ---


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", CUDA_13),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n", CPU),
        ("__version__ = '2.13.0+rocm7.1'\ncuda: Optional[str] = None\nhip = '7.1.25424'\n", ROCM),
        (
            "from typing import Optional\n__all__ = ['cuda']\n__version__ = '1.9'\ncuda = '11.1'\n",
            TorchBuild("1.9", (11, 1)),
        ),
        ("", TorchBuild("")),
    ],
)
def test_torch_build_is_read_from_its_version_file(text: str, build: TorchBuild) -> None:
    """CUDA, CPU and ROCm builds are told apart by what torch writes of itself."""
    assert read_build(text) == build


# --- which package of ours ---

NEW_DRIVER = "driver 580 or newer (nvidia-open from NVIDIA's own repository, since Debian's has 550 at most)"
OLD_DRIVER = "driver 525 or newer (apt install nvidia-driver)"
CUDA, CUDA12 = "apt install studio-worker-torch-cuda", "apt install studio-worker-torch-cuda12"

DRIVERS = {"520": (11, 8), "535": (12, 2), "550": (12, 4), "580": (13, 0)}
"""Driver branches and the CUDA version that each knows (NVIDIA, CUDA Toolkit release notes)."""

PACKAGE_FOR = {
    "GTX 1080": ((6, 1), (f"install {OLD_DRIVER}, then {CUDA12}", CUDA12, CUDA12, CUDA12)),
    "V100": ((7, 0), (f"install {OLD_DRIVER}, then {CUDA12}", CUDA12, CUDA12, CUDA12)),
    "RTX 2080": ((7, 5), (f"install {OLD_DRIVER}, then {CUDA12}", CUDA12, CUDA12, CUDA)),
    "A100": ((8, 0), (f"install {OLD_DRIVER}, then {CUDA12}", CUDA12, CUDA12, CUDA)),
    "RTX 3090": ((8, 6), (f"install {OLD_DRIVER}, then {CUDA12}", CUDA12, CUDA12, CUDA)),
    "RTX 4090": ((8, 9), (f"install {OLD_DRIVER}, then {CUDA12}", CUDA12, CUDA12, CUDA)),
    "H100": ((9, 0), (f"install {OLD_DRIVER}, then {CUDA12}", CUDA12, CUDA12, CUDA)),
    "B200": ((10, 0), (*[f"install {NEW_DRIVER}, then {CUDA}"] * 3, CUDA)),
    "RTX 5090": ((12, 0), (*[f"install {NEW_DRIVER}, then {CUDA}"] * 3, CUDA)),
}
"""What an operator on Debian 12 is told, by card (NVIDIA, CUDA GPU compute capability) and driver."""


@pytest.mark.parametrize("card", PACKAGE_FOR)
@pytest.mark.parametrize("driver", DRIVERS)
def test_every_card_and_driver_has_its_package(card: str, driver: str) -> None:
    """The README's table: one answer for each card and driver, and a command that can be typed."""
    capability, told = PACKAGE_FOR[card]
    assert package_to_install(capability, DRIVERS[driver], BOOKWORM) == told[list(DRIVERS).index(driver)]


def test_package_is_not_installed_by_apt_inside_a_container() -> None:
    """What apt puts into a running container is gone with it: there the package alone is named."""
    assert package_to_install(PASCAL, (13, 0), CONTAINER) == "install the package studio-worker-torch-cuda12"
    assert package_to_install(PASCAL, (13, 0), JAMMY) == CUDA12
