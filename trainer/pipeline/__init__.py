"""The stages from a recipe to a registered version; finished stages are not repeated."""
