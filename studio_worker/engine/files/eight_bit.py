"""Matrices of 8-bit floats, which stay so on the device and are widened layer by layer as they are used.

As published for ComfyUI: ``float8_e4m3fn`` or ``float8_e5m2``, as they are or with a scale for each matrix.
This module owns the tensor that carries the scale through a layout's renaming; what computes with it is
packed.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

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
