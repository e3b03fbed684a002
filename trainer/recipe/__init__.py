"""The recipe: its sections, its stages, and the reader of its file."""
