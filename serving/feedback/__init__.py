"""Writes users' feedback on answers as training data."""
