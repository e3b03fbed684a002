"""Metrics for evaluating answers, one module per kind of answer.

The interface is in `metric.py`, and `choose.py` selects the metrics.
"""
