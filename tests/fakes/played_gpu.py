"""A GPU that the CPU plays, for tests of what lies where: torch believes in ``cuda:N``, numbers are real.

Whatever torch is asked to put on the played device lies in RAM and is known to be "there". An operation that
would meet tensors of both places fails as CUDA's do; every copy between them, every stream and every pinned
byte is counted, and naming another GPU than the one asked for fails the test. What it cannot play is time:
copies are done when they are asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
GIB = 2**30

_ATEN = torch.ops.aten
_COPY = _ATEN.copy_.default
_INDEX = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}
"""Operations whose indices CUDA takes from RAM as well."""


class PlayedGpu:
    """What there is on the device, and what was done to it.

    Attributes:
        to_device: bytes of each copy from RAM.
        to_ram: and of each back.
        streams: how many streams were made.
        current: torch's current device.
        pinned: bytes of RAM that are pinned now, by address.
        pinnable_bytes: how many the driver pins at most.
        used_bytes: of tensors that are there now.
        peak_bytes: of those that were there at once.
    """

    def __init__(self, device: torch.device, count: int, memory_bytes: int) -> None:
        self.device = device
        self.count = count
        self.memory_bytes = memory_bytes
        self.pinnable_bytes = memory_bytes
        self.current = 0
        self.to_device: list[int] = []
        self.to_ram: list[int] = []
        self.streams = 0
        self.pinned: dict[int, int] = {}
        self.peak_bytes = 0
        self.used_bytes = 0
        self.is_aside = False
        self._there: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is on the device."""
        before, self.is_aside = self.is_aside, True
        try:
            return tensor.device == CPU and tensor.untyped_storage() in self._there
        finally:
            self.is_aside = before

    def put(self, tensor: torch.Tensor) -> None:
        """``tensor`` is there from now on.

        Raises:
            torch.OutOfMemoryError: as CUDA's allocator does.
        """
        with self.aside():
            if tensor.device != CPU or tensor.untyped_storage() in self._there:
                return
            storage, size = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
            if self.used_bytes + size > self.memory_bytes:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            self._there.add(storage)
            self.used_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            weakref.finalize(storage, self._free, size)

    def _free(self, size_bytes: int) -> None:
        self.used_bytes -= size_bytes

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, torch is what it is."""
        before, self.is_aside = self.is_aside, True
        try:
            yield
        finally:
            self.is_aside = before

    def start_counting(self) -> None:
        """Forget copies and the peak so far."""
        self.to_device, self.to_ram = [], []
        self.peak_bytes = self.used_bytes

    def named(self, name: Any = None) -> torch.device:
        """The device that a call names, or means where it names none."""
        device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name or "cuda")
        if device.type != "cuda":
            return device
        index = self.current if device.index is None else device.index
        assert index == self.device.index, f"cuda:{index} was touched, where {self.device} was asked for"
        return self.device


class _Operations(TorchDispatchMode):
    """Fails where an operation meets both places; what is made of what is there, is there."""

    def __init__(self, gpu: PlayedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu = self._gpu
        if gpu.is_aside:
            return func(*args, **(kwargs or {}))
        given = [*_tensors(args), *_tensors((kwargs or {}).values())]
        there = [gpu.has(each) for each in given]
        made = func(*args, **(kwargs or {}))
        if not any(there):
            return made
        if func is _COPY:
            if there[0] != there[1]:
                (gpu.to_device if there[0] else gpu.to_ram).append(given[1].nbytes)
            return made
        astray = [each for each, is_there in zip(given, there, strict=True) if not is_there and each.ndim]
        if astray and not (func in _INDEX and there[0]):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{gpu.device} and cpu! ({func}, {[tuple(each.shape) for each in astray]})"
            )
        for each in _tensors((made,)):
            gpu.put(each)
        return made


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class _Calls(TorchFunctionMode):
    """Has the CPU do what the device is asked for, and keeps in mind where the results are."""

    def __init__(self, gpu: PlayedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu = dict(kwargs or {}), self._gpu
        name = getattr(func, "__name__", "")
        if gpu.is_aside:
            return func(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        if name == "__get__":
            return self._attribute(func, args)
        if name == "cpu":
            return self._moved(args[0], (CPU,), {})
        if name == "to":
            return self._moved(args[0], args[1:], kwargs)
        if name == "record_stream":
            return None
        if name == "pad_sequence":  # made of a tensor that is filled, which says nothing of its place
            with gpu.aside():
                made = func(*args, **kwargs)
            if gpu.has(args[0][0]):
                gpu.put(made)
            return made
        if name == "new_tensor" and gpu.has(args[0]):
            kwargs.setdefault("device", gpu.device)
        if name in {"numpy", "__array__"} and gpu.has(args[0]):
            raise TypeError(f"can't convert {gpu.device} device type tensor to numpy")
        if name == "pin_memory":
            return args[0]
        if name in {"cuda", "is_pinned"} or kwargs.get("device") is None:
            return func(*args, **kwargs)
        if gpu.named(kwargs["device"]) != gpu.device:
            return func(*args, **kwargs)
        if name == "as_tensor" and isinstance(args[0], torch.Tensor):
            return args[0].to(**kwargs)
        made = func(*args, **{**kwargs, "device": CPU})
        for each in _tensors((made,)):
            gpu.put(each)
        return made

    def _attribute(self, func: Any, args: Any) -> Any:
        attribute = getattr(func, "__self__", None)
        if attribute is torch.Tensor.device and self._gpu.has(args[0]):
            return self._gpu.device
        if attribute is torch.Tensor.is_cuda:
            return self._gpu.has(args[0])
        return func(*args)

    def _moved(self, tensor: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        gpu = self._gpu
        was_there = gpu.has(tensor)
        copies = kwargs.pop("copy", False)
        if "other" in kwargs or (args and isinstance(args[0], torch.Tensor)):
            other = kwargs.pop("other", args[0] if args else None)
            args, kwargs = (other.dtype, gpu.device if gpu.has(other) else other.device), {}
        dtype = kwargs.get("dtype") or next((each for each in args if isinstance(each, torch.dtype)), None)
        places = [each for each in args if isinstance(each, str | torch.device)]
        device = torch.device(places[0]) if places else kwargs.get("device")
        layout = {"memory_format": kwargs["memory_format"]} if kwargs.get("memory_format") else {}
        made: torch.Tensor = tensor.to(dtype or tensor.dtype, copy=copies, **layout)
        if device is None:
            return made
        if torch.device(device).type not in {"cuda", "cpu"}:
            return made.to(device)
        is_there = gpu.named(device) == gpu.device
        if is_there == was_there:
            return made
        with gpu.aside():
            made = made.clone()
        if is_there:
            gpu.put(made)
        (gpu.to_device if is_there else gpu.to_ram).append(tensor.nbytes)
        return made


class _Moment:
    """A stream, or a moment in one: everything is done at once."""

    def record_event(self, event: Any = None) -> Any:
        return event or self

    def nothing(self, *_: Any) -> None:
        """What would wait."""

    synchronize = wait_stream = wait_event = record = wait = nothing


class _Driver:
    """CUDA's runtime, as far as pinning goes."""

    def __init__(self, gpu: PlayedGpu) -> None:
        self._gpu = gpu

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        self._gpu.named()
        pinned = self._gpu.pinned
        assert all(address + size_bytes <= at or at + size <= address for at, size in pinned.items())
        if sum(pinned.values()) + size_bytes > self._gpu.pinnable_bytes:
            return 2  # cudaErrorMemoryAllocation
        pinned[address] = size_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self._gpu.named()
        del self._gpu.pinned[address]
        return 0


