"""Where components are while a picture is made: the fastest way for which there is room."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from studio_worker.engine.memory.placement import Footprint, Mode, Space, choose, leanest
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


def test_bound_that_a_model_sets_itself_is_kept_where_it_can_be() -> None:
    """maxVramGib bounds what is planned, unpacked weights too, but not what there is; where no way is as
    lean, the leanest is taken as long as the device has that.
    """

    def mode(available: float, allowed: float, needed: Footprint) -> tuple[Mode, int]:
        space = Space("d", int(available * GIB), host=RAM, spare=int(available * GIB))
        plan = choose(needed, space, offload=False, allowed=int(allowed * GIB))
        return plan.mode, len(plan.unpacked)

    assert mode(100, 17, needs()) == (Mode.WHOLE, 0)
    assert mode(100, 12, needs()) == (Mode.COMPONENT, 0)
    assert mode(12, 100, needs()) == (Mode.COMPONENT, 0)
    assert mode(2, 1, needs()) == (Mode.LAYERS, 0)
    assert mode(100, 32, needs(unpacked=QUANTISED)) == (Mode.WHOLE, 2)
    assert mode(100, 20, needs(unpacked=QUANTISED)) == (Mode.WHOLE, 0)


@pytest.mark.parametrize(
    ("changed", "whole_gib", "component_gib"),
    [
        ({}, 18, 11),
        ({"loras": 2 * GIB}, 20, 13),
        ({"reading": {"text_encoder": 8 * GIB}}, 23, 12),
        ({"reading": {"text_encoder": 8 * GIB}, "unpacking": {"text_encoder": GIB}}, 24, 13),
        ({"unpacking": {"transformer": 4 * GIB}}, 20, 15),
        ({"unpacking": {"transformer": 4 * GIB}, "unpacked": {"transformer": 10 * GIB}}, 18, 15),
    ],
)
def test_every_phase_of_a_picture_counts(changed: dict[str, Any], whole_gib: int, component_gib: int) -> None:
    """The prompt's reading, the steps and the decoding each have to fit, with the LoRAs beside them, and with
    the matrix that is unpacked at the moment, but where it was before.
    """
    plans = needs(**changed).plans()
    found = [
        next(p.peak_bytes / GIB for p in plans if p.mode is mode) for mode in (Mode.WHOLE, Mode.COMPONENT)
    ]
    assert found == [whole_gib, component_gib]


def test_leanest_way_is_one_that_ram_allows() -> None:
    """An offer is estimated by layers only where the weights can wait in RAM."""
    assert leanest(needs(), host=RAM).mode is Mode.LAYERS
    assert (leanest(needs(), host=14 * GIB).mode, leanest(needs(), host=14 * GIB).tiled) == (Mode.WHOLE, True)
