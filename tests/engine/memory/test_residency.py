"""What stays loaded where."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.memory.held import Held, Place
from studio_worker.engine.memory.residency import Residency
from tests.lab.memory import (
    CPU,
    GIB,
    Fake,
    component,
    key,
    made,
)

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def test_component_leaves_for_ram_and_then_altogether() -> None:
    """The one used longest ago leaves the device first, for RAM where there is room, else it is dropped."""
    residency = Residency(CPU, Fake(device=3072, host=2048))
    for name in "abc":
        residency.make_room(1024)
        residency.add(key(name), component(1))
        residency.name(name, [key(name)])
    residency.get(key("a"))
    residency.make_room(2048)  # b and c are older than a
    assert [residency.place(key(name)) for name in "abc"] == [Place.DEVICE, Place.RAM, Place.RAM]
    assert {n: found.place for n, found in residency.models.items()} == {
        "a": "device",
        "b": "ram",
        "c": "ram",
    }
    residency.add(key("d"), component(2))
    residency.make_room(2048, keep=[key("d")])  # a to RAM, where b has waited longest
    assert [residency.place(key(name)) for name in "abcd"] == [Place.RAM, None, Place.RAM, Place.DEVICE]
    assert residency.get(key("c")) is not None
    assert residency.place(key("c")) is Place.DEVICE
    residency.clear()
    assert residency.models == {}


def test_component_too_large_for_ram_leaves_the_others_there() -> None:
    """A component that RAM could never hold is dropped; those that wait there go on waiting."""
    residency = Residency(CPU, Fake(device=8192, host=3072))
    for name in "ab":
        residency.add(key(name), component(1), Place.RAM)
    residency.add(key("large"), component(4))
    residency.make_room(8192)
    assert [residency.place(key(name)) for name in ("a", "b", "large")] == [Place.RAM, Place.RAM, None]


def test_room_in_ram_that_is_kept_is_not_counted_on() -> None:
    """Components that a job needs in RAM stay there, and others do not leave in vain for what still would not
    fit beside them.
    """
    residency = Residency(CPU, Fake(device=8192, host=4096))
    for name, size in (("other", 1), ("needed", 2)):
        residency.add(key(name), component(size), Place.RAM)
    residency.add(key("leaves"), component(3))
    residency.make_room(8192, keep=[key("needed")])
    assert [residency.place(key(name)) for name in ("other", "needed", "leaves")] == [
        Place.RAM,
        Place.RAM,
        None,
    ]


def test_components_that_come_to_ram_anyway_get_what_there_is() -> None:
    """What a job needs in RAM goes before everything that waits there, also where that does not suffice; what
    has left is no longer said to be there.
    """
    residency = Residency(CPU, Fake(device=8192, host=3072))
    for name in "ab":
        residency.add(key(name), component(1), Place.RAM)
        residency.name(name, [key(name)])
    residency.make_host_room(2048, keep=[key("b")])
    assert residency.models.keys() == {"b"}
    residency.make_host_room(8192, keep=[])
    assert residency.models == {}


def test_component_is_dropped_where_ram_is_the_device() -> None:
    """On a CPU worker there is no second place: what leaves is dropped."""
    memory = Fake(device=1024)
    memory.has_host = False
    residency = Residency(CPU, memory)
    residency.add(key("a"), component(1))
    residency.make_room(512)
    assert residency.place(key("a")) is None


def test_room_is_made_for_the_picture_too() -> None:
    """What the picture takes while it is made counts beside the weights."""
    residency = Residency(CPU, Fake(device=4096))
    residency.add(key("a"), component(2))
    residency.make_room(1024, working_bytes=1024)
    assert residency.place(key("a")) is Place.DEVICE
    residency.make_room(1024, working_bytes=2048)
    assert residency.place(key("a")) is Place.RAM


def test_released_components_wait_in_ram_the_last_used_first() -> None:
    """All leave the device; where RAM has not room for all, those used last stay."""
    residency = Residency(CPU, Fake(device=8192, host=3072))
    residency.add(key("waits"), component(2), Place.RAM)
    for name in "abc":
        residency.add(key(name), component(1))
    residency.release()
    assert [residency.place(key(name)) for name in "abc"] == [Place.RAM] * 3
    assert residency.place(key("waits")) is None
    residency.add(key("d"), component(1))
    residency.release()
    assert [residency.place(key(name)) for name in "abcd"] == [None, Place.RAM, Place.RAM, Place.RAM]


@pytest.mark.parametrize("has_host", [True, False])
def test_released_model_makes_the_same_picture(has_host: bool) -> None:
    """A released model is off the device, and its next picture is the same."""
    memory = Fake(GIB)
    memory.has_host = has_host
    engine = DiffusionEngine("cpu", memory=memory)
    engine.release()
    first = made(engine)
    engine.release()
    assert [found.place for found in engine.resident().values()] == (["ram"] if has_host else [])
    assert engine._residency.size_bytes() == 0
    assert made(engine).data == first.data


def test_models_that_ram_cannot_take_after_all_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where RAM is full when the models are to leave the GPU, they go altogether: that ends nothing."""
    engine = DiffusionEngine("cpu", memory=Fake(GIB))
    first = made(engine)

    def full(*_: Any) -> NoReturn:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(Held, "move", full)
        engine.release()
    assert engine.resident() == {}
    assert made(engine).data == first.data


def test_released_component_that_was_used_last_is_the_one_that_stays() -> None:
    """Where RAM has not room for all that leave the device at once, those used longest ago go altogether."""
    residency = Residency(CPU, Fake(device=8192, host=2048))
    for name in "abc":
        residency.add(key(name), component(1))
    residency.get(key("a"))
    residency.release()
    assert [residency.place(key(name)) for name in "abc"] == [Place.RAM, None, Place.RAM]


def test_model_is_there_as_long_as_all_of_it_is() -> None:
    """A model that has lost a component is no longer said to be loaded; another that shares the rest is."""
    residency = Residency(CPU, Fake(device=8192))
    for name in "abc":
        residency.add(key(name), component(1))
    residency.name("first", [key("a"), key("b")])
    residency.name("second", [key("b"), key("c")])
    memory = Fake(device=2048)
    memory.has_host = False
    residency._memory = memory
    residency._budget_bytes = 2048
    residency.make_room(0)
    assert residency.models.keys() == {"second"}


def test_weights_stay_within_their_budget_however_much_there_is() -> None:
    """The budget bounds what stays and what is spare; on a CPU, without one, half of what is free does."""
    residency = Residency(CPU, Fake(device=2**20), budget_bytes=2048)
    residency.add(key("a"), component(1))
    assert residency.spare_bytes([]) == 1024
    residency.make_room(2048)
    assert residency.place(key("a")) is not Place.DEVICE
    memory = Fake(device=8192)
    memory.has_host = False
    alone = Residency(CPU, memory)
    alone.add(key("a"), component(2))
    assert alone.spare_bytes([]) == 2048
    alone.make_room(2048)
    assert alone.place(key("a")) is Place.DEVICE
    alone.make_room(2049)
    assert alone.place(key("a")) is None
