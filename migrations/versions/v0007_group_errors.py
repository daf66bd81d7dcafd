"""Errors of members: the one that a member's processes have failed with."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("group_members", sa.Column("error", JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("group_members", "error")
