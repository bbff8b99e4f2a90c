"""What a studio waits for, and how long."""

from __future__ import annotations

from dataclasses import dataclass

from studio_worker.local_studio.leases import LEASE_S
from studio_worker.local_studio.turns import PATIENCE, Patience
from studio_worker.studio import wire


@dataclass(frozen=True)
class Limits:
    """How often a studio has a job tried that does not say so itself, and how long it waits.

    A session whose last heartbeat is older than ``heartbeat_timeout_s`` is closed; a new connection may wait
    with its ``hello`` for ``hello_timeout_s``. ``patience`` is for better workers. Where the studio process
    is gone that had its session, a claim waits for ``lease_s`` from the last heartbeat.
    """

    max_attempts: int = 3
    heartbeat_timeout_s: float = wire.STUDIO_HEARTBEAT_TIMEOUT_S
    hello_timeout_s: float = 15.0
    patience: Patience = PATIENCE
    lease_s: float = LEASE_S
