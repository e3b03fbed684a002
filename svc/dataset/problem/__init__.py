"""What can be wrong with a line, and where it is told."""
