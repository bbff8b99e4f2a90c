"""What goes wrong in a farm, by a script made from a seed: which fault comes after how many jobs."""

from __future__ import annotations

import asyncio
import collections
import random
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.farm.studios import Balancer, StudioProcess
from tests.farm.worker import Worker

WEIGHTS = {
    "kill studio": 5, "stop studio": 4, "freeze studio": 2, "drop sessions": 6, "restart database": 2,
    "crash database": 2, "no store": 3,
}  # fmt: skip
"""How often each fault comes, relative to the others."""
OF_ALL = ("kill studio", "stop studio", "freeze studio", "drop sessions")
"""What can go wrong whatever the studios keep their state in."""


@dataclass(frozen=True)
class Fault:
    """One entry of the script: after so many jobs, for so long; ``lot`` chooses whom it meets."""

    kind: str
    after: int
    seconds: float
    lot: float


def script(seed: int, jobs: int, faults: int, kinds: Sequence[str]) -> list[Fault]:
    """The faults of a run, in order, each kind at least once where there are so many."""
    chance = random.Random(f"faults {seed} {jobs} {faults}")
    chosen = list(kinds)[:faults]
    chosen += chance.choices(list(kinds), [WEIGHTS[kind] for kind in kinds], k=faults - len(chosen))
    chance.shuffle(chosen)
    return [
        Fault(kind, jobs * number // (faults + 1), chance.uniform(0.2, 4.0), chance.random())
        for number, kind in enumerate(chosen, start=1)
    ]


class Faults:
    """Does what a script says.

    Args:
        more: what else can be done, by the fault's kind: given the fault's seconds.
    """

    def __init__(
        self,
        processes: Sequence[StudioProcess],
        balancer: Balancer,
        workers: Sequence[Worker],
        more: Mapping[str, Callable[[float], Awaitable[None]]],
    ) -> None:
        self._processes = processes
        self._balancer = balancer
        self._workers = workers
        self._more = more
        self.done: collections.Counter[str] = collections.Counter()

    async def run(self, faults: Sequence[Fault], ended: Callable[[], int]) -> None:
        """All of them, one at a time, each once so many jobs have ended."""
        for fault in faults:
            while ended() < fault.after:
                await asyncio.sleep(0.05)
            await self._do(fault)
            self.done[fault.kind] += 1

    async def _do(self, fault: Fault) -> None:
        process = self._processes[int(fault.lot * len(self._processes))]
        match fault.kind:
            case "drop sessions":
                chance = random.Random(fault.lot)
                for worker in chance.sample(self._workers, 1 + int(fault.lot * len(self._workers) / 2)):
                    worker.drop()
            case "kill studio":
                await self._end(process, signal.SIGKILL, fault.seconds)
            case "stop studio":
                await self._end(process, signal.SIGTERM, fault.seconds)
            case "freeze studio":
                process.send(signal.SIGSTOP)
                await asyncio.sleep(fault.seconds)
                process.send(signal.SIGCONT)
            case _:
                await self._more[fault.kind](fault.seconds)

    async def _end(self, process: StudioProcess, how: signal.Signals, seconds: float) -> None:
        process.send(how)
        await process.ended()
        await asyncio.sleep(seconds)
        process.start()
        await self._balancer.until(lambda ready: ready == len(self._processes))
