"""The tensors of a weights file, onto a device: safetensors memory-mapped, GGUF as it is quantised.

This module owns which number types weights may have. It renames nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import torch
from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter, dequantize_gguf_tensor
from safetensors import SafetensorError, safe_open

from studio_worker.engine.checkpoint import Checkpoint
from studio_worker.engine.families.family import Tensors
from studio_worker.engine.sections import Section, is_quantised
from studio_worker.errors import JobError

_PLAIN_GGUF = {"F32", "F16", "F64", "I8", "I16", "I32", "I64"}
"""Types that torch has too; all others are blocks of bytes to it."""

_INDEX_TYPES = {"I8", "I16", "I32", "I64", "U8", "BOOL", "U16", "U32", "U64"}
"""Position tables and counters that old checkpoints carry beside their weights."""


def read_tensors(section: Section, device: torch.device) -> Tensors:
    """All tensors of ``section``, names without its prefix, on ``device``, of the types they are stored in.

    Quantised ones are diffusers' ``GGUFParameter``, whose bytes are those of the file.

    Raises:
        JobError: the file is damaged or gone (retryable), or has weights of a type that is not served.
    """
    checkpoint = section.checkpoint
    _check_types(section)
    try:
        if checkpoint.format == "gguf":
            return dict(_gguf(section, device))
        # Mapped: on the CPU these tensors are pages of the file until they are copied.
        with safe_open(checkpoint.path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(section.prefix + name) for name in section.shapes}
    except (SafetensorError, OSError, ValueError) as error:
        raise JobError(
            f"{checkpoint.path.name} cannot be read: {type(error).__name__}", retryable=True
        ) from error


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as numbers, where it is blocks of them; for what must be transposed, say."""
    return dequantize_gguf_tensor(tensor) if isinstance(tensor, GGUFParameter) else tensor


def dequantised(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` as plain numbers of ``dtype``, in memory of its own."""
    tensor = plain(tensor)
    # A mapped file's tensors begin where the file has them; BLAS sums in another order where they are not
    # aligned, and the same seed would make another picture. Also, a file that is cut short cannot kill us.
    return tensor.to(dtype, copy=tensor.device.type == "cpu")


def quantisation(section: Section) -> str:
    """The most frequent quantised type of ``section``, e.g. ``Q4_K``, or an empty string."""
    types = [section.checkpoint.types.get(section.prefix + name, "") for name in section.shapes]
    quantised = [type_ for type_ in types if is_quantised(type_)]
    return max(set(quantised), key=quantised.count, default="")


def _gguf(section: Section, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    # "c" maps copy-on-write: torch wants memory that it could write to.
    for tensor in gguf.GGUFReader(section.checkpoint.path, "c").tensors:
        name = tensor.name.removeprefix(section.prefix)
        if not tensor.name.startswith(section.prefix) or name not in section.shapes:
            continue
        numbers = torch.from_numpy(tensor.data).to(device)
        if tensor.tensor_type.name in _PLAIN_GGUF:
            yield name, numbers
        else:
            yield name, GGUFParameter(numbers, quant_type=tensor.tensor_type)


def _check_types(section: Section) -> None:
    checkpoint: Checkpoint = section.checkpoint
    served = (
        {kind.name for kind in SUPPORTED_GGUF_QUANT_TYPES} | _PLAIN_GGUF
        if checkpoint.format == "gguf"
        else {"F64", "F32", "F16", "BF16"} | _INDEX_TYPES
    )
    for name in section.shapes:
        type_ = checkpoint.types.get(section.prefix + name)
        if type_ is not None and type_ not in served:
            raise JobError(
                f"{checkpoint.path.name} has weights of type {type_}, which is not served; "
                f"register a file of one of {', '.join(sorted(served - _INDEX_TYPES))}",
                retryable=False,
            )
