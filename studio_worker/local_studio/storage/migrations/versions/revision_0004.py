"""What a worker holds is found at once, however many others hold something: each offer asks for it."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
OLDEST_WRITER = "0003"


def upgrade() -> None:
    """An index more."""
    op.create_index("jobs_by_worker", "jobs", ["worker_id", "status"])
