"""Whether driver, GPU and torch fit each other, and what to install where they do not. Tables, and no I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from studio_worker.box.torch_build import TorchBuild, Version


class Package(NamedTuple):
    """A package of ours with torch: PyTorch's name of the build, the CUDA version it needs, the GPUs it has
    code for.
    """

    name: str
    build: str
    cuda_major: int
    architectures: tuple[str, ...]


PACKAGES = (
    Package(
        "studio-worker-torch-cuda", "cu130", 13, ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
    ),
    Package(
        "studio-worker-torch-cuda12",
        "cu126",
        12,
        ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"),
    ),
)
"""Best first. What they hold by PyTorch's own word (``torch.cuda.get_arch_list``; pytorch/pytorch,
.ci/manywheel/build_cuda.sh, ``TORCH_CUDA_ARCH_LIST``).
"""

DRIVER_BRANCHES = {12: 525, 13: 580}
"""The first driver that runs programs of a CUDA version, whatever its minor number (NVIDIA, CUDA Toolkit
release notes, "CUDA Toolkit and minimum required driver version for CUDA minor version compatibility").
"""

GENERATIONS: tuple[tuple[Version, str], ...] = (
    ((3, 0), "Kepler"),
    ((5, 0), "Maxwell"),
    ((6, 0), "Pascal"),
    ((7, 0), "Volta"),
    ((7, 5), "Turing"),
    ((8, 0), "Ampere"),
    ((8, 9), "Ada"),
    ((9, 0), "Hopper"),
    ((10, 0), "Blackwell"),
)
"""NVIDIA's generations by their first compute capability (NVIDIA, CUDA GPU compute capability)."""

_OPEN_MODULES_ONLY: Version = (10, 0)
"""From Blackwell on there are no other kernel modules than the open ones (NVIDIA's driver README)."""

_SUPPORTED_AFTER_580: Version = (7, 5)
"""Drivers after 580 know no older GPUs (NVIDIA, Unix graphics feature deprecation schedule)."""


@dataclass(frozen=True)
class Surroundings:
    """Where a driver is to be installed.

    Args:
        os_release: os-release(5) as pairs.
        is_container: the driver is then the host's.
    """

    os_release: Mapping[str, str]
    is_container: bool = False


def misfit(
    cuda: Version, driver: str, capability: Version | None, build: TorchBuild, here: Surroundings
) -> str | None:
    """Why torch ``build`` cannot run with a driver that knows ``cuda``, with the cure; ``None`` where it can.

    A driver runs what was built for its own CUDA version, for older ones and for newer ones of the same major
    number ("CUDA minor version compatibility" in NVIDIA's guide to compatibility).

    Args:
        driver: its own version, e.g. ``535.309``; may be empty.
        capability: the GPU's, where known.
    """
    if build.cuda is None or cuda[0] >= build.cuda[0]:
        return None
    ways = []
    if any(package.cuda_major == build.cuda[0] for package in _with_code_for(capability)):
        ways.append(f"install {driver_to_install(build.cuda[0], capability, here)}")
    if fitting := fitting_package(capability, cuda):
        ways.append(_install(fitting, here))
    if not ways:
        ways = [package_to_install(capability, cuda, here)]
    return (
        f"the NVIDIA driver{f' {driver}' if driver else ''} knows CUDA {show(cuda)}, and torch "
        f"{build.version} here needs CUDA {show(build.cuda)}; {', or '.join(ways)}"
    )


def no_cuda(
    build: TorchBuild, capability: Version | None, cuda: Version | None, here: Surroundings
) -> str | None:
    """Why torch ``build`` can use no NVIDIA GPU at all, with the cure; ``None`` where it has CUDA.

    Args:
        capability: the GPU's, where known.
        cuda: the newest version that the driver knows, where it says.
    """
    if build.hip:  # it calls its devices cuda, too
        what = f"is a build for AMD's GPUs (ROCm {build.hip}), which are not supported"
    elif build.cuda is None:
        what = "is a build for the CPU: a GPU needs one with CUDA, and it has none"
    else:
        return None
    return f"torch {build.version} here {what}; {package_to_install(capability, cuda, here)}"


