"""Estimates a recipe's memory, disk space, time and cost before a run, without reading the base's weights."""
