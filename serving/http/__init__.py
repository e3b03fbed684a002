"""The HTTP API: its routes, its request handling, and the single mapping from errors to responses."""
