"""Reads chat examples from JSONL, JSON, CSV and Parquet files, compressed or not, in commonly used formats."""
