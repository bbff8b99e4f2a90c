"""The tables, as steps from an empty file to today's form; SQLite's ``user_version`` counts those done.

A step that was released is never changed: whoever has an older file gets there by the steps after it.
"""

from __future__ import annotations

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

STEPS = (_FIRST, _TURNS)
"""In order; a new file takes all of them."""
