"""The studio processes of a farm, and the balancer before them."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.fakes.servers import free_port
from tests.farm.calls import NoAnswer, send

START_S = 60.0
STOP_S = 30.0
LOOK_EVERY_S = 0.5
COMMAND = (sys.executable, "-m", "studio_worker", "local-studio")


class StudioProcess:
    """One studio process on a port of its own, started again and again.

    Args:
        options: of ``studio-worker local-studio``, besides the port.
        environment: what it finds in its environment besides.
    """

    def __init__(
        self, name: str, folder: Path, options: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.port = free_port()
        self.log_path = folder / f"{name}.log"
        self._options = options
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run it; the balancer says when it is ready."""
        options = ["--port", str(self.port), "--approve-all", *self._options]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                # The signal comes when the thread ends that started it: here the one of the event loop.
                ["setpriv", "--pdeathsig=KILL", *COMMAND, *options],
                env=self._environment,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        """Of the one that runs, or ran last."""
        assert self._process is not None
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """A signal, where it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    async def ended(self) -> int:
        """Its exit status, once it has ended; where that does not come it is killed."""
        assert self._process is not None
        try:
            return await asyncio.to_thread(self._process.wait, STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return await asyncio.to_thread(self._process.wait)


class Balancer:
    """Says which process gets the next connection: those that say they are ready, one after the other.

    Connections go straight there, as with a balancer that the kernel or the network does: no byte is copied
    in the crowd's own process.
    """

    def __init__(self, processes: Sequence[StudioProcess]) -> None:
        self._processes = processes
        self._ready = list(processes)
        self._next = itertools.count()

    def port(self) -> int:
        """Where the next connection goes."""
        ready = self._ready or self._processes
        return ready[next(self._next) % len(ready)].port

    async def look(self) -> None:
        """Ask all of them, again and again, whether they are ready."""
        while True:
            await self.look_once()
            await asyncio.sleep(LOOK_EVERY_S)

    async def look_once(self) -> None:
        """Ask all of them whether they are ready."""
        answers = await asyncio.gather(*(_is_ready(process.port) for process in self._processes))
        self._ready = [
            process for process, is_ready in zip(self._processes, answers, strict=True) if is_ready
        ]

    async def until(self, is_enough: Callable[[int], bool]) -> None:
        """Wait until so many are ready. Raises TimeoutError."""
        async with asyncio.timeout(START_S):
            while True:
                await self.look_once()
                if is_enough(len(self._ready)):
                    return
                await asyncio.sleep(0.1)


async def _is_ready(port: int) -> bool:
    try:
        async with asyncio.timeout(LOOK_EVERY_S * 4):
            status, _, _ = await send(port, "GET", "/health/ready")
    except (NoAnswer, TimeoutError):
        return False
    return status == 200
