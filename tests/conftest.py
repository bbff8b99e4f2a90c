"""Fixtures that several test modules share."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from studio_worker import context, sample_model
from studio_worker.box import process
from studio_worker.demo import write_configuration
from studio_worker.local_studio import LocalStudio

if TYPE_CHECKING:
    from tests.farm.postgres import Cluster

process.prepare()  # before a test module imports torch

# Nothing is timed in tests: a machine that is busy with something else must not make one fail.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _pictures_are_made_offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the engine's tests every attempt to reach the network fails."""
    if request.path.is_relative_to(Path(__file__).parent / "engine"):
        from tests.lab.engine import refuse_network

        refuse_network(monkeypatch)


@pytest.fixture(autouse=True)
def _caught_lines_carry_names(caplog: pytest.LogCaptureFixture) -> None:
    """What tests catch of the log is what the service's own handlers get."""
    caplog.handler.addFilter(context.add_names)


@pytest.fixture(autouse=True)
def _log_ends_with_its_test() -> Iterator[None]:
    """A command that a test ran in this process set up a log on a stream that is closed by now."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def studio(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LocalStudio]:
    """A real local studio on a free loopback port, serving the sample model. Tests that are marked
    ``welcoming_studio`` have one that lets every worker in.
    """
    is_welcoming = request.node.get_closest_marker("welcoming_studio") is not None
    with LocalStudio(
        tmp_path / "studio.sqlite3", models_dir=sample_model.WEIGHTS.parent, auto_approve=is_welcoming
    ) as running:
        yield running


@pytest.fixture
def site(tmp_path: Path, studio: LocalStudio) -> Path:
    """A configuration for a service of that studio; no model is required, so that READY comes at once."""
    (tmp_path / "work").mkdir()
    folder = write_configuration(studio, tmp_path / "work")
    (folder / "models.d" / "sample.json").unlink()
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A PostgreSQL server for this run. Without one installed its tests are skipped; FARM=1 promises one."""
    from tests.farm.postgres import Cluster, NotInstalled  # its driver is no part of an installed copy

    try:
        cluster = Cluster()
    except NotInstalled as missing:
        if os.environ.get("FARM"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    with cluster:
        yield cluster


@pytest.fixture
def database_url(postgres: Cluster) -> Iterator[str]:
    """The address of an empty database that is this test's alone."""
    name = postgres.create()
    yield postgres.url(name)
    postgres.drop(name)
