"""Checks of a data set for problems with its texts, labels, duplicates and leaks."""
