"""The first schema. A new store gets the newest tables from svc/store/tables.py, without migrations."""

revision = "initial"
down_revision = None
