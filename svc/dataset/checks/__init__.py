"""Data set checks: texts, labels, duplicates and leaks."""
