"""Finds, downloads, converts and checks base models."""
