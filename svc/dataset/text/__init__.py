"""Strict decoding of UTF-8 and JSON, and comparison of texts."""
