"""Turns a recipe into a registered version. Communicates with other packages only through the registry and
the store.
"""
