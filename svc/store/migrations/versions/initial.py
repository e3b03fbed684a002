"""The first schema. A new store gets its tables and revision from svc/store/tables.py; no migration is run."""

revision = "initial"
down_revision = None
