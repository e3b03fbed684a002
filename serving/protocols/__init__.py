"""The wire formats of the routes, to the extent that the gateway needs them.

This package knows nothing about engines or versions.
"""
