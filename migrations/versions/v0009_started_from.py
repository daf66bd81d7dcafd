"""Models: the fine-tuned model that the job went on from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("models", sa.Column("started_from", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("models", "started_from")
