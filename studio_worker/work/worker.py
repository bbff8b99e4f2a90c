"""All lanes, and the one device between them: who works here, from the first job to the last.

The thread that runs it, the main one, has the device: it loads models and gives turns, and the lanes, each on
a thread of its own, do all else. A lost device, and a lane that crashes, end the work of all.

In RAM a lane has one job's inputs or its picture, never both: until its turn 3 times 64 MiB at most, or what
they are decoded; afterwards 18 bytes a pixel while it is encoded, 0.15 GB for the largest picture of a model;
as lossless WebP, which is for removed objects, 30, or 1.9 GB for 64 million pixels. One lane at a time has
its inputs decoded, which takes another 0.4 GB. What is kept is on disk, and is uploaded from there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Sequence

from studio_worker.context import called
from studio_worker.errors import StudioWorkerError
from studio_worker.models import RequiredModel
from studio_worker.report.snapshot import TurnFacts
from studio_worker.work.keeping import Preloader
from studio_worker.work.lane import Lane
from studio_worker.work.ports import Ports
from studio_worker.work.stride import Stride
from studio_worker.work.turns import Turns

_LEAVE_S = 30.0
"""How long lanes have to keep the picture that they are encoding, when the device is lost for all."""


class Worker:
    """The lanes of one device.

    Args:
        lanes: what each of them works with; engines and files are the same for all.
        step_timeout_s: as of :class:`Lane`.
    """

    def __init__(self, lanes: Sequence[Ports], step_timeout_s: Callable[[], float]) -> None:
        self._engines = lanes[0].engines
        self._turns = Turns(self._loaded)
        self._lanes = [Lane(ports, self._turns, step_timeout_s) for ports in lanes]
        self._stride = Stride(step_timeout_s)
        self._cancel_preloading = threading.Event()
        self._preloader = Preloader(self._engines, lanes[0].files, self._stride, self._cancel_preloading)
        self._guard = threading.Lock()
        self._at_work = len(lanes)
        self._crash: BaseException | None = None

    def preload(
        self, models: Iterable[RequiredModel], go_on: Callable[[], bool], say: Callable[[str], None]
    ) -> None:
        """As :meth:`Preloader.preload`."""
        self._preloader.preload(models, go_on, say)

    def run(self) -> None:
        """Work until no lane has more jobs.

        Raises:
            DeviceError: the device is lost; its job was reported and stays noted, those of other lanes were
                handed back. The process should end.
        """
        threads = [
            threading.Thread(target=self._carry, args=(number, lane), name="lane", daemon=True)
            for number, lane in enumerate(self._lanes, 1)
        ]
        for thread in threads:
            thread.start()
        try:
            self._turns.serve()
            if self._crash is not None:
                raise self._crash
        except BaseException as error:
            is_ours = isinstance(error, StudioWorkerError)  # what others say might quote a prompt
            for lane in self._lanes:
                lane.leave(str(error) if is_ours else f"internal error: {type(error).__name__}")
            self._turns.close()
            raise
        finally:
            for thread in threads:
                thread.join(_LEAVE_S)

    @property
    def turns(self) -> TurnFacts:
        """How turns went so far."""
        return self._turns.facts

    def leave(self, lane: int, reason: str) -> None:
        """Let one lane, counted from 1, hand its job back and end; the others go on. From any thread."""
        self._lanes[lane - 1].leave(reason)

    def _loaded(self) -> Collection[str]:
        return {model for model, found in self._engines.resident().items() if found.place != "ram"}

    def hand_back(self, reason: str) -> None:
        """Stop every job in hand at its next step, and any later one: the process is ending.

        Safe from any thread.
        """
        self._cancel_preloading.set()
        for lane in self._lanes:
            lane.hand_back(reason)

    def is_stuck(self) -> bool:
        """Whether a job in hand has shown no progress for longer than its limit."""
        return self._stride.is_too_long() or any(lane.is_stuck() for lane in self._lanes)

    def _carry(self, number: int, lane: Lane) -> None:
        """A lane's thread. What it does not expect ends all of them: a lane without a thread would take jobs
        and make none.
        """
        try:
            with called(lane=number) if len(self._lanes) > 1 else contextlib.nullcontext():
                lane.run()
        except BaseException as error:  # also the lost device's, which is raised where it was lost
            with self._guard:
                self._crash = self._crash or error
        with self._guard:
            self._at_work -= 1
            is_over = not self._at_work or self._crash is not None
        if is_over:
            self._turns.close()
