"""The report of a version: all its facts on one page."""
