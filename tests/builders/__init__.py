"""Builds what several tests share."""
