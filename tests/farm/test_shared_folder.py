"""Pictures in a folder that all processes of a studio have."""

from __future__ import annotations

import os
import time
from pathlib import Path

from studio_worker.local_studio import Places, pictures_at
from studio_worker.local_studio.housekeeping import DAY_S
from studio_worker.local_studio.studio import Studio


def test_what_a_crash_left_in_a_shared_folder_goes_after_a_day(database_url: str, tmp_path: Path) -> None:
    """A file that another process may be about to name stays; what nobody named for a day goes, but for
    what is a person's own.
    """
    left, fresh, notes = (
        tmp_path / name for name in ("job-0123456789abcdef.png", "job-fedcba9876543210.png", "notes.txt")
    )
    for file in (left, fresh, notes):
        file.write_bytes(b"x")
    for file in (left, notes):
        os.utime(file, times=(time.time() - DAY_S - 60,) * 2)
    places = Places(database_url, pictures_at(str(tmp_path)))
    for _ in range(2):
        studio = Studio(places)
        studio.housekeeping.keep_house()
        studio.database.close()
        assert (left.exists(), fresh.exists(), notes.exists()) == (False, True, True)
