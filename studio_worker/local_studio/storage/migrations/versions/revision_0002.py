"""Studio processes, the sessions that workers have with them, and what was known only to one process."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Boolean, Column, Integer, true

from studio_worker.local_studio.storage.columns import SECONDS, Words

revision = "0002"
down_revision = "0001"
OLDEST_WRITER = "0002"


def upgrade() -> None:
    """From one process to several."""
    op.create_table(
        "processes",
        Column("process_id", Words, primary_key=True),
        Column("address", Words, nullable=False),
        Column("started_at", SECONDS, nullable=False),
        Column("beat_at", SECONDS, nullable=False),
    )
    op.create_table(
        "sessions",
        Column("worker_id", Words, primary_key=True),
        Column("number", Integer, nullable=False),
        Column("process_id", Words),
        Column("lease_until", SECONDS, nullable=False),
        Column("end_code", Words),
        Column("is_paused", Boolean, nullable=False),
        Column("current_job_id", Words),
        Column("heartbeat_at", SECONDS, nullable=False),
    )
    op.add_column("jobs", Column("session_no", Integer, nullable=False, server_default="0"))
    op.add_column("registrations", Column("origin", Words, nullable=False, server_default=""))
    op.add_column("registrations", Column("heard_at", SECONDS, nullable=False, server_default="0"))
    op.add_column("registrations", Column("has_polled", Boolean, nullable=False, server_default=true()))
