"""Run by Alembic: revisions in the transaction of the connection that was given with the configuration.

`alembic revision` is not used; a revision is a file written by hand after its neighbours in `versions/`.
"""

from __future__ import annotations

from alembic import context

from tinsmith.control.registry import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,  # SQLite cannot alter most of a table: it is copied
    transactional_ddl=True,
)
context.run_migrations()
