"""Plain names: the state of a study's job that its events have reported, and the GPU requests in workers' rows."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

#: Keys of `workers.info`: {old name: new name}.
_INFO_KEYS = {"asks_for_room": "gpu_requested", "gave_room_to": "gpu_released_to"}


def upgrade() -> None:
    op.alter_column("study_jobs", "told", new_column_name="reported_state")
    for old, new in _INFO_KEYS.items():
        _rename_info_key(old, new)


def downgrade() -> None:
    for old, new in _INFO_KEYS.items():
        _rename_info_key(new, old)
    op.alter_column("study_jobs", "reported_state", new_column_name="told")


def _rename_info_key(old: str, new: str) -> None:
    op.execute(
        f"UPDATE workers SET info = info - '{old}' || jsonb_build_object('{new}', info -> '{old}')"
        f" WHERE info ? '{old}'"
    )
