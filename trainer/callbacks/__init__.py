"""Callbacks that watch a training run step by step. Imports transformers."""
