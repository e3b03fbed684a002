"""Runs the stages that turn a recipe into a registered version. Finished stages are not repeated."""
