"""Groups of workers that train one job together."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    time, now = sa.DateTime(timezone=True), sa.text("now()")
    op.create_table(
        "groups",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("nodes", sa.BigInteger(), nullable=False),
        sa.Column("processes", sa.BigInteger(), nullable=False),
        sa.Column("rendezvous", sa.Text(), nullable=False),
        sa.Column("opened_at", time, nullable=False, server_default=now),
        sa.Column("started_at", time, nullable=True),
        sa.PrimaryKeyConstraint("job_id", "attempt"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
    )
    op.create_table(
        "group_members",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("node_rank", sa.BigInteger(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("joined_at", time, nullable=False, server_default=now),
        sa.Column("lease_until", time, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "attempt", "node_rank"),
        sa.ForeignKeyConstraint(["job_id", "attempt"], ["groups.job_id", "groups.attempt"]),
    )


def downgrade() -> None:
    op.drop_table("group_members")
    op.drop_table("groups")
