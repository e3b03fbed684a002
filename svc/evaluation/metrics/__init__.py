"""What answers are judged by: one file a metric. `metric.py` is the port, `choose.py` says which belong to a task."""
