"""The HTTP surface: the paths, the life of one request, and the one map from errors to responses."""