@contextmanager
def played(name: str = "cuda:0", *, count: int = 2, memory_bytes: int = GIB) -> Iterator[PlayedGpu]:
    """Inside, this machine has ``count`` GPUs, of which only ``name`` may be touched."""
    device = torch.device(name)
    gpu = PlayedGpu(torch.device("cuda", device.index or 0), count, memory_bytes)
    properties = SimpleNamespace(
        name="Played", major=8, minor=9, total_memory=memory_bytes, multi_processor_count=1
    )

    def of_device(result: Any) -> Any:
        def call(device: Any = None) -> Any:
            gpu.named(device)
            return result()

        return call

    class Stream(_Moment):  # a class, since libraries name it in annotations
        def __init__(self, device: Any = None, **_: Any) -> None:
            gpu.named(device)
            gpu.streams += 1

    def set_device(device: Any) -> None:
        gpu.current = torch.device(device).index if not isinstance(device, int) else device

    @contextmanager
    def current(device: Any) -> Iterator[None]:
        before = gpu.current
        set_device(device)
        yield
        gpu.current = before

    def free() -> tuple[int, int]:
        return memory_bytes - gpu.used_bytes, memory_bytes

    stand_ins = {
        "init": lambda: None,
        "is_initialized": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: gpu.current,
        "set_device": set_device,
        "get_device_properties": of_device(lambda: properties),
        "get_device_name": of_device(lambda: properties.name),
        "get_device_capability": of_device(lambda: (8, 9)),
        "get_arch_list": lambda: ["sm_89"],
        "mem_get_info": of_device(free),
        "memory_allocated": of_device(lambda: gpu.used_bytes),
        "memory_reserved": of_device(lambda: gpu.used_bytes),
        "max_memory_allocated": of_device(lambda: gpu.peak_bytes),
        "reset_peak_memory_stats": of_device(lambda: None),
        "empty_cache": lambda: None,
        "synchronize": of_device(lambda: None),
        "device": current,
        "Stream": Stream,
        "Event": _Moment,
        "current_stream": of_device(_Moment),
        "stream": lambda _: nullcontext(),
        "cudart": lambda: _Driver(gpu),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "cuda", "13.0")
        for attribute, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, attribute, stand_in)
        with _Calls(gpu), _Operations(gpu):
            yield gpu
