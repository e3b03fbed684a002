"""Chat examples: their schema and fingerprint, and code to read and check them."""
