"""What a LoRA's tensors mean: the change of each layer's weight and bias, as the factors that it is made of.

``W x`` becomes ``W x + B A x``, which is what weights merged by hand compute, within rounding, whatever W is
stored as. So a LoRA takes the memory of its file, and not that of the model. This module owns that
arithmetic, and no layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from studio_worker.engine.files.gguf_files import Shape
from studio_worker.engine.loras.adapter import Adapter
from studio_worker.engine.loras.places import Place

Tensors = Mapping[str, torch.Tensor]

Plain = Callable[[str], torch.Tensor]
"""Gives the ``weight`` or ``bias`` that a place's layers have of their own, one after the other, in single
precision.
"""


@dataclass(frozen=True)
class Change:
    """What is added to one layer, all at its strength.

    Args:
        factors: of the change to the weight: ``down``, ``up`` and perhaps ``mid`` of a low rank; ``outer``
            and ``inner`` of a Kronecker product; the ``hada_`` of two products, times each other; or
            ``whole``.
        before, after: what the columns of that change are multiplied with, and the rows.
        rows: the first row of it that is this layer's and their number, where it is larger.
        by_row, by_column: by how much of itself the plain weight changes.
        bias: what is added to the bias.
    """

    factors: Tensors
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None
    rows: tuple[int, int] | None = None
    by_row: torch.Tensor | None = None
    by_column: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def changes(adapter: Adapter, place: Place, tensors: Tensors, strength: float, plain: Plain) -> list[Change]:
    """What ``adapter`` adds to each layer of ``place``.

    Args:
        tensors: the adapter's, in single precision.
    """

    def ours(by_row: torch.Tensor) -> torch.Tensor:
        """With the rows in the order of the class."""
        return by_row.roll(len(by_row) // 2, 0) if place.rolled else by_row

    change = Change(_factors(adapter, tensors, place.row))
    if place.rolled:
        change = _with_rows(_multiplied(change), ours)
    if change.factors and (magnitude := tensors.get("dora", tensors.get("magnitude"))) is not None:
        own = plain("weight")
        if "magnitude" in tensors or magnitude.shape[0] == len(own):
            ratio = _ratio(change.factors, own, ours(magnitude.flatten()), axis=0)
            change = replace(change, after=ratio, by_row=ratio - 1)
        else:
            ratio = _ratio(change.factors, own, magnitude.flatten(), axis=1)
            change = replace(change, before=ratio, by_column=ratio - 1)
    if "set" in tensors:
        own = plain("weight")
        change = Change({"whole": ours(tensors["set"]).reshape(own.shape) - own})
    if "set_b" in tensors:
        change = replace(change, bias=ours(tensors["set_b"]) - plain("bias"))
    elif "up_bias" in tensors:
        scale = _strength(adapter, tensors, len(tensors["down"]))
        change = replace(change, bias=ours(tensors["up_bias"]) * scale)
    elif "diff_b" in tensors:
        change = replace(change, bias=ours(tensors["diff_b"].flatten()))
    return _split(_times(change, strength), place.rows)


def _factors(adapter: Adapter, tensors: Tensors, row: Shape) -> Tensors:
    """Of the change to the weight, alpha in them, its rows as they are published."""
    given = dict(tensors)
    scale = float(given["scalar"]) if "scalar" in given else 1.0
    if "down" in given:
        up = given["up"].flatten(1) * (scale * _strength(adapter, given, len(given["down"])))
        return {"down": given["down"], "up": up} | {name: given[name] for name in ("mid",) if name in given}
    if "hada_w1_a" in given:
        scale *= _strength(adapter, given, len(given["hada_w1_b"]))
        factors = {name: tensor for name, tensor in given.items() if name.startswith("hada_")}
        return factors | {"hada_w1_a": given["hada_w1_a"] * scale}
    if any(name.startswith("lokr_") for name in given):
        ranks = [len(given[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in given]
        scale *= _strength(adapter, given, ranks[0]) if ranks else 1.0  # two whole factors have no rank
        outer, inner = (
            given[name]
            if name in given
            else product(given, f"{name}_a", f"{name}_b", "lokr_t2" if name == "lokr_w2" else "")
            for name in ("lokr_w1", "lokr_w2")
        )
        return {"outer": outer * scale, "inner": inner.reshape(len(inner), -1, *row[1:])}
    return {"whole": given["diff"]} if "diff" in given else {}


def _strength(adapter: Adapter, tensors: Tensors, rank: int) -> float:
    alpha = float(tensors["alpha"]) if "alpha" in tensors else adapter.alpha
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if adapter.by_root and "alpha" not in tensors else rank)


def product(tensors: Tensors, left: str, right: str, core: str) -> torch.Tensor:
    """``left @ right``, with LyCORIS' Tucker core between them where there is one."""
    a, b = tensors[left], tensors[right]
    if core not in tensors:
        return (a @ b.flatten(1)).reshape(len(a), *b.shape[1:])
    return torch.einsum("ijkl,jr,ip->prkl", tensors[core], b, a)


