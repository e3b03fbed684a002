"""General questions that no version is trained on: what a model forgets by learning a task."""
