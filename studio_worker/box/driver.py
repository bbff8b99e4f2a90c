"""The NVIDIA driver, asked through its own library (libcuda): milliseconds, and no torch.

Only here is libcuda loaded. What it cannot do, or will not do with the torch that is installed, is a
:class:`DeviceError` that names the cure, before torch is touched.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from studio_worker.box.compatibility import Surroundings, driver_to_install, misfit
from studio_worker.box.nodes import driver_problem, has_nvidia_gpu, library_version, no_gpu, other_gpus
from studio_worker.box.torch_build import Version, installed_torch
from studio_worker.errors import DeviceError
from studio_worker.wording import in_container

_NAME = "libcuda.so.1"
_CONTAINER_FOLDER = "usr/local/nvidia/lib64"
"""Where GKE and others put the host's driver, unknown to the dynamic linker."""

_PCI_BUS_ID_BYTES = 16
"""``0000:41:00.0`` and its end, with room for longer domains (CUDA driver API, cuDeviceGetPCIBusId)."""

_COMPUTE_MODE, *_CAPABILITY = 20, 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_MODE, …_COMPUTE_CAPABILITY_MAJOR and _MINOR (CUDA driver API, cuda.h)."""
_PROHIBITED = 2
"""CU_COMPUTEMODE_PROHIBITED (cuda.h)."""

_FUNCTIONS = (
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceTotalMem_v2",
    "cuDeviceGetAttribute",
    "cuDeviceGetPCIBusId",
    "cuDevicePrimaryCtxRetain",
    "cuGetErrorName",
)
"""What is called here. Every driver since 2012 has them."""

_CURES = {
    2: "another process uses its memory: nvidia-smi shows which, end it",
    34: "what the linker finds is the CUDA toolkit's stub: take its folder out of LD_LIBRARY_PATH",
    46: "another process has it for itself: nvidia-smi shows which, end it or let several share the GPU "
    "(nvidia-smi -c DEFAULT)",
    100: "no CUDA device is visible; check that the GPU is listed by nvidia-smi and not hidden by "
    "CUDA_VISIBLE_DEVICES",
    304: "see that this user may open /dev/nvidia* (group video or render)",
    802: "start NVIDIA's fabric manager (systemctl start nvidia-fabricmanager)",
    803: "the driver was upgraded while the old one is still loaded; reboot",
    804: "this GPU does not work with NVIDIA's compat package; remove it and install a newer driver",
    999: "reload the driver (modprobe nvidia-uvm) or reboot",
}
"""What helps, by CUresult (CUDA driver API, cuda.h)."""

_DEFAULT_CUDA_MAJOR = 13
"""What the package that is installed by default is built for."""


@dataclass(frozen=True)
class Gpu:
    """What the driver says of one GPU."""

    name: str
    memory_bytes: int
    capability: Version
    pci_bus_id: str


class Driver:
    """The driver of this machine. It and its methods raise :class:`DeviceError` with the cure.

    Args:
        version: its own, e.g. ``550.163.01``; empty where its file does not say.
    """

    def __init__(self, library: ctypes.CDLL, version: str, root: Path = Path("/")) -> None:
        if lacking := [name for name in _FUNCTIONS if not hasattr(library, name)]:
            raise DeviceError(
                f"the NVIDIA driver's library {_NAME} is not whole, or none (it lacks {lacking[0]}); "
                "reinstall the driver, then reboot"
            )
        self._cuda = library
        self._root = root
        self.version = version

    def cuda(self) -> Version:
        """The newest CUDA version that it knows."""
        number = ctypes.c_int()
        self._check(self._cuda.cuDriverGetVersion(ctypes.byref(number)), "ask the NVIDIA driver its version")
        return number.value // 1000, number.value % 1000 // 10

    def start(self) -> None:
        """Whatever comes after needs it."""
        status = self._cuda.cuInit(0)
        if status != 0 and (problem := driver_problem(self._root, self.version)):
            raise DeviceError(problem)  # says more than CUDA's own error
        self._check(status, "start the NVIDIA driver")

    def gpu(self, index: int) -> Gpu:
        """What GPU ``index`` is, that can be used."""
        handle = self._handle(index)
        name = ctypes.create_string_buffer(100)
        self._check(self._cuda.cuDeviceGetName(name, len(name), handle), f"name cuda:{index}")
        total = ctypes.c_size_t()
        self._check(self._cuda.cuDeviceTotalMem_v2(ctypes.byref(total), handle), f"size cuda:{index}")
        mode, major, minor = (self._attribute(index, handle, each) for each in (_COMPUTE_MODE, *_CAPABILITY))
        place = ctypes.create_string_buffer(_PCI_BUS_ID_BYTES)
        self._check(self._cuda.cuDeviceGetPCIBusId(place, len(place), handle), f"place cuda:{index}")
        pci_bus_id = place.value.decode().lower()  # as the kernel writes it
        if mode == _PROHIBITED:
            raise DeviceError(
                f"cuda:{index} is in compute mode PROHIBITED, in which nobody may use it; "
                f"nvidia-smi -i {pci_bus_id} -c DEFAULT"
            )
        return Gpu(name.value.decode(errors="replace"), total.value, (major, minor), pci_bus_id)

    def hold(self, index: int) -> None:
        """Make the context on GPU ``index`` that torch will compute in, for as long as this process lives.

        It may hang where the GPU does; a GPU that is taken shows here, and not before.
        """
        context = ctypes.c_void_p()
        status = self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._handle(index))
        self._check(status, f"use cuda:{index}")

    def check_torch(self, capability: Version) -> None:
        """Whether the installed torch can run with it on a GPU of ``capability``."""
        build = installed_torch()
        if build is None:
            return  # told where it is used
        if problem := misfit(self.cuda(), self.version, capability, build, surroundings(self._root)):
            raise DeviceError(problem)

    def _handle(self, index: int) -> ctypes.c_int:
        count = ctypes.c_int()
        self._check(self._cuda.cuDeviceGetCount(ctypes.byref(count)), "count the GPUs")
        if index >= count.value:
            raise DeviceError(
                f"cuda:{index} does not exist; this machine has {count.value} CUDA device(s), cuda:0 and up"
            )
        handle = ctypes.c_int()
        self._check(self._cuda.cuDeviceGet(ctypes.byref(handle), index), f"open cuda:{index}")
        return handle

    def _attribute(self, index: int, handle: ctypes.c_int, attribute: int) -> int:
        value = ctypes.c_int()
        status = self._cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        self._check(status, f"ask cuda:{index}")
        return value.value

    def _check(self, status: int, doing: str) -> None:
        if status == 0:
            return
        text = ctypes.c_char_p()
        self._cuda.cuGetErrorName(status, ctypes.byref(text))
        label = text.value.decode() if text.value else f"error {status}"
        cure = _CURES.get(status, "check nvidia-smi and dmesg, or reboot")
        raise DeviceError(f"cannot {doing}: {label}; {cure}")


def find_driver(root: Path = Path("/")) -> Driver | None:
    """The driver's library, wherever it is; ``None`` where there is none.

    Loaded once, torch finds it too, also where the dynamic linker alone would not.

    Raises:
        DeviceError: what goes by its name is something else.
    """
    # cuda:1 is the GPU that nvidia-smi calls 1; by itself CUDA would count the fastest first. It looks once.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if root == Path("/"):
        try:
            library = ctypes.CDLL(_NAME)
        except OSError:
            pass
        else:
            return Driver(library, library_version() or "", root)
    path = root / _CONTAINER_FOLDER / _NAME
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    return Driver(library, library_version(str(path.resolve())) or "", root)


def require_driver(root: Path = Path("/")) -> Driver:
    """
    Raises:
        DeviceError: there is none; the text says which to install and from where.
    """
    if (driver := find_driver(root)) is not None:
        return driver
    if not has_nvidia_gpu(root) and other_gpus(root):
        raise DeviceError(no_gpu(root))
    build = installed_torch()
    major = build.cuda[0] if build and build.cuda else _DEFAULT_CUDA_MAJOR
    raise DeviceError(
        f"the NVIDIA driver's library {_NAME} is not installed; "
        f"install {driver_to_install(major, None, surroundings(root))}, then reboot"
    )


def gpu_index(name: str) -> int:
    """The GPU's number in torch's name of it: 1 for ``cuda:1``, 0 for ``cuda``."""
    number = name.partition(":")[2]
    return int(number) if number.isdecimal() else 0


def surroundings(root: Path = Path("/")) -> Surroundings:
    """Where a driver would have to be installed."""
    is_container = (
        in_container()
        or "KUBERNETES_SERVICE_HOST" in os.environ
        or any(
            (root / trace).exists() for trace in (".dockerenv", "run/.containerenv", "run/systemd/container")
        )
    )
    for place in ("etc/os-release", "usr/lib/os-release"):  # os-release(5)
        try:
            text = (root / place).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        pairs = (line.partition("=") for line in text.splitlines())
        return Surroundings({name: value.strip("\"'") for name, _, value in pairs}, is_container)
    return Surroundings({}, is_container)
