"""Prompts that were encoded, kept so that the next job with the same words need not encode them again.

A studio asks for many pictures of one prompt, and negative prompts hardly ever change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

BUDGET_BYTES = 64 << 20
"""Some ten prompts of the largest text encoders served (512 tokens of 4096 numbers), hundreds of CLIP's."""


class PromptCache:
    """Embeddings by what they were made from, least recently used first, in RAM. For one thread.

    Args:
        budget_bytes: how much is kept.
    """

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[Hashable, tuple[dict[str, Any], int]] = OrderedDict()

    def get(
        self, key: Hashable, device: torch.device, encode: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What ``encode`` gives: arguments of a pipeline's call, tensors on ``device``.

        Always a copy: pipelines may change what they are given.
        """
        if key not in self._kept:
            arguments = encode()
            kept = _moved(arguments, torch.device("cpu"))
            self._kept[key] = kept, sum(tensor.nbytes for tensor in _tensors(kept))
            while sum(size for _, size in self._kept.values()) > self._budget_bytes:
                self._kept.popitem(last=False)
            return arguments
        self._kept.move_to_end(key)
        return dict(_moved(self._kept[key][0], device))

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {name: _moved(each, device) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(each, device) for each in value)
    return value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in inner for tensor in _tensors(each)]
