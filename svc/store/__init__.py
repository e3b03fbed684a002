"""The SQL store: what is wanted and what was done about it."""
