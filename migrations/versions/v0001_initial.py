"""The first tables: keys, files, jobs with attempts, events and checkpoints, models, exports, workers."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_STATES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")

# The store's guards protect an ended job from its own code. This trigger also protects it from bugs, from an older
# version that still runs elsewhere, and from a hand at a psql prompt. It compares the whole row, so that columns added
# later are protected too. Free to change are columns that do not say how the job ended.
_TERMINAL_GUARD = """\
CREATE FUNCTION refuse_change_of_ended_job() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE free CONSTANT text[] := ARRAY['cleanup_error', 'hinted_at'];
BEGIN
    IF to_jsonb(NEW) - free <> to_jsonb(OLD) - free THEN
        RAISE EXCEPTION 'job % has ended (%) and can not change', OLD.id, OLD.state
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER jobs_terminal BEFORE UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.state IN ('succeeded', 'failed', 'cancelled')) EXECUTE FUNCTION refuse_change_of_ended_job();
"""


def upgrade() -> None:
    _create_keys_and_files()
    _create_jobs()
    _create_what_jobs_write()
    _create_models()
    _create_workers()
    op.execute(_TERMINAL_GUARD)


def downgrade() -> None:
    op.execute("DROP TRIGGER jobs_terminal ON jobs")
    op.execute("DROP FUNCTION refuse_change_of_ended_job")
    for table in ("exports", "models", "checkpoints", "events", "attempts", "jobs"):
        op.drop_table(table)
    for table in ("reconciler", "workers", "base_models", "idempotency_keys", "files", "api_keys"):
        op.drop_table(table)


def _text(name: str, *, null: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Text(), nullable=null)


def _json(name: str, *, null: bool = False, default: str | None = None) -> sa.Column[Any]:
    server_default = sa.text(default) if default is not None else None
    return sa.Column(name, JSONB(), nullable=null, server_default=server_default)


def _number(name: str, *, null: bool = False, default: str | None = None) -> sa.Column[Any]:
    server_default = sa.text(default) if default is not None else None
    return sa.Column(name, sa.BigInteger(), nullable=null, server_default=server_default)


def _time(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=True)


def _now(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now())


def _create_keys_and_files() -> None:
    op.create_table(
        "api_keys",
        _text("id"),
        _text("owner_id"),
        _text("name"),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        _now("created_at"),
        _time("last_used_at"),
        _time("revoked_at"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_api_keys_owner_id", "api_keys", ["owner_id"])
    op.create_table(
        "files",
        _text("id"),
        _text("owner_id"),
        _text("filename"),
        _text("purpose"),
        _number("bytes"),
        _text("sha256"),
        _text("storage_key"),
        _now("created_at"),
        _time("deleted_at"),
        _time("purged_at"),
        sa.PrimaryKeyConstraint("id"),
    )
    newest_first: list[str | sa.TextClause] = ["owner_id", sa.text("created_at DESC"), sa.text("id DESC")]
    op.create_index("files_by_owner", "files", newest_first)
    op.create_table(
        "idempotency_keys",
        _text("owner_id"),
        _text("key"),
        _text("body_hash"),
        _text("resource_id"),
        _now("created_at"),
        sa.PrimaryKeyConstraint("owner_id", "key"),
    )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        _text("id"),
        _text("owner_id"),
        sa.Column("state", sa.String(20), nullable=False),
        _json("spec"),
        _json("metadata", default="'{}'::jsonb"),
        _now("created_at"),
        _time("started_at"),
        _time("finished_at"),
        _number("attempt", default="0"),
        _text("worker_id", null=True),
        _time("lease_until"),
        _time("hinted_at"),
        _time("not_before"),
        _number("trainer_deaths", default="0"),
        _number("lost_leases", default="0"),
        _text("paused_from", null=True),
        _time("cancel_requested_at"),
        _time("pause_requested_at"),
        _number("event_seq", default="0"),
        _text("stage", null=True),
        _json("progress", default="'{}'::jsonb"),
        _json("metrics", default="'{}'::jsonb"),
        _json("resolved", default="'{}'::jsonb"),
        _json("validation", null=True),
        _json("evaluation", null=True),
        _json("parity", null=True),
        _number("trained_tokens", null=True),
        _json("error", null=True),
        _text("cleanup_error", null=True),
        _text("result_file_id", null=True),
        _text("fine_tuned_model", null=True),
        sa.PrimaryKeyConstraint("id"),
        sa.CheckConstraint(sa.column("state").in_(_STATES), name="jobs_state"),
    )
    newest_first: list[str | sa.TextClause] = ["owner_id", sa.text("created_at DESC"), sa.text("id DESC")]
    op.create_index("jobs_by_owner", "jobs", newest_first)
    unfinished = sa.text("finished_at IS NULL")
    op.create_index("jobs_unfinished", "jobs", ["state", "lease_until"], postgresql_where=unfinished)
    op.create_index("jobs_by_metadata", "jobs", ["metadata"], postgresql_using="gin")


def _create_what_jobs_write() -> None:
    op.create_table(
        "attempts",
        _text("job_id"),
        _number("number"),
        _text("worker_id"),
        _text("purpose"),
        _now("started_at"),
        _time("ended_at"),
        _text("outcome", null=True),
        _time("swept_at"),
        sa.PrimaryKeyConstraint("job_id", "number"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
    )
    op.create_table(
        "events",
        _text("job_id"),
        _number("seq"),
        _text("id"),
        _number("attempt"),
        _now("created_at"),
        _text("level"),
        _text("type"),
        _text("message"),
        _json("data"),
        sa.PrimaryKeyConstraint("job_id", "seq"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
        sa.UniqueConstraint("id"),
    )
    op.create_table(
        "checkpoints",
        _text("id"),
        _text("job_id"),
        _number("attempt"),
        _number("step"),
        _text("stage"),
        _number("stage_index"),
        _text("kind"),
        _text("storage_key"),
        _json("manifest"),
        _json("metrics"),
        _text("model_id", null=True),
        _now("created_at"),
        _time("removed_at"),
        _time("purged_at"),
        sa.PrimaryKeyConstraint("id"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
        sa.UniqueConstraint("job_id", "attempt", "step", "kind", name="checkpoints_once"),
    )
    op.create_index("ix_checkpoints_job_id", "checkpoints", ["job_id"])


def _create_models() -> None:
    op.create_table(
        "base_models",
        _text("id"),
        _text("source"),
        _text("revision", null=True),
        _json("info"),
        _now("created_at"),
        _now("seen_at"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "models",
        _text("id"),
        _text("owner_id"),
        _text("job_id"),
        _text("kind"),
        _text("base_model"),
        _text("storage_key"),
        _json("manifest"),
        _json("task"),
        _now("created_at"),
        _time("deleted_at"),
        _time("purged_at"),
        sa.PrimaryKeyConstraint("id"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
    )
    op.create_index("ix_models_owner_id", "models", ["owner_id"])
    op.create_index("ix_models_job_id", "models", ["job_id"])
    final = sa.text("kind = 'final'")
    op.create_index("models_one_success", "models", ["job_id"], unique=True, postgresql_where=final)
    op.create_table(
        "exports",
        _text("model_id"),
        _text("format"),
        _text("state"),
        _number("attempt", default="0"),
        _time("lease_until"),
        _text("storage_key", null=True),
        _number("bytes", null=True),
        _json("error", null=True),
        _now("created_at"),
        sa.PrimaryKeyConstraint("model_id", "format"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"]),
    )


def _create_workers() -> None:
    op.create_table(
        "workers",
        _text("id"),
        _text("role"),
        _json("info"),
        _now("started_at"),
        _now("seen_at"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "reconciler",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("swept_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("takeover_after", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
