"""What SQLite files went through before Alembic counted their steps: ``user_version`` 1 to 3.

A step that was released is never changed. New files take none of them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from sqlite3 import Connection

from studio_worker.local_studio.pictures import Pictures

Step = Callable[[Connection, Pictures], None]

_TURNS = """
ALTER TABLE jobs ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN submitter TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN passed_at REAL;
UPDATE jobs SET rejections = (
    SELECT json_group_object(
        key, json_object('reason', value, 'name', substr(key, 1, 8), 'at', 0, 'times', 1))
    FROM json_each(jobs.rejections)) WHERE rejections <> '{}';
DROP INDEX jobs_by_status;
CREATE INDEX jobs_by_end ON jobs (status, finished_at, seq);
CREATE INDEX jobs_by_line ON jobs (status, priority, submitter, seq);
CREATE INDEX jobs_not_rejected ON jobs (status, priority, submitter, model, seq, rejections)
    WHERE rejections = '{}';
CREATE INDEX jobs_rejected ON jobs (status, seq) WHERE rejections <> '{}';
CREATE TABLE turns (
    priority INTEGER NOT NULL, submitter TEXT NOT NULL, number INTEGER NOT NULL,
    PRIMARY KEY (priority, submitter));
CREATE TABLE last_made (worker_id TEXT PRIMARY KEY, model TEXT NOT NULL);
"""

_FILES = """
ALTER TABLE results ADD COLUMN key TEXT NOT NULL DEFAULT '';
ALTER TABLE files ADD COLUMN key TEXT NOT NULL DEFAULT '';
"""

_NO_BYTES = """
ALTER TABLE results DROP COLUMN bytes;
ALTER TABLE files DROP COLUMN bytes;
"""


def _turns(connection: Connection, _pictures: Pictures) -> None:
    _execute(connection, _TURNS)


def _files(connection: Connection, pictures: Pictures) -> None:
    """Pictures go out of the database into their folder, one at a time."""
    _execute(connection, _FILES)
    for job_id, ext in connection.execute("SELECT job_id, ext FROM results").fetchall():
        (content,) = connection.execute("SELECT bytes FROM results WHERE job_id = ?", (job_id,)).fetchone()
        key = pictures.put(io.BytesIO(content), job_id, ext).key
        connection.execute("UPDATE results SET key = ? WHERE job_id = ?", (key, job_id))
    for file_id, media_type in connection.execute("SELECT file_id, media_type FROM files").fetchall():
        (content,) = connection.execute("SELECT bytes FROM files WHERE file_id = ?", (file_id,)).fetchone()
        key = pictures.put(io.BytesIO(content), "input", media_type.rpartition("/")[2]).key
        connection.execute("UPDATE files SET key = ? WHERE file_id = ?", (key, file_id))
    _execute(connection, _NO_BYTES)


def _execute(connection: Connection, script: str) -> None:
    # Not executescript(), which would end the transaction under way.
    for statement in script.split(";"):
        if statement.strip():
            connection.execute(statement)


STEPS: dict[int, Step] = {2: _turns, 3: _files}
"""By the ``user_version`` that each leads to."""
