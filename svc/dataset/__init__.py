"""Chat examples: their schema, reading, checks and fingerprint."""
