"""A LoRA's change at work beside one layer, whose own weights stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from studio_worker.engine.lora_changes import Change


class Branch(nn.Module):
    """A change beside a linear layer or a convolution, in memory of its own.

    Args:
        layer: the one beside which it is; how it strides is read from it, its weights are not.
    """

    def __init__(self, change: Change, layer: nn.Module, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._convolves = isinstance(layer, nn.Conv2d)
        self._strides: dict[str, Any] = {}
        if isinstance(layer, nn.Conv2d):
            self._strides = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
        self._steps: list[tuple[str, bool]] = []
        """Names of what is multiplied with, in order, and whether it strides as the layer does."""
        factors = dict(change.factors)
        if "up" in factors:
            core = "mid" if "mid" in factors else "down"
            self._steps = [(name, name == core) for name in ("down", "mid", "up") if name in factors]
            into = shape[1:] if core == "down" else shape[1:2]
            factors["down"] = self._filters(factors["down"].reshape(len(factors["down"]), *into))
            factors["up"] = self._filters(factors["up"])
        elif "whole" in factors:
            self._steps = [("whole", True)]
            factors["whole"] = factors["whole"].reshape(shape)
        for name, tensor in [*factors.items(), ("gain", change.gain), ("bias", change.bias)]:
            if tensor is not None:
                self.register_buffer(name, tensor.to(dtype, copy=True).contiguous(), persistent=False)

    def _filters(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix[..., None, None] if self._convolves and matrix.ndim == 2 else matrix

    def forward(self, seen: torch.Tensor, plain: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What is added to ``plain``, which the layer of ``bias`` made of ``seen``."""
        added: torch.Tensor | None = None
        own = dict(self.named_buffers())
        x = seen.to(self._dtype)
        for name, strides in self._steps:
            if self._convolves:
                x = nn.functional.conv2d(x, own[name], **(self._strides if strides else {}))
            else:
                x = nn.functional.linear(x, own[name])
            added = x
        if "outer" in own:
            x = x.reshape(*x.shape[:-1], own["outer"].shape[1], own["inner"].shape[1])
            x = nn.functional.linear(x, own["inner"]).transpose(-1, -2)
            added = nn.functional.linear(x, own["outer"]).transpose(-1, -2).flatten(-2)
        if "gain" in own:
            rows = plain if bias is None else plain - self._by_row(bias.to(plain.dtype))
            gained = rows * self._by_row(own["gain"])
            added = gained if added is None else added + gained
        if "bias" in own:
            by_row = self._by_row(own["bias"])
            added = by_row.expand_as(plain) if added is None else added + by_row
        return torch.zeros_like(plain) if added is None else added.to(plain.dtype)

    def _by_row(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.reshape(-1, 1, 1) if self._convolves else vector
