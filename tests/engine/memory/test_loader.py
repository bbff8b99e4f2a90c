"""Components on their way to a GPU: in which order their weights lie. The GPU is played."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from studio_worker.engine.families import identify
from studio_worker.engine.families.stable_diffusion import SAMPLE as SAMPLE_FAMILY
from studio_worker.engine.loading import load_part, use_channels_last
from studio_worker.engine.memory.placement import Mode, Plan
from studio_worker.engine.memory.residency import Residency
from studio_worker.engine.parameters import resolve
from studio_worker.engine.rendering.canvas import Starting
from studio_worker.engine.rendering.loader import Loader
from studio_worker.engine.rendering.pipeline import LoadedModel
from studio_worker.jobs import Cancel
from tests.fakes.played_gpu import played
from tests.lab.engine import SAMPLE, request
from tests.lab.memory import GIB, Fake

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

CPU = torch.device("cpu")


def vae_for(device: str) -> torch.nn.Module:
    """The sample model's VAE as it is loaded for ``device``, waiting in RAM."""
    memory, target = Fake(GIB), torch.device(device)
    loader = Loader(target, memory, Residency(target, memory))
    plan = Plan(Mode.COMPONENT, tiled=False, peak_bytes=0)
    model, _ = loader.load("sample", identify([SAMPLE]), plan, (), lambda: True)
    vae: torch.nn.Module = model._components["vae"]
    return vae


def filters_are_last(module: torch.nn.Module) -> bool:
    filters = [each for each in module.parameters() if each.ndim == 4 and each.shape[2:] != (1, 1)]
    assert filters
    return all(each.is_contiguous(memory_format=torch.channels_last) for each in filters)


def test_vae_of_a_gpu_has_its_channels_last() -> None:
    """On a GPU a VAE's weights lie in the order that its convolutions compute in, and still do after it has
    left the device, come back, and computed in another precision; on a CPU they lie as in the library.
    """
    with played("cuda:0"):
        vae = vae_for("cuda:0")
        assert filters_are_last(vae)
        assert filters_are_last(vae.to("cuda:0"))
        assert filters_are_last(vae.to(torch.float32).to(torch.float16))
        assert filters_are_last(vae.to("cpu"))
    assert not filters_are_last(vae_for("cpu"))


def test_channels_last_vae_makes_the_same_picture() -> None:
    """The order of the weights changes the last bits of sums, and nothing in the picture that can be seen."""
    blueprint = identify([SAMPLE])
    parts = {
        name: load_part(part, blueprint.sections[name], CPU, torch.float32)
        for name, part in SAMPLE_FAMILY.parts.items()
    }
    asked = request()
    parameters = resolve(asked.task, asked.defaults, SAMPLE_FAMILY.defaults, from_image=False)
    model = LoadedModel(SAMPLE_FAMILY, parts)

    def levels() -> np.ndarray:
        picture = model.render(parameters, Starting(), lambda done, total: None, Cancel()).picture
        return np.asarray(picture, dtype=int)

    before = levels()
    use_channels_last(parts["vae"])
    assert np.abs(levels() - before).max() <= 1


def test_video_vae_keeps_its_order() -> None:
    """A video VAE, whose filters have five dimensions, is left as it is."""
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    before = {name: each.stride() for name, each in vae.named_parameters()}
    use_channels_last(vae)
    assert {name: each.stride() for name, each in vae.named_parameters()} == before
