"""Searches for the best values of a recipe, or predicts the gain from more data. Both run many trials on a
base that is loaded only once.
"""
