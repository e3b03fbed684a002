"""Checks of a data set: texts, labels, duplicates, leaks."""
