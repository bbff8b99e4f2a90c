"""Where components are while a picture is made: the fastest way for which there is room."""

from __future__ import annotations

import pytest
import torch

from studio_worker.engine.memory.placement import Mode, Space, choose
from studio_worker.errors import JobError
from tests.lab.memory import (
    GIB,
    RAM,
    needs,
)

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.mark.parametrize(
    ("gib", "mode", "tiled"),
    [
        (18.0, Mode.WHOLE, False),
        (17.9, Mode.WHOLE, True),
        (15.9, Mode.COMPONENT, False),
        (10.9, Mode.LAYERS, False),
        (3.9, Mode.LAYERS, True),
    ],
)
def test_fastest_way_that_fits_is_taken(gib: float, mode: Mode, tiled: bool) -> None:
    """The whole model where it fits, else component by component, else layer by layer."""
    plan = choose(needs(), Space("cuda:0", int(gib * GIB), host=RAM), offload=False)
    assert (plan.mode, plan.tiled) == (mode, tiled)
    assert plan.peak_bytes <= gib * GIB


def test_picture_that_fits_in_no_way_is_refused_with_the_figures() -> None:
    """A picture for which there is no room fails before anything is loaded; another worker may try."""
    with pytest.raises(JobError, match=r"needs 2\.0 GiB and cuda:0 has 1\.5 GiB") as caught:
        choose(needs(), Space("cuda:0", int(1.5 * GIB), host=RAM), offload=False)
    assert caught.value.retryable
    with pytest.raises(JobError, match=r"needs 16\.0 GiB and cpu has 15\.0 GiB"):
        choose(needs(), Space("cpu", 15 * GIB, host=0), offload=False)


def test_model_that_asks_for_it_is_offloaded_however_much_fits() -> None:
    """offloadToCpu keeps a model's weights in RAM even where the device could hold them; not where RAM
    cannot.
    """
    assert choose(needs(), Space("d", 100 * GIB, host=RAM), offload=True).mode is Mode.COMPONENT
    for host in (0, 14 * GIB):
        assert choose(needs(), Space("cpu", 100 * GIB, host=host), offload=True).mode is Mode.WHOLE


def test_weights_that_ram_cannot_hold_do_not_wait_there() -> None:
    """Where neither the device nor RAM has room for a model's weights, the job fails with both figures,
    instead of the machine's running out of memory.
    """
    with pytest.raises(JobError, match=r"needs 16\.0 GiB and cuda:0 has 12\.0 GiB .* 15\.0 GiB .* 14\.0 GiB"):
        choose(needs(), Space("cuda:0", 12 * GIB, host=14 * GIB), offload=False)
    assert choose(needs(), Space("d", 12 * GIB, host=15 * GIB), offload=False).mode is Mode.COMPONENT


QUANTISED = {"transformer": 20 * GIB, "text_encoder": 8 * GIB}
"""What the components of ``needs`` take where their matrices are written out."""


@pytest.mark.parametrize(
    ("spare_gib", "unpacked"),
    [
        (32.0, {"transformer", "text_encoder"}),
        (31.9, {"transformer"}),
        (27.9, set()),
        (18.0, set()),
    ],
)
def test_free_memory_is_spent_on_unpacked_weights(spare_gib: float, unpacked: set[str]) -> None:
    """Quantised weights are unpacked where there is room for that, the denoiser's first; but no other model
    leaves the device for it.
    """
    needed = needs(unpacked=QUANTISED)
    plan = choose(needed, Space("cuda:0", 100 * GIB, RAM, int(spare_gib * GIB)), offload=False)
    assert (plan.mode, plan.tiled, plan.unpacked) == (Mode.WHOLE, False, unpacked)
    assert plan.peak_bytes - plan.working_bytes == needed.weight_bytes + sum(
        size - needed.weights[name] for name, size in QUANTISED.items() if name in unpacked
    )


def test_unpacked_weights_are_given_up_before_anything_else() -> None:
    """Packed weights come before tiles, which show, and before components that leave the device."""
    plans = needs(unpacked=QUANTISED).plans()
    assert [(plan.mode, plan.tiled, len(plan.unpacked)) for plan in plans[:5]] == [
        (Mode.WHOLE, False, 2),
        (Mode.WHOLE, False, 1),
        (Mode.WHOLE, False, 0),
        (Mode.WHOLE, True, 0),
        (Mode.COMPONENT, False, 0),
    ]
    assert all(not plan.unpacked for plan in plans[2:])
