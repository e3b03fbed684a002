"""Checks a data set for problems with its texts and labels, and for duplicates and leaks."""
