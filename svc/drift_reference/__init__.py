"""Computes the features by which prompts and answers are compared, and the reference data that versions store."""
