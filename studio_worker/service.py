"""The service from start to end: what starts when, what stops when, in order.

Configuration, logs, device, provisioning, READY, registration, session, the loop, and the way out. The
main thread prepares and then has the device. Signals have a thread of their own; each lane has one, and so
have its session and its courier. Everything is wired together here; what is wired is in the rooms below.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from studio_worker import __version__, config
from studio_worker.appliance import another_machine, ending, signals
from studio_worker.appliance.answers import EarlyStatus, Status, open_exporter
from studio_worker.appliance.ending import Ending
from studio_worker.appliance.gpu_watch import GpuWatch
from studio_worker.appliance.lanes import Lanes
from studio_worker.appliance.news import News
from studio_worker.appliance.parts import LaneParts, Parts, found_device
from studio_worker.appliance.pausing import Pausing
from studio_worker.appliance.preparation import Preparation, await_nodes, recover, try_again
from studio_worker.appliance.provisioning import LaterProvision, SeenFiles
from studio_worker.appliance.reload import Reloader
from studio_worker.appliance.watchdog import start_watchdog
from studio_worker.box.machine_id import machine_mark
from studio_worker.box.owner import become, give_folder, owner_of
from studio_worker.box.state_lock import state_lock
from studio_worker.config import Config
from studio_worker.config.current import Current
from studio_worker.config.downloads import policy_from
from studio_worker.network.urls import safe_url
from studio_worker.report import logs
from studio_worker.report.control import ControlServer, runtime_dir
from studio_worker.report.starts import Starts
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.identity import given_credentials
from studio_worker.work.health import Health
from studio_worker.work.inputs import input_fetcher
from studio_worker.work.ports import Ports
from studio_worker.work.worker import Worker

log = logging.getLogger(__name__)

_AFTER_LIMIT_S = 120.0
"""What handing a job back may take beyond stop_timeout_s: its step, the last delivery, the session's end."""
_LOOP_SILENCE_S = 30.0
"""The session's loop turns every second; silent for this long, it hangs."""


def run(directory: Path = config.DEFAULT_DIR) -> int:
    """Run the service until it is stopped; returns the exit status (0 = stopped as asked)."""
    logs.configure()
    signals.block()
    threading.excepthook = ending.log_crash
    return ending.exit_status(partial(_run, directory))


def _run(directory: Path) -> None:
    """What comes before the device, and goes after all else: log, user, state folder, control socket."""
    news = News()
    loaded = config.load(directory)
    logs.configure(loaded.settings.log.level, loaded.settings.log.format)
    state = loaded.settings.state
    owner = owner_of(state.dir, loaded.settings.models.root)
    give_folder(runtime_dir(state.runtime_dir), owner)
    become(owner)
    config.check_folders(loaded.settings)
    with _own(state.dir), Starts(state.dir) as starts:
        early = EarlyStatus(news.activity, starts)
        control = ControlServer(runtime_dir(state.runtime_dir), {"status": early.answer})
        with contextlib.closing(control):
            if await_nodes(loaded.settings.worker.device, news.notifier, signals.stop_comes_within):
                service = Service(directory, loaded, news, early)
                control.handlers = service.handlers
                service.run()


@contextlib.contextmanager
def _own(state: Path) -> Iterator[None]:
    """The state folder, for this process alone, and nothing of another machine's in force there."""
    with state_lock(state):
        if given_credentials() is None:
            another_machine.settle(state, machine_mark())
        yield


