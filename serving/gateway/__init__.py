"""The life of one inference request: its key, its limits, its engine and its answer."""
