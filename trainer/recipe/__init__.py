"""The recipe: its sections, the stages it needs, and loading it from a file."""
