"""Searches for a recipe's best values, or predicts the gain from more data, with many trials on one loaded base."""
