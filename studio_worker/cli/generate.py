"""The command that makes one picture without a studio: the same store and engine, the picture to a file."""

from __future__ import annotations

import json
import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

import typer

from studio_worker import config
from studio_worker.box import process
from studio_worker.box.owner import written_by_caller
from studio_worker.cli.bars import PictureBar
from studio_worker.cli.model_choice import SAMPLE_ID, ChosenModel, find_model, weights_file
from studio_worker.cli.options import ConfigDir, Json, Negative, Size, pixels
from studio_worker.engine.parameters import MAX_SEED
from studio_worker.errors import ConfigError, DeviceError
from studio_worker.files import output_problem, write_atomic
from studio_worker.jobs import ImageTask, Picture
from studio_worker.models import CliDefaults, LocalFile
from studio_worker.report import logs

_Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Id of a model in models.d, a file like those there, a weights file, or the embedded one.",
    ),
]
_Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="png, webp or jpg by its name; - is stdout (png).",
        readable=False,
    ),
]
_Seed = Annotated[int | None, typer.Option(max=MAX_SEED, help="The same seed makes the same picture.")]
_Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.")]
_Cfg = Annotated[float | None, typer.Option(help="Guidance: how closely the prompt is followed.")]
_Sampler = Annotated[str | None, typer.Option(help="euler, euler_a, heun, dpm++2m, lcm, …")]
_Init = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A picture to start from (image-to-image).", readable=False),
]
_Mask = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="White where the picture may change (inpainting), or what is removed.",
        readable=False,
    ),
]
_Reference = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A picture to edit as the prompt says.", readable=False)
]
_Denoise = Annotated[
    float | None, typer.Option(min=0, max=1, help="With --init: how far it may change, 0 to 1.")
]
_Loras = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE[:WEIGHT]", help="A LoRA to apply; may be given several times."),
]
_Device = Annotated[
    str | None, typer.Option(help="cuda, cuda:N or cpu; default: as configured, else the GPU.")
]


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the picture shows.")],
    model: _Model = SAMPLE_ID,
    output: _Output = Path("picture.png"),
    negative: Negative = "",
    seed: _Seed = None,
    steps: _Steps = None,
    size: Size = None,
    cfg: _Cfg = None,
    sampler: _Sampler = None,
    init: _Init = None,
    mask: _Mask = None,
    ref: _Reference = None,
    denoise: _Denoise = None,
    lora: _Loras = None,
    device: _Device = None,
    directory: ConfigDir = config.DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Make one picture without a studio.

    Exit status 1 where the picture cannot be made as asked, 69 without a usable device, 74 where the model
    cannot be fetched.
    """
    process.prepare()
    logs.configure("error" if sys.stderr.isatty() else "warning", "text")
    if str(output) != "-" and (problem := output_problem(output)):
        raise ConfigError(problem, cure="name another -o FILE")
    chosen = find_model(model, directory)
    loras = _loras(lora or [])
    width, height = pixels(size)
    pictures = _Pictures.read(init, mask, ref)
    task = ImageTask(
        prompt=prompt + "".join(f" <lora:{file.path.stem}:{weight:g}>" for file, weight in loras),
        negative_prompt=negative or None,
        init_image_url=pictures.urls[0],
        mask_url=pictures.urls[1],
        ref_image_url=pictures.urls[2],
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
    order = _Order(task, defaults, tuple(file for file, _ in loras), pictures)
    picture = _make(chosen, order, _device_name(device, chosen), output)
    if str(output) != "-":
        _tell(output, picture, as_json=as_json)


@dataclass(frozen=True)
class _Pictures:
    """The pictures that it starts from (to start from, mask, reference), and what they are called."""

    contents: tuple[bytes | None, ...]
    urls: tuple[str | None, ...]

    @classmethod
    def read(cls, *paths: Path | None) -> _Pictures:
        return cls(
            tuple(None if path is None else path.read_bytes() for path in paths),
            tuple(None if path is None else f"file:{path.name}" for path in paths),
        )


@dataclass(frozen=True)
class _Order:
    """What is wanted of the engine, but for the model's files."""

    task: ImageTask
    defaults: CliDefaults
    loras: tuple[LocalFile, ...]
    pictures: _Pictures


def _device_name(given: str | None, chosen: ChosenModel) -> str:
    from studio_worker.box.device import find_device

    try:
        return find_device(given or chosen.device).name
    except DeviceError as error:
        raise DeviceError(f"{error} (or give --device cpu)" if given is None else str(error)) from error


def _make(chosen: ChosenModel, order: _Order, device: str, output: Path) -> Picture:
    """The picture, written to ``output``."""
    from studio_worker.engine import Inputs, Request, default_router
    from studio_worker.jobs import Cancel

    with ExitStack() as stack:
        file: IO[bytes] | None = None
        if str(output) == "-":
            file = sys.stdout.buffer
        elif chosen.owner is not None:
            file = stack.enter_context(written_by_caller(output, chosen.owner))
        progress = stack.enter_context(PictureBar())
        files = stack.enter_context(chosen.files(progress.fetched))
        engine = default_router(device).for_source(chosen.source)
        inputs = Inputs(*order.pictures.contents)
        request = Request("generate", chosen.name, order.task, order.defaults, (*files, *order.loras), inputs)
        progress.loading()
        picture = engine.generate(request, progress.stepped, Cancel())
        if file is None:
            write_atomic(output, picture.data, mode=0o644)
        else:
            file.write(picture.data)
    return picture


def _tell(output: Path, picture: Picture, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"file": str(output), "bytes": len(picture.data), **picture.meta}, indent=2))
    else:
        meta = picture.meta
        asked = f" (asked for {meta['askedWidth']}x{meta['askedHeight']})" if "askedWidth" in meta else ""
        typer.echo(f"{output}: {meta['width']}x{meta['height']}{asked}, seed {meta['seed']}")


def _loras(given: list[str]) -> list[tuple[LocalFile, float]]:
    found: list[tuple[LocalFile, float]] = []
    for each in given:
        parted = None if Path(each).exists() else re.fullmatch(r"(.+):(-?\d*\.?\d+)", each)
        path, weight = (parted[1], float(parted[2])) if parted else (each, 1.0)
        lora = weights_file("lora", Path(path))
        name = lora.path.stem  # weights go by it
        if any(other.path.stem == name for other, _ in found):
            raise typer.BadParameter(f"two LoRAs are called {name}; rename one of them", param_hint="--lora")
        found.append((lora, weight))
    return found