def no_code(
    name: str,
    capability: Version,
    architectures: Iterable[str],
    *,
    torch: str,
    cuda: Version | None,
    here: Surroundings,
) -> str | None:
    """Why a torch with code for ``architectures`` cannot use the GPU ``name``; ``None`` where it can.

    Args:
        architectures: as ``torch.cuda.get_arch_list`` has them, e.g. ``sm_86``, ``compute_120``.
        torch: its version.
        cuda: the newest version that the driver knows, where it says.
    """
    known = list(architectures)
    if not known or _has_code(known, capability):
        return None
    return (
        f"{called(name, capability)}: torch {torch} here has code for "
        f"{', '.join(known)} and none for it; {package_to_install(capability, cuda, here)}"
    )


def fitting_package(capability: Version | None, cuda: Version | None) -> Package | None:
    """The best package of ours for a GPU, and a driver that knows ``cuda``, as far as they are known."""
    able = (each for each in _with_code_for(capability) if cuda is None or each.cuda_major <= cuda[0])
    return next(able, None)


def package_to_install(capability: Version | None, cuda: Version | None, here: Surroundings) -> str:
    """Which package of ours a box with such a GPU and driver needs, and which driver, where not its own."""
    if fitting := fitting_package(capability, cuda):
        return _install(fitting, here)
    # The oldest driver that will do: a newer one may know the GPU no longer.
    for package in reversed(_with_code_for(capability)):
        driver = driver_to_install(package.cuda_major, capability, here)
        return f"install {driver}, then {_install(package, here)}"
    return "no torch of today has code for it: use another GPU"


def called(name: str, capability: Version) -> str:
    """A GPU by its name, its generation, and the number that decides."""
    generation = next((word for first, word in reversed(GENERATIONS) if capability >= first), "older")
    return f"{name} ({generation}, compute capability {show(capability)})"


def driver_to_install(cuda_major: int, capability: Version | None, here: Surroundings) -> str:
    """Which driver torch for CUDA ``cuda_major`` needs, and where this machine gets it."""
    branch = DRIVER_BRANCHES.get(cuda_major)
    which = f"driver {branch} or newer" if branch else f"a driver that knows CUDA {cuda_major}"
    return f"{which} ({_source(cuda_major, capability, here)})"


def show(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _install(package: Package, here: Surroundings) -> str:
    # In a container, or without apt, it comes another way.
    family = {here.os_release.get("ID", ""), *here.os_release.get("ID_LIKE", "").split()}
    how = "apt install" if "debian" in family and not here.is_container else "install the package"
    return f"{how} {package.name}"


def _with_code_for(capability: Version | None) -> list[Package]:
    return [each for each in PACKAGES if capability is None or _has_code(each.architectures, capability)]


def _has_code(architectures: Iterable[str], capability: Version) -> bool:
    return any(_runs(architecture, capability) for architecture in architectures)


def _runs(architecture: str, capability: Version) -> bool:
    """Whether a GPU of ``capability`` runs the code ``architecture``.

    Machine code (``sm_``) runs on GPUs of its own major number from its own minor number on; PTX
    (``compute_``) is translated for every later GPU; what ends in ``a`` is for that very GPU, in ``f`` for
    its family (NVIDIA, CUDA programming guide, "compute capabilities").
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if match is None:
        return False
    built = int(match[2]), int(match[3])
    if match[4] == "a":
        return capability == built
    if match[1] == "compute" and not match[4]:
        return capability >= built
    return capability[0] == built[0] and capability >= built


def _source(cuda_major: int, capability: Version | None, here: Surroundings) -> str:
    if here.is_container:
        return "on the machine that runs this container"
    distribution = here.os_release.get("ID", "")
    is_open = capability is not None and capability >= _OPEN_MODULES_ONLY
    if distribution == "ubuntu" and _release(here) >= (22, 4):
        return f"apt install nvidia-driver-580-server{'-open' if is_open else ''}"
    if distribution == "debian" and cuda_major <= 12:
        return "apt install nvidia-driver"
    is_old = capability is not None and capability < _SUPPORTED_AFTER_580
    package = "nvidia-open" if is_open else "cuda-drivers-580" if is_old else "cuda-drivers"
    why = ", since Debian's has 550 at most" if distribution == "debian" else ""
    return f"{package} from NVIDIA's own repository{why}"


def _release(here: Surroundings) -> Version:
    numbers = [int(part) for part in here.os_release.get("VERSION_ID", "").split(".") if part.isdecimal()]
    return (numbers[0], numbers[1]) if len(numbers) > 1 else (0, 0)
