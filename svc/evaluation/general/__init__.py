"""General questions that no version is trained on, to measure forgetting."""
