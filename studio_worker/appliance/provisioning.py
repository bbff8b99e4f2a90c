"""From required models to verified files, with progress that systemd and the log can follow."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from studio_worker.config.current import Current
from studio_worker.context import called
from studio_worker.errors import DownloadCancelled, DownloadError
from studio_worker.models import LocalFile, ModelFile, RequiredModel
from studio_worker.store import Store
from studio_worker.store.terms import Terms
from studio_worker.transfer.wanted import Progress

log = logging.getLogger(__name__)

_STATUS_EVERY_S = 1.0
_LOG_EVERY_S = 10.0
_RATE_OVER_S = 10.0


def open_store(current: Current) -> Store:
    """The models folder as the configuration has it; what else it says of it may change at any time."""
    return Store(current.settings.models.root, partial(_terms, current))


def _terms(current: Current) -> Terms:
    budget_gb = current.settings.models.budget_gb
    return Terms(
        current.policy,
        required=tuple(file for model in current.required for file in model.files),
        budget_bytes=None if budget_gb is None else int(budget_gb * 1e9),
    )


class ProvisionProgress:
    """Turns the store's byte counts into a status line, log lines and signs of life.

    Args:
        on_status: gets a line such as ``downloading sample: 42% of 7.3 GB, 38 MB/s, 1 min 50 s left``, at
            most once a second.
        on_advance: called with it, and only when bytes have advanced, so that a stalled mirror lets the
            start time out instead of hanging it.
    """

    def __init__(
        self,
        on_status: Callable[[str], None],
        on_advance: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_status = on_status
        self._on_advance = on_advance
        self._clock = clock
        self._said_at = self._logged_at = float("-inf")
        self._last = 0
        self._label = ""
        self._history: deque[tuple[float, int]] = deque()

    @property
    def label(self) -> str:
        """What is fetched now; the count begins anew when it is set."""
        return self._label

    @label.setter
    def label(self, label: str) -> None:
        self._label = label
        self._last = 0
        self._history.clear()

    def __call__(self, done: int, total: int | None) -> None:
        """Bytes have come."""
        self._moved("downloading", done, total)

    def reading(self, done: int, total: int | None) -> None:
        """Bytes on disk were read back."""
        self._moved("verifying", done, total)

    def _moved(self, doing: str, done: int, total: int | None) -> None:
        now = self._clock()
        if done < self._last:  # begun anew: what comes now has come before, but it does come
            self._last = done
            self._history.clear()
        if done == self._last or now - self._said_at < _STATUS_EVERY_S:
            return
        self._last, self._said_at = done, now
        rate = self._rate(now, done)
        self._on_advance()
        self._on_status(f"{doing} {self._label}: {_share(done, total)}{_speed(rate, done, total)}")
        if now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            facts: dict[str, object] = {
                "op": "provision",
                "doing": doing,
                "bytes": done,
                "bytes_total": total,
            }
            if rate:
                facts["bytes_per_s"] = round(rate)
                if total is not None:
                    facts["left_s"] = round((total - done) / rate)
            log.info("provisioning", extra=facts)

    def _rate(self, now: float, done: int) -> float | None:
        """Bytes a second of late, or ``None`` while there is nothing to compare with."""
        self._history.append((now, done))
        while now - self._history[0][0] > _RATE_OVER_S:
            self._history.popleft()
        since, before = self._history[0]
        return (done - before) / (now - since) if now > since else None


def provision(
    store: Store, required: Sequence[RequiredModel], progress: ProvisionProgress, cancel: threading.Event
) -> None:
    """Every file of every required model on disk and verified when this returns.

    Raises:
        DownloadError: a file could not be fetched, verified or stored.
    """
    began = time.monotonic()
    for model in required:
        progress.label = model.id
        with called(model=model.id):
            store.ensure(
                model.files, model=model.id, progress=progress, reading=progress.reading, cancel=cancel
            )
            log.info("model verified", extra={"op": "provision", "files": len(model.files)})
    log.info(
        "required models verified",
        extra={
            "op": "provision",
            "models": len(required),
            "elapsed_ms": round((time.monotonic() - began) * 1000),
        },
    )


class LaterProvision:
    """Required models that came with a reload: fetched beside the jobs, and tried again until they are there.

    Args:
        on_note: gets what the operator should know meanwhile; empty = nothing any more.
        delays_s: seconds between tries; the last one is repeated.
    """

    def __init__(
        self,
        store: Store,
        on_note: Callable[[str], None],
        delays_s: Sequence[float] = (30, 60, 120, 300, 600),
    ) -> None:
        self._store = store
        self._on_note = on_note
        self._delays_s = delays_s
        self._cancel = threading.Event()

    def begin(self, required: Sequence[RequiredModel]) -> None:
        """From now on these are required; what an earlier call still fetches is given up."""
        self.stop()
        self._cancel = cancel = threading.Event()
        self._on_note("")
        if not all(self._store.is_verified(file) for model in required for file in model.files):
            threading.Thread(
                target=self._work, args=(required, cancel), name="later-provision", daemon=True
            ).start()

    def stop(self) -> None:
        self._cancel.set()

    def _work(self, required: Sequence[RequiredModel], cancel: threading.Event) -> None:
        def note(text: str) -> None:
            if not cancel.is_set():
                self._on_note(text)

        waits = itertools.chain(self._delays_s, itertools.repeat(self._delays_s[-1]))
        progress = ProvisionProgress(note, lambda: None)
        while True:
            try:
                provision(self._store, required, progress, cancel)
                note("")
                return
            except DownloadCancelled:
                return
            except DownloadError as error:
                wait_s = None if error.is_jobs_fault else next(waits)
                log.error(
                    "required models could not be provisioned",
                    extra={"op": "provision", "error": str(error), "retry_in_s": wait_s},
                )
                note(f"required models missing: {error}")
            if wait_s is None or cancel.wait(wait_s):
                return


class SeenFiles:
    """The store for jobs: what has to come for one is shown as it is at the start.

    Args:
        on_status: gets the status lines.
        on_end: called when the files of a job are there, or will not be, after lines were shown.
    """

    def __init__(self, store: Store, on_status: Callable[[str], None], on_end: Callable[[], None]) -> None:
        self._store = store
        self._on_status = on_status
        self._on_end = on_end

    @contextlib.contextmanager
    def taken(
        self,
        model: str,
        files: Iterable[ModelFile],
        *,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[tuple[LocalFile, ...]]:
        """As :meth:`Store.taken`."""
        lines = 0

        def show(line: str) -> None:
            nonlocal lines
            lines += 1
            self._on_status(line)

        seen = ProvisionProgress(show, lambda: None)
        seen.label = model

        def both(show: Progress) -> Progress:
            def moved(done: int, total: int | None) -> None:
                show(done, total)
                if progress is not None:
                    progress(done, total)

            return moved

        with contextlib.ExitStack() as held:
            try:
                local = held.enter_context(
                    self._store.taken(
                        model, files, progress=both(seen), reading=both(seen.reading), cancel=cancel
                    )
                )
            finally:
                if lines:
                    self._on_end()
            yield local

    def is_as_registered(self, path: Path, progress: Progress, cancel: threading.Event) -> bool:
        """As :meth:`Store.is_as_registered`."""
        return self._store.is_as_registered(path, progress, cancel)


def show_bytes(count: float) -> str:
    """``7.3 GB``, ``38 MB``: a size or a rate for people."""
    unit = next((each for each in ("GB", "MB") if count >= _UNITS[each]), "kB")
    value = count / _UNITS[unit]
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


_UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


def show_duration(seconds: float) -> str:
    """``50 s``, ``1 min 50 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _share(done: int, total: int | None) -> str:
    if not total:
        return show_bytes(done)
    return f"{min(100, 100 * done // total)}% of {show_bytes(total)}"


def _speed(rate: float | None, done: int, total: int | None) -> str:
    if not rate:
        return ""
    left = "" if total is None else f", {show_duration(max(0, total - done) / rate)} left"
    return f", {show_bytes(rate)}/s{left}"
