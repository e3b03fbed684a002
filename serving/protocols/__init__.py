"""The wire formats of the routes, as far as the gateway needs them.

This package knows nothing of engines or versions.
"""
