"""The configuration as it is now. A reload replaces it as a whole; everybody else reads it when they need it.

Who keeps a value that may change keeps an old one. Rooms that know nothing of the configuration are given a
function that reads it here.
"""

from __future__ import annotations

from studio_worker.config.loading import Config
from studio_worker.config.settings import Settings
from studio_worker.models import RequiredModel
from studio_worker.transfer.policy import Policy


class Current:
    """Safe from any thread."""

    def __init__(self, loaded: Config, policy: Policy) -> None:
        self._now = loaded, policy

    @property
    def config(self) -> Config:
        return self._now[0]

    @property
    def settings(self) -> Settings:
        return self._now[0].settings

    @property
    def required(self) -> tuple[RequiredModel, ...]:
        return self._now[0].required

    @property
    def policy(self) -> Policy:
        return self._now[1]

    def replace(self, loaded: Config, policy: Policy) -> None:
        self._now = loaded, policy
