"""Strict decoding of UTF-8 and JSON, and the comparison of texts."""
