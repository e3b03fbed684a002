"""The example data that a version stores for drift, and the features compared for prompts and answers."""
