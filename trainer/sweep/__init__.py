"""Searches for the best values of a recipe, or predicts the gain from more data. In both cases,
many trials run on a base that is loaded only once.
"""
