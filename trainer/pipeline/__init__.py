"""The stages from a recipe to a registered version. Finished stages are not repeated."""
