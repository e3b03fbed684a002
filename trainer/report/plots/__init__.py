"""The report's plots, grouped by subject."""
