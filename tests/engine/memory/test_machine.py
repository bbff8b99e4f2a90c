"""How much memory there is for a job."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from studio_worker.engine import Router
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.memory.machine import MachineMemory
from studio_worker.jobs import Cancel
from studio_worker.models import ModelSource
from tests.lab.engine import request
from tests.lab.memory import (
    GIB,
    Fake,
)

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


class Card:
    """A GPU of 10 GiB as the driver and torch tell of it: what others have, and what this process's allocator
    has taken of the rest (``reserved``) and given out (``allocated``).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.others = self.reserved = self.allocated = 0
        total = 10 * GIB
        for asked, answer in {
            "mem_get_info": lambda device: (total - self.others - self.reserved, total),
            "memory_reserved": lambda device: self.reserved,
            "memory_allocated": lambda device: self.allocated,
            "get_device_properties": lambda device: SimpleNamespace(total_memory=total),
        }.items():
            monkeypatch.setattr(torch.cuda, asked, answer)

    def take(self, size_bytes: int) -> None:
        """What the allocator has is given out first, then more is taken from the driver."""
        self.allocated += size_bytes
        self.reserved = max(self.reserved, self.allocated)


def test_what_others_use_of_a_gpu_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """There for a job is what other processes leave, but for a twentieth of the card; whether this one has
    it already, for a model that could go or for nothing, is all the same.
    """
    card, memory = Card(monkeypatch), MachineMemory(torch.device("cuda:0"))
    assert memory.on_device(0) == 9.5 * GIB
    card.others = 3 * GIB
    assert memory.on_device(0) == 6.5 * GIB
    card.take(4 * GIB)  # a model
    assert memory.on_device(4 * GIB) == 6.5 * GIB
    card.take(2 * GIB)  # what a picture in hand takes beside it, and cannot let go
    assert memory.on_device(4 * GIB) == 4.5 * GIB
    card.allocated -= 2 * GIB  # it is made: the allocator keeps what it had
    assert memory.on_device(4 * GIB) == 6.5 * GIB
    card.allocated = 0
    assert memory.on_device(0) == 6.5 * GIB
    card.reserved, card.others = 0, 10 * GIB
    assert memory.on_device(0) == 0


def test_loaded_models_count_as_room_for_the_next_job() -> None:
    """What a job could have is the same before and after a model was loaded: it would leave for the job."""
    memory = Fake(3 * GIB)
    memory.on_device = lambda ours: 2 * GIB + ours  # type: ignore[method-assign]  # 2 GiB free
    router = Router({"sd-cpp": lambda: DiffusionEngine("cpu", memory=memory)})
    assert router.available_bytes() is None
    router.for_source(ModelSource(engine="sd-cpp")).generate(request(), lambda *_: None, Cancel())
    assert router.available_bytes() == 2 * GIB + router.resident()["sample-model"].size_bytes


def test_picture_in_hand_takes_nothing_from_the_next_job() -> None:
    """What another lane's job could have is the same while a picture is made: it is gone by its turn."""
    memory, free, told = Fake(3 * GIB), [2 * GIB], list[int | None]()
    memory.on_device = lambda ours: free[0] + ours  # type: ignore[method-assign]
    router = Router({"sd-cpp": lambda: DiffusionEngine("cpu", memory=memory)})
    engine = router.for_source(ModelSource(engine="sd-cpp"))

    def take(done: int, total: int) -> None:
        free[0] = GIB // 2
        told.append(router.available_bytes())

    engine.generate(request(), take, Cancel())
    assert set(told) == {2 * GIB}
    assert router.available_bytes() == GIB // 2 + router.resident()["sample-model"].size_bytes


def test_ram_where_components_wait_is_what_the_machine_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits in RAM already counts as room, and a twentieth of it is kept free; on a CPU it is no second
    place.
    """
    monkeypatch.setattr("studio_worker.engine.memory.machine.total_ram_bytes", lambda: 20 * GIB)
    monkeypatch.setattr("studio_worker.engine.memory.machine.available_ram_bytes", lambda: 8 * GIB)
    memory = MachineMemory(torch.device("cuda:0"))
    assert (memory.on_host(0), memory.on_host(3 * GIB)) == (7 * GIB, 10 * GIB)
    assert (memory.has_host, MachineMemory(torch.device("cpu")).has_host) == (True, False)
    assert MachineMemory(torch.device("cpu")).on_device(3 * GIB) == 10 * GIB
