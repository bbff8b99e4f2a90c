"""The commands about the models on this box. Root becomes the user whose folders they are (owner.py)."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from studio_worker import config
from studio_worker.box.owner import Owner, become, give_folder, owner_of, written_by_caller
from studio_worker.cli.bars import FileBars
from studio_worker.cli.options import ConfigDir, Json, cell, say, show
from studio_worker.report import logs

models_app = typer.Typer(no_args_is_help=True, help="The models on this box.")


@models_app.command("list")
def models_list(directory: ConfigDir = config.DEFAULT_DIR, as_json: Json = False) -> None:
    """Show every model file: state, size, required or on demand, where it is in memory, last use."""
    from rich.box import SIMPLE
    from rich.table import Table

    from studio_worker.appliance.provisioning import show_bytes

    loaded, store = _opened(_Setup.of(directory))
    places = _in_memory(loaded)
    rows = [{**row, "in_memory": places.get(row["model"])} for row in _rows(loaded, store)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        say("no models: models.d requires none, and no offer has brought one")
        return
    table = Table(box=SIMPLE)
    for name in ("model", "role", "file", "state", "size", "kept", "in memory", "last use (UTC)"):
        table.add_column(name, overflow="fold", no_wrap=name in {"state", "size", "kept"})
    for row in rows:
        table.add_row(
            cell(row["model"]),
            cell(row["role"]),
            cell(row["file"]),
            cell(row["state"]),
            show_bytes(row["size_bytes"]) if row["size_bytes"] else "",
            "required" if row["required"] else "on demand",
            cell(row["in_memory"] or ""),
            (row["last_used"] or "never").replace("T", " ")[:16],
        )
    show(table)


@models_app.command("pull")
def models_pull(directory: ConfigDir = config.DEFAULT_DIR) -> None:
    """Download and verify every required model now: a progress bar for each file, or log lines in a pipe."""
    from studio_worker.appliance.provisioning import ProvisionProgress, provision

    loaded, store = _opened(_Setup.of(directory))
    if sys.stderr.isatty():
        logs.configure("warning")
        with FileBars() as bars:
            for model in loaded.required:
                store.ensure(model.files, model=model.id, watch=bars)
    else:
        logs.configure("info", loaded.settings.log.format)
        progress = ProvisionProgress(lambda _: None, lambda: None)
        provision(store, loaded.required, progress, threading.Event())
    say(f"{len(loaded.required)} required model(s) verified")


@models_app.command("verify")
def models_verify(
    directory: ConfigDir = config.DEFAULT_DIR,
    repair: Annotated[
        bool, typer.Option("--repair/--no-repair", help="Fetch damaged files again, or only look.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Read every model file and compare its hash; damaged and missing ones are fetched again."""
    from studio_worker.errors import DownloadError
    from studio_worker.store import Checked

    results: list[Checked] = []

    def tell(checked: Checked) -> None:
        results.append(checked)
        if not as_json:
            say(f"{checked.state:10} {checked.size_bytes / 1e6:10.1f} MB  {checked.path}")
            if checked.error:
                say(f"{'':10} {checked.error}")

    loaded, store = _opened(_Setup.of(directory))
    with FileBars() as bars:
        logs.configure("error" if sys.stderr.isatty() else "warning", loaded.settings.log.format)
        for checked in store.verify(bars.whole("reading"), on_damage="repair" if repair else "leave"):
            tell(checked)
        seen = {checked.path for checked in results}
        for file in (file for model in loaded.required for file in model.files):
            if (path := store.path(file)) in seen:  # required, and never verified here
                continue
            seen.add(path)
            try:
                if repair:
                    store.ensure([file], progress=bars.whole("fetching"))
                    tell(Checked(path, "repaired", path.stat().st_size))
                else:
                    tell(Checked(path, "missing", 0))
            except DownloadError as error:
                tell(Checked(path, "missing", 0, str(error)))
    wrong = sum(not checked.is_right for checked in results)
    if as_json:
        shown = [{**vars(checked), "path": str(checked.path)} for checked in results]
        typer.echo(json.dumps(shown, indent=2))
    else:
        say(f"{len(results) - wrong} file(s) verified")
        if wrong:
            cure = "see above" if repair else "`studio-worker models verify` fetches them again"
            say(f"{wrong} file(s) damaged, missing or not readable; {cure}")
    if wrong:
        raise typer.Exit(1)


