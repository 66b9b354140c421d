"""Alembic's environment: migrations run on the connection that `flows.state.database.migrate` hands over."""

from alembic import context
from sqlmodel import SQLModel

import flows.state.tables  # noqa: F401  (registers the tables on SQLModel.metadata)

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    render_as_batch=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
