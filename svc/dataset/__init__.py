"""Chat examples: their schema, readers, checks and fingerprint."""
