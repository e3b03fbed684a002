"""Searches for a recipe's best values, and predicts the gain from more data: many trials from one base."""
