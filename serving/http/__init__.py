"""The HTTP API: its routes, its request handling, and the only mapping of errors to responses."""
