"""Linear layers whose matrix is packed, in GGUF's blocks or 8-bit floats, or has been unpacked.

Packed, a matrix is written out as plain numbers each time that it is used, which takes a few bytes a weight
for a moment, and time at every step. Unpacked it is written out once: the same numbers in the same type, so
that what is computed is the same to the bit. This module owns the layers and the way from one to the other;
for which of them there is room, placement.py and residency.py say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from torch import nn
from torch.overrides import TorchFunctionMode

from studio_worker.engine.files.eight_bit import EightBitMatrix, widened


class _Constants(TorchFunctionMode):
    """Has small constants that are made on a device made there once.

    diffusers copies some for each matrix that it multiplies out, and for a copy from RAM the CPU waits until
    the device has done all that it was told before: hundreds of times a step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[Any, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is not torch.tensor:
            return func(*args, **named)
        key = (*map(tuple, args), *named.values())
        made = self._made.get(key)
        if made is None or made.device != named["device"]:
            made = self._made[key] = func(*args, **named)
        return made


_CONSTANTS = _Constants()


class PackedLinear(nn.Linear):
    """A linear layer whose ``weight`` is bytes, until it is unpacked.

    Args:
        layer: the one it takes the place of.
        dtype: what the layer computes in; libraries ask for it as ``compute_dtype``.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.compute_dtype = dtype
        self._in_ram: torch.Tensor | None = None
        """The bytes while the layer is unpacked, where they were kept."""

    @property
    def is_packed(self) -> bool:
        return not self.weight.is_floating_point()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See torch."""
        # Wider than what the layer computes in where a VAE decodes in single precision.
        dtype = torch.promote_types(input.dtype, self.compute_dtype)
        weight = self.numbers(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(input.to(dtype), weight, bias)

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix as plain numbers."""
        return self._numbers(dtype) if self.is_packed else self.weight.to(dtype)

    def unpack(self, *, keeps: bool, in_ram: torch.Tensor | None = None) -> None:
        """Write the matrix out; with ``keeps`` its bytes stay in RAM, where they may be already."""
        numbers = self._numbers(self.compute_dtype)
        if keeps:
            self._in_ram = self._bytes().cpu() if in_ram is None else _plain(in_ram)
        self.weight = nn.Parameter(numbers, requires_grad=False)

    def pack(self, device: torch.device) -> torch.Tensor:
        """Compute with the bytes that were kept, on ``device``; they, in RAM."""
        in_ram = self._in_ram
        assert in_ram is not None
        self._hold(in_ram.to(device))
        self._in_ram = None
        return in_ram

    @property
    def kept_bytes(self) -> int:
        return 0 if self._in_ram is None else self._in_ram.nbytes

    def _numbers(self, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError

    def _bytes(self) -> torch.Tensor:
        raise NotImplementedError

    def _hold(self, data: torch.Tensor) -> None:
        raise NotImplementedError


class BlockLinear(PackedLinear):
    """Of blocks as GGUF files have them. ``weight`` is a ``GGUFParameter``, by which diffusers knows them."""

    _kind: Any = None

    def hold(self, matrix: GGUFParameter, device: torch.device) -> None:
        """Compute with ``matrix`` from now on."""
        self._kind = matrix.quant_type
        self._hold(_own(matrix.as_tensor(), device))

    def _hold(self, data: torch.Tensor) -> None:
        self.weight = GGUFParameter(data, quant_type=self._kind)

    def _bytes(self) -> torch.Tensor:
        return self.weight.as_tensor()  # type: ignore[attr-defined, no-any-return]

    def _numbers(self, dtype: torch.dtype) -> torch.Tensor:
        with _CONSTANTS if self.weight.is_cuda else nullcontext():
            numbers: torch.Tensor = dequantize_gguf_tensor(self.weight)
        return numbers.to(dtype)


class EightBitLinear(PackedLinear):
    """Of 8-bit floats, with a scale or without."""

    _stored_as = torch.float8_e4m3fn
    _scale = 1.0

    def hold(self, matrix: EightBitMatrix, device: torch.device) -> None:
        """Compute with ``matrix`` from now on."""
        self._stored_as, self._scale = matrix.stored_as, matrix.scale
        self._hold(_own(matrix.data_bytes(), device))

    def _hold(self, data: torch.Tensor) -> None:
        self.weight = nn.Parameter(data, requires_grad=False)

    def _bytes(self) -> torch.Tensor:
        return self.weight.data

    def _numbers(self, dtype: torch.dtype) -> torch.Tensor:
        return widened(self.weight, self._stored_as, self._scale, dtype)


def _own(data: torch.Tensor, device: torch.device) -> torch.Tensor:
    # On the CPU they are a mapped file's.
    return data.to(device, copy=device.type == "cpu")


def _plain(data: torch.Tensor) -> torch.Tensor:
    return data.as_tensor() if isinstance(data, GGUFParameter) else data


def use_packed_linears(
    model: nn.Module, tensors: Mapping[str, Any], dtype: torch.dtype, keep: Callable[[str], bool]
) -> None:
    """Let the linear layers of ``model`` whose matrices are packed in ``tensors`` compute with them as such.

    Args:
        dtype: what they compute in.
        keep: whether a parameter must have single precision. 8-bit floats are then written out at once.
    """
    for name, layer in list(model.named_modules()):
        matrix = tensors.get(f"{name}.weight")
        is_wide = keep(f"{name}.weight")
        if isinstance(layer, nn.Linear) and isinstance(matrix, GGUFParameter):
            packed: PackedLinear = BlockLinear(layer, torch.float32 if is_wide else dtype)
        elif type(layer) is nn.Linear and isinstance(matrix, EightBitMatrix) and not is_wide:
            packed = EightBitLinear(layer, dtype)
        else:
            continue
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, packed)


def packed_linears(module: nn.Module) -> Iterator[PackedLinear]:
    """Those of ``module`` that are packed, or were before they were unpacked."""
    return (layer for layer in module.modules() if isinstance(layer, PackedLinear))


def is_in_blocks(module: nn.Module) -> bool:
    """Whether some matrix is GGUF's blocks now."""
    return any(isinstance(layer, BlockLinear) and layer.is_packed for layer in module.modules())


def kept_bytes(module: nn.Module) -> int:
    """What the packed matrices take in RAM that were kept when they were written out."""
    return sum(layer.kept_bytes for layer in packed_linears(module))


def unpacked_bytes(module: nn.Module) -> int:
    """What packed matrices take that are written out now."""
    return sum(layer.weight.nbytes for layer in packed_linears(module) if not layer.is_packed)


def unpack(
    module: nn.Module,
    *,
    keeps: bool,
    copy: MutableMapping[torch.Tensor, torch.Tensor] | None = None,
    on_matrix: Callable[[], object] = bool,
) -> None:
    """Write every packed matrix out, where it is; with ``keeps`` the packed ones stay in RAM.

    Args:
        copy: weights to what they are in RAM; those that are written out leave it.
        on_matrix: called after each.
    """
    known = {} if copy is None else copy
    for layer in packed_linears(module):
        if layer.is_packed:
            packed = layer.weight
            layer.unpack(keeps=keeps, in_ram=known.get(packed))
            known.pop(packed, None)
            on_matrix()


def pack(module: nn.Module, device: torch.device) -> dict[torch.Tensor, torch.Tensor]:
    """Have every matrix packed again, on ``device``, and what it is in RAM; those that are packed stay where
    they are.
    """
    unpacked = [layer for layer in packed_linears(module) if not layer.is_packed]
    in_ram = [layer.pack(device) for layer in unpacked]
    return {layer.weight: kept for layer, kept in zip(unpacked, in_ram, strict=True)}
