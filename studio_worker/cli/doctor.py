"""The commands that look for faults: check-config before a start, doctor at any time."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import typer

from studio_worker import config
from studio_worker.box.owner import become, owner_of
from studio_worker.cli.options import ConfigDir, Instance, Json, say
from studio_worker.errors import StudioWorkerError
from studio_worker.network.urls import safe_url
from studio_worker.plain import plain
from studio_worker.report import logs

_MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "failure": ("FAILURE", "red")}


def check_config(directory: ConfigDir = config.DEFAULT_DIR, as_json: Json = False) -> None:
    """Check what must hold before a start; exit status 78 and one line with file, key and cure where not."""
    from studio_worker.config.downloads import policy_from
    from studio_worker.studio.http.identity import IdentityFile, identity_name

    loaded = config.load(directory)
    policy_from(loaded.settings)
    become(owner_of(loaded.settings.state.dir, loaded.settings.models.root))
    config.check_folders(loaded.settings, make=False)
    for lane in range(1, loaded.settings.worker.lanes + 1):
        if (identity := loaded.settings.state.dir / identity_name(lane)).exists():
            IdentityFile(identity).load()
    if as_json:
        typer.echo(json.dumps(_without_secrets(loaded.settings.model_dump(mode="json")), indent=2))
        return
    count = len(loaded.required)
    studio = safe_url(loaded.settings.studio.api_base_url)
    typer.echo(f"{directory}: configuration is valid; {count} required model(s); studio {studio}")


def _without_secrets(shown: Any) -> Any:
    """Every address in it, whatever the key, as it may be told: a password or token may be anywhere."""
    if isinstance(shown, dict):
        return {_without_secrets(key): _without_secrets(value) for key, value in shown.items()}
    return safe_url(shown) if isinstance(shown, str) and "://" in shown else shown


def doctor(
    directory: ConfigDir = config.DEFAULT_DIR,
    instance: Instance = None,  # noqa: ARG001  (it has had its effect)
    as_json: Json = False,
) -> None:
    """Look at everything the worker needs, each line with its cure; exit status 1 where something fails."""
    from studio_worker.doctor import Box, examine
    from studio_worker.doctor.checks import CHECKS
    from studio_worker.report.control import ask, runtime_dir
    from studio_worker.report.snapshot import Snapshot

    logs.configure("critical")  # what is wrong is told here, not logged
    loaded = service = None
    with contextlib.suppress(StudioWorkerError):  # its check tells it
        loaded = config.load(directory)
        folder = runtime_dir(loaded.settings.state.runtime_dir)
        with contextlib.suppress(ValueError):
            service = Snapshot.model_validate(ask(folder, "status", limit_s=3.0))
    box = Box(Path(directory), loaded, service)
    own, *others = CHECKS  # the configuration, with tokens that may be root's alone
    findings = examine(box, [own])
    if loaded is not None:
        become(owner_of(loaded.settings.state.dir, loaded.settings.models.root))
    findings += examine(box, others)
    failed = any(finding.level == "failure" for finding in findings)
    if as_json:
        shown = {"ok": not failed, "findings": [vars(finding) for finding in findings]}
        typer.echo(json.dumps(shown, indent=2))
    else:
        for finding in findings:
            word, color = _MARKS[finding.level]
            typer.echo(f"{typer.style(f'{word:8}', fg=color)} {finding.check}: {plain(finding.text)}")
            if finding.cure:
                say(f"{'':8} → {finding.cure}")
    if sys.stdout is not None:  # closed by the caller
        sys.stdout.flush()
    os._exit(1 if failed else 0)  # a check that hangs in a driver must not hold up the end
