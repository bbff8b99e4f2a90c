"""Looks at the GPU while the service runs: its figures for whoever asks, and whether it can still be used.

A GPU that falls off the bus, and a driver that is replaced under the running process, would otherwise show
only in the next job, which then fails. It looks and never computes, so it costs a job nothing. What is wrong
is said at once, and ends the service when no job is in hand: a job finds out by itself, and says more. Where
NVML is missing there are no figures, and bus and files tell what they can.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from studio_worker.box.device import Device
from studio_worker.box.nodes import has_left_the_bus, installed_version, module_version, versions_apart
from studio_worker.box.nvml import GPU_IS_LOST, RESET_REQUIRED, Nvml, NvmlError, Reading
from studio_worker.errors import DeviceError
from studio_worker.report.snapshot import GpuFacts

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
ANSWER_LIMIT_S = 30.0
"""A driver that is busy with another process's start or end answers after seconds; one that hangs never."""

_DOUBTS = 2
"""So many times in a row an error that may pass has to come before the GPU counts as lost."""


class Look(NamedTuple):
    """What was seen at one moment: NVML's answer, whether the GPU is on the bus, and the versions of the
    driver's two halves, the loaded module and the libraries on disk.
    """

    answer: Reading | NvmlError
    is_on_bus: bool
    module: str | None
    library: str | None


class Judge:
    """Tells from one look after the other what is wrong with the GPU.

    The GPU has computed before the first, so that what is odd about that one (a driver's library of another
    version in a container, a bus that is hidden, an NVML that does not work) is not wrong on this machine.
    """

    def __init__(self) -> None:
        self._first: Look | None = None
        self._has_answered = False
        self._doubts = 0

    def problem(self, look: Look | None) -> str | None:
        """What is wrong, with its cure; ``None`` where nothing is.

        Args:
            look: ``None`` where the driver did not answer in time.
        """
        if look is None:
            return _lost("its driver does not answer") if self._has_answered else None
        first = self._first = self._first or look
        if problem := _replaced(first, look):
            return problem
        if isinstance(look.answer, Reading):
            self._has_answered, self._doubts = True, 0
            return None
        if first.is_on_bus and not look.is_on_bus:
            return _lost("it has left the PCI bus")
        if look.answer.status is None:  # nobody has asked the driver, so nothing is known
            return None
        self._doubts += 1
        is_certain = look.answer.status in {GPU_IS_LOST, RESET_REQUIRED}
        is_worse = self._has_answered and self._doubts >= _DOUBTS
        return _lost(str(look.answer)) if is_certain or is_worse else None


def _lost(what: str) -> str:
    return (
        f"the GPU is lost: {what}; look for Xid errors in the kernel log (journalctl -k), see that it is "
        "cool and has power, and reboot"
    )


def _replaced(first: Look, now: Look) -> str | None:
    if not (first.module and first.library and now.module and now.library):
        return None
    if (now.module, now.library) == (first.module, first.library):
        return None
    if now.module != now.library:
        return versions_apart(now.module, now.library)
    return f"the NVIDIA driver was replaced under the service, {first.module} by {now.module}; start it anew"


class Eyes:
    """What looks at a GPU, in a thread of its own each time, since the driver may hold up whoever asks.

    Args:
        place: the GPU's on the PCI bus.
        nvml: asked instead of the machine's own.
    """

    def __init__(
        self, place: str, nvml: Nvml | None = None, root: Path = Path("/"), limit_s: float = ANSWER_LIMIT_S
    ) -> None:
        self._place = place
        self._nvml = nvml or Nvml(place)
        self._root = root
        self._limit_s = limit_s
        self._looks: queue.SimpleQueue[Look] | None = None

    def look(self) -> Look | None:
        """What is seen now; ``None`` where the driver does not answer in time."""
        if self._looks is None:
            self._looks = queue.SimpleQueue()
            looking = threading.Thread(target=self._look, args=(self._looks,), name="gpu-look", daemon=True)
            try:
                looking.start()
            except RuntimeError as error:  # this process may have no more threads now
                self._looks = None
                return Look(NvmlError(f"it cannot be asked: {error}"), True, None, None)
        try:
            look = self._looks.get(timeout=self._limit_s)
        except queue.Empty:  # one that hangs is waited for again, and not joined by another
            return None
        self._looks = None
        return look

    def _look(self, looks: queue.SimpleQueue[Look]) -> None:
        answer: Reading | NvmlError
        try:
            answer = self._nvml.read()
        except NvmlError as error:
            answer = error
        except Exception as error:
            # Whatever it is, who waits for it must not take it for a driver that hangs.
            answer = NvmlError(f"it cannot be asked: {type(error).__name__}: {error}")
        module = module_version(self._root) or (answer.driver if isinstance(answer, Reading) else None)
        is_on_bus = not has_left_the_bus(self._place, self._root)
        looks.put(Look(answer, is_on_bus, module, installed_version()))


class GpuWatch:
    """The watch over one device. A CPU needs none and has none.

    Args:
        is_idle: whether no job is in hand.
        say: gets what is wrong, an empty text when it has passed.
        end: ends the service, for the reason given; called once at most.
        eyes: look instead of those for ``device``.
    """

    def __init__(
        self,
        device: Device,
        *,
        is_idle: Callable[[], bool],
        say: Callable[[str], None],
        end: Callable[[DeviceError], None],
        eyes: Eyes | None = None,
        every_s: float = LOOK_EVERY_S,
    ) -> None:
        self._device = device
        self._place = device.pci_bus_id or ""
        self._is_idle = is_idle
        self._say = say
        self._end = end
        self._eyes = eyes or Eyes(self._place)
        self._every_s = every_s
        self._stopped = threading.Event()
        self._facts: GpuFacts | None = None

    @property
    def facts(self) -> GpuFacts | None:
        """The figures of the last look. From any thread."""
        return self._facts

    def start(self) -> None:
        """Begin to look, in a thread of its own."""
        if self._place:
            threading.Thread(target=self._watch, name="gpu", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def _watch(self) -> None:
        judge, said, is_mute = Judge(), "", False
        while not self._stopped.is_set():
            look = self._eyes.look()
            answer = None if look is None else look.answer
            self._facts = self._figures(answer) if isinstance(answer, Reading) else None
            if isinstance(answer, NvmlError) and not is_mute:
                log.warning("the GPU tells no figures", extra={"op": "device", "error": str(answer)})
            is_mute = isinstance(answer, NvmlError)
            problem = judge.problem(look) or ""
            if problem != said:
                said = problem
                self._say(problem)
                if problem:
                    log.error("the GPU cannot be used any more", extra={"op": "device", "error": problem})
                else:
                    log.info("the GPU can be used again", extra={"op": "device"})
            if problem and self._is_idle():
                self._end(DeviceError(f"{self._device.name}, {self._device.description}: {problem}"))
                return
            self._stopped.wait(self._every_s)

    def _figures(self, found: Reading) -> GpuFacts:
        return GpuFacts(
            pci_bus_id=self._place,
            temperature_celsius=found.temperature_celsius,
            power_watts=found.power_watts,
            utilization_ratio=found.utilization_ratio,
            used_bytes=found.used_bytes,
            slowed_by=found.slowed_by,
        )
