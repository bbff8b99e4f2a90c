"""One GPU's temperature, power and use, asked of NVIDIA's management library (libnvidia-ml, NVML).

By ctypes, as libcuda is: NVIDIA's own package for Python is one module of 330 kB, made from the header, which
costs each start 0.2 s and 17 MB, and nine functions are called here. A call may hang where the driver does:
whoever asks does it in a thread that nobody waits for.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from studio_worker.box.nodes import library_path

NAME = "libnvidia-ml.so.1"

NOT_SUPPORTED, NO_PERMISSION, GPU_IS_LOST, RESET_REQUIRED, LIB_RM_VERSION_MISMATCH = 3, 4, 15, 16, 18
"""nvmlReturn_t (nvml.h)."""

_GPU_SENSOR = 0
"""NVML_TEMPERATURE_GPU (nvml.h)."""
_HEAT = 0x20 | 0x40
"""nvmlClocksThrottleReasonSwThermalSlowdown and …HwThermalSlowdown (nvml.h)."""
_POWER = 0x80
"""nvmlClocksThrottleReasonHwPowerBrakeSlowdown (nvml.h). That the software keeps the clocks within the power
limit, a reason too, is so on every card that works."""
_VERSION_BYTES = 80
"""NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE (nvml.h)."""


class NvmlError(Exception):
    """NVML did not answer; ``status`` is its nvmlReturn_t, ``None`` where the library is not there."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class Reading(NamedTuple):
    """What is known at one moment; ``None`` is what this GPU does not tell. ``driver`` is the version of its
    kernel part. ``slowed_by``: ``heat``, ``power``, both or nothing.
    """

    driver: str
    temperature_celsius: float | None
    power_watts: float | None
    utilization_ratio: float | None
    used_bytes: int | None
    slowed_by: tuple[str, ...] | None


class _Utilization(ctypes.Structure):
    """nvmlUtilization_t (nvml.h)."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    """nvmlMemory_t (nvml.h)."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("total", "free", "used"))


_Told = TypeVar("_Told", bound="ctypes._SimpleCData[int] | ctypes.Structure")


class Nvml:
    """The GPU at one place on the bus. For one thread at a time.

    Args:
        library: as for dlopen(3).
    """

    def __init__(self, pci_bus_id: str, library: str = NAME) -> None:
        self._place = pci_bus_id.encode()
        self._name = library
        self._library: ctypes.CDLL | None = None
        self._untold: list[NvmlError] = []
        """Why figures are missing that this GPU should tell."""

    def read(self) -> Reading:
        """How the GPU is now.

        Raises:
            NvmlError: it cannot be told.
        """
        if self._library is None:
            library = _load(self._name)
            self._check(library, library.nvmlInit_v2())
            self._library = library
        library = self._library
        version = ctypes.create_string_buffer(_VERSION_BYTES)
        self._check(library, library.nvmlSystemGetDriverVersion(version, len(version)))
        # Anew each time: one that has left the bus is no longer found.
        gpu = ctypes.c_void_p()
        self._check(library, library.nvmlDeviceGetHandleByPciBusId_v2(self._place, ctypes.byref(gpu)))
        self._untold = []
        temperature = self._told("nvmlDeviceGetTemperature", ctypes.c_uint(), gpu, _GPU_SENSOR)
        milliwatts = self._told("nvmlDeviceGetPowerUsage", ctypes.c_uint(), gpu)
        use = self._told("nvmlDeviceGetUtilizationRates", _Utilization(), gpu)
        memory = self._told("nvmlDeviceGetMemoryInfo", _Memory(), gpu)
        reasons = self._told("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong(), gpu)
        if self._untold and all(told is None for told in (temperature, milliwatts, use, memory, reasons)):
            raise self._untold[0]
        return Reading(
            driver=version.value.decode(errors="replace"),
            temperature_celsius=None if temperature is None else float(temperature.value),
            power_watts=None if milliwatts is None else milliwatts.value / 1000,
            utilization_ratio=None if use is None else use.gpu / 100,
            used_bytes=None if memory is None else memory.used,
            slowed_by=None if reasons is None else _slowed_by(reasons.value),
        )

    def _told(self, function: str, into: _Told, *args: Any) -> _Told | None:
        """``into`` with what ``function`` says; ``None`` where this GPU does not tell, or not this user, and
        where one sensor alone is broken, as on many a card that computes well.
        """
        library = self._library
        assert library is not None
        if (call := getattr(library, function, None)) is None:
            return None  # deprecated ones may go some day
        status = call(*args, ctypes.byref(into))
        if status in {NOT_SUPPORTED, NO_PERMISSION}:
            return None
        try:
            self._check(library, status)
        except NvmlError as error:
            if status in {GPU_IS_LOST, RESET_REQUIRED}:
                raise
            self._untold.append(error)
            return None
        return into

    @staticmethod
    def _check(library: ctypes.CDLL, status: int) -> None:
        if status != 0:
            library.nvmlErrorString.restype = ctypes.c_char_p
            text = library.nvmlErrorString(status) or b"unknown"
            raise NvmlError(f"{text.decode(errors='replace')} (NVML error {status})", status)


def _slowed_by(reasons: int) -> tuple[str, ...]:
    return tuple(word for word, bits in (("heat", _HEAT), ("power", _POWER)) if reasons & bits)


def _load(name: str) -> ctypes.CDLL:
    """From where the dynamic linker looks, or beside the libcuda that is in use; a path is taken as it is."""
    cuda = None if "/" in name else library_path()
    for path in (Path(name), *([] if cuda is None else [cuda.with_name(name)])):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise NvmlError(f"{name} is not installed (Debian's package libnvidia-ml1)")
