"""What :mod:`turns` has to know of the database, and what it leaves there: lines, turns, models made last.

A *line* is what one submitter has waiting in one priority. Whoever chooses is within ``Database.writing``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from itertools import groupby, islice

from studio_worker.local_studio import turns
from studio_worker.local_studio.database import Database, Row
from studio_worker.local_studio.rules import QueuedJob, Rejection
from studio_worker.local_studio.turns import Crew, Patience, Waiting

_TURNS_KEPT = 1000
"""Whoever has not been served for so many turns counts as new."""

# Of each priority, submitter and model the oldest; all that were rejected, for turns.next_for() needs them.
_HEADS_SQL = """
SELECT seq, job_id, model, priority, submitter, passed_at, rejections FROM jobs
WHERE seq IN (
    SELECT min(seq) FROM jobs WHERE status = 'queued' AND rejections = '{}'
    GROUP BY priority, submitter, model
    UNION ALL SELECT seq FROM jobs WHERE status = 'queued' AND rejections <> '{}')"""

_LINES_SQL = """
SELECT priority, submitter, length FROM (
    SELECT priority, submitter, count(*) AS length, min(seq) AS first FROM jobs WHERE status = 'queued'
    GROUP BY priority, submitter) LEFT JOIN turns USING (priority, submitter)
ORDER BY priority DESC, coalesce(number, 0), first"""


class Line:
    """The lines of all submitters, and whose turn it is."""

    def __init__(self, database: Database, patience: Patience) -> None:
        self._database = database
        self._patience = patience

    def choose(self, worker_id: str, ready: Collection[str], now: float) -> str | None:
        """The id of the job that this worker is to be offered; notes whose turn was passed over for it."""
        made = self._database.rows("SELECT worker_id, model FROM last_made")
        crew = Crew(frozenset(ready), {row["worker_id"]: row["model"] for row in made})
        rows = self._database.rows("SELECT priority, submitter, number FROM turns")
        numbers = {(row["priority"], row["submitter"]): row["number"] for row in rows}
        waiting = [_waiting(row) for row in self._database.rows(_HEADS_SQL)]
        choice = turns.next_for(worker_id, waiting, crew, numbers, now, self._patience)
        for job_id in choice.passed:
            self._database.execute("UPDATE jobs SET passed_at = ? WHERE job_id = ?", (now, job_id))
        return choice.job_id

    def take_turn(self, job: QueuedJob) -> None:
        """Whoever queued this job was served."""
        row = self._database.row("SELECT coalesce(max(number), 0) + 1 AS number FROM turns")
        number: int = row["number"] if row else 1
        self._database.execute(
            "INSERT INTO turns VALUES (?, ?, ?)"
            " ON CONFLICT (priority, submitter) DO UPDATE SET number = excluded.number",
            (job.priority, job.submitter, number),
        )
        self._database.execute("DELETE FROM turns WHERE number <= ?", (number - _TURNS_KEPT,))

    def made(self, worker_id: str, model: str) -> None:
        """The worker has this model loaded."""
        self._database.execute(
            "INSERT INTO last_made VALUES (?, ?)"
            " ON CONFLICT (worker_id) DO UPDATE SET model = excluded.model",
            (worker_id, model),
        )

    def in_turn(self, limit: int, offset: int) -> list[int]:
        """The numbers of jobs in the order of turns, as if all workers had one model and rejected nothing."""
        wanted = list(islice(self._order(), offset, offset + limit))
        found: list[int] = []
        numbers: dict[tuple[int, str], list[int]] = {}
        for priority, submitter, nth in wanted:
            if (priority, submitter) not in numbers:
                rows = self._database.rows(
                    "SELECT seq FROM jobs WHERE status = 'queued' AND priority = ? AND submitter = ?"
                    " ORDER BY seq LIMIT ?",
                    (priority, submitter, offset + limit),
                )
                numbers[priority, submitter] = [row["seq"] for row in rows]
            found += numbers[priority, submitter][nth : nth + 1]
        return found

    def _order(self) -> Iterator[tuple[int, str, int]]:
        for priority, rows in groupby(self._database.rows(_LINES_SQL), lambda row: row["priority"]):
            lines = [(row["submitter"], row["length"]) for row in rows]
            nth = 0
            while lines:
                yield from ((priority, submitter, nth) for submitter, _ in lines)
                nth += 1
                lines = [(submitter, length) for submitter, length in lines if length > nth]


def rejections_of(row: Row) -> dict[str, Rejection]:
    """What a job's row says of who rejected it."""
    return {who: Rejection(**said) for who, said in json.loads(row["rejections"]).items()}


def _waiting(row: Row) -> Waiting:
    return Waiting(
        job_id=row["job_id"],
        number=row["seq"],
        model=row["model"],
        priority=row["priority"],
        submitter=row["submitter"],
        passed_at=row["passed_at"],
        rejections=rejections_of(row),
    )
