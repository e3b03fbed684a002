"""The recipe: its sections, one file each, the stages it needs, and loading it from a file."""
