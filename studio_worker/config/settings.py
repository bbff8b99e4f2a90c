"""The settings as a whole: the sections, what wins where a value is given twice, what a reload changes.

The keys are declared in sections.py; what is said of a wrong value is loading.py's work.
"""

from __future__ import annotations

from typing import Any

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as SettingsError

from studio_worker.config.declaration import Declared, declared_in
from studio_worker.config.sections import (
    LogSection,
    MetricsSection,
    ModelsSection,
    StateSection,
    StudioSection,
    WorkerSection,
)

ENV_PREFIX = "STUDIO_WORKER_"
ENV_SEPARATOR = "__"


class Settings(BaseSettings):
    """The whole of them."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_SEPARATOR,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    studio: StudioSection = StudioSection()
    worker: WorkerSection = WorkerSection()
    models: ModelsSection = ModelsSection()
    state: StateSection = StateSection()
    log: LogSection = LogSection()
    metrics: MetricsSection = MetricsSection()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  (the signature is the library's)
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The files' values come in as init arguments; the environment wins over them.
        return env_settings, init_settings


DECLARED = {each.key: each for each in declared_in(Settings)}
"""Every setting by its key, in order."""


def differences(old: Settings, new: Settings) -> list[Declared]:
    """The settings whose values differ, in order."""
    return [each for each in DECLARED.values() if each.of(old) != each.of(new)]


def with_live_values(old: Settings, new: Settings) -> Settings:
    """``old`` with the values of ``new`` for every setting that may change while the service runs."""
    live: dict[str, dict[str, Any]] = {}
    for each in DECLARED.values():
        if each.is_live:
            live.setdefault(each.section, {})[each.name] = each.of(new)
    sections = {name: getattr(old, name).model_copy(update=values) for name, values in live.items()}
    return old.model_copy(update=sections)
