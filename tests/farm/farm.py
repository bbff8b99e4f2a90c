"""One farm at work: processes, workers, people and faults, from the first job to the verdict."""

from __future__ import annotations

import asyncio
import collections
import random
import resource
import signal
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.farm import faults, people
from tests.farm.judge import Verdict, judge_and_keep
from tests.farm.stores import Store
from tests.farm.studios import Balancer, StudioProcess
from tests.farm.worker import Book, Manner, Worker

STALLED_S = 90.0
"""So long without a job that ends, and something hangs."""


@dataclass(frozen=True)
class Size:
    """How large a farm is, and what it has to do.

    ``makes_s`` is what a picture takes on average, ``loads_s`` what a worker needs besides that for another
    model than its last. Jobs come as others are done; or all before the first worker, or so many a second.
    """

    seed: int
    jobs: int
    people: int = 50
    workers: int = 200
    processes: int = 3
    faults: int = 0
    impossible: int = 0
    makes_s: float = 1.0
    loads_s: float = 2.0
    come: Literal["as others are done", "first"] | float = "as others are done"


@dataclass
class Outcome:
    """What came of it; everything in ``wrong`` is a broken promise that is not the judge's.

    ``studios_cpu_s`` is the processor time of all studio processes, from their start to their end;
    ``crowd_cpu_s`` that of this one, with workers and people.
    """

    size: Size
    verdict: Verdict
    done: int
    book: Book
    seconds: float
    studios_cpu_s: float
    crowd_cpu_s: float
    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def jobs_per_s(self) -> float:
        """Jobs that were done, by second."""
        return self.done / self.seconds


class Farm:
    """One run.

    Args:
        folder: for the logs of the studio processes, and the evidence of broken promises.
    """

    def __init__(self, size: Size, store: Store, folder: Path) -> None:
        self._size = size
        self._store = store
        self._folder = folder
        self._book = Book()
        names = [f"studio-{number}" for number in range(1, size.processes + 1)]
        self._processes = [StudioProcess(name, folder, store.options, store.environment) for name in names]
        self._balancer = Balancer(self._processes)
        self._workers = [
            Worker(f"box {size.seed} {number}", manner, self._book, self._balancer.port, people.picture)
            for number, manner in enumerate(manners(size))
        ]
        self._wrong: list[str] = []
        self._seconds = 0.0

    def run(self) -> Outcome:
        """From the first process to the verdict."""
        before, studios_before = time.process_time(), _cpu_s_of_children()
        try:
            faults_done = asyncio.run(self._run())
        finally:
            for process in self._processes:
                process.send(signal.SIGKILL)
        crowd_s, studios_s = time.process_time() - before, _cpu_s_of_children() - studios_before
        history, stored, book = self._store.history(), self._store.stored(), self._book
        return Outcome(
            size=self._size,
            verdict=judge_and_keep(self._folder, history, book.account, stored, book.offline),
            done=sum(job.status == "done" for job in history.jobs),
            book=self._book,
            seconds=self._seconds,
            studios_cpu_s=studios_s,
            crowd_cpu_s=crowd_s,
            faults=faults_done,
            wrong=self._wrong + self._book.wrong,
        )

    async def _run(self) -> collections.Counter[str]:
        for process in self._processes:
            process.start()
        await self._balancer.until(lambda ready: ready == len(self._processes))
        self._store.watch()
        for begin in range(0, len(self._workers), 20):
            await asyncio.gather(*(worker.register() for worker in self._workers[begin : begin + 20]))
        trouble = faults.Faults(self._processes, self._balancer, self._workers, self._store.faults)
        kinds = [*faults.OF_ALL, *self._store.faults]
        size = self._size
        script = faults.script(size.seed, size.jobs, size.faults, kinds)
        coming = self._coming()
        if size.come == "first":
            await coming
            coming = _nothing()
        # Who is still in the middle of something when all is over is sent home.
        at_work = [asyncio.create_task(worker.run()) for worker in self._workers]
        at_work.append(asyncio.create_task(self._balancer.look()))
        try:
            await self._work(coming, trouble.run(script, self._ended), at_work)
        finally:
            for task in at_work:
                task.cancel()
            await asyncio.gather(*at_work, return_exceptions=True)
            for worker in self._workers:
                worker.end()
        await self._stop()
        return trouble.done

    async def _coming(self) -> None:
        size, account, port_of = self._size, self._book.account, self._balancer.port
        batches = people.plan(size.seed, size.jobs, size.people, impossible=size.impossible)
        if isinstance(size.come, float):
            await people.queue_steadily(batches, account, port_of, size.come)
        else:
            ended = self._ended if size.come == "as others are done" else lambda: size.jobs
            await people.queue_all(batches, account, port_of, ended)

    async def _work(
        self, coming: Awaitable[None], trouble: Awaitable[None], at_work: Sequence[asyncio.Task[None]]
    ) -> None:
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            load = tasks.create_task(_awaited(coming))
            troubles = tasks.create_task(_awaited(trouble))
            moved_at, last = time.monotonic(), -1
            while not (load.done() and troubles.done() and await self._is_over()):
                if self._ended() != last:
                    moved_at, last = time.monotonic(), self._ended()
                    self._seconds = moved_at - began
                if time.monotonic() - moved_at > STALLED_S:
                    unfinished = await asyncio.to_thread(self._store.unfinished)
                    self._wrong.append(f"nothing moves; {unfinished} jobs do not come to an end")
                    load.cancel()
                    troubles.cancel()
                    break
                for task in at_work:
                    if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                        raise error
                await asyncio.sleep(0.25)

    async def _is_over(self) -> bool:
        return await asyncio.to_thread(self._store.unfinished) == 0 and not any(
            worker.has_pictures for worker in self._workers
        )

    def _ended(self) -> int:
        """About so many jobs have ended; a picture whose answer was lost is refused when it comes again."""
        account = self._book.account
        return (
            len(account.delivered) + len(account.hopeless) + len(account.refused.keys() - account.delivered)
        )

    async def _stop(self) -> None:
        for process in self._processes:
            process.send(signal.SIGTERM)
        for process in self._processes:
            if (status := await process.ended()) != 0:
                self._wrong.append(f"{process.name} ended with exit status {status}")


def manners(size: Size) -> list[Manner]:
    """What the workers are like: most are plain, some lack a model, are busy, pause, or fail now and then."""
    chance = random.Random(f"manners {size.seed}")
    made = []
    for _ in range(size.workers):
        lot = chance.random()
        made.append(
            Manner(
                makes_s=size.makes_s,
                loads_s=size.loads_s,
                lacks=chance.choice(people.MODELS[1:]) if lot < 0.1 else "",
                is_busy=0.1 if 0.1 <= lot < 0.2 else 0.0,
                fails=0.05 if 0.2 <= lot < 0.3 else 0.0,
                gives_up=0.02 if 0.3 <= lot < 0.35 else 0.0,
                pauses_every_s=20.0 if 0.4 <= lot < 0.5 else 0.0,
            )
        )
    return made


def _cpu_s_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


async def _nothing() -> None:
    """There is nothing left to do."""


async def _awaited(something: Awaitable[None]) -> None:
    await something