@models_app.command("prune")
def models_prune(
    directory: ConfigDir = config.DEFAULT_DIR,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove on-demand models that are not in use, and downloads nobody goes on with."""
    from studio_worker.appliance.provisioning import show_bytes

    _, store = _opened(_Setup.of(directory))
    pruned = store.prune(dry_run=dry_run)
    would = "would be " if dry_run else ""
    for removal in pruned.models:
        say(f"{would}removed: {removal.model}, {show_bytes(removal.size_bytes)}")
    if pruned.staging_bytes:
        say(f"{would}removed: unfinished downloads, {show_bytes(pruned.staging_bytes)}")
    for path in pruned.strangers:
        say(f"unknown, left alone: {path}")
    if not pruned.models and not pruned.staging_bytes:
        typer.echo("nothing to remove: all models are required or in use, and no download is unfinished")
        return
    freed = pruned.staging_bytes + sum(removal.size_bytes for removal in pruned.models)
    say(f"{show_bytes(freed)} {would}freed")


@models_app.command("export")
def models_export(
    dest: Annotated[
        Path, typer.Argument(metavar="DEST", help="A folder, or a file that ends in .tar.", readable=False)
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Which models; default: the required ones."),
    ] = None,
    directory: ConfigDir = config.DEFAULT_DIR,
) -> None:
    """Write models into a bundle, for a box without network."""
    from studio_worker.store import store_errors
    from studio_worker.store.bundles import export_bundle

    setup = _Setup.of(directory)
    with store_errors(dest), contextlib.ExitStack() as stack:
        tar = None
        if dest.suffix == ".tar":  # made with the caller's rights, whoever's the models are
            tar = stack.enter_context(written_by_caller(dest, setup.owner))
        else:
            give_folder(dest, setup.owner)
        loaded, store = _opened(setup)
        bars = stack.enter_context(FileBars())
        manifest = export_bundle(store, dest, loaded.required, models or (), bars.of_bundle, tar=tar)
    say(f"{dest}: {len(manifest.files)} file(s)")


@models_app.command("import")
def models_import(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A bundle: a folder or a tar file.", readable=False)
    ],
    directory: ConfigDir = config.DEFAULT_DIR,
) -> None:
    """Verify a bundle's files and place them; can be repeated."""
    from studio_worker.store import store_errors
    from studio_worker.store.bundles import import_bundle

    setup = _Setup.of(directory)
    with store_errors(source), contextlib.ExitStack() as stack:
        # Opened with the caller's rights; a folder's files have to be readable for the models' owner.
        tar = None if source.is_dir() else stack.enter_context(source.open("rb"))
        _, store = _opened(setup)
        bars = stack.enter_context(FileBars())
        manifest = import_bundle(store, source, bars.of_bundle, tar=tar)
    say(f"{len(manifest.files)} file(s) verified and placed")


class _Setup(NamedTuple):
    """The configuration with what only the caller may read of it, and whose folders they are."""

    loaded: config.Config
    policy: Any
    owner: Owner | None

    @classmethod
    def of(cls, directory: Path) -> _Setup:
        """
        Raises:
            ConfigError: the configuration is wrong.
        """
        from studio_worker.config.downloads import policy_from

        loaded = config.load(directory)
        settings = loaded.settings
        return cls(loaded, policy_from(settings), owner_of(settings.state.dir, settings.models.root))


def _opened(setup: _Setup) -> tuple[config.Config, Any]:
    """The configuration and the models folder, with the rights of its owner from now on."""
    from studio_worker.appliance.provisioning import open_store
    from studio_worker.config.current import Current

    become(setup.owner)
    config.check_folders(setup.loaded.settings)
    return setup.loaded, open_store(Current(setup.loaded, setup.policy))


def _rows(loaded: config.Config, store: Any) -> list[dict[str, Any]]:
    from studio_worker.store.ledger import file_name

    entries = store.entries()

    def row(model: str, role: str, name: str, state: str, size: int, *, required: bool) -> dict[str, Any]:
        at = entries[name].models.get(model) if name in entries else None
        return {
            "model": model,
            "role": role,
            "file": name.partition("/")[2],
            "state": state,
            "size_bytes": size,
            "required": required,
            "last_used": datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds") if at else None,
            "path": str(store.root / name),
        }

    rows = []
    for model in loaded.required:
        for file in model.files:
            name = file_name(file)
            is_verified = store.is_verified(file)
            size = entries[name].size if is_verified else file.approx_bytes or 0
            state = "verified" if is_verified else "missing"
            rows.append(row(model.id, file.role, name, state, size, required=True))
    named = {row["path"] for row in rows}
    for name, entry in sorted(entries.items()):
        if str(store.root / name) not in named:
            state = "verified" if store.holds(name, entry.sha256) else "missing"
            rows += [
                row(model, "", name, state, entry.size, required=False) for model in entry.models or ("",)
            ]
    return rows


def _in_memory(loaded: config.Config) -> dict[str, str]:
    """Where the running service has each model loaded; nothing where it does not run."""
    from studio_worker.errors import StudioWorkerError
    from studio_worker.report.control import ask, runtime_dir
    from studio_worker.report.snapshot import Snapshot

    try:
        answer = ask(runtime_dir(loaded.settings.state.runtime_dir), "status")
    except StudioWorkerError:
        return {}
    return {each.model: each.place for each in Snapshot.model_validate(answer).resident}
