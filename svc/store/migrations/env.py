"""Alembic's entry point; the connection comes from svc/store/database.py."""

from alembic import context

from svc.store.tables import Table

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Table.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
