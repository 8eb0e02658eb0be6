"""The schema of the first databases. Those that were there before there were revisions may lack its later tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_BIG = sa.Integer().with_variant(sa.BigInteger(), "postgresql")


def upgrade() -> None:
    there = set(sa.inspect(op.get_bind()).get_table_names())
    for name, make in _TABLES.items():
        if name not in there:
            make()


def _meta() -> None:
    op.create_table("meta", sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text))


def _sessions() -> None:
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("ended_at", sa.Float),
        sa.Column("end_reason", sa.Text),
        sa.Column("end_detail", sa.Text),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("user_metadata", sa.JSON, nullable=False),
        sa.Column("sdk_version", sa.Text, nullable=False),
        sa.Column("project_id", sa.Text),
        sa.Column("display_name", sa.Text),
    )


def _runs() -> None:
    op.create_table(
        "runs",
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("lora", sa.JSON, nullable=False),
        sa.Column("parent", sa.Text),
        sa.Column("user_metadata", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("last_request_at", sa.Float, nullable=False),
        sa.Column("ended_at", sa.Float),
        sa.Column("corrupted", sa.Boolean, nullable=False),
    )
    op.create_index("ix_runs_session_id", "runs", ["session_id"])
    op.create_index("ix_runs_created_at", "runs", ["created_at"])


def _checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("checkpoint_id", sa.Text, primary_key=True),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("folder", sa.Text, nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("tokenizer", sa.Text, nullable=False),
        sa.Column("lora", sa.JSON, nullable=False),
        sa.Column("has_optimizer", sa.Boolean, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("size_bytes", _BIG, nullable=False),
        sa.Column("parent", sa.Text),
        sa.Column("user_metadata", sa.JSON),
        sa.Column("public", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float),
        sa.Column("superseded_at", sa.Float),
        sa.Column("deleted_at", sa.Float),
        sa.UniqueConstraint("run_id", "kind", "name", "version"),
    )
    for column in ("run_id", "created_at", "expires_at"):
        op.create_index(f"ix_checkpoints_{column}", "checkpoints", [column])
    current = sa.text("superseded_at IS NULL AND deleted_at IS NULL")
    columns = ["run_id", "kind", "name"]
    op.create_index(
        "one_current_version",
        "checkpoints",
        columns,
        unique=True,
        sqlite_where=current,
        postgresql_where=current,
    )


def _samplers() -> None:
    op.create_table(
        "samplers",
        sa.Column("sampler_id", sa.Text, primary_key=True),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("model_path", sa.Text),
        sa.Column("digest", sa.Text),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_index("ix_samplers_session_id", "samplers", ["session_id"])


def _audit() -> None:
    op.create_table(
        "audit",
        sa.Column("entry_id", sa.Integer, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
    )
    op.create_index("ix_audit_at", "audit", ["at"])


def _usage() -> None:
    op.create_table(
        "usage",
        sa.Column("hour", _BIG, primary_key=True, autoincrement=False),
        sa.Column("session_id", sa.Text, primary_key=True),
        sa.Column("base_model", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("tokens", _BIG, nullable=False),
    )


_TABLES = {
    "meta": _meta,
    "sessions": _sessions,
    "runs": _runs,
    "checkpoints": _checkpoints,
    "samplers": _samplers,
    "audit": _audit,
    "usage": _usage,
}
