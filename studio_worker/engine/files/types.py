"""Which number types weights may have, told from a header. It imports no torch."""

from __future__ import annotations

import re

from studio_worker.engine.files.gguf_files import PLAIN_TYPES
from studio_worker.engine.files.sections import Section
from studio_worker.errors import NotServed

FP8_NOTE = re.compile(r"(^|\.)(scale_weight|scale_input|weight_scale|input_scale|comfy_quant|scaled_fp8)$")
"""What ComfyUI's 8-bit files carry beside each weight (``comfy/ops.py``, ``comfy/quant_ops.py``)."""

_INDEX_TYPES = {"I8", "I16", "I32", "I64", "U8", "BOOL", "U16", "U32", "U64"}
"""Position tables and counters that old checkpoints carry beside their weights."""

BLOCKS = {
    *("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
}
"""GGUF's types that diffusers multiplies out: ``SUPPORTED_GGUF_QUANT_TYPES`` in quantizers/gguf/utils.py."""

_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def check_types(section: Section) -> None:
    """Raises NotServed: weights of ``section`` are of a type that nothing here computes with."""
    for each in section.shards or (section,):
        _check(each)


def _check(section: Section) -> None:
    checkpoint = section.checkpoint
    served = BLOCKS | PLAIN_TYPES if checkpoint.format == "gguf" else _FLOATS | _INDEX_TYPES
    for name in section.shapes:
        type_ = checkpoint.types.get(section.prefix + name)
        if type_ is None or FP8_NOTE.search(name):
            continue
        if type_ not in served or (type_ in _INDEX_TYPES and name.endswith(".weight")):
            raise NotServed(
                f"{checkpoint.path.name} has weights of type {type_}, which is not served; "
                f"register a file of one of {', '.join(sorted(served - _INDEX_TYPES))}"
            )
