"""The tables of the first version with turns and a folder of pictures."""

from __future__ import annotations

from alembic import op
from sqlalchemy import CheckConstraint, Column, ForeignKey, Integer, text

from studio_worker.local_studio.storage.columns import NUMBER, SECONDS, Json, Words

revision = "0001"
down_revision = None
OLDEST_WRITER = "0001"


def upgrade() -> None:
    """From nothing."""
    _people_and_workers()
    _jobs()
    _what_jobs_bring()
    _turns()


def _people_and_workers() -> None:
    op.create_table("meta", Column("key", Words, primary_key=True), Column("value", Words, nullable=False))
    op.create_table(
        "registrations",
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
    )
    op.create_index("registrations_by_install", "registrations", ["install_id", "created_at"])
    op.create_table(
        "workers",
        Column("worker_id", Words, primary_key=True),
        Column("install_id", Words, nullable=False),
        Column("request_id", Words, nullable=False),
        Column("token_hash", Words),
        Column("capabilities", Words, nullable=False),
        Column("created_at", SECONDS, nullable=False),
        Column("last_seen_at", SECONDS),
        Column("deleted_at", SECONDS),
    )


def _jobs() -> None:
    op.create_table(
        "jobs",
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
        sqlite_autoincrement=True,
    )
    op.create_index("jobs_by_end", "jobs", ["status", "finished_at", "seq"])
    op.create_index("jobs_by_line", "jobs", ["status", "priority", "submitter", "seq"])
    unrejected, rejected = text("rejections = '{}'"), text("rejections <> '{}'")
    line = ["status", "priority", "submitter", "model", "seq"]
    if op.get_context().dialect.name == "sqlite":
        # It looks the condition's column up in the table all the same, unless the index has it. In
        # PostgreSQL's a row has 2,700 bytes at most, and the reasons may be longer.
        line.append("rejections")
    op.create_index("jobs_not_rejected", "jobs", line, sqlite_where=unrejected, postgresql_where=unrejected)
    op.create_index(
        "jobs_rejected", "jobs", ["status", "seq"], sqlite_where=rejected, postgresql_where=rejected
    )


def _what_jobs_bring() -> None:
    op.create_table(
        "results",
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
    op.create_table(
        "logs",
        Column("id", NUMBER, primary_key=True),
        Column("worker_id", Words, nullable=False),
        Column("ts", Words, nullable=False),
        Column("level", Words, nullable=False),
        Column("category", Words, nullable=False),
        Column("message", Words, nullable=False),
        Column("job_id", Words),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "models",
        Column("model_id", Words, primary_key=True),
        Column("label", Words, nullable=False),
        Column("model_source", Json, nullable=False),
        Column("vram_gb_estimate", SECONDS, nullable=False),
    )
    op.create_table(
        "files",
        Column("file_id", Words, primary_key=True),
        Column("media_type", Words, nullable=False),
        Column("created_at", SECONDS, nullable=False),
        Column("key", Words, nullable=False, server_default=""),
    )


def _turns() -> None:
    op.create_table(
        "turns",
        Column("priority", Integer, primary_key=True, autoincrement=False),
        Column("submitter", Words, primary_key=True),
        Column("number", NUMBER, nullable=False),
    )
    op.create_table(
        "last_made",
        Column("worker_id", Words, primary_key=True),
        Column("model", Words, nullable=False),
    )
