"""Signs of life from inside a component at work: after each of its layers.

A VAE on a CPU, or a text encoder whose weights come from a slow disk for the first time, may take longer for
one pass than a step may; whoever watches for hangs must be able to tell that from one. The denoiser needs
none: its steps are counted, and hooks on it would cost time in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def watched(components: Iterable[torch.nn.Module], alive: Callable[[], None]) -> Iterator[None]:
    """While this lasts ``alive`` is called after each layer of ``components``; what it raises ends a pass."""

    def done(_module: torch.nn.Module, _given: Any, _made: Any) -> None:
        alive()

    with ExitStack() as hooks:
        for component in components:
            for module in component.modules():
                hooks.callback(module.register_forward_hook(done).remove)
        yield
