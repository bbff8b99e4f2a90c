"""What a box can do, with an engine that has as much memory as a test says."""

from __future__ import annotations

from pathlib import Path

from studio_worker.appliance.abilities import Abilities
from studio_worker.appliance.parts import LaneParts, Parts
from studio_worker.box.device import Device
from studio_worker.config import Config
from studio_worker.config.current import Current
from studio_worker.config.settings import Settings
from studio_worker.engine import Router
from studio_worker.models import ModelSource
from studio_worker.spool.failures import Failures
from studio_worker.spool.in_hand import JobInHand
from studio_worker.spool.outbox import Outbox
from studio_worker.store import Store
from studio_worker.studio.session.offers import Situation
from studio_worker.transfer.policy import Policy
from studio_worker.work.desk import Hands
from tests.fakes.played import untouched_health
from tests.lab.worker import KeepingEngine


class FullEngine(KeepingEngine):
    """Has so many GB of its device for a job."""

    def __init__(self, available_gb: float | None) -> None:
        super().__init__()
        self.available_gb = available_gb

    def available_bytes(self) -> int | None:
        return None if self.available_gb is None else int(self.available_gb * 1e9)


def abilities_of(
    folder: Path, device: Device, engine: FullEngine | None = None, settings: Settings | None = None
) -> tuple[Abilities, Situation]:
    """What a box with that device can do, and what offers are judged by there."""
    router = Router({"sd-cpp": lambda: engine or FullEngine(None)})
    if engine is not None:
        router.for_source(ModelSource(engine="sd-cpp"))
    outbox, in_hand = Outbox(folder / "outbox"), JobInHand(folder / "spool")
    lane = LaneParts.made(1, Hands(), in_hand, outbox)
    parts = Parts(
        device=device,
        engines=router,
        store=Store(folder / "models"),
        in_hand=in_hand,
        failures=Failures(folder / "spool"),
        outbox=outbox,
        lanes=(lane,),
    )
    current = Current(Config(settings or Settings(), ()), Policy())
    abilities = Abilities(parts, lane, current, untouched_health())
    return abilities, abilities.situation()
