"""Helpers for files on disk: atomic writes, disk space, JSON files and locks."""
