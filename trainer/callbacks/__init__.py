"""Callbacks that watch a run step by step. Imports transformers."""
