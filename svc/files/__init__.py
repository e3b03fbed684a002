"""Files on disk: space, JSON, locks."""
