"""Bytes as text and text as values, strictly."""
