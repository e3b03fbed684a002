"""The wire formats of the routes, to the extent that the gateway needs them.

This package knows nothing of engines or versions.
"""
