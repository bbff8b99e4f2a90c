"""The command that makes one picture without a studio: the same store and engine, the picture to a file."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from pydantic import ValidationError

from studio_worker import config, sample_model
from studio_worker.box import process
from studio_worker.box.owner import Owner, become, owner_of, written_by_caller
from studio_worker.cli.bars import PictureBar
from studio_worker.cli.options import ConfigDir, Json
from studio_worker.config.documents import read_document
from studio_worker.errors import ConfigError, DeviceError
from studio_worker.files import output_problem, write_atomic
from studio_worker.models import CliDefaults, LocalFile, ModelSource
from studio_worker.report import logs

SAMPLE_ID = "sample-model"

_ENGINES = {".safetensors": "sd-cpp", ".gguf": "sd-cpp", ".onnx": "onnx"}
"""What reads a weights file, by its name's end."""


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the picture shows.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Id of a model in models.d, a file like those there, a weights file, or the embedded one.",
        ),
    ] = SAMPLE_ID,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="png, webp or jpg by its name; - is stdout (png)."
        ),
    ] = Path("picture.png"),
    negative: Annotated[str, typer.Option(help="What the picture must not show.")] = "",
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same picture.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Size in pixels, or one number for a square.")
    ] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance: how closely the prompt is followed.")] = None,
    sampler: Annotated[str | None, typer.Option(help="euler, euler_a, heun, dpm++2m, lcm, …")] = None,
    init: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A picture to start from (image-to-image).")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="White where the picture may change (inpainting), or what is removed."
        ),
    ] = None,
    ref: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A picture to edit as the prompt says.")
    ] = None,
    denoise: Annotated[
        float | None, typer.Option(min=0, max=1, help="With --init: how far it may change, 0 to 1.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:WEIGHT]", help="A LoRA to apply; may be given several times."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:N or cpu; default: as configured, else the GPU.")
    ] = None,
    directory: ConfigDir = config.DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Make one picture without a studio.

    Exit status 1 where the picture cannot be made as asked, 69 without a usable device, 74 where the model
    cannot be fetched.
    """
    from studio_worker.box.device import find_device
    from studio_worker.engine import Inputs, Request, default_router
    from studio_worker.jobs import Cancel, ImageTask

    process.prepare()
    logs.configure("error" if sys.stderr.isatty() else "warning", "text")
    if str(output) != "-" and (problem := output_problem(output)):
        raise ConfigError(problem, cure="name another -o FILE")
    chosen = _find_model(model, directory)
    loras = _loras(lora or [])
    width, height = _size(size)
    inputs = Inputs(*(None if path is None else path.read_bytes() for path in (init, mask, ref)))
    urls = [None if path is None else f"file:{path.name}" for path in (init, mask, ref)]
    task = ImageTask(
        prompt=prompt + "".join(f" <lora:{file.path.stem}:{weight:g}>" for file, weight in loras),
        negative_prompt=negative or None,
        init_image_url=urls[0],
        mask_url=urls[1],
        ref_image_url=urls[2],
        cfg_scale=cfg,
        sampling_method=sampler,
        width=width,
        height=height,
        seed=seed,
        ext="png" if str(output) == "-" else output.suffix.removeprefix(".").lower(),
        **({} if denoise is None else {"denoise": denoise}),
    )
    # By the protocol, steps of exactly 20 in a task say nothing; here they were given.
    defaults = chosen.defaults if steps is None else chosen.defaults.model_copy(update={"steps": steps})
    try:
        found = find_device(device or chosen.device)
    except DeviceError as error:
        raise DeviceError(f"{error} (or give --device cpu)" if device is None else str(error)) from error
    with ExitStack() as stack:
        file: IO[bytes] | None = None
        if str(output) == "-":
            file = sys.stdout.buffer
        elif chosen.owner is not None:
            file = stack.enter_context(written_by_caller(output, chosen.owner))
        progress = stack.enter_context(PictureBar())
        files = stack.enter_context(chosen.files(progress.fetched))
        engine = default_router(found.name).for_source(chosen.source)
        request = Request(
            "generate", chosen.name, task, defaults, (*files, *(file for file, _ in loras)), inputs
        )
        progress.loading()
        picture = engine.generate(request, progress.stepped, Cancel())
        if file is None:
            write_atomic(output, picture.data, mode=0o644)
        else:
            file.write(picture.data)
    if str(output) == "-":
        return
    if as_json:
        typer.echo(json.dumps({"file": str(output), "bytes": len(picture.data), **picture.meta}, indent=2))
    else:
        meta = picture.meta
        asked = f" (asked for {meta['askedWidth']}x{meta['askedHeight']})" if "askedWidth" in meta else ""
        typer.echo(f"{output}: {meta['width']}x{meta['height']}{asked}, seed {meta['seed']}")


# --- which model ---


@dataclass(frozen=True)
class _Model:
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
        from studio_worker.config.downloads import policy_from

        policy = policy_from(self.loaded.settings)  # with tokens that may be the caller's alone
        become(self.owner)
        config.check_folders(self.loaded.settings)
        with open_store(config.Current(self.loaded, policy)).taken(
            self.name, self.source.files, progress=progress
        ) as files:
            yield files


def _find_model(name: str, directory: Path) -> _Model:
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
            return _Model(SAMPLE_ID, source, "cpu" if device == "auto" else device, local=(local,))
        source = ModelSource(engine=_ENGINES[path.suffix])
        return _Model(path.name, source, device, local=(_weights_file("model", path),))
    loaded = config.load(directory)
    device = loaded.settings.worker.device
    if path.suffix in {".json", ".toml"}:
        return _Model(path.stem, _read_source(path), device, loaded)
    for required in loaded.required:
        if required.id == name:
            return _Model(name, required, device, loaded)
    known = ", ".join([*(required.id for required in loaded.required), SAMPLE_ID])
    raise ConfigError(f"no model {name!r}", source=str(directory / "models.d"), cure=f"known: {known}")


def _read_source(path: Path) -> ModelSource:
    document = read_document(path, cure_if_missing="name a file like those in models.d")
    try:
        return ModelSource.model_validate(document.values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            str(first["msg"]),
            source=str(path),
            key=".".join(str(part) for part in first["loc"]),
            cure="write engine, files and cliDefaults as in models.d",
        ) from error


def _weights_file(role: Any, path: Path) -> LocalFile:
    """A file of the caller's own: known by what the file system says of it, since nobody has hashed it."""
    stat = path.stat()
    return LocalFile(role, path, f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}")


def _loras(given: list[str]) -> list[tuple[LocalFile, float]]:
    found: list[tuple[LocalFile, float]] = []
    for each in given:
        parted = None if Path(each).exists() else re.fullmatch(r"(.+):(-?\d*\.?\d+)", each)
        path, weight = (parted[1], float(parted[2])) if parted else (each, 1.0)
        lora = _weights_file("lora", Path(path))
        name = lora.path.stem  # weights go by it
        if any(other.path.stem == name for other, _ in found):
            raise typer.BadParameter(f"two LoRAs are called {name}; rename one of them", param_hint="--lora")
        found.append((lora, weight))
    return found


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    width, by, height = size.lower().partition("x")
    try:
        sides = int(width), int(height if by else width)
    except ValueError:
        sides = -1, -1
    if min(sides) < 0:
        raise typer.BadParameter(f"{size}: write e.g. 1024x768", param_hint="--size")
    return sides
