"""Files on disk: disk space, JSON files and locks."""
