"""The HTTP API: its routes, its request handling, and the only mapping from errors to responses."""
