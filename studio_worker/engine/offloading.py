"""Components that come to the device only while they work: diffusers' offloading, for one job at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, apply_group_offloading

from studio_worker.engine.placement import Mode, Plan

_GROUP_HOOKS = ("group_offloading", "lazy_prefetch_group_offloading")


@contextmanager
def placed(pipeline: Any, plan: Plan, device: torch.device) -> Iterator[None]:
    """Inside, the components of ``pipeline`` are where ``plan`` says, and its VAE decodes as it says.

    After it, those of a plan that is not for the whole model are in RAM, without any trace of this.
    """
    vae = getattr(pipeline, "vae", None)
    if plan.tiled and vae is not None:
        vae.enable_tiling()
    try:
        if plan.mode is Mode.COMPONENT:
            with _one_component(pipeline, device):
                yield
        elif plan.mode is Mode.LAYERS:
            with _one_layer(pipeline, device):
                yield
        else:
            yield
    finally:
        if plan.tiled and vae is not None:
            vae.disable_tiling()


@contextmanager
def _one_component(pipeline: Any, device: torch.device) -> Iterator[None]:
    try:
        pipeline.enable_model_cpu_offload(device=device)
        yield
    finally:
        pipeline.remove_all_hooks()
        for module in _modules(pipeline).values():
            module.to("cpu")


@contextmanager
def _one_layer(pipeline: Any, device: torch.device) -> Iterator[None]:
    modules = _modules(pipeline)
    vae = modules.pop("vae", None)
    try:
        if vae is not None:
            vae.to(device)  # small, and it changes its precision while it works
        for module in modules.values():
            apply_group_offloading(
                module,
                onload_device=device,
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
                use_stream=device.type == "cuda",
                low_cpu_mem_usage=True,
            )
        yield
    finally:
        for module in modules.values():
            registry = HookRegistry.check_if_exists_or_initialize(module)
            for hook in _GROUP_HOOKS:
                registry.remove_hook(hook, recurse=True)
            module.to("cpu")
        if vae is not None:
            vae.to("cpu")


def _modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
