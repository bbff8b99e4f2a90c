"""What one service has and its threads share: device, engines, the folders on disk, the desk between them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Self

from studio_worker.appliance.provisioning import open_store
from studio_worker.box import system_libraries
from studio_worker.box.device import Device, find_device
from studio_worker.config.current import Current
from studio_worker.engine import Router, default_router
from studio_worker.spool.failures import Failures
from studio_worker.spool.in_hand import JobInHand, LaneInHand
from studio_worker.spool.outbox import Outbox
from studio_worker.spool.part import OutboxPart
from studio_worker.store import Store
from studio_worker.studio.http.uploads import Uploads
from studio_worker.work.desk import Desk, Desks, Hands

log = logging.getLogger(__name__)


def found_device(setting: str) -> Device:
    """The device of this box, as ``[worker] device`` has it.

    Raises:
        DeviceError: it is not there.
    """
    device = find_device(setting)
    log.info(
        "device found",
        extra={
            "op": "device",
            "device": device.name,
            "description": device.description,
            "memory_gb": round(device.memory_gb, 1),
        },
    )
    return device


@dataclass(frozen=True)
class LaneParts:
    """What is one lane's own; ``number`` counts from 1."""

    number: int
    desk: Desk
    in_hand: LaneInHand
    outbox: OutboxPart
    uploads: Uploads

    @classmethod
    def made(cls, number: int, hands: Hands, in_hand: JobInHand, outbox: Outbox) -> Self:
        part = OutboxPart(outbox, number)
        return cls(number, Desk(hands), in_hand.of_lane(number), part, Uploads(part))


@dataclass(frozen=True)
class Parts:
    """Each is safe from any thread, and none has one of its own."""

    device: Device
    engines: Router
    store: Store
    in_hand: JobInHand
    failures: Failures
    outbox: Outbox
    lanes: tuple[LaneParts, ...]

    @property
    def desks(self) -> Desks:
        return Desks([lane.desk for lane in self.lanes])

    @property
    def uploads(self) -> tuple[Uploads, ...]:
        """Of every lane."""
        return tuple(lane.uploads for lane in self.lanes)

    @classmethod
    def opened(cls, current: Current, device: Device) -> Self:
        """What the configuration describes, on disk and in memory; no model is loaded yet."""
        system_libraries.hold()
        state, worker = current.settings.state, current.settings.worker
        in_hand, hands, numbers = JobInHand(state.dir / "spool"), Hands(), range(1, worker.lanes + 1)
        outbox = Outbox(
            state.dir / "outbox",
            max_bytes=state.outbox_max_gb * 1e9,
            max_age_s=state.outbox_max_days * 86_400,
        )
        outbox.lanes.update(numbers)
        return cls(
            device=device,
            engines=default_router(device.name, compiles=worker.compile),
            store=open_store(current),
            in_hand=in_hand,
            failures=Failures(state.dir / "spool"),
            outbox=outbox,
            lanes=tuple(LaneParts.made(number, hands, in_hand, outbox) for number in numbers),
        )
