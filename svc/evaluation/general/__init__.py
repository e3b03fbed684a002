"""General questions that no version is trained on, used to measure forgetting."""
