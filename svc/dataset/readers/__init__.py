"""Chat examples from files: JSONL, JSON, CSV and Parquet, compressed or not, in the formats of the field."""
