"""Reads chat examples in common formats from JSONL, JSON, CSV and Parquet files, compressed or not."""
