"""What a LoRA's tensors mean: the change of each layer's weight and bias, as factors where it is some.

``W x`` becomes ``W x + B A x``, which is what weights merged by hand compute, within rounding, whatever W is
stored as. Kinds whose change is no product of small factors (LoHa, DoRA by column, differences) are added up
to a matrix of their own. This module owns that arithmetic, and no layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from studio_worker.engine.gguf_files import Shape
from studio_worker.engine.lora_adapter import Adapter
from studio_worker.engine.lora_places import Place

Tensors = Mapping[str, torch.Tensor]
"""An adapter's tensors in single precision, by what they do."""


class Change(NamedTuple):
    """What is added to one layer, all at its strength.

    Attributes:
        factors: ``down``, ``up`` and perhaps ``mid`` of a low rank; ``outer`` and ``inner`` of a Kronecker
            product; or ``whole``, the change itself.
        gain: by how much of itself each row of the plain weight changes (DoRA).
        bias: what is added to the bias.
    """

    factors: Tensors
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None


Plain = Callable[[], Sequence[torch.Tensor]]
"""Gives the weights of a place's layers in single precision."""


def changes(
    adapter: Adapter, place: Place, tensors: Tensors, strength: float, weights: Plain, biases: Plain
) -> list[Change]:
    """What ``adapter`` adds to each layer of ``place``."""

    def ours(by_row: torch.Tensor) -> torch.Tensor:
        """With the rows in the order of the class."""
        return by_row.roll(len(by_row) // 2, 0) if place.rolled else by_row

    factors = _factors(adapter, tensors, place.row)
    if place.rolled and factors:
        factors = _rows_first(factors)
        factors = {name: ours(each) if name in {"up", "whole"} else each for name, each in factors.items()}
    gain = bias = None
    if factors and (magnitude := tensors.get("dora", tensors.get("magnitude"))) is not None:
        plain = torch.cat(list(weights()))
        if "magnitude" in tensors or magnitude.shape[0] == len(plain):
            factors, gain = _decomposed(factors, ours(magnitude.flatten()), plain)
        else:
            factors = {"whole": _by_column(_whole(factors, plain), magnitude, plain)}
    if "set" in tensors:
        plain = torch.cat(list(weights()))
        factors = {"whole": ours(tensors["set"]).reshape(plain.shape) - plain}
    if "set_b" in tensors:
        bias = ours(tensors["set_b"]) - torch.cat(list(biases()))
    elif "up_bias" in tensors:
        bias = ours(tensors["up_bias"]) * _strength(adapter, tensors, len(tensors["down"]))
    elif "diff_b" in tensors:
        bias = ours(tensors["diff_b"].flatten())
    return _split(_times(Change(factors, gain, bias), strength), place.rows)


def _factors(adapter: Adapter, tensors: Tensors, row: Shape) -> Tensors:
    """Of the change to the weight, alpha in them, its rows as they are published."""
    given = dict(tensors)
    scale = float(given["scalar"]) if "scalar" in given else 1.0
    if "down" in given:
        up = given["up"].flatten(1) * (scale * _strength(adapter, given, len(given["down"])))
        return {"down": given["down"], "up": up} | {name: given[name] for name in ("mid",) if name in given}
    if "hada_w1_a" in given:
        scale *= _strength(adapter, given, len(given["hada_w1_b"]))
        one, two = (_product(given, f"hada_w{n}", f"hada_t{n}") for n in (1, 2))
        return {"whole": one * two * scale}
    if any(name.startswith("lokr_") for name in given):
        ranks = [len(given[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in given]
        scale *= _strength(adapter, given, ranks[0]) if ranks else 1.0  # two whole factors have no rank
        outer, inner = (
            given[name] if name in given else _product(given, name, "lokr_t2" if name == "lokr_w2" else "")
            for name in ("lokr_w1", "lokr_w2")
        )
        outer = outer * scale
        if len(row) > 1:
            inner = inner.reshape(len(inner), -1, *row[1:])
            return {"whole": torch.kron(outer.reshape(*outer.shape[:2], *[1] * (inner.ndim - 2)), inner)}
        return {"outer": outer, "inner": inner}
    return {"whole": given["diff"]} if "diff" in given else {}


def _strength(adapter: Adapter, tensors: Tensors, rank: int) -> float:
    alpha = float(tensors["alpha"]) if "alpha" in tensors else adapter.alpha
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if adapter.by_root and "alpha" not in tensors else rank)


def _product(tensors: Tensors, name: str, core: str) -> torch.Tensor:
    """``a @ b``, with LyCORIS' Tucker core between them where there is one."""
    left, right = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if core not in tensors:
        return (left @ right.flatten(1)).reshape(len(left), *right.shape[1:])
    return torch.einsum("ijkl,jr,ip->prkl", tensors[core], right, left)


def _rows_first(factors: Tensors) -> Tensors:
    """With rows that can change places: those of a Kronecker product lie in two factors."""
    return {"whole": torch.kron(factors["outer"], factors["inner"])} if "outer" in factors else factors


def _whole(factors: Tensors, like: torch.Tensor) -> torch.Tensor:
    """The change as a whole, in the shape of the weight."""
    if "whole" in factors:
        change = factors["whole"]
    elif "outer" in factors:
        change = _rows_first(factors)["whole"]
    elif "mid" in factors:
        down, mid, up = (factors[name] for name in ("down", "mid", "up"))
        change = torch.einsum("oi,ijkl,jn->onkl", up, mid, down.flatten(1))
    else:
        change = factors["up"] @ factors["down"].flatten(1)
    return change.reshape(like.shape)


_SMALLEST = 1e-12
"""A norm that nothing is divided by."""


def _decomposed(
    factors: Tensors, magnitude: torch.Tensor, plain: torch.Tensor
) -> tuple[Tensors, torch.Tensor]:
    """DoRA with a magnitude for each row: its factors, and how much each row of the weight changes.

    ``m (W + D) / |W + D|`` (Liu et al. 2024) less ``W``.
    """
    norms = (plain + _whole(factors, plain)).flatten(1).norm(dim=1).clamp_min(_SMALLEST)
    ratio = magnitude / norms
    if "up" in factors:
        return {**factors, "up": factors["up"] * ratio[:, None]}, ratio - 1
    whole = _whole(factors, plain)
    return {"whole": whole * ratio.reshape(-1, *[1] * (whole.ndim - 1))}, ratio - 1


def _by_column(added: torch.Tensor, magnitude: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """DoRA with a magnitude for each column (LyCORIS without ``wd_on_output``): the change as a whole."""
    trained = plain + added
    norms = trained.transpose(0, 1).flatten(1).norm(dim=1).clamp_min(_SMALLEST)
    ratio = magnitude.flatten() / norms
    change: torch.Tensor = trained * ratio.reshape(1, -1, *[1] * (plain.ndim - 2)) - plain
    return change


def _times(change: Change, strength: float) -> Change:
    """A DoRA of half the strength is half way to what it was trained to be, as in ComfyUI."""
    factors = dict(change.factors)
    for name in ("up", "outer", "whole"):
        if name in factors:
            factors[name] = factors[name] * strength
    return Change(
        factors,
        None if change.gain is None else change.gain * strength,
        None if change.bias is None else change.bias * strength,
    )


def _split(change: Change, rows: Sequence[int]) -> list[Change]:
    """Of a published layer that is several here, what each of them gets."""
    if len(rows) == 1:
        return [change]
    factors = change.factors
    if "outer" in factors:
        inner = len(factors["inner"])
        if any(each % inner for each in rows):
            factors = _rows_first(factors)
        else:
            outers = _pieces(factors["outer"], [each // inner for each in rows])
            return _with(change, rows, [{**factors, "outer": each} for each in outers])
    name = "up" if "up" in factors else "whole"
    if name not in factors:
        return _with(change, rows, [{}] * len(rows))
    return _with(change, rows, [{**factors, name: each} for each in _pieces(factors[name], rows)])


def _with(change: Change, rows: Sequence[int], factors: Sequence[Tensors]) -> list[Change]:
    gains = [None] * len(rows) if change.gain is None else _pieces(change.gain, rows)
    biases = [None] * len(rows) if change.bias is None else _pieces(change.bias, rows)
    return [Change(*each) for each in zip(factors, gains, biases, strict=True)]


def _pieces(tensor: torch.Tensor, rows: Sequence[int]) -> Sequence[torch.Tensor]:
    return torch.split(tensor, list(rows))
