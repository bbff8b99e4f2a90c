"""The tables, in their present form. How a database gets there, and the indexes, are in ``migrations``."""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    text,
    true,
)

from studio_worker.local_studio.storage.columns import NUMBER, SECONDS, Json, Words

METADATA = MetaData()

meta = Table("meta", METADATA, Column("key", Words, primary_key=True), Column("value", Words, nullable=False))

registrations = Table(
    "registrations",
    METADATA,
    Column("request_id", Words, primary_key=True),
    Column("install_id", Words, nullable=False),
    Column("secret_hash", Words, nullable=False),
    Column("capabilities", Words, nullable=False),
    Column("user_agent", Words, nullable=False),
    Column("status", Words, nullable=False),
    Column("reason", Words),
    Column("worker_id", Words),
    Column("created_at", SECONDS, nullable=False),
    Column("decided_at", SECONDS),
    Column("origin", Words, nullable=False, server_default=""),
    Column("heard_at", SECONDS, nullable=False, server_default="0"),
    Column("has_polled", Boolean, nullable=False, server_default=true()),
)

workers = Table(
    "workers",
    METADATA,
    Column("worker_id", Words, primary_key=True),
    Column("install_id", Words, nullable=False),
    Column("request_id", Words, nullable=False),
    Column("token_hash", Words),
    Column("capabilities", Words, nullable=False),
    Column("created_at", SECONDS, nullable=False),
    Column("last_seen_at", SECONDS),
    Column("deleted_at", SECONDS),
)

jobs = Table(
    "jobs",
    METADATA,
    Column("seq", NUMBER, primary_key=True),
    Column("job_id", Words, unique=True, nullable=False),
    Column("model", Words, nullable=False),
    Column("task", Json, nullable=False),
    Column("model_source", Json, nullable=False),
    Column("created_at", SECONDS, nullable=False),
    Column("game_id", Words, nullable=False),
    Column("asset_name", Words, nullable=False),
    Column("vram_gb_estimate", SECONDS, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("status", Words, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("reason", Words),
    Column("worker_id", Words),
    Column("dropped_by", Words),
    Column("rejections", Json, nullable=False),
    Column("offered_at", SECONDS),
    Column("started_at", SECONDS),
    Column("finished_at", SECONDS),
    Column("completions", Integer, CheckConstraint("completions <= 1"), nullable=False),
    Column("refused_uploads", Integer, nullable=False),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("submitter", Words, nullable=False, server_default=""),
    Column("passed_at", SECONDS),
    Column("session_no", Integer, nullable=False, server_default="0"),
    sqlite_autoincrement=True,
)

IS_UNREJECTED = text("rejections = '{}'")
IS_REJECTED = text("rejections <> '{}'")
"""Written out, because a partial index serves only a condition that is its own to the letter."""

results = Table(
    "results",
    METADATA,
    Column("job_id", Words, ForeignKey("jobs.job_id"), primary_key=True),
    Column("ext", Words, nullable=False),
    Column("prompt", Words, nullable=False),
    Column("generation_meta", Json),
    Column("worker_id", Words, nullable=False),
    Column("seconds", SECONDS, nullable=False),
    Column("created_at", SECONDS, nullable=False),
    Column("size_bytes", NUMBER, nullable=False),
    Column("key", Words, nullable=False, server_default=""),
)

logs = Table(
    "logs",
    METADATA,
    Column("id", NUMBER, primary_key=True),
    Column("worker_id", Words, nullable=False),
    Column("ts", Words, nullable=False),
    Column("level", Words, nullable=False),
    Column("category", Words, nullable=False),
    Column("message", Words, nullable=False),
    Column("job_id", Words),
    sqlite_autoincrement=True,
)

models = Table(
    "models",
    METADATA,
    Column("model_id", Words, primary_key=True),
    Column("label", Words, nullable=False),
    Column("model_source", Json, nullable=False),
    Column("vram_gb_estimate", SECONDS, nullable=False),
)

files = Table(
    "files",
    METADATA,
    Column("file_id", Words, primary_key=True),
    Column("media_type", Words, nullable=False),
    Column("created_at", SECONDS, nullable=False),
    Column("key", Words, nullable=False, server_default=""),
)

turns = Table(
    "turns",
    METADATA,
    Column("priority", Integer, primary_key=True, autoincrement=False),
    Column("submitter", Words, primary_key=True),
    Column("number", NUMBER, nullable=False),
)

lines = Table(
    "lines",
    METADATA,
    Column("priority", Integer, primary_key=True, autoincrement=False),
    Column("submitter", Words, primary_key=True),
    Column("model", Words, primary_key=True),
    Column("length", NUMBER, nullable=False),
)
"""How many jobs wait that nobody has rejected: what :mod:`job_rows` counts with each step."""

last_made = Table(
    "last_made",
    METADATA,
    Column("worker_id", Words, primary_key=True),
    Column("model", Words, nullable=False),
)

processes = Table(
    "processes",
    METADATA,
    Column("process_id", Words, primary_key=True),
    Column("address", Words, nullable=False),
    Column("started_at", SECONDS, nullable=False),
    Column("beat_at", SECONDS, nullable=False),
)

sessions = Table(
    "sessions",
    METADATA,
    Column("worker_id", Words, primary_key=True),
    Column("number", Integer, nullable=False),
    Column("process_id", Words),
    Column("lease_until", SECONDS, nullable=False),
    Column("end_code", Words),
    Column("is_paused", Boolean, nullable=False),
    Column("current_job_id", Words),
    Column("heartbeat_at", SECONDS, nullable=False),
)
