"""Components from their files: one part's weights into the library's class, on the device, without a network.

This module owns how a component is filled: every tensor of the class must come from the file, in its shape.
Configurations and tokenizers come from folders that this package carries; the hub is never asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.quantizers.gguf.utils import GGUFParameter

from studio_worker.engine.families.component import Part, Tokenizer, read_json
from studio_worker.engine.families.family import Family, refused
from studio_worker.engine.faults import is_device_lost, is_exhausted
from studio_worker.engine.files.gguf_files import Stated
from studio_worker.engine.files.packed import BlockLinear, EightBitLinear, use_packed_linears
from studio_worker.engine.files.sections import Section, Tensors
from studio_worker.engine.files.weights import dequantised, read_tensors
from studio_worker.engine.memory.precision import numbers
from studio_worker.errors import JobError

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}

_TORSO = (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError)
"""What renaming meets where tensors are missing, or are called what it has never seen."""

_LOG = logging.getLogger(__name__)


def computed_in(family: Family, device: torch.device) -> str:
    """torch's name of the type that a family's weights have on ``device``."""
    if device.type == "cpu":
        return numbers(family.halves, None, "")
    card = torch.cuda.get_device_name(device)
    return numbers(family.halves, torch.cuda.get_device_capability(device), card)


def weights_dtype(family: Family, device: torch.device) -> torch.dtype:
    """The type that a family's weights have on ``device``."""
    dtype: torch.dtype = getattr(torch, computed_in(family, device))
    return dtype


def load_part(
    part: Part,
    section: Section,
    device: torch.device,
    dtype: torch.dtype,
    alive: Callable[[], object] = lambda: None,
) -> torch.nn.Module:
    """The component ``part`` with the weights of ``section``, on ``device``.

    Plain weights become ``dtype``; quantised matrices stay as they are and compute in ``dtype``.

    Args:
        alive: called after each tensor; what it raises ends the loading.

    Raises:
        NotServed: tensors are missing or misshapen.
        JobError: the file is damaged.
    """
    layout = part.layout(section)
    if layout is None:
        raise refused(f"{section} is no {part.kind}: {part.why_not(section)}")
    try:
        model = empty_model(part, _as_stated(part, section))
    except _TORSO as error:
        raise refused(f"{section} states numbers of which no {part.kind} can be made") from error
    tensors = read_tensors(section, device, _read_as(part, dtype), alive)
    try:
        tensors = layout.rename(tensors)
    except _TORSO as error:
        if is_exhausted(error) or is_device_lost(device):
            raise
        raise refused(
            f"{section} holds no whole {part.kind}: {type(error).__name__} {str(error)[:200]}"
        ) from error
    wanted = _wanted(model)
    _check_names_and_shapes(wanted, tensors, section, part)
    _fill(model, wanted, tensors, dtype, device, alive)
    if tensors:
        _LOG.debug(
            "tensors without a place",
            extra={"file": section.file.path.name, "count": len(tensors), "first": next(iter(tensors))},
        )
    if part.finish is not None:
        part.finish(model)
    return model.to(device).eval().requires_grad_(False)


def use_channels_last(vae: torch.nn.Module) -> None:
    """Lay the filters of a VAE out as cuDNN's kernels for tensor cores read them, wherever it goes later.

    As diffusers and PyTorch (its tutorial on memory formats) advise for convolutions. Video VAEs are left as
    they are: their filters have five dimensions, for which this order is another.
    """
    if all(parameter.ndim <= 4 for parameter in vae.parameters()):
        vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _read_as(part: Part, dtype: torch.dtype) -> torch.dtype:
    """What numbers are narrowed to while they are read: not where the class keeps some of them wider."""
    library, name = part.cls.split(".")
    keeps = getattr(getattr(_LIBRARIES[library], name), "_keep_in_fp32_modules", None)
    return torch.float32 if keeps and dtype == torch.float16 else dtype


def empty_model(part: Part, config: Mapping[str, Any] | None = None) -> torch.nn.Module:
    """The component of the class and configuration that ``part`` says, its weights without memory.

    Args:
        config: its configuration, where it is not the one in its folder.
    """
    library, name = part.cls.split(".")
    cls = getattr(_LIBRARIES[library], name)
    config = read_json(part.config / "config.json") if config is None else config
    with init_empty_weights():
        if library == "diffusers":
            return cls.from_config(config)  # type: ignore[no-any-return]
        return cls(cls.config_class.from_dict(config))  # type: ignore[no-any-return]


