"""Background work on clients' files: checking them, and removing expired files."""
