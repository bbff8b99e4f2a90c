"""The configuration, read again while the service runs: what changes at once, and what a restart has to.

Everything is read and checked first; a fault leaves all as it was. The service carries out what is decided
here.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from studio_worker import config
from studio_worker.config import Config
from studio_worker.config.declaration import Declared
from studio_worker.config.downloads import policy_from
from studio_worker.config.settings import DECLARED, Settings
from studio_worker.errors import ConfigError
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


def read_again(directory: Path, running: Config, policy: Policy) -> Reloaded:
    """Read and check everything in ``directory`` and compare it with what is ``running``.

    Raises:
        ConfigError: as :func:`config.load`, :func:`config.check_folders` and :func:`policy_from`.
    """
    wanted = config.load(directory)
    config.check_folders(wanted.settings)
    changed = _differences(running.settings, wanted.settings)
    settings = _with_live_keys(running.settings, wanted.settings)
    # Always: a token may have changed in its file.
    new_policy = dataclasses.replace(policy_from(settings), on_end=policy.on_end, on_wait=policy.on_wait)
    # The same objects, or downloads under way and new ones would each take all that is allowed.
    if policy.limit and new_policy.limit and policy.limit.bytes_per_s == new_policy.limit.bytes_per_s:
        new_policy = dataclasses.replace(new_policy, limit=policy.limit)
    if policy.connections.most == new_policy.connections.most:
        new_policy = dataclasses.replace(new_policy, connections=policy.connections)
    applied = tuple(each.key for each in changed if each.is_live)
    if wanted.required != running.required:
        applied += (REQUIRED_MODELS,)
    return Reloaded(
        config=Config(settings, wanted.required),
        policy=new_policy,
        applied=applied,
        needs_restart=tuple(each.key for each in changed if not each.is_live),
    )


class Reloader:
    """Holds the configuration that is running, and replaces it when it is asked to.

    Args:
        adopt: carries out what a reload comes to, where asking for ``config`` and ``policy`` anew is not
            enough.
    """

    def __init__(
        self,
        directory: Path,
        running: Config,
        policy: Policy,
        notifier: Notifier,
        line: ReadyLine,
        adopt: Callable[[Reloaded], None],
    ) -> None:
        self.config = running
        self.policy = policy
        self._directory = directory
        self._notifier = notifier
        self._line = line
        self._adopt = adopt
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
            self._replace(read_again(self._directory, self.config, self.policy))
        except ConfigError as error:
            log.error("configuration not reloaded", extra={"op": "reload", "error": str(error)})
            self._line.note("reload", f"configuration not reloaded: {error}")
        except Exception:  # a fault of ours must not end the thread that hears SIGTERM
            log.exception("reload crashed", extra={"op": "reload"})
            self._line.note("reload", "configuration not reloaded: see the log")
        self._notifier.ready(str(self._line))

    def _replace(self, reloaded: Reloaded) -> None:
        self.config, self.policy = reloaded.config, reloaded.policy
        self._adopt(reloaded)
        self.succeeded = True
        restart = ", ".join(reloaded.needs_restart)
        self._line.note("reload", f"restart to apply: {restart}" if restart else "")
        log.log(
            logging.WARNING if restart else logging.INFO,
            "configuration reloaded",
            extra={"op": "reload", "applied": reloaded.applied, "restart_to_apply": reloaded.needs_restart},
        )


def _differences(old: Settings, new: Settings) -> list[Declared]:
    return [each for each in DECLARED.values() if each.of(old) != each.of(new)]


def _with_live_keys(old: Settings, new: Settings) -> Settings:
    """``old`` with the values of ``new`` for every key that may change while the service runs."""
    sections: dict[str, BaseModel] = {}
    for each in DECLARED.values():
        if each.is_live:
            before = sections.get(each.section, getattr(old, each.section))
            sections[each.section] = before.model_copy(update={each.name: each.of(new)})
    return old.model_copy(update=sections)
