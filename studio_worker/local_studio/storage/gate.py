"""No dialling in vain: while a database server does not answer, its clients are told so at once.

Sessions ask the database on the event loop. Were each of them to wait for the same server, heartbeats would
be acknowledged too late, and workers would leave.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine import Dialect

from studio_worker.local_studio.pictures import StorageAway

CLOSED_S = 1.0
"""So long after a connection could not be made none is tried."""


class Gate:
    """Stands where an engine makes its connections.

    Args:
        clock: any, in seconds.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._closed_until = float("-inf")
        event.listen(engine, "do_connect", self._dial)

    def _dial(self, dialect: Dialect, _record: object, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self._clock() < self._closed_until:
            raise StorageAway("the database did not answer a moment ago")
        try:
            return dialect.connect(*given, **named)
        except dialect.loaded_dbapi.Error:
            self._closed_until = self._clock() + CLOSED_S
            raise
