"""A module whose output is always the same, so that it is made once and not at every step."""

from __future__ import annotations

from typing import Any

import torch


class Still(torch.nn.Module):
    """Gives ``output``, whatever it is given; it goes where the model goes."""

    output: torch.Tensor

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("output", output, persistent=False)

    def forward(self, *_: Any) -> torch.Tensor:
        """See torch."""
        return self.output


def keep_still(owner: torch.nn.Module, name: str, *arguments: Any) -> None:
    """Have the submodule ``name`` of ``owner`` give for ever what it gives for ``arguments``."""
    setattr(owner, name, Still(getattr(owner, name)(*arguments)))
