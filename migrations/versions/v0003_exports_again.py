"""Failed archives can be requested again; an index of idempotency keys by age."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_KEYS_BY_AGE = "ix_idempotency_keys_created_at"


def upgrade() -> None:
    op.add_column(
        "exports", sa.Column("losses", sa.BigInteger(), nullable=False, server_default=sa.text("0"))
    )
    op.add_column("exports", sa.Column("failed_at", sa.DateTime(timezone=True), nullable=True))
    op.execute("UPDATE exports SET failed_at = now() WHERE state = 'failed'")
    op.create_index(_KEYS_BY_AGE, "idempotency_keys", ["created_at"])


def downgrade() -> None:
    op.drop_index(_KEYS_BY_AGE, "idempotency_keys")
    op.drop_column("exports", "failed_at")
    op.drop_column("exports", "losses")
