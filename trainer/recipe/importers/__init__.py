"""Imports recipes from other fine-tuning tools."""
