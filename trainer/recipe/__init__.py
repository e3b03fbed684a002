"""The recipe: its sections (one module each), the stages that it needs, and the loading of recipe files."""
