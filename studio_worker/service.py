"""The service from start to end: the one place where everything is wired together.

Configuration, logs, device, provisioning, READY, registration, session, the loop, and the way out. The
main thread prepares and then runs the worker's loop. Signals have a thread of their own, the session and the
courier one each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from studio_worker import __version__, config
from studio_worker.appliance.abilities import Abilities
from studio_worker.appliance.answers import Reporting, early_handlers, note_answer
from studio_worker.appliance.gpu_watch import GpuWatch
from studio_worker.appliance.pause_note import PauseNote
from studio_worker.appliance.preparation import Preparation, await_nodes, try_again
from studio_worker.appliance.provisioning import (
    LaterProvision,
    SeenFiles,
    change_store,
    open_store,
)
from studio_worker.appliance.reload import REQUIRED_MODELS, Reloaded, Reloader
from studio_worker.box.device import find_device
from studio_worker.box.owner import become, give_folder, owner_of
from studio_worker.box.state_lock import state_lock
from studio_worker.config.downloads import policy_from
from studio_worker.config.settings import Settings
from studio_worker.config.values import listen_address
from studio_worker.engine import default_router
from studio_worker.errors import StudioWorkerError
from studio_worker.files import DISK_TROUBLES
from studio_worker.report import logs
from studio_worker.report.activity import Activity
from studio_worker.report.control import ControlServer, runtime_dir
from studio_worker.report.metrics import Exporter, Metrics
from studio_worker.report.notify import Notifier, ReadyLine, watchdog_interval_s
from studio_worker.report.starts import Starts
from studio_worker.spool.failures import Failures
from studio_worker.spool.in_hand import JobInHand
from studio_worker.spool.outbox import Outbox
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.identity import IdentityFile
from studio_worker.studio.link import StudioLink
from studio_worker.work.desk import Desk
from studio_worker.work.health import Health
from studio_worker.work.inputs import input_fetcher
from studio_worker.work.worker import Worker

log = logging.getLogger(__name__)

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_RELOAD_SIGNAL = signal.SIGHUP
_AFTER_LIMIT_S = 120.0
"""What handing a job back may take beyond stop_timeout_s: its step, the last delivery, the session's end."""
_MAY_PASS = DISK_TROUBLES | {errno.EACCES, errno.EPERM}
_LOOP_SILENCE_S = 30.0
"""The session's loop turns every second; silent for this long, it hangs."""


def run(directory: Path = config.DEFAULT_DIR) -> int:
    """Run the service until it is stopped; returns the exit status (0 = stopped as asked)."""
    logs.configure()
    # Blocked in every thread: one thread takes them with sigwait, so that no handler ever interrupts
    # a lock, a download or torch half-way.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS | {_RELOAD_SIGNAL})
    threading.excepthook = _log_crash
    activity = Activity()
    notifier = Notifier(activity.said)
    try:
        loaded = config.load(directory)
        logs.configure(loaded.settings.log.level, loaded.settings.log.format)
        state = loaded.settings.state
        owner = owner_of(state.dir, loaded.settings.models.root)
        give_folder(runtime_dir(state.runtime_dir), owner)
        become(owner)
        config.check_folders(loaded.settings)
        with (
            state_lock(state.dir),
            Starts(state.dir) as starts,
            contextlib.closing(
                ControlServer(runtime_dir(state.runtime_dir), early_handlers(activity, starts))
            ) as control,
        ):
            if await_nodes(loaded.settings.worker.device, notifier, _STOP_SIGNALS):
                Service(directory, loaded, starts, activity, notifier, control).run()
    except StudioWorkerError as error:
        log.critical(
            "service ends with an error",
            extra={"op": "service", "error": str(error), "exit_status": error.exit_status},
        )
        return error.exit_status
    except OSError as error:
        # The state folder's disk, most likely. Not the job's: those never come this far.
        status = os.EX_TEMPFAIL if error.errno in _MAY_PASS else os.EX_IOERR
        log.critical(
            "service ends with an error",
            extra={
                "op": "service",
                "error": f"{error.filename or 'the disk'}: {error.strerror}",
                "exit_status": status,
            },
        )
        return status
    except Exception:  # a fault of ours: in the journal as every other line, by its priority and redacted
        log.critical("service crashed", exc_info=True, extra={"op": "service", "exit_status": 1})
        return 1
    log.info("service stopped", extra={"op": "service", "exit_status": 0})
    return 0


def _log_crash(crash: threading.ExceptHookArgs) -> None:
    log.critical(
        "thread crashed",
        exc_info=(crash.exc_type, crash.exc_value or crash.exc_type(), crash.exc_traceback),
        extra={"op": "service", "in_thread": crash.thread.name if crash.thread else ""},
    )


