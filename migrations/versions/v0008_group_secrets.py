"""Secrets of groups, by which the processes of a run admit each other; members that are ready to train."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("groups", sa.Column("secret", sa.Text(), nullable=True))
    op.add_column("group_members", sa.Column("ready_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("group_members", "ready_at")
    op.drop_column("groups", "secret")
