"""The configuration, read again while the service runs: what changes at once, and what a restart has to.

Everything is read and checked first; a fault leaves all as it was. Each setting's declaration says whether a
reload applies it.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from pathlib import Path

from studio_worker import config
from studio_worker.appliance.provisioning import LaterProvision
from studio_worker.config import Config
from studio_worker.config.current import Current
from studio_worker.config.downloads import policy_from, succeeding
from studio_worker.config.settings import differences, with_live_values
from studio_worker.errors import ConfigError
from studio_worker.report import logs
from studio_worker.report.notify import Notifier, ReadyLine
from studio_worker.transfer.policy import Policy

log = logging.getLogger(__name__)

REQUIRED_MODELS = "models.d"
"""How the set of required models is called among the keys; it changes at a reload."""


@dataclasses.dataclass(frozen=True)
class Reloaded:
    """What a reload comes to.

    ``config`` and ``policy`` hold from now on. ``applied`` names the keys that changed, ``needs_restart``
    those that changed in the files and stay what they were.
    """

    config: Config
    policy: Policy
    applied: tuple[str, ...]
    needs_restart: tuple[str, ...]


def read_again(directory: Path, current: Current) -> Reloaded:
    """Read and check everything in ``directory`` and compare it with what is ``current``.

    Raises:
        ConfigError: as :func:`config.load`, :func:`config.check_folders` and :func:`policy_from`.
    """
    wanted = config.load(directory)
    config.check_folders(wanted.settings)
    changed = differences(current.settings, wanted.settings)
    settings = with_live_values(current.settings, wanted.settings)
    applied = [each.key for each in changed if each.is_live]
    if wanted.required != current.required:
        applied.append(REQUIRED_MODELS)
    return Reloaded(
        config=Config(settings, wanted.required),
        # Always anew: a token may have changed in its file.
        policy=succeeding(current.policy, policy_from(settings)),
        applied=tuple(applied),
        needs_restart=tuple(each.key for each in changed if not each.is_live),
    )


class Reloader:
    """Replaces the ``current`` configuration when it is asked to.

    Args:
        later: fetches models that have become required.
    """

    def __init__(
        self, directory: Path, current: Current, notifier: Notifier, line: ReadyLine, later: LaterProvision
    ) -> None:
        self._directory = directory
        self._current = current
        self._notifier = notifier
        self._line = line
        self._later = later
        self.succeeded = True
        """Whether the files, as they were last read, are in effect, apart from what needs a restart."""
        self._is_allowed = self._is_wanted = False
        self._lock = threading.Lock()

    def request(self) -> None:
        """Reload now, or, before :meth:`allow`, then."""
        with self._lock:
            if self._is_allowed:
                self._reload()
            else:
                self._is_wanted = True
                log.info("reload waits until the service is ready", extra={"op": "reload"})

    def allow(self) -> None:
        """To be called after READY: before it, systemd would take a reload's end for that of the start."""
        with self._lock:
            self._is_allowed = True
            if self._is_wanted:
                self._reload()

    def _reload(self) -> None:
        self._notifier.reloading()
        self.succeeded = False
        try:
            self._replace(read_again(self._directory, self._current))
        except ConfigError as error:
            log.error("configuration not reloaded", extra={"op": "reload", "error": str(error)})
            self._line.note("reload", f"configuration not reloaded: {error}")
        except Exception:  # a fault of ours must not end the thread that hears SIGTERM
            log.exception("reload crashed", extra={"op": "reload"})
            self._line.note("reload", "configuration not reloaded: see the log")
        self._notifier.ready(str(self._line))

    def _replace(self, reloaded: Reloaded) -> None:
        self._current.replace(reloaded.config, reloaded.policy)
        # All others read it there; the log and a fetch that has to begin cannot.
        settings = reloaded.config.settings
        logs.configure(settings.log.level, settings.log.format)
        if REQUIRED_MODELS in reloaded.applied:
            self._later.begin(reloaded.config.required)
        self.succeeded = True
        restart = ", ".join(reloaded.needs_restart)
        self._line.note("reload", f"restart to apply: {restart}" if restart else "")
        log.log(
            logging.WARNING if restart else logging.INFO,
            "configuration reloaded",
            extra={"op": "reload", "applied": reloaded.applied, "restart_to_apply": reloaded.needs_restart},
        )
