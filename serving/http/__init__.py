"""The HTTP surface: paths, one request from its first byte to its last, and the one map of errors."""
