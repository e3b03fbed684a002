"""The HTTP API: its routes, the handling of a request, and the only mapping from errors to responses."""
