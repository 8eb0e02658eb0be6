"""Schema versions of the registry: one Alembic revision per change, run when a server opens an older database.

Revision "0007" is the file `versions/r0007_<what>.py`, follows "0006", and makes schema version 7, which the database
keeps in `meta` too: a Tinsmith that knows fewer versions refuses it there. A new database is made from `METADATA` at
once; a test holds that the revisions make the same. There are no downgrades: before an upgrade SQLite's file is copied.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

FOLDER = Path(__file__).parent
_VERSION_TABLE = sa.Table(
    "alembic_version",
    sa.MetaData(),
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),  # as Alembic makes it
)


def newest_version() -> int:
    return max(int(path.name[1:5]) for path in (FOLDER / "versions").glob("r[0-9][0-9][0-9][0-9]_*.py"))


def stored_version(connection: sa.Connection) -> int | None:
    """`None` for a database that holds nothing of ours; 0 for one from before there were revisions."""
    inspector = sa.inspect(connection)
    if not inspector.has_table("meta"):
        return None
    value = connection.execute(sa.text("SELECT value FROM meta WHERE key = 'schema_version'")).scalar()
    version = 1 if value is None else int(value)
    return version if version > 1 or inspector.has_table(_VERSION_TABLE.name) else 0


def create(connection: sa.Connection, metadata: sa.MetaData) -> None:
    """Make an empty database the newest version, in the caller's transaction."""
    metadata.create_all(connection)
    _VERSION_TABLE.create(connection)
    connection.execute(sa.insert(_VERSION_TABLE).values(version_num=f"{newest_version():04d}"))
    _note_version(connection, newest_version())


def upgrade(connection: sa.Connection, version: int | None = None) -> None:
    """Bring an older database to a version, by default the newest, in the caller's transaction: all of it or nothing.

    One from before there were revisions may lack tables; the first revision makes those that are not there.
    """
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    target = newest_version() if version is None else version
    command.upgrade(config, f"{target:04d}")
    _note_version(connection, target)


def _note_version(connection: sa.Connection, version: int) -> None:
    connection.execute(sa.text("DELETE FROM meta WHERE key = 'schema_version'"))
    insert = sa.text("INSERT INTO meta (key, value) VALUES ('schema_version', :version)")
    connection.execute(insert, {"version": str(version)})
