"""Searches for a recipe's best values, or predicts the gain from more data, using many trials on one loaded
base.
"""
