"""Requests whose use was counted and that a replay would do again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table("counted_requests", sa.Column("request_id", sa.Text, primary_key=True))
