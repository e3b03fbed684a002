"""Metrics that evaluate answers, by the kind of answer. `metric.py` is the port, `choose.py` selects by task."""