class Service:
    """Everything of one running service. The caller has blocked the signals it waits for."""

    def __init__(
        self,
        directory: Path,
        loaded: config.Config,
        starts: Starts,
        activity: Activity,
        notifier: Notifier,
        control: ControlServer,
    ) -> None:
        settings = loaded.settings
        self._activity = activity
        self._notifier = notifier
        self._line = ReadyLine(notifier)
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._fatal: StudioWorkerError | None = None

        log.info("service starting", extra={"op": "service", "version": __version__})
        self._device = find_device(settings.worker.device)
        log.info(
            "device found",
            extra={
                "op": "device",
                "device": self._device.name,
                "description": self._device.description,
                "memory_gb": round(self._device.memory_gb, 1),
            },
        )
        policy = dataclasses.replace(
            policy_from(settings), on_end=self._activity.download_ended, on_wait=self._note_wait
        )
        self._reloader = Reloader(directory, loaded, policy, self._notifier, self._line, self._adopt)
        shipping = logs.ShippingBuffer()
        logging.getLogger().addHandler(shipping)
        self._engines = default_router(self._device.name, compiles=settings.worker.compile)
        self._store = open_store(loaded, policy)
        self._preparation = Preparation(
            self._store, self._device, notifier, self._stop, on_usable=lambda: self._gpu.start()
        )
        self._later = LaterProvision(self._store, partial(self._line.note, "provision"))
        self._in_hand = JobInHand(settings.state.dir / "spool")
        failures = Failures(settings.state.dir / "spool")
        outbox = Outbox(
            settings.state.dir / "outbox",
            max_bytes=settings.state.outbox_max_gb * 1e9,
            max_age_s=settings.state.outbox_max_days * 86_400,
        )
        self._desk = Desk()
        self._health = Health(
            partial(self._line.note, "jobs"),
            try_device=lambda: try_again(self._device, self._desk.rest, self._stop),
            end=self._end_with,
            stop=self._stop,
        )
        abilities = Abilities(
            lambda: self._settings,
            device=self._device,
            engines=self._engines,
            store=self._store,
            desk=self._desk,
            in_hand=self._in_hand,
            failures=failures,
            outbox=outbox,
            health=self._health,
        )
        api = StudioApi(settings.studio.api_base_url)
        self._studio = StudioLink(
            api,
            IdentityFile(settings.state.dir / "identity.json"),
            desk=self._desk,
            outbox=outbox,
            failures=failures,
            situation=abilities.situation,
            capabilities=abilities.capabilities,
            shipping=shipping,
            reconnect_attempts=settings.studio.reconnect_attempts,
            reports=self._activity,
            on_answer=partial(note_answer, self._activity, self._line),
            say=self._line.say,
            on_end=self._end_with,
            stop=self._stop,
        )
        self._worker = Worker(
            source=self._studio.session,
            files=SeenFiles(self._store, self._notifier.status, self._line.say),
            engines=self._engines,
            in_hand=self._in_hand,
            results=outbox,
            reports=self._activity,
            health=self._health,
            fetch=lambda url, cancel: input_fetcher(self._reloader.policy, api.root)(url, cancel),
            step_timeout_s=settings.worker.step_timeout_s,
        )
        self._gpu = GpuWatch(
            self._device,
            is_idle=lambda: self._desk.current_job_id is None,
            say=self._say_of_gpu,
            end=self._end_with,
        )
        self._reporting = Reporting(
            self._activity,
            starts=starts,
            outbox=outbox,
            desk=self._desk,
            device=self._device,
            gpu=lambda: self._gpu.facts,
            engines=self._engines,
            health=self._health.facts,
            studio=logs.safe_url(settings.studio.api_base_url),
            uploading=lambda: self._studio.courier.uploading,
            pause_note=PauseNote(settings.state.dir),
            on_pause=self._note_pause,
        )
        self._reporting.begin_paused()
        self._line.is_paused = self._desk.is_paused
        control.handlers = self._reporting.handlers()

    def run(self) -> None:
        """From provisioning to the clean end.

        Raises:
            StudioWorkerError: what ended the service; its class holds the exit status.
        """
        _thread("signals", self._watch_signals)
        with contextlib.closing(self._exporter()):
            self._recover()
            self._activity.entered("provisioning")
            if self._preparation.run(self._reloader.config.required, compiles=self._settings.worker.compile):
                self._work()
            else:
                self._notifier.stopping()
        if self._fatal is not None:
            raise self._fatal

    def _work(self) -> None:
        """From READY to the last job."""
        self._activity.entered("ready")
        self._notifier.ready(str(self._line))
        log.info("service ready", extra={"op": "service"})
        self._reloader.allow()
        if (interval_s := watchdog_interval_s()) is not None:
            _thread("watchdog", lambda: self._feed_watchdog(interval_s))
        self._studio.start()
        try:
            if self._settings.worker.preload:
                self._worker.preload(
                    self._reloader.config.required,
                    go_on=lambda: (
                        not self._stop.is_set()
                        and self._fatal is None
                        and not self._desk.is_paused
                        and self._desk.current_job_id is None
                    ),
                    say=partial(self._line.note, "preload"),
                )
            self._worker.run()
        finally:
            self._activity.entered("stopping")
            self._notifier.stopping("stopping" if self._fatal is None else str(self._fatal))
            self._gpu.stop()
            self._stop.set()
            self._later.stop()
            self._studio.stop()
            self._ended.set()

    def _exporter(self) -> Exporter:
        metrics = Metrics(self._reporting.snapshot, lambda: self._reloader.succeeded)
        self._activity.on_job_end(metrics.job_ended)
        settings = self._settings.metrics
        listen = None if settings.listen is None else listen_address(settings.listen)
        return Exporter(metrics, listen, settings.textfile)

    # --- before READY ---

    def _recover(self) -> None:
        job_id = self._in_hand.recover()
        if job_id is not None:
            log.warning(
                "the last process ended with this job in hand",
                extra={"op": "job", "job_id": job_id, "refused_from_now": self._in_hand.is_poisoned(job_id)},
            )
            self._health.crashed(self._in_hand.crashes_in_a_row)

    # --- a reload ---

    def _adopt(self, reloaded: Reloaded) -> None:
        """Values that somebody keeps; what is asked of ``self._settings`` each time has changed already."""
        settings = reloaded.config.settings
        logs.configure(settings.log.level, settings.log.format)
        self._studio.session.reconnect_attempts = settings.studio.reconnect_attempts
        self._worker.step_timeout_s = settings.worker.step_timeout_s
        change_store(self._store, reloaded.config, reloaded.policy)
        if REQUIRED_MODELS in reloaded.applied:
            self._later.begin(reloaded.config.required)

    # --- threads ---

    def _watch_signals(self) -> None:
        """First stop signal: finish the job in hand, then end. Second, or the stop limit: hand it back."""
        while (number := signal.sigwait(_STOP_SIGNALS | {_RELOAD_SIGNAL})) == _RELOAD_SIGNAL:
            self._reloader.request()
        log.info("stop requested", extra={"op": "service", "signal": signal.Signals(number).name})
        self._activity.entered("draining")
        limit_s = self._settings.worker.stop_timeout_s
        self._notifier.stopping("finishing the job in hand", within_s=limit_s + _AFTER_LIMIT_S)
        self._stop.set()
        self._desk.close()
        self._preparation.give_up()
        again = signal.sigtimedwait(_STOP_SIGNALS, limit_s)
        log.warning(
            "handing the job in hand back",
            extra={"op": "service", "reason": "second signal" if again else "stop limit"},
        )
        self._worker.hand_back("the worker is stopping")

    def _end_with(self, error: StudioWorkerError) -> None:
        """Session or GPU are gone for good: the job in hand cannot be delivered to anybody, or be made."""
        self._fatal = error
        self._preparation.give_up(error)
        self._desk.close()
        self._worker.hand_back(str(error))

    def _feed_watchdog(self, interval_s: float) -> None:
        """WATCHDOG=1 only while the session's loop turns and the job in hand makes steps."""
        while not self._ended.wait(interval_s):  # also while a stop waits for the job in hand
            if self._worker.is_stuck():
                log.error("the job in hand makes no progress", extra={"op": "watchdog"})
            elif self._studio.session.is_silent(_LOOP_SILENCE_S):
                log.error("the session's loop does not turn", extra={"op": "watchdog"})
            else:
                self._notifier.watchdog()

    # --- what is noted of all that ---

    def _note_wait(self, why: str, seconds: float) -> None:
        """A download waits before it asks again: nothing advances, and the start has to outlast it."""
        if self._activity.snapshot().phase == "provisioning":
            self._notifier.status(f"waiting {seconds:.0f} s: {why}")
            self._notifier.extend_timeout(seconds)

    def _say_of_gpu(self, problem: str) -> None:
        if self._activity.snapshot().phase == "ready":
            self._line.note("device", problem)
        elif problem:
            self._notifier.status(problem)

    def _note_pause(self) -> None:
        self._studio.session.beat()
        self._line.is_paused = self._desk.is_paused
        if self._activity.snapshot().phase == "ready":
            self._line.say()

    @property
    def _settings(self) -> Settings:
        """As they are now; a reload changes them."""
        return self._reloader.config.settings


def _thread(name: str, work: Callable[[], None]) -> None:
    """Start a thread that does not keep the process alive."""
    threading.Thread(target=work, name=name, daemon=True).start()
