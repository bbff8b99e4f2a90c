"""Latents as rows of tokens: each of two by two cells, as FLUX.1, Chroma and Qwen-Image read them.

Sides of an odd number of cells are filled up with zeros for the model, and cut again after it, so that a
picture has exactly the size that was asked for.
"""

from __future__ import annotations

from typing import Any

PATCH = 2
"""Cells a side of a token, in every transformer that is served."""


def tokens_a_side(cells: int) -> int:
    """How many tokens a side of ``cells`` takes."""
    return -(-cells // PATCH)


def padded(latents: Any) -> Any:
    """``latents`` (…, height, width) with both sides even."""
    import torch

    height, width = latents.shape[-2:]
    if height % PATCH == 0 and width % PATCH == 0:
        return latents
    return torch.nn.functional.pad(latents, (0, width % PATCH, 0, height % PATCH))


def packed(latents: Any) -> Any:
    """Latents (1, channels, height, width) as (1, tokens, 4 * channels)."""
    rows = padded(latents).unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))  # (1, c, h, 2, w, 2)
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Any, height: int, width: int) -> Any:
    """The inverse of :func:`packed` for latents of ``height`` x ``width`` cells."""
    rows = tokens.unflatten(1, (tokens_a_side(height), tokens_a_side(width))).unflatten(
        -1, (-1, PATCH, PATCH)
    )
    latents = rows.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4)
    return latents[..., :height, :width]


def places(height: int, width: int, index: int, device: Any) -> Any:
    """Where each token of latents is: ``index``, row and column, as FLUX.1 tells places (tokens, 3)."""
    import torch

    rows, columns = (torch.arange(tokens_a_side(cells), device=device) for cells in (height, width))
    grid = torch.cartesian_prod(rows, columns).view(-1, 2)
    return torch.nn.functional.pad(grid, (1, 0), value=index).float()
