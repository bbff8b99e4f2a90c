"""A local studio, and a worker of it that a test plays."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from studio_worker.local_studio import LocalStudio, Places
from studio_worker.local_studio.pictures import Folder
from tests.fakes.machine import PICTURE, Machine

if TYPE_CHECKING:
    from tests.local_studio.on_postgres import OnPostgres


@pytest.fixture(scope="session")
def on_postgres() -> Iterator[OnPostgres | None]:
    """With FARM=1, as ``make test-farm`` says, the studios of all these tests are on PostgreSQL."""
    if not os.environ.get("FARM"):
        yield None
        return
    from tests.local_studio.on_postgres import OnPostgres  # its driver is no part of what runs without

    with OnPostgres() as databases:
        yield databases


@pytest.fixture(scope="module", autouse=True)
def _places_are_there(on_postgres: OnPostgres | None) -> Iterator[None]:
    """For the tests of this folder alone: others that come after them in one process say themselves where."""
    with pytest.MonkeyPatch.context() as patch:
        if on_postgres is not None:
            patch.setattr("studio_worker.local_studio.studio.open_places", on_postgres.open)
        yield


@pytest.fixture(autouse=True)
def _database(request: pytest.FixtureRequest, on_postgres: OnPostgres | None) -> Iterator[None]:
    """What a test has on PostgreSQL goes with it; tests of the file itself stay with SQLite."""
    if on_postgres is None:
        yield
        return
    if request.node.get_closest_marker("sqlite"):
        pytest.skip("about SQLite's file")
    with on_postgres.dropping():
        yield


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[LocalStudio]:
    with LocalStudio(tmp_path / "studio.sqlite3") as running:
        yield running


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStudio]:
    """One studio for all tests that leave no jobs behind."""
    with LocalStudio(tmp_path_factory.mktemp("studio") / "studio.sqlite3") as running:
        yield running


@pytest.fixture
def machine(studio: LocalStudio) -> Iterator[Machine]:
    worker = Machine(studio).connect()
    yield worker
    assert worker.socket is not None
    worker.socket.close()


@pytest.fixture
def there(tmp_path: Path, on_postgres: OnPostgres | None) -> Places:
    """A new place: a SQLite file or, for `make test-farm`, a PostgreSQL database; and a folder."""
    folder = tmp_path / "there"
    file = folder / "studio.sqlite3"
    return Places(file if on_postgres is None else on_postgres.url(file), Folder(folder / "pictures"))


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A studio's file of the first schema: a worker, a model, an input picture and a log line, two jobs that
    wait, of which one was rejected, and two of November 2025 that are done and have failed.
    """
    return _restored(tmp_path, "local-studio-1.sql")


@pytest.fixture
def before_revisions(tmp_path: Path) -> Path:
    """The same of the last schema that ``user_version`` counted; its pictures lie in their folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "done-5d0776fa846e7ebc.webp").write_bytes(PICTURE)
    (folder / "input-caed10f440b0a12c.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return _restored(tmp_path, "local-studio-3.sql")


def _restored(folder: Path, name: str) -> Path:
    path = folder / "studio.sqlite3"
    connection = sqlite3.connect(path)
    connection.executescript((Path(__file__).parents[1] / "data" / name).read_text(encoding="utf-8"))
    connection.close()
    return path
