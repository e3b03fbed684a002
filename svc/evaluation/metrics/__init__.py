"""Metrics that evaluate answers, by kind of answer. `metric.py` is the interface; `choose.py` selects them."""
