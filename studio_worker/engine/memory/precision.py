"""Which numbers a model is computed in: by the card, and by what the family's own values stand.

A type is taken only where the card has it in hardware and computes it right. Rules without torch, so that a
job can be weighed before it is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SIZE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a number, by torch's name of its type."""

_BFLOAT16_FROM = (8, 0)
"""Before Ampere torch computes bfloat16 in single precision, slower than single precision itself, and cuDNN
has no convolutions for it (pytorch/pytorch#148322, openxla/xla#12429, huggingface/diffusers#14129).
``torch.cuda.is_bf16_supported`` says yes all the same."""

_FLOAT16_FROM = (7, 0)
_FLOAT16_BEFORE = {(5, 3), (6, 0), (6, 2)}
"""The older chips that compute float16 faster than single precision; of the others some have none, and some
(GTX 10, P40) are 64 times slower (CUDA C++ Programming Guide, throughput of arithmetic instructions)."""

_BROKEN_FLOAT16 = re.compile(r"GTX 16\d0|\bMX[45]50\b|\bCMP 30HX\b|\bT(400|500|550|600|1000|1200|2000)\b")
"""Names of cards with the chips TU116 and TU117, which have Turing's capability but no tensor cores: float16
convolutions give NaN there (pytorch/pytorch#58123, #77955). ComfyUI's ``should_use_fp16`` has the same list
but for the T400, a TU117 too."""


def numbers(halves: Sequence[str], capability: tuple[int, int] | None, card: str) -> str:
    """torch's name of the type that weights have and are computed with: ``bfloat16``, ``float16`` or
    ``float32``.

    Args:
        halves: the types of half precision in which the family's values are sound, the best first.
        capability: the card's compute capability; ``None`` on a CPU, which is faster in single precision.
        card: its name, as the driver gives it.
    """
    if capability is None:
        return "float32"
    has = {
        "bfloat16": capability >= _BFLOAT16_FROM,
        "float16": (capability >= _FLOAT16_FROM or capability in _FLOAT16_BEFORE)
        and not _BROKEN_FLOAT16.search(card),
    }
    return next((half for half in halves if has[half]), "float32")
