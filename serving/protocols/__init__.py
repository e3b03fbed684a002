"""The routes' wire formats, as far as the gateway needs them. Knows nothing of engines or versions."""
