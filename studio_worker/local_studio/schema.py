"""The tables, as steps from an empty file to today's form; SQLite's ``user_version`` counts those done.

A step that was released is never changed: whoever has an older file gets there by the steps after it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from sqlite3 import Connection

from studio_worker.local_studio.pictures import Pictures

Step = Callable[[Connection, Pictures], None]

_FIRST = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE registrations (
    request_id TEXT PRIMARY KEY, install_id TEXT NOT NULL, secret_hash TEXT NOT NULL,
    capabilities TEXT NOT NULL, user_agent TEXT NOT NULL, status TEXT NOT NULL, reason TEXT,
    worker_id TEXT, created_at REAL NOT NULL, decided_at REAL);
CREATE INDEX registrations_by_install ON registrations (install_id, created_at);
CREATE TABLE workers (
    worker_id TEXT PRIMARY KEY, install_id TEXT NOT NULL, request_id TEXT NOT NULL, token_hash TEXT,
    capabilities TEXT NOT NULL, created_at REAL NOT NULL, last_seen_at REAL, deleted_at REAL);
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT UNIQUE NOT NULL, model TEXT NOT NULL,
    task TEXT NOT NULL, model_source TEXT NOT NULL, created_at REAL NOT NULL, game_id TEXT NOT NULL,
    asset_name TEXT NOT NULL, vram_gb_estimate REAL NOT NULL, max_attempts INTEGER NOT NULL,
    status TEXT NOT NULL, attempts INTEGER NOT NULL, reason TEXT, worker_id TEXT,
    dropped_by TEXT, rejections TEXT NOT NULL, offered_at REAL, started_at REAL,
    finished_at REAL, completions INTEGER NOT NULL CHECK (completions <= 1),
    refused_uploads INTEGER NOT NULL);
CREATE INDEX jobs_by_status ON jobs (status, seq);
CREATE TABLE results (
    job_id TEXT PRIMARY KEY REFERENCES jobs (job_id), ext TEXT NOT NULL, prompt TEXT NOT NULL,
    generation_meta TEXT, worker_id TEXT NOT NULL, seconds REAL NOT NULL, created_at REAL NOT NULL,
    size_bytes INTEGER NOT NULL, bytes BLOB NOT NULL);
CREATE TABLE logs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, worker_id TEXT NOT NULL, ts TEXT NOT NULL, level TEXT NOT NULL,
    category TEXT NOT NULL, message TEXT NOT NULL, job_id TEXT);
CREATE TABLE models (
    model_id TEXT PRIMARY KEY, label TEXT NOT NULL, model_source TEXT NOT NULL,
    vram_gb_estimate REAL NOT NULL);
CREATE TABLE files (
    file_id TEXT PRIMARY KEY, media_type TEXT NOT NULL, created_at REAL NOT NULL, bytes BLOB NOT NULL);
"""

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


def _first(connection: Connection, _pictures: Pictures) -> None:
    _execute(connection, _FIRST)


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


STEPS: tuple[Step, ...] = (_first, _turns, _files)
"""In order; a new file takes all of them."""
