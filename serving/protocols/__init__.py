"""The wire formats of the routes, as the gateway needs them. Knows nothing of engines or versions."""
