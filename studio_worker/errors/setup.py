"""The box is not as the configuration, or what the service needs of it, says."""

from __future__ import annotations

from typing import ClassVar

from studio_worker.errors.base import StudioWorkerError


class ConfigError(StudioWorkerError):
    """The configuration cannot be used.

    Args:
        problem: what is wrong, in a few words.
        cure: what the operator should do.
        source: the file, or ``environment variable NAME``, that holds the fault.
        line: 1-based line in that file, where known.
        key: dotted path of the key, e.g. ``worker.device``.
    """

    exit_status: ClassVar[int] = 78  # EX_CONFIG

    def __init__(
        self, problem: str, *, cure: str, source: str = "", line: int | None = None, key: str = ""
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.cure = cure
        self.source = source
        self.line = line
        self.key = key

    def __str__(self) -> str:
        where = f"{self.source}:{self.line}" if self.line is not None else self.source
        sentence = ": ".join(part for part in (where, self.key, self.problem) if part) + f"; {self.cure}"
        return " ".join(sentence.splitlines())  # names and values may hold line ends; this is one line


class StateUnavailable(ConfigError):
    """The state folder is held by another process, its disk takes nothing or is not mounted: that may pass,
    so systemd goes on trying.
    """

    exit_status: ClassVar[int] = 75  # EX_TEMPFAIL


class DeviceError(StudioWorkerError):
    """The device asked for is missing or unusable; the text names the cure."""

    exit_status: ClassVar[int] = 69  # EX_UNAVAILABLE
