"""Matrices of 8-bit floats, which stay so on the device and are widened layer by layer as they are used.

As published for ComfyUI: ``float8_e4m3fn`` or ``float8_e5m2``, as they are or with a scale for each matrix.
This module owns the tensor that carries the scale through a layout's renaming, and the layer that computes
with it. What it computes is what the matrix widened at loading would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

_MOVES = {
    *("__getitem__", "chunk", "split", "narrow", "roll", "reshape", "view", "contiguous", "clone", "detach"),
    *("squeeze", "unsqueeze", "permute", "transpose", "t"),
    *("__get__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size"),
}
"""What tells of a matrix, or puts its numbers elsewhere, without computing with them."""


class EightBitMatrix(torch.Tensor):
    """The bytes of 8-bit floats, with their type and scale. To torch they are ``int8``, so that nobody takes
    them for what a model computes in. It can be taken apart and put together; anything else is done with its
    numbers.
    """

    stored_as: torch.dtype
    scale: float

    @classmethod
    def of(cls, numbers: torch.Tensor, scale: float) -> EightBitMatrix:
        """
        Args:
            numbers: of an 8-bit floating point type.
        """
        return cls._wrap(numbers.view(torch.int8), numbers.dtype, scale)

    @classmethod
    def _wrap(cls, data: torch.Tensor, stored_as: torch.dtype, scale: float) -> EightBitMatrix:
        matrix: EightBitMatrix = _plainly(torch.Tensor.as_subclass, data, cls)
        matrix.stored_as, matrix.scale = stored_as, scale
        return matrix

    def data_bytes(self) -> torch.Tensor:
        """The bytes as a plain tensor."""
        return _plainly(torch.Tensor.as_subclass, self, torch.Tensor)  # type: ignore[no-any-return]

    def widened(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers themselves, in memory of their own."""
        return widened(self.data_bytes(), self.stored_as, self.scale, dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        given = [
            each
            for arg in (*args, *named.values())
            for each in (arg if isinstance(arg, list | tuple) else [arg])
        ]
        first, *rest = [each for each in given if isinstance(each, EightBitMatrix)]
        alike = all((each.stored_as, each.scale) == (first.stored_as, first.scale) for each in rest)
        tensors = sum(isinstance(each, torch.Tensor) for each in given)
        joins = func.__name__ == "cat" and alike and tensors == 1 + len(rest)
        if not joins and func.__name__ not in _MOVES:
            return func(*map(_numbers, args), **{name: _numbers(arg) for name, arg in named.items()})
        found = _plainly(func, *args, **named)
        if isinstance(found, torch.Tensor):
            return cls._wrap(found, first.stored_as, first.scale)
        if isinstance(found, list | tuple) and found and isinstance(found[0], torch.Tensor):
            return [cls._wrap(each, first.stored_as, first.scale) for each in found]
        return found


def _plainly(func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """What ``func`` does to the tensors' bytes, whatever class they have."""
    return torch.Tensor.__torch_function__(func, (), args, named)  # type: ignore[no-untyped-call]


def _numbers(arg: Any) -> Any:
    if isinstance(arg, EightBitMatrix):
        return arg.widened(torch.float32)
    return type(arg)(map(_numbers, arg)) if isinstance(arg, list | tuple) else arg


def widened(data: torch.Tensor, stored_as: torch.dtype, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """``data``, bytes of 8-bit floats, as numbers of ``dtype`` times ``scale``, rounded once."""
    numbers = data.view(stored_as).to(dtype)
    return numbers if scale == 1 else numbers.mul_(scale)


class EightBitLinear(nn.Linear):
    """A linear layer whose matrix is an :class:`EightBitMatrix`. ``weight`` is its bytes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self._stored_as, self._scale = torch.float8_e4m3fn, 1.0

    def hold(self, matrix: EightBitMatrix, device: torch.device) -> None:
        """Compute with ``matrix`` from now on."""
        self._stored_as, self._scale = matrix.stored_as, matrix.scale
        # On the CPU they are a mapped file's.
        data = matrix.data_bytes().to(device, copy=device.type == "cpu")
        self.weight = nn.Parameter(data, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See torch."""
        weight = widened(self.weight, self._stored_as, self._scale, input.dtype)
        return nn.functional.linear(input, weight, self.bias)


def use_eight_bit_linears(model: nn.Module, tensors: Mapping[str, Any], keep: Callable[[str], bool]) -> None:
    """Let the linear layers of ``model`` whose matrices are 8-bit in ``tensors`` compute with them as such.

    Args:
        keep: whether a parameter must have single precision.
    """
    for name, layer in list(model.named_modules()):
        matrix = f"{name}.weight"
        if type(layer) is nn.Linear and isinstance(tensors.get(matrix), EightBitMatrix) and not keep(matrix):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, EightBitLinear(layer))
