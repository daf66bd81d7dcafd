"""Plain names: the state of a study's job that its events have reported, and the GPU requests in workers' rows."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

#: Keys of `workers.info`, by their names before.
_INFO_KEYS = {"asks_for_room": "gpu_requested", "gave_room_to": "gpu_released_to"}


def upgrade() -> None:
    op.alter_column("study_jobs", "told", new_column_name="reported_state")
    for before, after in _INFO_KEYS.items():
        _rename_info_key(before, after)


def downgrade() -> None:
    for before, after in _INFO_KEYS.items():
        _rename_info_key(after, before)
    op.alter_column("study_jobs", "reported_state", new_column_name="told")


def _rename_info_key(before: str, after: str) -> None:
    op.execute(
        f"UPDATE workers SET info = info - '{before}' || jsonb_build_object('{after}', info -> '{before}')"
        f" WHERE info ? '{before}'"
    )
