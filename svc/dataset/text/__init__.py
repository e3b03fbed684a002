"""Decodes UTF-8 and JSON strictly, and compares texts."""
