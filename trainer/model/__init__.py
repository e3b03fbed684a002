"""Loads the model to be trained, and handles its adapters and layers."""
