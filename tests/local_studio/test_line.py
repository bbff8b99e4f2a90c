"""What is counted of jobs that wait."""

from __future__ import annotations

import io
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.pictures import Folder
from studio_worker.local_studio.rules import LOST_CONNECTION, QueuedJob, RuleBroken
from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.storage.sqlite import SqliteFile
from studio_worker.local_studio.storage.tables import IS_UNREJECTED, jobs, lines

STEPS = ("add", "offer", "accept", "decline", "reject", "fail", "deliver", "retry", "delete")
_NUMBERS = count()


def counted(database: Database) -> tuple[list[Any], list[Any]]:
    """What the lines say, and what the jobs do."""
    line = (jobs.c.priority, jobs.c.submitter, jobs.c.model)
    waiting = select(*line, func.count()).where(jobs.c.status == "queued", IS_UNREJECTED).group_by(*line)
    with database.reading() as connection:
        return (
            sorted(tuple(row) for row in connection.execute(select(lines))),
            sorted(tuple(row) for row in connection.execute(waiting)),
        )


@settings(max_examples=15)  # each has a file of its own
@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 3)), min_size=20, max_size=60))
def test_line_is_as_long_as_jobs_wait_in_it(tmp_path_factory: Any, steps: list[tuple[str, int]]) -> None:
    """Whatever becomes of jobs, each line's length is how many wait that nobody has rejected."""
    folder: Path = tmp_path_factory.mktemp("studio")
    database = SqliteFile(folder / "studio.sqlite3", lambda: None, Folder(folder))
    queue = JobQueue(database, Folder(folder))
    ids = [""]
    for step, which in steps:
        job_id, worker = ids[which % len(ids)], f"worker {which % 2}"
        with suppress(RuleBroken):
            if step == "add":
                job_id = f"job {next(_NUMBERS)}"
                ids.insert(0, job_id)
                submitter, priority = "ab"[which % 2], which // 2
                facts = {"task": {}, "model_source": {}, "created_at": 0.0}
                queue.add(QueuedJob(job_id, f"m{which}", submitter=submitter, priority=priority, **facts))
            elif step == "offer":
                queue.take_next(worker)
            elif step == "accept":
                queue.accept(job_id, worker)
            elif step == "decline":
                queue.decline(job_id, worker)
            elif step == "reject":
                queue.reject(job_id, worker, LOST_CONNECTION)
            elif step == "fail":
                queue.fail(job_id, worker, "no", retryable=True)
            elif step == "deliver":
                queue.deliver(job_id, worker, io.BytesIO(b"x"), ext="png", prompt=None)
            elif step == "retry":
                queue.retry(job_id)
            else:
                queue.delete(job_id)
    said, are = counted(database)
    database.close()
    assert said == are
