"""How much memory pictures really took, by model and size, so that the next one is planned by it.

What kernels take for themselves is in no estimate. A way to make a picture that took more than was estimated
counts as much from then on, one for which memory ran out as more than it had; and so does every way that was
thought to need about as much. A larger picture needs no less than a smaller one. Pure rules.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

from studio_worker.engine.memory.placement import Footprint, Plan, Way

_KEPT = 256
"""Models in their ways: with LoRAs and without, whole and by component."""

_SIZES = 16
"""Sizes of pictures, for each of them."""

_MORE = 1.1
"""What ran out of memory is taken to need so many times what it had."""

_ALIKE = 0.9
"""Of what a way should need: ways that should need more than that are taken to go wrong as it does."""


class Peaks:
    """Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[Hashable, Way], dict[int, int]] = OrderedDict()
        """Bytes by the picture's pixels, the model used last at the end."""

    def corrected(self, needed: Footprint) -> Footprint:
        """``needed`` with what is known of it."""
        with self._lock:
            known = {plan.way: self._known.get((needed.model, plan.way), {}) for plan in needed.plans()}
            took = {
                way: max((size for pixels, size in sizes.items() if pixels <= needed.pixels), default=0)
                for way, sizes in known.items()
            }
        return replace(needed, took={way: size for way, size in took.items() if size})

    def took(self, needed: Footprint, plan: Plan, peak_bytes: int) -> None:
        """A picture was made by ``plan``, and took so much."""
        with self._lock:
            sizes = self._of(needed, plan)
            for pixels, size in tuple(sizes.items()):
                if pixels <= needed.pixels and size > peak_bytes:  # a picture as large has taken less
                    del sizes[pixels]
        self._note(needed, plan, peak_bytes)

    def ran_out(self, needed: Footprint, plan: Plan, had_bytes: int) -> None:
        """Memory ran out for a picture by ``plan``, which had so much."""
        self._note(needed, plan, int(_MORE * had_bytes))

    def _note(self, needed: Footprint, plan: Plan, size_bytes: int) -> None:
        """Of ``plan``, and of the ways that should need about as much where that was too little."""
        plans = replace(needed, took={}).plans()
        estimated = next(each.peak_bytes for each in plans if each.way == plan.way)
        with self._lock:
            for other in plans:
                is_alike = other.peak_bytes >= _ALIKE * estimated and size_bytes > estimated
                if other.way == plan.way or is_alike:
                    sizes = self._of(needed, other)
                    size = max(sizes.pop(needed.pixels, 0), size_bytes)
                    sizes[needed.pixels] = size
                    if len(sizes) > _SIZES:
                        del sizes[next(iter(sizes))]

    def _of(self, needed: Footprint, plan: Plan) -> dict[int, int]:
        sizes = self._known.setdefault((needed.model, plan.way), {})
        self._known.move_to_end((needed.model, plan.way))
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return sizes
