"""What a LoRA has for one layer: which tensors, the shape of the change they make, and what they take.

It knows headers alone: no tensors, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from studio_worker.engine.files.gguf_files import Shape

_WHOLE = {"set", "set_b"}
"""What whole checkpoints have as well."""

_PIECES = {"qkv": 3, "qkv_lora1": 3, "qkv_lora2": 3, "in_proj": 3, "linear1": 4}
"""By the end of a layer's published name: of how many layers it is one here. Each has factors of its own."""


@dataclass(frozen=True)
class Adapter:
    """All that a file has for one layer.

    Args:
        layer: the layer's name in the file.
        names: of the tensors, by what they do.
        shapes: theirs, likewise.
        alpha: where the file's settings say it; a tensor of that name wins.
    """

    layer: str
    names: Mapping[str, str]
    shapes: Mapping[str, Shape]
    alpha: float | None = None
    by_root: bool = False

    @property
    def is_trained(self) -> bool:
        """Whether it is more than weights as any checkpoint has them."""
        return not self.names.keys() <= {*_WHOLE, "alpha", "scalar"}

    @property
    def lacks(self) -> str:
        """What of it is missing, or an empty string."""
        for needs in _NEEDS:
            if self.names.keys() & needs and not needs <= self.names.keys():
                return ", ".join(sorted(needs - self.names.keys()))
        for one in ("lokr_w1", "lokr_w2"):
            if _starts(self.names, "lokr_") and one not in self.names and f"{one}_a" not in self.names:
                return one
        return ""

    @property
    def is_whole(self) -> bool:
        """Whether its tensors go together: factors have one rank, nothing is empty."""
        shapes = self.shapes
        if any(0 in shape for shape in shapes.values()):
            return False
        if any(len(shape) < 2 for name, shape in shapes.items() if name in _FACTORS):
            return False
        if any(prod(shapes[name]) != 1 for name in ("alpha", "scalar") if name in shapes):
            return False
        if "up" in shapes and prod(shapes["up"]) != prod(shapes["up"][:2]):
            return False
        return all(
            shapes[left][axis] == shapes[right][0]
            for left, axis, right in self._ranks()
            if left in shapes and right in shapes
        )

    def _ranks(self) -> Iterator[tuple[str, int, str]]:
        """Where two tensors have a rank in common: one, its axis, and the other's first."""
        yield from (("mid", 0, "down"), ("mid", 1, "down"), ("up", 1, "down"))
        for name, core in (("hada_w1", "hada_t1"), ("hada_w2", "hada_t2"), ("lokr_w2", "lokr_t2")):
            if core in self.shapes:
                yield from ((core, 0, f"{name}_a"), (core, 1, f"{name}_b"))
            else:
                yield f"{name}_a", 1, f"{name}_b"
        yield "lokr_w1_a", 1, "lokr_w1_b"

    @property
    def weight_shape(self) -> Shape | None:
        """The shape of what is added to the layer's weight; ``None`` where that is a bias alone."""
        shapes = self.shapes
        if "down" in shapes:
            kernel = shapes.get("mid", shapes["down"])[2:]
            return (shapes["up"][0], shapes["down"][1], *kernel)
        if "hada_w1_a" in shapes:
            if "hada_t1" in shapes:
                return (shapes["hada_w1_a"][1], shapes["hada_w1_b"][1], *shapes["hada_t1"][2:])
            return (shapes["hada_w1_a"][0], shapes["hada_w1_b"][1])
        if _starts(shapes, "lokr_"):
            one, two = _kronecker(shapes, "lokr_w1"), _kronecker(shapes, "lokr_w2")
            return (one[0] * two[0], one[1] * two[1], *two[2:])
        return shapes.get("diff", shapes.get("set"))

    def size_bytes(self, itemsize: int) -> int:
        """What it takes beside the layer, as it is computed with."""
        return sum(self._counts()) * itemsize

    def _counts(self) -> Iterator[int]:
        shapes = self.shapes
        yield sum(prod(shapes[name]) for name in ("up_bias", "diff_b", "set_b") if name in shapes)
        # With DoRA what is multiplied with the change, and what with the plain weight.
        yield sum(2 * prod(shapes[name]) for name in ("dora", "magnitude") if name in shapes)
        yield sum(prod(shapes[name]) for name in ("diff", "set", *_BY_ROW) if name in shapes)
        pieces = next((count for end, count in _PIECES.items() if self.layer.endswith(end)), 1)
        yield pieces * sum(prod(shapes[name]) for name in _BY_COLUMN if name in shapes)
        if _starts(shapes, "lokr_"):
            yield pieces * sum(prod(_kronecker(shapes, name)) for name in ("lokr_w1", "lokr_w2"))


_BY_ROW = ("up", "hada_w1_a", "hada_w2_a")
_BY_COLUMN = ("down", "mid", "hada_w1_b", "hada_w2_b", "hada_t1", "hada_t2")
"""Factors that each of several layers has its rows of, and those that each has as a whole."""

_FACTORS = {
    *("down", "up", "mid", "hada_t1", "hada_t2", "lokr_t2"),
    *(f"{kind}_w{n}{end}" for kind in ("hada", "lokr") for n in (1, 2) for end in ("", "_a", "_b")),
}

_NEEDS = (
    {"down", "up"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"hada_t1", "hada_t2"},
    {"lokr_w1_a", "lokr_w1_b"},
    {"lokr_w2_a", "lokr_w2_b"},
)
"""What goes only together."""


def _starts(names: Mapping[str, object], start: str) -> bool:
    return any(name.startswith(start) for name in names)


def _kronecker(shapes: Mapping[str, Shape], name: str) -> Shape:
    """The shape of one factor of LoKr, which may be a product itself."""
    if name in shapes:
        return shapes[name]
    rows, columns = shapes[f"{name}_a"], shapes[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in shapes:
        return (rows[1], columns[1], *shapes["lokr_t2"][2:])
    return (rows[0], columns[1], *columns[2:])
