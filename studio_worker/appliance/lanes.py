"""The lanes of one service: to the studio each is a worker of its own, and here they share one device.

Each has its identity, its session, its courier. One that the studio rejects or deletes ends alone, with a
line that says so; what ends all of them, or the last one, ends the service.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from studio_worker.appliance.abilities import Abilities
from studio_worker.appliance.ending import Ending
from studio_worker.appliance.news import News
from studio_worker.appliance.parts import LaneParts, Parts
from studio_worker.box.machine_id import machine_mark
from studio_worker.config.current import Current
from studio_worker.context import called
from studio_worker.errors import DuplicateWorker, IdentityRefused, RefusedByStudio, StudioWorkerError
from studio_worker.report.logs import ShippingBuffer
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.courier import Courier
from studio_worker.studio.http.identity import IdentityFile, identity_name
from studio_worker.studio.http.registration import Registration
from studio_worker.studio.link import StudioLink
from studio_worker.studio.session.connector import Connector
from studio_worker.studio.session.session import StudioSession
from studio_worker.work.health import Health

log = logging.getLogger(__name__)


class _LaneLink:
    """One lane as the studio sees it: from its registration to its last delivery."""

    def __init__(
        self,
        lane: LaneParts,
        api: StudioApi,
        abilities: Abilities,
        parts: Parts,
        news: News,
        ending: Ending,
    ) -> None:
        self.news = news.lane(lane.number)
        self.session = StudioSession(abilities, lane.desk, lane.uploads, parts.failures, self.news)
        self.connector = Connector(api, abilities, self.session, _shipping(lane.number))
        self.courier = Courier(api, lane.outbox, lane.uploads, self.session, news.activity)
        self._abilities = abilities
        self._api = api
        self._stop = ending.stop
        self._number = lane.number

    def linked(self, folder: Path, on_end: Callable[[StudioWorkerError], None]) -> StudioLink:
        """Raises ConfigError: its credentials or its identity file cannot be used."""
        registration = Registration(
            self._api,
            IdentityFile(folder / identity_name(self._number), machine_mark()),
            self._abilities.capabilities,
            on_waiting=self.news.registration_waits,
            stop=self._stop,
        )
        return StudioLink(
            registration, self.connector, self.courier, self.news, on_end, is_first=self._number == 1
        )


class Lanes:
    """All lanes, towards the studio.

    Raises:
        ConfigError: credentials or an identity file cannot be used.
    """

    def __init__(
        self, parts: Parts, current: Current, health: Health, news: News, ending: Ending, api: StudioApi
    ) -> None:
        self._parts = parts
        self._ending = ending
        self._guard = threading.Lock()
        self._alive = {lane.number for lane in parts.lanes}
        self._cures: dict[int, str] = {}
        """What helps each lane that has ended."""
        self._leave: Callable[[int, str], None] | None = None
        self._lanes = {
            lane.number: _LaneLink(lane, api, Abilities(parts, lane, current, health), parts, news, ending)
            for lane in parts.lanes
        }
        folder = current.settings.state.dir
        self._links = {
            number: lane.linked(folder, partial(self._ended, number)) for number, lane in self._lanes.items()
        }

    def claims(self, lane: int) -> StudioSession:
        """Who answers to the studio for a lane's job."""
        return self._lanes[lane].session

    def start(self, leave: Callable[[int, str], None]) -> None:
        """Register and connect every lane.

        Args:
            leave: has one hand its job back and take no more.
        """
        self._leave = leave
        for number, link in self._links.items():
            with self.called(number):
                link.start()

    def stop(self) -> None:
        """As :meth:`StudioLink.stop`, all at once."""
        threads = [threading.Thread(target=link.stop, daemon=True) for link in self._links.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def called(self, lane: int) -> AbstractContextManager[None]:
        """What is logged meanwhile is about this lane, where there are several."""
        return called(lane=lane) if len(self._lanes) > 1 else contextlib.nullcontext()

    def beat_now(self) -> None:
        """As :meth:`StudioSession.beat_now`, of each."""
        for lane in self._lanes.values():
            lane.session.beat_now()

    def is_silent(self, seconds: float) -> bool:
        """Whether a lane's session hangs, as :meth:`Connector.is_silent` has it."""
        return any(lane.connector.is_silent(seconds) for lane in self._lanes.values())

    def _ended(self, number: int, error: StudioWorkerError) -> None:
        with self._guard:
            if number not in self._alive:
                return
            self._alive.discard(number)
            is_last = not self._alive
            before = "; ".join(f"lane {lane}: {cure}" for lane, cure in sorted(self._cures.items()))
            if isinstance(error, IdentityRefused):
                self._cures[number] = error.reset_command
                if is_last and before:
                    error.besides = f"; and for the lanes that ended before: {before}"
        if is_last or not isinstance(error, RefusedByStudio | DuplicateWorker):
            self._ending.end_with(error)
            return
        lane = self._lanes[number]
        with self.called(number):
            log.error("lane ends, the others go on", extra={"op": "lane", "error": str(error)})
        lane.news.ended(str(error))
        assert self._leave is not None  # no lane ends before it has started
        self._leave(number, str(error))
        lane.courier.stop()
        self._parts.outbox.lanes.discard(number)


def _shipping(lane: int) -> ShippingBuffer:
    """What the studio is told of the log: by each lane its own lines, by the first those of no lane too."""
    buffer = ShippingBuffer()
    buffer.addFilter(lambda record: getattr(record, "lane", 1) == lane)
    logging.getLogger().addHandler(buffer)
    return buffer
