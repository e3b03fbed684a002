"""Alembic's entry point; the connection comes from svc/store/database.py."""

from alembic import context

from svc.store.tables import Table

given = context.config.attributes
context.configure(
    connection=given["connection"], target_metadata=Table.metadata, render_as_batch=True, **given["options"]
)
with context.begin_transaction():
    context.run_migrations()
