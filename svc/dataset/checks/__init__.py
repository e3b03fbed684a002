"""What a data set is checked for: texts, labels, duplicates, leaks."""