class Service:
    """Everything of one running service, from the device on. The caller has blocked the signals."""

    def __init__(self, directory: Path, loaded: Config, news: News, early: EarlyStatus) -> None:
        settings = loaded.settings
        log.info("service starting", extra={"op": "service", "version": __version__})
        self._news = news
        self._ending = end = Ending()
        device = found_device(settings.worker.device)
        policy = replace(
            policy_from(settings), on_end=news.activity.download_ended, on_wait=news.download_waits
        )
        self._current = current = Current(loaded, policy)
        self._parts = parts = Parts.opened(current, device)
        self._desks = desks = parts.desks
        self._gpu = GpuWatch(device, is_idle=desks.is_idle, say=news.gpu_has, end=end.end_with)
        self._preparation = Preparation(
            parts.store, device, news.notifier, end.stop, on_usable=self._gpu.start
        )
        self._later = LaterProvision(parts.store, partial(news.line.note, "provision"))
        self._reloader = Reloader(directory, current, news.notifier, news.line, self._later)
        self._health = Health(
            partial(news.line.note, "jobs"),
            try_device=partial(try_again, device, desks.rest, end.stop),
            end=end.end_with,
            stop=end.stop,
        )
        api = StudioApi(settings.studio.api_base_url, policy.uplink)
        self._lanes = Lanes(parts, current, self._health, news, end, api)
        self._worker = self._employed(api.root)
        end.on_end(lambda _: desks.close())
        end.on_end(self._preparation.give_up)
        end.on_hand_back(self._worker.hand_back)
        studio = safe_url(settings.studio.api_base_url)
        self._status = Status(early, parts, self._health, self._gpu, lambda: self._worker.turns, studio)
        pausing = Pausing(desks, news, settings.state.dir, self._lanes.beat_now)
        pausing.begin()
        self.handlers = {"status": self._status.answer, **pausing.handlers()}
        """What the control socket serves from now on."""

    def _employed(self, studio_root: str) -> Worker:
        files = SeenFiles(self._parts.store, self._news.notifier.status, self._news.line.say)

        def ports(lane: LaneParts) -> Ports:
            return Ports(
                source=lane.desk,
                claims=self._lanes.claims(lane.number),
                files=files,
                engines=self._parts.engines,
                in_hand=lane.in_hand,
                results=lane.outbox,
                reports=self._news.activity.lane(lane.number),
                health=self._health,
                fetch=lambda url, cancel: input_fetcher(self._current.policy, studio_root)(url, cancel),
            )

        return Worker(
            [ports(lane) for lane in self._parts.lanes],
            lambda: self._current.settings.worker.step_timeout_s,
        )

    def run(self) -> None:
        """From provisioning to the clean end.

        Raises:
            StudioWorkerError: what ended the service; its class holds the exit status.
        """
        doings = {"reload": self._reloader.request, "stop": self._stop, "hand_back": self._hand_back}
        threading.Thread(target=signals.watch, kwargs=doings, name="signals", daemon=True).start()
        exporter = open_exporter(
            self._current.settings, self._status, self._news.activity, lambda: self._reloader.succeeded
        )
        with contextlib.closing(exporter):
            recover(self._parts.in_hand, self._health)
            self._news.activity.entered("provisioning")
            if self._preparation.run(self._current.required, compiles=self._current.settings.worker.compile):
                self._work()
            else:
                self._news.notifier.stopping()
        if self._ending.error is not None:
            raise self._ending.error

    def _work(self) -> None:
        """From READY to the last job."""
        self._news.activity.entered("ready")
        state = self._current.settings.state.dir
        if (kept := another_machine.kept_aside(state)) is not None:
            cure = another_machine.adopt_cure(state)
            self._news.line.note("identity", f"{kept}; if this is the same worker: {cure}")
        self._news.notifier.ready(str(self._news.line))
        log.info("service ready", extra={"op": "service"})
        self._reloader.allow()
        troubles = {
            "the job in hand makes no progress": self._worker.is_stuck,
            "the session's loop does not turn": lambda: self._lanes.is_silent(_LOOP_SILENCE_S),
        }
        start_watchdog(self._news.notifier, troubles, self._ending.over, self._desks.about_job)
        self._lanes.start(self._worker.leave)
        try:
            if self._current.settings.worker.preload:
                say = partial(self._news.line.note, "preload")
                self._worker.preload(self._current.required, self._has_leisure, say)
            self._worker.run()
        finally:
            self._news.activity.entered("stopping")
            self._news.notifier.stopping(str(self._ending.error or "stopping"))
            self._gpu.stop()
            self._ending.stop.set()
            self._later.stop()
            self._lanes.stop()
            self._ending.over.set()  # until now the watchdog is fed, also while a job is waited for

    def _has_leisure(self) -> bool:
        """Whether models may be loaded before their first job."""
        return not (self._ending.is_near or self._desks.is_paused) and self._desks.is_idle()

    # --- signals, on their thread ---

    def _stop(self, signal_name: str) -> float:
        """The first stop signal: finish the job in hand, then end."""
        log.info("stop requested", extra={"op": "service", "signal": signal_name})
        self._news.activity.entered("draining")
        limit_s = self._current.settings.worker.stop_timeout_s
        self._news.notifier.stopping("finishing the job in hand", within_s=limit_s + _AFTER_LIMIT_S)
        self._ending.ask()
        return limit_s

    def _hand_back(self, reason: str) -> None:
        with self._desks.about_job():
            log.warning("handing the job in hand back", extra={"op": "service", "reason": reason})
        self._ending.hand_back("the worker is stopping")
