"""Which model a picture is made with, by the name that the caller gave it, and where its files are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from studio_worker import config, sample_model
from studio_worker.box.owner import Owner, become, owner_of
from studio_worker.config.documents import read_document
from studio_worker.errors import ConfigError
from studio_worker.models import CliDefaults, LocalFile, ModelSource
from studio_worker.wording import fault

SAMPLE_ID = "sample-model"

_ENGINES = {".safetensors": "sd-cpp", ".gguf": "sd-cpp", ".onnx": "onnx"}
"""What reads a weights file, by its name's end."""


@dataclass(frozen=True)
class ChosenModel:
    """A model to use. ``local`` are its files where nothing has to be fetched."""

    name: str
    source: ModelSource
    device: str
    loaded: config.Config | None = None
    local: tuple[LocalFile, ...] = ()

    @property
    def defaults(self) -> CliDefaults:
        return self.source.cli_defaults

    @property
    def owner(self) -> Owner | None:
        """Whose rights the models folder wants of root."""
        if self.loaded is None:
            return None
        settings = self.loaded.settings
        return owner_of(settings.state.dir, settings.models.root)

    @contextmanager
    def files(self, progress: Any) -> Iterator[tuple[LocalFile, ...]]:
        if self.loaded is None:
            yield self.local
            return
        from studio_worker.appliance.provisioning import open_store
        from studio_worker.config.current import Current
        from studio_worker.config.downloads import policy_from

        policy = policy_from(self.loaded.settings)  # with tokens that may be the caller's alone
        become(self.owner)
        config.check_folders(self.loaded.settings)
        store = open_store(Current(self.loaded, policy))
        with store.taken(self.name, self.source.files, progress=progress) as files:
            yield files


def find_model(name: str, directory: Path) -> ChosenModel:
    """
    Raises:
        ConfigError: there is no such model, or the configuration or its file is wrong.
    """
    path = Path(name)
    is_weights = path.suffix in _ENGINES
    if name == SAMPLE_ID or is_weights:
        # Neither needs a configuration; where there is one, its device holds.
        has_config = (directory / "config.toml").exists()
        device = config.load(directory).settings.worker.device if has_config else "auto"
        if not is_weights:
            local = LocalFile("model", sample_model.WEIGHTS, sample_model.SHA256)
            defaults = CliDefaults.model_validate(sample_model.DEFAULTS)
            source = ModelSource(engine="sd-cpp", cli_defaults=defaults)
            # Faster on a CPU than a GPU would be started.
            return ChosenModel(SAMPLE_ID, source, "cpu" if device == "auto" else device, local=(local,))
        source = ModelSource(engine=_ENGINES[path.suffix])
        return ChosenModel(path.name, source, device, local=(weights_file("model", path),))
    loaded = config.load(directory)
    device = loaded.settings.worker.device
    if path.suffix in {".json", ".toml"}:
        return ChosenModel(path.stem, _read_source(path), device, loaded)
    for required in loaded.required:
        if required.id == name:
            return ChosenModel(name, required, device, loaded)
    known = ", ".join([*(required.id for required in loaded.required), SAMPLE_ID])
    raise ConfigError(f"no model {name!r}", source=str(directory / "models.d"), cure=f"known: {known}")


def _read_source(path: Path) -> ModelSource:
    document = read_document(path, cure_if_missing="name a file like those in models.d")
    try:
        return ModelSource.model_validate(document.values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            fault(first),
            source=str(path),
            key=".".join(str(part) for part in first["loc"]),
            cure="write engine, files and cliDefaults as in models.d",
        ) from error


def weights_file(role: Any, path: Path) -> LocalFile:
    """A file of the caller's own: known by what the file system says of it, since nobody has hashed it."""
    stat = path.stat()
    return LocalFile(role, path, f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}")
