"""The command that runs a studio of one's own: where it listens, where its data lie, how long they stay."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from studio_worker.cli.options import read_token, say
from studio_worker.errors import ConfigError
from studio_worker.report import logs


def _up_to(most: float) -> Callable[[float | None], float | None]:
    def check(value: float | None) -> float | None:
        if value is not None and not 0 <= value <= most:  # and nan is neither
            raise typer.BadParameter(f"{value:g} is not from 0 to {most:g}")
        return value

    return check


_Port = Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)]
_Data = Annotated[
    Path, typer.Option(metavar="DIR", help="Folder for the studio's database and pictures.", readable=False)
]
_Pictures = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE",
        help="S3 storage for the pictures, s3://BUCKET/PREFIX, found by the usual AWS_* variables; or another"
        " folder. Default: pictures in the data folder.",
    ),
]
_Database = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="postgresql://USER@HOST/NAME, with the password in ~/.pgpass or PGPASSWORD; or a SQLite file."
        " Default: a file in the data folder.",
    ),
]
_Models = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of model files to serve; default: models in the data folder.",
        readable=False,
    ),
]
_TokenFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="File with the token people need (required off loopback).", readable=False
    ),
]
_Certificate = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Speak https with this certificate (PEM, with those between it and its authority); SIGHUP"
        " reads a renewed one.",
        readable=False,
    ),
]
_Key = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Its key (PEM); default: in the certificate's file.", readable=False),
]
_BehindProxy = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ADDRESS",
        help="A proxy, or a network of them, that speaks https for the studio: what it says of its clients"
        " (X-Forwarded-Proto, -Host, -For) is believed. May be given several times.",
    ),
]
_PlainHttp = Annotated[
    bool,
    typer.Option("--plain-http", help="Off loopback without https: everybody on the way can read the token."),
]
_Drain = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        callback=_up_to(3600),
        help="On SIGTERM, serve on for so long and say at /health/ready that it is over, so that load"
        " balancers send nobody any more; a second signal ends it. Default: 5 with --behind-proxy, else 0.",
    ),
]
_ApproveAll = Annotated[
    bool, typer.Option("--approve-all", help="Approve every worker that asks (trusted networks only).")
]
_KeepDays = Annotated[
    float | None,
    typer.Option(
        metavar="DAYS", callback=_up_to(36_500), help="Remove finished and failed jobs that are older."
    ),
]
_KeepGb = Annotated[
    float | None,
    typer.Option(
        metavar="GB",
        callback=_up_to(1_000_000_000),
        help="Keep so much of results; the oldest are removed first.",
    ),
]


local_studio_app = typer.Typer(invoke_without_command=True)


@local_studio_app.callback()
def local_studio(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: _Port = 8765,
    data: _Data = Path("studio-data"),
    database: _Database = None,
    pictures: _Pictures = None,
    models: _Models = None,
    token_file: _TokenFile = None,
    certificate: _Certificate = None,
    key: _Key = None,
    behind_proxy: _BehindProxy = None,
    plain_http: _PlainHttp = False,
    drain: _Drain = None,
    approve_all: _ApproveAll = False,
    keep_days: _KeepDays = None,
    keep_gb: _KeepGb = None,
) -> None:
    """Run a small studio of your own: queue, approval, gallery.

    Off loopback it wants a token, and https: a certificate of its own, or a proxy in front that has one.
    Several with one PostgreSQL database are one studio.
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    logs.configure(fmt="text")  # it is a person who runs it
    token = read_token(token_file) if token_file is not None else None
    if key is not None and certificate is None:
        raise ConfigError("is the key of no certificate", key="--key", cure="name its --certificate too")

    from studio_worker.local_studio import Door, Retention, Tls, places_of, run_local_studio

    tls = None if certificate is None else Tls(certificate, key)
    places = places_of(data, database, pictures)
    served = models or _models_in(data, is_there=isinstance(places.database, Path))
    run_local_studio(
        places,
        Door(host, port, token, tls, tuple(behind_proxy or ()), plain_http, drain),
        models_dir=served,
        auto_approve=approve_all,
        retention=Retention(
            keep_s=None if keep_days is None else keep_days * 86_400,
            keep_bytes=None if keep_gb is None else int(keep_gb * 1e9),
        ),
        on_ready=lambda studio: _say_where(studio.door.told(studio.port), served),
    )


@local_studio_app.command()
def carry(
    source: Annotated[
        Path,
        typer.Option(
            "--from", metavar="DIR", help="Data folder of the studio, which stands still.", readable=False
        ),
    ],
    database: Annotated[
        str,
        typer.Option(metavar="URL", help="Empty database: postgresql://USER@HOST/NAME, or a SQLite file."),
    ],
    pictures: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Where its pictures go: a folder, or s3://BUCKET/PREFIX. Where it has them there already"
            " they stay, and are the new studio's.",
        ),
    ] = None,
) -> None:
    """Carry a studio from its SQLite file to another database, which must be empty.

    Jobs, workers, models, logs and pictures; the folder is only read. Model files in it stay there. One
    that was ended on its way can be repeated.
    """
    from studio_worker.local_studio import MODELS_FOLDER, carry_studio, places_of

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _end)
    carry_studio(source, places_of(source, database, pictures), say)
    there = f"--database {database}" + ("" if pictures is None else f" --pictures {pictures}")
    say(f"carried; start studios with {there}")
    if (source / MODELS_FOLDER).is_dir():
        say(f"model files were not carried: --models {source / MODELS_FOLDER} serves them")


def _end(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)  # by way of what removes the copy


def _refuse_options(context: typer.Context) -> None:
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{option} is an option of the studio that runs: leave it out here")


def _models_in(data: Path, *, is_there: bool) -> Path | None:
    """The folder of model files where none is named. Without a SQLite file there may be no data folder."""
    from studio_worker.local_studio import MODELS_FOLDER

    folder = data / MODELS_FOLDER
    return folder if is_there or folder.is_dir() else None


def _say_where(address: str, models: Path | None) -> None:
    typer.echo(f"local studio: {address}")
    files = (
        "with --models DIR workers fetch the files that lie there from here"
        if models is None
        else f"workers fetch the files that lie in {models.absolute()} from here"
    )
    typer.echo(f"models: add them on that page, under Models; {files}")
