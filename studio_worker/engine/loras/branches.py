"""A LoRA's change at work beside one layer, whose own weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from studio_worker.engine.loras.changes import Change, hadamard


class Branch(nn.Module):
    """A change beside a linear layer or a convolution, in memory of its own.

    Args:
        layer: the one beside which it is; how it strides is read from it, its weights are not.
        shape: of the layer's weight.
        dtype: what it computes in.
    """

    def __init__(
        self, change: Change, layer: nn.Linear | nn.Conv2d, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._dtype, self._shape, self._rows = dtype, shape, change.rows
        self._strides: dict[str, Any] = {}
        self._convolves = isinstance(layer, nn.Conv2d)
        if isinstance(layer, nn.Conv2d):
            self._strides = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
        factors = dict(change.factors)
        if "up" in factors:
            into = shape[1:2] if "mid" in factors else shape[1:]
            factors["down"] = self._filters(factors["down"].reshape(len(factors["down"]), *into))
            factors["up"] = self._filters(factors["up"])
        self._names = tuple(factors)
        vectors = {name: getattr(change, name) for name in ("before", "after", "by_row", "by_column", "bias")}
        for name, tensor in (factors | vectors).items():
            kept = None if tensor is None else tensor.to(dtype, copy=True).contiguous()
            self.register_buffer(name, kept, persistent=False)

    def _filters(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix[..., None, None] if self._convolves and matrix.ndim == 2 else matrix

    def forward(self, seen: torch.Tensor, plain: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """What is added to ``plain``, which ``layer`` made of ``seen``."""
        x = seen.to(self._dtype)
        added = plain.new_zeros(()).to(self._dtype)
        if self._names:
            added = self._changed(self._times(x, self.before))
            if self._rows is not None:
                added = added.narrow(1 if self._convolves else -1, *self._rows)
            added = self._times(added, self.after)
        bias: Any = layer.bias
        if self.by_row is not None:
            own = plain if bias is None else plain - self._vector(bias.to(plain.dtype))
            added = added + self._times(own, self.by_row)
        if self.by_column is not None:
            # Called like this, no hook of the layer's sees it.
            columns = layer.forward(self._times(seen, self.by_column.to(seen.dtype)))
            added = added + (columns if bias is None else columns - self._vector(bias.to(columns.dtype)))
        if self.bias is not None:
            added = added + self._vector(self.bias)
        return added.to(plain.dtype)

    def _changed(self, x: torch.Tensor) -> torch.Tensor:
        """What the change alone makes of ``x``."""
        factors = {name: getattr(self, name) for name in self._names}
        if "up" in factors:
            core = "mid" if "mid" in factors else "down"
            for name in (name for name in ("down", "mid", "up") if name in factors):
                x = self._multiplied(x, factors[name], strides=name == core)
            return x
        if "outer" in factors:
            return self._kronecker(x, factors["outer"], factors["inner"])
        whole = factors["whole"] if "whole" in factors else hadamard(factors)
        return self._multiplied(x, whole.reshape(self._shape), strides=True)

    def _kronecker(self, x: torch.Tensor, outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        if not self._convolves:
            x = x.reshape(*x.shape[:-1], outer.shape[1], inner.shape[1])
            x = self._multiplied(x, inner, strides=True).transpose(-1, -2)
            return self._multiplied(x, outer, strides=True).transpose(-1, -2).flatten(-2)
        count = len(x)
        x = x.reshape(count * outer.shape[1], inner.shape[1], *x.shape[2:])
        x = self._multiplied(x, inner, strides=True)
        x = x.reshape(count, outer.shape[1], *x.shape[1:])
        return torch.einsum("ab,nbchw->nachw", outer, x).flatten(1, 2)

    def _multiplied(self, x: torch.Tensor, weight: torch.Tensor, *, strides: bool) -> torch.Tensor:
        if self._convolves:
            return nn.functional.conv2d(x, weight, **(self._strides if strides else {}))
        return nn.functional.linear(x, weight)

    def _times(self, x: torch.Tensor, vector: torch.Tensor | None) -> torch.Tensor:
        return x if vector is None else x * self._vector(vector)

    def _vector(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.reshape(-1, 1, 1) if self._convolves else vector

    before: torch.Tensor | None
    after: torch.Tensor | None
    by_row: torch.Tensor | None
    by_column: torch.Tensor | None
    bias: torch.Tensor | None
    __call__: Callable[..., torch.Tensor]
