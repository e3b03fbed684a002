"""Backups of a home that is in use, and their restoration."""
