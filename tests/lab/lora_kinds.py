"""Every kind of LoRA for one weight: the tensors of a file, and the weight with them merged by hand.

Formulas as in the papers: LoRA (Hu et al. 2021), LoHa and LoKr (Yeh et al. 2023, and
https://github.com/KohakuBlueleaf/LyCORIS), DoRA (Liu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

RANK, ALPHA = 3, 2.0
SIZE = 0.3
"""Of a change, beside the weight that it changes."""


class Made(NamedTuple):
    """The tensors of a file by the ends of their names, and the merged weight."""

    tensors: dict[str, torch.Tensor]
    merged: torch.Tensor


Draw = Callable[..., torch.Tensor]
Kind = Callable[[torch.Tensor, Draw], Made]


def _sized(change: torch.Tensor, weight: torch.Tensor) -> float:
    return float(SIZE * weight.norm() / change.norm())


def lora(weight: torch.Tensor, draw: Draw, *, alpha: float | None = None) -> Made:
    """``W + alpha / rank * B A``; alpha is the rank where nothing says it."""
    down, up = draw(RANK, *weight.shape[1:]), draw(weight.shape[0], RANK, *[1] * (weight.ndim - 2))
    change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    size = _sized(change, weight)
    tensors = {"lora_down.weight": down, "lora_up.weight": up * size}
    if alpha is None:
        return Made(tensors, weight + size * change)
    return Made(tensors | {"alpha": torch.tensor(alpha)}, weight + size * change * alpha / RANK)


def lora_with_alpha(weight: torch.Tensor, draw: Draw) -> Made:
    return lora(weight, draw, alpha=ALPHA)


def tucker(weight: torch.Tensor, draw: Draw) -> Made:
    """A convolution between two of one pixel."""
    out, into, *kernel = weight.shape
    down, mid, up = draw(RANK, into, 1, 1), draw(RANK, RANK, *kernel), draw(out, RANK, 1, 1)
    change = torch.stack(
        [
            up[:, :, 0, 0] @ mid[:, :, y, x] @ down[:, :, 0, 0]
            for y in range(kernel[0])
            for x in range(kernel[1])
        ],
        dim=-1,
    ).reshape(weight.shape)
    size = _sized(change, weight)
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up * size}
    return Made(tensors | {"alpha": torch.tensor(ALPHA)}, weight + size * change * ALPHA / RANK)


def loha(weight: torch.Tensor, draw: Draw) -> Made:
    """``W + alpha / rank * (B1 A1) ⊙ (B2 A2)``."""
    out, into = weight.flatten(1).shape
    b1, a1, b2, a2 = draw(out, RANK), draw(RANK, into), draw(out, RANK), draw(RANK, into)
    change = ((b1 @ a1) * (b2 @ a2)).reshape(weight.shape)
    size = _sized(change, weight)
    tensors = {"hada_w1_a": b1 * size, "hada_w1_b": a1, "hada_w2_a": b2, "hada_w2_b": a2}
    return Made(tensors | {"alpha": torch.tensor(ALPHA)}, weight + size * change * ALPHA / RANK)


def loha_tucker(weight: torch.Tensor, draw: Draw) -> Made:
    """The same of two Tucker products."""
    out, into, *kernel = weight.shape
    made, changes = {}, []
    for number in (1, 2):
        core, a, b = draw(RANK, RANK, *kernel), draw(RANK, out), draw(RANK, into)
        made |= {f"hada_t{number}": core, f"hada_w{number}_a": a, f"hada_w{number}_b": b}
        slices = [a.T @ core[:, :, y, x] @ b for y in range(kernel[0]) for x in range(kernel[1])]
        changes.append(torch.stack(slices, dim=-1).reshape(weight.shape))
    change = changes[0] * changes[1]
    size = _sized(change, weight)
    made["hada_w1_a"] = made["hada_w1_a"] * size
    return Made(made | {"alpha": torch.tensor(ALPHA)}, weight + size * change * ALPHA / RANK)


def lokr(weight: torch.Tensor, draw: Draw, *, low: bool = False) -> Made:
    """``W + W1 ⊗ W2``; over the rank, times alpha, where one of them is a product itself."""
    out, into, *kernel = weight.shape
    rows, columns = (next(each for each in (4, 2, 3, 1) if size % each == 0) for size in (out, into))
    one = draw(rows, columns)
    if low:
        b, a = draw(out // rows, RANK), draw(RANK, into // columns, *kernel)
        two = (b @ a.flatten(1)).reshape(out // rows, into // columns, *kernel)
        inner = {"lokr_w2_a": b, "lokr_w2_b": a.flatten(1) if kernel else a}
    else:
        two = draw(out // rows, into // columns, *kernel)
        inner = {"lokr_w2": two}
    change = torch.zeros_like(weight)
    for row in range(rows):
        for column in range(columns):
            r, c = row * (out // rows), column * (into // columns)
            change[r : r + out // rows, c : c + into // columns] = one[row, column] * two
    size = _sized(change, weight)
    scale = ALPHA / RANK if low else 1.0
    tensors = {"lokr_w1": one * size, "alpha": torch.tensor(ALPHA)} | inner
    return Made(tensors, weight + size * change * scale)


def lokr_low(weight: torch.Tensor, draw: Draw) -> Made:
    return lokr(weight, draw, low=True)


def dora_by_row(weight: torch.Tensor, draw: Draw) -> Made:
    """``m (W + B A) / |W + B A|``, the norm that of each row."""
    made = lora_with_alpha(weight, draw)
    ones = [1] * (weight.ndim - 1)
    magnitude = weight.flatten(1).norm(dim=1) * (1.2 + 0.2 * draw(len(weight)))
    norm = made.merged.flatten(1).norm(dim=1)
    merged = made.merged * (magnitude / norm).reshape(-1, *ones)
    return Made(made.tensors | {"dora_scale": magnitude.reshape(-1, *ones)}, merged)


def dora_of_peft(weight: torch.Tensor, draw: Draw) -> Made:
    """The same as PEFT saves it."""
    tensors, merged = dora_by_row(weight, draw)
    shape = (-1,) if weight.ndim == 2 else (1, -1, 1, 1)
    magnitude = tensors.pop("dora_scale").reshape(shape)
    return Made(tensors | {"lora_magnitude_vector.weight": magnitude}, merged)


def dora_by_column(weight: torch.Tensor, draw: Draw) -> Made:
    """The same with the norm of each column, as LyCORIS does by default."""
    made = lora_with_alpha(weight, draw)
    columns = [1, weight.shape[1], *[1] * (weight.ndim - 2)]

    def norm(of: torch.Tensor) -> torch.Tensor:
        return of.transpose(0, 1).flatten(1).norm(dim=1)

    magnitude = norm(weight) * (1.2 + 0.2 * draw(weight.shape[1]))
    merged = made.merged * (magnitude / norm(made.merged)).reshape(columns)
    return Made(made.tensors | {"dora_scale": magnitude.reshape(columns)}, merged)


def difference(weight: torch.Tensor, draw: Draw) -> Made:
    change = draw(*weight.shape)
    change = change * _sized(change, weight)
    return Made({"diff": change}, weight + change)


def whole(weight: torch.Tensor, draw: Draw) -> Made:
    merged = difference(weight, draw).merged
    return Made({"weight": merged}, merged)


def norm_difference(weight: torch.Tensor, draw: Draw) -> Made:
    tensors, merged = difference(weight, draw)
    return Made({"w_norm": tensors["diff"]}, merged)


BIASES = ("diff_b", "b_norm", "bias")

MATRICES: dict[str, Kind] = {
    "LoRA": lora,
    "LoRA with alpha": lora_with_alpha,
    "LoHa": loha,
    "LoKr": lokr,
    "LoKr of a low rank": lokr_low,
    "DoRA by row": dora_by_row,
    "DoRA of PEFT": dora_of_peft,
    "DoRA by column": dora_by_column,
    "difference": difference,
    "whole weight": whole,
}
FILTERS: dict[str, Kind] = {**MATRICES, "Tucker": tucker, "LoHa, Tucker": loha_tucker}
NORMS: dict[str, Kind] = {"difference": difference, "norm": norm_difference, "whole weight": whole}
