"""Results of stages, which later jobs of the same owner reuse."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    now = sa.func.now()
    time = sa.DateTime(timezone=True)
    op.create_table(
        "stage_results",
        sa.Column("storage_key", sa.Text(), nullable=False),
        sa.Column("owner_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("manifest", JSONB(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", time, nullable=False, server_default=now),
        sa.Column("last_used_at", time, nullable=False, server_default=now),
        sa.Column("removed_at", time, nullable=True),
        sa.PrimaryKeyConstraint("storage_key"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
    )
    op.create_index("stage_results_by_key", "stage_results", ["owner_id", "key"])
    op.create_index("ix_stage_results_job_id", "stage_results", ["job_id"])


def downgrade() -> None:
    op.drop_table("stage_results")
