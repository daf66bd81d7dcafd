"""Studies of several arms on the same data, and the per-row results of jobs that they compare."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    now, zero = sa.func.now(), sa.text("0")
    op.add_column("jobs", sa.Column("stages_passed", sa.BigInteger(), nullable=False, server_default=zero))
    op.create_table(
        "outcomes",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("outcomes", JSONB(), nullable=True),
        sa.Column("costs", JSONB(), nullable=False),
        sa.PrimaryKeyConstraint("job_id"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
    )
    op.create_table(
        "studies",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("owner_id", sa.Text(), nullable=False),
        sa.Column("spec", JSONB(), nullable=False),
        sa.Column("metadata", JSONB(), nullable=False, server_default=sa.text("'{}'::jsonb")),
        sa.Column("created_at", _TIME, nullable=False, server_default=now),
        sa.Column("finished_at", _TIME, nullable=True),
        sa.Column("cancel_requested_at", _TIME, nullable=True),
        sa.Column("event_seq", sa.BigInteger(), nullable=False, server_default=zero),
        sa.Column("verdict", JSONB(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "studies_by_owner", "studies", ["owner_id", sa.text("created_at DESC"), sa.text("id DESC")]
    )
    op.create_index(
        "studies_unfinished", "studies", ["created_at"], postgresql_where=sa.text("finished_at IS NULL")
    )
    _create_parts()


def _create_parts() -> None:
    op.create_table(
        "study_jobs",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("study_id", sa.Text(), nullable=False),
        sa.Column("place", sa.BigInteger(), nullable=False),
        sa.Column("arm", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("told", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("job_id"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"]),
        sa.UniqueConstraint("study_id", "place", name="study_jobs_in_order"),
    )
    op.create_table(
        "study_prefixes",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("length", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("place", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "length"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
    )
    op.create_index("study_prefixes_by_key", "study_prefixes", ["key", "place"])
    op.create_table(
        "study_events",
        sa.Column("study_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False, server_default=sa.func.now()),
        sa.Column("level", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", JSONB(), nullable=False),
        sa.PrimaryKeyConstraint("study_id", "seq"),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"]),
        sa.UniqueConstraint("id"),
    )


def downgrade() -> None:
    for table in ("study_events", "study_prefixes", "study_jobs", "studies", "outcomes"):
        op.drop_table(table)
    op.drop_column("jobs", "stages_passed")
