"""How many jobs wait in each line, so that an offer costs the number of lines and not of jobs."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Integer

from studio_worker.local_studio.storage.columns import NUMBER, Words

revision = "0003"
down_revision = "0002"
OLDEST_WRITER = "0003"


def upgrade() -> None:
    """Those that wait by now are counted once."""
    op.create_table(
        "lines",
        Column("priority", Integer, primary_key=True, autoincrement=False),
        Column("submitter", Words, primary_key=True),
        Column("model", Words, primary_key=True),
        Column("length", NUMBER, nullable=False),
    )
    op.execute(
        "INSERT INTO lines SELECT priority, submitter, model, count(*) FROM jobs"
        " WHERE status = 'queued' AND rejections = '{}' GROUP BY priority, submitter, model"
    )
    op.create_index("turns_by_number", "turns", ["number"])