def hadamard(tensors: Tensors) -> torch.Tensor:
    """LoHa's change."""
    one, two = (product(tensors, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
    return one * two


def _multiplied(change: Change) -> Change:
    """With rows that can change places: those of a Kronecker product lie in two factors."""
    factors = change.factors
    if "outer" not in factors:
        return change
    return replace(change, factors={"whole": torch.kron(_as_long(factors), factors["inner"])})


def _as_long(factors: Tensors) -> torch.Tensor:
    """The outer factor with as many dimensions as the inner one."""
    return factors["outer"].reshape(*factors["outer"].shape, *[1] * (factors["inner"].ndim - 2))


def _whole(factors: Tensors, like: torch.Tensor) -> torch.Tensor:
    """The change as a whole, in the shape of the weight."""
    if "whole" in factors:
        change = factors["whole"]
    elif "outer" in factors:
        change = torch.kron(_as_long(factors), factors["inner"])
    elif "up" not in factors:
        change = hadamard(factors)
    elif "mid" in factors:
        down, mid, up = (factors[name] for name in ("down", "mid", "up"))
        change = torch.einsum("oi,ijkl,jn->onkl", up, mid, down.flatten(1))
    else:
        change = factors["up"] @ factors["down"].flatten(1)
    return change.reshape(like.shape)


_SMALLEST = 1e-12
"""A norm that nothing is divided by."""


def _ratio(factors: Tensors, plain: torch.Tensor, magnitude: torch.Tensor, axis: int) -> torch.Tensor:
    """DoRA: ``m / |W + D|``, with which ``W + D`` is multiplied by row or by column (Liu et al. 2024)."""
    trained = (plain + _whole(factors, plain)).transpose(0, axis)
    norms: torch.Tensor = trained.flatten(1).norm(dim=1)
    return magnitude / norms.clamp_min(_SMALLEST)


_ROWS = {"up", "whole", "hada_w1_a", "hada_w2_a"}
"""Factors whose rows are those of the change; not with a Tucker core, which only filters have."""


def _with_rows(change: Change, give: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """``change`` with the rows that ``give`` makes of its own."""
    return _made(change, _ROWS, ("after", "by_row", "bias"), give)


def _times(change: Change, strength: float) -> Change:
    """A DoRA of half the strength is half way to what it was trained to be, as in ComfyUI."""
    last = next((name for name in ("up", "outer", "whole", "hada_w1_a") if name in change.factors), "")
    return _made(change, {last}, ("by_row", "by_column", "bias"), lambda each: each * strength)


def _made(
    change: Change,
    factors: Collection[str],
    vectors: Sequence[str],
    give: Callable[[torch.Tensor], torch.Tensor],
) -> Change:
    """``change`` with what ``give`` makes of those of its tensors that are named."""
    made = {name: give(each) if name in factors else each for name, each in change.factors.items()}
    own = ((name, getattr(change, name)) for name in vectors)
    given: dict[str, Any] = {name: None if each is None else give(each) for name, each in own}
    return replace(change, factors=made, **given)


def _split(change: Change, rows: Sequence[int]) -> list[Change]:
    """Of a published layer that is several here, what each of them gets."""
    if len(rows) == 1:
        return [change]
    starts = [sum(rows[:index]) for index in range(len(rows))]
    pieces = []
    for start, count in zip(starts, rows, strict=True):
        piece = _with_rows(change, lambda each, start=start, count=count: each[start : start + count])  # type: ignore[misc]
        pieces.append(replace(piece, rows=(start, count)) if "outer" in change.factors else piece)
    return pieces
