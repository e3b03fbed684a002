"""The first schema. A new store gets its tables from svc/store/tables.py, with the newest revision: nothing is run."""

revision = "initial"
down_revision = None