def _as_stated(part: Part, section: Section) -> dict[str, Any]:
    """The part's configuration, with what its file says itself.

    Raises:
        JobError: the file says what cannot be done.
    """
    config = read_json(part.config / "config.json")
    stated = section.checkpoint.stated
    scaling = str(stated.get("rope.scaling.type", "none"))
    # A linear one by 1 is none at all.
    if scaling != "none" and (scaling, stated.get("rope.scaling.factor")) != ("linear", 1):
        raise refused(
            f"{section} stretches its positions for long texts (rope scaling {scaling!r}), which is not "
            f"served; register the {part.kind} without, not its version for a longer context"
        )
    for name, place in part.stated.items():
        if name in stated:
            *outer, last = place
            inner = config
            for key in outer:
                inner = inner[key]
            inner[last] = _number(stated[name], inner[last], f"{section} states its {name}")
    return config


def _number(stated: Stated, usual: float, what: str) -> float:
    """``stated`` as a number of the kind of ``usual``: files have it as whatever their writer chose.

    Raises:
        NotServed: it is none.
    """
    if isinstance(stated, str | bool) or not stated > 0 or (isinstance(usual, int) and stated != int(stated)):
        raise refused(f"{what} as {stated!r}")
    return type(usual)(stated)


def _wanted(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What has to come from the file: parameters, and the buffers that are kept with them."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def _fill(
    model: torch.nn.Module,
    wanted: Mapping[str, torch.Tensor],
    tensors: Tensors,
    dtype: torch.dtype,
    device: torch.device,
    alive: Callable[[], object],
) -> None:
    """Move what is ``wanted`` from ``tensors`` into the model; the rest stays there."""
    keep = _kept_in_single_precision(model, dtype)
    use_packed_linears(model, tensors, dtype, keep)
    for name in wanted:
        alive()  # on a CPU it is here that what was mapped is read
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = tensors.pop(name)
        if isinstance(module, BlockLinear | EightBitLinear) and attribute == "weight":
            module.hold(tensor, device)
            continue
        tensor = dequantised(tensor, torch.float32 if keep(name) else dtype).reshape(wanted[name].shape)
        if not isinstance(wanted[name], torch.nn.Parameter):  # a buffer
            setattr(module, attribute, tensor.to(device, wanted[name].dtype))
        else:
            setattr(module, attribute, torch.nn.Parameter(tensor.to(device), requires_grad=False))
    if isinstance(model, transformers.PreTrainedModel):
        model.tie_weights()


def _check_names_and_shapes(
    wanted: Mapping[str, torch.Tensor], tensors: Tensors, section: Section, part: Part
) -> None:
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise refused(f"{section} lacks {len(missing)} tensors of its {part.kind}, the first {missing[0]}")
    for name, parameter in wanted.items():
        found = tensors[name]
        shape = found.quant_shape if isinstance(found, GGUFParameter) else found.shape
        # stable-diffusion.cpp's GGUF files leave out outer dimensions of size 1.
        if _squeezed(shape) != _squeezed(parameter.shape):
            raise refused(
                f"{section}, tensor {name} of its {part.kind} is {list(shape)}, not {list(parameter.shape)}"
            )


def _squeezed(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _kept_in_single_precision(model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """Whether a parameter must stay in single precision, as its class says of half precision."""
    names = getattr(model, "_keep_in_fp32_modules", None) or []
    if dtype != torch.float16:
        return lambda name: False  # noqa: ARG005
    return lambda name: any(each in name.split(".") for each in names)


@lru_cache(maxsize=32)
def _tokenizer(cls: str, folder: str, options: tuple[tuple[str, Any], ...]) -> Any:
    return getattr(transformers, cls).from_pretrained(folder, local_files_only=True, **dict(options))


def load_tokenizer(tokenizer: Tokenizer) -> Any:
    """The tokenizer, loaded once in a process.

    Raises:
        JobError: this installation lacks files of it.
    """
    loaded = _tokenizer(tokenizer.cls, str(tokenizer.folder), tuple(sorted(tokenizer.options.items())))
    if len(loaded) != tokenizer.size:
        raise JobError(
            f"the tokenizer in {tokenizer.folder} has {len(loaded)} entries instead of {tokenizer.size}: "
            "this installation is damaged"
        )
    return loaded


@lru_cache(maxsize=32)
def _scheduler(folder: Path) -> Any:
    config = read_json(folder / "scheduler_config.json")
    return getattr(diffusers, config["_class_name"]).from_config(config)


def load_scheduler(family: Family) -> Any:
    """The scheduler that the family's configuration ships, loaded once in a process."""
    return _scheduler(family.scheduler)
