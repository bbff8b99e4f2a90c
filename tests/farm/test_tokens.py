"""Processes of one studio that were given different tokens."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import select

from studio_worker.local_studio import Door, LocalStudio, Places
from studio_worker.local_studio.pictures import Folder
from studio_worker.local_studio.storage.tables import meta

OLD, NEW = "the token of yesterday", "the token of tomorrow"
TOLD = "this studio's processes were started with different tokens"


class Farm(ExitStack):
    """Processes of one studio."""

    def __init__(self, url: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        super().__init__()
        self._places = Places(url, Folder(folder / "pictures"))
        self._caplog = caplog

    def start(self, token: str | None) -> LocalStudio:
        return self.enter_context(LocalStudio(self._places, door=Door(token=token)))

    def told(self) -> int:
        """How often it was told since this was last asked."""
        records = [record for record in self._caplog.records if record.getMessage() == TOLD]
        assert all("--token-file" in record.__dict__["cure"] for record in records)
        self._caplog.clear()
        return len(records)


def test_processes_with_different_tokens_are_told(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that is started with another token than those at work, or with none, says one line."""
    with Farm(database_url, tmp_path, caplog) as farm:
        farm.start(OLD)
        farm.start(OLD)
        assert farm.told() == 0
        farm.start(NEW)
        assert farm.told() == 1
        farm.start(OLD)
        assert farm.told() == 1
        farm.start(None)
        assert farm.told() == 1


def test_token_that_is_changed_one_process_after_the_other_is_told_once(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A planned change says a line at its begin, and none at its end; without others at work none at all."""
    with Farm(database_url, tmp_path, caplog) as farm:
        north, south = farm.start(OLD), farm.start(OLD)
        north.stop()
        farm.start(NEW)
        assert farm.told() == 1
        south.stop()
        farm.start(NEW)
        farm.start(NEW)
        assert farm.told() == 0
    with Farm(database_url, tmp_path, caplog) as farm:
        farm.start(OLD)
        assert farm.told() == 0


def test_database_does_not_have_the_token(database_url: str, tmp_path: Path) -> None:
    """What is compared tells nobody the token, nor whether two studios have the same."""
    with (
        LocalStudio(Places(database_url, Folder(tmp_path)), door=Door(token=OLD)) as studio,
        studio.database.reading() as connection,
    ):
        kept = {row.key: row.value for row in connection.execute(select(meta))}
    assert len(kept["token"]) == 128
    assert not any(OLD in value for value in kept.values())
